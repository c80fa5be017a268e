"""npy: the values as a numpy array, and the names in a text file next to it."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from featx.errors import BadValueError, MissingPathError, count
from featx.writer import disk
from featx.writer.formats.base import FileFormat, Floats, Ints, Rows, row_name

NPY_HEAD = 128  # bytes, whatever the shape: it is written before the number of rows is known


class Npy(FileFormat):
    """An array ``(N, D)`` of ``dtype``, which can be mapped into memory."""

    suffixes: tuple[str, ...] = ("npy", "names.txt")
    part = "npy"

    def head(self, rows: int) -> bytes:
        """Return the array's shape and type in ``NPY_HEAD`` bytes.

        Version 1.0 of https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
        """
        kind = np.dtype(self.identity["dtype"]).str
        shape = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': ({rows}, {self.columns}), }}"
        begin = b"\x93NUMPY\x01\x00" + (NPY_HEAD - 10).to_bytes(2, "little")
        return begin + shape.ljust(NPY_HEAD - 11).encode() + b"\n"

    def encode(self, names: list[bytes], values: Floats) -> tuple[bytes, int]:
        """Return the rows' values, and how many finite ones became infinite in ``dtype``."""
        with np.errstate(over="ignore"):
            cast = values.astype(self.identity["dtype"], copy=False)
        return cast.tobytes(), 0 if cast is values else int((np.isinf(cast) & np.isfinite(values)).sum())

    def ends(self, path: Path, start: int, stop: int) -> Ints:
        """Return where rows end; all have the same size."""
        return np.arange(start, stop + 1, self.columns * np.dtype(self.identity["dtype"]).itemsize)

    def size(self, name: bytes, values: Floats) -> int:
        """Return the size of a row's values and its line of names.txt."""
        return super().size(name, values) + len(name) + 1

    def finish(self, rows: Path, fresh: str, paths: Iterable[str], metadata: bytes) -> dict[str, Path]:
        """Write the file of names."""
        listed = Path(f"{fresh}.names.txt")
        names = (row_name(path, self.identity["names"]) for path in paths)
        disk.replace(listed, b"".join(name_line(os.fsencode(name)) for name in names))
        return {"npy": rows, "names.txt": listed}

    @staticmethod
    def read(path: Path, mmap: bool) -> Iterator[Rows]:
        """Yield all rows at once, memory-mapped read-only if ``mmap``."""
        listed = path.with_suffix(".names.txt")
        if not listed.is_file():
            raise MissingPathError(f"{listed}: no such file. Expected the row names of {path.name}, one per line.")
        names = [os.fsdecode(name) for name in read_name_lines(listed.read_bytes())]
        try:
            values = np.load(path, mmap_mode="r" if mmap else None)
        except (ValueError, EOFError) as err:
            raise BadValueError(f"{path}: {err}. Expected an array written by featx.") from err
        if values.ndim != 2 or len(values) != len(names):
            rows, lines = count(len(values), "row"), count(len(names), "name")
            raise BadValueError(f"{path}: {rows}, but {lines} in {listed.name}.")
        yield names, values


def name_line(name: bytes) -> bytes:
    r"""Return a name's line in LAYER.names.txt: its bytes, with ``\n``, ``\r`` and ``\\`` escaped."""
    return name.replace(b"\\", rb"\\").replace(b"\n", rb"\n").replace(b"\r", rb"\r") + b"\n"


def read_name_lines(data: bytes) -> list[bytes]:
    """Return the names in LAYER.names.txt."""
    escapes = {b"n": b"\n", b"r": b"\r"}
    return [re.sub(rb"\\(.)", lambda match: escapes.get(match[1], match[1]), line) for line in data.split(b"\n")[:-1]]
