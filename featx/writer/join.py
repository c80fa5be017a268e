"""Parts -> a layer's final files, their record and the list of errors."""

import os
from collections import Counter
from collections.abc import Set
from pathlib import Path

from featx.data.batch import Fault, add_up, report
from featx.errors import count, log
from featx.writer import disk, journal, records
from featx.writer.folder import LayerState, Shard, errors_csv
from featx.writer.journal import Entry, Head, Placed
from featx.writer.records import Json


def finish(
    state: LayerState,
    done: dict[int, Placed],
    known: dict[Path, str],
    run: Json,
    stem: str = "joined",
    copy: bool = False,
) -> Json:
    """Join the parts into the final files and return their record.

    The record is written before the files are renamed, so that no final file is ever without one. A run that is killed
    in between is unfinished, and the next one joins again.

    Args:
        state: The layer.
        done: All batches, by number.
        known: SHA-256 of the parts as written.
        run: The record's ``run``.
        stem: Prefix of new files, if other jobs may join at the same time.
        copy: Whether all rows are copied to new files, since a job may still write to its part.
    """
    placed = [done[number] for number in sorted(done)]
    entries = [one.entry for one in placed]
    faults, lost, rows = _count(placed)
    assert [entry.batch for entry in entries] == list(range(len(entries))), f"{state.layer}: batches are missing"
    assert rows + lost == len(state.images), f"{state.layer}: {rows} rows, {lost} errors, {len(state.images)} images"
    files: Json = {}
    # Formats that an earlier run wrote stay if their rows are the same.
    if old := state.read_record():
        same = old["inputs"] == state.inputs and (old["errors"], old["rows"]) == (lost, rows)
        own = set(map(state.key, state.results))
        for name, recorded in old["files"].items():
            if same:
                files[name] = recorded
            elif name not in own:
                disk.remove(state.record_path.parent / name)
    joined: dict[Path, Path] = {}
    for shard in state.shards:
        in_shard = placed[shard.batches]
        joined |= _join(state, shard, in_shard, known, f"{state.folder / stem}{shard.label}", copy)
        rows_of_shard = {"rows": _count(in_shard)[2]} if state.sharded else {}
        for target in shard.results.values():
            path = joined[target]
            sha256, size = known.get(path) or journal.digest(path), path.stat().st_size
            files[state.key(target)] = {"sha256": sha256, "bytes": size} | rows_of_shard
    record = record_of(state, files, rows, faults, entries, run)
    if noted := {name: values for entry in entries for name, values in entry.noted.items()}:
        records.save_inputs(state.inputs_path, state.images, noted, state.folder / f"{stem}.gz")
    if faults:  # when these images are repaired, all other rows are copied from the finished files
        session = journal.next_session(state.folder)
        for shard in state.shards:
            _keep_journal(state, session, shard, entries[shard.batches])
        disk.replace(state.errors_path, errors_csv(faults), state.folder / f"{stem}.errors.csv")
    else:
        disk.remove(state.errors_path)
    disk.replace(state.record_path, records.as_json(record), state.folder / f"{stem}.json")
    if state.sharded:
        with disk.reporting(state.shards_folder):
            state.shards_folder.mkdir(exist_ok=True)
    for target, path in joined.items():
        disk.rename(path, target)
    state.clean_up(keep_journal=bool(faults))
    return record


def warn_of_values(record: Json) -> None:
    """Warn of values in a layer's files that are not finite, and of images that look wrong in it."""
    layer = record["layer"]
    if overflowed := record["values_overflowed"]:
        log.warning("%s: %s too large for float16 became infinite: --writer.dtype float32 keeps them",
                    layer, count(overflowed, "value"))  # fmt: skip
    if record["values_not_finite"]:
        values, rows = count(record["values_not_finite"], "value"), count(record["rows_not_finite"], "row")
        log.warning("%s: %s nan or infinite, in %s", layer, values, rows)
    report(record["remarks"], layer)


def record_of(state: LayerState, files: Json, rows: int, faults: list[Fault], entries: list[Entry], run: Json) -> Json:
    """Return a layer's record, for ``finish``; the entries are those that ``run`` has computed."""
    lost = sum(not fault.used for fault in faults)
    return {
        "format": journal.FORMAT,
        "layer": state.layer,
        "files": files,
        "rows": rows,
        "columns": state.columns,
        "errors": lost,
        "errors_used": len(faults) - lost,
        "rows_not_finite": sum(entry.not_finite[0] for entry in entries),
        "values_not_finite": sum(entry.not_finite[1] for entry in entries),
        "values_overflowed": sum(entry.not_finite[2] for entry in entries),
        "remarks": add_up(entry.remarks for entry in entries),
        "inputs": state.inputs,
        "readers": state.readers.of(entries),
        "identity": state.identity,
        "run": {**run, "batches_by_device": Counter(entry.device for entry in entries)},
    }


def _count(placed: list[Placed]) -> tuple[list[Fault], int, int]:
    """Return the faults in some batches, the number of images without a row, and the number of rows."""
    faults = [fault for one in placed for fault in one.entry.faults]
    return faults, sum(not fault.used for fault in faults), sum(one.entry.rows for one in placed)


def _join(
    state: LayerState, shard: Shard, placed: list[Placed], known: dict[Path, str], fresh: str, copy: bool
) -> dict[Path, Path]:
    """Write a shard's files, and return their paths by final path; outdated digests are removed from ``known``."""
    faults, _, rows = _count(placed)
    joined: dict[Path, Path] = {}
    for part, written in state.heads(shard).items():
        head, target, ranges = state.parts[part].head(rows), shard.rows[part], journal.pieces(part, placed)
        path = joined[target] = journal.join(ranges, head, Path(f"{fresh}.{part}"), target, copy)
        if head != written or ranges != [(path, len(head), path.stat().st_size)]:
            known.pop(path, None)
    make_files(state, shard, joined, fresh, {fault.path for fault in faults if not fault.used}, rows)
    return joined


def make_files(
    state: LayerState, shard: Shard, joined: dict[Path, Path], fresh: str, without: Set[str], rows: int
) -> None:
    """Make a shard's other files from its joined rows, and add them to ``joined``, which has paths by final path."""
    about = {"layer": state.layer, "rows": rows, "columns": state.columns, "errors": len(shard.images) - rows,
             "identity": state.identity}  # fmt: skip
    for format in state.formats:
        names = (state.images.names[index] for index in shard.images)
        paths = (path for path in names if path not in without)
        made = format.finish(joined[shard.rows[format.part]], fresh, paths, records.as_json(about))
        joined |= {shard.results[suffix]: path for suffix, path in made.items()}


def _keep_journal(state: LayerState, session: int, shard: Shard, entries: list[Entry]) -> None:
    """Write a journal of a shard's finished files."""
    ends, moved = {part: len(head) for part, head in state.heads(shard).items()}, []
    for entry in entries:
        spans = {}
        for part in ends:
            start, end, crc = entry.spans[part]
            spans[part] = (ends[part], ends[part] + end - start, crc)
            ends[part] = spans[part][1]
        moved.append(entry._replace(spans=spans))
    names = [os.path.relpath(path, state.folder) for path in shard.rows.values()]
    disk.replace(state.folder / f"{session:06}{shard.label}.journal", journal.encode(Head(names, state.digest), moved))
