"""Activations -> bytes of files, and back. A format is one class in a file of its own and an entry in FORMATS."""

from typing import Literal

from featx.writer.formats.base import REVISION, FileFormat, Floats, Ints, Rows, class_name, row_name
from featx.writer.formats.csv import Csv, csv_row, is_plain
from featx.writer.formats.npy import Npy
from featx.writer.formats.parquet import Parquet

Format = Literal["csv", "npy", "parquet"]
FORMATS: dict[str, type[FileFormat]] = {"csv": Csv, "npy": Npy, "parquet": Parquet}
PARTS = list(dict.fromkeys(kind.part for kind in FORMATS.values()))
SUFFIXES = [suffix for kind in FORMATS.values() for suffix in kind.suffixes]  # without a dot: "names.txt"

__all__ = [
    "FORMATS", "PARTS", "REVISION", "SUFFIXES", "FileFormat", "Floats", "Format", "Ints", "Rows", "class_name",
    "csv_row", "is_plain", "row_name",
]  # fmt: skip
