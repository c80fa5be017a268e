"""What a folder holds of a layer: nothing, an unfinished run, a finished one; and what a run may do with it."""

import csv
import io
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from featx.data.batch import Fault, Images
from featx.errors import BadValueError
from featx.writer import disk, journal, records
from featx.writer.disk import DiskError
from featx.writer.formats import FORMATS
from featx.writer.journal import Entry, Placed
from featx.writer.records import Json

HIDDEN = ".featx"
ERRORS_HEADER = ("path", "reason", "exception")
USED = "used all the same: "
AFRESH = "Give another --writer.out_dir, or --writer.overwrite true, which starts afresh."


def file_name(layer: str, suffix: str = "") -> str:
    """Return the name of a layer's file; a slash, which timm's layers may have, is written ``%2F``."""
    return layer.replace("/", "%2F") + (f".{suffix}" if suffix else "")


class Shard(NamedTuple):
    """One file of each format: of all images or, with ``--writer.shard_rows``, of so many, whole batches of them.

    Attributes:
        images: The images, by index.
        batches: Which of all batches they are.
        label: What tells the shard's parts from others', as ``-00007``; nothing where there is one file.
        results: The files asked for, by suffix.
        rows: What parts are joined to, by format: results, or hidden files that others are made of.
    """

    images: range
    batches: slice
    label: str
    results: dict[str, Path]
    rows: dict[str, Path]


class LayerState:
    """One layer's files in an output folder: the results and, below ``.featx``, what a resume needs.

    Args:
        out_dir: The output folder.
        layer: The layer, as the user named it.
        columns: Values in each row.
        formats: The formats asked for.
        identity: Everything that decides a value.
        images: The images, in the order of the rows.
        readers: The number of the reader of each kind of image file, 1 for others.
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
    ) -> None:
        self.layer = layer
        self.columns = columns
        self.identity = identity
        self.images = images
        self.readers = readers
        self.folder = out_dir / HIDDEN / file_name(layer)
        self.shards_folder = out_dir / file_name(layer)
        self.record_path = out_dir / file_name(layer, "json")
        self.errors_path = out_dir / file_name(layer, "errors.csv")
        self.run_path = self.folder / "run.json"
        self.inputs_path = self.folder / "images.gz"
        self.inputs = {"images": len(images), "digest": images.digest()}
        self.digest = records.digest(identity, images)
        self.formats = [FORMATS[name](layer, columns, identity) for name in formats]
        self.parts = {format.part: format for format in self.formats}
        self.sharded = identity["shard_rows"] is not None
        self.shards = self._divide(identity["shard_rows"] or len(images))
        self.results = [path for shard in self.shards for path in shard.results.values()]

    def _divide(self, size: int) -> list[Shard]:
        starts = range(0, len(self.images), size)
        digits = max(5, len(str(len(starts) - 1)))  # so that their names sort as their rows do
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
        """Return the first bytes of a shard's parts, which are the file's too, if all images can be read."""
        return {part: format.head(len(shard.images)) for part, format in self.parts.items()}

    def key(self, path: Path) -> str:
        """Return a result's name in the record, as ``fc7.csv`` or ``fc7/00000.csv``."""
        return path.relative_to(self.record_path.parent).as_posix()

    def read_record(self) -> Json | None:
        """Return the record, or None where there is none; raise BadValueError where it is of something else."""
        return records.read_record(self.record_path, self.layer)

    def look(self, afresh: bool = False) -> Json | None:
        """Return the record if all files are there as it says, without changing anything.

        Args:
            afresh: Whether what another run of featx wrote is to be removed.

        Raises:
            UserError: Another run's results or parts are there, the images have changed, or files that featx did not
                write are in the place of the results.
        """
        if self.sharded and self.shards_folder.is_file():
            raise BadValueError(f"{self.shards_folder}: is a file. --writer.shard_rows makes a folder there.")
        record, run = self.read_record(), records.read_run(self.run_path)
        if strangers := self._strangers(record, run):
            raise BadValueError(
                f"{strangers[0]}: exists, and no record says that featx wrote it.\n"
                "Move it elsewhere, or give another --writer.out_dir."
            )
        if afresh:
            return None
        what = self.record_path.with_suffix("")
        for how, old in (("made", record), ("begun", run)):
            if lines := self._differences(old) if old else []:
                more = [f"  and {len(lines) - 7} more"] if len(lines) > 7 else []
                listed = "\n".join([f"  {line}" for line in lines[:7]] + more)
                raise BadValueError(f"{what}: was {how} by another run. What differs:\n{listed}\n{AFRESH}")
        if (old := run or record) and old["inputs"] != self.inputs:
            unread = {fault.path for fault in self.listed()}
            if changed := records.changed_inputs(self.inputs_path, self.images, unread):
                raise BadValueError(f"{what}: {changed} since that run began; its rows would not match.\n{AFRESH}")
        if record is None or self.inputs != record["inputs"]:
            return None
        whole = [self._is_whole(path, record, bool(run)) for path in self.results]
        return record if all(whole) else None

    def _differences(self, old: Json) -> list[str]:
        """Return a line for all that decided a value of a record, or of an unfinished run, and is not the same now."""
        readers = old.get("readers")
        if readers is None:  # a run's are in its journals
            readers = self._readers_by_suffix if "files" in old else self.readers_of(self._entries())
        now = {kind: self.readers.get(kind, 1) for kind in readers}
        return records.differences(old["identity"] | {"readers": readers}, self.identity | {"readers": now})

    def readers_of(self, entries: Iterable[Entry]) -> dict[str, int]:
        """Return the kinds of files that batches' images have, each with the number of its reader."""
        found: dict[str, int] = {}
        for entry in entries:
            found |= self._readers_by_suffix if entry.readers is None else entry.readers
        return dict(sorted(found.items()))

    @cached_property
    def _readers_by_suffix(self) -> dict[str, int]:
        """The readers of format 1, which did not note them: of the kinds that the images' names say, all number 1."""
        suffixes = {os.path.splitext(name)[1].lower() for name in self.images.names}
        return {kind: 1 for suffix, kind in Image.registered_extensions().items() if suffix in suffixes}

    def _strangers(self, record: Json | None, run: Json | None) -> list[Path]:
        """Return files that featx did not write in the place of those that it is to write, or would be read with."""
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

    def listed(self) -> list[Fault]:
        """Return the images that could not be read, as the journals know them."""
        return [fault for entry in self._entries() for fault in entry.faults]

    def _is_whole(self, path: Path, record: Json, unfinished: bool) -> bool:
        said = record["files"].get(self.key(path))
        if said is None or self._place(path, said, unfinished) is not None:
            return said is not None
        if path.exists() and not unfinished:
            raise BadValueError(f"{path}: is not what {self.record_path.name} says of it: it was changed.\n{AFRESH}")
        return False

    def _place(self, path: Path, said: Json, unfinished: bool) -> Path | None:
        """Return where a result is: in its place or, if the run ended while it named its files, still hidden."""
        hidden = sorted(self.folder.glob(f"*-{path.name}" if self.sharded else "*")) if unfinished else []
        for place in (path, *hidden, path):  # once more, as rank 0 may just have moved it
            with suppress(OSError, DiskError):
                if place.stat().st_size == said["bytes"] and journal.digest(place) == said["sha256"]:
                    return place
        return None

    def begin(self, afresh: bool = False) -> None:
        """Write down what run this is, so that no other goes on with it; what is left of another is removed.

        Args:
            afresh: Whether to remove all that featx wrote of the layer, and nothing else, before.
        """
        if afresh:
            self._wipe()
        with disk.told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if self.read_record() is None and records.read_run(self.run_path) is None:
            self._clear()
        records.save_inputs(self.inputs_path, self.images)
        run = {"format": journal.FORMAT, "identity": self.identity, "inputs": self.inputs}
        disk.replace(self.run_path, records.as_json(run))

    def _wipe(self) -> None:
        """Remove what featx wrote of the layer; the record, which knows the files, comes last."""
        record = self.read_record()
        self._clear()
        for name in record["files"] if record else ():
            disk.remove(self.record_path.parent / name)
        if record:
            disk.remove(self.errors_path)
        disk.remove(self.record_path)
        with suppress(OSError):  # there is none, or somebody else's files are in it
            self.shards_folder.rmdir()

    def _clear(self, keep: Collection[Path] = ()) -> None:
        """Remove what featx made below ``.featx``, run.json last: without it nobody would know whose the parts are."""
        with disk.told(self.folder):
            own = [path for path in self.folder.glob("*") if journal.OWN.fullmatch(path.name) and path not in keep]
        for path in sorted(own, key=self.run_path.__eq__):
            disk.remove(path)

    def done(self, still: Callable[[Fault], bool]) -> dict[int, Placed]:
        """Return the batches on disk, but for those whose unreadable images are no longer what they were.

        Args:
            still: Whether an image has the fault that it had.
        """
        return {number: one for number, one in self.placed().items() if all(map(still, one.entry.faults))}

    def placed(self, session: str = "") -> dict[int, Placed]:
        """Return this run's batches whose rows are on disk; of a session that is ending, what it wrote, unchecked."""
        own = {os.path.relpath(path, self.folder) for path in self.results}
        return journal.read_parts(self.folder, self.parts, self.digest, own, session)

    def settle(self, record: Json) -> None:
        """Do what a run that ended while it named its files had left to do."""
        for path in self.results:
            place = self._place(path, record["files"][self.key(path)], True)
            if place is not None and place != path:
                with disk.told(path):
                    path.parent.mkdir(exist_ok=True)
                disk.rename(place, path)
        self.tidy(keep_journal=record["errors"] + record["errors_used"] > 0)

    def tidy(self, keep_journal: bool) -> None:
        """Remove what only an unfinished run needs."""
        keep = {self.inputs_path}
        if keep_journal:
            last = f"{journal.next_session(self.folder) - 1:06}"
            keep |= {*self.folder.glob(f"{last}*.journal"), *self.folder.glob("rows*")}
        self._clear(keep)


def errors_csv(faults: list[Fault]) -> bytes:
    """Return the list of errors, as ``read_errors`` reads it."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([ERRORS_HEADER, *map(error_row, faults)])
    return text.getvalue().encode("utf-8", "surrogateescape")


def error_row(fault: Fault) -> list[str]:
    """Return what the list of errors says of an image: its path, what is wrong with it, what the decoder said."""
    return [fault.path, (USED if fault.used else "") + fault.reason, fault.exception]


def read_errors(path: Path) -> list[Fault]:
    """Return the images that a finished run could not read, or that were used as read: none without a list.

    Raises:
        BadValueError: It is not as featx writes it.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = [tuple(row) for row in csv.reader(file)] or [()]
    if header != ERRORS_HEADER or any(len(row) != len(header) for row in rows):
        raise BadValueError(f"{path}: not a list of errors that featx wrote. Expected {','.join(ERRORS_HEADER)} first.")
    return [Fault(name, reason.removeprefix(USED), said, reason.startswith(USED)) for name, reason, said in rows]
