"""Processes that decode: batches that shared memory does not take, and that cannot be sent at all."""

import shutil
import subprocess
import sys
import time

import pytest
from conftest import ENV, REPO, loader

from featx.data import workers

SMALL_SHM = """
import os, resource, subprocess, sys
from pathlib import Path
import torch
from conftest import loader

def batches(workers):
    return list(loader(Path(sys.argv[1]), num_workers=workers, batch_size=8)[1])

expected = batches(0)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for options, longest_file in (
    ("size=4m", unlimited),  # room for some batches
    ("size=1m", unlimited),  # for none
    ("size=64m", 500_000),  # room, but not allowed
    ("size=0,ro", unlimited),  # none even for semaphores
):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", "/dev/shm"], check=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (longest_file, unlimited))
    found = batches(4)
    assert os.listdir("/dev/shm") == []
    print(options, sum(batch.groups[0][1].is_shared() for batch in found))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.names == theirs.names and torch.equal(ours.groups[0][1], theirs.groups[0][1])
        assert ours.groups[0][1].stride() == theirs.groups[0][1].stride()
"""


def test_batches_are_the_same_where_shared_memory_holds_some_none_or_not_even_semaphores(photos):
    alone = ["unshare", "-m"]
    if not shutil.which("unshare") or subprocess.run([*alone, "mount", "-t", "tmpfs", "x", "/dev/shm"]).returncode:
        pytest.skip("no /dev/shm can be mounted here")
    env = {**ENV, "PYTHONPATH": f"{REPO}:{REPO / 'tests'}"}
    line = [*alone, sys.executable, "-c", SMALL_SHM, str(photos)]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    some, *none = (int(line.split()[1]) for line in done.stdout.splitlines())
    assert 0 < some < 5 and none == [0, 0, 0], done.stdout
    for why in ("4.19 MB in /dev/shm", "1.05 MB in /dev/shm", "File too large (27)"):
        assert done.stderr.count(f"too small for the batches in flight ({why})") == 1, done.stderr
    assert done.stderr.count("no data workers: they need semaphores in /dev/shm") == 1


FAILING = """
import os, sys
from featx.data import workers
from featx.cli import main

class Unsent:
    def __reduce__(self):
        FAIL

workers.share = lambda images: Unsent()
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("failure", ["raise MemoryError", "sys.exit()", "os.kill(os.getpid(), 9)"])
def test_a_worker_that_cannot_send_its_batch_ends_the_run_in_words(three_photos, tmp_path, failure):
    line = [sys.executable, "-c", FAILING.replace("FAIL", failure), "predict", "--data.dir", str(three_photos)]
    line += ["--model.arch", "squeezenet1_1", "--model.weights", "random", "--model.layer", "classifier"]
    line += ["--data.num_workers", "2", "--data.batch_size", "1", "--writer.out_dir", str(tmp_path)]
    done = subprocess.run(line, env={**ENV, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "featx: error: a process that decodes images died" in done.stderr, done.stderr
    assert "Use fewer --data.num_workers than 2" in done.stderr and "run the same command again" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 12


def test_a_worker_that_does_not_begin_is_forked_again(photos, tmp_path, monkeypatch):
    begin, marker = workers._Worker.run, tmp_path / "stuck"

    def stuck_once(self):
        if not marker.exists():
            marker.touch()
            time.sleep(60)
        begin(self)

    monkeypatch.setattr(workers._Worker, "run", stuck_once)
    monkeypatch.setattr(workers, "PATIENCE", 1.0)
    _, batches = loader(photos, num_workers=1, batch_size=8)
    assert sum(batch.size for batch in batches) == 37 and marker.exists()


def test_workers_that_never_begin_end_the_run(photos, monkeypatch):
    monkeypatch.setattr(workers._Worker, "run", lambda self: time.sleep(60))
    monkeypatch.setattr(workers, "PATIENCE", 0.2)
    with pytest.raises(RuntimeError, match="DataLoader worker exited: three times it did not begin"):
        list(loader(photos, num_workers=1, batch_size=8)[1])
