"""A finished file: its names and values, its record, the images of its rows and those that have none."""

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
    found = records.read_record(beside)
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
    if path.is_dir() or path.stem == "*":
        return chain.from_iterable(read(shard, mmap) for shard in _shards(path))
    if (format := FORMATS.get(path.suffix[1:])) is None:
        raise BadValueError(f"{path}: no such format. Expected a file that ends with .{', .'.join(FORMATS)}.")
    if not path.is_file():
        raise MissingPathError(f"{path}: no such file. Expected what featx predict wrote.")
    return format.read(path, mmap)


def _shards(path: Path) -> list[Path]:
    """Return the shards in a folder, or those of ``LAYER/*.npy``, in order: one format, and all there."""
    folder, wanted = (path, list(FORMATS)) if path.is_dir() else (path.parent, [path.suffix[1:]])
    found = sorted(file for file in folder.glob("[0-9]*") if file.suffix[1:] in wanted and file.stem.isdigit())
    if not found:
        raise MissingPathError(f"{path}: no shards. Expected what featx predict wrote with --writer.shard_rows.")
    if len(kinds := sorted({file.suffix for file in found})) > 1:
        raise BadValueError(f"{path}: holds {' and '.join(kinds)}. Expected one of them, as '{folder}/*{kinds[0]}'")
    if len(found) != int(found[-1].stem) + 1:
        raise BadValueError(f"{path}: {count(len(found), 'shard')}, the last is {found[-1].name}. Some are missing.")
    return found


@dataclass(frozen=True)
class Finished:
    """A finished file, a folder of shards, or one shard.

    Attributes:
        path: The file, or the folder.
        record_path: Where its record is, or would be.
        record: What LAYER.json says, of one shard with its own ``rows``; empty where it is missing.
    """

    path: Path
    record_path: Path
    record: Json

    @property
    def is_known(self) -> bool:
        """Whether there is a record, and it knows the file."""
        return self.path.name in {part for name in self.record.get("files", ()) for part in Path(name).parts}

    @property
    def is_shard(self) -> bool:
        """Whether this is one file of several."""
        return self.path.absolute().parent != self.record_path.absolute().parent

    @property
    def own(self) -> range:
        """Which of all images are the file's: a shard has those of its number."""
        total = self.record["inputs"]["images"]
        size = self.record["identity"]["shard_rows"] if self.is_shard else total
        start = int(self.path.stem) * size if self.is_shard else 0
        return range(start, min(start + size, total))

    @cached_property
    def images(self) -> list[str] | None:
        """The images' paths below the data folder, or None where the list of them is no longer there, or damaged."""
        kept = self.record_path.parent / HIDDEN / file_name(self.record["layer"]) / "images.gz"
        try:
            names = [name for name, _, _ in records.read_inputs(kept, slice(self.own.start, self.own.stop))]
        except (OSError, EOFError, ValueError, zlib.error):
            return None
        return names if len(names) == len(self.own) else None

    @cached_property
    def faults(self) -> list[Fault]:
        """What is wrong with images of the file's, of all images where the list of them is no longer there."""
        faults = read_errors(self.record_path.with_name(file_name(self.record["layer"], "errors.csv")))
        if self.images is None:
            return faults
        own = set(self.images)
        return [fault for fault in faults if fault.path in own]

    @cached_property
    def rows(self) -> list[str] | None:
        """The path of each row's image, or None where the list of images is no longer there."""
        lost = {fault.path for fault in self.faults if not fault.used}
        return self.images and [name for name in self.images if name not in lost]


def find(path: Path) -> Finished:
    """Return a finished file, a folder of shards or one of them.

    Raises:
        MissingPathError: It is not there.
        BadValueError: Its record is none of featx's, or one of a newer featx.
    """
    if not path.exists():
        beside = path.parent.glob("[!.]*")
        near = did_you_mean(path.name, [other.name for other in beside if other.suffix not in (".json", ".html")])
        raise MissingPathError(f"{path}: no such file.{near} Expected what featx predict wrote, as features/fc7.csv")
    path = named(path)
    place = record_path(path)
    record = records.read_record(place) or {}
    said = {Path(name).name: said for name, said in record.get("files", {}).items()}.get(path.name, {})
    return Finished(path, place, record | {"rows": said["rows"]} if "rows" in said else record)
