"""A job: what a FeatureWriter does with ``--data.shard``, from the list of images that all jobs share to the join."""

import hashlib
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx.data.batch import Fault
from featx.errors import BadValueError, count, log, name_job
from featx.writer import journal, records, shares
from featx.writer.disk import DiskError
from featx.writer.folder import UPDATE, LayerState
from featx.writer.records import Json
from featx.writer.shares import JOIN, PLAN, Shares

AUTO = "auto.json"  # how many shares there are, and the sessions before
States = Mapping[str, LayerState]


class Job:
    """One of several jobs that write one file.

    Args:
        hidden: The hidden folder of the output folder.
        shard: ``3/64`` or ``auto``.
        rank: This process's rank; with ``auto``, each takes shares of its own.
        progress: Returns what ``featx status`` shows of this job.

    Attributes:
        auto: Whether it takes shares until all are done.
        session: The number in the names of its parts; of rank 0 unless ``auto``.
        listed: Images of its shares without a row, in batches that it did not compute itself.
    """

    def __init__(self, hidden: Path, shard: str, rank: int, progress: Callable[[], Json]) -> None:
        self.hidden = hidden
        self.shares = Shares(hidden, shard, progress)
        self.auto = shard == "auto"
        self.session = self.listed = 0
        self._rank = rank
        self._device, self._same = "", False
        self._plan: Json | None = None
        self._before: tuple[int, ...] = ()  # sessions before the first job with auto
        self._taken: list[tuple[int, range]] = []  # not marked as done yet: shares and their batches
        self._take: Callable[[], Iterator[int]] = partial(iter, ())
        self._process, self._processes, self._parts = rank, 1, 0
        self._part_of: range | None = None  # the batches in the latest part
        self._missing: list[int] | None = None  # batches that the join did not find

    def enter(self, data: Any) -> None:
        """Use the list of images of the first job, or become that job; wait while another one makes the list."""
        if self._rank == 0 or self.auto:
            self.hidden.mkdir(parents=True, exist_ok=True)
            layers = [path for path in self.hidden.iterdir() if path.is_dir()]
            layers += [path / UPDATE for path in layers]
            self.shares.enter(max(map(journal.next_session, layers), default=1))
            self.session = self.shares.job
        name_job(f"{self.shares.own}/{self.shares.of}" if not self.auto else f"job {self.shares.job}")
        self._plan = self.shares.wait_for_plan() if self._rank == 0 else self.shares.read(PLAN)
        if self._plan is None or data.images is not None:
            return
        _compare("--data.files", self._plan["files"], _digest(data.files))
        try:
            data.restore(partial(records.read_inputs, self.shares.folder / self._plan["list"]))
        except FileNotFoundError:  # the run has just finished
            self._plan = None

    def agree(self, every: States, left: States, data: Any, formats: Sequence[str], device: str, same: bool) -> None:
        """Write the plan, if this job is the first, or compare it with this job's.

        Args:
            every: All layers.
            left: Those with work left.
            data: The data module.
            formats: Those of ``--writer.format``.
            device: What this job computes on.
            same: Whether all jobs must have the same kind of device.

        Raises:
            BadValueError: Another job's plan differs.
        """
        first: LayerState = next(iter(every.values()))
        if self._plan is None and self._rank == 0:
            for state in left.values():
                state.begin(shared=True)
            listed = f"images-{first.inputs['digest'][:16]}.gz"
            self.shares.publish(listed, records.encode_inputs(data.images))
            before = {layer: _digest(state.record_path) for layer, state in every.items()}
            plan: Json = {"format": journal.FORMAT, "layers": {layer: state.digest for layer, state in every.items()},
                    "formats": list(formats), "inputs": first.inputs, "files": _digest(data.files), "list": listed,
                    "device": device, "before": before}  # fmt: skip
            self.shares.publish(PLAN, records.as_json(plan))
        plan = self._plan = self._plan or self.shares.read(PLAN) or {}
        if not plan:  # the run has just finished
            return
        journal.check_format(self.shares.folder / PLAN, plan)
        _compare("--model.layer", sorted(plan["layers"]), sorted(every))
        _compare("--writer.format", sorted(plan["formats"]), sorted(formats))
        _compare("--data.dir", plan["inputs"], first.inputs, "other images")
        _compare("identity", plan["layers"], {layer: state.digest for layer, state in every.items()}, "differs")
        self._device, self._same = device, same
        check_device("the first job started", {plan["device"]} - {device}, device, same)

    def begin(
        self, states: States, data: Any, is_unchanged: Callable[[Fault], bool], seconds: float | None
    ) -> tuple[int, NDArray[np.int64]]:
        """Claim this job's share, waiting while another job has it; with ``auto``, see how many there are.

        Args:
            states: The layers with work left.
            data: The data module.
            is_unchanged: Whether an image still has its fault.
            seconds: That one batch takes, about; None: unknown.

        Returns:
            The session's number and the batches that are not on disk yet; none with ``auto``, see ``deal``.
        """
        total = -(-len(data.images) // data.batch_size)
        self._take = partial(iter, ())
        if not states or is_finished(states):
            return self.shares.job, np.arange(0)
        if self._missing is not None:
            return self.shares.job, np.array(self._missing, dtype=np.int64)
        if self.auto:
            self._divide(states, total, seconds)
            self._take = partial(self._take_all, states, total, is_unchanged)
        if self.auto or self._rank:
            return self.shares.job, np.arange(0)
        share, shares, noted = self.shares.own, self.shares, False
        while share not in (look := shares.look())[0] and not shares.gone and not shares.claim(shares.name(share)):
            if not noted:
                noted = True
                log.info(
                    "waiting: %s has this share", shares.holder(shares.name(share), look[1].get(shares.name(share), 1))
                )
            time.sleep(beat() / 10)
        if shares.gone:  # the run is finished
            return shares.job, np.arange(0)
        batches = shares.batches(share, total)
        self._taken = [(share, batches)]
        left = self._left(states, batches, is_unchanged, None)
        if len(left) < len(batches):
            log.info("continuing, %s of %s are done", f"{len(batches) - len(left):,}", count(len(batches), "batch"))
        return shares.job, np.array(left, dtype=np.int64)

    def _left(
        self, states: States, batches: range, is_unchanged: Callable[[Fault], bool], jobs: Sequence[int] | None
    ) -> list[int]:
        """Return those of some batches that are not on disk, after counting the images without a row in the others."""
        on_disk = set(batches)
        faults: dict[int, list[Fault]] = {}
        devices = set[str]()
        for state in states.values():
            placed = state.placed(only=batches, jobs=jobs)
            faults = {number: one.entry.faults for number, one in placed.items()}
            devices |= {one.entry.device for one in placed.values()}
            on_disk &= {number for number, found in faults.items() if all(map(is_unchanged, found))}
        check_device("this share was begun", devices - {self._device}, self._device, self._same)
        self.listed += sum(not fault.used for number in on_disk for fault in faults[number])
        return [number for number in batches if number not in on_disk]

    def is_undivided(self) -> bool:
        """Whether this is the first job with ``auto``, which decides how many shares there are."""
        return self.auto and self.shares.read(AUTO) is None

    def _divide(self, states: States, total: int, seconds: float | None) -> None:
        if self.is_undivided():
            each = min(total / shares.FEWEST, shares.SECONDS / seconds if seconds else math.inf)
            older = {int(path.name[:6]) for state in states.values() for path in journal.journals(state.folder)}
            plan: Json = {"shares": math.ceil(total / max(1, int(each))), "before": sorted(older)}
            self.shares.publish(AUTO, records.as_json(plan))
        plan = self.shares.read(AUTO) or {"shares": 1, "before": []}  # the run has just finished
        self.shares.of, self._before = plan["shares"], tuple(plan["before"])

    def deal(self, session: int, batches: Sequence[int], rank: int, processes: int) -> Iterable[int]:
        """Return a process's batches; with ``auto``, of shares that are claimed one after another.

        Args:
            session: The number that ``begin`` returned in process 0.
            batches: Those of the batches that ``begin`` returned that this process gets.
            rank: The process's number.
            processes: Their number.
        """
        self._process, self._processes, self._part_of = rank, processes, None
        if not self.auto:
            self.session = session
        return Taken(self._take) if self.auto and self._missing is None else batches

    def _take_all(self, states: States, total: int, is_unchanged: Callable[[Fault], bool]) -> Iterator[int]:
        while (found := self.shares.take()) is not None:
            share, claim = found
            batches: Sequence[int] = self.shares.batches(share, total)
            self._taken.append((share, self.shares.batches(share, total)))
            if older := (*self._before, *claim.before):
                batches = self._left(states, self.shares.batches(share, total), is_unchanged, older)
            yield from batches
            if total - 1 in batches:  # the loader counts on the short batch's being the last
                return

    def part(self, batch: int) -> str:
        """Return the prefix of the names of the parts for a batch, another one for each share."""
        if self._part_of is None or batch not in self._part_of:
            self._parts += 1
            self._part_of = next((batches for _, batches in self._taken if batch in batches), range(sys.maxsize))
        return f"{self.session:06}-{self._parts * self._processes + self._process:05}"

    def mark_done(self, computing: int | None = None) -> None:
        """Mark the shares as done whose rows are on disk: all, or those before the one with a batch."""
        while self._taken and (computing is None or computing not in self._taken[0][1]):
            share, _ = self._taken.pop(0)
            self.shares.finish(share, {"job": self.shares.job})

    def conclude(self, states: States) -> str:
        """Return what comes next, now that all rows of this job are on disk; with ``auto``, wait for other jobs.

        Returns:
            ``join``; ``again``: some shares are left to compute; ``left``: others do the rest; ``finished``.
        """
        noted = False
        while not (self.shares.gone or is_finished(states)):
            if not self.shares.left():
                if self.shares.claim(JOIN):
                    return "join"
                what = "the join of the file"
            elif self.auto and self.shares.is_any_free():
                return "again"
            else:
                what = f"{count(self.shares.left(), 'share')} that other jobs have"
            if not self.auto:
                return "left"
            if not noted:
                noted = True
                log.info("waiting for %s", what)
            time.sleep(beat() / 4)
        return "finished"

    def may_join(self) -> bool:
        """Whether no other job is about to finish the files."""
        return self.shares.gone or self.shares.claim(JOIN) is not None

    def summary(self) -> str:
        """Return which share is done and how many are not."""
        left = self.shares.left()
        what = f"share {self.shares.own} of {self.shares.of} is done" if self.shares.own else "this job is done"
        return f"{what}, {left:,} {'is' if left == 1 else 'are'} not"

    def finished(self, states: States) -> dict[str, Json]:
        """Finish the layers that a lost job has joined, and return their records."""
        found = {}
        for layer, state in states.items():
            before = (self._plan or {}).get("before", {}).get(layer)
            if _digest(state.record_path) != before and (record := state.inspect()):
                state.finish_renaming(record)
                found[layer] = record
        return found

    def missing(self, states: States, total: int) -> dict[str, dict[int, journal.Placed]] | None:
        """Return all batches by layer, or None if some are not on disk, which this job then computes."""
        done = {layer: state.placed() for layer, state in states.items()}
        absent = {number for placed in done.values() for number in set(range(total)) - placed.keys()}
        self._missing = sorted(absent) or None
        if absent:
            log.warning("%s of finished shares missing or damaged; computing them", count(len(absent), "batch"))
        return None if absent else done

    def records(self, states: States) -> dict[str, Json]:
        """Return the records that another job wrote."""
        found = {layer: state.read_record() for layer, state in states.items()}
        if lost := [layer for layer, record in found.items() if record is None]:
            raise DiskError(f"{self.shares.folder}: was removed, and {lost[0]} is not finished. Run the command again.")
        if not self.shares.gone and self.shares.claim(JOIN):  # the job that joined was lost before it did this
            self.shares.remove()
        return {layer: record for layer, record in found.items() if record is not None}


class Taken:
    """Batches that are not known before they are asked for; there is no length."""

    def __init__(self, begin: Callable[[], Iterator[int]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[int]:
        return self._begin()


def beat() -> float:
    """Return the seconds between heartbeats."""
    return shares.BEAT


def is_finished(states: States) -> bool:
    """Whether another job has finished all layers."""
    return all(not state.run_path.exists() and state.record_path.exists() for state in states.values())


def check_device(whose: str, others: Collection[str], device: str, same: bool) -> None:
    """Warn of rows from another kind of device, or raise BadValueError if all must be from the same."""
    if others and same:
        raise BadValueError(
            f"--writer.same_device true: {whose} on {', '.join(sorted(others))}, and this is {device}.\n"
            "Continue on the same kind of device, or accept other last digits with --writer.same_device false."
        )
    if others:
        log.warning("%s on %s; on %s last digits may differ", whose, ", ".join(sorted(others)), device)


def _compare(option: str, theirs: Any, mine: Any, words: str = "") -> None:
    """Raise BadValueError if this job differs from the plan in an option."""
    if theirs != mine:
        found = words or (", ".join(mine) if isinstance(mine, list) else "another list")
        expected = f" ({', '.join(theirs)})" if isinstance(theirs, list) else ""
        raise BadValueError(
            f"{option} {found}: expected the same as in the first job of this run{expected}.\n"
            "Use another --writer.out_dir for another run."
        )


def _digest(path: str | Path | None) -> str | None:
    """Return the SHA-256 of a file, None if there is none."""
    if path is None or not Path(path).exists():
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
