"""``featx predict``: LightningCLI wired to the three classes, and the last words."""

import logging
import math
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from featx.commands import options
from featx.data.module import ImageFolderDataModule
from featx.errors import SEE, BadValueError, UserError, count, log, rank, size_in_words
from featx.model.extractor import FeatureExtractor
from featx.process.cores import cores_per_process
from featx.process.lightning import PLAIN, make_trainer
from featx.process.progress import Progress, stages, where_the_time_went
from featx.run import estimate, prepare, run
from featx.writer.callback import FeatureWriter
from featx.writer.folder import file_name


class FeatxCLI(LightningCLI):
    """LightningCLI without what prediction has no use for."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the writer's options."""
        parser.add_lightning_class_args(FeatureWriter, "writer")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, without a warning that it is given as ``args``."""
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
        args=argv,
        parser_class=options.Parser,
        parser_kwargs={"prog": "featx predict", "default_env": False},
        save_config_callback=None,
        seed_everything_default=False,
        auto_configure_optimizers=False,
        trainer_defaults={**PLAIN, "callbacks": [progress]},
    )
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    writer: FeatureWriter = cli.config_init.writer
    plan = prepare(trainer, model, data, writer)
    if plan is None:
        return _last_words(writer, None)
    if writer.dry_run:
        if rank() == 0:
            batch = f"{trainer.strategy.root_device}, by two batches of {data.batch_size}"
            print(f"images: {len(data.images):,}")
            print(f"columns: {', '.join(f'{layer} {number}' for layer, number in plan.columns.items())}")
            print(f"{' and '.join(writer.formats)}: about {size_in_words(plan.size)}")
            print(f"time: about {timedelta(seconds=math.ceil(estimate(trainer, model, data)))} on {batch}")
            print("dry run: nothing was written")
        return 0
    run(trainer, model, data)
    if not trainer.is_global_zero:
        return 0
    seconds = progress.seconds
    if any(record["rows"] for record in writer.records.values()):
        gain = partial(data.turbo_saves, model.preprocessing) if data.decoder == "exact" else float
        share = f"rank 0 of {trainer.world_size}: " if trainer.world_size > 1 else ""
        spent, on_gpu = stages(trainer, model, writer), trainer.strategy.root_device.type != "cpu"
        for line in where_the_time_went(spent, seconds, cores_per_process(trainer), data.workers, on_gpu, gain):
            log.info("%s%s", share, line)
    else:
        log.warning("no image could be read: the files have no rows")
    return _last_words(writer, seconds)


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
