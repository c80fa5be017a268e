"""HEIC, as phones save photographs: an image by pillow-heif, where that is installed.

It reads files with HEIC's own suffixes only, so that the same folder of JPEGs gives the same rows with and without it,
and nothing is registered with Pillow for the whole process.
"""

from importlib.util import find_spec
from typing import Any, BinaryIO

from PIL import Image

from featx.errors import ImageError

SUFFIXES = (".heic", ".heif", ".hif")
REMEDY = "pillow-heif is not installed: pip install 'featx[heic]'"


def is_installed() -> bool:
    """Return whether pillow-heif is there, without importing it."""
    return find_spec("pillow_heif") is not None


def open_image(file: BinaryIO, most_pixels: int) -> Image.Image:
    """Open a HEIC with its own rotation applied, which is not EXIF's; of 10 bits the upper 8 are taken.

    Args:
        file: The file, at its beginning.
        most_pixels: An image of more is taken for a decompression bomb.
    """
    if not is_installed():
        raise ImageError(f"HEIC, but {REMEDY}")
    import pillow_heif

    plugin: Any = pillow_heif.HeifImageFile
    image: Image.Image = plugin(file)
    if image.width * image.height > most_pixels:
        raise Image.DecompressionBombError
    return image
