"""A layer's files in an output folder: none yet, an unfinished run or a finished one, and what a run may do to them."""

import csv
import io
import os
import zlib
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from featx.data.batch import Fault, Images
from featx.errors import BadValueError, as_list
from featx.writer import disk, journal, records
from featx.writer.disk import DiskError
from featx.writer.formats import FORMATS
from featx.writer.journal import Entry, Placed
from featx.writer.records import Json

HIDDEN = ".featx"
ERRORS_HEADER = ("path", "reason", "exception")
USED = "used all the same: "
COMPLETE = "complete.json"  # the record of an update whose new files are complete, until they have their names
UPDATE = "update"  # the folder of an update, below the layer's
START_OVER = "Use another --writer.out_dir, or start over with --writer.overwrite true."


def file_name(layer: str, suffix: str = "") -> str:
    """Return the name of a layer's file, or of its folder of shards."""
    return records.file_stem(layer) + (f".{suffix}" if suffix else "")


class Shard(NamedTuple):
    """One file per format: of all images or, with ``--writer.shard_rows``, of that many, in whole batches.

    Attributes:
        images: The images, by index.
        batches: Their batches.
        label: Suffix of the names of the shard's parts, for example ``-00007``; empty if there is a single file.
        results: The final files, by suffix.
        rows: The files that parts are joined to, by format: final files, or hidden ones that final files are made from.
    """

    images: range
    batches: slice
    label: str
    results: dict[str, Path]
    rows: dict[str, Path]


class Readers:
    """The revision of the reader of each kind of image file: of this version, and of what earlier runs computed.

    Args:
        now: Those of this version, 1 for other kinds.
        names: The images.
    """

    def __init__(self, now: Mapping[str, int], names: Sequence[str]) -> None:
        self.now = dict(now)
        self._names = names

    def of(self, entries: Iterable[Entry]) -> dict[str, int]:
        """Return those that read some batches."""
        found: dict[str, int] = {}
        for entry in entries:
            found |= self._by_suffix if entry.readers is None else entry.readers
        return dict(sorted(found.items()))

    def of_old(self, old: Json, entries: Iterable[Entry]) -> dict[str, int]:
        """Return those of a record, or of an unfinished run with the batches in its journals."""
        if (readers := old.get("readers")) is not None:
            return dict(readers)
        return self._by_suffix if "files" in old else self.of(entries)

    @cached_property
    def _by_suffix(self) -> dict[str, int]:
        """Those in format 1, which did not record them: revision 1 for the kinds that the names suggest."""
        suffixes = {os.path.splitext(name)[1].lower() for name in self._names}
        return {kind: 1 for suffix, kind in Image.registered_extensions().items() if suffix in suffixes}


class LayerState:
    """One layer's files in an output folder: the results and, below ``.featx``, the files needed to resume.

    Args:
        out_dir: The output folder.
        layer: The layer, as the user named it.
        columns: Values per row.
        formats: The requested formats.
        identity: Everything that determines a value.
        images: The images, in the order of the rows.
        readers: The revision of the reader of each kind of image file, 1 for others.
        below: The folder below the layer's own for the files needed to resume.

    Attributes:
        old: The record of the finished files whose rows ``inspect`` found that an update may keep, or None.
    """

    def __init__(
        self,
        out_dir: Path,
        layer: str,
        columns: int,
        formats: Sequence[str],
        identity: Json,
        images: Images,
        readers: Mapping[str, int],
        below: str = "",
    ) -> None:
        self.out_dir = out_dir
        self.layer = layer
        self.columns = columns
        self.identity = identity
        self.images = images
        self.readers = Readers(readers, images.names)
        self.folder = out_dir / HIDDEN / file_name(layer) / below
        self.old: Json | None = None
        self.shards_folder = out_dir / file_name(layer)
        self.record_path = out_dir / file_name(layer, "json")
        self.errors_path = out_dir / file_name(layer, "errors.csv")
        self.run_path = self.folder / "run.json"
        self.inputs_path = self.folder / "images.gz"
        self.inputs: Json = {"images": len(images), "digest": images.digest()}
        self.digest = records.digest(identity, images)
        self.formats = [FORMATS[name](layer, columns, identity) for name in formats]
        self.parts = {format.part: format for format in self.formats}
        self.sharded = identity["shard_rows"] is not None
        self.shards = self._divide(identity["shard_rows"] or max(1, len(images)))
        self.results = [path for shard in self.shards for path in shard.results.values()]

    def _divide(self, size: int) -> list[Shard]:
        starts = range(0, len(self.images), size)
        digits = max(5, len(str(len(starts) - 1)))  # so that they sort by name
        suffixes = [format.suffixes[0] for format in self.formats]
        suffixes += [suffix for format in self.formats for suffix in format.suffixes[1:]]
        batch, shards = self.identity["batch_size"], []
        for number, start in enumerate(starts):
            name = f"{number:0{digits}}"
            stem, label = (self.shards_folder / name, f"-{name}") if self.sharded else (self.shards_folder, "")
            images = range(start, min(start + size, len(self.images)))
            results = {suffix: Path(f"{stem}.{suffix}") for suffix in suffixes}
            rows = {part: results.get(part, self.folder / f"rows{label}.{part}") for part in self.parts}
            shards.append(Shard(images, slice(start // batch, -(-images.stop // batch)), label, results, rows))
        return shards

    def shard_of(self, batch: int) -> int:
        """Return the index of the shard that a batch belongs to."""
        return batch * int(self.identity["batch_size"]) // len(self.shards[0].images)

    def heads(self, shard: Shard) -> dict[str, bytes]:
        """Return the first bytes of a shard's parts: those of the final file if all images can be read."""
        return {part: format.head(len(shard.images)) for part, format in self.parts.items()}

    def key(self, path: Path) -> str:
        """Return a result's name in the record, for example ``fc7.csv`` or ``fc7/00000.csv``."""
        return path.relative_to(self.record_path.parent).as_posix()

    def read_record(self) -> Json | None:
        """Return the record, or None; raise BadValueError if the file is not a record of this layer."""
        return records.read_record(self.record_path, self.layer)

    def inspect(self, overwrite: bool = False, update: bool = False) -> Json | None:
        """Return the record if all files match it; change nothing.

        Args:
            overwrite: Whether another run's files may be replaced.
            update: Whether the images of finished files may have changed.

        Raises:
            UserError: The folder has another run's results or parts, or files in the way that featx did not write, or
                the images have changed.
        """
        if self.sharded and self.shards_folder.is_file():
            raise BadValueError(f"{self.shards_folder}: is a file. --writer.shard_rows needs a folder there.")
        self.old = None
        record, run = self.read_record(), records.read_run(self.run_path)
        if unknown := self._unknown_files(record, run):
            raise BadValueError(
                f"{unknown[0]}: exists, and no record says that featx wrote it.\n"
                "Move it, or use another --writer.out_dir."
            )
        if overwrite:
            return None
        what = self.record_path.with_suffix("")
        for how, old in (("made", record), ("started", run)):
            if lines := self._differences(old) if old else []:
                more = [f"  and {len(lines) - 7} more"] if len(lines) > 7 else []
                listed = "\n".join([f"  {line}" for line in lines[:7]] + more)
                raise BadValueError(f"{what}: was {how} by another run. Differences:\n{listed}\n{START_OVER}")
        updated, changed = record is not None and "generations" in record, ""
        if (old := run or record) and old["inputs"] != self.inputs:
            unreadable = {fault.path for fault in self.faults()}
            changed = records.changed_inputs(self.inputs_path, self.images, unreadable)
            if changed and not (record and update):
                hint = (
                    "--writer.update true keeps the other rows, and computes only new and changed images.\n"
                    if record
                    else ""
                )
                raise BadValueError(
                    f"{what}: {changed} since that run began; its rows would not match.\n{hint}{START_OVER}"
                )
        if record and (changed or updated):
            self.check_formats(record, bool(changed))
            for path in (self.out_dir / name for name in record["files"]):
                if not self._is_complete(path, record, bool(run)):
                    raise BadValueError(f"{path}: is missing, so its rows cannot be kept.\n{START_OVER}")
            self.old = record
            return record if self.inputs == record["inputs"] else None
        if record is None or self.inputs != record["inputs"]:
            return None
        found = [self._is_complete(path, record, bool(run)) for path in self.results]
        return record if all(found) else None

    def check_formats(self, record: Json, all_of_them: bool) -> None:
        """Raise BadValueError if a run has a format that updated files lack or, for an update, not all of theirs."""
        suffixes = {name.rpartition(".")[2] for name in record["files"]}
        formats, asked = [name for name in FORMATS if name in suffixes], [format.suffixes[0] for format in self.formats]
        if (set(asked) ^ set(formats)) if all_of_them else (set(asked) - set(formats)):
            raise BadValueError(
                f"--writer.format {' and '.join(asked)}: {self.record_path.with_suffix('')} has "
                f"{' and '.join(formats)}, and rows are only kept as they are.\n"
                f"Expected --writer.format {as_list(','.join(formats)) or formats[0]}."
            )

    def _differences(self, old: Json) -> list[str]:
        """Return one line per difference between this run and a record or an unfinished run that changes values."""
        readers = self.readers.of_old(old, self._entries())
        now = {kind: self.readers.now.get(kind, 1) for kind in readers}
        return records.differences(old["identity"] | {"readers": readers}, self.identity | {"readers": now})

    def _unknown_files(self, record: Json | None, run: Json | None) -> list[Path]:
        """Return files that featx did not write and would have to replace, or that would be read as shards."""
        known = record["files"] if record else {}
        places = [*self.results]
        if run is None and not (record and record["errors"] + record["errors_used"]):
            places.append(self.errors_path)
        if self.sharded and self.shards_folder.is_dir():
            for path in sorted(self.shards_folder.iterdir()):
                if records.is_result_name(self.layer, self.key(path)) or (not known and path.suffix[1:] in FORMATS):
                    places.append(path)
        return [path for path in places if os.path.lexists(path) and self.key(path) not in known]

    def _entries(self) -> Iterator[Entry]:
        for path in journal.journals(self.folder):
            yield from journal.read(path)[1]

    def faults(self) -> list[Fault]:
        """Return the faults in the journals; after an update, those that are listed."""
        if "generations" in (self.read_record() or {}):
            return read_errors(self.errors_path)
        return [fault for entry in self._entries() for fault in entry.faults]

    def _is_complete(self, path: Path, record: Json, unfinished: bool) -> bool:
        recorded = record["files"].get(self.key(path))
        hidden = self.folder if unfinished else None
        found = recorded is not None and _find(path, recorded, hidden, self.sharded) is not None
        if recorded and not found and path.exists() and not unfinished:
            raise BadValueError(f"{path}: does not match {self.record_path.name}: it was changed.\n{START_OVER}")
        return found

    def begin(self, overwrite: bool = False, shared: bool = False) -> None:
        """Write ``run.json``, which only the same run may continue; remove leftovers that no ``run.json`` explains.

        Args:
            overwrite: Whether to remove everything that featx wrote for the layer first.
            shared: Whether other jobs compare their readers with this job's, instead of with those in all journals.
        """
        if overwrite:
            self._remove_results()
        with disk.reporting(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if self.read_record() is None and records.read_run(self.run_path) is None:
            self.clear()
        noted = {}
        with suppress(OSError, EOFError, ValueError, zlib.error):
            noted = records.read_noted(self.inputs_path)
        records.save_inputs(self.inputs_path, self.images, noted)
        run = {"format": journal.FORMAT, "identity": self.identity, "inputs": self.inputs}
        run |= {"readers": self.readers.now} if shared else {}
        disk.replace(self.run_path, records.as_json(run))

    def _remove_results(self) -> None:
        """Remove what featx wrote for the layer; the record, which lists the files, goes last."""
        record = self.read_record()
        self.remove_update()
        self.clear()
        for name in record["files"] if record else ():
            disk.remove(self.record_path.parent / name)
        if record:
            disk.remove(self.errors_path)
        disk.remove(self.record_path)
        with suppress(OSError):  # missing, or other files are in it
            self.shards_folder.rmdir()

    def clear(self, keep: Collection[Path] = ()) -> None:
        """Remove what featx wrote below ``.featx``; run.json, which says whose parts these are, goes last."""
        with disk.reporting(self.folder):
            own = [path for path in self.folder.glob("*") if journal.OWN.fullmatch(path.name) and path not in keep]
        for path in sorted(own, key=self.run_path.__eq__):
            disk.remove(path)

    def remove_update(self) -> None:
        """Remove what an update left; the list of what to rename, which would complete it, goes first."""
        folder = self.folder / UPDATE
        with disk.reporting(folder):
            own = [path for path in folder.glob("*") if journal.OWN.fullmatch(path.name)]
        for path in sorted(own, key=lambda path: path.name != COMPLETE):
            disk.remove(path)
        with suppress(OSError):  # missing, or other files are in it
            folder.rmdir()

    def placed(
        self, session: str = "", only: Container[int] | None = None, jobs: Collection[int] | None = None
    ) -> dict[int, Placed]:
        """Return this run's batches that are on disk, as ``journal.read_parts`` finds them."""
        own = {os.path.relpath(path, self.folder) for path in self.results}
        return journal.read_parts(self.folder, self.parts, self.digest, own, session, only, jobs)

    def finish_renaming(self, record: Json) -> None:
        """Rename the remaining files of a run that was killed while it renamed them."""
        self.rename_hidden(record)
        self.clean_up(keep_journal=record["errors"] + record["errors_used"] > 0)

    def rename_hidden(self, record: Json) -> None:
        """Rename the files of a record that are still hidden."""
        for path, recorded in ((self.out_dir / name, recorded) for name, recorded in record["files"].items()):
            place = _find(path, recorded, self.folder, self.sharded)
            if place is not None and place != path:
                with disk.reporting(path):
                    path.parent.mkdir(exist_ok=True)
                disk.rename(place, path)

    def clean_up(self, keep_journal: bool) -> None:
        """Remove what only an unfinished run needs."""
        keep = {self.inputs_path}
        if keep_journal:
            last = f"{journal.next_session(self.folder) - 1:06}"
            keep |= {*self.folder.glob(f"{last}*.journal"), *self.folder.glob("rows*")}
        self.clear(keep)


def _find(path: Path, recorded: Json, folder: Path | None, sharded: bool) -> Path | None:
    """Return where a result is: at its path or, if the run ended before renaming it, still hidden in a folder."""
    hidden = sorted(folder.glob(f"*-{path.name}" if sharded else "*")) if folder is not None else []
    for place in (path, *hidden, path):  # twice, because rank 0 may be renaming it
        with suppress(OSError, DiskError):
            if place.stat().st_size == recorded["bytes"] and journal.digest(place) == recorded["sha256"]:
                return place
    return None


def errors_csv(faults: list[Fault]) -> bytes:
    """Return the content of LAYER.errors.csv."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([ERRORS_HEADER, *map(error_row, faults)])
    return text.getvalue().encode("utf-8", "surrogateescape")


def error_row(fault: Fault) -> list[str]:
    """Return an image's row in the list of errors: its path, what is wrong with it, and the decoder's error."""
    return [fault.path, (USED if fault.used else "") + fault.reason, fault.exception]


def read_errors(path: Path) -> list[Fault]:
    """Return the faults in LAYER.errors.csv; none if it is missing.

    Raises:
        BadValueError: featx did not write it.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = [tuple(row) for row in csv.reader(file)] or [()]
    if header != ERRORS_HEADER or any(len(row) != len(header) for row in rows):
        raise BadValueError(
            f"{path}: not a list of errors that featx wrote. Expected header: {','.join(ERRORS_HEADER)}"
        )
    return [Fault(name, why.removeprefix(USED), exception, why.startswith(USED)) for name, why, exception in rows]
