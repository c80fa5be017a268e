"""``featx predict``: LightningCLI with featx's three classes, and the summary of a run."""

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
from featx.errors import SEE, BadValueError, UserError, count, in_job, log, name_job, note, rank, size_in_words
from featx.model.extractor import FeatureExtractor
from featx.process.cores import cores_per_process
from featx.process.lightning import NOTHING_TO_COMPUTE, PLAIN, make_trainer
from featx.process.progress import Progress, bottleneck, stages
from featx.run import estimate, prepare, run
from featx.writer.callback import FeatureWriter
from featx.writer.folder import file_name


class FeatxCLI(LightningCLI):
    """LightningCLI without the parts that prediction does not use."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the writer's options."""
        parser.add_lightning_class_args(FeatureWriter, "writer")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, without LightningCLI's warning about ``args``."""
        self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Make the objects; report a class that cannot be constructed as the user's mistake."""
        try:
            super().instantiate_classes()
        except ValueError as err:
            found = options.PROBLEM.search(str(err))
            if isinstance(err, UserError) or not found or found.group(1) == self.config.model.class_path:
                raise
            raise BadValueError(f"{found.group(1)}: {found.group(2)}\n{SEE}") from err

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; report its errors as mistakes in the ``--trainer`` options."""
        return make_trainer(partial(super().instantiate_trainer, **kwargs), vars(self.config.trainer))


def predict(argv: list[str]) -> int:
    """Run ``featx predict`` and return the exit status: 0, or 3 if images could not be read.

    Raises:
        UserError: Anything that featx has a message for.
        Stopped: A signal ended the run.
    """
    options.import_from_here()
    if "--help_all" in argv:
        argv = ["--help"]
    elif "-h" in argv or "--help" in argv:
        options.print_help(data=ImageFolderDataModule, model=FeatureExtractor, writer=FeatureWriter)
        return 0
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # banners and tips
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # for --trainer.profiler
    warnings.filterwarnings("ignore", category=PossibleUserWarning)  # advice on faster training
    warnings.filterwarnings("ignore", NOTHING_TO_COMPUTE)
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
    if data.shard not in (None, "auto"):
        name_job(data.shard)
    plan = prepare(trainer, model, data, writer)
    if plan is None:
        return _summarize(writer, None)
    if writer.dry_run:
        if rank() == 0:
            batch = f"{trainer.strategy.root_device}, estimated from two batches of {data.batch_size}"
            left = writer.left(data.images)
            print(f"images: {len(data.images):,}" + (f", {left:,} to compute" if left < len(data.images) else ""))
            print(f"columns: {', '.join(f'{layer} {number}' for layer, number in plan.columns.items())}")
            print(f"{' and '.join(writer.formats)}: about {size_in_words(plan.size)}")
            print(f"time: about {timedelta(seconds=math.ceil(estimate(trainer, model, data, left)))} on {batch}")
            print("dry run: nothing was written")
        return 0
    run(trainer, model, data, writer)
    if not trainer.is_global_zero:
        return 0
    seconds = progress.seconds
    if writer.share:
        print(in_job(writer.share))
        return 3 if writer.faults else 0
    if any(record["rows"] for record in writer.records.values()):
        gain = partial(data.turbo_saves, model.preprocessing) if data.decoder == "exact" else float
        spent, on_gpu = stages(trainer, model, writer), trainer.strategy.root_device.type != "cpu"
        ranks = f" (rank 0 of {trainer.world_size})" if trainer.world_size > 1 else ""
        note("time", ", ".join(f"{name} {value:.1f} s" for name, value in spent.items()) + f"; total {seconds:.1f} s")
        cores = cores_per_process(trainer)
        note("bottleneck", bottleneck(spent, seconds, cores, data.workers, on_gpu, gain) + ranks)
    else:
        log.warning("no image could be read: the files have no rows")
    return _summarize(writer, seconds)


def _summarize(writer: FeatureWriter, seconds: float | None) -> int:
    """Print the number of rows, the time and the files, and return the exit status."""
    rows = count(max((record["rows"] for record in writer.records.values()), default=0), "row")
    if seconds is None:
        print(in_job(f"already finished, nothing to do: {rows}"))
    else:
        print(in_job(f"{rows} in {seconds:.1f} s, {writer.computed / max(seconds, 1e-9):.1f} images/s"))
    for layer in writer.records:
        paths = dict.fromkeys(path.parent if writer.shard_rows else path for path in writer.files[layer])
        print(*map(in_job, paths), sep="\n")
    for layer, record in writer.records.items():
        if record["errors"] + record["errors_used"]:
            what = [f"{count(record['errors'], 'image')} could not be read"] if record["errors"] else []
            what += [f"{count(record['errors_used'], 'damaged image')} used anyway"] if record["errors_used"] else []
            path = Path(writer.out_dir) / file_name(layer, "errors.csv")
            print(in_job(f"{rows}, {', '.join(what)}, listed in {path}"))
    return 3 if writer.faults else 0
