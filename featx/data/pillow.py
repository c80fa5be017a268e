"""What Pillow may open, and its images as 8-bit RGB."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageFile

from featx.data.bands import to_pixels
from featx.data.depth import Pixels
from featx.data.rendering import GREY, metadata, render, render_chosen
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
    return convert(image, view, f"mode {image.mode}")[0]


def convert(image: Image.Image, view: View, what: str, alpha: Pixels | None = None) -> tuple[Pixels, tuple[str, ...]]:
    """Return an image as 8-bit RGB, and what is remarkable about it.

    Args:
        image: The image.
        view: How it is seen.
        what: What it is, for messages.
        alpha: Its opacity, if Pillow's is not to be taken.

    Raises:
        BadValueError: It needs an option.
    """
    if image.mode.startswith(("I", "F")):
        is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
        values = np.asarray(image)  # (H, W)
        pixels, remarks = to_pixels(
            values.astype(np.uint16) if is_16_bit else values, 16 if is_16_bit else 32, view, what
        )
        return render_chosen(pixels, view, alpha, image), remarks
    if view.is_plain:
        return np.array(image if image.mode == "RGB" else image.convert("RGB")), ()
    profile, orientation = metadata(image, view)
    if view.background is not None and alpha is None and image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha, image = np.asarray(rgba.getchannel("A")), image if image.mode in GREY else rgba
    return render(image, view, alpha, profile, orientation), ()


def turn_to_page(image: Image.Image | None, page: int | None) -> None:
    """Have Pillow decode a page, from 1; no image is a file of one page.

    Raises:
        BadValueError: There is no such page.
    """
    if page is None:
        return
    pages = getattr(image, "n_frames", 1)  # which reads the whole file
    if page > pages:
        raise BadValueError(f"{count(pages, 'page')}: --data.page {page} is not in it")
    if image is not None:
        image.seek(page - 1)
