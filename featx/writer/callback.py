"""Activations -> files that survive: FeatureWriter distributes the remaining batches and joins the parts."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from featx.data.batch import Batch, Images
from featx.errors import ImageError
from featx.process import progress
from featx.process.cores import device_name, usable_cores
from featx.writer import checks, records
from featx.writer.disk import DiskError
from featx.writer.folder import HIDDEN, LayerState
from featx.writer.formats import REVISION, Format
from featx.writer.job import Job, Taken
from featx.writer.stream import RowStream
from featx.writer.work import Work

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
        checks.check_options(out_dir, format, self.formats, dtype, update, overwrite)
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
        self._inspected: tuple[Any, Any, Any] | None = None  # for which Trainer, model and data
        self._work = self._begin_work()
        self._stream: RowStream | None = None  # if this process has work
        self._computed_before = self._listed_before = 0  # images, in earlier calls of predict
        self._device = self._session = ""
        self._started = datetime.now(UTC)
        self._group: Any = None

    def _begin_work(self) -> Work:
        return Work(Path(self.out_dir), self.overwrite, self.update, self.same_device)

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """The content of LAYER.json, by layer; in process 0, after the run."""
        return self._work.records

    @property
    def job(self) -> Job | None:
        """What this process does as one of several jobs; None without ``--data.shard``."""
        return self._work.job

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
        self._renew()
        checks.check_folder(Path(self.out_dir), self.formats)
        if (Path(self.out_dir) / HIDDEN / "lock").exists():
            self._work.lock(shared)

    def _renew(self) -> None:
        """Forget earlier work, unless this run holds the lock of its folder."""
        if not self._work.is_locked:
            self._work = self._begin_work()

    def enter(self, data: Any) -> None:
        """With ``--data.shard``, join the other jobs and use their list of images, or begin to make it."""
        if data.shard is not None:
            checks.check_jobs(data.shard, self.overwrite)
        self._renew()
        self._work.job = None
        if data.shard is not None and not self.dry_run:
            self._work.enter(data, lambda: {"images": self.computed, "faults": self._listed})

    def check_shards(self, batch_size: int) -> None:
        """Raise BadValueError if ``shard_rows`` is not a multiple of the batch size."""
        checks.check_shards(self.shard_rows, batch_size)

    def check_space(self, images: Images, sample: dict[str, Tensor], processes: int) -> int:
        """Check the size of the output against the free space, as ``checks.check_space`` does."""
        work, left = self._work, self.left(images)
        return checks.check_space(Path(self.out_dir), work.states, images, sample, processes, left, work.kept)

    def left(self, images: Images) -> int:
        """Return how many images are to compute, if none of them is on disk; in process 0, after ``inspect``."""
        return len(images if self._work.places is None else self._work.places)

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
        layers = _layers(self, trainer, model, data, columns)
        self._work.inspect(layers, data, model.preprocessing)
        if self.job is not None and self._work.states:
            self._work.agree(self.formats, device_name(trainer.strategy.root_device))
        self._inspected = trainer, model, data
        return bool(self._work.states)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree with the other processes on the remaining batches, take a share, and start the writing thread."""
        checks.check_limit(trainer.limit_predict_batches)
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
        self._stream, self._group = None, None
        self._started = self._started if self.again else datetime.now(UTC)
        if trainer.world_size > 1:
            # Processes may finish hours apart, but NCCL and Lightning wait for only half an hour.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        session, left, digest = 0, np.arange(0), data.images.digest()
        work = self._work
        if self.job is not None or trainer.is_global_zero:
            session, left = work.begin(self._device, self.seconds_per_batch)
        gathered = self._gather((session, left, work.outline(), digest))
        session, left, outline, _ = gathered[0]
        if self.job is not None or not trainer.is_global_zero:
            work.adopt(*outline)
        checks.check_same_images(data.images.where, [digest for *_, digest in gathered])
        seen = self._gather(all(state.run_path.exists() for state in work.states.values()))
        if not work.is_finished():
            checks.check_seen(self.out_dir, seen)
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
            self._stream = RowStream(work.states, stem, self._device, on_gpu, first, computing, moved_on)

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
        with self._work.unless_finished():
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
            with self._work.unless_finished():
                self._stream.finish()
        if self.job is not None and self.job.auto:
            self.job.mark_done()
        self._gather(None)  # the rows of all processes are on disk
        run: Callable[[], dict[str, Any]] = partial(_run_info, self, trainer, self._started)
        self.again = False
        if self.job is not None:
            again = self._work.finish_shares(self._session, run) if trainer.is_global_zero else False
            self.again = self._gather(again)[0]
        elif trainer.is_global_zero:
            self._work.finish(self._session, self._stream.digests() if self._stream else {}, run)
        if not self.again:
            self.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Bring the computed rows to disk for the next run."""
        if self._stream is not None:
            self._stream.end(GRACE)
        with suppress(DiskError):  # only the original exception is reported
            self.release()

    def wait(self) -> None:
        """Wait until process 0 has joined the parts."""
        self._gather(None)

    def release(self) -> None:
        """Close the parts, leave the other jobs, and release the folder's lock."""
        if self._stream is not None:
            self._stream.close()
        self._work.release()

    def _gather(self, value: Any) -> list[Any]:
        """Return the value of every process, by rank; counts and names, never features."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values


def _layers(
    writer: FeatureWriter, trainer: Trainer, model: Any, data: Any, columns: dict[str, int]
) -> dict[str, LayerState]:
    """Return the files of each layer, as ``FeatureWriter.inspect`` looks for them."""
    settings = {"names": writer.names, "header": writer.header, "dtype": writer.dtype,
                "shard_rows": writer.shard_rows, "revisions": {"text": REVISION}}  # fmt: skip
    found = {}
    for layer in model.layers:
        parts = model.identity(layer, str(trainer.precision)), data.identity(model.preprocessing), settings
        found[layer] = LayerState(
            Path(writer.out_dir),
            layer,
            columns[layer],
            writer.formats,
            records.merge(*parts),
            data.images,
            data.readers,
        )
    return found


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
