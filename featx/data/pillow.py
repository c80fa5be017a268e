"""What Pillow may open, and its images as 8-bit RGB."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from featx.data import rendering
from featx.data.bands import to_pixels
from featx.data.depth import Pixels, repeat_grey
from featx.data.view import PLAIN, View
from featx.errors import BadValueError, count
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


def convert(image: Image.Image, view: View, alpha: Pixels | None = None) -> tuple[Pixels, tuple[str, ...]]:
    """Return an image as 8-bit RGB, and what is remarkable about it.

    Args:
        image: The image.
        view: How it is seen.
        alpha: Its opacity, ``(H, W) uint8``; None: what Pillow has of it.

    Raises:
        BadValueError: An option is needed, or does not fit.
        ImageError: Its color profile cannot be used.
    """
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)  # (H, W)
        is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
        values = values.astype(np.uint16) if is_16_bit else values
        return from_values(values, 16 if is_16_bit else 32, view, f"mode {image.mode}", image, alpha)
    if view.is_plain:
        return np.array(image if image.mode == "RGB" else image.convert("RGB")), ()
    profile, orientation = metadata(image, view)
    if view.background is not None and alpha is None and image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha, image = np.asarray(rgba.getchannel("A")), image if image.mode in rendering.GREY else rgba
    return rendering.render(image, view, alpha, profile, orientation), ()


def from_values(
    values: NDArray[Any],
    bits: int,
    view: View,
    what: str,
    image: Image.Image | None = None,
    alpha: Pixels | None = None,
    white: int | None = None,
) -> tuple[Pixels, tuple[str, ...]]:
    """Return the values of a file as 8-bit RGB, and what is remarkable about it.

    Args:
        values: Grey, RGB or any channels, ``(H, W)`` or ``(H, W, C)``.
        bits: Of each value in the file.
        view: How they are seen.
        what: What holds them, for messages.
        image: Pillow's image of the file, whose profile and Orientation are used and whose alpha is left out.
        alpha: Its opacity, ``(H, W) uint8``.
        white: The largest value that the file can hold, if not of all these bits.

    Raises:
        BadValueError: An option is needed, or does not fit.
        ImageError: Its color profile cannot be used.
    """
    if image is not None and values.ndim == 3 and view.bands is None and values.shape[2] in (2, 4):
        values = values[..., :-1]
    pixels, remarks = to_pixels(values, bits, view, what, white)
    if not view.is_plain and image is not None:
        chosen = replace(view, bands=None)
        pixels = rendering.render(Image.fromarray(pixels), chosen, alpha, *metadata(image, view))
    return pixels if pixels.ndim == 3 else repeat_grey(pixels), remarks


def metadata(image: Image.Image, view: View) -> tuple[bytes | None, int | None]:
    """Return an image's ICC profile and, where it counts, its Orientation."""
    return image.info.get("icc_profile"), rendering.orientation_of(image) if view.exif_rotate else None


def turn_to_page(image: Image.Image | None, page: int | None) -> None:
    """Have Pillow decode a page, from 1; None is a file of one page."""
    if page is None:  # counting pages reads the whole file, and later ones may be damaged
        return
    pages = getattr(image, "n_frames", 1)
    if page > pages:
        raise BadValueError(f"{count(pages, 'page')}: --data.page {page} is not in it")
    if image is not None:
        image.seek(page - 1)
