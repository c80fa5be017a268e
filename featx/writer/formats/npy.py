"""npy: the values as numpy has them, and the names in a file beside them."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from featx.errors import BadValueError, MissingPathError, count
from featx.writer import disk
from featx.writer.formats.base import FileFormat, Floats, Rows, row_name

NPY_HEAD = 128  # bytes, whatever the numbers in it: it is written before the rows are counted


class Npy(FileFormat):
    """An array ``(N, D)`` of ``dtype``, which can be mapped into memory."""

    suffixes: tuple[str, ...] = ("npy", "names.txt")
    part = "npy"

    def head(self, rows: int) -> bytes:
        """Return the array's shape and type, always in equally many bytes.

        After https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, version 1.0.
        """
        kind = np.dtype(self.identity["dtype"]).str
        shape = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': ({rows}, {self.columns}), }}"
        begin = b"\x93NUMPY\x01\x00" + (NPY_HEAD - 10).to_bytes(2, "little")
        return begin + shape.ljust(NPY_HEAD - 11).encode() + b"\n"

    def encode(self, names: list[bytes], values: Floats) -> tuple[bytes, int]:
        """Return the values of rows, and how many finite ones ``dtype`` made infinite."""
        with np.errstate(over="ignore"):
            held = values.astype(self.identity["dtype"], copy=False)
        return held.tobytes(), 0 if held is values else int((np.isinf(held) & np.isfinite(values)).sum())

    def size(self, name: bytes, values: Floats) -> int:
        """Return the bytes of a row's values and of its name's line."""
        return super().size(name, values) + len(name) + 1

    def finish(self, rows: Path, fresh: str, paths: Iterable[str], about: bytes) -> dict[str, Path]:
        """Write the names."""
        listed = Path(f"{fresh}.names.txt")
        names = (row_name(path, self.identity["names"]) for path in paths)
        disk.replace(listed, b"".join(name_line(os.fsencode(name)) for name in names))
        return {"npy": rows, "names.txt": listed}

    @staticmethod
    def read(path: Path, mmap: bool) -> Iterator[Rows]:
        """Yield all rows at once, mapped read-only if asked for."""
        listed = path.with_suffix(".names.txt")
        if not listed.is_file():
            raise MissingPathError(
                f"{listed}: no such file. Expected the names of the rows of {path.name}, one a line."
            )
        names = [os.fsdecode(name) for name in read_name_lines(listed.read_bytes())]
        try:
            values = np.load(path, mmap_mode="r" if mmap else None)
        except (ValueError, EOFError) as err:
            raise BadValueError(f"{path}: {err}. Expected an array as featx writes it.") from err
        if values.ndim != 2 or len(values) != len(names):
            there = f"{count(len(values), 'row')}, but {count(len(names), 'name')}"
            raise BadValueError(f"{path}: {there} in {listed.name}.")
        yield names, values


def name_line(name: bytes) -> bytes:
    r"""Return a name's line in LAYER.names.txt: its bytes, but for ``\n``, ``\r`` and ``\\``, which are written so."""
    return name.replace(b"\\", rb"\\").replace(b"\n", rb"\n").replace(b"\r", rb"\r") + b"\n"


def read_name_lines(data: bytes) -> list[bytes]:
    """Return the names that ``name_line`` wrote."""
    meaning = {b"n": b"\n", b"r": b"\r"}
    return [re.sub(rb"\\(.)", lambda found: meaning.get(found[1], found[1]), line) for line in data.split(b"\n")[:-1]]
