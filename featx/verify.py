"""``featx verify``: a finished file against its record, and some of its rows against their images."""

import os
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from featx import formats, journal, reader
from featx.datamodule import ImageFolderDataModule
from featx.finished import Finished, find
from featx.manifest import Json
from featx.messages import BadValueError, MissingPathError, UserError, count
from featx.options import PlainParser

CLOSE = 1e-4  # relative (L2); another kind of processor stays far below, other weights or pixels far above


class Mismatch(UserError):
    """A file is not what its record says: exit status 1."""

    exit_status = 1


def verify(argv: list[str]) -> int:
    """Run ``featx verify FILE… [--images DIR]``: 0 where all is as recorded, else 1 and a line a file that is not."""
    parser = PlainParser("featx verify", description="Hold finished files against their records.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="such as features/fc7.csv, or a folder of shards")
    parser.add_argument("--images", metavar="DIR", help="also compute some rows again, from the images in this folder")
    options = parser.parse_args(argv)
    wrong = 0
    for path in chain.from_iterable(map(_files, map(Path, options.files))):
        try:
            record = check_file(path)
            said = f"{count(record['rows'], 'row')} of {count(record['columns'], 'value')} as recorded"
            if options.images:
                said += f"; {check_rows(path, options.images)}"
            print(f"{path}: {said}")
        except Mismatch as err:
            print(f"{path}: {err}", file=sys.stderr)
            wrong = 1
    return wrong


def _files(path: Path) -> list[Path]:
    """Return a file or, of a folder of shards, all that its record knows but the names beside an npy."""
    if not path.is_dir():
        return [path]
    file = _find(path)
    return [file.path.parent / name for name in file.record["files"] if not name.endswith(".names.txt")]


def _find(path: Path) -> Finished:
    file = find(path)
    if not file.record:
        raise MissingPathError(f"{file.record_path}: no such file. Expected what featx predict wrote, its record.")
    return file


def check_file(path: Path) -> Json:
    """Return a finished file's record, if the file is what it says; of a shard with the number of its own rows.

    Raises:
        MissingPathError: There is no such file, or no record beside it.
        Mismatch: It is not; the message says what differs.
    """
    file = _find(path)
    record = file.record
    if not file.is_known:
        known = textwrap.shorten(", ".join(record["files"]), 200, placeholder=" …")
        raise Mismatch(f"{file.record_path.name} does not know it, it knows {known}")
    names, widths = [], set[int]()
    for name, columns in _names_and_widths(path, record):
        names.append(name)
        widths.add(columns)
    if len(names) != record["rows"]:
        raise Mismatch(f"{count(len(names), 'row')}, expected {record['rows']:,}")
    if names and widths != {record["columns"]}:
        raise Mismatch(f"rows of {' and '.join(map(str, sorted(widths)))} values, expected {record['columns']:,}")
    if file.rows is not None:
        for row, (name, expected) in enumerate(zip_longest(names, [_name(file, image) for image in file.rows]), 1):
            if name != expected:
                raise Mismatch(f"row {row} is named {name!r}, expected {expected!r}")
    said_of = {Path(name).name: said["sha256"] for name, said in record["files"].items()}
    if journal.digest(path) != said_of[path.name]:
        raise Mismatch(f"values differ from those written: its SHA-256 is not the recorded {said_of[path.name][:8]}…")
    listed = path.with_suffix(".names.txt")
    if path.suffix == ".npy" and journal.digest(listed) != said_of[listed.name]:
        raise Mismatch(f"names differ from those written: {listed.name} does not have the recorded SHA-256")
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


def _name(file: Finished, image: str) -> bytes:
    """Return an image's name as the file has it: Parquet holds nothing but UTF-8."""
    name = os.fsencode(image if file.record["identity"]["names"] == "relative" else os.path.basename(image))
    return name.decode(errors="backslashreplace").encode() if file.path.suffix == ".parquet" else name


def check_rows(path: Path, folder: str) -> str:
    """Compute the first, a middle and the last batch again, and say by how much they differ from the file.

    Raises:
        Mismatch: By more than another processor would explain, or the folder holds other images.
    """
    file = _find(path)
    record, own = file.record, file.own
    for option, able in (("trainer.precision", ["32-true"]), ("data.decoder", ["exact", "turbo"])):
        if (used := record["identity"][option.split(".")[1]]) not in able:
            raise UserError(f"--images: rows of --{option} {used} are not computed again.")
    model, data = _rebuild(record, folder)
    data.setup()
    model.configure_model()
    model.try_out(data.first_batch(model.preprocessing))  # which finds the memory layout
    if len(data.images) != record["inputs"]["images"]:
        raise Mismatch(f"{folder} holds {count(len(data.images), 'image')}, expected {record['inputs']['images']:,}")
    lost = {fault.path for fault in file.faults if not fault.used}
    wanted: dict[int, tuple[str, Any]] = {}  # by index of the row
    begin, end = own.start // data.batch_size, -(-own.stop // data.batch_size)
    for number in sorted({begin, (begin + end) // 2, end - 1}):
        batch = data.read_batch(number, model.preprocessing)
        start = number * data.batch_size
        first = sum(data.images.names[i] not in lost for i in range(own.start, start))
        if batch.names:
            computed = model.predict_step(batch)[record["layer"]].numpy()
            wanted |= dict(enumerate(zip(batch.names, computed, strict=True), first))
    worst = 0.0
    rows = (pair for names, values in reader.read(path) for pair in zip(names, values, strict=True))
    for i, (written, values) in enumerate(rows):
        if i in wanted:
            name, expected = wanted[i]
            if os.path.basename(os.fsencode(written)) != os.path.basename(_name(file, name)):
                raise Mismatch(f"row {i + 1} is {written!r}, in {folder} it is {name!r}")
            expected = expected.astype(values.dtype).astype(np.float32)
            difference = np.linalg.norm(values.astype(np.float32) - expected)
            worst = max(worst, float(difference / (np.linalg.norm(expected) or 1)))
    told = f"{count(len(wanted), 'row')} computed again, the largest relative difference is {worst:.1e}"
    if worst > CLOSE:
        raise Mismatch(told)
    return told


def _rebuild(record: Json, folder: str) -> tuple[Any, Any]:
    sys.path.append(os.getcwd())
    options = record["run"]["options"]
    module, _, name = options["model_class"].rpartition(".")
    model = getattr(import_module(module), name)(**options["model"])
    return model, ImageFolderDataModule(**options["data"] | {"dir": folder})
