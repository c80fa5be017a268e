"""An array that numpy saved, ``.npy`` -> its values; nothing in it is unpickled."""

import os
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featx.errors import ImageError

MAGIC = b"\x93NUMPY"
SUFFIX = ".npy"


def read(file: BinaryIO, most_pixels: int) -> NDArray[Any]:
    """Return an array of numbers, ``(H, W)`` or ``(H, W, C)``.

    Raises:
        ImageError: It is another array.
        ValueError: It is truncated, or its header is damaged.
    """
    shape, dtype = read_header(file)
    if dtype.kind not in "buif" or len(shape) not in (2, 3) or 0 in shape:
        what = "Python objects" if dtype.hasobject else dtype
        raise ImageError(f"an array of {what} of shape {shape}: expected numbers, (H, W) or (H, W, C)")
    if shape[0] * shape[1] > most_pixels:
        raise Image.DecompressionBombError(f"{shape[1]} x {shape[0]} pixels")
    begin = file.tell()
    if file.seek(0, os.SEEK_END) - begin < np.prod(shape, dtype=object) * dtype.itemsize:
        raise ValueError("truncated: fewer values than its header says")
    file.seek(0)
    values: NDArray[Any] = np.load(file, allow_pickle=False)
    return values


def read_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return an array's shape and type, and leave the file at its values.

    Raises:
        ValueError: The header is damaged.
    """
    version = np.lib.format.read_magic(file)
    headers = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
    shape, _, dtype = headers[version[0] > 1](file)
    return shape, dtype
