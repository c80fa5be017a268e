"""Activations -> files that survive: FeatureWriter(BasePredictionWriter), which shares out what is left, and joins."""

import math
import os
import platform
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from featx.data.batch import Batch, Fault, Images
from featx.errors import BadValueError, ImageError, UserError, count, log, rank, size_in_words
from featx.process import progress
from featx.process.cores import device_name, usable_cores
from featx.writer import disk, formats, journal, parquet, records
from featx.writer.disk import DiskError, Lock
from featx.writer.folder import HIDDEN, SUFFIXES, Found, LayerState
from featx.writer.formats import Format
from featx.writer.journal import Placed
from featx.writer.stream import RowStream

GRACE = 8.0  # seconds that a run that is ended has to bring its rows to disk


class FeatureWriter(BasePredictionWriter):
    """Where the rows go, and how they look.

    Each process streams its rows to parts of its own below ``out_dir``; process 0 joins them, in order, into
    ``OUT_DIR/LAYER.csv``, which appears when it is whole. A run that was ended goes on where it stopped::

        Trainer(callbacks=[FeatureWriter(out_dir="features")], logger=False).predict(
            FeatureExtractor(layer="fc7"), datamodule=ImageFolderDataModule("photos"), return_predictions=False
        )

    Args:
        out_dir: Folder for LAYER.csv, made if missing.
        format: csv; npy, with the names in LAYER.names.txt; parquet; or a list of them, as '[csv,npy]'.
        names: How a row is named: basename, the file's name, or relative, its path below the data folder.
        header: Whether CSV's first line names the columns, as image,fc7.0,fc7.1.
        dtype: Of the values in npy and parquet; what float16 cannot hold becomes infinite, and is counted.
        overwrite: Whether to remove what another run wrote for these layers, and start afresh.
        dry_run: Whether to stop before the first batch and say what the run would take.
        shard_rows: Images a file, a multiple of the batch size: a folder LAYER of files 00000.csv ... instead of one.

    Attributes:
        records: What LAYER.json says, by layer; in process 0, after the run.
        faults: How many images gave no row.

    Raises:
        UserError: ``out_dir`` cannot be used, holds another run's rows, or rows of one layer differ in length.
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
    ) -> None:
        super().__init__(write_interval="batch")
        self.formats: list[Format] = [format] if isinstance(format, str) else list(dict.fromkeys(format))
        if not self.formats or set(self.formats) - set(get_args(Format)):
            raise BadValueError(
                f"--writer.format {format}: expected csv, npy, parquet, or a list of them, as '[csv,npy]'."
            )
        if dtype == "float16" and self.formats == ["csv"]:
            raise BadValueError(
                "--writer.dtype float16: csv holds float32. --writer.format npy or parquet holds float16."
            )
        self.out_dir = out_dir
        self.format = format
        self.names = names
        self.header = header
        self.dtype = dtype
        self.overwrite = overwrite
        self.dry_run = dry_run
        self.shard_rows = shard_rows
        self.records: dict[str, dict[str, Any]] = {}
        self._columns: dict[str, int] = {}
        self._looked: tuple[Any, Any, Any] | None = None  # at the run of which Trainer, model and data
        self._locked = False  # whether it was locked then
        self._all: dict[str, LayerState] = {}
        self._states: dict[str, LayerState] = {}  # of the layers with something to do
        self._found: dict[str, Found] = {}
        self._done: dict[str, dict[int, Placed]] = {}
        self._stream: RowStream | None = None  # of a process with something to do
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
    def computed(self) -> int:
        """How many images this process has computed."""
        return self._stream.computed if self._stream else 0

    @property
    def stages(self) -> dict[str, float]:
        """Seconds for text, disk and, where not on the CPU, network."""
        return self._stream.stages if self._stream else {}

    @property
    def faults(self) -> int:
        """How many images gave no row."""
        return max((record["errors"] for record in self.records.values()), default=0)

    def check(self) -> None:
        """Raise UserError where ``out_dir`` is a file, cannot be written to or is in use; nothing is made yet."""
        nearest = folder = Path(self.out_dir)
        if folder.suffix in SUFFIXES and not folder.exists():
            raise BadValueError(
                f"--writer.out_dir {folder}: expected a folder, this looks like a file.\n"
                f"--writer.out_dir {folder.with_suffix('')} writes {folder.with_suffix('')}/LAYER{folder.suffix}."
            )
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir():
            raise BadValueError(f"--writer.out_dir {self.out_dir}: {nearest} is a file. Expected a folder.")
        if "parquet" in self.formats:
            parquet.check()
        if not os.access(nearest, os.W_OK | os.X_OK) or not shutil.disk_usage(nearest).total:  # /proc has no space
            raise BadValueError(f"--writer.out_dir {self.out_dir}: {nearest} cannot be written to.")
        if (Path(self.out_dir) / HIDDEN / "lock").exists():
            self._take_lock()

    def check_shards(self, batch_size: int) -> None:
        """Raise BadValueError where ``shard_rows`` is not whole batches, which are what is dealt and resumed."""
        rows = self.shard_rows
        if rows is not None and (rows < 1 or rows % batch_size):
            above = math.ceil(max(rows, 1) / batch_size) * batch_size
            raise BadValueError(
                f"--writer.shard_rows {rows}: expected a multiple of --data.batch_size {batch_size}, as {above}."
            )

    def look(self, trainer: Trainer, model: Any, data: Any, columns: dict[str, int]) -> bool:
        """Find out what is in ``out_dir`` already, and whether there is anything to do.

        Args:
            trainer: Of the run.
            model: The FeatureExtractor, configured.
            data: The ImageFolderDataModule, set up.
            columns: Values in each row, by layer.

        Returns:
            False where all files stand finished and no unreadable image of theirs could be read now.

        Raises:
            UserError: Another run's rows are there.
        """
        self._columns, self._looked = columns, (trainer, model, data)
        settings = {"names": self.names, "header": self.header, "dtype": self.dtype, "shard_rows": self.shard_rows,
                    "revisions": {"text": formats.REVISION}}  # fmt: skip
        self._all = {}
        for layer in model.layers:
            parts = model.identity(layer, str(trainer.precision)), data.identity(model.preprocessing), settings
            identity = records.merge(*parts)
            self._all[layer] = LayerState(Path(self.out_dir), layer, self.formats, identity, data.images, data.readers)
        self._locked = self._lock is not None
        self._decide(data, model.preprocessing)
        return bool(self._states)

    def _decide(self, data: Any, preset: Any) -> None:
        """Find out what is in the folder, and keep the layers with something to do."""
        self._states, self.records = dict(self._all), {}
        for layer, state in self._all.items():
            if state.sharded and state.shards_folder.is_file():
                raise BadValueError(f"{state.shards_folder}: is a file. --writer.shard_rows makes a folder there.")
            self._found[layer] = state.look(self.overwrite)
            if self._found[layer] == "finished":
                record = records.read_record(state.record_path, layer) or {}
                if all(data.fault(fault.path, preset) == fault for fault in state.listed()):
                    if state.run_path.exists() and rank() == 0:  # it ended while it tidied up
                        self._take_lock()
                        state.settle(record)
                    self.records[layer] = record
                    del self._states[layer]

    def check_space(self, images: Images, sample: dict[str, Tensor], processes: int) -> int:
        """Hold the size of the output against the free space, tell both, and return the size in bytes.

        Args:
            images: All images.
            sample: A row of each layer, ``(1, D) float32``.
            processes: How many write a part; those of all but one are copied at the end.

        Raises:
            DiskError: It cannot fit.
        """
        name = os.fsencode(self._name(images.names[0]))
        text = sum(len(formats.csv_rows([name], sample[layer].numpy())) for layer in self._states)
        raw = sum(self._columns[layer] for layer in self._states) * np.dtype(self.dtype).itemsize
        sizes = {"csv": text, "npy": raw + len(name) + 1, "parquet": raw + 2 * len(name)}
        needed = sum(sizes[kind] for kind in self.formats) * len(images)
        parts = [
            path for state in self._states.values() for kind in state.kinds for path in state.folder.glob(f"*.{kind}")
        ]
        there = sum(path.stat().st_size for path in parts)
        rows = (("csv" in self.formats) * text + (self.formats != ["csv"]) * raw) * len(images)
        copied = rows * (processes - 1) // processes
        if self.shard_rows:  # of each process at most a shard that it began within
            copied = min(copied, rows * self.shard_rows * (processes - 1) // len(images))
        left = max(0, rows - there) + copied
        left += ("parquet" in self.formats) * sizes["parquet"] * len(images)  # written when the rows are joined
        nearest = next(path for path in (Path(self.out_dir), *Path(self.out_dir).absolute().parents) if path.exists())
        free = shutil.disk_usage(nearest).free
        log.info("output: about %s, %s free", size_in_words(needed), size_in_words(free))
        if left > free:
            raise DiskError(
                f"--writer.out_dir {self.out_dir}: about {size_in_words(left)} more are needed, "
                f"{size_in_words(free)} are free on its disk. Free some, or give a folder on another."
            )
        return needed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree with the other processes on what is left to do, take a share of it, and start the writing thread."""
        if trainer.limit_predict_batches != 1.0:
            raise BadValueError(
                f"--trainer.limit_predict_batches {trainer.limit_predict_batches}: rows would be missing. "
                "Give a folder with fewer images instead."
            )
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        model: Any = pl_module
        looked, self._looked = self._looked, None
        if looked is None or any(one is not other for one, other in zip(looked, (trainer, model, data), strict=True)):
            self.check_shards(data.batch_size)  # the command line has looked already, a user's own Trainer has not
            model.configure_model()
            sample = model.try_out(data.first_batch(model.preprocessing))
            self.look(trainer, model, data, {layer: rows.shape[1] for layer, rows in sample.items()})
            self._looked = None
        device = trainer.strategy.root_device
        self._device = device_name(device)
        self._started, self._stream, self._group, self._done = datetime.now(UTC), None, None, {}
        if trainer.world_size > 1:
            # Processes may reach the end hours apart, and NCCL and Lightning wait for half an hour at most.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        session, left = 0, np.arange(0)
        if trainer.is_global_zero:
            self._warn_of_names(data.images.names)
            session, left = self._begin(data, model.preprocessing)
        everyones = self._gather((session, left, list(self._states), data.images.digest()))
        session, left, layers, _ = everyones[0]
        self._states = {layer: self._all[layer] for layer in layers}
        if len({digest for *_, digest in everyones}) > 1:
            raise UserError(f"--data.dir {data.dir}: the processes see different images. It changed, or is not shared.")
        seen = self._gather(all(state.run_path.exists() for state in self._states.values()))
        if not all(seen):
            raise UserError(
                f"--writer.out_dir {self.out_dir}: the process of rank {seen.index(False)} does not see what "
                "rank 0 writes there. Expected a folder that all machines share."
            )
        data.batches = np.array_split(left, trainer.world_size)[trainer.global_rank]
        self._session = f"{session:06}"
        if len(data.batches):
            stem = f"{self._session}-{trainer.global_rank:05}"
            on_gpu, first = device.type != "cpu", int(data.batches[0])
            computing = model.batches_at_once(data.batch_size)
            self._stream = RowStream(
                self._states, self._columns, stem, self._device, on_gpu, first, computing, self._name
            )

    def _begin(self, data: Any, preset: Any) -> tuple[int, Any]:
        """Return the session's number and the batches that are not on disk yet, in order."""

        def still(fault: Fault) -> bool:
            now = data.fault(fault.path, preset)
            return bool(now == fault) and (fault.used or data.on_error == "list")

        self._take_lock()
        if not self._locked:  # another run may have been here since
            self._decide(data, preset)
        left: set[int] = set()
        session = 1
        batches = math.ceil(len(data.images) / data.batch_size)
        for layer, state in self._states.items():
            if self.overwrite:
                state.wipe()
            state.begin(self._found[layer])
            done = state.done(still)
            self._done[layer] = done
            left |= set(range(batches)) - done.keys()
            session = max(session, journal.next_session(state.folder))
            if done:
                log.info("%s: going on, %s of %s are done", layer, f"{len(done):,}", count(batches, "batch"))
            if others := {one.entry.device for one in done.values()} - {self._device}:
                log.warning("%s: begun on %s; on %s last digits may differ", layer, ", ".join(others), self._device)
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
        """Hand a batch's rows, ``(B, D) float32`` of each layer, to the writing thread, which waits for them."""
        assert self._stream is not None
        self._stream.put(batch._replace(groups=[]), prediction)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        lost = [fault for fault in batch.faults if not fault.used]
        if lost and data.on_error == "stop":  # its batch is in the journal, so that the image may be mended
            raise ImageError(
                f"{os.path.join(data.dir, lost[0].path)}: {lost[0].reason} ({lost[0].exception})\n"
                "--data.on_error list goes on with the other images, and lists those that cannot be read."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait until all is on disk; in process 0, join the parts of all processes, and tell what is odd about them."""
        if self._stream is not None:
            self._stream.finish()
        self._gather(None)  # everybody's rows are on disk
        if trainer.is_global_zero:
            known = self._stream.digests() if self._stream else {}
            for layer, state in self._states.items():
                done = self._done[layer] | state.placed(self._session)
                record = state.finish(done, self._columns[layer], known, self._about(trainer))
                self.records[layer] = record
                if overflowed := record["values_overflowed"]:
                    log.warning("%s: %s beyond float16 became infinite: --writer.dtype float32 keeps them",
                                layer, count(overflowed, "value"))  # fmt: skip
                if record["values_not_finite"]:
                    values, rows = count(record["values_not_finite"], "value"), count(record["rows_not_finite"], "row")
                    log.warning("%s: %s nan or infinite, in %s", layer, values, rows)
        self.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Bring to disk what was computed, and leave it for the next run."""
        if self._stream is not None:
            self._stream.end(GRACE)
        with suppress(DiskError):  # what ended the run is reported, not what follows from it
            self.release()

    def wait(self) -> None:
        """Return when process 0 has joined the parts, in each of several processes."""
        self._gather(None)

    def _take_lock(self) -> None:
        if self._lock is None and rank() == 0:
            folder = Path(self.out_dir) / HIDDEN
            with disk.told(folder):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(folder / "lock", f"--writer.out_dir {self.out_dir}")

    def release(self) -> None:
        """Close the parts and let other runs into the folder."""
        if self._stream is not None:
            self._stream.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _name(self, path: str) -> str:
        return path if self.names == "relative" else os.path.basename(path)

    def _about(self, trainer: Trainer) -> dict[str, Any]:
        """Return what the record says of the run and what decides no value."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        model: Any = trainer.lightning_module
        return {
            "weights": model.weights_used,
            "weights_told": model.weights_told,
            "preprocessing": data.preprocessing(model.preprocessing).source,
            "options": {
                "model_class": records.public_name(type(model)),
                "model": records.options(model),
                "data": records.options(data) | {"dir": os.path.abspath(data.dir)},
            },
            "host": platform.node(),
            "processes": trainer.world_size,
            "workers": data.workers,
            "cores": usable_cores(),
            "stages": progress.stages(trainer, model, self),
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(UTC) - self._started).total_seconds(), 3),
        }

    def _warn_of_names(self, paths: Sequence[str]) -> None:
        names = paths if self.names == "relative" else [os.path.basename(path) for path in paths]
        odd = sum(not formats.is_plain(os.fsencode(name)) for name in names)
        if odd:
            log.warning(
                "%s with a comma, a quote, a line break or a leading #: quoted as CSV wants it, DEMUD misreads it",
                count(odd, "name"),
            )
        if len(set(names)) < len(names):
            twice = [name for name, times in Counter(names).items() if times > 1]
            log.warning(
                "%s in several folders (%s%s): --writer.names relative tells the rows apart",
                f"{count(len(twice), 'file name')} {'stands' if len(twice) == 1 else 'stand'}",
                os.fsencode(twice[0]).decode(errors="replace"),
                ", …" if len(twice) > 1 else "",
            )

    def _gather(self, value: Any) -> list[Any]:
        """Return everybody's value, in the order of the ranks; counts and names, never features."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values
