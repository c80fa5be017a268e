"""``featx status``: how far the run in an output folder is, read from its journals."""

import argparse
import json
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from featx.errors import MissingPathError, UserError, count
from featx.writer import disk, journal, records, shares
from featx.writer.folder import HIDDEN, UPDATE, file_name
from featx.writer.records import Json


class _Parser(argparse.ArgumentParser):
    """PlainParser, without the import of Lightning that its module needs."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.\n{self.prog} --help lists the options.")


def status(argv: list[str]) -> int:
    """Run ``featx status OUT_DIR [--json]``; it changes nothing and needs no torch."""
    parser = _Parser("featx status", description="Show how far the run in an output folder is.", allow_abbrev=False)
    parser.add_argument("out_dir", metavar="OUT_DIR", help="the run's --writer.out_dir, such as features")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    options = parser.parse_args(argv)
    folder = Path(options.out_dir)
    found: Json = {"layers": {layer: _layer(folder, layer) for layer in _layers(folder)}}
    if not found["layers"]:
        raise MissingPathError(f"{folder}: no run of featx in it. Expected the --writer.out_dir of featx predict.")
    if jobs := shares.report(folder / HIDDEN):
        found["shares"] = jobs
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print(*(_line(layer, about) for layer, about in found["layers"].items()), *_lines(jobs), sep="\n")
    return 0


def _layers(folder: Path) -> list[str]:
    """Return the layers that are finished or begun in an output folder."""
    begun = {path.parent.name for path in folder.glob(f"{HIDDEN}/*/run.json")}
    kept = {path.parent.name for path in folder.glob(f"{HIDDEN}/*/images.gz")}
    return sorted(map(records.layer_of, begun | {stem for stem in kept if _path(folder, stem).exists()}))


def _path(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.json"


def _layer(folder: Path, layer: str) -> Json:
    """Return the counts of a layer: of its record or, while its run is unfinished, of its journals."""
    hidden = folder / HIDDEN / file_name(layer)
    if update := (hidden / UPDATE / "run.json").exists() and not (hidden / "run.json").exists():
        hidden /= UPDATE
    if (run := records.read_run(hidden / "run.json")) is None:
        record = records.read_record(_path(folder, file_name(layer)), layer)
        assert record is not None, f"{layer}: no record"
        images = record["inputs"]["images"]
        return {"finished": True, "images": images, "done": images, "faults": record["errors"] + record["errors_used"]}
    total, size = int(run["inputs"]["images"]), int(run["identity"]["batch_size"])
    done, faults = set[int](), dict[int, int]()
    in_session, last, now = set[int](), 0.0, disk.now(hidden)
    begun = (hidden / "run.json").stat().st_mtime
    for path in journal.journals(hidden):
        entries = {entry.batch: len(entry.faults) for entry in journal.read(path)[1]}
        done, faults = done | entries.keys(), faults | entries
        if (written := path.stat().st_mtime) >= begun:
            in_session, last = in_session | entries.keys(), max(last, written)
    batches = -(-total // size)

    def images_in(some: set[int]) -> int:
        return size * len(some) - (size * batches - total if batches - 1 in some else 0)

    rate = images_in(in_session) / (last - begun) if last > begun else None
    return {
        "finished": False,
        "update": update,
        "images": total,
        "done": images_in(done),
        "faults": sum(faults.values()),
        "images_per_second": rate and round(rate, 1),
        "seconds_left": round((total - images_in(done)) / rate) if rate else None,
        "seconds_since_last_rows": round(max(0.0, now - last)) if last else None,
    }


def _lines(jobs: Json | None) -> list[str]:
    """Return the shares of jobs as lines of text."""
    if not jobs:
        return []
    lines = [
        f"shares: {jobs['done']:,} of {jobs['of']:,} done, {len(jobs['in_work']):,} in work, {jobs['left']:,} left"
    ]
    for one in jobs["in_work"]:
        where = f"[{one['share']}/{jobs['of']}] process {one['process']} on {one['host']}"
        lines.append(f"{where}: {one['images_per_second']} images/s, heartbeat {one['heartbeat_seconds_ago']} s ago")
    return lines


def _line(layer: str, about: dict[str, Any]) -> str:
    """Return a layer's counts as a line of text."""
    faults = f", {count(about['faults'], 'fault')}" if about["faults"] else ""
    if about["finished"]:
        return f"{layer}: finished, {count(about['images'], 'image')}{faults}"
    line = f"{layer}: {about['done']:,} of {count(about['images'], 'image')}"
    line += f"{' of an update' if about['update'] else ''}{faults}"
    if about["images_per_second"]:
        left = timedelta(seconds=about["seconds_left"])
        since = timedelta(seconds=about["seconds_since_last_rows"])
        line += f", {about['images_per_second']:,} images/s, {left} left, last rows {since} ago"
    return line
