"""CSV: one line per row, its name and values as text."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from featx.errors import BadValueError, count
from featx.writer.formats.base import FileFormat, Floats, Ints, Rows


class Csv(FileFormat):
    """Each value in the fewest digits that read back as the same float32, whatever ``dtype`` is."""

    suffixes = ("csv",)
    part = "csv"

    def head(self, rows: int) -> bytes:
        """Return the line of column names, ``image,fc7.0,fc7.1,…``, if ``header`` is set."""
        columns = (f"{self.layer}.{column}".encode() for column in range(self.columns))
        return b",".join([b"image", *map(_quoted, columns)]) + b"\n" if self.identity["header"] else b""

    def encode(self, names: list[bytes], values: Floats) -> tuple[bytes, int]:
        """Return the rows' lines."""
        return b"".join(map(csv_row, names, values)), 0

    def ends(self, path: Path, start: int, stop: int) -> Ints:
        """Return where rows end, from their line breaks."""
        found = [start]
        with path.open("rb", buffering=1 << 20) as file:
            file.seek(start)
            while found[-1] < stop and (line := _read_row(file)):
                found.append(found[-1] + len(line))
        return np.array(found, np.int64)

    @staticmethod
    def read(path: Path, mmap: bool) -> Iterator[Rows]:
        """Yield one row at a time."""
        columns, parse = None, _json_parser()
        with path.open("rb", buffering=1 << 20) as file:
            header = next(csv_lines(file, False), (b"", b""))[0] == b"image"  # an image's name has a suffix
            file.seek(0)
            for number, (name, text) in enumerate(csv_lines(file, header), 1):
                try:  # JSON has neither nan nor inf
                    found = parse(b"[" + text + b"]") if b"n" not in text else list(map(float, text.split(b",")))
                    values = np.array(found, np.float32)  # (D,)
                except (ValueError, TypeError) as err:
                    raise BadValueError(f"{path}: row {number}: {err}. Expected numbers after the name.") from err
                if len(values) != (columns := len(values) if columns is None else columns):
                    raise BadValueError(f"{path}: row {number}: {count(len(values), 'value')}, expected {columns:,}.")
                yield [os.fsdecode(name)], values[None]

    @classmethod
    def names_and_columns(cls, path: Path, header: bool) -> Iterator[tuple[bytes, int]]:
        """Yield each row's name and its number of values, without parsing the values."""
        with path.open("rb") as file:
            for name, values in csv_lines(file, header):
                yield name, values.count(b",") + 1


def _json_parser() -> Callable[[bytes], Any]:
    """Return a parser for a list of numbers: simdjson, which creates no Python objects, or else orjson."""
    try:
        import simdjson
    except ImportError:
        return orjson.loads
    parser: Any = simdjson.Parser()
    return lambda text: np.frombuffer(parser.parse(text).as_buffer(of_type="d"))


def csv_row(name: bytes, values: Floats) -> bytes:
    r"""Return one line of CSV: the name, then each value in the fewest digits that read back as the same float32.

    Args:
        name: The image's name, any bytes; quoted as in RFC 4180 if necessary or if it starts with ``#``, which many
            readers treat as a comment.
        values: ``(D,) float32``; nan and infinity become ``nan``, ``inf`` and ``-inf``.

    Example:
        >>> csv_row(b"a,b.jpg", np.array([0.1, -2, np.nan], np.float32))
        b'"a,b.jpg",0.1,-2.0,nan\n'
    """
    text = orjson.dumps(np.ascontiguousarray(values), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
    if not np.isfinite(values).all():  # for which orjson writes null
        texts = text.split(b",")
        for index in np.flatnonzero(~np.isfinite(values)):
            texts[index] = b"%a" % float(values[index])
        text = b",".join(texts)
    return _quoted(name) + b"," + text + b"\n"


def _quoted(name: bytes) -> bytes:
    return name if is_plain(name) else b'"' + name.replace(b'"', b'""') + b'"'


def is_plain(name: bytes) -> bool:
    """Return whether a name needs no quotes in CSV; DEMUD and other simple readers do not understand quotes."""
    return not name.startswith(b"#") and not any(mark in name for mark in (b",", b'"', b"\n", b"\r"))


def _read_row(file: BinaryIO) -> bytes:
    line = file.readline()
    while line.startswith(b'"') and line.count(b'"') % 2 and (more := file.readline()):
        line += more  # a line break inside a name
    return line


def csv_lines(file: BinaryIO, header: bool) -> Iterator[tuple[bytes, bytes]]:
    """Yield each row's unquoted name, and its values as text including the line break.

    Args:
        file: A CSV written by ``csv_row``.
        header: Whether its first line contains column names.
    """
    if header:
        file.readline()
    while line := _read_row(file):
        quoted = line.startswith(b'"')
        end = line.rfind(b'"') + 1 if quoted else line.find(b",")
        name = line[1 : end - 1].replace(b'""', b'"') if quoted else line[:end]
        yield name, line[end + 1 :]
