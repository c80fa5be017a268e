"""``featx predict``: LightningCLI wired to the three classes, all checks before the first batch, and the last words."""

import logging
import os
import sys
import textwrap
import warnings
from contextlib import suppress
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from featx import options
from featx.datamodule import ImageFolderDataModule
from featx.extractor import FeatureExtractor
from featx.messages import UserError, count, log, rank
from featx.progress import Progress
from featx.writer import FeatureWriter


class FeatxCLI(LightningCLI):
    """LightningCLI without what prediction has no use for."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the writer's options, and the default class of the model."""
        parser.add_lightning_class_args(FeatureWriter, "writer")
        parser.set_defaults({"model": {"class_path": "featx.FeatureExtractor"}})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line, the configs first wherever they stand on it."""
        assert isinstance(args, list)
        for word, behind in zip(args, [*args[1:], ""], strict=True):
            if word == "--model" or word.startswith("--model="):
                with suppress(Exception):  # what is wrong with the class, parsing tells
                    # Else the defaults of FeatureExtractor would stand where the class has its own.
                    parser.set_defaults({"model": {"class_path": word.partition("=")[2] or behind}})
        self.config = parser.parse_args(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; what it refuses is a mistake in the ``--trainer`` options."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError, ImportError) as err:
            raise self.refusal(err) from err

    def refusal(self, err: Exception) -> UserError:
        """Return what Lightning refuses as a UserError, with the ``--trainer`` options it was given."""
        names = ("accelerator", "devices", "num_nodes", "strategy", "precision")
        default = {"num_nodes": 1, "precision": None}
        given = [f"--trainer.{name} {self.config.trainer[name]}" for name in names
                 if self.config.trainer[name] != default.get(name, "auto")]  # fmt: skip
        return UserError(
            f"{', '.join(given)}: {textwrap.shorten(str(err), 400, placeholder=' …')}\n"
            "Expected what this machine has: --trainer.accelerator auto takes a GPU where there is one, else the CPU."
        )


def predict(argv: list[str]) -> None:
    """Run ``featx predict`` with these options.

    Raises:
        UserError: A mistake in them.
        KeyboardInterrupt: The user ended the run.
    """
    sys.path.append(os.getcwd())  # for --model my_module.MyExtractor
    if "--help_all" in argv:
        argv = ["--help"]
    elif "-h" in argv or "--help" in argv:
        options.print_help(FeatureExtractor, ImageFolderDataModule, FeatureWriter)
        return
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # banners and tips
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
        trainer_defaults={
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "callbacks": [progress],
        },
    )
    writer: FeatureWriter = cli.config_init.writer
    _check(cli.model, cli.datamodule, writer)
    try:
        cli.trainer.predict(cli.model, datamodule=cli.datamodule, return_predictions=False)
    except BaseException as err:
        if cli.trainer.strategy.launcher is not None:
            cli.trainer.strategy.launcher.kill(15)  # Lightning leaves the other ranks waiting for this one
        if isinstance(progress.error, KeyboardInterrupt):
            raise KeyboardInterrupt from None  # which Lightning turns into SystemExit(1)
        if isinstance(err, MisconfigurationException):
            raise cli.refusal(err) from err
        raise
    if cli.trainer.is_global_zero:
        rate = writer.rows / progress.seconds
        print(f"{writer.rows:,} rows in {progress.seconds:.1f} s, {rate:.1f} images/s")
        for file in writer.files.values():
            print(file)


def _check(model: FeatureExtractor, data: ImageFolderDataModule, writer: FeatureWriter) -> None:
    """Find every mistake that can be found before the first batch, the cheap ones first, a download last."""
    try:
        writer.check()
        data.check()
        model.check()
        data.setup()
        model.configure_model()
        log.info("preprocessing: %s", data.preprocessing(model.preprocessing))
        columns = model.try_out(data.first_batch(model.preprocessing))
        layers = [f"{layer}{f' = {path}' if path != layer else ''}, {count(columns[layer], 'column')}"
                  for layer, path in model.layers.items()]  # fmt: skip
        log.info("%s: %s", "layers" if len(layers) > 1 else "layer", "; ".join(layers))
    except UserError:
        if rank() and {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys():
            sys.exit(2)  # rank 0 makes the same checks and says it
        raise
