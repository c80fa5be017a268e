"""A JPEG -> pixels, strictly: libjpeg-turbo's warnings are errors, unless they cannot concern a pixel."""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import simplejpeg

from featx.data.depth import Pixels

# What the strict decoder says of a JPEG that is not damaged but beyond it, such as 4:1:0, or Cb and Cr sampled apart.
# Pillow alone judges these.
BEYOND = "tjDecompressHeader3(): Could not determine subsampling level"
# Its warnings of what changes no pixel, where nothing else is wrong.
ODDITIES = (
    "extraneous bytes before marker",
    "Invalid SOS parameters for sequential JPEG",
    "Unknown Adobe color transform code",
    "unknown JFIF revision number",
)
MAGIC = b"\xff\xd8\xff"
SOI, EOI, SOS = b"\xff\xd8", 0xD9, 0xDA
FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)}
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
ALONE = {0x01, *range(0xD0, 0xDA)}  # markers without a length

_END_OF_SCAN = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")  # any marker but those between two parts of a scan


class _Segment(NamedTuple):
    marker: int
    start: int  # of its bytes, the marker among them
    content: int  # after its length
    end: int  # after which the coded data of a scan follow


def decode(data: bytes, space: str, first_scan: int = 0) -> Pixels | None:
    """Decode a whole JPEG to Pillow's values.

    Args:
        data: The file.
        space: RGB, GRAY, or CMYK for four channels as they are in the file.
        first_scan: Where the coded data of the first scan begin, if known; it saves looking for it.

    Returns:
        ``(H, W, C) uint8``, or None for a JPEG that only Pillow can decode.

    Raises:
        ValueError: It is damaged, or data are missing.
    """
    try:
        pixels = _decode(data, space)
    except ValueError as err:
        if not any(oddity in str(err) for oddity in ODDITIES):
            raise
        pixels = _decode(_without_oddities(data), space)
    channels = pixels.shape[2] if pixels is not None else 0
    if not _is_one_scan(data, first_scan, channels) and _lacks_scans(data):
        raise ValueError("truncated: the last scans of the JPEG are not in the file")
    return pixels


def _decode(data: bytes, space: str) -> Pixels | None:
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, space)
        return pixels
    except ValueError as err:
        if str(err).startswith(BEYOND):
            return None
        raise


def segments(data: bytes) -> Iterator[_Segment]:
    """Yield the segments of a JPEG, from the first after its start to its end marker, or as far as they can be read."""
    at = 2
    while (start := data.find(b"\xff", at)) >= 0:
        at = start
        while data[at : at + 1] == b"\xff":
            at += 1
        if at == len(data):
            return
        marker = data[at]
        at += 1
        if marker == 0:  # a stray byte
            continue
        length = 0 if marker in ALONE else int.from_bytes(data[at : at + 2], "big")
        yield _Segment(marker, start, at + 2 * (length > 0), at + length)
        if marker == EOI:
            return
        at += length
        if marker == SOS:
            found = _END_OF_SCAN.search(data, at)
            at = found.start() if found else len(data)


def _without_oddities(data: bytes) -> bytes:
    """Leave out bytes between segments and zeros after the end of a scan, and put right what libjpeg does not use.

    Some cameras write such zeros. Where zeros overwrote the end of a scan, the decoder then finds the scan too short;
    other bytes there may be what a damaged scan did not use, and stay.
    """
    kept, progressive, channels = [SOI], False, 3
    for segment in segments(data):
        if segment.marker in FRAMES and segment.content + 5 < len(data):
            progressive, channels = segment.marker in PROGRESSIVE, data[segment.content + 5]
    for segment, following in pairwise(segments(data)):
        content = data[segment.content : segment.end]
        if content.startswith(b"JFIF\0"):
            content = b"JFIF\0\1" + content[6:]
        elif content.startswith(b"Adobe") and len(content) == 12 and content[11] > 0:
            content = content[:11] + bytes([1 if channels == 3 else 2])  # YCbCr or YCCK, as libjpeg then takes it
        elif segment.marker == SOS and not progressive:
            content = content[:-3] + b"\0\x3f\0"
        kept += [data[segment.start : segment.content], content]
        if segment.marker == SOS:
            scan = data[segment.end : following.start].rstrip(b"\0")
            kept += [scan, b"\0" * scan.endswith(b"\xff")]  # written as FF 00
    return b"".join([*kept, b"\xff\xd9"])


def _is_one_scan(data: bytes, end: int, channels: int) -> bool:
    """Return whether a header that ends at ``end`` is of a scan of all channels, to their last bits."""
    size = 6 + 2 * channels
    header = data[end - 2 - size : end] if end > 0 else b""
    return header.startswith(b"\xff\xda" + bytes([0, size, channels])) and header.endswith(b"\0\x3f\0")


def _lacks_scans(data: bytes) -> bool:
    """Return whether a component, or in a progressive JPEG the last bit of one of its coefficients, is in no scan."""
    bits: dict[int, list[int]] = {}  # by component, of each coefficient, how many lower bits have not come; 99: all
    progressive = False
    for segment in segments(data):
        content = data[segment.content : segment.end]
        if segment.marker in FRAMES and len(content) > 5:
            progressive = segment.marker in PROGRESSIVE
            bits = {component: [99] * 64 for component in content[6::3][: content[5]]}
        elif segment.marker == SOS and len(content) >= 4:
            components = content[1 : 2 * content[0] : 2]
            first, last, low = (content[-3], content[-2], content[-1] & 15) if progressive else (0, 63, 0)
            for component in components:
                if component in bits:
                    bits[component][first : last + 1] = [low] * (last + 1 - first)
            if not progressive and len(components) == len(bits):
                return False
    return any(any(left) for left in bits.values())
