"""The values above 8 bits that are in a PNG, a PGM, a PPM or a JPEG 2000, where Pillow has none or scales them."""

import re
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

_GAP = rb"(?:\s|#[^\r\n]*)+"
_PNM_HEADER = re.compile(rb"P([2356])" + 3 * (_GAP + rb"(\d+)") + rb"\s")


def read_pnm(data: bytes) -> tuple[NDArray[np.uint16], int] | None:
    """Return the values of a PGM or PPM, ``(H, W)`` or ``(H, W, 3)``, and its maxval; None for one of 8 bits.

    Pillow scales them to 65535, or to 255 where they are colour. https://netpbm.sourceforge.net/doc/pgm.html

    Raises:
        ValueError: It is truncated, or holds something else.
    """
    if data[1:2] not in (b"2", b"3", b"5", b"6"):
        return None
    header = _PNM_HEADER.match(data)
    if header is None:
        raise ValueError("a header that cannot be read")
    if int(header[4]) <= 255:
        return None
    width, height, maxval = (int(number) for number in header.groups()[1:])
    shape = (height, width, 3) if header[1] in b"36" else (height, width)
    count = int(np.prod(shape))
    if header[1] in b"56":
        if len(data) - header.end() < 2 * count:
            raise ValueError("truncated: fewer values than pixels")
        values = np.frombuffer(data, ">u2", count, header.end()).astype(np.uint16)
        return np.minimum(values, maxval).reshape(shape).astype(np.uint16), maxval
    words = re.sub(rb"#[^\r\n]*", b"", data[header.end() :]).split()[:count]
    if len(words) < count:
        raise ValueError("truncated: fewer values than pixels")
    numbers = np.array(words).astype(np.int64)
    if numbers.min() < 0 or numbers.max() > maxval:
        raise ValueError(f"values outside of 0..{maxval}")
    return numbers.reshape(shape).astype(np.uint16), maxval


def read_jpeg2000(data: bytes) -> tuple[NDArray[Any], int] | None:
    """Return the values of a JPEG 2000, ``(H, W)`` or ``(H, W, C)``, and their bits; None for unsigned ones of 8 bits.

    Pillow shifts them to 16 bits, and colours to 8, where it turns the brightest into black.
    """
    start = data.find(b"\xff\x4f\xff\x51")  # the codestream and its SIZ segment, ISO 15444-1 A.5.1
    if start < 0 or len(data) < start + 43:
        return None
    size = data[start + 42]
    if size <= 7:
        return None
    return imagecodecs.jpeg2k_decode(data), (size & 127) + 1


def jpeg2000_metadata(data: bytes) -> dict[str | tuple[int, int], bytes]:
    """Return a JPEG 2000's ICC profile and EXIF, which Pillow does not read, by Pillow's names for them."""
    found, at = (
        dict[str | tuple[int, int], bytes](),
        data.find(b"colr\2", 0, 1 << 16),
    )  # ISO 15444-1 I.5.3.3: method, precedence, approximation, profile
    if at >= 4:
        found["icc_profile"] = data[at + 7 : at - 4 + int.from_bytes(data[at - 4 : at], "big")]
    if exif := data.partition(b"JpgTiffExif->JP2")[2]:
        found["exif"] = exif
    return found


def read_png(data: bytes) -> NDArray[np.uint16]:
    """Return the values of a 16-bit PNG, ``(H, W)`` or ``(H, W, C)``; of colours Pillow has only the upper 8 bits."""
    values: NDArray[np.uint16] = imagecodecs.png_decode(data)
    return values
