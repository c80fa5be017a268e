"""``--writer.update true``: rows of unchanged images are kept, and only new and changed images are computed.

The images to compute have batches, parts and journals of their own, in a folder of their own. The finished files stay
as they are until the new ones are complete there; from then on ``complete.json`` says which files to rename.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featx.data.batch import Fault, Images, Remarks
from featx.errors import BadValueError, count, log
from featx.writer import disk, journal, records
from featx.writer.folder import COMPLETE, START_OVER, UPDATE, LayerState, Shard, errors_csv, read_errors
from featx.writer.formats import FileFormat, Ints
from featx.writer.join import make_files, record_of
from featx.writer.journal import Noted, Piece, Placed
from featx.writer.records import Json

COMPUTE, LOST = -1, -2  # instead of the old row of an image


class Kept(NamedTuple):
    """What an update keeps.

    Attributes:
        rows: The row of each image of today, ``(N,) int64``, counted in the finished files and then in ``placed``; or
            ``COMPUTE``; or ``LOST`` if it still cannot be read.
        faults: What is still wrong with images that are not computed.
        removed: How many images are gone.
        placed: Batches that an update of other images computed before it was interrupted.
        noted: What is noted of images whose rows are in them.
    """

    rows: Ints
    faults: list[Fault]
    removed: int
    placed: list[Placed]
    noted: dict[str, Noted]


class Update(LayerState):
    """The images of a finished layer that are new or have changed: what an ordinary run has for all images.

    Args:
        whole: The layer with all of today's images.
        images: Those to compute.
        places: Their places among all.
        kept: What to keep; only in the process that joins the files.
    """

    def __init__(self, whole: LayerState, images: Images, places: Ints, kept: Kept | None = None) -> None:
        formats = [format.suffixes[0] for format in whole.formats]
        super().__init__(
            whole.out_dir, whole.layer, whole.columns, formats, whole.identity, images, whole.readers.now, UPDATE
        )
        self.whole = whole
        self.places = places
        self.kept = kept
        # An update of other images, of other content or by other readers has another digest: its parts are not used.
        about = [self.digest, images.digest(), dict(sorted(whole.readers.now.items()))]
        self.digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def begin(self, overwrite: bool = False, shared: bool = False) -> None:
        """Write ``run.json`` and the list of these images; remove the parts of an update that cannot be used."""
        assert self.kept is not None
        with disk.reporting(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if not (digests := _interrupted(self.whole)):
            self.clear()
        if self.digest not in digests:
            records.save_inputs(self.folder / _list_name(self.digest), self.images)
            digests = [*digests, self.digest]
        run = {"format": journal.FORMAT, "identity": self.identity, "readers": self.readers.now,
               "inputs": self.inputs, "updates": digests}  # fmt: skip
        disk.replace(self.run_path, records.as_json(run))
        kept, images = int((self.kept.rows >= 0).sum()), len(self.images)
        removed = f", {count(self.kept.removed, 'image')} removed" if self.kept.removed else ""
        if self.kept.removed > len(self.whole.images):
            log.warning(
                "%s: MORE IMAGES ARE GONE (%s) THAN LEFT (%s): expected all images in --data.dir and --data.files, not "
                "only new ones",
                self.layer, f"{self.kept.removed:,}", f"{len(self.whole.images):,}",
            )  # fmt: skip
        log.info(
            "%s: update: %s kept, %s to compute%s", self.layer, count(kept, "row"), count(images, "image"), removed
        )

    def inspect(self, overwrite: bool = False, update: bool = False) -> Json | None:
        """Return the record if the update is complete, after giving all files their names."""
        complete(self.whole)
        return self.whole.inspect()

    def finish_renaming(self, record: Json) -> None:
        """Do nothing: ``inspect`` has done it."""

    def finish(self, done: dict[int, Placed], run: Json, stem: str) -> Json:
        """Write the new files from the kept rows and the computed ones, replace the old files, and return the record.

        Args:
            done: All batches of the update, by number.
            run: The record's ``run``.
            stem: The beginning of the names of new files, of this job alone.
        """
        whole, kept, old = self.whole, self.kept, self.whole.old
        assert kept is not None and old is not None
        placed = [done[number] for number in sorted(done)]
        entries = [one.entry for one in placed]
        size = self.identity["batch_size"]
        assert [entry.batch for entry in entries] == list(range(-(-len(self.images) // size))), "batches are missing"
        found = {fault.path: fault for entry in entries for fault in entry.faults}
        computed = np.array([name not in found or found[name].used for name in self.images.names], bool)
        needed = kept.rows[self.places] == COMPUTE  # others have been computed for another layer, and are kept here
        rows = kept.rows.copy()
        first = old["rows"] + sum(one.entry.rows for one in kept.placed)
        rows[self.places[needed]] = np.where(computed, first + np.cumsum(computed) - 1, LOST)[needed]
        faults = {name: found[name] for name in np.array(self.images.names, object)[needed] if name in found}
        faults |= {fault.path: fault for fault in kept.faults}
        without = {path for path, fault in faults.items() if not fault.used}
        tables = {part: _Table(self, format, [*kept.placed, *placed], stem) for part, format in whole.parts.items()}
        files: Json = {}
        for shard in whole.shards:
            wanted = rows[shard.images.start : shard.images.stop]
            wanted = wanted[wanted >= 0]
            if recorded := _same_shard(whole, shard, wanted):
                files |= recorded
                continue
            fresh, made = f"{self.folder / stem}{shard.label}", dict[Path, Path]()
            for part, table in tables.items():
                made[shard.rows[part]] = table.write(wanted, Path(f"{fresh}.{part}"))
            make_files(whole, shard, made, fresh, without, len(wanted))
            for target in shard.results.values():
                about = {"sha256": journal.digest(made[target]), "bytes": made[target].stat().st_size}
                files[whole.key(target)] = about | ({"rows": len(wanted)} if whole.sharded else {})
        in_order = [faults[name] for name in whole.images.names if name in faults]
        entries = [one.entry for one in kept.placed] + entries
        record = record_of(whole, files, int((rows >= 0).sum()), in_order, entries, run)
        record["readers"] = dict(sorted({**whole.readers.of_old(old, ()), **record["readers"]}.items()))
        new = (kept.rows == COMPUTE) | (kept.rows >= old["rows"])
        generation = {"date": run["started"], "images": int(new.sum()), "device": _devices(record)}
        record["generations"] = [*(old.get("generations") or [_first_generation(old)]), generation]
        noted = {name: values for one in placed for name, values in one.entry.noted.items()} | kept.noted
        noted = _count_anew(record, old, records.read_noted(whole.inputs_path), noted, whole.images.names, kept.rows)
        if in_order:
            disk.replace(self.folder / f"{stem}.errors.csv", errors_csv(in_order))
        records.save_inputs(self.folder / f"{stem}.gz", whole.images, noted)
        about = {"stem": stem, "before": _digest(old), "gone": sorted(old["files"].keys() - files.keys())}
        text = records.as_json({**record, "update": about})
        disk.replace(self.folder / COMPLETE, text, self.folder / f"{stem}.json")
        complete(whole)
        return record


def plan(
    states: Mapping[str, LayerState], images: Any, is_unchanged: Callable[[Fault], bool]
) -> tuple[dict[str, Kept], NDArray[np.int64] | None]:
    """Return what is kept of each layer that is updated, and the places of the images to compute; None: all images.

    Args:
        states: The layers with work left; all of them compute the same images.
        images: Today's images.
        is_unchanged: Whether an image still has this fault.

    Raises:
        BadValueError: The list of the finished files' images is missing, or does not belong to them.
    """
    updated = {layer: state for layer, state in states.items() if state.old}
    finished = {layer: _compare(state, images, is_unchanged) for layer, state in updated.items()}
    if not updated or len(updated) < len(states):  # a layer without files needs all rows, others may keep theirs
        return finished, np.arange(len(images)) if updated else None
    found, places = _take_over_all(finished, updated, images, slice(-1))
    some = images.some(places)
    if any(_interrupted(state)[-1:] != [Update(state, some, places).digest] for state in updated.values()):
        found, places = _take_over_all(finished, updated, images, slice(None))
    return found, places  # the last interrupted update is continued if it is of the same images


def _take_over_all(
    finished: dict[str, Kept], states: Mapping[str, LayerState], images: Any, which: slice
) -> tuple[dict[str, Kept], Ints]:
    found = {
        layer: _take_over(kept, states[layer], images, _interrupted(states[layer])[which])
        for layer, kept in finished.items()
    }
    return found, np.flatnonzero(np.any([kept.rows == COMPUTE for kept in found.values()], axis=0))


def _interrupted(state: LayerState) -> list[str]:
    """Return the digests of the updates that were interrupted since a layer was finished, if their rows can be used."""
    run = records.read_run(state.folder / UPDATE / "run.json") or {}
    is_same = run.get("identity") == json.loads(json.dumps(state.identity)) and run.get("readers") == state.readers.now
    return list(run.get("updates", [])) if is_same else []


def _list_name(digest: str) -> str:
    return f"list-{digest[:16]}.gz"


def _take_over(kept: Kept, state: LayerState, images: Any, digests: Sequence[str]) -> Kept:
    """Return what is kept together with rows that interrupted updates computed of images that are still the same."""
    assert state.old is not None
    folder, rows, at = state.folder / UPDATE, kept.rows.copy(), state.old["rows"]
    placed, noted, size = list[Placed](), dict[str, Noted](), state.identity["batch_size"]
    places = np.flatnonzero(rows == COMPUTE) if digests else np.empty(0, np.int64)
    wanted = {images.names[place]: (place, images.sizes[place], images.stamps[place]) for place in places}
    for digest in digests:
        try:
            listed = records.read_inputs(folder / _list_name(digest))
        except (OSError, EOFError, ValueError, zlib.error):
            continue
        for number, one in sorted(journal.read_parts(folder, state.parts, digest, ()).items()):
            faults, before = {fault.path: fault for fault in one.entry.faults}, len(wanted)
            of_batch = listed[number * size : (number + 1) * size]
            with_row = [image for image in of_batch if image[0] not in faults or faults[image[0]].used]
            for row, (name, *about) in enumerate(with_row, at):
                place, *now = wanted.get(name, (COMPUTE,))
                if about == now and name not in faults:
                    del wanted[name]
                    rows[place] = row
                    noted |= {name: one.entry.noted[name]} if name in one.entry.noted else {}
            if len(wanted) < before:
                placed.append(one)
                at += one.entry.rows
    return kept._replace(rows=rows, placed=placed, noted=noted)


def _compare(state: LayerState, images: Any, is_unchanged: Callable[[Fault], bool]) -> Kept:
    assert state.old is not None
    state.check_formats(state.old, True)
    faults = {fault.path: fault for fault in read_errors(state.errors_path)}
    lost = {path for path, fault in faults.items() if not fault.used}
    try:
        before = records.read_inputs(state.inputs_path)
    except (OSError, EOFError, ValueError, zlib.error):
        before = []
    with_row = [image for image in before if image[0] not in lost]
    if len(before) != state.old["inputs"]["images"] or len(with_row) != state.old["rows"]:
        raise BadValueError(
            f"{state.inputs_path}: does not list the images of {state.record_path.name}, so that no row can be kept.\n"
            f"{START_OVER}"
        )
    rows = {name: (row, size, stamp) for row, (name, size, stamp) in enumerate(with_row)}
    rows |= {name: (LOST, size, stamp) for name, size, stamp in before if name in lost}
    found, still = np.full(len(images), COMPUTE, np.int64), list[Fault]()
    kept = 0
    for place, (name, *now) in enumerate(zip(images.names, images.sizes, images.stamps, strict=True)):
        row, *then = rows.get(name, (COMPUTE, None, None))
        kept += row != COMPUTE
        if then != now:
            continue
        if (fault := faults.get(name)) is not None:
            if not is_unchanged(fault):
                continue
            still.append(fault)
        found[place] = row
    return Kept(found, still, len(before) - kept, [], {})


def _count_anew(
    record: Json,
    old: Json,
    before: dict[str, Noted],
    computed: dict[str, Noted],
    names: Sequence[str],
    rows: Ints,
) -> dict[str, Noted]:
    """Set a record's counts and remarks, and return what is noted of its images, in their order.

    Rows that an earlier featx wrote have counts, but nothing noted of single images: they are counted until the end.

    Args:
        record: The new record.
        old: The record before.
        before: What was noted of its images.
        computed: What is noted of the images of the update's batches.
        names: The images.
        rows: The kept row of each, as ``Kept`` has it.
    """
    noted, kept = {}, set[str]()
    for name, row in zip(names, rows, strict=True):
        if 0 <= row < old["rows"] and name in before:
            noted[name] = before[name]
            kept.add(name)
        elif (row == COMPUTE or row >= old["rows"]) and name in computed:
            noted[name] = computed[name]
    changes = [(values, -1) for name, values in before.items() if name not in kept]
    changes += [(values, 1) for name, values in noted.items() if name not in kept]
    for at, key in enumerate(("values_not_finite", "values_overflowed")):
        record[key] = old.get(key, 0) + sum(sign * values[at] for values, sign in changes)
    record["rows_not_finite"] = old["rows_not_finite"] + sum(sign * bool(values[0]) for values, sign in changes)
    remarks: Remarks = old.get("remarks", {})
    record["remarks"] = {}
    for kind in sorted(remarks.keys() | {kind for values in noted.values() for kind in values[2:]}):
        first = next((name for name, values in noted.items() if kind in values[2:]), None)
        images = remarks[kind]["images"] if kind in remarks else 0
        images += sum(sign for values, sign in changes if kind in values[2:])
        if images > 0:
            record["remarks"][kind] = {"images": images, "first": first or remarks[kind]["first"]}
    return noted


def _first_generation(old: Json) -> Json:
    return {"date": old["run"].get("started"), "images": old["inputs"]["images"], "device": _devices(old)}


def _devices(record: Json) -> str:
    return ", ".join(record["run"].get("batches_by_device", {}))


def _files_of(old: Json, suffix: str) -> dict[str, int]:
    """Return the number of rows in each of the old files of one format, in order."""
    names = sorted(name for name in old["files"] if name.endswith(f".{suffix}"))
    return {name: old["files"][name].get("rows", old["rows"]) for name in names}


def _same_shard(whole: LayerState, shard: Shard, wanted: Ints) -> Json:
    """Return what is recorded of a shard's files if it has the same rows and images as before, else nothing."""
    old, names = whole.old, [whole.key(path) for path in shard.results.values()]
    assert old is not None
    counts = _files_of(old, next(iter(shard.results)))
    if not old["files"].keys() >= set(names):
        return {}
    place, total = list(counts).index(names[0]), old["inputs"]["images"]
    first = sum(list(counts.values())[:place])
    size = old["identity"]["shard_rows"] or total
    same_images = len(shard.images) == min(size, total - place * size)
    if not same_images or not np.array_equal(wanted, np.arange(first, first + counts[names[0]])):
        return {}
    return {name: old["files"][name] for name in names}


def complete(state: LayerState) -> None:
    """Give the files of an update that is complete their names, if there is one, and remove what only it needs.

    It may be killed at any line, and is then called again: a file that is not hidden any more has its name already.
    """
    folder = state.folder / UPDATE
    if (record := records.read_record(folder / COMPLETE, state.layer)) is None:
        return
    about = record.pop("update")
    if _digest(state.read_record() or {}) not in (about["before"], _digest(record)):
        disk.remove(folder / COMPLETE)  # a job that was stopped woke up after another had finished
        return
    stem, gone = about["stem"], [name for name in about["gone"] if records.is_result_name(state.layer, name)]
    disk.replace(state.record_path, records.as_json(record), folder / f"{stem}.json")
    if record["identity"]["shard_rows"] is not None:
        with disk.reporting(state.shards_folder):
            state.shards_folder.mkdir(exist_ok=True)
    for name in record["files"]:
        _move(folder / _hidden(state, name, stem), state.out_dir / name)
    _move(folder / f"{stem}.gz", state.inputs_path)
    if record["errors"] + record["errors_used"]:
        _move(folder / f"{stem}.errors.csv", state.errors_path)
    else:
        disk.remove(state.errors_path)
    for name in gone:
        disk.remove(state.out_dir / name)
    state.clear(keep={state.inputs_path})  # journals of batches that are no longer in the files
    state.remove_update()


def _digest(record: Json) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _hidden(state: LayerState, name: str, stem: str) -> str:
    """Return the name that a result has until its update is complete: ``joined-00001.csv`` for ``fc7/00001.csv``."""
    return stem + name.removeprefix(state.shards_folder.name).replace("/", "-")


def _move(hidden: Path, path: Path) -> None:
    if hidden.exists():
        disk.rename(hidden, path)


def _old_files(state: Update, format: FileFormat, stem: str) -> list[Path]:
    """Return the old files with the rows of a part's format, made from those of another format if there are none."""
    old = state.whole.old
    assert old is not None
    if counts := _files_of(old, format.part):
        return [state.out_dir / name for name in counts]
    found = []
    for name, rows in _files_of(old, format.suffixes[0]).items():
        hidden = _hidden(state, name, stem.replace("joined", "rows"))
        path = (state.folder / hidden).with_suffix(f".{format.part}")
        file = disk.open_to_write(path)
        try:
            disk.write(file, path, format.head(rows))
            for _, values in format.read(state.out_dir / name, True):
                disk.write(file, path, values.tobytes())
        finally:
            disk.close(file, path)
        found.append(path)
    return found


class _Table:
    """Where each row is in one format: the kept rows first, as they are numbered, then the computed ones."""

    def __init__(self, state: Update, format: FileFormat, placed: Sequence[Placed], stem: str) -> None:
        self.format = format
        self.files: list[Path] = []
        ends: list[Ints] = []
        head = len(format.head(0))
        for path in _old_files(state, format, stem):
            self._add(path, head, path.stat().st_size, ends)
        for entry, files in placed:
            start, end, _ = entry.spans[format.part]
            self._add(files[format.part], start, end, ends)
        counts = [len(found) - 1 for found in ends]
        self._file = np.repeat(np.arange(len(self.files)), counts)
        self._start = np.concatenate([found[:-1] for found in ends]) if ends else np.empty(0, np.int64)
        self._end = np.concatenate([found[1:] for found in ends]) if ends else np.empty(0, np.int64)

    def _add(self, path: Path, start: int, end: int, ends: list[Ints]) -> None:
        self.files.append(path)
        ends.append(self.format.ends(path, start, end))

    def write(self, rows: Ints, path: Path) -> Path:
        """Write a file of these rows and return its path."""
        file = disk.open_to_write(path)
        try:
            disk.write(file, path, self.format.head(len(rows)))
            for source, start, end in self._pieces(rows):
                disk.append_range(file, path, source, start, end)
            disk.sync(file, path)
        finally:
            disk.close(file, path)
        return path

    def _pieces(self, rows: Ints) -> list[Piece]:
        """Return the bytes of rows, adjacent ones as one piece."""
        file, start, end = self._file[rows], self._start[rows], self._end[rows]
        begins = np.flatnonzero(np.r_[True, (file[1:] != file[:-1]) | (start[1:] != end[:-1])][: len(rows)])
        stops = np.r_[begins[1:], len(rows)] - 1
        return [
            (self.files[file[first]], int(start[first]), int(end[last]))
            for first, last in zip(begins, stops, strict=True)
            if len(rows)
        ]
