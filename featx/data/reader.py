"""``--data.reader``: a function of the user's that turns a path into an array."""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from featx.errors import BadValueError, ImageError, first_line
from featx.process.imports import import_function

EXPECTED = "(H, W) or (H, W, 3), or more channels with --data.bands"


@cache
def find(name: str) -> Callable[[str], Any]:
    """Import the reader; raise BadValueError if that fails."""
    return import_function(name, "--data.reader", "a function that takes a path and returns an array")


@cache
def digest(name: str) -> str:
    """Return the SHA-256 of the file with the reader's code."""
    module = sys.modules.get(getattr(find(name), "__module__", None) or "")
    if (file := getattr(module, "__file__", None)) is None:
        raise BadValueError(f"--data.reader {name}: its code is in no file. Expected a function of a module.")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def read(name: str, file: BinaryIO, path: str, has_bands: bool) -> NDArray[Any]:
    """Return what the reader makes of a file.

    Args:
        name: The reader.
        file: The file; one that is in an archive is copied to a temporary file with its suffix.
        path: Its path, or its name in the archive.
        has_bands: Whether three channels, or one, are taken of more.

    Raises:
        ImageError: It failed.
        BadValueError: It returned something else than an image.
    """
    try:
        with ExitStack() as stack:
            if getattr(file, "name", None) != path:
                copy = stack.enter_context(NamedTemporaryFile(suffix=os.path.splitext(path)[1]))
                shutil.copyfileobj(file, copy)
                copy.flush()
                path = copy.name
            found = find(name)(path)
    except BadValueError:
        raise
    except (Exception, SystemExit) as err:
        raise ImageError(f"{name} failed: {type(err).__name__}: {first_line(err)}") from err
    if not isinstance(found, np.ndarray) or isinstance(found, np.ma.MaskedArray):
        raise BadValueError(
            f"{name} returned a {type(found).__name__}: expected a numpy array without a mask, {EXPECTED}"
        )
    is_image = found.ndim == 2 or (found.ndim == 3 and (has_bands or found.shape[2] in (1, 3)))
    if found.dtype.kind not in "buif" or not is_image or not found.size:
        raise BadValueError(f"{name} returned {found.dtype} of shape {found.shape}: expected numbers, {EXPECTED}")
    return found
