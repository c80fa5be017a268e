"""Values above 8 bits -> 8 bits: the one rule for what is black and what is white, whatever the format.

Unsigned values of at most 8 bits are black and white by themselves. Grey of 9 to 16 bits is scaled from the range that
the file states (16 bits, BitsPerSample 12, a PGM's maxval), colour keeps its upper 8 bits; ``value_range``, in the
values that are in the file, says otherwise. Signed, wider and floating-point values have no range of their own.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx.errors import BadValueError, ImageError, count

ValueRange = tuple[float, float] | list[tuple[float, float]]  # of all values, or of each band
Pixels = NDArray[np.uint8]

SIXTEEN_BITS = 65535
DARK = 4095  # the brightest value of a 12-bit camera, which is nearly black among 65,536


def require_range(value_range: ValueRange | None, dtype: np.dtype[Any], bits: int, what: str = "image") -> None:
    """Raise BadValueError where values have no black and white of their own and no ``value_range`` says them.

    Args:
        value_range: The values that become black and white.
        dtype: Of the values.
        bits: Of each value in the file.
        what: What holds them, as in ``grey TIFF``.
    """
    if value_range is not None or (dtype.kind in "bu" and bits <= 16):
        return
    kind = "float" if dtype.kind == "f" else "signed integer" if bits <= 16 else "integer"
    low, high = {"i": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), "u": (0, 2**bits - 1)}.get(dtype.kind, (0, 1))
    raise BadValueError(
        f"{bits}-bit {kind} values ({what}) have no black and white of their own.\n"
        f"--data.value_range says which values those are, for instance --data.value_range '[{low},{high}]'"
    )


def to_8_bits(values: NDArray[Any], white: int | None, value_range: ValueRange | None, colour: bool = False) -> Pixels:
    """Return values as 8 bits, scaled, rounded and clipped; those of 8 bits as they are.

    Args:
        values: Grey or colour of any type, ``(H, W)`` or ``(H, W, C)``.
        white: The largest value that the file can hold; None for values that need a ``value_range``.
        value_range: The values that become black and white.
        colour: Whether values above 8 bits are colour, of which the upper 8 bits are taken without a ``value_range``.

    Raises:
        BadValueError: More or fewer ranges than bands.
        ImageError: Values that are infinite.
    """
    if white == 255:
        return values.astype(np.uint8, copy=False)
    if white is not None and white < 255:
        return ((values.astype(np.uint16) * 255 + white // 2) // white).astype(np.uint8)
    if white is not None and value_range is None and colour:
        return (values >> (white.bit_length() - 8)).astype(np.uint8)
    if isinstance(value_range, list):
        bands = values.reshape(*values.shape[:2], -1)
        if len(value_range) != bands.shape[2]:
            found, given = count(bands.shape[2], "band"), count(len(value_range), "range")
            raise BadValueError(f"{found}: --data.value_range has {given}, expected one per band")
        scaled = [to_8_bits(bands[..., i], white, one) for i, one in enumerate(value_range)]
        return np.stack(scaled, axis=-1).reshape(values.shape)
    assert white is not None or value_range is not None
    low, high = value_range or (0, float(white or 0))
    if values.dtype == np.uint16:  # each value once
        table = _scale(np.arange(SIXTEEN_BITS + 1), low, high)
        return np.take(table, values)
    if not np.isfinite(values).all():
        raise ImageError("holds values that are infinite")
    return _scale(values, low, high)


def _scale(values: NDArray[Any], low: float, high: float) -> Pixels:
    scaled: Pixels = np.rint(np.clip((values.astype(np.float64) - low) * 255 / (high - low), 0, 255)).astype(np.uint8)
    return scaled


def is_dark(values: NDArray[Any], white: int | None, value_range: ValueRange | None) -> bool:
    """Return whether 16-bit grey, read without a ``value_range``, has no value above those of a 12-bit camera."""
    return value_range is None and white == SIXTEEN_BITS and bool(values.max() <= DARK)


def repeat_grey(grey: Pixels) -> Pixels:
    """Return grey ``(H, W)`` as RGB, ``(H, W, 3)``."""
    return np.repeat(grey[:, :, None], 3, axis=2)
