"""``featx verify``: checks a finished file against its record, and some of its rows against their images."""

import os
import shlex
import sys
import textwrap
from argparse import Namespace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from featx import results
from featx.commands.options import Parser, PlainParser, import_from_here
from featx.data.module import ImageFolderDataModule
from featx.errors import BadValueError, MissingPathError, UserError, count
from featx.model.build import is_function
from featx.model.extractor import FeatureExtractor
from featx.results import Finished, find
from featx.writer import journal
from featx.writer.formats import FORMATS, FileFormat, row_name
from featx.writer.records import Json

OWN = "featx.FeatureExtractor"
OWN_BEFORE = "featx.model.extractor.FeatureExtractor"  # as 0.1.0 recorded it
LEFT_OUT = {"unsafe_pickle": False}  # options that were removed, with the value that changed nothing
CLOSE = 1e-4  # relative (L2); other processors differ by far less, other weights or pixels by far more


class Mismatch(UserError):
    """A file does not match its record: exit status 1."""

    exit_status = 1


def verify(argv: list[str]) -> int:
    """Run ``featx verify FILE… [--images DIR]``: 0 if all files match their records, else 1 and a line for each."""
    parser = PlainParser("featx verify", description="Check finished files against their records.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="such as features/fc7.csv, or a folder of shards")
    parser.add_argument("--images", metavar="DIR", help="also recompute some rows from the images in this folder")
    parser.add_argument("--model", metavar="CLASS", help="the class that made the rows, if it is your own")
    parser.add_argument(
        "--model.arch", dest="arch", metavar="FUNCTION", help="the function that built the network, if it is your own"
    )
    parser.add_argument(
        "--data.reader", dest="reader", metavar="FUNCTION", help="the function that read the images, if it is your own"
    )
    options = parser.parse_args(argv)
    if not options.images and (named := options.model or options.arch or options.reader):
        raise BadValueError(f"{named}: only used to recompute rows. Expected --images DIR with it.")
    wrong = 0
    for path in chain.from_iterable(map(_files, map(Path, options.files))):
        try:
            record = check_file(path)
            result = f"{count(record['rows'], 'row')} of {count(record['columns'], 'value')} as recorded"
            if options.images:
                result += f"; {check_rows(path, options)}"
            print(f"{path}: {result}")
        except Mismatch as err:
            print(f"{path}: {err}", file=sys.stderr)
            wrong = 1
    return wrong


def _files(path: Path) -> list[Path]:
    """Return the file itself or, for a folder, all shards in its record."""
    if not path.is_dir():
        return [path]
    file = _find(path)
    return [file.path.parent / name for name in file.record["files"] if not name.endswith(".names.txt")]


def _find(path: Path) -> Finished:
    file = find(path)
    if not file.record:
        raise MissingPathError(f"{file.record_path}: no such file. Expected the record that featx predict wrote.")
    return file


def check_file(path: Path) -> Json:
    """Check a finished file against its record and return the record, for a shard with the shard's number of rows.

    Raises:
        MissingPathError: There is no such file, or no record beside it.
        Mismatch: The file differs from its record.
    """
    file = _find(path)
    record = file.record
    if not file.is_known:
        known = textwrap.shorten(", ".join(record["files"]), 200, placeholder=" …")
        raise Mismatch(f"{file.record_path.name} does not list it; it lists {known}")
    names, widths = [], set[int]()
    try:
        for name, columns in _format(path).names_and_columns(path, record["identity"]["header"]):
            names.append(name)
            widths.add(columns)
    except BadValueError as err:
        raise Mismatch(str(err)) from err
    if len(names) != record["rows"]:
        raise Mismatch(f"{count(len(names), 'row')}, expected {record['rows']:,}")
    if names and widths != {record["columns"]}:
        raise Mismatch(f"rows of {' and '.join(map(str, sorted(widths)))} values, expected {record['columns']:,}")
    if file.rows is not None:
        for row, (name, expected) in enumerate(zip_longest(names, [_name(file, image) for image in file.rows]), 1):
            if name != expected:
                raise Mismatch(f"row {row} is named {name!r}, expected {expected!r}")
    digests = {Path(name).name: written["sha256"] for name, written in record["files"].items()}
    if journal.digest(path) != digests[path.name]:
        raise Mismatch(f"values differ from those written: its SHA-256 is not the recorded {digests[path.name][:8]}…")
    listed = path.with_suffix(".names.txt")
    if path.suffix == ".npy" and journal.digest(listed) != digests[listed.name]:
        raise Mismatch(f"names differ from those written: {listed.name} does not have the recorded SHA-256")
    return record


def _format(path: Path) -> type[FileFormat]:
    return FORMATS[path.suffix[1:]]


def _name(file: Finished, image: str) -> bytes:
    """Return the name of an image's row in the file."""
    return _format(file.path).as_stored(os.fsencode(row_name(image, file.record["identity"]["names"])))


def check_rows(path: Path, options: Namespace) -> str:
    """Recompute the first, a middle and the last batch, and return the largest difference in words.

    Args:
        path: The file.
        options: ``images``, the folder; ``model`` and ``arch``, the user's own code that may run.

    Raises:
        Mismatch: Rows differ by more than another processor would explain, or the folder has other images.
        UserError: The record cannot be used, or needs code that ``options`` do not name.
    """
    file, folder = _find(path), options.images
    record, own = file.record, file.own
    if (used := record["identity"]["precision"]) != "32-true":
        raise UserError(f"--images: rows of --trainer.precision {used} cannot be recomputed.")
    model, data = _rebuild(file, options)
    data.setup()
    model.configure_model()
    sample = model.try_out(data.first_batch(model.preprocessing))  # also chooses the memory layout
    if model.weights_digest != (expected := record["identity"]["weights"]):
        raise Mismatch(
            f"the weights, {model.weights_used}, are not the recorded ones: "
            f"SHA-256 {expected[:8]}… -> {model.weights_digest[:8]}…"
        )
    if record["layer"] not in sample:
        raise _unusable(file, f"its layer is {record['layer']}, but --model.layer {model.layer}")
    if (columns := sample[record["layer"]].shape[1]) != record["columns"]:
        raise Mismatch(f"recomputed rows have {count(columns, 'value')}, expected {record['columns']:,}")
    if len(data.images) != record["inputs"]["images"]:
        raise Mismatch(f"{folder} holds {count(len(data.images), 'image')}, expected {record['inputs']['images']:,}")
    lost = {fault.path for fault in file.faults if not fault.used}
    wanted: dict[int, tuple[str, Any]] = {}  # by index of the row
    begin, last = own.start // data.batch_size, (own.stop - 1) // data.batch_size
    for number in sorted({begin, (begin + last + 1) // 2, last}):
        batch = data.read_batch(number, model.preprocessing)
        before = data.images.names[own.start : number * data.batch_size]
        if batch.names:
            computed = model.predict_step(batch)[record["layer"]].numpy()
            first = sum(name not in lost for name in before)
            wanted |= dict(enumerate(zip(batch.names, computed, strict=True), first))
    worst = 0.0
    rows = (pair for names, values in results.read(path) for pair in zip(names, values, strict=True))
    for i, (written, values) in enumerate(rows):
        if i in wanted:
            name, expected = wanted[i]
            if os.path.basename(os.fsencode(written)) != os.path.basename(_name(file, name)):
                raise Mismatch(f"row {i + 1} is {written!r}, in {folder} it is {name!r}")
            expected = expected.astype(values.dtype).astype(np.float32)
            difference = np.linalg.norm(values.astype(np.float32) - expected)
            worst = max(worst, float(difference / (np.linalg.norm(expected) or 1)))
    # Rows of an update were computed in batches of its own.
    how = " in other batches" if "generations" in record else ""
    result = f"{count(len(wanted), 'row')} recomputed{how}, the largest relative difference is {worst:.1e}"
    if worst > CLOSE:
        raise Mismatch(result)
    return result


def _rebuild(file: Finished, options: Namespace) -> tuple[Any, Any]:
    """Make the model and the data module that a record describes."""
    recorded = file.record["run"]["options"]
    made_by = OWN if recorded["model_class"] == OWN_BEFORE else recorded["model_class"]
    known = {
        "--model": made_by,
        "--model.arch": recorded["model"].get("arch"),
        "--data.reader": recorded["data"].get("reader"),
    }
    _check_trust(file, options, known)
    groups = {"model": {}, "data": {"pad": True} | recorded["data"] | {"dir": options.images}}
    for name, value in recorded["model"].items():
        if name not in LEFT_OUT:
            groups["model"][name] = value
        elif value != LEFT_OUT[name]:
            raise BadValueError(f"{file.record_path}: --model.{name} {str(value).lower()} is not taken from a record.")
    parser = Parser(default_env=False)
    parser.add_subclass_arguments(FeatureExtractor, "model")
    parser.add_class_arguments(ImageFolderDataModule, "data")
    try:
        for group, owner in (("model", FeatureExtractor), ("data", ImageFolderDataModule)):
            hints = get_type_hints(owner.__init__)
            for name, value in groups[group].items():  # the parser takes null for any type
                if value is None and name in hints and type(None) not in get_args(hints[name]):
                    raise BadValueError(f"--{group}.{name} null: expected a value.")
        model = {"class_path": made_by, "init_args": groups["model"]}
        made = parser.instantiate_classes(parser.parse_object({"model": model, "data": groups["data"]}))
    except BadValueError as err:
        if str(err).startswith(f"--model {options.model}: "):
            raise
        raise _unusable(file, str(err)) from err
    return made.model, made.data


def _check_trust(file: Finished, options: Namespace, known: Json) -> None:
    """Raise UserError if making the model would run code that is not featx's and that the user did not name."""
    named = {"--model": options.model, "--model.arch": options.arch, "--data.reader": options.reader}
    for option, word in named.items():
        if word is not None and word != known[option]:
            raise BadValueError(f"{option} {word}: {file.record_path} says {known[option]}.")
    arch = known["--model.arch"]
    foreign = {
        "--model": known["--model"] != OWN,
        "--model.arch": isinstance(arch, str) and is_function(arch),
        "--data.reader": known["--data.reader"] is not None,
    }
    needed = [option for option in named if foreign[option]]
    if any(named[option] is None for option in needed):
        words = chain.from_iterable((option, known[option]) for option in needed)
        command = shlex.join(["featx", "verify", str(file.path), "--images", options.images, *words])
        raise UserError(
            f"{file.record_path}: code that is not part of featx made these rows, and a record alone does not run it.\n"
            f"If you trust that code: {command}"
        )
    if needed:
        import_from_here()


def _unusable(file: Finished, why: str) -> BadValueError:
    return BadValueError(f"{file.record_path}: not a record that featx can use: {why}")
