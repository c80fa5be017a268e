"""A run: the checks before the first batch, an estimate of its time, and how it ends."""

import os
import re
import sys
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor

from featx.data.batch import Sample
from featx.data.module import ImageFolderDataModule
from featx.errors import UserError, count, first_line, in_job, log, note, rank
from featx.model.extractor import FeatureExtractor
from featx.process.cores import cores_per_process
from featx.process.lightning import give_children_to, keep_signals, refusal, report_lost_workers_once
from featx.process.signals import PATIENCE, Stopped, Watch, end_at_the_latest, end_processes, verdict
from featx.writer.callback import FeatureWriter
from featx.writer.disk import GOES_ON


class FailedError(UserError):
    """The machine failed: exit status 1."""

    exit_status = 1


class Plan(NamedTuple):
    """What a run will write: values per row for each layer and, on rank 0, bytes of all files."""

    columns: dict[str, int]
    size: int


def prepare(
    trainer: Trainer, model: FeatureExtractor, data: ImageFolderDataModule, writer: FeatureWriter
) -> Plan | None:
    """Check everything that can be checked before the first batch: cheap checks first, a download last.

    Returns:
        What there is to do, or None if nothing is left.
    """
    try:
        writer.check(data.shard is not None)
        writer.check_shards(data.batch_size)
        data.check()
        data.cache = None if writer.dry_run else writer.cache
        writer.enter(data)
        sample = set_up(model, data)
        assert data.images is not None
        columns = {layer: rows.shape[1] for layer, rows in sample.items()}
        left = writer.inspect(trainer, model, data, columns)
        size = writer.check_space(data.images, sample, trainer.world_size) if left and rank() == 0 else 0
        # Other jobs may finish while the processes of this one start; all of them must go the same way.
        work = left or (writer.job is not None and trainer.world_size > 1)
        if left and writer.job is not None and writer.job.is_undivided():  # the first one decides how long a share is
            writer.seconds_per_batch = estimate(trainer, model, data, data.batch_size) * trainer.world_size
        if not work or writer.dry_run:
            writer.release()
        return Plan(columns, size) if work else None
    except BaseException as err:
        writer.release()
        if isinstance(err, UserError) and rank() and {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys():
            sys.exit(err.exit_status)  # rank 0 makes the same checks and reports it
        raise


def set_up(
    model: FeatureExtractor, data: ImageFolderDataModule, samples: Iterable[Sample] | None = None
) -> dict[str, Tensor]:
    """Build the network, run it on one image, and return each layer's row, ``(1, D) float32``.

    Args:
        model: The network.
        data: The images.
        samples: Images that are not in a folder.

    Raises:
        UserError: A mistake in the options.
    """
    model.check()
    if samples is None:
        data.setup()
    model.configure_model()
    note("preprocessing", str(data.preprocessing(model.preprocessing)))
    sample = model.try_out(data.first_batch(model.preprocessing, samples))
    layers = []
    for layer, path in model.layers.items():
        columns, width = sample[layer].shape[1], model.passes.reduction.widths.get(layer)
        size = f"{count(width, 'column')} reduced to {columns:,}" if width else count(columns, "column")
        layers.append(f"{layer}{f' = {path}' if path != layer else ''}, {size}")
    default = " (by default, since it has no fc7)" if model.layer_by_default and "fc7" not in model.layers else ""
    note("layers" if len(layers) > 1 else "layer", "; ".join(layers) + default)
    return sample


def estimate(trainer: Trainer, model: FeatureExtractor, data: ImageFolderDataModule, images: int) -> float:
    """Estimate the seconds of a run of so many images from two batches, computed on its device."""
    assert data.images is not None
    device = trainer.strategy.root_device
    model.to(device)
    for number in (0, int(len(data.images) > data.batch_size)):  # the first batch warms up
        begin = time.perf_counter()
        batch = data.read_batch(number, model.preprocessing)
        read = time.perf_counter()
        moved = batch._replace(groups=[(rows, images.to(device)) for rows, images in batch.groups])
        for values in model.predict_step(moved).values():
            values.cpu()  # waits for the result
        reading, computing = (read - begin) / cores_per_process(trainer), time.perf_counter() - read
    # On a CPU both stages share the cores; with a GPU the slower stage decides.
    seconds = reading + computing if device.type == "cpu" else max(reading, computing)
    return seconds / batch.size * images / trainer.world_size


def run(trainer: Trainer, model: FeatureExtractor, data: ImageFolderDataModule, writer: FeatureWriter) -> None:
    """Run a command's Trainer, and end all of its processes when one of them ends early.

    Raises:
        UserError: Anything that featx has a message for.
        Stopped: A signal, or the loss of another process, ended the run.
    """
    watch = Watch(lambda text: log.error("%s. %s", text, GOES_ON))
    if trainer.world_size > 1:
        place: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
        first = trainer.local_rank == 0  # of this machine, where somebody may be watching
        report: Any = (lambda text: sys.stderr.write(f"{in_job(text)}\n")) if first else (lambda text: None)
        watch.wait_for_others(trainer.num_nodes, f"{place.main_address}:{place.main_port}", report)
    connect = LambdaCallback(setup=lambda trainer, *_, **__: watch.connect(trainer.global_rank, trainer.world_size))
    trainer.callbacks.insert(0, connect)  # type: ignore[attr-defined]
    keep_signals(trainer)
    give_children_to(watch.children)
    report_lost_workers_once()
    try:
        trainer.predict(model, datamodule=data, return_predictions=False)
        while writer.again:  # shares that other jobs have lost
            trainer.predict(model, datamodule=data, return_predictions=False)
        watch.leave(0)
    except BaseException as err:
        reported = explain(err, trainer, data)
        watch.leave(reported.exit_status if isinstance(reported, UserError | Stopped) else 1)
        if trainer.is_global_zero:
            end_processes(getattr(trainer.strategy.launcher, "procs", []))
        end_at_the_latest(PATIENCE, 1)
        if reported is err:
            raise
        raise reported from err


def explain(err: BaseException, trainer: Trainer, data: ImageFolderDataModule) -> BaseException:
    """Return the error to report: one with a message for the user if featx has one, else the error itself."""
    if isinstance(err, UserError | Stopped):
        return err
    # Any other error may follow from a signal, which the workers got too, or from the loss of a process.
    if verdict() is None:
        time.sleep(1 if trainer.world_size > 1 else 0.2)
    if (status := verdict()) is not None:
        return Stopped(status)
    if isinstance(err, MisconfigurationException):
        return refusal(err, {})
    first, advice = first_line(err), f"Use fewer --data.num_workers than {data.workers}. {GOES_ON}"
    if isinstance(err, torch.OutOfMemoryError):
        what = f"out of memory at --data.batch_size {data.batch_size}"
        advice = "Use a smaller --data.batch_size with --writer.overwrite true: last digits depend on the batch."
    elif trainer.world_size > 1 and isinstance(err, torch.distributed.DistStoreError):
        what, advice = "the run's other machines did not connect", GOES_ON
    elif isinstance(err, RuntimeError) and re.search("DataLoader worker.*(killed|exited)", str(err)):
        what = "a process that decodes images died, most often for lack of memory or threads"
        first = first.split(". ")[0]
    elif isinstance(err, BlockingIOError) or "start new thread" in first or "Too many open files" in first:
        what = "the system allows no more processes, threads or open files (ulimit -u, ulimit -n)"
    else:
        return err
    return FailedError(f"{what}: {first}\n{advice}")
