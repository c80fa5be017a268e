"""Lightning's Trainer, made for prediction, with its errors as messages.

All of featx's changes to Lightning, torch and multiprocessing, and all uses of their private names, are here; each says
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
from torch.utils._python_dispatch import TorchDispatchMode

from featx.errors import SEE, BadValueError, UserError, did_you_mean, log

NOTHING_TO_COMPUTE = "Total length of .DataLoader. across ranks is zero"  # a warning: an update may only remove rows
PLAIN = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


def make_trainer(make: Callable[..., Trainer], options: Mapping[str, Any], forks: bool = False) -> Trainer:
    """Return a Trainer that can predict.

    Args:
        make: Makes the Trainer; takes further keywords.
        options: The Trainer's options, already known to ``make``.
        forks: Allow strategies that fork this process, as in a notebook.

    Raises:
        BadValueError: The options are wrong.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(Trainer).parameters.items()} | PLAIN
    given = {name: value for name, value in options.items() if value != defaults.get(name) and value != "auto"}
    _check(given)
    more: dict[str, Any] = {}
    # Lightning concludes from SLURM_NTASKS that srun started it, but salloc sets it too:
    # https://github.com/Lightning-AI/pytorch-lightning/issues/20776
    if "SLURM_NTASKS" in os.environ and "SLURM_PROCID" not in os.environ and not options.get("plugins"):
        more["plugins"] = [LightningEnvironment()]
        if os.environ["SLURM_NTASKS"] != "1" and "LOCAL_RANK" not in os.environ:
            log.info("SLURM: running as one task of %s; to start all of them, run srun featx ...",
                     os.environ["SLURM_NTASKS"])  # fmt: skip
    try:
        trainer = make(**more)
    except UserError:
        raise
    except Exception as err:
        raise refusal(err, given) from err
    # The start method has no public name: test_lightning.py::test_python_may_fork_but_not_spawn
    forked = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
    spawned = forked and trainer.strategy.launcher._start_method != "fork"  # type: ignore[union-attr]
    if not _predicts(type(trainer.strategy)) or (forked and not forks) or spawned:
        raise _no_strategy(given.get("strategy", type(trainer.strategy).__name__))
    return trainer


def keep_signals(trainer: Trainer) -> None:
    """Keep the process's signal handlers: Lightning's own only sets a flag at SIGTERM, and the run continues.

    https://github.com/Lightning-AI/pytorch-lightning/pull/16525;
    tests/process/test_lightning.py::test_signals_and_the_default_dtype_stay_the_processs_own_while_a_trainer_predicts.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def keep_default_dtype(trainer: Trainer) -> None:
    """Keep the default dtype, which the plugins of true precisions change for all threads.

    https://github.com/pytorch/pytorch/issues/120819;
    tests/process/test_lightning.py::test_signals_and_the_default_dtype_stay_the_processs_own_while_a_trainer_predicts.
    """
    if isinstance(plugin := trainer.precision_plugin, HalfPrecision | DoublePrecision):
        for name in ("forward_context", "module_init_context", "tensor_init_context"):
            setattr(plugin, name, nullcontext)


def give_children_to(watch: Callable[[list[subprocess.Popen[bytes]]], None]) -> None:
    """Let ``watch`` supervise the processes that Lightning starts: its own observer kills rank 0 after up to 5 s.

    https://github.com/Lightning-AI/pytorch-lightning/pull/18218;
    tests/writer/test_resume.py::test_a_lost_process_ends_the_others_in_words.
    """
    subprocess_script._launch_process_observer = watch  # type: ignore[assignment, attr-defined]


def report_lost_workers_once() -> None:
    """Silence torch's SIGCHLD handler where its exception cannot be caught.

    The loop that waits for batches reports the lost worker anyway: https://github.com/pytorch/pytorch/issues/22136;
    tests/process/test_lightning.py::test_a_lost_worker_is_reported_once.
    """

    def report(unraisable: Any) -> None:
        if "DataLoader worker" not in str(unraisable.exc_value):
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report


def end_at_an_unsent_batch() -> None:
    """End this data worker if a batch cannot be sent: the queue would drop it, and the main process wait forever.

    https://github.com/python/cpython/issues/84376; Python has the hook for concurrent.futures;
    tests/data/test_workers.py::test_a_worker_that_cannot_send_its_batch_ends_the_run_in_words.
    """
    Queue._on_queue_feeder_error = staticmethod(lambda err, batch: os._exit(1))  # type: ignore[attr-defined]


class DispatchMode(TorchDispatchMode):
    """Receives torch's operations on this thread; ``__torch_dispatch__`` stays unwrapped.

    The wrapper imports torch._dynamo, which takes 1.9 s:
    https://docs.pytorch.org/docs/stable/notes/extending.html#extending-all-torch-api-with-modes;
    tests/process/test_start.py::test_a_run_imports_none_of_the_ballast.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def refusal(err: Exception, given: Mapping[str, Any]) -> UserError:
    """Return an error of Lightning's as a UserError that names the Trainer's options given."""
    shown = {name: value for name, value in given.items() if name not in ("callbacks", "plugins")} or given
    options = ", ".join(_option(name, value) for name, value in shown.items()) or "--trainer"
    advice = SEE
    if {"accelerator", "devices"} & given.keys():
        advice = "--trainer.accelerator auto uses a GPU if there is one, else the CPU."
    if "SLURM_NTASKS" in os.environ:
        advice = "Inside SLURM, use srun featx predict ... in a job with --ntasks-per-node (see docs/machines.md)."
    return BadValueError(f"{options}: {textwrap.shorten(str(err), 400, placeholder=' ...')}\n{advice}")


def _check(given: Mapping[str, Any]) -> None:
    if given.get("fast_dev_run"):
        raise BadValueError(
            f"{_option('fast_dev_run', given['fast_dev_run'])}: rows would be missing from the files.\n"
            "Use --writer.dry_run true to try two batches and write nothing, or --data.files LIST to select images."
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
    """Whether a strategy gives each process the whole network."""
    return issubclass(kind, DDPStrategy | SingleDeviceStrategy) and not issubclass(kind, DeepSpeedStrategy)


def _no_strategy(strategy: Any) -> UserError:
    near = did_you_mean(str(strategy), ["auto", "ddp"])
    return BadValueError(
        f"{_option('strategy', strategy)}: expected auto or ddp.{near}\n"
        "Each process needs the whole network and its own command, as with ddp."
    )


def _option(name: str, value: Any) -> str:
    word = str(value).lower() if isinstance(value, bool) else getattr(value, "class_path", value)
    return f"--trainer.{name} {textwrap.shorten(str(word), 100, placeholder=' ...')}"
