"""The interface of a file format."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

REVISION = 1  # increase it when the text of values or the bytes of an npy change: no run then continues older files
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Rows = tuple[list[str], Floats]  # names and values, (R, D)


def row_name(path: str, names: str) -> str:
    """Return the name of an image's row under ``--writer.names``; the path is relative to the data folder."""
    return path if names == "relative" else os.path.basename(path)


def class_name(path: str) -> str:
    """Return the class folder of an image, or ""; of several archives it is the first folder within.

    Example:
        >>> class_name("shards/000.tar/cats/old/felix.jpg")
        'cats'
    """
    folders = path.split("/")[:-1]
    archive = next((i for i, name in enumerate(folders) if name.lower().endswith((".tar", ".zip"))), -1)
    return folders[archive + 1] if folders[archive + 1 :] else ""


class FileFormat(ABC):
    """How the rows of a layer are written to a file and read back.

    Rows are written to parts as they are computed. The parts are joined into one file, which starts with ``head``;
    ``finish`` makes any other files from it.

    Args:
        layer: The layer, as the user named it.
        columns: Values per row.
        identity: Everything that determines the values; formats read its ``names``, ``header`` and ``dtype``.

    Attributes:
        suffixes: The suffixes of its files; the first one contains the rows.
        part: The format of the parts.
    """

    suffixes: tuple[str, ...]
    part: str

    def __init__(self, layer: str, columns: int, identity: dict[str, Any]) -> None:
        self.layer = layer
        self.columns = columns
        self.identity = identity

    @staticmethod  # noqa: B027, most formats need nothing
    def check() -> None:
        """Raise BadValueError if a package that the format needs is missing."""

    @abstractmethod
    def head(self, rows: int) -> bytes:
        """Return the bytes before the given number of rows; their length does not depend on it."""

    @abstractmethod
    def encode(self, names: list[bytes], values: Floats) -> tuple[bytes, int]:
        """Return the bytes of rows, ``(R, D) float32``, in a part, and how many finite values became infinite."""

    @abstractmethod
    def ends(self, path: Path, start: int, stop: int) -> Ints:
        """Return where the rows between two positions of a part end, ``(R + 1,) int64``, after ``start``."""

    def size(self, name: bytes, values: Floats) -> int:
        """Return about how many bytes one row, ``(1, D) float32``, takes in the final files."""
        return len(self.encode([name], values)[0])

    def finish(self, rows: Path, fresh: str, paths: Iterable[str], metadata: bytes) -> dict[str, Path]:
        """Return the path of each file by suffix, complete and ready to be renamed.

        Args:
            rows: The joined file.
            fresh: Path prefix for new files.
            paths: The images of the rows.
            metadata: What determined the values, as JSON.
        """
        return {self.suffixes[0]: rows}

    @staticmethod
    @abstractmethod
    def read(path: Path, mmap: bool) -> Iterator[Rows]:
        """Yield names and values in order, some rows at a time; raise BadValueError or MissingPathError."""

    @classmethod
    def names_and_columns(cls, path: Path, header: bool) -> Iterator[tuple[bytes, int]]:
        """Yield each row's name and its number of values; raise what ``read`` raises."""
        for names, values in cls.read(path, True):
            yield from ((os.fsencode(name), values.shape[1]) for name in names)

    @staticmethod
    def as_stored(name: bytes) -> bytes:
        """Return a name as the format stores it."""
        return name
