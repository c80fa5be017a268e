"""Bytes -> files: FeatureWriter(BasePredictionWriter), a part for each process and layer, merged in order."""

import os
import secrets
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from featx import formats, manifest
from featx.datamodule import Batch
from featx.messages import BadValueError, UserError, count, log

PARTS = ".featx-parts"


@dataclass
class Part:
    """What one process wrote of one layer.

    Args:
        first: Number of its first batch of the whole run, or -1 without one.
        batches: How many batches, contiguous from the first.
        rows: How many rows.
        columns: Values in each row, or 0 without one.
        size: Bytes on disk.
        odd_rows: Rows that hold a value that is not finite.
        odd_values: Values that are not finite.
    """

    first: int = -1
    batches: int = 0
    rows: int = 0
    columns: int = 0
    size: int = 0
    odd_rows: int = 0
    odd_values: int = 0


@dataclass
class _Open:
    """A part that is being written."""

    path: Path
    file: BinaryIO
    part: Part = field(default_factory=Part)


class FeatureWriter(BasePredictionWriter):
    """Where the rows go, and how they look.

    Each process streams its rows to a part of its own below ``out_dir``; process 0 joins them, in order, into
    ``OUT_DIR/LAYER.csv``, which appears when it is whole::

        Trainer(callbacks=[FeatureWriter(out_dir="features")], logger=False).predict(
            FeatureExtractor(layer="fc7"), datamodule=ImageFolderDataModule("photos"), return_predictions=False
        )

    Args:
        out_dir: Folder for LAYER.csv, made if missing.
        format: Format of the rows.
        names: How a row is named: basename, the file's name, or relative, its path below the data folder.
        header: Whether the first line names the columns, as image,fc7.0,fc7.1.

    Attributes:
        files: The finished files, by layer; in process 0, after the run.
        rows: How many rows each has.

    Raises:
        UserError: ``out_dir`` cannot be used, or rows of one layer differ in length.
    """

    def __init__(
        self,
        out_dir: str = "features",
        format: Literal["csv"] = "csv",
        names: Literal["basename", "relative"] = "basename",
        header: bool = False,
    ) -> None:
        super().__init__(write_interval="batch")
        self.out_dir = out_dir
        self.format = format
        self.names = names
        self.header = header
        self.files: dict[str, Path] = {}
        self.rows = 0
        self._open: dict[str, _Open] = {}
        self._group: Any = None

    def check(self) -> None:
        """Raise UserError where ``out_dir`` is a file or cannot be written to; nothing is made yet."""
        nearest = Path(self.out_dir)
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir():
            raise BadValueError(f"--writer.out_dir {self.out_dir}: {nearest} is a file. Expected a folder.")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise BadValueError(f"--writer.out_dir {self.out_dir}: {nearest} cannot be written to.")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the folder, agree on it with the other processes, and open this one's parts."""
        if trainer.limit_predict_batches != 1.0:
            raise BadValueError(
                f"--trainer.limit_predict_batches {trainer.limit_predict_batches}: rows would be missing. "
                "Give a folder with fewer images instead."
            )
        layers: Any = pl_module.layer_list
        if trainer.is_global_zero:
            self._warn_of_names(trainer.datamodule.images.names)  # type: ignore[attr-defined]
        if trainer.world_size > 1:
            # Processes may reach the end hours apart, and NCCL and Lightning wait for half an hour at most.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        token = secrets.token_hex(8)
        folder = Path(self.out_dir) / PARTS
        try:
            if trainer.is_global_zero:
                self.check()
                folder.mkdir(parents=True, exist_ok=True)
                for layer in layers:
                    for stale in folder.glob(f"{_file_name(layer)}.*.part"):
                        stale.unlink()
                (folder / f"{token}.run").touch()
            first = self._gather(token)[0]
            seen = self._gather((folder / f"{first}.run").exists())
            if not all(seen):
                raise UserError(
                    f"--writer.out_dir {self.out_dir}: the process of rank {seen.index(False)} does not see what "
                    "rank 0 writes there. Expected a folder that all machines share."
                )
            if trainer.is_global_zero:
                (folder / f"{token}.run").unlink()
            for layer in layers:
                path = self._part_path(layer, trainer.global_rank)
                self._open[layer] = _Open(path, path.open("wb", buffering=1 << 20))
        except OSError as err:
            raise UserError(f"--writer.out_dir {self.out_dir}: {err.strerror}: {err.filename}") from err

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: dict[str, Tensor],
        batch_indices: Sequence[int] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append a batch's rows, ``(B, D) float32`` of each layer, to this process's parts."""
        names = [os.fsencode(name if self.names == "relative" else os.path.basename(name)) for name in batch.names]
        for layer, features in prediction.items():
            values = features.cpu().numpy()  # (B, D) float32
            opened = self._open[layer]
            part = opened.part
            self._check_rows(layer, part, batch, values.shape)
            if part.rows == 0:
                part.first, part.columns = batch.number, values.shape[1]
                if self.header and batch.number == 0:
                    opened.file.write(formats.csv_header(layer, part.columns))
            odd = ~np.isfinite(values)
            part.odd_values += int(odd.sum())
            part.odd_rows += int(odd.any(axis=1).sum())
            opened.file.writelines(formats.csv_row(name, row) for name, row in zip(names, values, strict=True))
            part.rows += len(values)
            part.batches += 1

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the parts; in process 0, join those of all processes, and tell what is odd about them."""
        mine = {layer: self._close(opened) for layer, opened in self._open.items()}
        everyones = self._gather(mine)
        if trainer.is_global_zero:
            for layer in mine:
                parts = [parts[layer] for parts in everyones]
                record = manifest.describe_run(trainer, pl_module, trainer.datamodule, layer)  # type: ignore[arg-type, attr-defined]
                self._finish(layer, parts, len(trainer.datamodule.images), record)  # type: ignore[attr-defined]
            with suppress(OSError):  # another run's parts may lie there
                (Path(self.out_dir) / PARTS).rmdir()
        self._open = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the parts, and leave a file of an earlier run as it was."""
        for opened in self._open.values():
            with suppress(OSError):
                opened.file.close()
            opened.path.unlink(missing_ok=True)
        with suppress(OSError):  # other processes' parts may lie there
            (Path(self.out_dir) / PARTS).rmdir()

    def _finish(self, layer: str, parts: list[Part], images: int, record: dict[str, Any]) -> None:
        columns = {part.columns for part in parts if part.rows}
        if len(columns) > 1:
            raise UserError(_other_columns(layer, min(columns), max(columns)))
        expected = 0
        for part in parts:
            assert part.first in (expected, -1), f"{layer}: a part begins at batch {part.first}, expected {expected}"
            expected += part.batches
        rows = sum(part.rows for part in parts)
        assert rows == images, f"{layer}: {rows} rows for {images} images"
        target = Path(self.out_dir) / _file_name(layer)
        paths = [self._part_path(layer, rank) for rank in range(len(parts))]
        existed = target.exists()
        try:
            for path, part in zip(paths, parts, strict=True):
                assert path.stat().st_size == part.size, f"{path}: {path.stat().st_size} bytes, expected {part.size}"
            with paths[0].open("ab") as whole:
                for path in paths[1:]:
                    with path.open("rb") as file:
                        shutil.copyfileobj(file, whole, 1 << 20)
                whole.flush()
                os.fsync(whole.fileno())
            paths[0].replace(target)
            for path in paths[1:]:
                path.unlink()
            outcome = {"file": target.name, "rows": rows, "columns": columns.pop()}
            target.with_name(f"{_stem(layer)}.json").write_bytes(manifest.as_json(outcome | record))
        except OSError as err:
            raise UserError(f"--writer.out_dir {self.out_dir}: {err.strerror}: {err.filename}") from err
        self.files[layer] = target
        self.rows = rows
        if existed:
            log.warning("%s existed and was replaced", target)
        odd_rows, odd_values = (sum(getattr(part, kind) for part in parts) for kind in ("odd_rows", "odd_values"))
        if odd_values:
            log.warning("%s: %s nan or infinite, in %s", target, count(odd_values, "value"), count(odd_rows, "row"))

    def _check_rows(self, layer: str, part: Part, batch: Batch, shape: tuple[int, ...]) -> None:
        assert shape[0] == len(batch.names), f"{layer}: {shape[0]} rows for {len(batch.names)} images"
        if part.rows and batch.number != part.first + part.batches:
            raise RuntimeError(f"batch {batch.number} came after batch {part.first + part.batches - 1}")
        if part.rows and shape[1] != part.columns:
            raise UserError(_other_columns(layer, part.columns, shape[1], f"from {batch.names[0]} on "))

    def _warn_of_names(self, paths: list[str]) -> None:
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

    def _part_path(self, layer: str, rank: int) -> Path:
        return Path(self.out_dir) / PARTS / f"{_file_name(layer)}.{rank:05}.part"

    def _close(self, opened: _Open) -> Part:
        try:
            opened.file.close()
            opened.part.size = opened.path.stat().st_size
        except OSError as err:
            raise UserError(f"{opened.path}: {err.strerror}") from err
        return opened.part

    def _gather(self, value: Any) -> list[Any]:
        """Return everybody's value, in the order of the ranks; counts and names, never features."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values


def _stem(layer: str) -> str:
    return layer.replace("/", "%2F")


def _file_name(layer: str) -> str:
    return f"{_stem(layer)}.csv"


def _other_columns(layer: str, expected: int, received: int, where: str = "") -> str:
    return (
        f"--model.layer {layer}: {where}{received} columns, expected {expected} as before. Rows differ with the "
        "images' shapes.\nGive them one shape with --data.crop, or take a layer behind the pooling."
    )
