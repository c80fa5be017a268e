"""Which Trainers are made, and what is said of those that are not."""

import signal
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

import featx
from featx.errors import BadValueError
from featx.process.lightning import PLAIN, keep_default_dtype, keep_signals, make_trainer, report_lost_workers_once


def made(forks: bool = False, **options: object) -> Trainer:
    return make_trainer(partial(Trainer, **PLAIN, **options), options, forks)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "dpp"}, "--trainer.strategy dpp: expected auto or ddp. Did you mean ddp?"),
        ({"strategy": "ddp_spawn"}, "--trainer.strategy ddp_spawn: expected auto or ddp."),
        ({"strategy": "ddp_fork"}, "--trainer.strategy ddp_fork: expected auto or ddp."),
        ({"strategy": "ddp_notebook"}, "--trainer.strategy ddp_notebook: expected auto or ddp."),
        ({"strategy": DDPStrategy(start_method="spawn")}, "expected auto or ddp."),
        ({"strategy": "fsdp"}, "--trainer.strategy fsdp: expected auto or ddp."),
        ({"strategy": "deepspeed"}, "--trainer.strategy deepspeed: expected auto or ddp."),
        ({"fast_dev_run": True}, "--trainer.fast_dev_run true: rows would be missing"),
        ({"devices": 0}, "--trainer.devices 0: expected a whole number of at least 1, -1 for all"),
        ({"devices": "0"}, "--trainer.devices 0: expected a whole number of at least 1"),
        ({"accelerator": "gup"}, "--trainer.accelerator gup: "),
        ({"num_nodes": 0}, "--trainer.num_nodes 0: "),
        ({"profiler": "nope"}, "--trainer.profiler nope: "),
        ({"max_time": "soon"}, "--trainer.max_time soon: "),
    ],
)
def test_what_cannot_predict_is_refused_with_the_option_that_asks_for_it(options, said):
    with pytest.raises(BadValueError) as caught:
        made(**options)
    assert said in str(caught.value) and len(str(caught.value).splitlines()) <= 4


def test_advice_about_the_accelerator_is_given_only_where_it_was_chosen():
    with pytest.raises(BadValueError) as caught:
        made(max_time="soon")
    assert "accelerator" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError, KeyError, AttributeError])
def test_whatever_lightning_raises_is_a_message(error):
    def fail() -> Trainer:
        raise error("no such thing")

    with pytest.raises(BadValueError, match=r"--trainer.benchmark true: .*no such thing"):
        make_trainer(fail, {"benchmark": True})


def test_python_may_fork_but_not_spawn(photos):
    assert made(forks=True, strategy="ddp_fork", devices=2).world_size == 2
    with pytest.raises(ValueError, match="ddp_spawn"):
        featx.extract(str(photos), strategy="ddp_spawn")


@pytest.mark.parametrize("tasks", ["1", "4"])
def test_inside_salloc_without_srun_it_is_one_process(tasks, monkeypatch, caplog):
    for name, value in {"SLURM_NTASKS": tasks, "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x"}.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level("INFO"):
        trainer = made(devices=2, strategy="ddp")
    assert trainer.world_size == 2 and trainer.strategy.launcher is not None  # it starts both itself
    assert ("one task of 4" in caplog.text) == (tasks == "4")


def test_a_batch_script_without_srun_is_sent_to_srun(monkeypatch):
    for name in ("SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(BadValueError, match="srun featx predict"):
        made()


def test_a_lost_worker_is_reported_once(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", None)
    monkeypatch.setattr(sys, "__unraisablehook__", heard.append)
    report_lost_workers_once()
    lost, other = (SimpleNamespace(exc_value=RuntimeError(words)) for words in ("DataLoader worker (pid 7) ...", "no"))
    sys.unraisablehook(lost)
    sys.unraisablehook(other)
    assert heard == [other]


def test_signals_and_the_default_dtype_stay_the_processs_own_while_a_trainer_predicts():
    class Model(LightningModule):
        def predict_step(self, batch):
            return signal.getsignal(signal.SIGTERM), torch.get_default_dtype()

    trainer = made(accelerator="cpu", devices=1, precision="bf16-true")
    before = signal.getsignal(signal.SIGTERM), torch.get_default_dtype()
    keep_signals(trainer)
    keep_default_dtype(trainer)
    assert trainer.predict(Model(), torch.utils.data.DataLoader([0.0])) == [before]
