"""YCbCr -> RGB with libtiff's very rounding, which Pillow's own conversion does not have."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from featx.data.depth import Pixels

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: Rec. 601
REFERENCE = (0, 255, 128, 255, 128, 255)  # black and white of Y, zero and one of Cb and of Cr


def to_rgb(values: Pixels, luma: Sequence[float] | None, reference: Sequence[float] | None) -> Pixels:
    """Convert YCbCr, ``(H, W, 3) uint8``, by a TIFF's coefficients.

    https://gitlab.com/libtiff/libtiff/-/blob/v4.7.0/libtiff/tif_color.c: TIFFYCbCrToRGBInit

    Args:
        values: The image.
        luma: YCbCrCoefficients, or None.
        reference: ReferenceBlackWhite, or None.
    """
    red, green, blue = luma or LUMA
    y0, y1, b0, b1, r0, r1 = reference or REFERENCE

    def scale(channel: int, low: float, high: float, most: int) -> NDArray[np.int64]:
        table = np.clip((np.arange(256) - low) * most / (high - low or 1), -4096, 4096).astype(np.int64)
        return np.take(table, values[..., channel])

    def fixed(factor: float) -> int:
        return int(min(max(factor, 0), 2) * 65536 + 0.5)

    y, cb, cr = scale(0, y0, y1, 255), scale(1, b0, b1, 127), scale(2, r0, r1, 127)
    to_red, to_blue, half = fixed(2 - 2 * red), fixed(2 - 2 * blue), 1 << 15
    from_red, from_blue = fixed(red * (2 - 2 * red) / green), fixed(blue * (2 - 2 * blue) / green)
    channels = (
        y + ((to_red * cr + half) >> 16),
        y + ((half - from_blue * cb - from_red * cr) >> 16),
        y + ((to_blue * cb + half) >> 16),
    )
    colours: Pixels = np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)
    return colours
