"""A file -> an RGB image: Pillow's values wherever it reads a file rightly, or what is wrong with it."""

import io
import os
from contextlib import suppress
from dataclasses import replace
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from featx.data import arrays, gif, heif, jpeg, png, reader, sniff, tiff, unscaled
from featx.data.bands import to_pixels
from featx.data.batch import Fault
from featx.data.depth import Pixels, to_8_bits
from featx.data.pillow import FORMATS, MOST_PIXELS, STRICT_PIL, convert, turn_to_page
from featx.data.rendering import metadata, render, render_chosen
from featx.data.sources.base import open_file
from featx.data.view import PLAIN, View
from featx.errors import BadValueError, BrokenSourceError, ImageError

# By kind of file, in Pillow's name for it (PPM16: above 8 bits), the number of its reader, which goes up whenever the
# reader gives other values than before: a run takes no rows that a reader of another number read.
READERS = {"BMP": 1, "GIF": 1, "JPEG": 1, "JPEG2000": 2, "PNG": 1, "PPM": 1, "PPM16": 2, "TIFF": 2, "WEBP": 1}

# Whether Pillow has libjpeg-turbo's values of a JPEG, as in all but odd builds: there Pillow decodes it once more.
PIL_HAS_TURBO = features.check_feature("libjpeg_turbo")

REASONS = (
    (PermissionError, "no permission to read it"),
    (Image.DecompressionBombError, f"more than {MOST_PIXELS:,} pixels"),
    (MemoryError, "not enough memory to decode it"),
    (UnidentifiedImageError, "not an image that PIL can read"),
)


class Decoded(NamedTuple):
    """What an image file holds.

    Attributes:
        pixels: The image, ``(H, W, 3) uint8``, or None.
        fault: What is wrong with it, or None.
        kind: Pillow's name of the kind of file, of which there is an image.
        remarks: What is remarkable about it, as ``batch.REMARKS`` has it.
    """

    pixels: Pixels | None
    fault: Fault | None
    kind: str
    remarks: tuple[str, ...] = ()


def decode_or_fault(file: BinaryIO | Exception, path: str, name: str, view: View = PLAIN) -> Decoded:
    """Decode an image, whatever its file does: what is wrong with it is returned, not raised.

    Args:
        file: The file, which is closed, or why there is none.
        path: What error messages call it.
        name: What the fault calls it.
        view: How it is seen.
    """
    if isinstance(file, Exception):
        return Decoded(None, describe(file, path, name), "")
    with file:
        try:
            return decode(file, path, view if view.strict else replace(view, strict=True))
        except Exception as err:  # decoders raise OSError, SyntaxError, struct.error, MemoryError ... for broken files
            fault = describe(err, path, name)
        if not view.strict:
            with suppress(Exception):  # the fault says it already
                return decode(file, path, view)._replace(fault=fault._replace(used=True))
    return Decoded(None, fault, "")


def read_or_fault(root: str, name: str, view: View = PLAIN) -> Decoded:
    """Decode the image ``name`` below the folder ``root`` as ``decode_or_fault`` does."""
    path = os.path.join(root, name)
    try:
        file: BinaryIO | Exception = open_file(path)
    except (OSError, ImageError, ValueError) as err:
        file = err
    return decode_or_fault(file, path, name, view)


def read_image(path: str, view: View = PLAIN) -> Pixels:
    """Decode an image to 8-bit RGB, with Pillow's values wherever it reads the file rightly.

    Values above 8 bits are scaled as depth.py says, of an animation the first frame is taken, and EXIF rotation and
    profiles are ignored, unless ``view`` says otherwise.

    Pillow fills up some damaged files without an error. Strictly, a JPEG is decoded by libjpeg-turbo with its warnings
    as errors, to the same values, a PNG's checksums and the length of its data are checked, and giflib decodes a GIF,
    too. Damage that leaves a valid file cannot be found; docs/images.md says how much of it there is.

    Args:
        path: The file.
        view: How it is seen; strictly, damaged data that Pillow passes is an error.

    Returns:
        ``(H, W, 3) uint8``.

    Raises:
        BadValueError: It needs an option.
        ImageError: The file is whole and of a kind that is not read, or not an image.
        Exception: Whatever the decoders raise for a damaged one.
    """
    with open_file(path) as file:
        pixels = decode(file, path, view).pixels
    assert pixels is not None
    return pixels


def decode(file: BinaryIO, name: str, view: View = PLAIN) -> Decoded:
    """Decode an open file that can be sought, as ``read_image`` does; raise what it raises.

    Args:
        file: The file.
        name: Its path, for messages.
        view: How it is seen.
    """
    if not file.seek(0, os.SEEK_END):
        raise ImageError("empty")
    file.seek(0)
    if view.reader is not None:
        return _from_array(reader.read(view.reader, file, name, view.bands is not None), view, view.reader)
    try:
        if name.lower().endswith(arrays.SUFFIX) and file.read(len(arrays.MAGIC)) == arrays.MAGIC:
            turn_to_page(None, view.page)
            file.seek(0)
            return _from_array(arrays.read(file, MOST_PIXELS), view, "numpy array")
        file.seek(0)
        return _decode(file, view)
    except UnidentifiedImageError:
        file.seek(0)
        what = sniff.describe(file.read(1 << 18), name)
        if what.startswith("HEIC") and name.lower().endswith(heif.SUFFIXES):
            file.seek(0)
            with STRICT_PIL, heif.open_image(file, MOST_PIXELS) as image:
                turn_to_page(image, view.page)
                return _by_pillow(image, view, "HEIF")
        if what:
            raise ImageError(what) from None
        raise


def _decode(file: BinaryIO, view: View) -> Decoded:
    head = file.read(len(png.MAGIC))
    file.seek(0)
    if head.startswith(tiff.MAGIC):
        pixels, remarks = tiff.read(file, view, MOST_PIXELS)
        return Decoded(pixels, None, "TIFF", remarks)
    with STRICT_PIL:
        if view.strict and head.startswith(png.MAGIC):
            return _decode_png(file.read(), view)
        if view.strict and head.startswith(jpeg.MAGIC):
            return _decode_jpeg(file.read(), view)
        if view.strict and head.startswith(gif.MAGIC):
            gif.check(file.read())
        with Image.open(file, formats=FORMATS) as image:
            kind = str(image.format).replace("MPO", "JPEG")  # several JPEGs, of which the first is taken
            turn_to_page(image, view.page)
            unscaled_values = None
            if kind in ("PPM", "JPEG2000"):
                file.seek(0)
                unscaled_values = _decode_unscaled(file.read(), image, kind, view)
            return unscaled_values or _by_pillow(image, view, kind)


def _by_pillow(image: Image.Image, view: View, kind: str, alpha: Pixels | None = None) -> Decoded:
    pixels, remarks = convert(image, view, kind, alpha)
    return Decoded(pixels, None, kind, remarks)


def _decode_png(data: bytes, view: View) -> Decoded:
    turn_to_page(None, view.page)
    parsed = png.parse(data, [b"iCCP"] * view.srgb + [b"eXIf"] * view.exif_rotate)
    with Image.open(io.BytesIO(parsed.data), formats=("PNG",)) as image:
        image.info["icc_profile"], image.info["exif"] = png.profile(parsed), parsed.extra.get(b"eXIf")
        needs_all_bits = view.value_range or (view.background is not None and b"tRNS" in parsed.extra)
        if parsed.bits == 16 and parsed.colour_type and needs_all_bits:  # of which Pillow has only the upper 8 bits
            values = unscaled.read_png(parsed.data)
            alpha = png.alpha(parsed, values)
            return _from_values(values, parsed.bits, view, "PNG", image, alpha)
        image.load()
        # Pillow leaves rows black that the data do not reach.
        is_black = not image.crop((0, image.height - 1, *image.size)).tobytes().strip(b"\0")
        if (is_black or parsed.interlaced) and not png.has_all_pixels(parsed):
            raise ValueError("truncated: the data end before the last pixel")
        return _by_pillow(image, view, "PNG", png.alpha(parsed, np.asarray(image)) if view.background else None)


def _decode_jpeg(data: bytes, view: View) -> Decoded:
    turn_to_page(None, view.page)
    with Image.open(file := io.BytesIO(data), formats=("JPEG",)) as image:
        cmyk = image.mode == "CMYK"
        pixels = jpeg.decode(data, "CMYK" if cmyk else "RGB", file.tell())  # there Pillow has stopped
        if pixels is None or not PIL_HAS_TURBO:
            return _by_pillow(image, view, "JPEG")
        if cmyk:  # whose conversion to RGB is not Pillow's
            inks = Image.frombytes("CMYK", image.size, pixels.tobytes(), "raw", "CMYK;I")
            return Decoded(render(inks, view, None, *metadata(image, view)), None, "JPEG")
        if not view.is_plain:
            colors = Image.fromarray(pixels[..., 0] if image.mode == "L" else pixels)
            pixels = render(colors, view, None, *metadata(image, view))
        return Decoded(pixels, None, "JPEG")


def _decode_unscaled(data: bytes, image: Image.Image, kind: str, view: View) -> Decoded | None:
    """Decode an image above 8 bits whose values Pillow would scale; return None for another."""
    if kind == "PPM":
        found = unscaled.read_pnm(data)
        if found is None or (found[0].ndim == 3 and view.value_range is None):  # there Pillow scales rightly
            return None
        return _from_values(found[0], found[1].bit_length(), view, "PPM16", image, white=found[1])
    image.info.update(unscaled.jpeg2000_metadata(data))
    read = unscaled.read_jpeg2000(data)
    if read is None:
        return None
    values, bits = read
    has_alpha = values.ndim == 3 and values.shape[2] in (2, 4) and view.background is not None
    alpha = to_8_bits(values[..., -1], 2**bits - 1, None) if has_alpha else None
    return _from_values(values, bits, view, kind, image, alpha)


def _from_values(
    values: Any,
    bits: int,
    view: View,
    kind: str,
    image: Image.Image | None = None,
    alpha: Pixels | None = None,
    white: int | None = None,
) -> Decoded:
    """Turn the values that are in a file, ``(H, W)`` or ``(H, W, C)``, into 8-bit RGB; ``image`` is Pillow's of it."""
    if image is not None and values.ndim == 3 and view.bands is None and values.shape[2] in (2, 4):
        values = values[..., :-1]  # without alpha
    pixels, remarks = to_pixels(values, bits, view, kind, white)
    return Decoded(render_chosen(pixels, view, alpha, image), None, kind, remarks)


def _from_array(values: Any, view: View, kind: str) -> Decoded:
    return _from_values(values, 1 if values.dtype == bool else 8 * values.dtype.itemsize, view, kind)


def describe(err: Exception, path: str, name: str) -> Fault:
    """Return an exception as the fault of the image ``name``, without ``path``: it differs from machine to machine."""
    words = err.strerror if isinstance(err, OSError) and err.strerror else str(err)
    if isinstance(err, UnidentifiedImageError):
        words = "cannot identify image file"
    words = " ".join(words.replace(path, name).split())
    return Fault(name, " ".join(_reason(err, words, path).split()), f"{type(err).__name__}: {words}"[:300])


def _reason(err: Exception, words: str, path: str) -> str:
    if isinstance(err, BadValueError | BrokenSourceError | ImageError):
        return str(err.args[0])
    if isinstance(err, FileNotFoundError):
        return "a link to nothing" if os.path.islink(path) else "no such file"
    for kind, reason in REASONS:
        if isinstance(err, kind):
            return reason
    if isinstance(err, OSError) and err.errno is not None:
        return f"cannot be read: {words}"
    if "not supported" in words.lower() or "unsupported" in words.lower():
        return f"cannot be decoded: {words}"
    if "truncated" in words.lower() or "premature end of jpeg" in words.lower():
        return "truncated"
    return "damaged"
