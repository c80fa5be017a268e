"""What Pillow may open, and its images as 8-bit RGB."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageFile

from featx.data import rendering
from featx.data.depth import SIXTEEN_BITS, Pixels, is_dark, repeat_grey, require_range, to_8_bits
from featx.data.view import PLAIN, View
from featx.process.shared import Shared, ignored

# What Pillow may look for: other formats start programs (EPS starts Ghostscript) or take nearly any bytes as theirs.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "JPEG2000", "AVIF")

# Pillow refuses an image of more as a decompression bomb: twice its MAX_IMAGE_PIXELS, at which it only warns. It reads
# the header of every image but a TIFF, so that this holds whatever decodes it.
MOST_PIXELS = 178_956_970


@contextmanager
def _strict_pil() -> Iterator[None]:
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, MOST_PIXELS // 2
    try:
        with ignored(r"PIL\.|featx\.", Warning):  # remarks on palettes and broken EXIF change no pixel
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


STRICT_PIL = Shared(_strict_pil)  # whatever else the process sets


def to_rgb(image: Image.Image, view: View = PLAIN) -> Pixels:
    """Return one of Pillow's images as 8-bit RGB, ``(H, W, 3) uint8``, as ``decode.read_image`` does a file's."""
    return convert(image, view)[0]


def convert(image: Image.Image, view: View, alpha: Pixels | None = None) -> tuple[Pixels, bool]:
    """Return an image as 8-bit RGB, and whether it is nearly black, as a 12-bit camera's 16-bit file is.

    Args:
        image: The image.
        view: How it is seen.
        alpha: Its opacity, ``(H, W) uint8``; None: what Pillow has of it.

    Raises:
        BadValueError: The values need a ``value_range``.
        ImageError: Its color profile cannot be used.
    """
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)  # (H, W)
        is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
        if not is_16_bit:
            require_range(view.value_range, values.dtype, 32, f"mode {image.mode}")
        white = SIXTEEN_BITS if is_16_bit else None
        grey, dark = to_8_bits(values, white, view.value_range), is_dark(values, white, view.value_range)
        if view.is_plain:
            return repeat_grey(grey), dark
        return rendering.render(Image.fromarray(grey), view, alpha, *metadata(image, view)), dark
    if view.is_plain:
        return np.array(image if image.mode == "RGB" else image.convert("RGB")), False
    profile, orientation = metadata(image, view)
    if view.background is not None and alpha is None and image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha, image = np.asarray(rgba.getchannel("A")), image if image.mode in rendering.GREY else rgba
    return rendering.render(image, view, alpha, profile, orientation), False


def metadata(image: Image.Image, view: View) -> tuple[bytes | None, int | None]:
    """Return an image's ICC profile and, where it counts, its Orientation."""
    return image.info.get("icc_profile"), rendering.orientation_of(image) if view.exif_rotate else None
