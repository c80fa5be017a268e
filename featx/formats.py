"""Activations -> bytes of CSV."""

import math
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import orjson

Floats = npt.NDArray[np.float32]


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
    if header:
        file.readline()
    for line in file:
        while line.startswith(b'"') and line.count(b'"') % 2 and (more := file.readline()):
            line += more  # a line break inside a name
        quoted = line.startswith(b'"')
        end = line.rfind(b'"') + 1 if quoted else line.find(b",")
        name = line[1 : end - 1].replace(b'""', b'"') if quoted else line[:end]
        yield name, line.count(b",", end)
