"""A GIF's first picture is whole: Pillow skips what it does not know, and some data that it cannot decode."""

import imagecodecs

MAGIC = (b"GIF87a", b"GIF89a")
EXTENSION, PICTURE = 0x21, 0x2C


def check(data: bytes) -> None:
    """Raise where the data of the first picture end early or are damaged, as giflib sees it.

    Raises:
        OSError: The file is truncated.
        RuntimeError: The data are damaged.
    """
    imagecodecs.gif_decode(first_picture(data))


def first_picture(data: bytes) -> bytes:
    """Return a GIF as far as its first picture, and no more: others may be damaged."""
    at = 13 + _size_of_palette(data, 10)
    while at < len(data):
        kind = data[at]
        if kind == PICTURE:
            at += 11 + _size_of_palette(data, at + 9)
        elif kind == EXTENSION:
            at += 2
        else:
            raise OSError(f"a block of type {kind}")
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
        if kind == PICTURE:
            break
    if at > len(data):
        raise OSError("truncated: the data of the first picture are not in the file")
    return data[:at] + b";"


def _size_of_palette(data: bytes, at: int) -> int:
    flags = data[at] if at < len(data) else 0
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0
