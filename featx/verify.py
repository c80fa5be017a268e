"""``featx verify``: a finished file against its record, and some of its rows against their images."""

import argparse
import csv
import gzip
import json
import os
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from featx import formats, journal, manifest, reader
from featx.manifest import Json
from featx.messages import BadValueError, MissingPathError, UserError, count
from featx.state import ERRORS_HEADER, HIDDEN, USED, file_name

CLOSE = 1e-4  # relative (L2); another kind of processor stays far below, other weights or pixels far above


class Mismatch(UserError):
    """A file is not what its record says: exit status 1."""

    exit_status = 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.\nfeatx verify --help lists the options.")


def verify(argv: list[str]) -> int:
    """Run ``featx verify FILE… [--images DIR]``: 0 where all is as recorded, else 1 and a line a file that is not."""
    parser = _Parser("featx verify", description="Hold finished files against their records.", allow_abbrev=False)
    parser.add_argument("files", nargs="+", metavar="FILE", help="such as features/fc7.csv, or a folder of shards")
    parser.add_argument("--images", metavar="DIR", help="also compute some rows again, from the images in this folder")
    options = parser.parse_args(argv)
    wrong = 0
    for path in chain.from_iterable(map(_files, map(Path, options.files))):
        try:
            record = check_file(path)
            said = f"{count(record['rows'], 'row')} of {count(record['columns'], 'value')} as recorded"
            if options.images:
                said += f"; {check_rows(path, record, options.images)}"
            print(f"{path}: {said}")
        except Mismatch as err:
            print(f"{path}: {err}", file=sys.stderr)
            wrong = 1
    return wrong


def _files(path: Path) -> list[Path]:
    """Return a file or, of a folder of shards, all that its record knows but the names beside an npy."""
    if not path.is_dir():
        return [path]
    place = reader.record_path(path)
    if (record := manifest.read_json(place)) is None:
        raise MissingPathError(f"{place}: no such file. Expected what featx predict wrote, its record beside it.")
    return [path.parent / name for name in record["files"] if not name.endswith(".names.txt")]


def check_file(path: Path) -> Json:
    """Return a finished file's record, if the file is what it says; of a shard with the number of its own rows.

    Raises:
        MissingPathError: There is no such file, or no record beside it.
        Mismatch: It is not; the message says what differs.
    """
    place = reader.record_path(path)
    record = manifest.read_json(place)
    if not path.is_file() or record is None:
        missing = place if path.is_file() else path
        raise MissingPathError(f"{missing}: no such file. Expected what featx predict wrote, its record beside it.")
    said_of = {Path(name).name: said for name, said in record["files"].items()}
    said = said_of.get(path.name)
    if said is None:
        known = textwrap.shorten(", ".join(record["files"]), 200, placeholder=" …")
        raise Mismatch(f"{place.name} does not know it, it knows {known}")
    record["rows"] = said.get("rows", record["rows"])
    names, widths = [], set[int]()
    for name, columns in _names_and_widths(path, record):
        names.append(name)
        widths.add(columns)
    if len(names) != record["rows"]:
        raise Mismatch(f"{count(len(names), 'row')}, expected {record['rows']:,}")
    if names and widths != {record["columns"]}:
        raise Mismatch(f"rows of {' and '.join(map(str, sorted(widths)))} values, expected {record['columns']:,}")
    if (listed := _listed_names(path, record)) is not None:
        for row, (name, expected) in enumerate(zip_longest(names, listed), 1):
            if name != expected:
                raise Mismatch(f"row {row} is named {name!r}, expected {expected!r}")
    if journal.digest(path) != said["sha256"]:
        raise Mismatch(f"values differ from those written: its SHA-256 is not the recorded {said['sha256'][:8]}…")
    listed_names = path.with_suffix(".names.txt")
    if path.suffix == ".npy" and journal.digest(listed_names) != said_of[listed_names.name]["sha256"]:
        raise Mismatch(f"names differ from those written: {listed_names.name} does not have the recorded SHA-256")
    return record


def _names_and_widths(path: Path, record: Json) -> Iterator[tuple[bytes, int]]:
    if path.suffix == ".csv":  # whose values need not be read to be counted
        with path.open("rb") as file:
            yield from formats.read_csv_names(file, record["identity"]["header"])
        return
    try:
        for names, values in reader.read(path):
            yield from ((os.fsencode(name), values.shape[1]) for name in names)
    except BadValueError as err:
        raise Mismatch(str(err)) from err


def _faults(path: Path, record: Json) -> set[str]:
    """Return the paths that have no row."""
    if not record["errors"]:
        return set()
    listed = reader.record_path(path).with_name(file_name(record["layer"], "errors.csv"))
    with listed.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.DictReader(file, ERRORS_HEADER)
        return {row["path"] for row in rows if not row["reason"].startswith(USED)} - {"path"}


def _images(path: Path, record: Json) -> range:
    """Return which of all images are the file's: a shard has those of its number."""
    total = record["inputs"]["images"]
    if (size := record["identity"].get("shard_rows")) is None:
        return range(total)
    start = int(path.stem) * size
    return range(start, min(start + size, total))


def _listed_names(path: Path, record: Json) -> list[bytes] | None:
    """Return the names that the rows must have, where the list of images is still there."""
    kept = reader.record_path(path).parent / HIDDEN / file_name(record["layer"]) / "images.gz"
    if not kept.exists():
        return None
    own = _images(path, record)
    lines = gzip.decompress(kept.read_bytes()).splitlines()[own.start : own.stop]
    images = [json.loads(line.split(b" ", 2)[2]) for line in lines]
    lost = _faults(path, record)
    relative = record["identity"]["names"] == "relative"
    return [_name(path, name if relative else os.path.basename(name)) for name in images if name not in lost]


def _name(path: Path, name: str) -> bytes:
    """Return an image's name as the file has it: Parquet holds nothing but UTF-8."""
    name_bytes = os.fsencode(name)
    return name_bytes.decode(errors="backslashreplace").encode() if path.suffix == ".parquet" else name_bytes


def check_rows(path: Path, record: Json, folder: str) -> str:
    """Compute the first, a middle and the last batch again, and say by how much they differ from the file.

    Raises:
        Mismatch: By more than another processor would explain, or the folder holds other images.
    """
    if (precision := record["identity"]["precision"]) != "32-true":
        raise UserError(f"--images: rows of --trainer.precision {precision} are not computed again.")
    model, data = _rebuild(record, folder)
    data.setup()
    model.configure_model()
    model.try_out(data.first_batch(model.preprocessing))  # which finds the memory layout
    if len(data.images) != record["inputs"]["images"]:
        raise Mismatch(f"{folder} holds {count(len(data.images), 'image')}, expected {record['inputs']['images']:,}")
    lost = _faults(path, record)
    wanted: dict[int, tuple[str, Any]] = {}  # by index of the row
    own = _images(path, record)
    begin, end = own.start // data.batch_size, -(-own.stop // data.batch_size)
    for number in sorted({begin, (begin + end) // 2, end - 1}):
        batch = data.read_batch(number, model.preprocessing)
        start = number * data.batch_size
        first = sum(data.images.names[i] not in lost for i in range(own.start, start))
        if batch.names:
            rows = model.predict_step(batch)[record["layer"]].numpy()
            wanted |= {first + i: pair for i, pair in enumerate(zip(batch.names, rows, strict=True))}
    worst = 0.0
    index = 0
    for names, values in reader.read(path):
        for i in wanted.keys() & range(index, index + len(names)):
            written, (name, row) = names[i - index], wanted[i]
            if os.path.basename(os.fsencode(written)) != os.path.basename(_name(path, name)):
                raise Mismatch(f"row {i + 1} is {written!r}, in {folder} it is {name!r}")
            row = row.astype(values.dtype).astype(np.float32)
            difference = np.linalg.norm(values[i - index].astype(np.float32) - row)
            worst = max(worst, float(difference / (np.linalg.norm(row) or 1)))
        index += len(names)
    told = f"{count(len(wanted), 'row')} computed again, the largest relative difference is {worst:.1e}"
    if worst > CLOSE:
        raise Mismatch(told)
    return told


def _rebuild(record: Json, folder: str) -> tuple[Any, Any]:
    sys.path.append(os.getcwd())
    options = record["run"]["options"]
    module, _, name = options["model_class"].rpartition(".")
    model = getattr(import_module(module), name)(**options["model"])
    from featx.datamodule import ImageFolderDataModule

    return model, ImageFolderDataModule(**options["data"] | {"dir": folder})
