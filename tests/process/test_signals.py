"""Signals, each sent to a process of its own: what it ends with, and how."""

import os
import re
import signal
import socket
import subprocess
import sys
from itertools import takewhile
from queue import Queue
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, launch
from start import FEATX

from featx.process.signals import INTERRUPTED, SIGNALS, Watch
from featx.run import FailedError, explain

PROGRAM = """
import os, signal, sys, time
from featx.process.signals import TWICE, Stopped, listen
listen()
try:
    os.kill(os.getpid(), int(sys.argv[1]))
except Stopped as stop:
    if len(sys.argv) > 2:
        time.sleep(TWICE + 0.1)
        os.kill(os.getpid(), int(sys.argv[2]))
        print("still here", flush=True)
    os._exit(stop.exit_status)
"""


def status(*signals: int, **env: str) -> int:
    line = [sys.executable, "-c", PROGRAM, *map(str, map(int, signals))]
    done = subprocess.run(line, env={**os.environ, "PYTHONPATH": str(REPO), **env}, capture_output=True, text=True)
    assert "still here" not in done.stdout and "Traceback" not in done.stderr
    return done.returncode


@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_and_a_second_one_ends_at_once(sent, expected):
    assert status(sent) == expected
    assert status(sent, signal.SIGINT) == 130


def test_a_signal_that_timeout_sends_to_a_process_and_its_group_is_one():
    code = PROGRAM.replace("time.sleep(TWICE + 0.1)", "")
    line = [sys.executable, "-c", code, str(int(signal.SIGTERM)), str(int(signal.SIGTERM))]
    done = subprocess.run(line, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    assert done.returncode == 143 and done.stdout == "still here\n", done.stderr


def test_the_signal_before_a_requeue_stops_as_sigterm_does_under_slurm_only():
    assert status(signal.SIGUSR1, SLURM_JOB_ID="7") == 143
    assert status(signal.SIGUSR1) == -signal.SIGUSR1


@pytest.mark.parametrize(("sent", "node", "expected"), [(signal.SIGTERM, "0", 143), (signal.SIGINT, "1", 130)])
def test_a_machine_that_waits_for_another_says_so_and_ends_at_a_signal(three_photos, tmp_path, sent, node, expected):
    line = ["predict", "--data.dir", three_photos, "--writer.out_dir", tmp_path / "out"]
    line += ["--model.arch", "squeezenet1_1", "--model.weights", "random", "--model.layer", "classifier"]
    line += ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices", "1"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    env = {"NODE_RANK": node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    line += ["--trainer.num_nodes", "2"]
    at_once = "from featx.process import signals; signals.NOTICES = (0.0, 30.0)"  # not after 10 s
    process = launch(*line, cwd=tmp_path, env=env, code=f"{at_once}; {FEATX}")
    try:
        told = list(takewhile(lambda text: not text.startswith("waiting"), process.stderr))
        assert process.poll() is None, told
        os.kill(process.pid, sent)
        _, rest = process.communicate(timeout=20)  # which is what is promised
    finally:
        process.kill()
    assert process.returncode == expected and rest.splitlines() == [INTERRUPTED], rest


def test_what_is_waited_for_is_told_with_how_many_machines_and_where(monkeypatch):
    monkeypatch.setattr("featx.process.signals.NOTICES", (0.0, 1000.0))
    for machines, words in ((1, "the other processes"), (2, "1 of 2 machines"), (5, "up to 4 of 5 machines")):
        heard: Queue[str] = Queue()
        watch = Watch(heard.put)
        try:
            watch.wait_for_others(machines, "host0:29500", heard.put)
            assert heard.get(timeout=60) == f"waiting for {words} at host0:29500"
        finally:
            signal.set_wakeup_fd(-1)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            watch.connect(0, 1)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (BlockingIOError(11, "Resource temporarily unavailable"), "allows no more processes, threads or open files"),
        (RuntimeError("can't start new thread"), "allows no more processes, threads or open files"),
        (
            RuntimeError("DataLoader worker (pid 7) exited unexpectedly. Details"),
            r"\(pid 7\) exited unexpectedly\nUse",
        ),
        (torch.distributed.DistStoreError("Timed out after 1801 seconds"), "other machines did not connect: Timed out"),
    ],
)
def test_failures_of_the_machine_get_a_message(error, words, monkeypatch):
    monkeypatch.setattr("featx.run.time", SimpleNamespace(sleep=lambda seconds: None))
    found = explain(error, SimpleNamespace(world_size=2), SimpleNamespace(workers=4))
    assert isinstance(found, FailedError) and re.search(words, str(found)) and "the same command again" in str(found)
