"""A PNG is whole: its checksums are right and its data suffice for all pixels, which Pillow does not look at."""

import math
import zlib
from typing import NamedTuple

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
    """

    data: bytes
    width: int
    height: int
    bits: int
    colour_type: int
    interlaced: bool
    packed: list[memoryview]


def parse(data: bytes) -> Png:
    """Check the chunks that pixels depend on, and leave out text, profiles and the like.

    Pillow refuses a file with more than 1 MB of text, or with a wrong checksum in it, though its pixels are whole.

    Raises:
        OSError: The file is truncated.
        SyntaxError: A checksum is wrong, or a chunk missing.
    """
    view, at, kept, header, packed = memoryview(data), 8, [memoryview(MAGIC)], b"", list[memoryview]()
    has_palette = False
    while (kind := data[at + 4 : at + 8]) != b"IEND":
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if len(kind) < 4 or end > len(data):
            raise OSError("Truncated File Read")
        if not kind.isalpha():
            raise SyntaxError(f"broken PNG file (chunk {kind!r})")
        critical = kind[:1].isupper()
        if (critical or kind == b"tRNS") and zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            raise SyntaxError(f"broken PNG file (bad header checksum in {kind!r})")
        if critical:
            kept.append(view[at:end])
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
    return Png(whole, width, height, header[8], header[9], bool(header[12]), packed)


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
