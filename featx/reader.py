"""A finished file -> names and values: the fast way for each format."""

import os
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from featx import formats, manifest, parquet
from featx.formats import Floats
from featx.messages import BadValueError, MissingPathError, count

Rows = tuple[list[str], Floats]  # names and values, (R, D)
PathLike = str | os.PathLike[str]


def load(path: PathLike, mmap: bool = False) -> tuple[list[str], Floats]:
    """Read a file of features.

    Args:
        path: LAYER.csv, with or without a header; LAYER.npy, with LAYER.names.txt beside it; LAYER.parquet; a folder
            LAYER of such files as ``--writer.shard_rows`` makes it, or ``LAYER/*.npy`` where it has several formats.
        mmap: Whether an ``.npy`` stays on disk, mapped read-only; several are brought to memory.

    Returns:
        The names of the rows, and their values: ``(N, D) float32``, or float16 where the file holds that, in memory.
        A name that is not UTF-8 comes with surrogates, as the system's file names do in Python.

    Raises:
        FileNotFoundError: No such file, or an ``.npy`` without its names.
        ValueError: It does not hold what featx writes, or pyarrow is missing for Parquet.
    """
    names: list[str] = []
    chunks = []
    for some, values in read(Path(path), mmap):
        names += some
        chunks.append(values)
    return names, stack(chunks)


def record(path: PathLike) -> dict[str, Any]:
    """Return what LAYER.json says of a file of features: what made it, with which weights, from which images.

    Args:
        path: The file, the folder of shards, one of them, or LAYER.json itself.

    Raises:
        FileNotFoundError: There is no record beside it.
        ValueError: What is there is no record of featx, or one of a newer featx.
    """
    beside = record_path(Path(path))
    found = manifest.read_record(beside)
    if found is None:
        raise MissingPathError(f"{beside}: no record. Expected what featx predict wrote.")
    return found


def named(path: Path) -> Path:
    """Return a path that ends in a name: the folder ``.`` of ``features/fc7`` as ``../fc7``."""
    return path if path.name not in ("", "..") else path / ".." / path.resolve().name


def record_path(path: Path) -> Path:
    """Return where a file's record is: beside it or, of a shard or the folder of all, beside that folder."""
    if path.is_dir():
        return Path(f"{named(path)}.json")
    beside, above = path.with_suffix(".json"), Path(f"{path.absolute().parent}.json")
    return above if path.stem.isdigit() and not beside.exists() and above.exists() else beside


def stack(chunks: list[Floats]) -> Floats:
    """Return rows in one array, ``(N, D)``, of chunks, ``(R, D)`` each, which are given up one by one."""
    if len(chunks) < 2:
        return chunks[0] if chunks else np.empty((0, 0), np.float32)
    whole = np.empty((sum(map(len, chunks)), chunks[0].shape[1]), chunks[0].dtype)
    chunks.reverse()
    at = 0
    while chunks:
        chunk = chunks.pop()
        whole[at : at + len(chunk)] = chunk
        at += len(chunk)
    return whole


def read(path: Path, mmap: bool = True) -> Iterator[Rows]:
    """Yield names and values, ``(R, D)``, of some rows after the others; what ``load`` raises is raised here."""
    readers: dict[str, Callable[[Path], Iterator[Rows]]] = {
        ".csv": _read_csv,
        ".npy": partial(_read_npy, mmap=mmap),
        ".parquet": parquet.read,
    }
    if path.is_dir() or path.stem == "*":
        return chain.from_iterable(read(shard, mmap) for shard in _shards(path, readers))
    if path.suffix not in readers:
        raise BadValueError(f"{path}: no such format. Expected a file that ends with {', '.join(readers)}.")
    if not path.is_file():
        raise MissingPathError(f"{path}: no such file. Expected what featx predict wrote.")
    return readers[path.suffix](path)


def _shards(path: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the shards in a folder, or those of ``LAYER/*.npy``, in order: one format, and all there."""
    folder, wanted = (path, suffixes) if path.is_dir() else (path.parent, [path.suffix])
    found = sorted(file for file in folder.glob("[0-9]*") if file.suffix in wanted and file.stem.isdigit())
    if not found:
        raise MissingPathError(f"{path}: no shards. Expected what featx predict wrote with --writer.shard_rows.")
    if len(kinds := sorted({file.suffix for file in found})) > 1:
        raise BadValueError(f"{path}: holds {' and '.join(kinds)}. Expected one of them, as '{folder}/*{kinds[0]}'")
    if len(found) != int(found[-1].stem) + 1:
        raise BadValueError(f"{path}: {count(len(found), 'shard')}, the last is {found[-1].name}. Some are missing.")
    return found


def _read_csv(path: Path) -> Iterator[Rows]:
    columns, parse = None, _json_parser()
    with path.open("rb", buffering=1 << 20) as file:
        for number, (name, text) in enumerate(formats.csv_lines(file, _has_header(path)), 1):
            try:  # JSON knows neither nan nor inf
                found = parse(b"[" + text + b"]") if b"n" not in text else list(map(float, text.split(b",")))
                values = np.array(found, np.float32)  # (D,)
            except (ValueError, TypeError) as err:
                raise BadValueError(f"{path}: row {number}: {err}. Expected numbers behind the name.") from err
            if len(values) != (columns := len(values) if columns is None else columns):
                raise BadValueError(f"{path}: row {number}: {count(len(values), 'value')}, expected {columns:,}.")
            yield [os.fsdecode(name)], values[None]


def _has_header(path: Path) -> bool:
    with path.open("rb") as file:
        return next(formats.csv_lines(file, False), (b"", b""))[0] == b"image"  # an image's name has a suffix


def _json_parser() -> Callable[[bytes], Any]:
    """Return what reads a list of numbers: simdjson, which makes no Python object of each, or orjson."""
    try:
        import simdjson
    except ImportError:
        return orjson.loads
    parser: Any = simdjson.Parser()
    return lambda text: np.frombuffer(parser.parse(text).as_buffer(of_type="d"))


def _read_npy(path: Path, mmap: bool) -> Iterator[Rows]:
    listed = path.with_suffix(".names.txt")
    if not listed.is_file():
        raise MissingPathError(f"{listed}: no such file. Expected the names of the rows of {path.name}, one a line.")
    names = [os.fsdecode(name) for name in formats.read_name_lines(listed.read_bytes())]
    try:
        values = np.load(path, mmap_mode="r" if mmap else None)
    except (ValueError, EOFError) as err:
        raise BadValueError(f"{path}: {err}. Expected an array as featx writes it.") from err
    if values.ndim != 2 or len(values) != len(names):
        raise BadValueError(f"{path}: {count(len(values), 'row')}, but {count(len(names), 'name')} in {listed.name}.")
    yield names, values
