"""What a format is asked for."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

REVISION = 1  # goes up whenever the text of a value, or the bytes of an npy, change: no run then takes rows of before
Floats = npt.NDArray[np.float32]
Rows = tuple[list[str], Floats]  # names and values, (R, D)


def row_name(path: str, names: str) -> str:
    """Return what the row of an image below the data folder is called, as ``--writer.names`` has it."""
    return path if names == "relative" else os.path.basename(path)


class FileFormat(ABC):
    """How the rows of a layer become a file, and are read back.

    Rows are written to parts as they come, and joined behind a head to one file, of which ``finish`` makes the others.

    Args:
        layer: The layer, as the user named it.
        columns: Values in each row.
        identity: What decides the values: ``names``, ``header`` and ``dtype`` of it.

    Attributes:
        suffixes: What the names of its files end with; the first one's holds the rows.
        part: The format of the parts.
    """

    suffixes: tuple[str, ...]
    part: str

    def __init__(self, layer: str, columns: int, identity: dict[str, Any]) -> None:
        self.layer = layer
        self.columns = columns
        self.identity = identity

    @staticmethod  # noqa: B027, most need nothing
    def check() -> None:
        """Raise BadValueError where a package that it needs is missing."""

    @abstractmethod
    def head(self, rows: int) -> bytes:
        """Return what stands before so many rows; its length is always the same."""

    @abstractmethod
    def encode(self, names: list[bytes], values: Floats) -> tuple[bytes, int]:
        """Return the bytes of rows, ``(R, D) float32``, in a part, and how many finite values became infinite."""

    def size(self, name: bytes, values: Floats) -> int:
        """Return about how many bytes one row, ``(1, D) float32``, takes in the end."""
        return len(self.encode([name], values)[0])

    def finish(self, rows: Path, fresh: str, paths: Iterable[str], about: bytes) -> dict[str, Path]:
        """Return where each of its files is, by suffix, whole and ready to be renamed.

        Args:
            rows: The joined file.
            fresh: What names of new files begin with.
            paths: Of the rows' images.
            about: What decided the values, as JSON.
        """
        return {self.suffixes[0]: rows}

    @staticmethod
    @abstractmethod
    def read(path: Path, mmap: bool) -> Iterator[Rows]:
        """Yield names and values of some rows after the others; raise BadValueError or MissingPathError for no such."""
