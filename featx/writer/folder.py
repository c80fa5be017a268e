"""What a folder holds of a layer: nothing, an unfinished run, a finished one; and what a run may do with it."""

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from PIL import Image

from featx.data.batch import Fault, Images
from featx.errors import BadValueError
from featx.writer import disk, formats, journal, parquet, records
from featx.writer.disk import DiskError
from featx.writer.formats import Format
from featx.writer.journal import Entry, Head, Placed
from featx.writer.records import Json

HIDDEN = ".featx"
ERRORS_HEADER = ("path", "reason", "exception")
USED = "used all the same: "
AFRESH = "Give another --writer.out_dir, or --writer.overwrite true, which starts afresh."
SUFFIXES = [f".{kind}" for kind in get_args(Format)]
Found = Literal["fresh", "unfinished", "finished"]


def file_name(layer: str, suffix: str = "") -> str:
    """Return the name of a layer's file; a slash, which timm's layers may have, is written ``%2F``."""
    return layer.replace("/", "%2F") + (f".{suffix}" if suffix else "")


class Shard(NamedTuple):
    """One file of each format: of all images or, with ``--writer.shard_rows``, of so many, whole batches of them.

    Attributes:
        images: The images, by index.
        label: What tells the shard's parts from others', as ``-00007``; nothing where there is one file.
        files: The files asked for.
        rows: What parts are joined to. Parquet is made of the rows as npy has them, which stay hidden if nobody asked.
        names: ``names.txt`` beside an npy.
    """

    images: range
    label: str
    files: dict[Format, Path]
    rows: dict[str, Path]
    names: Path

    def results(self) -> list[Path]:
        """Return the files asked for, and the names beside an npy."""
        return [*self.files.values(), *([self.names] if "npy" in self.files else [])]


class LayerState:
    """One layer's files in an output folder: the results and, below ``.featx``, what a resume needs.

    Args:
        out_dir: The output folder.
        layer: The layer, as the user named it.
        kinds: The formats asked for.
        identity: Everything that decides a value.
        images: The images, in the order of the rows.
        readers: The number of the reader of each kind of image file, 1 for others.
    """

    def __init__(
        self,
        out_dir: Path,
        layer: str,
        kinds: Sequence[Format],
        identity: Json,
        images: Images,
        readers: Mapping[str, int],
    ) -> None:
        self.layer = layer
        self.identity = identity
        self.images = images
        self.readers = readers
        self.folder = out_dir / HIDDEN / file_name(layer)
        self.shards_folder = out_dir / file_name(layer)
        self.sharded = identity["shard_rows"] is not None
        self.shards = self._divide(kinds, identity["shard_rows"] or len(images))
        self.kinds = list(self.shards[0].rows)  # of the parts
        self.results = [path for shard in self.shards for path in shard.results()]
        self.record_path = out_dir / file_name(layer, "json")
        self.errors_path = out_dir / file_name(layer, "errors.csv")
        self.run_path = self.folder / "run.json"
        self.inputs_path = self.folder / "images.gz"
        self.inputs = records.inputs(images)
        self.digest = records.digest(identity, images)

    def _divide(self, kinds: Sequence[Format], size: int) -> list[Shard]:
        starts = range(0, len(self.images), size)
        digits = max(5, len(str(len(starts) - 1)))  # so that their names sort as their rows do
        shards = []
        for number, start in enumerate(starts):
            name = f"{number:0{digits}}"
            stem, label = (self.shards_folder / name, f"-{name}") if self.sharded else (self.shards_folder, "")
            files = {kind: Path(f"{stem}.{kind}") for kind in kinds}
            rows: dict[str, Path] = {kind: path for kind, path in files.items() if kind != "parquet"}
            if "parquet" in kinds:
                rows.setdefault("npy", self.folder / f"rows{label}.npy")
            images = range(start, min(start + size, len(self.images)))
            shards.append(Shard(images, label, files, rows, Path(f"{stem}.names.txt")))
        return shards

    def shard_of(self, batch: int) -> int:
        """Return the index of the shard that a batch belongs to."""
        return batch * int(self.identity["batch_size"]) // len(self.shards[0].images)

    def heads(self, shard: Shard, columns: int) -> dict[str, bytes]:
        """Return the first bytes of a shard's files; of an npy right, if all images can be read."""
        heads = {
            "csv": formats.csv_header(self.layer, columns) if self.identity["header"] else b"",
            "npy": formats.npy_head(len(shard.images), columns, self.identity["dtype"]),
        }
        return {kind: heads[kind] for kind in self.kinds}

    def _key(self, path: Path) -> str:
        """Return a result's name in the record, as ``fc7.csv`` or ``fc7/00000.csv``."""
        return path.relative_to(self.record_path.parent).as_posix()

    def look(self, afresh: bool = False) -> Found:
        """Return what is there, without changing anything.

        Args:
            afresh: Whether what another run of featx wrote is to be removed.

        Raises:
            UserError: Another run's results or parts are there, the images have changed, or files that featx did not
                write are in the place of the results.
        """
        record, run = records.read_record(self.record_path, self.layer), records.read_run(self.run_path)
        if strangers := self._strangers(record, run):
            raise BadValueError(
                f"{strangers[0]}: exists, and no record says that featx wrote it.\n"
                "Move it elsewhere, or give another --writer.out_dir."
            )
        if afresh:
            return "fresh"
        made = self._differences(record, record.get("readers", self._readers_by_suffix)) if record else []
        begun = self._differences(run, self._readers()) if run else []
        for what, lines in (("made", made), ("begun", begun)):
            if lines:
                more = [f"  and {len(lines) - 7} more"] if len(lines) > 7 else []
                listed = "\n".join([f"  {line}" for line in lines[:7]] + more)
                raise BadValueError(
                    f"{self.record_path.with_suffix('')}: was {what} by another run. What differs:\n{listed}\n{AFRESH}"
                )
        if old := run or record:
            self._check_images(old)
        if record and self.inputs == record["inputs"]:
            whole = [self._is_whole(path, record, bool(run)) for path in self.results]
            if all(whole):
                return "finished"
        return "unfinished" if run else "fresh"

    def _differences(self, old: Json, readers: dict[str, int]) -> list[str]:
        """Return a line for all that decided a value of another run and is not the same now."""
        now = {kind: self.readers.get(kind, 1) for kind in readers}
        return records.differences(old["identity"], self.identity) + records.differing(readers, now, "readers.")

    def _readers(self, entries: Iterable[Entry] | None = None) -> dict[str, int]:
        """Return the readers of the images of some batches, or of all that the journals know."""
        found: dict[str, int] = {}
        for entry in chain.from_iterable(some for _, some in self._journals()) if entries is None else entries:
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
        if record is None and run is None:
            places.append(self.errors_path)
        if self.sharded and self.shards_folder.is_dir():
            beside = sorted(self.shards_folder.iterdir())
            places += [path for path in beside if self._is_mine(path) or (not known and path.suffix in SUFFIXES)]
        return [path for path in places if os.path.lexists(path) and self._key(path) not in known]

    def _is_mine(self, path: Path) -> bool:
        """Whether a path is one of those that the files of this layer have."""
        return records.is_result_name(self.layer, self._key(path))

    def _journals(self) -> Iterator[tuple[Head, list[Entry]]]:
        return map(journal.read, journal.journals(self.folder))

    def _check_images(self, old: Json) -> None:
        if old["inputs"] == self.inputs:
            return
        told = records.changed_inputs(self.inputs_path, self.images, [fault.path for fault in self.listed()])
        if told:
            raise BadValueError(
                f"{self.record_path.with_suffix('')}: {told} since that run began; its rows would not match.\n{AFRESH}"
            )

    def _is_whole(self, path: Path, record: Json, unfinished: bool) -> bool:
        said = record["files"].get(self._key(path))
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

    def listed(self) -> list[Fault]:
        """Return the images that could not be read, as the journals know them."""
        return [fault for _, entries in self._journals() for entry in entries for fault in entry.faults]

    def begin(self, found: Found) -> None:
        """Write down what run this is, so that no other goes on with it; what is left of another is removed.

        Args:
            found: What ``look`` found, under the lock.
        """
        with disk.told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if found == "fresh" and records.read_record(self.record_path, self.layer) is None:
            self._clear()
        records.save_inputs(self.inputs_path, self.images)
        run = {"format": journal.FORMAT, "identity": self.identity, "inputs": self.inputs}
        disk.replace(self.run_path, records.as_json(run))

    def wipe(self) -> None:
        """Remove all that featx wrote of the layer, and nothing else; the record, which knows the files, comes last."""
        record = records.read_record(self.record_path, self.layer)
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
        return {
            number: placed
            for number, placed in self.placed().items()
            if all(still(fault) for fault in placed.entry.faults)
        }

    def placed(self, session: str = "") -> dict[int, Placed]:
        """Return this run's batches whose rows are on disk; of a session that is ending, what it wrote, unchecked."""
        above = os.path.relpath(self.record_path.parent, self.folder) + "/"

        def is_result(name: str) -> bool:
            return name.startswith(above) and records.is_result_name(self.layer, name.removeprefix(above))

        return journal.read_parts(self.folder, self.kinds, self.digest, is_result, session)

    def finish(self, done: dict[int, Placed], columns: int, known: dict[Path, str], about: Json) -> Json:
        """Join the parts to the final files, beside their record and the list of errors, and return the record.

        The record comes before the files get their names, so that no file of featx's is ever without one: a run that
        ends in between is unfinished, and the next one joins again.

        Args:
            done: All batches.
            columns: Values in each row.
            known: SHA-256 of parts as they are.
            about: What the record says besides.
        """
        placed = [done[number] for number in sorted(done)]
        entries = [one.entry for one in placed]
        faults = [fault for entry in entries for fault in entry.faults]
        rows = sum(entry.rows for entry in entries)
        lost = sum(not fault.used for fault in faults)
        assert [entry.batch for entry in entries] == list(range(len(entries))), f"{self.layer}: batches are missing"
        assert rows + lost == len(self.images), f"{self.layer}: {rows} rows, {lost} errors, {len(self.images)} images"
        files: Json = {}
        # Formats that an earlier run wrote stay, if they say the same.
        if old := records.read_record(self.record_path, self.layer):
            same = old["inputs"] == self.inputs and (old["errors"], old["rows"]) == (lost, rows)
            mine = set(map(self._key, self.results))
            for name, said in old["files"].items():
                if same:
                    files[name] = said
                elif name not in mine:
                    disk.remove(self.record_path.parent / name)
        joined: dict[Path, Path] = {}
        for shard in self.shards:
            some = placed[self._batches(shard)]
            joined |= self._join(shard, some, columns, known)
            said = {"rows": sum(one.entry.rows for one in some)} if self.sharded else {}
            for target in shard.results():
                path = joined[target]
                sha256, size = known.get(path) or journal.digest(path), path.stat().st_size
                files[self._key(target)] = {"sha256": sha256, "bytes": size} | said
        record = {
            "format": journal.FORMAT,
            "layer": self.layer,
            "files": files,
            "rows": rows,
            "columns": columns,
            "errors": lost,
            "errors_used": len(faults) - lost,
            "rows_not_finite": sum(entry.odd[0] for entry in entries),
            "values_not_finite": sum(entry.odd[1] for entry in entries),
            "values_overflowed": sum(entry.odd[2] for entry in entries),
            "inputs": self.inputs,
            "readers": self._readers(entries),
            "identity": self.identity,
            "run": {**about, "batches_by_device": Counter(entry.device for entry in entries)},
        }
        if faults:  # to repair single images, their neighbours' rows are taken from the finished files
            session = journal.next_session(self.folder)
            for shard in self.shards:
                self._keep_journal(session, shard, entries[self._batches(shard)], self.heads(shard, columns))
            disk.replace(self.errors_path, _errors_csv(faults))
        else:
            disk.remove(self.errors_path)
        disk.replace(self.record_path, records.as_json(record))
        if self.sharded:
            with disk.told(self.shards_folder):
                self.shards_folder.mkdir(exist_ok=True)
        for target, path in joined.items():
            disk.rename(path, target)
        self.tidy(keep_journal=bool(faults))
        return record

    def _batches(self, shard: Shard) -> slice:
        """Return which of all batches are a shard's."""
        size = self.identity["batch_size"]
        return slice(shard.images.start // size, -(-shard.images.stop // size))

    def _join(self, shard: Shard, placed: list[Placed], columns: int, known: dict[Path, str]) -> dict[Path, Path]:
        """Make a shard's files, and return where each is, ready to be renamed; ``known`` is left what is still true."""
        faults = [fault for one in placed for fault in one.entry.faults]
        rows, lost = sum(one.entry.rows for one in placed), sum(not fault.used for fault in faults)
        heads = self.heads(shard, columns)
        fresh = self.folder / f"joined{shard.label}"
        joined = {}
        for kind, target in shard.rows.items():
            head = formats.npy_head(rows, columns, self.identity["dtype"]) if kind == "npy" else heads[kind]
            ranges = journal.pieces(kind, placed)
            path = joined[target] = journal.join(ranges, head, Path(f"{fresh}.{kind}"), target)
            if head != heads[kind] or ranges != [(path, len(head), path.stat().st_size)]:
                known.pop(path, None)  # it is no longer as it was written
        if "npy" in shard.files:
            joined[shard.names] = Path(f"{fresh}.names.txt")
            lines = (formats.name_line(os.fsencode(self._row_name(path))) for path in self._readable(shard, faults))
            disk.replace(joined[shard.names], b"".join(lines))
        if "parquet" in shard.files:
            path = joined[shard.files["parquet"]] = Path(f"{fresh}.parquet")
            decided = {"layer": self.layer, "rows": rows, "columns": columns, "errors": lost, "identity": self.identity}
            relative, said = self.identity["names"] == "relative", records.as_json(decided)
            paths = self._readable(shard, faults)
            parquet.write(path, joined[shard.rows["npy"]], self.layer, paths, relative, said)
        return joined

    def _readable(self, shard: Shard, faults: list[Fault]) -> Iterator[str]:
        lost = {fault.path for fault in faults if not fault.used}
        paths = (self.images.names[index] for index in shard.images)
        return (path for path in paths if path not in lost)

    def _row_name(self, path: str) -> str:
        return path if self.identity["names"] == "relative" else os.path.basename(path)

    def _keep_journal(self, session: int, shard: Shard, entries: list[Entry], heads: dict[str, bytes]) -> None:
        ends = {format: len(head) for format, head in heads.items()}
        moved = []
        for entry in entries:
            spans = {}
            for format in heads:
                start, end, crc = entry.spans[format]
                spans[format] = (ends[format], ends[format] + end - start, crc)
                ends[format] = spans[format][1]
            moved.append(entry._replace(spans=spans))
        names = [os.path.relpath(path, self.folder) for path in shard.rows.values()]
        kept = journal.encode(Head(names, self.digest), moved)
        disk.replace(self.folder / f"{session:06}{shard.label}.journal", kept)

    def settle(self, record: Json) -> None:
        """Do what a run that ended while it named its files had left to do."""
        for path in self.results:
            place = self._place(path, record["files"][self._key(path)], True)
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
            keep |= {*self.folder.glob(f"{last}*.journal"), *self.folder.glob("rows*.npy")}
        self._clear(keep)


def _errors_csv(faults: list[Fault]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(ERRORS_HEADER)
    for fault in faults:
        writer.writerow(error_row(fault))
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
