"""What ``make bench`` runs: featx and other ways to do its job, then stage costs, memory, listing and start.

Everything that is timed is a process of its own on the same photographs, on the CPU, interleaved with the others, so
that what disturbs the machine disturbs all of them. ``--quick`` shows in a minute that it works; only the whole run's
figures, on a machine with nothing else to do, say something.
"""

import argparse
import csv
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parent.parent
JOBS = REPO / "tests" / "bench_jobs.py"
ENV = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
COMPARED = 200  # rows that are compared between the ways
ORIGINAL = "the original's loop"

UNSYNCED = "featx, journal at its end only"

Way = tuple[str, list[str]] | str  # a job and featx's options, or the reason why it is not run here


class Ended(NamedTuple):
    """A process that did its job: seconds from its start to its end, its own peak memory in MiB, what it found."""

    seconds: float
    peak: float
    found: Any


class Rounds(NamedTuple):
    """What the rounds found, each in a list.

    Attributes:
        ended: The processes of each way.
        differences: Of each way, the largest relative difference of a row from the original's.
        steady: featx's images/s between two counts of images.
        prices: ms per image of each stage.
    """

    ended: dict[str, list[Ended]]
    differences: dict[str, float]
    steady: list[float]
    prices: list[dict[str, float]]


def main(options: argparse.Namespace) -> None:
    """Run everything in the scratch folder, which is emptied before and removed after, and print the table."""
    scratch = options.scratch.resolve()
    if scratch.exists():
        if any(scratch.iterdir()) and not (scratch / "output.txt").exists():
            sys.exit(f"bench: {options.scratch} has other files in it, expected a folder to make and remove")
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True)
    tell("making photographs and weights")
    own = str(options.photos.resolve()) if options.photos else ""
    made = run(scratch, "prepare", own, scratch / "pool", options.images, scratch / "alexnet.pth").found
    pool = sorted((scratch / "pool").iterdir())
    if len(pool) < 8:  # a file system has a limit on links to one file
        sys.exit(f"bench: --photos {options.photos}: {len(pool)} JPEG or PNG files in it, expected at least 8")
    lines = []
    for line in tables(scratch, options, pool, **made):
        lines.append(line.rstrip())
        print(lines[-1], flush=True)
    if options.keep:
        options.keep.parent.mkdir(parents=True, exist_ok=True)
        options.keep.write_text("# What `make bench` printed\n\n```text\n" + "\n".join(lines) + "\n```\n")
    shutil.rmtree(scratch)


def tables(scratch: Path, options: argparse.Namespace, pool: list[Path], cores: int, batch: int) -> Iterator[str]:
    """Yield the lines of all that is printed, as they come."""
    yield from head(options, cores, batch, pool)
    ways = known_ways(cores)
    found = run_rounds(scratch, options, pool, ways)
    yield from whole_processes(options, ways, found)
    yield from limit(options, found, cores)
    yield from memory(scratch, options, pool)
    yield from listing(scratch, options, pool)
    yield from start(2 + options.repeat)


def head(options: argparse.Namespace, cores: int, batch: int, pool: list[Path]) -> Iterator[str]:
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    packages = ("torch", "torchvision", "lightning", "numpy", "pillow", "simplejpeg", "orjson", "pandas", "timm")
    size = sum(path.stat().st_size for path in pool) / len(pool) / 1024
    kind = "of the user's" if options.photos else "cut from scikit-image's, median 500x375"
    for line in (
        f"featx {installed('featx')}, {date.today()}; {cpu}, {cores} cores usable, load {os.getloadavg()[0]:.1f} at "
        f"the start; {platform.system()} {platform.release()}, Python {platform.python_version()}",
        ", ".join(f"{package} {installed(package)}" for package in packages if installed(package)),
        f"{options.images:,} photographs {kind}, {size:.0f} KiB each ({len(pool):,} different); AlexNet, random "
        f"weights, fc7, batches of {batch}, resize 256, crop 224, float32, on the CPU",
        "median (least-greatest) of each measurement",
        *(["A QUICK RUN: IT SHOWS THAT THE BENCH WORKS, ITS FIGURES MEAN NOTHING."] if options.quick else []),
    ):
        yield textwrap.fill(line, 80)


def known_ways(cores: int) -> dict[str, Way]:
    """Return the ways to get the rows: the job of each, or the reason why it is not run here."""
    command = [sys.executable, "-m", "featx", "predict", "--help"]
    options = subprocess.run(command, env=ENV, capture_output=True, check=True, text=True).stdout
    no_pandas = "" if installed("pandas") else "not run: pandas is not installed"
    no_timm = no_pandas or ("" if installed("timm") else "not run: timm is not installed")
    ways: dict[str, Way] = {ORIGINAL: ("original", [])}
    ways[f"DataLoader, {cores} workers, pandas"] = no_pandas or ("dataloader", [])
    ways["timm's loader, pandas"] = no_timm or ("timm", [])
    ways["thingsvision 2.7.3"] = "not run: it installs only with torchvision 0.15.2"
    ways["featx"] = ("featx", [])
    if "--data.decoder" in options:
        ways["featx, decoder turbo"] = ("featx", ["--data.decoder", "turbo"])
    ways[UNSYNCED] = ("unsynced", [])
    return ways


def run_rounds(scratch: Path, options: argparse.Namespace, pool: list[Path], ways: dict[str, Way]) -> Rounds:
    """Run all ways in turn, and the stages after them, as often as asked; compare the first round's rows."""
    weights, out = scratch / "alexnet.pth", scratch / "out"
    images = plant(scratch / "images", pool, options.images, 10)
    fewer = plant(scratch / "fewer", pool, options.counts[1], 10)
    ended: dict[str, list[Ended]] = {name: [] for name, way in ways.items() if not isinstance(way, str)}
    found = Rounds(ended, {}, [], [])
    run(scratch, "featx", fewer, weights, out / "warm-up")
    for turn in range(options.repeat):
        shutil.rmtree(out)
        out.mkdir()
        for name in ended:
            tell(f"round {turn + 1} of {options.repeat}: {name}")
            job, extra = ways[name]
            ended[name].append(run(scratch, job, images, weights, out / name, *extra))
            if turn == 0:
                files = [out / way / "fc7.csv" for way in (ORIGINAL, name)]
                found.differences[name] = difference(*files, options.images)
        seconds = run(scratch, "featx", fewer, weights, out / "fewer").seconds
        found.steady.append((options.images - options.counts[1]) / (ended["featx"][-1].seconds - seconds))
        found.prices.append(run(scratch, "stages", images, weights, min(256, options.images)).found)
    shutil.rmtree(out)
    return found


def whole_processes(options: argparse.Namespace, ways: dict[str, Way], found: Rounds) -> Iterator[str]:
    yield f"\nWhole process, {options.images:,} images to fc7.csv, {options.repeat} of each, interleaved"
    yield f"{'':<30}{'seconds':>20}{'images/s':>9}{'times':>6}{'MiB':>7}{'rows':>7}"
    seconds = {name: [end.seconds for end in ends] for name, ends in found.ended.items()}
    for name, way in ways.items():
        if isinstance(way, str):
            yield f"{name:<30} {way}"
            continue
        middle, peak = median(seconds[name]), median(end.peak for end in found.ended[name])
        rate, times = options.images / middle, median(seconds[ORIGINAL]) / middle
        rows = f"{found.differences[name]:.0e}" if name != ORIGINAL else "-"
        yield f"{name:<30}{spread(seconds[name]):>20}{rate:>9.1f}{times:>6.2f}{peak:>7,.0f}{rows:>7}"
    yield "times: as fast as the original's loop; MiB: peak of the main process;"
    yield f"rows: largest relative difference (L2) from the original's among {COMPARED}"
    if {"featx", UNSYNCED} <= seconds.keys():
        pairs = zip(seconds["featx"], seconds[UNSYNCED], strict=True)
        yield f"journal and sync: {spread([100 * (with_it / without - 1) for with_it, without in pairs])}% of the run"


def limit(options: argparse.Namespace, found: Rounds, cores: int) -> Iterator[str]:
    """Yield the stage costs, what the cores could do at them, and how much of that featx does."""
    yield f"\nStage costs, CPU time of one thread, {options.repeat} of each, between the runs above"
    for name in found.prices[0]:
        yield f"{name:<42}{spread([prices[name] for prices in found.prices], 2):>25} ms per image"
    dearer = [max(price for name, price in each.items() if name.startswith("network")) for each in found.prices]
    sums = [sum(each.values()) - network for each, network in zip(found.prices, dearer, strict=True)]
    limits = [cores * 1000 / each for each in sums]
    shares = [100 * rate / most for rate, most in zip(found.steady, limits, strict=True)]
    yield f"{'sum, with the cheaper network':<42}{spread(sums, 2):>25} ms per image"
    yield f"{f'limit: {cores} cores over the sum':<42}{spread(limits):>25} images/s"
    between = f"featx, steady: {options.counts[1]:,} to {options.images:,} images"
    yield f"{between:<42}{spread(found.steady):>25} images/s"
    yield f"{'its share of the limit':<42}{spread(shares):>25}%"


def memory(scratch: Path, options: argparse.Namespace, pool: list[Path]) -> Iterator[str]:
    yield "\nPeak memory of featx's main process, MiB; more: KiB more per image"
    yield f"{'':<14}{'whole run':>18}{'more':>10}{'after first batch':>22}{'more':>10}"
    last: tuple[int, list[float]] | None = None
    for count in options.counts:
        tell(f"memory at {count:,} images")
        tree, out = plant(scratch / f"memory-{count}", pool, count, 10), scratch / f"memory-out-{count}"
        peaks = run(scratch, "memory", tree, scratch / "alexnet.pth", out).found
        shutil.rmtree(out)
        apart = ["", ""]
        if last:
            more = [(peak - before) * 1024 for peak, before in zip(peaks, last[1], strict=True)]
            apart = [f"{kib / (count - last[0]):.2f}" for kib in more]
        yield f"{count:>7,} images{peaks[0]:>18,.1f}{apart[0]:>10}{peaks[1]:>22,.1f}{apart[1]:>10}"
        last = count, peaks


def listing(scratch: Path, options: argparse.Namespace, pool: list[Path]) -> Iterator[str]:
    """Yield what a long listing costs: time to the first batch, and peak memory until then."""
    sizes = {64: 8, options.listed: 200}
    trees = {count: plant(scratch / f"listed-{count}", pool, count, folders) for count, folders in sizes.items()}
    ended: dict[int, list[Ended]] = {count: [] for count in sizes}
    for turn in range(options.repeat):
        for count, tree in trees.items():
            tell(f"round {turn + 1} of {options.repeat}: first row of {count:,} files")
            out, report = scratch / f"listed-out-{count}-{turn}", scratch / "report.json"
            ended[count].append(run(scratch, "first_row", tree, scratch / "alexnet.pth", out, report))
    yield f"\nFrom the start until the writer has the first batch, {options.repeat} of each, interleaved"
    for count, ends in ended.items():
        seconds, peaks = spread([end.seconds for end in ends]), spread([end.peak for end in ends])
        yield f"{count:>7,} files, {sizes[count]:>3} folders{seconds:>18} s{peaks:>28} MiB"
    few, many = ended.values()
    later = median(end.seconds for end in many) - median(end.seconds for end in few)
    more = median(end.peak for end in many) - median(end.peak for end in few)
    yield f"   difference: {later:.1f} s, {more * 1048576 / (options.listed - 64):.0f} bytes per image"


def start(times: int) -> Iterator[str]:
    """Yield the time of ``featx --help`` and of ``import torch``."""
    commands = {"featx --help": ["-m", "featx", "--help"], "import torch": ["-c", "import torch"]}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(times):
        for name, command in commands.items():
            begin = time.monotonic()
            subprocess.run([sys.executable, *command], env=ENV, stdout=subprocess.DEVNULL, check=True)
            seconds[name].append(time.monotonic() - begin)
    yield f"\nStart, {times} of each, interleaved"
    for name, each in seconds.items():
        yield f"{name:<30}{spread(each, 2):>21} s"
    helped, imported = (median(each) for each in seconds.values())
    yield f"   help takes {helped / imported:.2f} of the import"


def run(scratch: Path, job: str, *args: Any) -> Ended:
    """Run a job as a process, to its end; a child's peak counts from its parent's, so this one imports nothing big."""
    report, output = scratch / "report.json", scratch / "output.txt"
    command = [sys.executable, str(JOBS), json.dumps([job, str(report), *args], default=str)]
    os.sync()  # so that this one does not wait for what others have written
    with output.open("wb") as log:
        begin = time.monotonic()
        process = subprocess.Popen(command, cwd=scratch, env=ENV, stdout=log, stderr=log, start_new_session=True)
        try:
            status = process.wait()
            seconds = time.monotonic() - begin
        finally:
            with suppress(ProcessLookupError):  # workers that outlive it would disturb the next one
                os.killpg(process.pid, signal.SIGKILL)
    if status:
        sys.exit(f"bench: {job} ended with status {status}:\n{output.read_text()[-2000:]}")
    return Ended(seconds, **json.loads(report.read_text()))


def plant(root: Path, pool: list[Path], images: int, folders: int) -> Path:
    """Make a tree of hard links to the pool's files, as many in each folder."""
    for folder in range(folders):
        (root / f"class-{folder:03}").mkdir(parents=True)
    for i in range(images):
        source = pool[i % len(pool)]
        os.link(source, root / f"class-{i * folders // images:03}" / f"photo-{i:06}{source.suffix}")
    return root


def difference(expected: Path, found: Path, images: int) -> float:
    """Return the largest relative difference of the first rows, once both files have one row per image."""
    rows = []
    for path in (expected, found):
        with path.open(newline="") as file:
            reader = csv.reader(file)
            rows.append({name: [float(value) for value in values] for name, *values in islice(reader, COMPARED)})
            count = len(rows[-1]) + sum(1 for _ in file)
        if count != images:
            sys.exit(f"bench: {path} has {count} rows for {images} images")
    if rows[0].keys() != rows[1].keys():
        sys.exit(f"bench: {found} names other images than {expected}")
    return max(math.dist(row, rows[1][name]) / math.hypot(*row) for name, row in rows[0].items())


def spread(values: list[float], digits: int = 1) -> str:
    """Return the median, with the least and the greatest in brackets."""
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def installed(package: str) -> str:
    """Return the version of a package, or nothing."""
    with suppress(PackageNotFoundError):
        return version(package)
    return ""


def tell(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="folder to work in, emptied before and removed after")
    parser.add_argument("--images", type=int, help="how many (3000)")
    parser.add_argument("--repeat", type=int, help="how often each is measured (3)")
    parser.add_argument("--photos", type=Path, help="folder of JPEG or PNG files to use instead of generated ones")
    parser.add_argument("--keep", type=Path, help="file for the table, as docs/bench.md")
    parser.add_argument("--quick", action="store_true", help="few images, once: checks that it works")
    options = parser.parse_args(argv)
    if options.quick and options.keep:
        parser.error("--quick --keep: a quick run's figures mean nothing")
    options.counts = (32, 96) if options.quick else (128, 1000, 10000)
    options.listed = 2000 if options.quick else 200000
    options.images = options.images or (192 if options.quick else 3000)
    options.repeat = options.repeat or (1 if options.quick else 3)
    if options.images < 2 * options.counts[1]:
        parser.error(f"--images {options.images}: expected at least {2 * options.counts[1]}")
    return options


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
