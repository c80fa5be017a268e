"""A PNG is whole: its checksums are right and its data suffice for all pixels, which Pillow does not look at."""

import math
import zlib
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featx.data.depth import Pixels

MAGIC = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
PALETTE = 3
# Adam7: where the pixels of each pass begin and how far apart they are, across and down.
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


class Png(NamedTuple):
    """A PNG without the chunks that change no pixel.

    Attributes:
        data: The file.
        width: In pixels.
        height: In pixels.
        bits: Of each channel.
        colour_type: As in the header: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA.
        interlaced: Whether the pixels come in seven passes.
        packed: The compressed pixels.
        extra: The content of chunks that were asked for, and of tRNS.
    """

    data: bytes
    width: int
    height: int
    bits: int
    colour_type: int
    interlaced: bool
    packed: list[memoryview]
    extra: dict[bytes, bytes]


def parse(data: bytes, wanted: Collection[bytes] = ()) -> Png:
    """Check the chunks that pixels depend on, and leave out text, profiles and the like.

    Pillow refuses a file with more than 1 MB of text, or with a wrong checksum in it, though its pixels are whole.

    Args:
        data: The file.
        wanted: Other chunks, whose content is checked and returned: iCCP, eXIf.

    Raises:
        OSError: The file is truncated.
        SyntaxError: A checksum is wrong, or a chunk missing.
    """
    view, at, kept, header, packed = memoryview(data), 8, [memoryview(MAGIC)], b"", list[memoryview]()
    has_palette, extra = False, dict[bytes, bytes]()
    while (kind := data[at + 4 : at + 8]) != b"IEND":
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if len(kind) < 4 or end > len(data):
            raise OSError("Truncated File Read")
        if not kind.isalpha():
            raise SyntaxError(f"broken PNG file (chunk {kind!r})")
        critical, needed = kind[:1].isupper(), kind == b"tRNS" or kind in wanted
        if (critical or needed) and zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            raise SyntaxError(f"broken PNG file (bad header checksum in {kind!r})")
        if critical:
            kept.append(view[at:end])
        if needed:
            extra[kind] = data[at + 8 : end - 4]
        if kind == b"IHDR":
            header = data[at + 8 : end - 4]
        elif kind == b"IDAT":
            packed.append(view[at + 8 : end - 4])
        has_palette |= kind == b"PLTE"
        at = end
    if len(header) != 13 or header[9] not in CHANNELS or (header[9] == PALETTE and not has_palette):
        raise SyntaxError("broken PNG file (its header or palette is missing)")
    whole = b"".join([*kept, b"\0\0\0\0IEND\xaeB`\x82"])
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    return Png(whole, width, height, header[8], header[9], bool(header[12]), packed, extra)


def profile(png: Png) -> bytes | None:
    """Return the ICC profile that a PNG embeds; its compressed data follow a name and the method."""
    packed = png.extra.get(b"iCCP", b"").partition(b"\0")[2][1:]
    return zlib.decompressobj().decompress(packed, 1 << 26) if packed else None


def alpha(png: Png, values: NDArray[Any]) -> Pixels | None:
    """Return the opacity of pixels, ``(H, W) uint8``, by their alpha channel or tRNS, or None for opaque ones.

    Args:
        png: The file.
        values: Its values, as in the file or as Pillow has them.
    """
    transparent = png.extra.get(b"tRNS", b"")
    if png.colour_type in (4, 6):
        opacity: Pixels = (values[..., -1] >> 8 * (values.dtype == np.uint16)).astype(np.uint8)
        return opacity
    if png.colour_type == PALETTE and transparent:
        table = np.full(256, 255, np.uint8)
        table[: len(transparent)] = np.frombuffer(transparent, np.uint8)[:256]
        found: Pixels = table[values]
        return found
    if len(transparent) != 2 * CHANNELS[png.colour_type]:
        return None
    key = np.frombuffer(transparent, ">u2") & (2**png.bits - 1)
    key = key * (255 // (2**png.bits - 1)) if png.bits < 8 else key
    scaled = values.astype(np.uint8) * 255 if values.dtype == bool else values
    is_key = (scaled.reshape(*values.shape[:2], -1) == key).all(axis=-1)
    opaque: Pixels = np.where(is_key, 0, 255).astype(np.uint8)
    return opaque


def has_all_pixels(png: Png) -> bool:
    """Return whether the compressed data hold as many bytes as the pixels need."""
    bits = png.bits * CHANNELS[png.colour_type]
    passes = PASSES if png.interlaced else ((0, 0, 1, 1),)
    missing = 0
    for left, top, across, down in passes:
        columns, rows = -(-(png.width - left) // across), -(-(png.height - top) // down)
        if columns > 0 and rows > 0:
            missing += rows * (1 + math.ceil(columns * bits / 8))  # a filter's number begins each row
    inflate = zlib.decompressobj()
    for some in png.packed:
        rest: bytes | memoryview = some
        while rest and missing > 0 and not inflate.eof:
            missing -= len(inflate.decompress(rest, 1 << 20))
            rest = inflate.unconsumed_tail
    return missing <= len(inflate.flush()) if not inflate.eof else missing <= 0
