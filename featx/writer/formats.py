"""Activations -> bytes of CSV and npy."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import orjson

REVISION = 1  # goes up whenever the text of a value, or the bytes of an npy, change: no run then takes rows of before
Format = Literal["csv", "npy", "parquet"]
Floats = npt.NDArray[np.float32]
NPY_HEAD = 128  # bytes, whatever the numbers in it: it is written before the rows are counted


def csv_row(name: bytes, values: Floats) -> bytes:
    r"""Return one line of CSV: the name, then each value in the fewest digits that read back as the same float32.

    Args:
        name: The image's name, any bytes; quoted after RFC 4180 where it must be.
        values: ``(D,) float32``; nan and infinity become ``nan``, ``inf`` and ``-inf``.

    Example:
        >>> csv_row(b"a,b.jpg", np.array([0.1, -2, np.nan], np.float32))
        b'"a,b.jpg",0.1,-2.0,nan\n'
    """
    text = orjson.dumps(np.ascontiguousarray(values), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
    if not np.isfinite(values).all():  # JSON knows none of the three, and orjson writes null
        texts = text.split(b",")
        for index in np.flatnonzero(~np.isfinite(values)):
            value = float(values[index])
            texts[index] = b"nan" if math.isnan(value) else b"inf" if value > 0 else b"-inf"
        text = b",".join(texts)
    return csv_field(name) + b"," + text + b"\n"


def csv_rows(names: Iterable[bytes], values: Floats) -> bytes:
    """Return the lines of a batch: a name and ``(D,) float32`` values each."""
    return b"".join(csv_row(name, row) for name, row in zip(names, values, strict=True))


def csv_header(layer: str, columns: int) -> bytes:
    """Return the first line of a CSV with a header: ``image,fc7.0,fc7.1,…``."""
    return ",".join(["image", *(f"{layer}.{column}" for column in range(columns))]).encode() + b"\n"


def csv_field(name: bytes) -> bytes:
    """Quote a name after RFC 4180, where it must be, or begins with ``#``, which many readers take for a comment."""
    if is_plain(name):
        return name
    return b'"' + name.replace(b'"', b'""') + b'"'


def is_plain(name: bytes) -> bool:
    """Return whether a name stands in CSV as it is, so that a reader without quotes, as DEMUD's, gets it back."""
    return not name.startswith(b"#") and not any(mark in name for mark in (b",", b'"', b"\n", b"\r"))


def read_csv_names(file: BinaryIO, header: bool) -> Iterator[tuple[bytes, int]]:
    """Yield each row's name and how many values stand behind it, without reading the values.

    Args:
        file: A CSV as ``csv_row`` writes it.
        header: Whether its first line is one of column names.
    """
    for name, values in csv_lines(file, header):
        yield name, values.count(b",") + 1


def csv_lines(file: BinaryIO, header: bool) -> Iterator[tuple[bytes, bytes]]:
    """Yield each row's name, unquoted, and the text of its values, with the line break behind them."""
    if header:
        file.readline()
    for line in file:
        while line.startswith(b'"') and line.count(b'"') % 2 and (more := file.readline()):
            line += more  # a line break inside a name
        quoted = line.startswith(b'"')
        end = line.rfind(b'"') + 1 if quoted else line.find(b",")
        name = line[1 : end - 1].replace(b'""', b'"') if quoted else line[:end]
        yield name, line[end + 1 :]


def npy_head(rows: int, columns: int, dtype: str) -> bytes:
    """Return the first bytes of an ``.npy`` of shape ``(rows, columns)``, always equally many.

    After https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, version 1.0.
    """
    shape = f"{{'descr': '{np.dtype(dtype).str}', 'fortran_order': False, 'shape': ({rows}, {columns}), }}"
    return b"\x93NUMPY\x01\x00" + (NPY_HEAD - 10).to_bytes(2, "little") + shape.ljust(NPY_HEAD - 11).encode() + b"\n"


def npy_rows(values: Floats, dtype: str) -> tuple[bytes, int]:
    """Return the bytes of rows in an ``.npy``, and how many finite values ``dtype`` made infinite."""
    if values.dtype == dtype:
        return values.tobytes(), 0
    with np.errstate(over="ignore"):
        held = values.astype(dtype)
    return held.tobytes(), int((np.isinf(held) & np.isfinite(values)).sum())


def name_line(name: bytes) -> bytes:
    r"""Return a name's line in LAYER.names.txt: its bytes, but for ``\n``, ``\r`` and ``\\``, which are written so."""
    return name.replace(b"\\", rb"\\").replace(b"\n", rb"\n").replace(b"\r", rb"\r") + b"\n"


def read_name_lines(data: bytes) -> list[bytes]:
    """Return the names that ``name_line`` wrote."""
    meaning = {b"n": b"\n", b"r": b"\r"}
    return [re.sub(rb"\\(.)", lambda found: meaning.get(found[1], found[1]), line) for line in data.split(b"\n")[:-1]]
