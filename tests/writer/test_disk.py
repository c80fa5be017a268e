"""A fault at each write, sync, close and rename in turn: told, nothing wrong left behind, and the next run finishes."""

import errno
import itertools
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import make_image
from tiny import run

from featx.writer import disk
from featx.writer.disk import BusyError, DiskError, Lock

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
DOORS = ("write", "sync", "close", "rename", "append_range", "remove")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    for i in range(20):
        make_image(i, (30, 30)).save(folder / f"{i:02}.png")
    (folder / "07.png").write_bytes(b"broken")
    return folder


def count_calls(monkeypatch, fail_at=None):
    """Count what goes through the door; at call number ``fail_at`` the system refuses."""
    calls = []

    def watched(name):
        real = getattr(disk, name)

        def door(*args):
            path = next(arg for arg in args if isinstance(arg, os.PathLike))
            calls.append(name)
            if len(calls) == fail_at:
                with disk.reporting(path):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        return door

    for name in DOORS:
        monkeypatch.setattr(disk, name, watched(name))
    return calls


def results(out):
    return {path.name: path.read_bytes() for path in (*out.glob("2.*"), *out.glob("2/*")) if path.suffix != ".json"}


@pytest.mark.parametrize(
    "format, shard_rows", [("csv", None), (["csv", "npy"], None), (["npy", "parquet"], None), ("npy", 16)], ids=str
)
def test_every_fault_is_reported_and_the_next_run_writes_the_same(photos, tmp_path, format, shard_rows, monkeypatch):
    monkeypatch.setattr(
        "featx.writer.stream.SYNC_SHARE", 1e-9
    )  # syncs at fixed moments, so that every run makes the same calls
    if "parquet" in format:
        pytest.importorskip("pyarrow")
    run(photos, tmp_path / "clean", format=format, shard_rows=shard_rows)
    clean = results(tmp_path / "clean")
    seen = set()
    for number in itertools.count(1 if format == "csv" else 25):  # until then they do the same
        out = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            calls = count_calls(patch, number)
            try:
                run(photos, out, format=format, shard_rows=shard_rows)
                break  # the run has fewer calls than that
            except DiskError as err:
                told = str(err)
                assert err.exit_status == 4
        seen.add(calls[number - 1])
        assert "No space left on device" in told and "run the same command again" in told
        named = results(out)
        for name in named.keys() - {"2.errors.csv"}:
            assert named[name] == clean[name], f"{calls[number - 1]}, call {number}"
        again = run(photos, out, format=format, shard_rows=shard_rows)
        assert results(out) == clean, f"{calls[number - 1]}, call {number}"
        if named.keys() - {"2.errors.csv"}:
            assert again.computed == 0, "with one file named, the others are only named too"
    assert {"write", "sync", "close", "rename", "remove"} <= seen and number > 35


def test_a_write_that_takes_only_a_part_is_continued(tmp_path):
    class Slow:
        def __init__(self):
            self.data = b""

        def write(self, view):
            self.data += bytes(view[:3])
            return min(3, len(view))

    slow = Slow()
    disk.write(slow, tmp_path / "x", b"0123456789")
    assert slow.data == b"0123456789"


@pytest.mark.parametrize("kernel", [True, False])
def test_ranges_are_appended_with_and_without_copy_file_range(tmp_path, monkeypatch, kernel):
    if not kernel:

        def refuse(*args, **kwargs):
            raise OSError(errno.EXDEV, "between two disks")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    (tmp_path / "a").write_bytes(b"0123456789")
    file = disk.open_to_write(tmp_path / "b")
    disk.append_range(file, tmp_path / "b", tmp_path / "a", 2, 5)
    disk.append_range(file, tmp_path / "b", tmp_path / "a", 7, 9)
    with pytest.raises(DiskError, match="ends at byte 10, expected 12"):
        disk.append_range(file, tmp_path / "b", tmp_path / "a", 7, 12)
    disk.close(file, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"23478" + b"789"


def test_a_lock_excludes_other_processes_and_other_runs_of_this_one(tmp_path):
    lock = Lock(tmp_path / "lock", "--writer.out_dir out")
    line = (
        f"from featx.writer.disk import Lock; from pathlib import Path; Lock(Path({str(tmp_path / 'lock')!r}), 'out')"
    )
    for _ in range(2):  # a refusal frees nothing
        with pytest.raises(BusyError, match=r"--writer.out_dir out: another run is writing there"):
            Lock(tmp_path / "lock", "--writer.out_dir out")
        other = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True)
        assert "BusyError" in other.stderr
    lock.release()
    Lock(tmp_path / "lock", "--writer.out_dir out").release()


def test_a_killed_process_releases_its_folder_while_its_worker_lives(tmp_path):
    reading, writing = os.pipe()
    parent = os.fork()
    if not parent:
        lock = Lock(tmp_path / "lock", "out")  # noqa: F841, what nobody holds is released
        worker = os.fork()
        if worker:
            os.write(writing, b"%d" % worker)
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(reading, 20))
    with pytest.raises(BusyError):
        Lock(tmp_path / "lock", "out")
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    Lock(tmp_path / "lock", "out").release()
    os.kill(worker, signal.SIGKILL)  # it was alive


def test_a_link_instead_of_the_lock_file_is_refused(tmp_path):
    (tmp_path / "lock").symlink_to("elsewhere")
    with pytest.raises(DiskError, match="lock"):
        Lock(tmp_path / "lock", "out")
    assert not (tmp_path / "elsewhere").exists()
