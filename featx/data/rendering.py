"""An 8-bit image -> RGB as the options say: its colors in sRGB, over a background, and turned."""

import io
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from featx.data.bands import choose
from featx.data.depth import Pixels, repeat_grey
from featx.data.view import View
from featx.errors import ImageError

ORIENTATION = 274  # the tag of EXIF and TIFF
GREY = ("1", "L", "LA")
SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # of an ICC profile, and Pillow's mode for it


def render(
    image: Image.Image, view: View, alpha: Pixels | None, profile: bytes | None, orientation: int | None
) -> Pixels:
    """Return an image of 8 bits as RGB, ``(H, W, 3) uint8``.

    Args:
        image: The image, whose own transparency is ignored.
        view: What to apply.
        alpha: Its opacity, ``(H, W) uint8``.
        profile: Its ICC profile.
        orientation: Its Orientation, from 1 to 8; any other value turns nothing.

    Raises:
        ImageError: The profile cannot be used.
    """
    if view.bands is not None:
        stored = image if image.mode in ("L", "LA", "RGB", "RGBA") else image.convert("RGB")
        image = Image.fromarray(choose(np.asarray(stored), view.bands, "image"))
    pixels: Pixels = np.array(_to_srgb(image, profile) if view.srgb and profile else image.convert("RGB"))
    if view.background is not None and alpha is not None:
        opacity = alpha[..., None].astype(np.uint16)
        behind = np.array(view.background, np.uint16) * (255 - opacity)
        pixels = ((pixels * opacity + behind + 127) // 255).astype(np.uint8)
    return turn(pixels, orientation) if view.exif_rotate else pixels


def render_chosen(pixels: Pixels, view: View, alpha: Pixels | None, image: Image.Image | None) -> Pixels:
    """Return bands that are chosen, ``(H, W)`` or ``(H, W, 3)``, as RGB; Pillow's ``image`` has the metadata."""
    if image is not None and not view.is_plain:
        pixels = render(Image.fromarray(pixels), replace(view, bands=None), alpha, *metadata(image, view))
    return repeat_grey(pixels) if pixels.ndim == 2 else pixels


def metadata(image: Image.Image, view: View) -> tuple[bytes | None, int | None]:
    """Return an image's ICC profile and, if the view needs it, its Orientation."""
    return image.info.get("icc_profile"), orientation_of(image) if view.exif_rotate else None


def orientation_of(image: Image.Image) -> int | None:
    """Return the Orientation in an image's EXIF or XMP; None without one, or if these cannot be read."""
    with suppress(Exception):  # SyntaxError, struct.error ...; opening a JPEG, Pillow passes over them, too
        found: int | None = image.getexif().get(ORIENTATION)
        return found
    return None


def turn(pixels: Pixels, orientation: int | None) -> Pixels:
    """Return an image upright, ``(H, W, 3)`` or ``(W, H, 3)``, as its Orientation says.

    https://www.awaresystems.be/imaging/tiff/tifftags/orientation.html
    """
    if orientation is None or orientation not in range(2, 9):
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        mode, transform = _transform(profile)
    except (ImageCms.PyCMSError, OSError) as err:
        raise ImageError(f"its color profile cannot be used ({err})") from err
    if (mode == "L" and image.mode not in GREY) or (mode == "CMYK") != (image.mode == "CMYK"):
        raise ImageError(f"its color profile is for {mode}, and the image is {image.mode}")
    converted: Image.Image = transform.apply(image if image.mode == mode else image.convert(mode))
    return converted


@lru_cache(16)
def _transform(profile: bytes) -> tuple[str, Any]:
    """Return the mode of images that a profile is for, and the transform to sRGB, perceptual as Pillow's default."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space not in SPACES:
        raise ImageCms.PyCMSError(f"it is for {space}")
    mode = SPACES[space]
    return mode, ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
