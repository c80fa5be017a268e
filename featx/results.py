"""A finished file: its names and values, its record, its images and their errors."""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from featx.data.batch import Fault
from featx.errors import BadValueError, MissingPathError, count, did_you_mean
from featx.writer import records
from featx.writer.folder import HIDDEN, file_name, read_errors
from featx.writer.formats import FORMATS, Floats, Rows
from featx.writer.records import Json

PathLike = str | os.PathLike[str]


def load(path: PathLike, mmap: bool = False) -> tuple[list[str], Floats]:
    """Read a file of features.

    Args:
        path: LAYER.csv, with or without a header; LAYER.npy, with LAYER.names.txt beside it; LAYER.parquet; a folder
            LAYER of shards (``--writer.shard_rows``), or ``LAYER/*.npy`` if it has several formats.
        mmap: Leave an ``.npy`` file on disk and map it read-only. Shards are always read into memory.

    Returns:
        The names of the rows, and their values, ``(N, D) float32``, or float16 if the file has that. A name that is not
        UTF-8 contains surrogates, as file names do in Python.

    Raises:
        FileNotFoundError: No such file, or the names beside an ``.npy`` file are missing.
        ValueError: The file is not in featx's format, or Parquet needs pyarrow, which is not installed.
    """
    names: list[str] = []
    chunks = []
    for some, values in read(Path(path), mmap):
        names += some
        chunks.append(values)
    return names, stack(chunks)


def record(path: PathLike) -> dict[str, Any]:
    """Return LAYER.json, the record of a file of features: the network, weights, options and images it came from.

    Args:
        path: The file, the folder of shards, one of the shards, or LAYER.json itself.

    Raises:
        FileNotFoundError: There is no record beside the file.
        ValueError: It is not a record that featx wrote, or a newer featx wrote it.
    """
    beside = record_path(Path(path))
    found = records.read_record(beside)
    if found is None:
        raise MissingPathError(f"{beside}: no record. Expected a file that featx predict wrote.")
    return found


def named(path: Path) -> Path:
    """Return a path that ends in a name: ``.`` inside ``features/fc7`` becomes ``../fc7``."""
    return path if path.name not in ("", "..") else path / ".." / path.resolve().name


def record_path(path: Path) -> Path:
    """Return the path of a file's record: beside the file or, for shards, beside their folder."""
    if path.is_dir():
        return Path(f"{named(path)}.json")
    beside, above = path.with_suffix(".json"), Path(f"{path.absolute().parent}.json")
    return above if path.stem.isdigit() and not beside.exists() and above.exists() else beside


def stack(chunks: list[Floats]) -> Floats:
    """Join chunks of rows, ``(R, D)`` each, to one array, ``(N, D)``, freeing each chunk once it is copied."""
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
    """Yield names and values, ``(R, D)``, of some rows at a time; raises what ``load`` raises."""
    if path.is_dir() or path.stem == "*":
        return chain.from_iterable(read(shard, mmap) for shard in _shards(path))
    if (format := FORMATS.get(path.suffix[1:])) is None:
        raise BadValueError(f"{path}: no such format. Expected a file that ends with .{', .'.join(FORMATS)}.")
    if not path.is_file():
        raise MissingPathError(f"{path}: no such file. Expected a file that featx predict wrote.")
    return format.read(path, mmap)


def _shards(path: Path) -> list[Path]:
    """Return the shards in a folder, or those of ``LAYER/*.npy``, in order; refuse mixed formats and gaps."""
    folder, wanted = (path, list(FORMATS)) if path.is_dir() else (path.parent, [path.suffix[1:]])
    found = sorted(file for file in folder.glob("[0-9]*") if file.suffix[1:] in wanted and file.stem.isdigit())
    if not found:
        raise MissingPathError(f"{path}: no shards. Expected shards that featx predict wrote with --writer.shard_rows.")
    if len(kinds := sorted({file.suffix for file in found})) > 1:
        raise BadValueError(f"{path}: holds {' and '.join(kinds)}. Expected one, such as '{folder}/*{kinds[0]}'")
    if len(found) != int(found[-1].stem) + 1:
        raise BadValueError(f"{path}: {count(len(found), 'shard')}, the last is {found[-1].name}. Some are missing.")
    return found


@dataclass(frozen=True)
class Finished:
    """A finished file, a folder of shards, or one shard.

    Attributes:
        path: The file, or the folder.
        record_path: Where its record is, or would be.
        record: The contents of LAYER.json, for a shard with the shard's ``rows``; empty if the record is missing.
    """

    path: Path
    record_path: Path
    record: Json

    @property
    def is_known(self) -> bool:
        """Whether there is a record and it lists the file."""
        return self.path.name in {part for name in self.record.get("files", ()) for part in Path(name).parts}

    @property
    def is_shard(self) -> bool:
        """Whether this is one of several shards."""
        return self.path.absolute().parent != self.record_path.absolute().parent

    @property
    def own(self) -> range:
        """Indices of this file's images among all images of the run."""
        total = self.record["inputs"]["images"]
        size = self.record["identity"]["shard_rows"] if self.is_shard else total
        start = int(self.path.stem) * size if self.is_shard else 0
        return range(start, min(start + size, total))

    @cached_property
    def images(self) -> list[str] | None:
        """The images' paths below the data folder, or None if the list of them is missing or damaged."""
        kept = self.record_path.parent / HIDDEN / file_name(self.record["layer"]) / "images.gz"
        try:
            names = [name for name, _, _ in records.read_inputs(kept, slice(self.own.start, self.own.stop))]
        except (OSError, EOFError, ValueError, zlib.error):
            return None
        return names if len(names) == len(self.own) else None

    @cached_property
    def faults(self) -> list[Fault]:
        """Errors of this file's images; those of all images if the list of images is missing."""
        faults = read_errors(self.record_path.with_name(file_name(self.record["layer"], "errors.csv")))
        if self.images is None:
            return faults
        own = set(self.images)
        return [fault for fault in faults if fault.path in own]

    @cached_property
    def rows(self) -> list[str] | None:
        """The path of each row's image, or None if the list of images is missing."""
        lost = {fault.path for fault in self.faults if not fault.used}
        return self.images and [name for name in self.images if name not in lost]


def find(path: Path) -> Finished:
    """Return a finished file, a folder of shards, or one shard.

    Raises:
        MissingPathError: It does not exist.
        BadValueError: Its record was not written by featx, or by a newer featx.
    """
    if not path.exists():
        beside = path.parent.glob("[!.]*")
        near = did_you_mean(path.name, [other.name for other in beside if other.suffix not in (".json", ".html")])
        raise MissingPathError(
            f"{path}: no such file.{near} Expected a file that featx predict wrote, such as features/fc7.csv"
        )
    path = named(path)
    place = record_path(path)
    record = records.read_record(place) or {}
    said = {Path(name).name: said for name, said in record.get("files", {}).items()}.get(path.name, {})
    return Finished(path, place, record | {"rows": said["rows"]} if "rows" in said else record)
