"""A TIFF -> an RGB image: tifffile decodes it, and this turns what its tags say into colours.

Pillow reads some kinds of TIFF wrongly in silence: 16-bit RGB in planes, 0 as white above 8 bits, strips that are not
in the file or too short, signed values. tifffile refuses what is damaged, except for strips that are missing, and
leaves photometric interpretation to its callers.
"""

import logging
import math
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from featx.data import jpeg, ycbcr
from featx.data.bands import check as check_bands
from featx.data.bands import to_pixels
from featx.data.depth import Pixels, repeat_grey, require_range, to_8_bits
from featx.data.rendering import ORIENTATION, render
from featx.data.view import View
from featx.errors import BadValueError, ImageError, count

# The first bytes of a TIFF and a BigTIFF, little- and big-endian.
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# By PhotometricInterpretation: its name, and how many channels it takes.
COLOURS = {0: ("grey", 1), 1: ("grey", 1), 2: ("RGB", 3), 3: ("palette", 1), 5: ("CMYK", 4), 6: ("YCbCr", 3),
           8: ("Lab", 3)}  # fmt: skip
OTHERS = {4: "transparency mask", 9: "ICC Lab", 10: "ITU Lab", 32803: "raw camera data (CFA)", 32844: "LogL",
          32845: "LogLuv", 34892: "raw camera data (LinearRaw)"}  # fmt: skip
JPEG = (6, 7, 33007, 34892)  # compressions that give YCbCr as RGB

# The tags that decide a pixel.
TAGS = {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339, 347, 530, 532}


def read(file: BinaryIO, view: View, most_pixels: int) -> tuple[Pixels, tuple[str, ...]]:
    """Decode a page of a TIFF to 8-bit RGB.

    Args:
        file: The file, open.
        view: How it is seen.
        most_pixels: A larger image is refused.

    Returns:
        ``(H, W, 3) uint8``, and what is remarkable about it.

    Raises:
        BadValueError: It needs another option.
        ImageError: It is whole, and of a kind that is not read.
        Exception: Whatever tifffile raises for a damaged one.
    """
    with opened(file, view.page) as page:
        _check(page, view)
        if max(page.imagewidth * page.imagelength, page.tilewidth * page.tilelength) > most_pixels:
            raise Image.DecompressionBombError(f"{page.imagewidth} x {page.imagelength} pixels")
        if page.photometric == 6 and page.samplesperpixel == 3 and page.compression not in JPEG:
            pixels = _ycbcr(page, file)
            return pixels if view.is_plain else _render(page, view, Image.fromarray(pixels), None), ()
        samples, is_sparse = _samples(page, file)
        pixels, remarks = _rgb(page, samples, view)
        return pixels, (*remarks, *["nodata"] * (is_sparse and "nodata" not in remarks))


def _render(page: tifffile.TiffPage, view: View, image: Image.Image, alpha: Pixels | None) -> Pixels:
    return render(image, view, alpha, page.tags.valueof(34675), page.tags.valueof(ORIENTATION))


@contextmanager
def opened(file: BinaryIO, number: int | None) -> Iterator[tifffile.TiffPage]:
    """Open a page of a TIFF; what tifffile remarks in this thread is not logged."""
    thread, log = threading.get_ident(), logging.getLogger("tifffile")

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    log.addFilter(is_of_others)
    try:
        file.seek(0)
        with tifffile.TiffFile(file, _multifile=False) as tiff:
            if not tiff.pages:
                raise tifffile.TiffFileError("truncated: its directory is not in the file")
            page = _find(tiff.pages, number)
            _require_tags(page, file)
            yield page
    finally:
        log.removeFilter(is_of_others)


def _require_tags(page: tifffile.TiffPage, file: BinaryIO) -> None:
    """Raise for a tag that decides pixels and cannot be read: tifffile goes on with a default."""
    form = page.parent.tiff
    file.seek(page.offset)
    (count,) = struct.unpack(form.tagnoformat, file.read(form.tagnosize))
    for _ in range(count):
        (code,) = struct.unpack(form.byteorder + "H", file.read(form.tagsize)[:2])
        if code in TAGS and page.tags.valueof(code) is None:
            raise tifffile.TiffFileError(f"tag {code} cannot be read")


def _find(pages: tifffile.TiffPages, number: int | None) -> tifffile.TiffPage:
    """Return a page by its number, from 1, or the first that is not a thumbnail of another."""
    if number is not None and number > len(pages):
        raise BadValueError(f"{count(len(pages), 'page')}: --data.page {number} is not in it")
    page: Any = pages.first
    if number is not None:
        page = pages.get(number - 1)
    elif page.is_reduced:
        others: Any = map(pages.get, range(len(pages)))  # not as frames, which lack tags
        page = next((other for other in others if not other.is_reduced), page)
    return page  # type: ignore[no-any-return]


def _check(page: tifffile.TiffPage, view: View) -> None:
    """Raise ImageError for a page of a kind that is not read, BadValueError for one that needs another option."""
    bits, channels = page.bitspersample, page.samplesperpixel
    if page.photometric not in COLOURS:
        raise ImageError(f"a TIFF of {OTHERS.get(int(page.photometric), f'photometric {page.photometric:d}')}")
    colour, needed = COLOURS[page.photometric]
    if page.dtype is None or page.dtype.kind == "c" or not isinstance(bits, int):
        raise ImageError(f"a {colour} TIFF of {bits}-bit values in sample format {page.sampleformat}")
    kind = {"f": "float ", "i": "signed "}.get(page.dtype.kind, "")
    if not page.imagewidth or not page.imagelength:
        raise tifffile.TiffFileError("no width or height")
    if page.imagedepth > 1:
        raise ImageError(f"a volume of {page.imagedepth} slices in one TIFF page")
    if channels < needed:
        raise ImageError(f"a {colour} TIFF of {channels} channels: it needs {needed}")
    if colour in ("grey", "RGB"):
        check_bands(channels, view.bands, f"{colour} TIFF", (1, 2) if needed == 1 else tuple(range(3, channels + 1)))
    only_8_bits = colour in ("palette", "Lab") or (colour == "YCbCr" and page.compression not in JPEG)
    if only_8_bits and (page.dtype.kind not in "bu" or bits > 8):
        raise ImageError(f"a {bits}-bit {kind}{colour} TIFF")
    if page.photometric == 6 and page.compression not in JPEG and (page.predictor != 1 or page.shaped[0] != 1):
        raise ImageError("a YCbCr TIFF in planes or with a predictor")
    try:
        tifffile.TIFF.DECOMPRESSORS[page.compression]
    except KeyError as err:
        name = getattr(page.compression, "name", page.compression)
        raise ImageError(f"a TIFF with compression {name}, which this installation cannot decode") from err
    require_range(view.value_range, page.dtype, bits, f"{kind}{colour} TIFF")


def _segments(page: tifffile.TiffPage, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the data of each strip or tile; a sparse file has none for some."""
    count = page.shaped[0]  # planes
    if page.is_tiled:
        count *= math.ceil(page.imagelength / page.tilelength) * math.ceil(page.imagewidth / page.tilewidth)
    else:
        count *= math.ceil(page.imagelength / page.rowsperstrip)
    if min(len(page.dataoffsets), len(page.databytecounts)) < count:
        raise tifffile.TiffFileError(f"truncated: {len(page.dataoffsets)} of {count} strips or tiles are in the file")
    end = file.seek(0, 2)
    for index, offset, size in zip(range(count), page.dataoffsets, page.databytecounts, strict=False):
        if offset == 0 and size == 0:
            yield index, b""
            continue
        if offset + size > end:
            raise tifffile.TiffFileError(f"truncated: strip or tile {index} ends after the file")
        if offset == 0 or size == 0:
            raise tifffile.TiffFileError(f"strip or tile {index} has offset {offset} and {size} bytes")
        file.seek(offset)
        yield index, file.read(size)


def _nodata(page: tifffile.TiffPage) -> float | None:
    """Return the value that GDAL's tag says is no data, if values of the page's type can have it."""
    assert page.dtype is not None
    with suppress(ValueError, OverflowError):
        value = float(str(page.tags.valueof(42113)).strip(" \0").replace(",", "."))
        if page.dtype.kind == "f":
            return value
        limits = np.iinfo(page.dtype if page.dtype.kind in "iu" else np.uint8)
        if value == int(value) and limits.min <= value <= limits.max:
            return int(value)
    return None


def _samples(page: tifffile.TiffPage, file: BinaryIO) -> tuple[NDArray[Any], bool]:
    """Decode all samples, ``(H, W, C)``, and say whether the file is sparse."""
    assert page.dtype is not None
    planes, _, height, width, channels = page.shaped
    samples = np.zeros((planes, height, width, channels), page.dtype)  # which takes memory only as it is filled
    empty, is_sparse = _nodata(page), False
    if empty is None:
        empty = np.nan if page.dtype.kind == "f" else np.iinfo(page.dtype).min if page.dtype.kind == "i" else 0
    tables, header = page.jpegtables, page.jpegheader
    for index, data in _segments(page, file):
        _, (plane, _, top, left, _), (_, rows, columns, _) = page.decode(None, index)
        rows, columns = min(rows, height - top), min(columns, width - left)  # the rest of a tile is padding
        if not data:
            samples[plane, top : top + rows, left : left + columns], is_sparse = empty, True
            continue
        part = _jpeg(page, data, channels)
        if part is None:
            decoded, *_ = page.decode(data, index, jpegtables=tables, jpegheader=header)
            assert decoded is not None
            part = decoded[0]
        if part.shape[0] < rows or part.shape[1] < columns:
            raise tifffile.TiffFileError(f"strip or tile {index} holds {part.shape[1]} x {part.shape[0]} pixels")
        samples[plane, top : top + rows, left : left + columns] = part[:rows, :columns]
    return np.moveaxis(samples[..., 0], 0, -1) if planes > 1 else samples[0], is_sparse


def _jpeg(page: tifffile.TiffPage, data: bytes, channels: int) -> Pixels | None:
    """Decode JPEG data strictly, which tifffile does not; return None for data of another kind."""
    space = {1: "GRAY", 3: "RGB", 4: "CMYK"}.get(channels)
    if page.compression != 7 or page.bitspersample != 8 or page.jpegheader is not None or space is None:
        return None
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([page.photometric == 6])  # whether it is YCbCr
    if any(part.marker in jpeg.FRAMES and data[part.content + 5] != channels for part in jpeg.segments(data)):
        raise tifffile.TiffFileError(f"JPEG data of another number of channels than {channels}")
    tables = (page.jpegtables or jpeg.SOI).removesuffix(b"\xff\xd9")
    return jpeg.decode(jpeg.SOI + adobe + tables[2:] + data[2:], space)


def _rgb(page: tifffile.TiffPage, samples: NDArray[Any], view: View) -> tuple[Pixels, tuple[str, ...]]:
    """Turn samples ``(H, W, C)`` of any depth into colours, ``(H, W, 3) uint8``."""
    colour, needed = COLOURS[page.photometric]
    white = 2**page.bitspersample - 1 if samples.dtype.kind in "bu" and page.bitspersample <= 16 else None
    premultiplied = needed in (1, 3) and page.extrasamples[:1] == (1,) and view.bands is None
    alpha = _alpha(page, samples, needed, white) if premultiplied or view.background is not None else None
    if colour == "palette":
        pixels = _palette(page)[samples[..., 0].astype(np.intp)]
        return pixels if view.is_plain else _render(page, view, Image.fromarray(pixels), alpha), ()
    if view.bands is None:
        samples = samples[..., :needed]
    if colour not in ("grey", "RGB"):
        values, mode = to_8_bits(samples[..., :needed], white, view.value_range, colour=True), colour.upper()
        if needed == 3 and colour != "Lab":  # YCbCr of JPEG, which has been converted
            mode = "RGB"
        return _render(page, view, _image(values, mode), alpha), ()
    pixels, remarks = to_pixels(samples, page.bitspersample, view, f"{colour} TIFF", nodata=_nodata(page))
    if premultiplied and alpha is not None:
        pixels = _unpremultiply(pixels, alpha if pixels.ndim == 2 else alpha[..., None])
    if page.photometric == 0:
        pixels = 255 - pixels
    if not view.is_plain:
        return _render(page, replace(view, bands=None), Image.fromarray(pixels), alpha), remarks
    return repeat_grey(pixels) if pixels.ndim == 2 else np.ascontiguousarray(pixels), remarks


def _image(values: Pixels, mode: str) -> Image.Image:
    return Image.frombytes(mode, values.shape[1::-1], values.tobytes(), "raw", mode)


def _alpha(page: tifffile.TiffPage, samples: NDArray[Any], colors: int, white: int | None) -> Pixels | None:
    """Return the opacity of pixels, ``(H, W) uint8``, or None: extra samples may be anything, as near infrared."""
    kinds = [int(kind) for kind in page.extrasamples]
    channel = next((colors + i for i, kind in enumerate(kinds) if kind in (1, 2)), samples.shape[2])
    if channel >= samples.shape[2]:
        return None
    return to_8_bits(samples[..., channel], white, None if white else (0, 1), colour=colors > 1)


def _palette(page: tifffile.TiffPage) -> Pixels:
    """Return the colour map, ``(N, 3) uint8``, of 16 bits or, as some programs write it, of 8."""
    colours = np.asarray(page.colormap).T
    if colours.shape != (2**page.bitspersample, 3):
        raise tifffile.TiffFileError(f"a colour map of {colours.shape[0]} colours for {page.bitspersample} bits")
    return (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)


def _unpremultiply(values: Pixels, alpha: Pixels) -> Pixels:
    """Divide colours by the alpha that they were multiplied with, as Pillow does."""
    opacity = alpha.astype(np.uint16)
    colours = values.astype(np.uint16) * 255 // np.maximum(opacity, 1)
    divided: Pixels = np.where(opacity == 0, 0, np.minimum(colours, 255)).astype(np.uint8)
    return divided


def _ycbcr(page: tifffile.TiffPage, file: BinaryIO) -> Pixels:
    """Decode YCbCr without JPEG, whose colours may be sampled at every second pixel: tifffile does not."""
    height, width = page.imagelength, page.imagewidth
    rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)
    across, down = page.subsampling or (2, 2)
    values = np.zeros((height, width, 3), np.uint8)
    decompress = tifffile.TIFF.DECOMPRESSORS[page.compression]
    for index, packed in _segments(page, file):
        if not packed:
            continue
        top, left = divmod(index, math.ceil(width / columns))
        top, left = top * rows, left * columns
        high = rows if page.is_tiled else min(rows, height - top)
        blocks = math.ceil(high / down), math.ceil(columns / across)
        data = decompress(imagecodecs.bitorder_decode(packed) if page.fillorder == 2 else packed)
        need = math.prod(blocks) * (across * down + 2)
        if len(data) < need:
            raise tifffile.TiffFileError(f"truncated: strip or tile {index} has {len(data)} of {need} bytes")
        units = np.frombuffer(data, np.uint8, need).reshape(*blocks, across * down + 2)
        luma = units[..., :-2].reshape(*blocks, down, across).swapaxes(1, 2)
        part = np.empty((blocks[0], down, blocks[1], across, 3), np.uint8)
        part[..., 0] = luma
        part[..., 1:] = units[:, None, :, None, -2:]
        part = part.reshape(blocks[0] * down, blocks[1] * across, 3)[: min(high, height - top), : width - left]
        values[top : top + part.shape[0], left : left + min(part.shape[1], columns)] = part[:, :columns]
    if page.compression == 1 and (across, down) == (1, 1):  # there Pillow converts itself, else libtiff
        return np.array(Image.fromarray(values, "YCbCr").convert("RGB"))
    return ycbcr.to_rgb(values, _ratios(page, 529), _ratios(page, 532))


def _ratios(page: tifffile.TiffPage, tag: int) -> list[float] | None:
    values = page.tags.valueof(tag)
    return None if values is None else [a / (b or 1) for a, b in zip(values[::2], values[1::2], strict=True)]
