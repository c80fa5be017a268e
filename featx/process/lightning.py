"""Lightning's Trainer: made for a prediction, or what it refuses in words; inside SLURM without srun, one process.

What featx changes of Lightning, torch and multiprocessing, or uses by a private name, is all here; each place says
why, where it is discussed, and which test fails without it.
"""

import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from multiprocessing.queues import Queue
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, subprocess_script

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
    # There is no public name for how processes are started: test_lightning.py::test_python_may_fork_but_not_spawn
    forked = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
    spawned = forked and trainer.strategy.launcher._start_method != "fork"  # type: ignore[union-attr]
    if not _predicts(type(trainer.strategy)) or (forked and not forks) or spawned:
        raise _no_strategy(given.get("strategy", type(trainer.strategy).__name__))
    return trainer


def keep_signals(trainer: Trainer) -> None:
    """Leave the process's signals as they are: at SIGTERM Lightning's handler takes a note, and the run goes on.

    https://github.com/Lightning-AI/pytorch-lightning/pull/16525;
    tests/process/test_lightning.py::test_signals_and_the_default_dtype_stay_the_processs_own_while_a_trainer_predicts.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def keep_default_dtype(trainer: Trainer) -> None:
    """Leave the default dtype as it is, which plugins of true precisions change for all threads.

    https://github.com/pytorch/pytorch/issues/120819;
    tests/process/test_lightning.py::test_signals_and_the_default_dtype_stay_the_processs_own_while_a_trainer_predicts.
    """
    if isinstance(plugin := trainer.precision_plugin, HalfPrecision | DoublePrecision):
        for name in ("forward_context", "module_init_context", "tensor_init_context"):
            setattr(plugin, name, nullcontext)


def give_children_to(watch: Callable[[list[subprocess.Popen[bytes]]], None]) -> None:
    """Let ``watch`` look after the processes that Lightning starts, which looks every 5 s and kills process 0.

    https://github.com/Lightning-AI/pytorch-lightning/pull/18218;
    tests/writer/test_resume.py::test_a_lost_process_ends_the_others_in_words.
    """
    subprocess_script._launch_process_observer = watch  # type: ignore[assignment, attr-defined]


def report_lost_workers_once() -> None:
    """Print nothing where torch's handler of SIGCHLD raises and nobody can catch it, wherever the main thread is then.

    The loop that waits for batches finds the lost worker all the same: https://github.com/pytorch/pytorch/issues/22136;
    tests/process/test_lightning.py::test_a_lost_worker_is_reported_once.
    """

    def report(unraisable: Any) -> None:
        if "DataLoader worker" not in str(unraisable.exc_value):
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report


def end_at_an_unsent_batch() -> None:
    """End this data worker where a batch cannot be sent: the queue's thread drops it, and the main process waits on.

    https://github.com/python/cpython/issues/84376; Python has the hook for concurrent.futures;
    tests/data/test_workers.py::test_a_worker_that_cannot_send_its_batch_ends_the_run_in_words.
    """
    Queue._on_queue_feeder_error = staticmethod(lambda err, batch: os._exit(1))  # type: ignore[attr-defined]


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
