"""Lightning's Trainer: made for a prediction, or what it refuses in words; inside SLURM without srun, one process."""

import inspect
import os
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from featx.errors import SEE, BadValueError, UserError, did_you_mean, log

PLAIN = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


def make_trainer(make: Callable[..., Trainer], options: Mapping[str, Any], forks: bool = False) -> Trainer:
    """Return a Trainer that can predict.

    Args:
        make: Makes it, with these keywords in addition.
        options: What it will be made of.
        forks: Whether processes may be forks of this one, as in a notebook.

    Raises:
        BadValueError: What is wrong with the options.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(Trainer).parameters.items()} | PLAIN
    given = {name: value for name, value in options.items() if value != defaults.get(name) and value != "auto"}
    _check(given)
    more: dict[str, Any] = {}
    # What Lightning takes for srun is SLURM_NTASKS, which salloc sets too:
    # https://github.com/Lightning-AI/pytorch-lightning/issues/20776
    if "SLURM_NTASKS" in os.environ and "SLURM_PROCID" not in os.environ and not options.get("plugins"):
        more["plugins"] = [LightningEnvironment()]
        if os.environ["SLURM_NTASKS"] != "1" and "LOCAL_RANK" not in os.environ:
            log.info("SLURM: one task of %s, since srun did not start this; srun featx ... starts all of them",
                     os.environ["SLURM_NTASKS"])  # fmt: skip
    try:
        trainer = make(**more)
    except UserError:
        raise
    except Exception as err:
        raise refusal(err, given) from err
    forked = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
    spawned = forked and trainer.strategy.launcher._start_method != "fork"  # type: ignore[union-attr]
    if not _predicts(type(trainer.strategy)) or (forked and not forks) or spawned:
        raise _no_strategy(given.get("strategy", type(trainer.strategy).__name__))
    return trainer


def refusal(err: Exception, given: Mapping[str, Any]) -> UserError:
    """Return what Lightning refuses as a UserError, with the Trainer's options that were given."""
    shown = {name: value for name, value in given.items() if name not in ("callbacks", "plugins")} or given
    told = ", ".join(_option(name, value) for name, value in shown.items()) or "--trainer"
    advice = SEE
    if {"accelerator", "devices"} & given.keys():
        advice = "--trainer.accelerator auto takes a GPU where there is one, else the CPU."
    if "SLURM_NTASKS" in os.environ:
        advice = "Inside SLURM: srun featx predict ... in a job with --ntasks-per-node, as docs/machines.md has it."
    return BadValueError(f"{told}: {textwrap.shorten(str(err), 400, placeholder=' ...')}\n{advice}")


def _check(given: Mapping[str, Any]) -> None:
    if given.get("fast_dev_run"):
        raise BadValueError(
            f"{_option('fast_dev_run', given['fast_dev_run'])}: the files would lack what it leaves out.\n"
            "--writer.dry_run true tries two batches and writes nothing; --data.files LIST takes some of the images."
        )
    strategy = given.get("strategy")
    if isinstance(strategy, str):
        known = StrategyRegistry.available_strategies()
        if strategy not in known or not _predicts(StrategyRegistry[strategy]["strategy"]):
            raise _no_strategy(strategy)
    devices = given.get("devices")
    if devices is not None and str(devices).lstrip("-").isdigit() and int(devices) < 1 and int(devices) != -1:
        raise BadValueError(
            f"{_option('devices', devices)}: expected a whole number of at least 1, -1 for all, or a list in quotes, "
            "'[0,1]'."
        )


def _predicts(kind: Any) -> bool:
    """Whether each process of a strategy has the whole network."""
    return issubclass(kind, DDPStrategy | SingleDeviceStrategy) and not issubclass(kind, DeepSpeedStrategy)


def _no_strategy(strategy: Any) -> UserError:
    near = did_you_mean(str(strategy), ["auto", "ddp"])
    return BadValueError(
        f"{_option('strategy', strategy)}: expected auto or ddp.{near}\n"
        "Each process has to hold the whole network, and to be started by a command of its own, as under ddp."
    )


def _option(name: str, value: Any) -> str:
    word = str(value).lower() if isinstance(value, bool) else getattr(value, "class_path", value)
    return f"--trainer.{name} {textwrap.shorten(str(word), 100, placeholder=' ...')}"
