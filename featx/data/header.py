"""An image file -> what its header says: format, color, depth, size, orientation and profile, without decoding it."""

import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, ImageCms

from featx.data import arrays, heif, png, tiff, unscaled
from featx.data.pillow import FORMATS, MOST_PIXELS, STRICT_PIL

ORIENTATION = 274  # the tag of EXIF and TIFF
PNG_COLORS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey", 6: "RGB"}
COLORS = {"1": "grey", "L": "grey", "I": "grey", "F": "grey", "P": "palette"}  # by Pillow's mode
DEPTHS = {"1": ("u", 1), "I": ("i", 32), "F": ("f", 32)}


class Header(NamedTuple):
    """What the header of an image file says.

    Attributes:
        format: Pillow's name of the format.
        color: grey, RGB, palette, CMYK, ...
        kind: numpy's letter for the type of the values: u, i or f.
        bits: Of each value.
        width: In pixels.
        height: In pixels.
        orientation: From EXIF, XMP or TIFF's tag; 1 is upright.
        profile: The description in its ICC profile, or "".
        has_alpha: Whether pixels may be transparent.
        has_more: Whether there are more frames or pages.
    """

    format: str
    color: str
    kind: str
    bits: int
    width: int
    height: int
    orientation: int
    profile: str
    has_alpha: bool
    has_more: bool

    @property
    def depth(self) -> str:
        """The bits and the type of the values, such as ``8-bit`` or ``32-bit float grey``."""
        if self.kind == "u" and self.bits <= 8:
            return f"{self.bits}-bit"
        kind = {"f": "float ", "i": "signed "}.get(self.kind, "")
        return f"{self.bits}-bit {kind}{self.color if self.color == 'grey' else 'color'}"

    @property
    def needs_range(self) -> bool:
        """Whether only ``--data.value_range`` says which values are black and white."""
        return self.kind != "u" or self.bits > 16

    @property
    def needs_bands(self) -> bool:
        """Whether nothing says which channels are red, green and blue."""
        return self.color.endswith("-band")


def read(file: BinaryIO, name: str, page: int | None = None) -> Header:
    """Read the header of an image file.

    Args:
        file: The file.
        name: Its name.
        page: Which page of a TIFF, from 1; None: the first that is not a thumbnail.

    Raises:
        Exception: Whatever a library raises for a header that cannot be read.
    """
    with STRICT_PIL:
        head = file.read(32)
        file.seek(0)
        if head.startswith(tiff.MAGIC):
            header = _of_tiff(file, page)
        elif head.startswith(png.MAGIC):
            header = _of_png(file)
        elif head.startswith(arrays.MAGIC) and name.lower().endswith(arrays.SUFFIX):
            header = _of_array(file)
        elif head[4:8] == b"ftyp" and name.lower().endswith(heif.SUFFIXES):
            with heif.open_image(file, MOST_PIXELS) as image:
                header = _of_image(image, file)
        else:
            with Image.open(file, formats=FORMATS) as image:
                header = _of_image(image, file)
    if header.width * header.height > MOST_PIXELS:
        raise Image.DecompressionBombError
    return header


def _of_image(image: Image.Image, file: BinaryIO) -> Header:
    mode, format_ = image.mode, str(image.format).replace("MPO", "JPEG")
    kind, bits = ("u", 16) if mode.startswith("I;16") else DEPTHS.get(mode, ("u", 8))
    if format_ in ("PPM", "JPEG2000"):
        file.seek(0)
        start = file.read(1 << 16)
        if found := unscaled._PNM_HEADER.match(start):
            kind, bits = "u", max(8, int(found[4]).bit_length())
        elif (at := start.find(b"\xff\x4f\xff\x51")) >= 0:  # the SIZ segment, ISO 15444-1 A.5.1
            kind, bits = "ui"[start[at + 42] >> 7], (start[at + 42] & 127) + 1
    color = mode.removesuffix("A").removesuffix("a") if mode not in COLORS else mode
    return Header(
        format=format_,
        color="grey" if mode.startswith("I;16") else COLORS.get(color, color),
        kind=kind,
        bits=bits,
        width=image.width,
        height=image.height,
        orientation=_orientation(image.getexif),
        profile=_description(image.info.get("icc_profile")),
        has_alpha=image.has_transparency_data,
        has_more=bool(getattr(image, "is_animated", False)),
    )


def _of_png(file: BinaryIO) -> Header:
    """Read a PNG's chunks up to its end, past its pixels: Pillow decodes them to find EXIF after them."""
    chunks = dict(_chunks(file))
    width, height = (int.from_bytes(chunks[b"IHDR"][at : at + 4], "big") for at in (0, 4))
    bits, color = chunks[b"IHDR"][8:10]
    packed = chunks.get(b"iCCP", b"").partition(b"\0")[2][1:]
    return Header(
        format="PNG",
        color=PNG_COLORS[color],
        kind="u",
        bits=bits,
        width=width,
        height=height,
        orientation=_orientation(lambda: _exif(chunks[b"eXIf"])),
        profile=_description(zlib.decompressobj().decompress(packed, 1 << 24)) if packed else "",
        has_alpha=color in (4, 6) or b"tRNS" in chunks,
        has_more=chunks.get(b"acTL", b"")[:4] > b"\0\0\0\1",
    )


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    file.seek(len(png.MAGIC))
    while len(start := file.read(8)) == 8 and (kind := start[4:]) != b"IEND":
        length = int.from_bytes(start[:4], "big")
        if kind in (b"IHDR", b"tRNS", b"iCCP", b"eXIf", b"acTL") and length < 1 << 24:
            yield kind, file.read(length)
            file.seek(4, os.SEEK_CUR)
        else:
            file.seek(length + 4, os.SEEK_CUR)


def _of_array(file: BinaryIO) -> Header:
    shape, dtype = arrays.read_header(file)
    channels = shape[2] if shape[2:] else 1
    return Header(
        format="NPY",
        color={1: "grey", 3: "RGB"}.get(channels, f"{channels}-band"),
        kind="u" if dtype.kind == "b" else dtype.kind,
        bits=1 if dtype.kind == "b" else 8 * dtype.itemsize,
        width=shape[1],
        height=shape[0],
        orientation=1,
        profile="",
        has_alpha=False,
        has_more=False,
    )


def _of_tiff(file: BinaryIO, number: int | None) -> Header:
    with tiff.opened(file, number) as page:
        color, needed = tiff.COLOURS.get(page.photometric, (tiff.OTHERS.get(int(page.photometric), "unknown"), 1))
        alpha = [int(kind) in (1, 2) for kind in page.extrasamples]
        more = page.samplesperpixel - needed - sum(alpha)
        if more > 0:
            color = (
                f"{page.samplesperpixel}-band"
                if needed == 1 and page.samplesperpixel > 2
                else f"{color} and {more} more"
            )
        bits = page.bitspersample
        return Header(
            format="TIFF",
            color=color,
            kind="u" if page.dtype is None or page.dtype.kind == "b" else page.dtype.kind,
            bits=bits if isinstance(bits, int) else max(bits),
            width=page.imagewidth,
            height=page.imagelength,
            orientation=_orientation(lambda: {ORIENTATION: page.tags.valueof(ORIENTATION)}),
            profile=_description(page.tags.valueof(34675)),
            has_alpha=any(alpha),
            has_more=any(not getattr(other, "is_reduced", False) for other in islice(page.parent.pages, 1, 9)),
        )


def _exif(data: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(data)
    return exif


def _orientation(tags: Callable[[], Any]) -> int:
    with suppress(Exception):  # EXIF that cannot be read turns nothing
        value = tags().get(ORIENTATION)
        return int(value) if value in range(2, 9) else 1
    return 1


@lru_cache(64)
def _description(profile: bytes | None) -> str:
    """Return the description of an ICC profile, "" without one."""
    if not profile:
        return ""
    try:
        words = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    except (ImageCms.PyCMSError, OSError):
        return "damaged"
    return re.sub(r"[\0\s]+", " ", words).strip()[:60] or "unnamed"
