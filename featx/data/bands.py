"""The values of a file -> 8 bits: which of its bands are seen, where it has no data, and from which range."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx.data.depth import Pixels, is_dark, require_range, to_8_bits
from featx.data.view import View
from featx.errors import BadValueError, count


def check(channels: int, bands: Sequence[int] | None, what: str, usual: tuple[int, ...] = (1, 3)) -> None:
    """Raise BadValueError where ``bands`` are not in an image, or missing for one that is neither grey nor RGB.

    Args:
        channels: How many the image has.
        bands: Those to take, from 1; None: all, of grey and RGB.
        what: What has them, as in ``TIFF``.
        usual: How many channels need no ``bands``.
    """
    if bands is None and channels not in usual:
        raise BadValueError(
            f"{count(channels, 'channel')} ({what}), none of which is said to be red, green or blue.\n"
            f"--data.bands says which to take, for instance --data.bands '{'[3,2,1]' if channels > 2 else '[1]'}'"
        )
    if bands is not None and max(bands) > channels:
        raise BadValueError(
            f"{count(channels, 'channel')} ({what}): --data.bands {list(bands)} takes channel {max(bands)}"
        )


def choose(values: NDArray[Any], bands: Sequence[int] | None, what: str) -> NDArray[Any]:
    """Return the bands to see of ``(H, W)`` or ``(H, W, C)``: ``(H, W)`` for one, else ``(H, W, 3)``."""
    channels = 1 if values.ndim == 2 else values.shape[2]
    check(channels, bands, what)
    if bands is not None:
        values = values.reshape(*values.shape[:2], channels)[..., [band - 1 for band in bands]]
    return values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values


def to_pixels(
    values: NDArray[Any], bits: int, view: View, what: str, white: int | None = None, nodata: float | None = None
) -> tuple[Pixels, tuple[str, ...]]:
    """Return the values of a file as 8 bits; where there is no data they are the low end of their range.

    Args:
        values: Grey, RGB or any channels, ``(H, W)`` or ``(H, W, C)``.
        bits: Of each value in the file.
        view: How they are seen.
        what: What holds them, as in ``grey TIFF``.
        white: The largest value that the file can hold, if not of all these bits.
        nodata: The value that says that there is no data, as nan always does. Unsigned colors may have it by chance:
            there all channels must.

    Returns:
        ``(H, W)`` or ``(H, W, 3) uint8``, and what is remarkable about it.

    Raises:
        BadValueError: An option is needed, or does not fit.
    """
    values = choose(values, view.bands, what)
    require_range(view.value_range, values.dtype, bits, what)
    if values.dtype.kind in "bu" and bits <= 16:
        white = white or 2**bits - 1
    missing = np.isnan(values) if values.dtype.kind == "f" else None
    if nodata is not None:
        missing = (values == nodata) if missing is None else missing | (values == values.dtype.type(nodata))
        if values.ndim == 3 and values.dtype.kind == "u":
            missing = np.broadcast_to(missing.all(axis=-1, keepdims=True), values.shape)
    if missing is None or not missing.any():
        dark = values.ndim == 2 and is_dark(values, white, view.value_range)
        return to_8_bits(values, white, view.value_range, colour=values.ndim == 3), ("dark",) * dark
    pixels = to_8_bits(
        np.where(missing, values.dtype.type(0), values), white, view.value_range, colour=values.ndim == 3
    )
    pixels[missing] = 0
    return pixels, ("nodata",)
