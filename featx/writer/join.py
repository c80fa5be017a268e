"""Parts -> a layer's final files, beside their record and the list of errors."""

import os
from collections import Counter
from pathlib import Path

from featx.data.batch import Fault, add_up
from featx.writer import disk, journal, records
from featx.writer.folder import LayerState, Shard, errors_csv
from featx.writer.journal import Entry, Head, Placed
from featx.writer.records import Json


def finish(state: LayerState, done: dict[int, Placed], known: dict[Path, str], about: Json) -> Json:
    """Join the parts to the final files, and return their record.

    The record comes before the files get their names, so that no file of featx's is ever without one: a run that
    ends in between is unfinished, and the next one joins again.

    Args:
        state: The layer's.
        done: All batches.
        known: SHA-256 of parts as they are.
        about: What the record says besides.
    """
    placed = [done[number] for number in sorted(done)]
    entries = [one.entry for one in placed]
    faults, lost, rows = _count(placed)
    assert [entry.batch for entry in entries] == list(range(len(entries))), f"{state.layer}: batches are missing"
    assert rows + lost == len(state.images), f"{state.layer}: {rows} rows, {lost} errors, {len(state.images)} images"
    files: Json = {}
    # Formats that an earlier run wrote stay, if they say the same.
    if old := state.read_record():
        same = old["inputs"] == state.inputs and (old["errors"], old["rows"]) == (lost, rows)
        mine = set(map(state.key, state.results))
        for name, said in old["files"].items():
            if same:
                files[name] = said
            elif name not in mine:
                disk.remove(state.record_path.parent / name)
    joined: dict[Path, Path] = {}
    for shard in state.shards:
        some = placed[shard.batches]
        joined |= _join(state, shard, some, known)
        said = {"rows": _count(some)[2]} if state.sharded else {}
        for target in shard.results.values():
            path = joined[target]
            sha256, size = known.get(path) or journal.digest(path), path.stat().st_size
            files[state.key(target)] = {"sha256": sha256, "bytes": size} | said
    record = {
        "format": journal.FORMAT,
        "layer": state.layer,
        "files": files,
        "rows": rows,
        "columns": state.columns,
        "errors": lost,
        "errors_used": len(faults) - lost,
        "rows_not_finite": sum(entry.odd[0] for entry in entries),
        "values_not_finite": sum(entry.odd[1] for entry in entries),
        "values_overflowed": sum(entry.odd[2] for entry in entries),
        "remarks": add_up(entry.remarks for entry in entries),
        "inputs": state.inputs,
        "readers": state.readers_of(entries),
        "identity": state.identity,
        "run": {**about, "batches_by_device": Counter(entry.device for entry in entries)},
    }
    if faults:  # to repair single images, their neighbours' rows are taken from the finished files
        session = journal.next_session(state.folder)
        for shard in state.shards:
            _keep_journal(state, session, shard, entries[shard.batches])
        disk.replace(state.errors_path, errors_csv(faults))
    else:
        disk.remove(state.errors_path)
    disk.replace(state.record_path, records.as_json(record))
    if state.sharded:
        with disk.told(state.shards_folder):
            state.shards_folder.mkdir(exist_ok=True)
    for target, path in joined.items():
        disk.rename(path, target)
    state.tidy(keep_journal=bool(faults))
    return record


def _count(placed: list[Placed]) -> tuple[list[Fault], int, int]:
    """Return what is wrong with images of some batches, how many of these have no row, and how many rows there are."""
    faults = [fault for one in placed for fault in one.entry.faults]
    return faults, sum(not fault.used for fault in faults), sum(one.entry.rows for one in placed)


def _join(state: LayerState, shard: Shard, placed: list[Placed], known: dict[Path, str]) -> dict[Path, Path]:
    """Make a shard's files, and return where each is, ready to be renamed; ``known`` is left what is still true."""
    faults, lost, rows = _count(placed)
    fresh, joined = f"{state.folder / 'joined'}{shard.label}", {}
    for part, begun in state.heads(shard).items():
        head, target, ranges = state.parts[part].head(rows), shard.rows[part], journal.pieces(part, placed)
        path = joined[target] = journal.join(ranges, head, Path(f"{fresh}.{part}"), target)
        if head != begun or ranges != [(path, len(head), path.stat().st_size)]:
            known.pop(path, None)  # it is no longer as it was written
    decided = {"layer": state.layer, "rows": rows, "columns": state.columns, "errors": lost, "identity": state.identity}
    without = {fault.path for fault in faults if not fault.used}
    for format in state.formats:
        paths = (state.images.names[index] for index in shard.images)
        having = (path for path in paths if path not in without)
        made = format.finish(joined[shard.rows[format.part]], fresh, having, records.as_json(decided))
        joined |= {shard.results[suffix]: path for suffix, path in made.items()}
    return joined


def _keep_journal(state: LayerState, session: int, shard: Shard, entries: list[Entry]) -> None:
    """Write down where a shard's finished files have the rows of each batch."""
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
