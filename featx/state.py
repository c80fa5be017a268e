"""What a folder holds of a layer: nothing, an unfinished run, a finished one; and what a run may do with it."""

import csv
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from featx import disk, formats, journal, manifest, parquet
from featx.decode import Fault
from featx.disk import DiskError
from featx.formats import Format
from featx.images import ImageTree
from featx.journal import Entry, Placed
from featx.manifest import Json
from featx.messages import BadValueError

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
    """

    def __init__(self, out_dir: Path, layer: str, kinds: Sequence[Format], identity: Json, images: ImageTree) -> None:
        self.layer = layer
        self.identity = identity
        self.images = images
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
        self.inputs = manifest.inputs(images)

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

    def look(self) -> Literal["fresh", "unfinished", "finished"]:
        """Say what is there, without changing anything.

        Raises:
            UserError: Another run's results or parts are there, or the images have changed.
        """
        record, run = manifest.read_json(self.record_path), manifest.read_json(self.run_path)
        for kind, old in (("made", record), ("begun", run)):
            lines = manifest.differences(old["identity"], self.identity) if old else []
            if lines:
                more = [f"  and {len(lines) - 7} more"] if len(lines) > 7 else []
                told = "\n".join([f"  {line}" for line in lines[:7]] + more)
                raise BadValueError(
                    f"{self.record_path.with_suffix('')}: was {kind} by another run. What differs:\n{told}\n{AFRESH}"
                )
        if old := run or record:
            self._check_images(old)
        elif strangers := self._strangers():
            raise BadValueError(f"{strangers[0]}: exists, and no record says what made it.\n{AFRESH}")
        if record and self.inputs == record["inputs"]:
            whole = [self._is_whole(path, record, bool(run)) for path in self.results]
            if all(whole):
                return "finished"
        return "unfinished" if run else "fresh"

    def _strangers(self) -> list[Path]:
        """Return what stands in the place of the results, or would be read as one with them."""
        if self.sharded and self.shards_folder.exists():
            return sorted(self.shards_folder.iterdir())
        return [path for path in self.results if path.exists()]

    def _check_images(self, old: Json) -> None:
        if old["inputs"] == self.inputs:
            return
        told = manifest.changed_inputs(self.inputs_path, self.images, [fault.path for fault in self.listed()])
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
        paths = sorted(self.folder.glob("*.journal"))
        return [fault for path in paths for entry in journal.decode(path.read_bytes())[1] for fault in entry.faults]

    def begin(self) -> None:
        """Write down what run this is, so that no other goes on with it."""
        with disk.told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        manifest.save_inputs(self.inputs_path, self.images)
        disk.replace(self.run_path, manifest.as_json({"identity": self.identity, "inputs": self.inputs}))

    def wipe(self) -> None:
        """Remove all there is of the layer."""
        with disk.told(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
            record = manifest.read_json(self.record_path)
            old = [self.record_path.parent / name for name in record["files"]] if record else []
            shards = self.shards_folder.glob("[0-9]*.*") if self.sharded else ()  # they would be read as this run's
            for path in (self.record_path, self.errors_path, *self.results, *old, *shards):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # there is none, or somebody else's files are in it
                self.shards_folder.rmdir()

    def done(self, still: Callable[[Fault], bool]) -> dict[int, Placed]:
        """Return the batches on disk, but for those whose unreadable images are no longer what they were.

        Args:
            still: Whether an image has the fault that it had.
        """
        return {
            number: placed
            for number, placed in journal.read_parts(self.folder, self.kinds).items()
            if all(still(fault) for fault in placed.entry.faults)
        }

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
        if old := manifest.read_json(self.record_path):  # formats that an earlier run wrote stay, if they say the same
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
            "layer": self.layer,
            "files": files,
            "rows": rows,
            "columns": columns,
            "errors": lost,
            "errors_used": len(faults) - lost,
            "rows_not_finite": sum(entry.odd[0] for entry in entries),
            "values_not_finite": sum(entry.odd[1] for entry in entries),
            "values_overflowed": sum(entry.odd[2] for entry in entries),
            "decoded_on_cpu": sum(entry.odd[3] for entry in entries),
            "inputs": self.inputs,
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
        disk.replace(self.record_path, manifest.as_json(record))
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
            relative, said = self.identity["names"] == "relative", manifest.as_json(decided)
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
        disk.replace(self.folder / f"{session:06}{shard.label}.journal", journal.encode(names, moved))

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
        for path in self.folder.iterdir():
            if path not in keep:
                disk.remove(path)


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
    """Return the images that a finished run could not read, or that were used as read: none without a list."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        _, *rows = csv.reader(file)
    return [Fault(name, reason.removeprefix(USED), said, reason.startswith(USED)) for name, reason, said in rows]
