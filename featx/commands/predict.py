"""``featx predict``: LightningCLI wired to the three classes, all checks before the first batch, and the last words."""

import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from torch import Tensor

from featx.commands import options
from featx.data.module import ImageFolderDataModule, Sample
from featx.errors import SEE, BadValueError, UserError, count, log, rank, size_in_words
from featx.model.extractor import FeatureExtractor
from featx.process.cores import cores_per_process
from featx.process.lightning import (
    PLAIN,
    give_children_to,
    keep_signals,
    make_trainer,
    refusal,
    report_lost_workers_once,
)
from featx.process.progress import Progress, stages, where_the_time_went
from featx.process.signals import PATIENCE, Stopped, Watch, end_at_the_latest, end_processes, verdict
from featx.writer.callback import FeatureWriter
from featx.writer.disk import GOES_ON
from featx.writer.folder import file_name


class FeatxCLI(LightningCLI):
    """LightningCLI without what prediction has no use for."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the writer's options."""
        parser.add_lightning_class_args(FeatureWriter, "writer")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line, the configs first wherever they stand on it."""
        assert isinstance(args, list)
        options.set_default_class(parser, args)
        self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Make the Trainer's parts, the data module and the model; a part that cannot be made is no bug."""
        try:
            super().instantiate_classes()
        except ValueError as err:
            found = options.PROBLEM.search(str(err))
            if isinstance(err, UserError) or not found or found.group(1) == self.config.model.class_path:
                raise
            raise BadValueError(f"{found.group(1)}: {found.group(2)}\n{SEE}") from err

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; what it refuses is a mistake in the ``--trainer`` options."""
        return make_trainer(partial(super().instantiate_trainer, **kwargs), vars(self.config.trainer))


def predict(argv: list[str]) -> int:
    """Run ``featx predict`` with these options and return the exit status: 0, or 3 where images could not be read.

    Raises:
        UserError: What went wrong, in words.
        Stopped: The run was asked to end.
    """
    options.import_from_here()
    if "--help_all" in argv:
        argv = ["--help"]
    elif "-h" in argv or "--help" in argv:
        options.print_help(data=ImageFolderDataModule, model=FeatureExtractor, writer=FeatureWriter)
        return 0
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # banners and tips
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # which --trainer.profiler asks for
    warnings.filterwarnings("ignore", category=PossibleUserWarning)  # how to train faster
    progress = Progress()
    cli = FeatxCLI(
        FeatureExtractor,
        ImageFolderDataModule,
        subclass_mode_model=True,
        run=False,
        args=options.configs_first(argv),
        parser_class=options.Parser,
        parser_kwargs={"prog": "featx predict", "default_env": False},
        save_config_callback=None,
        seed_everything_default=False,
        auto_configure_optimizers=False,
        trainer_defaults={**PLAIN, "callbacks": [progress]},
    )
    writer: FeatureWriter = cli.config_init.writer
    if not prepare(cli.trainer, cli.model, cli.datamodule, writer):
        return _last_words(writer, None)
    if writer.dry_run:
        _estimate(cli.trainer, cli.model, cli.datamodule)
        return 0
    run(cli)
    if not cli.trainer.is_global_zero:
        return 0
    seconds = progress.seconds
    if any(record["rows"] for record in writer.records.values()):
        _tell_where_the_time_went(cli.trainer, cli.model, cli.datamodule, writer, seconds)
    else:
        log.warning("no image could be read: the files have no rows")
    return _last_words(writer, seconds)


def run(cli: FeatxCLI) -> None:
    """Run the Trainer, and end all of its processes when one of them ends early.

    Raises:
        UserError: What went wrong, in words.
        Stopped: The run was asked to end, or another process was lost.
    """
    trainer = cli.trainer
    watch = Watch(lambda text: log.error("%s. %s", text, GOES_ON))
    if trainer.world_size > 1:
        place: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
        watch.wait_for_others(trainer.num_nodes, f"{place.main_address}:{place.main_port}", log.info)
    trainer.callbacks.insert(0, _Connect(watch))  # type: ignore[attr-defined]
    keep_signals(trainer)
    give_children_to(watch.children)
    report_lost_workers_once()
    try:
        trainer.predict(cli.model, datamodule=cli.datamodule, return_predictions=False)
        watch.leave(0)
    except BaseException as err:
        told = _in_words(err, cli)
        watch.leave(told.exit_status if isinstance(told, UserError | Stopped) else 1)
        if trainer.is_global_zero:
            end_processes(getattr(trainer.strategy.launcher, "procs", []))
        end_at_the_latest(PATIENCE, 1)
        if told is err:
            raise
        raise told from err


def _in_words(err: BaseException, cli: FeatxCLI) -> BaseException:
    """Return what the user hears of an error: a message where featx has one, else the error itself."""
    if isinstance(err, UserError | Stopped):
        return err
    # What else ends a run may follow from a signal, which reached the workers too, or from a process that was lost.
    if verdict() is None:
        time.sleep(1 if cli.trainer.world_size > 1 else 0.2)
    if (status := verdict()) is not None:
        return Stopped(status)
    if isinstance(err, MisconfigurationException):
        return refusal(err, {})
    first = str(err).strip().split("\n")[0]
    if isinstance(err, torch.OutOfMemoryError):
        return FailedError(
            f"out of memory at --data.batch_size {cli.datamodule.batch_size}: {first}\n"
            "Give a smaller --data.batch_size with --writer.overwrite true: last digits depend on the batch."
        )
    if cli.trainer.world_size > 1 and isinstance(err, torch.distributed.DistStoreError):
        return FailedError(f"the run's other machines did not come: {first}\n{GOES_ON}")
    if isinstance(err, RuntimeError) and re.search("DataLoader worker.*(killed|exited)", str(err)):
        first = first.split(". ")[0]
        return FailedError(
            f"a process that decodes images was lost, most often for want of memory or of threads: {first}\n"
            f"Give a smaller --data.num_workers than {cli.datamodule.workers}. {GOES_ON}"
        )
    if isinstance(err, BlockingIOError) or "start new thread" in first or "Too many open files" in first:
        return FailedError(
            f"the system refuses another process, thread or open file (ulimit -u, ulimit -n): {first}\n"
            f"Give a smaller --data.num_workers than {cli.datamodule.workers}. {GOES_ON}"
        )
    return err


class FailedError(UserError):
    """The machine failed the run: exit status 1."""

    exit_status = 1


class _Connect(Callback):
    """Begins the watch over the other processes, once they can be reached."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.watch.connect(trainer.global_rank, trainer.world_size)


def _last_words(writer: FeatureWriter, seconds: float | None) -> int:
    """Print rows, time and files, and return the exit status."""
    rows = count(max((record["rows"] for record in writer.records.values()), default=0), "row")
    if seconds is None:
        print(f"finished before, nothing to do: {rows}")
    else:
        print(f"{rows} in {seconds:.1f} s, {writer.computed / max(seconds, 1e-9):.1f} images/s")
    for layer in writer.records:
        print(*dict.fromkeys(path.parent if writer.shard_rows else path for path in writer.files[layer]), sep="\n")
    for layer, record in writer.records.items():
        if record["errors"] + record["errors_used"]:
            what = [f"{count(record['errors'], 'image')} could not be read"] if record["errors"] else []
            what += [f"{count(record['errors_used'], 'broken image')} used as read"] if record["errors_used"] else []
            path = Path(writer.out_dir) / file_name(layer, "errors.csv")
            print(f"{rows}, {', '.join(what)}, listed in {path}")
    return 3 if writer.faults else 0


def _tell_where_the_time_went(
    trainer: Trainer, model: FeatureExtractor, data: ImageFolderDataModule, writer: FeatureWriter, seconds: float
) -> None:
    on_gpu = trainer.strategy.root_device.type != "cpu"
    gain = partial(data.turbo_saves, model.preprocessing) if data.decoder == "exact" else float
    share = f"rank 0 of {trainer.world_size}: " if trainer.world_size > 1 else ""
    spent = stages(trainer, model, writer)
    lines = where_the_time_went(spent, seconds, cores_per_process(trainer), data.workers, on_gpu, gain)
    for line in lines:
        log.info("%s%s", share, line)


def _estimate(trainer: Trainer, model: FeatureExtractor, data: ImageFolderDataModule) -> None:
    """Print how long the run would take, by two batches of it on its device."""
    assert data.images is not None
    batches = math.ceil(len(data.images) / data.batch_size)
    device = trainer.strategy.root_device
    model.to(device)
    reading, computing = [], []
    for number in (0, min(1, batches - 1)):  # the first one also pays for what happens once
        begin = time.perf_counter()
        batch = data.read_batch(number, model.preprocessing)
        reading.append((time.perf_counter() - begin) / batch.size)
        begin = time.perf_counter()
        moved = batch._replace(groups=[(rows, images.to(device)) for rows, images in batch.groups])
        for values in model.predict_step(moved).values():
            values.cpu()  # what is still computed is waited for
        computing.append((time.perf_counter() - begin) / batch.size)
    cores = cores_per_process(trainer)
    shared = device.type == "cpu"  # by both stages; beside a GPU the slower of the two is the wall
    seconds = reading[-1] / cores + computing[-1] if shared else max(reading[-1] / cores, computing[-1])
    seconds *= len(data.images) / trainer.world_size
    print(f"time: about {timedelta(seconds=math.ceil(seconds))} on {device}, by two batches of {data.batch_size}")
    print("dry run: nothing was written")


def prepare(trainer: Trainer, model: FeatureExtractor, data: ImageFolderDataModule, writer: FeatureWriter) -> bool:
    """Find every mistake that can be found before the first batch, the cheap ones first, a download last.

    Returns:
        Whether there is anything to do.
    """
    try:
        writer.check()
        writer.check_shards(data.batch_size)
        data.check()
        sample = set_up(model, data)
        columns = {layer: rows.shape[1] for layer, rows in sample.items()}
        work = writer.look(trainer, model, data, columns)
        if work and rank() == 0 and data.images is not None:
            needed = writer.check_space(data.images, sample, trainer.world_size)
            if writer.dry_run:
                print(f"images: {len(data.images):,}")
                print(f"columns: {', '.join(f'{layer} {number}' for layer, number in columns.items())}")
                print(f"{' and '.join(writer.formats)}: about {size_in_words(needed)}")
        if not work or writer.dry_run:
            writer.release()
        return work
    except BaseException as err:
        writer.release()
        if not isinstance(err, UserError):
            raise
        if rank() and {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys():
            sys.exit(err.exit_status)  # rank 0 makes the same checks and says it
        raise


def set_up(
    model: FeatureExtractor, data: ImageFolderDataModule, samples: Iterable[Sample] | None = None
) -> dict[str, Tensor]:
    """Build the network, try it out on an image, and return the image's rows, ``(1, D) float32`` of each layer.

    Args:
        model: The network.
        data: The images.
        samples: Images that are not in a folder; the first of them are taken.

    Raises:
        UserError: A mistake in what was asked; the cheap ones are found first, a download comes last.
    """
    model.check()
    if samples is None:
        data.setup()
    model.configure_model()
    log.info("preprocessing: %s", data.preprocessing(model.preprocessing))
    sample = model.try_out(data.first_batch(model.preprocessing, samples))
    layers = [f"{layer}{f' = {path}' if path != layer else ''}, {count(sample[layer].shape[1], 'column')}"
              for layer, path in model.layers.items()]  # fmt: skip
    log.info("%s: %s", "layers" if len(layers) > 1 else "layer", "; ".join(layers))
    return sample
