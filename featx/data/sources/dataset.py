"""A dataset in memory -> its PIL images: torch's, Hugging Face's, or any iterable."""

from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from featx.errors import BadValueError, ImageError


def items(source: Any, column: str | None = None) -> Iterator[Any]:
    """Yield what is in a source, or for an item of a map-style dataset the exception that it raises.

    Args:
        source: A map-style dataset of torch or of Hugging Face, whose other columns are not decoded; or any iterable.
        column: The column of images; None: the only one.

    Raises:
        BadValueError: There is no such column of images.
    """
    is_map = isinstance(source, Dataset) and not isinstance(source, IterableDataset)
    if isinstance(features := getattr(source, "features", None), Mapping) and hasattr(source, "select_columns"):
        found = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
        wanted = [column] if column is not None else found
        if len(wanted) != 1 or wanted[0] not in found:
            known = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
            raise BadValueError(f"{_asked(column)} expected one column of type Image. The dataset has {known}.")
        source = source.select_columns(wanted)  # without decoding the others
        is_map = hasattr(source, "__len__")
    for item in range(len(source)) if is_map else source:
        try:
            yield source[item] if is_map else item
        except Exception as err:
            yield err


def picture_of(item: Any, name: str, column: str | None) -> Image.Image | ImageError:
    """Return the image of an item, which is one, begins with one, or has one by name."""
    if isinstance(item, Mapping):
        found = [key for key, value in item.items() if isinstance(value, Image.Image)] or list(item)
        wanted = column if column is not None or len(found) != 1 else found[0]
        if wanted not in item:
            known = ", ".join(map(str, item))
            raise BadValueError(f"{_asked(column)} expected one column of PIL images. Item {name} has {known}.")
        column = wanted
        if item[column] is None:
            return ImageError("no image: the value is null")
        picture = item[column]
    elif column is not None:
        raise BadValueError(f"--data.column {column}: item {name} is a {type(item).__name__}, without columns.")
    else:
        picture = item[0] if isinstance(item, tuple | list) and item else item
    if not isinstance(picture, Image.Image):
        raise BadValueError(
            f"source: item {name} is a {type(picture).__name__}. Expected only PIL images, like the first, or only "
            "paths of images.\nA dataset needs no transform and no format: featx resizes and normalizes images itself."
        )
    return picture


def _asked(column: str | None) -> str:
    return "source: column=None:" if column is None else f"--data.column {column}:"
