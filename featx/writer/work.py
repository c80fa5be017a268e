"""What a run has to do in its output folder, from the files that earlier runs left there to the finished ones."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx.data.batch import Fault, Images, report
from featx.errors import count, log, rank
from featx.writer import checks, disk, journal, shares
from featx.writer.disk import Lock
from featx.writer.folder import COMPLETE, HIDDEN, UPDATE, LayerState
from featx.writer.job import Job, check_device, is_finished
from featx.writer.join import finish, warn_of_values
from featx.writer.journal import Placed
from featx.writer.records import Json
from featx.writer.update import Kept, Update, complete, plan


class Work:
    """A run's layers in its output folder: the finished ones, and what is left to do for the others.

    Only process 0 changes anything there, and takes the folder's lock before.

    Args:
        out_dir: The output folder.
        overwrite: Whether another run's files may be replaced.
        update: Whether the images of finished files may have changed.
        same_device: Whether to refuse rows from another kind of device.

    Attributes:
        job: What this process does as one of several jobs; None without ``--data.shard``.
        states: The layers with work left.
        records: The records of the finished layers.
        kept: What is kept of each layer that is updated; None in other processes of a run without jobs.
        places: The places of the images to compute; None: all images.
    """

    def __init__(self, out_dir: Path, overwrite: bool, update: bool, same_device: bool) -> None:
        self.out_dir = out_dir
        self.hidden = out_dir / HIDDEN
        self.job: Job | None = None
        self.states: dict[str, LayerState] = {}
        self.records: dict[str, Json] = {}
        self.kept: dict[str, Kept | None] = {}
        self.places: Any = None
        self._overwrite = overwrite
        self._update = update
        self._same_device = same_device
        self._all: dict[str, LayerState] = {}
        self._data: Any = None
        self._preset: Any = None  # the network's own preprocessing
        self._done: dict[str, dict[int, Placed]] = {}  # what was on disk when this run began
        self._inspected_locked = False  # whether this run held the lock then
        self._restricted = False  # the images, to those of an update
        self._lock: Lock | None = None

    @property
    def is_locked(self) -> bool:
        """Whether this run holds the folder's lock."""
        return self._lock is not None

    def lock(self, shared: bool = False) -> None:
        """Take the folder's lock in process 0, if this run does not hold it yet; jobs share it."""
        if self._lock is None and rank() == 0:
            with disk.reporting(self.hidden):
                self.hidden.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.hidden / "lock", f"--writer.out_dir {self.out_dir}", shared)

    def release(self) -> None:
        """Leave the other jobs, and release the lock."""
        if self.job is not None:
            self.job.shares.leave()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def enter(self, data: Any, progress: Callable[[], Json]) -> None:
        """Become one of the jobs of ``--data.shard``, and use their list of images, or begin to make it."""
        self.lock(shared=True)
        self.job = Job(self.hidden, data.shard, rank(), progress)
        self.job.enter(data)

    def inspect(self, every: Mapping[str, LayerState], data: Any, preset: Any) -> None:
        """Find out which layers are finished, and which images an update computes.

        Args:
            every: All layers.
            data: The data module, set up.
            preset: The network's own preprocessing.

        Raises:
            UserError: The folder contains another run's rows.
        """
        self._all, self._data, self._preset = dict(every), data, preset
        self._inspected_locked, self._restricted = self.is_locked, False
        self._find()

    def agree(self, formats: Sequence[str], device: str) -> None:
        """Compare this job with the others, as ``Job.agree`` does, and see what they have finished since."""
        assert self.job is not None
        images = self._data.images
        every = self._all | self._updates(images.some(self.places) if self.kept else images)
        left = {layer: every[layer] for layer in self.states}
        self.job.agree(every, left, self._data, formats, device, self._same_device)
        self._find()

    def _find(self) -> None:
        self.states, self.records = dict(self._all), {}
        for layer, state in self._all.items():
            while (state.folder / UPDATE / COMPLETE).exists() and rank() == 0:
                if self._may_rename():
                    complete(state)
                else:
                    time.sleep(0.1)
            record = state.inspect(self._overwrite, self._update)
            if record and all(self._data.fault(fault.path, self._preset) == fault for fault in state.faults()):
                # The run was killed while it renamed or cleaned up, or a job is about it.
                if state.run_path.exists() and rank() == 0 and self._may_rename():
                    state.finish_renaming(record)
                # Of images as they are no more, or its last files were not removed.
                if (state.folder / UPDATE).exists() and rank() == 0 and self._may_rename():
                    state.remove_update()
                self.records[layer] = record
                del self.states[layer]
        if rank() == 0 or self.job is not None:
            self._plan_update()
        if rank() == 0 and not self.states:
            self._remove_shares()

    def _may_rename(self) -> bool:
        """Whether this process may finish what a lost one began, after taking the lock; of several jobs, one may."""
        if self.job is not None and not self.job.may_join():
            return False
        self.lock(self.job is not None)
        return True

    def _plan_update(self) -> None:
        """Decide what is kept of finished files whose images have changed, and which images are computed."""
        for state in self.states.values():
            # The run that made them was killed while it renamed.
            if state.old and state.run_path.exists() and rank() == 0:
                self.lock(self.job is not None)
                state.rename_hidden(state.old)
        found, self.places = plan(self.states, self._data.images, self._is_unchanged)
        self.kept = dict(found)

    def _remove_shares(self) -> None:
        """Remove what jobs left that computed these layers, now that they are finished."""
        if not (self.hidden / shares.NAME).exists():
            return
        if self.job is None:  # the job that joined was lost before it removed them
            self.lock()
            shares.remove_finished(self.hidden, self._all)
        elif self.job.may_join():
            self.job.shares.remove()

    def _is_unchanged(self, fault: Fault) -> bool:
        """Whether an image still has its fault, and the run goes on all the same."""
        now = self._data.fault(fault.path, self._preset)
        return bool(now == fault) and (fault.used or self._data.on_error == "list")

    def begin(self, device: str, seconds: float | None) -> tuple[int, NDArray[np.int64]]:
        """Return the session's number and the batches that are not on disk yet, in order; of a job, those of its share.

        Args:
            device: What this run computes on.
            seconds: That one batch takes, about; None: unknown.
        """
        if self.job is not None:
            self._restrict()
            return self.job.begin(self.states, self._data, self._is_unchanged, seconds)
        self._warn_of_names()
        self.lock()
        if self._overwrite:
            shares.remove(self.hidden / shares.NAME)
        if not self._inspected_locked:  # another run may have written since
            self._find()
        self._restrict()
        left, session, self._done = set[int](), 1, {}
        for layer, state in self.states.items():
            state.begin(self._overwrite)
            on_disk = state.placed().items()
            done = {number: one for number, one in on_disk if all(map(self._is_unchanged, one.entry.faults))}
            self._done[layer] = done
            left |= set(range(self._batches)) - done.keys()
            session = max(session, journal.next_session(state.folder))
            if done:
                log.info("%s: continuing, %s of %s are done", layer, f"{len(done):,}", count(self._batches, "batch"))
            others = {one.entry.device for one in done.values()} - {device}
            check_device(f"{layer}: started", others, device, self._same_device)
        return session, np.array(sorted(left), dtype=np.int64)

    def outline(self) -> tuple[list[str], list[str], Any]:
        """Return what ``adopt`` takes in the other processes."""
        return list(self.states), list(self.kept), self.places

    def adopt(self, layers: list[str], updated: list[str], places: Any) -> None:
        """Take over what process 0 found: the layers with work left, those updated, and the images to compute."""
        self.states = {layer: self.states.get(layer, self._all[layer]) for layer in layers}
        if self.job is None:  # else each process has found out by itself what is updated
            self.kept, self.places = dict.fromkeys(updated), places
            self._restrict()

    def _restrict(self) -> None:
        """Leave only the images that an update computes, if this is one; once."""
        if self._restricted:
            return
        self._restricted = True
        if self.places is not None:
            self._data.restrict(self.places)
        self.states |= self._updates(self._data.images)

    def _updates(self, images: Images) -> dict[str, LayerState]:
        """Return the layers that are updated, with the images to compute."""
        return {layer: Update(self._all[layer], images, self.places, kept) for layer, kept in self.kept.items()}

    @property
    def _batches(self) -> int:
        return -(-len(self._data.images) // int(self._data.batch_size))

    def _warn_of_names(self) -> None:
        names = next(iter(self._all.values())).identity["names"]
        checks.warn_of_names(self._data.images.names, names)

    def is_finished(self) -> bool:
        """Whether other jobs have finished the files meanwhile."""
        return self.job is not None and is_finished(self.states)

    @contextmanager
    def unless_finished(self) -> Iterator[None]:
        """Ignore an error if other jobs have finished the files meanwhile, and removed the parts of this one."""
        try:
            yield
        except OSError:  # a DiskError too
            if not self.is_finished():
                raise

    def finish(self, session: str, known: dict[Path, str], run: Callable[[], Json]) -> None:
        """Join the parts to the files, now that all rows are on disk.

        Args:
            session: This run's, in the names of its parts.
            known: SHA-256 of the parts as written.
            run: Returns the record's ``run``.
        """
        done = {layer: self._done[layer] | state.placed(session) for layer, state in self.states.items()}
        self._join(done, known, run, "joined", copy=(self.hidden / shares.NAME / shares.PLAN).exists())
        shares.remove_finished(self.hidden, self._all)

    def finish_shares(self, session: str, run: Callable[[], Json]) -> bool:
        """Mark this job's shares as done, and join the parts if they were the last; return whether some are left."""
        assert self.job is not None
        self.job.mark_done()
        what = self.job.conclude(self.states)
        if what == "join":
            with self.unless_finished():
                self.records |= (finished := self.job.finished(self.states))
                left = {layer: state for layer, state in self.states.items() if layer not in finished}
                if (done := self.job.missing(left, self._batches)) is None:
                    return True
                self._warn_of_names()
                self._join(done, {}, run, f"{session}-joined", copy=True)
            self.job.shares.remove()
        if what in ("join", "finished"):
            self.records |= self.job.records(self.states)
        return what == "again"

    def _join(
        self,
        done: Mapping[str, dict[int, Placed]],
        known: dict[Path, str],
        run: Callable[[], Json],
        stem: str,
        copy: bool,
    ) -> None:
        for layer, placed in done.items():
            state, info = self.states[layer], run()
            if isinstance(state, Update):
                record = state.finish(placed, info, stem)
            else:
                record = finish(state, placed, known, info, stem, copy)
            self.records[layer] = record
            warn_of_values(record)
        for layer in list(done)[:1]:  # the images of all are the same
            report(self.records[layer]["remarks"])
