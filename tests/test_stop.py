"""Signals, each sent to a process of its own: what it ends with, and how."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import REPO

PROGRAM = """
import os, signal, sys
from featx.stop import Stopped, listen
listen()
try:
    os.kill(os.getpid(), int(sys.argv[1]))
except Stopped as stop:
    if len(sys.argv) > 2:
        os.kill(os.getpid(), int(sys.argv[2]))
        print("still here")
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


def test_the_signal_before_a_requeue_stops_as_sigterm_does_under_slurm_only():
    assert status(signal.SIGUSR1, SLURM_JOB_ID="7") == 143
    assert status(signal.SIGUSR1) == -signal.SIGUSR1
