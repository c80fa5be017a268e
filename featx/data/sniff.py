"""What a file is that is not an image which featx reads, by its first bytes."""

import os
import re

from PIL import features

from featx.data import jpeg

BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer (git lfs pull fetches the image)"),
    (b"%PDF-", "a PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript (EPS)"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "gzip-compressed data"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"8BPS", "a Photoshop document"),
    (b"gimp xcf", "a GIMP document"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"II\xbc", "JPEG XR"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"\x89HDF", "HDF5"),
    (b"SIMPLE  =", "FITS"),
    (b"PDS_VERSION_ID", "a PDS3 product"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"AT&TFORM", "DjVu"),
    (b"FUJIFILMCCD-RAW", "a raw photograph (Fujifilm)"),
    (b"IIRO", "a raw photograph (Olympus)"),
    (b"IIU\0", "a raw photograph (Panasonic)"),
    (b"\0\x05\x16\x07", "a macOS metadata file (AppleDouble)"),
    (b"bplist00", "a property list, as iCloud leaves in place of a file"),
    (b"DICM", "DICOM"),  # looked for at byte 128, too
)
FTYP = {
    "HEIC": ("heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1"),
    "AVIF": ("avif", "avis"),
    "a raw photograph (CR3)": ("crx ",),
}
# What Pillow reads, by first bytes, and the library for it. A file that it does not know has a damaged header.
KNOWN = ((b"\x89PNG", ""), (b"GIF8", ""), (b"\xff\xd8\xff", "jpg"), (b"BM", ""), (b"\0\0\0\x0cjP", "jpg_2000"),
         (b"\xff\x4f\xff\x51", "jpg_2000"))  # fmt: skip
MARKUP = ((rb"<!doctype html|<html|<head|<body", "a saved web page"), (rb"<svg", "an SVG drawing"), (rb"<\?xml", "XML"))


def describe(head: bytes, name: str) -> str:
    """Return what a file is that Pillow does not know, as ``a saved web page named .jpg``, or nothing.

    Args:
        head: Its first bytes.
        name: Its path.
    """
    what = _what(head)
    suffix = os.path.splitext(name)[1]
    return f"{what} named {suffix}" if what and suffix and not what.endswith(("JPEG", "damaged", "decode")) else what


def _what(head: bytes) -> str:
    if head.startswith(b"\xff\xd8\xff") and (kind := _jpeg(head)):
        return kind
    for beginning, what in BEGINNINGS:
        if head.startswith(beginning):
            return what
    if head[128:132] == b"DICM":
        return "DICOM"
    if head[4:8] == b"ftyp":
        brand = head[8:12].decode("latin-1")
        what = next((kind for kind, brands in FTYP.items() if brand in brands), "a video")
        return what if what != "AVIF" else _known("avif", what)
    if head[:4] == b"RIFF":
        return _known("webp", "WebP") if head[8:12] == b"WEBP" else "a video or sound (RIFF)"
    for beginning, library in KNOWN:
        if head.startswith(beginning):
            return _known(library, "JPEG 2000" if library == "jpg_2000" else "JPEG")
    if not head.strip(b"\0"):
        return "nothing but zeros"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for pattern, what in MARKUP:
        if text[:1] == b"<" and re.search(pattern, text):
            return what
    # A server's error message, saved as an image, is the most common kind.
    return "text" if re.fullmatch(rb"[\t\n\r\x20-\x7e\x80-\xff]+", text) and _is_utf8(text) else ""


def _is_utf8(text: bytes) -> bool:
    try:
        text[:-3].decode()  # the end may be half a character
    except UnicodeDecodeError:
        return False
    return True


def _known(library: str, what: str) -> str:
    missing = library and not features.check(library)
    return f"{what}, which this installation of Pillow cannot decode" if missing else "damaged"


def _jpeg(head: bytes) -> str:
    for segment in jpeg.segments(head):
        if segment.marker == 0xF7:  # ITU-T T.87
            return "JPEG-LS"
        if segment.marker in jpeg.FRAMES and segment.content < len(head):
            bits = head[segment.content]
            return "a lossless JPEG" if segment.marker in jpeg.LOSSLESS else f"a {bits}-bit JPEG" if bits != 8 else ""
    return ""
