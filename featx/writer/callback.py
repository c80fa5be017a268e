"""Activations -> files that survive: FeatureWriter distributes the remaining batches and joins the parts."""

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from featx.data.batch import Batch, Fault, Images, report
from featx.errors import BadValueError, ImageError, UserError, count, log, rank
from featx.process import progress
from featx.process.cores import device_name, usable_cores
from featx.writer import checks, disk, journal, records, shares
from featx.writer.disk import DiskError, Lock
from featx.writer.folder import COMPLETE, HIDDEN, UPDATE, LayerState
from featx.writer.formats import FORMATS, REVISION, Format
from featx.writer.job import Job, Taken, check_device
from featx.writer.join import finish
from featx.writer.journal import Placed
from featx.writer.stream import RowStream
from featx.writer.update import Kept, Update, complete, plan

GRACE = 8.0  # seconds that an interrupted run has to bring its rows to disk


class FeatureWriter(BasePredictionWriter):
    """Write the rows of each layer to files, in the order of the images.

    Each process streams its rows to parts of its own below ``out_dir``. Process 0 joins them, in order, into
    ``OUT_DIR/LAYER.csv``, which appears when it is complete. An interrupted run continues where it stopped::

        Trainer(callbacks=[FeatureWriter(out_dir="features")], logger=False).predict(
            FeatureExtractor(layer="fc7"), datamodule=ImageFolderDataModule("photos"), return_predictions=False
        )

    Args:
        out_dir: Folder for LAYER.csv, created if missing.
        format: csv; npy, with the names in LAYER.names.txt; parquet; or a list such as '[csv,npy]'.
        names: Name of a row: basename, the file's name, or relative, its path below the data folder.
        header: Whether CSV starts with a line of column names, such as image,fc7.0,fc7.1.
        dtype: Type of the values in npy and parquet; those too large for float16 become infinite.
        overwrite: Whether to remove what another run wrote for these layers and start over.
        dry_run: Whether to print the space and time that the run would take, and stop before the first batch.
        shard_rows: Images per file, a multiple of the batch size; the files are LAYER/00000.csv, LAYER/00001.csv, ...
        update: Whether images may be new, changed or gone: only new and changed ones are computed.
        same_device: Refuse rows from another kind of device.

    Attributes:
        records: The content of LAYER.json, by layer; in process 0, after the run.
        faults: The number of images without a row.
        again: With ``ImageFolderDataModule(shard="auto")``, whether ``predict`` must be called again for other shares.

    Raises:
        UserError: ``out_dir`` cannot be used or contains another run's rows, or rows of one layer differ in length.
        DiskError: The disk failed.
    """

    def __init__(
        self,
        out_dir: str = "features",
        format: Format | list[Format] = "csv",
        names: Literal["basename", "relative"] = "basename",
        header: bool = False,
        dtype: Literal["float32", "float16"] = "float32",
        overwrite: bool = False,
        dry_run: bool = False,
        shard_rows: int | None = None,
        update: bool = False,
        same_device: bool = False,
    ) -> None:
        super().__init__(write_interval="batch")
        self.formats: list[Format] = [format] if isinstance(format, str) else list(dict.fromkeys(format))
        if not self.formats or set(self.formats) - FORMATS.keys():
            raise BadValueError(f"--writer.format {format}: expected csv, npy, parquet or a list such as '[csv,npy]'.")
        if dtype == "float16" and self.formats == ["csv"]:
            raise BadValueError("--writer.dtype float16: csv is always float32. Use --writer.format npy or parquet.")
        if update and overwrite:
            raise BadValueError(
                "--writer.update true: keeps the rows of unchanged images, and --writer.overwrite true removes them.\n"
                "Expected one of the two."
            )
        if "://" in out_dir:
            raise BadValueError(f"--writer.out_dir {out_dir}: expected a folder on a local or shared disk.")
        self.out_dir = out_dir
        self.format = format
        self.names = names
        self.header = header
        self.dtype = dtype
        self.overwrite = overwrite
        self.dry_run = dry_run
        self.shard_rows = shard_rows
        self.update = update
        self.same_device = same_device
        self.again = False
        self.seconds_per_batch: float | None = None  # about, if known; for the size of shares
        self.records: dict[str, dict[str, Any]] = {}
        self.job: Job | None = None  # with --data.shard
        self._inspected: tuple[Any, Any, Any] | None = None  # for which Trainer, model and data
        self._inspected_locked = False  # whether this run held the lock then
        self._all: dict[str, LayerState] = {}
        self._states: dict[str, LayerState] = {}  # of the layers with work left
        self._done: dict[str, dict[int, Placed]] = {}
        self._kept: dict[str, Kept | None] = {}  # of the layers that are updated
        self._places: Any = None  # of the images to compute; None: all
        self._stream: RowStream | None = None  # if this process has work
        self._computed_before = self._listed_before = 0  # images, in earlier calls of predict
        self._device = self._session = ""
        self._started = datetime.now(UTC)
        self._lock: Lock | None = None
        self._group: Any = None

    @property
    def files(self) -> dict[str, list[Path]]:
        """The finished files, by layer; in process 0, after the run."""
        folder = Path(self.out_dir)
        return {layer: [folder / name for name in record["files"]] for layer, record in self.records.items()}

    @property
    def cache(self) -> Path:
        """A file for what the data keep there for the next run."""
        return Path(self.out_dir) / HIDDEN / "members.idx"

    @property
    def computed(self) -> int:
        """The number of images that this process has computed."""
        return self._computed_before + (self._stream.computed if self._stream else 0)

    @property
    def stages(self) -> dict[str, float]:
        """Seconds spent on text, on the disk and, with a GPU, waiting for the network."""
        return self._stream.stages if self._stream else {}

    @property
    def faults(self) -> int:
        """The number of images without a row; those of this job's shares if other jobs finish the files."""
        return max((record["errors"] for record in self.records.values()), default=self._listed)

    @property
    def _listed(self) -> int:
        return self._listed_before + self._listed_by_stream + (self.job.listed if self.job else 0)

    @property
    def _listed_by_stream(self) -> int:
        return self._stream.listed if self._stream else 0

    @property
    def share(self) -> str:
        """What is done, in words, if other jobs have the rest to do, else nothing; in process 0, after the run."""
        return self.job.summary() if self.job and not self.records else ""

    def check(self, shared: bool = False) -> None:
        """Raise UserError if ``out_dir`` is a file, not writable or in use, if not by jobs; create nothing."""
        checks.check_folder(Path(self.out_dir), self.formats)
        if (Path(self.out_dir) / HIDDEN / "lock").exists():
            self._take_lock(shared)

    def enter(self, data: Any) -> None:
        """With ``--data.shard``, join the other jobs and use their list of images, or begin to make it."""
        if data.shard is not None and self.overwrite:
            raise BadValueError(
                f"--writer.overwrite true: with --data.shard {data.shard} each job would remove the others' rows.\n"
                "Remove the folder before you start the jobs, or use another --writer.out_dir."
            )
        self.job = None
        if data.shard is not None and not self.dry_run:
            self._take_lock(True)
            hidden, info = Path(self.out_dir) / HIDDEN, lambda: {"images": self.computed, "faults": self._listed}
            self.job = Job(hidden, data.shard, rank(), info)
            self.job.enter(data)

    def check_shards(self, batch_size: int) -> None:
        """Raise BadValueError if ``shard_rows`` is not a multiple of the batch size."""
        checks.check_shards(self.shard_rows, batch_size)

    def check_space(self, images: Images, sample: dict[str, Tensor], processes: int) -> int:
        """Check the size of the output against the free space, as ``checks.check_space`` does."""
        return checks.check_space(
            Path(self.out_dir), self._states, images, sample, processes, self.left(images), self._kept
        )

    def left(self, images: Images) -> int:
        """Return how many images are to compute, if none of them is on disk; in process 0, after ``inspect``."""
        return len(images if self._places is None else self._places)

    def inspect(self, trainer: Trainer, model: Any, data: Any, columns: dict[str, int]) -> bool:
        """Return whether there is anything to do, after reading what is in ``out_dir``.

        Args:
            trainer: The Trainer, for its precision.
            model: The FeatureExtractor, configured.
            data: The ImageFolderDataModule, set up.
            columns: Values per row, by layer.

        Returns:
            False if all files are finished and their unreadable images are still unreadable.

        Raises:
            UserError: ``out_dir`` contains another run's rows.
        """
        settings = {"names": self.names, "header": self.header, "dtype": self.dtype, "shard_rows": self.shard_rows,
                    "revisions": {"text": REVISION}}  # fmt: skip
        self._all, self._inspected_locked = {}, self._lock is not None
        for layer in model.layers:
            parts = model.identity(layer, str(trainer.precision)), data.identity(model.preprocessing), settings
            identity = records.merge(*parts)
            self._all[layer] = LayerState(
                Path(self.out_dir), layer, columns[layer], self.formats, identity, data.images, data.readers
            )
        self._find_work(data, model.preprocessing)
        if self.job is not None and self._states:
            device = device_name(trainer.strategy.root_device)
            every = {**self._all, **self._updates(data.images.some(self._places) if self._kept else data.images)}
            left = {layer: every[layer] for layer in self._states}
            self.job.agree(every, left, data, self.formats, device, self.same_device)
            self._find_work(data, model.preprocessing)  # other jobs may have finished since
        if not self._states and rank() == 0 and (hidden := Path(self.out_dir) / HIDDEN / shares.NAME).exists():
            if self.job is None:  # the job that joined was lost before it removed them
                self._take_lock()
                shares.remove_finished(hidden.parent, self._all)
            elif self.job.may_join():
                self.job.shares.remove()
        self._inspected = trainer, model, data
        return bool(self._states)

    def _find_work(self, data: Any, preset: Any) -> None:
        self._states, self.records = dict(self._all), {}
        for layer, state in self._all.items():
            while (state.folder / UPDATE / COMPLETE).exists() and rank() == 0:
                if self.job is None or self.job.may_join():
                    self._take_lock(self.job is not None)
                    complete(state)
                else:
                    time.sleep(0.1)
            record = state.inspect(self.overwrite, self.update)
            if record and all(data.fault(fault.path, preset) == fault for fault in state.faults()):
                # The run was killed while it renamed or cleaned up, or a job is about it.
                if state.run_path.exists() and rank() == 0 and (self.job is None or self.job.may_join()):
                    self._take_lock(self.job is not None)
                    state.finish_renaming(record)
                # Of images as they are no more, or its last files were not removed.
                if (state.folder / UPDATE).exists() and rank() == 0 and (self.job is None or self.job.may_join()):
                    self._take_lock(self.job is not None)
                    state.remove_update()
                self.records[layer] = record
                del self._states[layer]
        if rank() == 0 or self.job is not None:
            is_unchanged = partial(self._is_unchanged, data, preset)
            for state in self._states.values():
                # The run that made them was killed while it renamed.
                if state.old and state.run_path.exists() and rank() == 0:
                    self._take_lock(self.job is not None)
                    state.rename_hidden(state.old)
            found, self._places = plan(self._states, data.images, is_unchanged)
            self._kept = dict(found)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree with the other processes on the remaining batches, take a share, and start the writing thread."""
        if trainer.limit_predict_batches != 1.0:
            raise BadValueError(
                f"--trainer.limit_predict_batches {trainer.limit_predict_batches}: rows would be missing. "
                "Use a folder with fewer images instead."
            )
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        model: Any = pl_module
        if self._inspected != (trainer, model, data) and not self.again:  # a user's own Trainer, without prepare()
            self.enter(data)
            self.check_shards(data.batch_size)
            model.configure_model()
            sample = model.try_out(data.first_batch(model.preprocessing))
            self.inspect(trainer, model, data, {layer: rows.shape[1] for layer, rows in sample.items()})
        self._inspected = None
        device = trainer.strategy.root_device
        self._device = device_name(device)
        counts = self.computed, self._listed_before + self._listed_by_stream
        self._computed_before, self._listed_before = counts if self.again else (0, 0)
        self._stream, self._group, self._done = None, None, {}
        self._started = self._started if self.again else datetime.now(UTC)
        if trainer.world_size > 1:
            # Processes may finish hours apart, but NCCL and Lightning wait for only half an hour.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        session, left, digest = 0, np.arange(0), data.images.digest()
        if self.job is not None:
            if not self.again:
                self._restrict(data)
            unchanged = partial(self._is_unchanged, data, model.preprocessing)
            session, left = self.job.begin(self._states, data, unchanged, self.seconds_per_batch)
        elif trainer.is_global_zero:
            checks.warn_of_names(data.images.names, self.names)
            session, left = self._begin(data, model.preprocessing)
        gathered = self._gather((session, left, list(self._states), list(self._kept), self._places, digest))
        session, left, layers, updated, places, _ = gathered[0]
        if self.job is not None:  # each process has found out by itself what is updated
            self._states = {layer: self._states.get(layer, self._all[layer]) for layer in layers}
        elif not trainer.is_global_zero:
            self._states = {layer: self._all[layer] for layer in layers}
            self._kept, self._places = dict.fromkeys(updated), places
            self._restrict(data)
        if len({digest for *_, digest in gathered}) > 1:
            raise UserError(
                f"--data.dir {data.images.where}: the processes see different images. "
                "The folder changed or is not shared."
            )
        seen = self._gather(all(state.run_path.exists() for state in self._states.values()))
        if not all(seen) and not (self.job is not None and self.job.is_finished(self._states)):
            raise UserError(
                f"--writer.out_dir {self.out_dir}: rank {seen.index(False)} does not see what rank 0 writes there. "
                "Expected a folder that all machines share."
            )
        data.batches = np.array_split(left, trainer.world_size)[trainer.global_rank]
        self._session = f"{session:06}"
        stem: Callable[[int], str] = partial(_stem, f"{self._session}-{trainer.global_rank:05}")
        moved_on: Callable[[int], None] | None = None
        if self.job is not None:
            data.batches = self.job.deal(session, data.batches, trainer.global_rank, trainer.world_size)
            stem, moved_on = self.job.part, self.job.mark_done
        unknown = isinstance(data.batches, Taken)
        if unknown or len(data.batches):
            on_gpu, first = device.type != "cpu", None if unknown else int(data.batches[0])
            computing = model.batches_at_once(data.batch_size)
            self._stream = RowStream(self._states, stem, self._device, on_gpu, first, computing, moved_on)

    @staticmethod
    def _is_unchanged(data: Any, preset: Any, fault: Fault) -> bool:
        now = data.fault(fault.path, preset)
        return bool(now == fault) and (fault.used or data.on_error == "list")

    def _restrict(self, data: Any) -> None:
        """Leave only the images that an update computes, if this is one."""
        if self._places is not None:
            data.restrict(self._places)
        self._states |= self._updates(data.images)

    def _updates(self, images: Images) -> dict[str, LayerState]:
        """Return the layers that are updated, with the images to compute."""
        return {layer: Update(self._all[layer], images, self._places, kept) for layer, kept in self._kept.items()}

    def _begin(self, data: Any, preset: Any) -> tuple[int, Any]:
        """Return the session's number and the batches that are not on disk yet, in order."""
        is_unchanged = partial(self._is_unchanged, data, preset)
        self._take_lock()
        if self.overwrite:
            shares.remove(Path(self.out_dir) / HIDDEN / shares.NAME)
        if not self._inspected_locked:  # another run may have written since
            self._find_work(data, preset)
        self._restrict(data)
        left, session = set[int](), 1
        batches = -(-len(data.images) // data.batch_size)
        for layer, state in self._states.items():
            state.begin(self.overwrite)
            on_disk = state.placed().items()
            done = {number: one for number, one in on_disk if all(map(is_unchanged, one.entry.faults))}
            self._done[layer] = done
            left |= set(range(batches)) - done.keys()
            session = max(session, journal.next_session(state.folder))
            if done:
                log.info("%s: continuing, %s of %s are done", layer, f"{len(done):,}", count(batches, "batch"))
            others = {one.entry.device for one in done.values()} - {self._device}
            check_device(f"{layer}: started", others, self._device, self.same_device)
        return session, np.array(sorted(left), dtype=np.int64)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Mapping[str, Tensor],
        batch_indices: Sequence[int] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Pass a batch's rows, ``(B, D) float32`` per layer, to the writing thread, which waits for the device."""
        assert self._stream is not None
        with self._unless_finished():
            self._stream.put(batch._replace(groups=[]), prediction)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        lost = [fault for fault in batch.faults if not fault.used]
        if lost and data.on_error == "stop":  # the batch is in the journal, so that the image may be repaired
            raise ImageError(
                f"{os.path.join(data.images.where, lost[0].path)}: {lost[0].reason} ({lost[0].exception})\n"
                "--data.on_error list continues with the other images and lists those that cannot be read."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait until all rows are on disk; in process 0, join the parts and warn of values that are not finite."""
        if self._stream is not None:
            with self._unless_finished():
                self._stream.finish()
        if self.job is not None and self.job.auto:
            self.job.mark_done()
        self._gather(None)  # the rows of all processes are on disk
        hidden, self.again = Path(self.out_dir) / HIDDEN, False
        if self.job is not None:
            self.again = self._gather(self._join_shares(trainer) if trainer.is_global_zero else False)[0]
        elif trainer.is_global_zero:
            done = {layer: self._done[layer] | state.placed(self._session) for layer, state in self._states.items()}
            known = self._stream.digests() if self._stream else {}
            self._join(trainer, done, known, copy=(hidden / shares.NAME / shares.PLAN).exists())
            shares.remove_finished(hidden, self._all)
        if not self.again:
            self.release()

    def _join_shares(self, trainer: Trainer) -> bool:
        """Mark this job's shares as done, and join the parts if they were the last; return whether some are left."""
        assert self.job is not None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.job.mark_done()
        what = self.job.conclude(self._states)
        if what == "join":
            with self._unless_finished():
                self.records |= (finished := self.job.finished(self._states))
                left = {layer: state for layer, state in self._states.items() if layer not in finished}
                if (done := self.job.missing(left, -(-len(data.images) // data.batch_size))) is None:
                    return True
                checks.warn_of_names(data.images.names, self.names)
                self._join(trainer, done, {}, copy=True)
            self.job.shares.remove()
        if what in ("join", "finished"):
            self.records |= self.job.records(self._states)
        return what == "again"

    @contextmanager
    def _unless_finished(self) -> Iterator[None]:
        """Ignore an error if other jobs have finished the files meanwhile, and removed the parts of this one."""
        try:
            yield
        except OSError:  # a DiskError too
            if self.job is None or not self.job.is_finished(self._states):
                raise

    def _join(
        self, trainer: Trainer, done: Mapping[str, dict[int, Placed]], known: dict[Path, str], copy: bool
    ) -> None:
        stem = f"{self._session}-joined" if self.job is not None else "joined"
        for layer, placed in done.items():
            state, info = self._states[layer], _run_info(self, trainer, self._started)
            if isinstance(state, Update):
                record = state.finish(placed, info, stem)
            else:
                record = finish(state, placed, known, info, stem, copy)
            self.records[layer] = record
            if overflowed := record["values_overflowed"]:
                log.warning("%s: %s too large for float16 became infinite: --writer.dtype float32 keeps them",
                            layer, count(overflowed, "value"))  # fmt: skip
            if record["values_not_finite"]:
                values, rows = count(record["values_not_finite"], "value"), count(record["rows_not_finite"], "row")
                log.warning("%s: %s nan or infinite, in %s", layer, values, rows)
            report(record["remarks"], layer)
        for layer in list(done)[:1]:  # the images of all are the same
            report(self.records[layer]["remarks"])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Bring the computed rows to disk for the next run."""
        if self._stream is not None:
            self._stream.end(GRACE)
        with suppress(DiskError):  # only the original exception is reported
            self.release()

    def wait(self) -> None:
        """Wait until process 0 has joined the parts."""
        self._gather(None)

    def _take_lock(self, shared: bool = False) -> None:
        if self._lock is None and rank() == 0:
            folder = Path(self.out_dir) / HIDDEN
            with disk.reporting(folder):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(folder / "lock", f"--writer.out_dir {self.out_dir}", shared)

    def release(self) -> None:
        """Close the parts, leave the other jobs, and release the folder's lock."""
        if self._stream is not None:
            self._stream.close()
        if self.job is not None:
            self.job.shares.leave()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _gather(self, value: Any) -> list[Any]:
        """Return the value of every process, by rank; counts and names, never features."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values


def _stem(stem: str, batch: int) -> str:
    return stem


def _run_info(writer: FeatureWriter, trainer: Trainer, started: datetime) -> dict[str, Any]:
    """Return the record's ``run``, which determines no value."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    model: Any = trainer.lightning_module
    return {
        "weights": model.weights_used,
        "weights_told": model.weights_notes,
        "preprocessing": data.preprocessing(model.preprocessing).source,
        "options": {
            "model_class": records.public_name(type(model)),
            "model": records.options(model),
            "data": records.options(data) | {"dir": records.place(data.images.where)},
        },
        "host": platform.node(),
        "processes": trainer.world_size,
        "workers": data.workers,
        "cores": usable_cores(),
        "stages": progress.stages(trainer, model, writer),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - started).total_seconds(), 3),
    }
