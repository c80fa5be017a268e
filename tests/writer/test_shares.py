"""Jobs that come and go write the file of one run: each test does the harm, and compares with that file's bytes."""

import errno
import json
import os
import random
import shutil
import signal
import tarfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import featx, launch, make_image, predict
from start import Process
from tiny import Scale, run

from featx.errors import BadValueError
from featx.writer import callback, disk, join, records, shares, work
from featx.writer.disk import DiskError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

FORMATS = ["csv", "npy", *(["parquet"] if find_spec("pyarrow") else [])]
HOW = [{"format": FORMATS}, {"format": FORMATS, "shard_rows": 16}]
# A command whose jobs are taken for lost after seconds, and that writes down each batch that it computes.
QUICK = """\
import os, runpy, sys
from featx.writer import journal, shares

shares.BEAT, shares.LOST = 0.3, float(os.environ.get("LOST", "2"))
add = journal.Part.add

def add_and_log(self, entry, texts):
    with open(os.environ["LOG"], "a") as log:
        log.write(f"{entry.batch}\\n")
    add(self, entry, texts)

journal.Part.add = add_and_log
exec(os.environ.get("FIRST", ""))
runpy.run_module("featx", run_name="__main__", alter_sys=True)
"""
SLOW = """\
import os, time
from tiny import Scale, Tiny

import torch

class Slow(Tiny):
    def build_network(self):
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), Wait())

class Wait(Scale):
    def forward(self, rows):
        time.sleep(float(os.environ.get("WAIT", "0")))
        return super().forward(rows)
"""
BASE = ("--model", "slow.Slow", "--model.layer", "2", "--data.batch_size", "2", "--data.num_workers", "1",
        "--writer.format", json.dumps(FORMATS))  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with 149 photographs, a slow network and the files of one run."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "slow.py").write_text(SLOW)
    (folder / "tiny.py").symlink_to(Path(__file__).parent.parent / "tiny.py")
    for i in range(149):
        path = folder / "photos" / "abc"[i % 3] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image(i, (40, 30)).save(path)
    predict(folder / "photos", folder / "one", *BASE, cwd=folder)
    predict(folder / "photos", folder / "shards", *BASE, "--writer.shard_rows", "40", cwd=folder)
    return folder


def begin(place: Path, out: Path, shard: str, *args: object, **env: str) -> Process:
    line = ("predict", "--data.dir", "photos", "--writer.out_dir", out, *BASE, "--data.shard", shard, *args)
    return launch(*line, cwd=place, env={"LOG": f"{out}.log", **env}, code=QUICK)


def files(out: Path) -> dict[str, bytes]:
    """Return all files of results but the records, which say who made them."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(".featx") and name != "2.json"}


def computed(out: Path) -> Counter[str]:
    log = Path(f"{out}.log")
    return Counter(log.read_text().split() if log.exists() else ())


def assert_clean(out: Path) -> None:
    assert sorted(path.name for path in (out / ".featx").iterdir()) == ["2", "lock"]
    assert sorted(path.name for path in (out / ".featx" / "2").iterdir()) == ["images.gz"]


def wait_until(what, *processes: Process) -> None:
    deadline = time.monotonic() + 120
    while not what():
        for process in processes:
            assert process.poll() in (None, 0), process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("how", HOW, ids=["files", "shards"])
def test_jobs_in_any_order_write_the_bytes_of_one_run(photos, tmp_path, how):
    run(photos, tmp_path / "one", **how)
    order, total = random.Random(4).sample(range(1, 9), 8), 0
    for place, number in enumerate(order, 1):
        job = run(photos, tmp_path / "jobs", data={"shard": f"{number}/8"}, **how)
        total += job.computed
        left = f"{8 - place} {'is' if place == 7 else 'are'} not"
        assert job.share == (f"share {number} of 8 is done, {left}" if place < 8 else "")
    assert files(tmp_path / "jobs") == files(tmp_path / "one")
    assert total == 37 and job.records["2"]["rows"] == 37
    assert_clean(tmp_path / "jobs")
    assert run(photos, tmp_path / "jobs", data={"shard": "3/8"}, **how).computed == 0
    assert_clean(tmp_path / "jobs")


def test_jobs_read_an_archive_and_a_pattern_that_means_a_folder(photos, tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(photos, "all")
    shutil.copytree(photos, tmp_path / "folder")
    for kind in ("*.tar", "fold*"):
        source, one, out = tmp_path / kind, tmp_path / "one" / kind[:3], tmp_path / "jobs" / kind[:3]
        run(source, one)
        for number in (2, 3, 1):
            job = run(source, out, data={"shard": f"{number}/3"})
        assert job.records["2"]["rows"] == 37 and files(out) == files(one)


@pytest.mark.parametrize("shard", [None, "1/2"])
def test_what_is_noted_of_images_is_kept_for_an_update(photos, tmp_path, monkeypatch, shard):
    monkeypatch.setattr(Scale, "factor", 1e6)  # too much for float16
    photos = shutil.copytree(photos, tmp_path / "photos")
    for data in [{"shard": "2/2"}, {"shard": "1/2"}] if shard else [{}]:
        writer = run(photos, tmp_path / "out", format="npy", dtype="float16", data=data)
    overflowed = writer.records["2"]["values_overflowed"]
    noted = records.read_noted(tmp_path / "out" / ".featx" / "2" / "images.gz")
    assert overflowed and sum(values[1] for values in noted.values()) == overflowed
    make_image(99, (50, 50)).save(photos / "cats" / "new.png")
    update = run(photos, tmp_path / "out", format="npy", dtype="float16", update=True)
    assert update.computed == 1 and update.records["2"]["values_overflowed"] > overflowed


def test_jobs_repair_an_updated_layer(photos, tmp_path):
    photos = shutil.copytree(photos, tmp_path / "photos")
    broken = photos / "cats" / "broken.png"
    run(photos, tmp_path / "out")
    broken.write_bytes(b"")
    run(photos, tmp_path / "out", update=True)
    assert run(photos, tmp_path / "out", data={"shard": "1/2"}).computed == 0  # nothing to do
    make_image(99, (50, 50)).save(broken)
    jobs = [run(photos, tmp_path / "out", data={"shard": shard}) for shard in ("2/2", "1/2")]
    assert sum(job.computed for job in jobs) == 1 and jobs[1].records["2"]["errors"] == 0
    assert_clean(tmp_path / "out")


@pytest.mark.parametrize("how", HOW, ids=["files", "shards"])
def test_one_auto_job_alone_writes_them_too(photos, tmp_path, how):
    run(photos, tmp_path / "one", **how)
    job = run(photos, tmp_path / "auto", data={"shard": "auto"}, **how)
    assert job.computed == 37 and not job.again
    assert files(tmp_path / "auto") == files(tmp_path / "one")
    assert_clean(tmp_path / "auto")


def test_eight_jobs_three_at_a_time(place, tmp_path):
    out, waiting, jobs, told = tmp_path / "out", random.Random(2).sample(range(1, 9), 8), {}, ""
    while waiting or jobs:
        while waiting and len(jobs) < 3:
            number = waiting.pop()
            jobs[number] = begin(place, out, f"{number}/8", WAIT="0.02")
        for number in [number for number, job in jobs.items() if job.poll() is not None]:
            (answer, err), status = jobs[number].communicate(), jobs.pop(number).returncode
            assert status == 0, err
            assert {line.split()[0] for line in (answer + err).splitlines()} == {f"[{number}/8]"}
            told += answer + err
    assert told.count(" is done, ") == 7 and told.count("149 rows in ") == 1
    assert told.count("as another job has listed them") == 7  # nobody else looked for images
    assert files(out) == files(place / "one") and set(computed(out).values()) == {1}
    assert_clean(out)


@pytest.mark.parametrize("number", range(3))
def test_auto_jobs_finish_what_killed_ones_had(place, tmp_path, number):
    kill_and_replace(place, tmp_path / "out", random.Random(number))


@pytest.mark.torture
@pytest.mark.parametrize("number", range(20))
def test_auto_jobs_finish_what_killed_ones_had_many_times(place, tmp_path, number):
    kill_and_replace(place, tmp_path / "out", random.Random(100 + number))


def kill_and_replace(place: Path, out: Path, chance: random.Random) -> None:
    sharded = chance.random() < 0.5
    more = ("--writer.shard_rows", "40") if sharded else ()
    jobs = [begin(place, out, "auto", *more, WAIT="0.05") for _ in range(3)]
    done = chance.randint(1, 40)
    wait_until(lambda: computed(out).total() >= done)
    killed = jobs.pop(chance.randrange(3))
    killed.kill()
    killed.communicate()
    jobs.append(begin(place, out, "auto", *more, WAIT="0.05"))
    for job in jobs:
        _, err = job.communicate()
        assert job.returncode == 0, err
    assert files(out) == files(place / ("shards" if sharded else "one"))
    assert len(computed(out)) == 75 and computed(out).total() - 75 <= 8  # in the queues of the job that was killed
    assert_clean(out)


def test_a_job_of_two_processes_and_another_job(place, tmp_path):
    out, ddp = tmp_path / "out", ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    jobs = [begin(place, out, "auto", *ddp, WAIT="0.05"), begin(place, out, "auto", WAIT="0.5")]
    for job in jobs:
        answer, err = job.communicate()
        assert job.returncode == 0 and "149 rows" in answer, err
    assert files(out) == files(place / "one")
    assert_clean(out)


def test_a_stopped_job_that_wakes_up_changes_nothing(place, tmp_path):
    out = tmp_path / "out"
    stopped = begin(place, out, "1/2", WAIT="0.1")
    wait_until(lambda: computed(out).total() > 4, stopped)
    os.kill(stopped.pid, signal.SIGSTOP)
    first, other = begin(place, out, "1/2", LOST="6"), begin(place, out, "2/2")
    other.communicate()
    _, err = first.communicate()  # it waits until the stopped one is taken for lost
    assert first.returncode == 0 and "waiting: process " in err, err
    finished = {path: path.stat().st_mtime_ns for path in out.glob("2.*")}
    assert files(out) == files(place / "one")
    os.kill(stopped.pid, signal.SIGCONT)
    answer, err = stopped.communicate()
    assert stopped.returncode == 0 and "149 rows in " in answer, err
    assert {path: path.stat().st_mtime_ns for path in out.glob("2.*")} == finished
    assert files(out) == files(place / "one")
    again = predict("photos", out, *BASE, cwd=place)
    assert "already finished, nothing to do: 149 rows" in again.stdout
    assert_clean(out)


def test_a_run_is_refused_while_a_job_lives_and_a_job_while_a_run_does(place, tmp_path):
    out = tmp_path / "out"
    job = begin(place, out, "1/2", WAIT="0.3")
    wait_until(lambda: (out / ".featx" / "shares" / "plan.json").exists(), job)
    refused = featx("predict", "--data.dir", "photos", "--writer.out_dir", out, *BASE, cwd=place)
    assert refused.returncode == 2 and "another run is writing there" in refused.stderr
    job.kill()
    job.communicate()
    lock = disk.Lock(out / ".featx" / "lock", "here")
    refused = begin(place, out, "1/2")
    _, err = refused.communicate()
    assert refused.returncode == 2 and "[1/2] featx: error: " in err and "another run is writing there" in err
    lock.release()
    predict("photos", out, *BASE, cwd=place)  # heeds no claim
    assert files(out) == files(place / "one")
    assert_clean(out)


def test_two_hosts_whose_clocks_are_an_hour_apart(place, tmp_path):
    out = tmp_path / "shared" / "out"
    (tmp_path / "elsewhere").mkdir()
    out.parent.mkdir()
    other = f"""
import ctypes, socket, subprocess, time
if ctypes.CDLL(None, use_errno=True).unshare(0x04000000 | 0x00020000):
    sys.exit(77)
socket.sethostname("other")
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "--bind", {str(out.parent)!r}, {str(tmp_path / "elsewhere")!r}], check=True)
clock = time.time
time.time = lambda: clock() + 3600
"""
    there = begin(place, tmp_path / "elsewhere" / "out", "auto", WAIT="0.05", FIRST=other, LOG=f"{out}.log")
    here = begin(place, out, "auto", WAIT="0.05")
    for process in (there, here):
        answer, err = process.communicate()
        if process.returncode == 77:
            here.kill()
            pytest.skip("no namespaces can be made here")
        assert process.returncode == 0 and "149 rows in " in answer, err
    assert files(out) == files(place / "one") and set(computed(out).values()) == {1}


@pytest.mark.parametrize(("shard", "words"), [
    ("0/64", "shares are counted from 1. Expected 1/64 to 64/64, or auto."),
    ("65/64", "shares are counted from 1. Expected 1/64 to 64/64, or auto."),
    ("3/0", "expected 3/64, or auto."),
    ("x", "expected 3/64, or auto."),
    ("-1/4", "expected 3/64, or auto."),
])  # fmt: skip
def test_a_share_that_cannot_be_is_refused(photos, tmp_path, shard, words):
    with pytest.raises(BadValueError) as refused:
        run(photos, tmp_path, data={"shard": shard})
    assert str(refused.value) == f"--data.shard {shard}: {words}"


def test_a_job_of_another_run_is_refused(photos, tmp_path):
    out = tmp_path / "out"
    run(photos, out, data={"shard": "1/2"})
    for words, how in {
        "names: basename -> relative": {"names": "relative"},
        "crop: 224 -> 100": {"data": {"crop": 100}},
        "--writer.format npy": {"format": "npy"},
        "would remove the others' rows": {"overwrite": True},
    }.items():
        data = {"shard": "2/2"} | how.pop("data", {})
        with pytest.raises(BadValueError, match=words):
            run(photos, out, data=data, **how)
    make_image(99, (50, 50)).save(tmp_path / "new.png")
    with pytest.raises(BadValueError, match="added, 37 images removed"):
        run(tmp_path, out, data={"shard": "2/2", "exclude": None})
    run(photos, out, data={"shard": "2/2"})
    assert_clean(out)


def test_images_are_listed_per_share_and_in_all_by_the_job_that_joins(place, tmp_path):
    photos = tmp_path / "photos"
    for i in range(30):
        path = photos / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"" if i == 12 else (place / "photos" / "a" / "000.png").read_bytes())
    assert [run(photos, tmp_path / "out", data={"shard": f"{n}/3", "batch_size": 2}).faults for n in (2, 1, 3)] == [
        1,
        0,
        1,
    ]
    errors = (tmp_path / "out" / "2.errors.csv").read_text()
    (photos / "12.png").write_bytes((photos / "11.png").read_bytes())  # repaired: its share is left to do
    jobs = [run(photos, tmp_path / "out", data={"shard": f"{n}/3", "batch_size": 2}) for n in (3, 1, 2)]
    assert [job.computed for job in jobs] == [0, 0, 2] and "12.png" in errors
    assert jobs[2].records["2"]["rows"] == 30 and not (tmp_path / "out" / "2.errors.csv").exists()


@pytest.mark.parametrize("next_job", ["1/2", "auto", None])
@pytest.mark.parametrize("step", range(12))
def test_a_join_that_is_cut_off_anywhere_is_finished_by_any_other(photos, tmp_path, monkeypatch, next_job, step):
    options = {"format": ["csv", "npy"], "shard_rows": 24}
    run(photos, tmp_path / "one", **options)
    run(photos, tmp_path / "out", data={"shard": "2/2"}, **options)
    steps = iter(range(step + 1))
    real = {name: getattr(disk, name) for name in ("rename", "remove", "open_to_write")}

    def cut_off(name, *args, **how):
        if next(steps, None) is None:
            raise DiskError("cut off")
        return real[name](*args, **how)

    with monkeypatch.context() as patch:

        def break_from_here(*args, **how):
            for name in real:
                patch.setattr(disk, name, lambda *args, name=name, **how: cut_off(name, *args, **how))
            return join.finish(*args, **how)

        patch.setattr(work, "finish", break_from_here)
        with pytest.raises(DiskError, match="cut off"):
            run(photos, tmp_path / "out", data={"shard": "1/2"}, **options)
    run(photos, tmp_path / "out", data={"shard": next_job}, **options)
    assert files(tmp_path / "out") == files(tmp_path / "one")
    assert_clean(tmp_path / "out")


def test_rows_from_another_kind_of_device_are_reported_or_refused(photos, tmp_path, monkeypatch, caplog):
    run(photos, tmp_path, data={"shard": "1/2"})
    monkeypatch.setattr(callback, "device_name", lambda device: "Other")
    with pytest.raises(
        BadValueError, match=r"--writer.same_device true: the first job started on .*, and this is Other"
    ):
        run(photos, tmp_path, data={"shard": "2/2"}, same_device=True)
    assert run(photos, tmp_path, data={"shard": "2/2"}).records
    assert "on Other last digits may differ" in caplog.text


def test_a_share_without_a_batch_is_done_at_once(photos, tmp_path):
    for number in range(1, 9):
        job = run(photos, tmp_path, data={"shard": f"{number}/8", "batch_size": 16})
    assert job.computed == 0 and job.records["2"]["rows"] == 37


def test_a_part_that_is_damaged_after_its_share_was_done_is_computed_again(photos, tmp_path):
    run(photos, tmp_path / "one")
    run(photos, tmp_path / "out", data={"shard": "1/2"})
    (part,) = (tmp_path / "out").glob(".featx/2/*.csv")
    part.write_bytes(part.read_bytes()[:-5])
    assert run(photos, tmp_path / "out", data={"shard": "2/2"}).computed == 37 - 24 + 8
    assert files(tmp_path / "out") == files(tmp_path / "one")


def test_a_file_system_that_fails_now_and_then_or_has_no_locks_stops_no_job(photos, tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    run(photos, tmp_path, data={"shard": "1/2"})
    assert "no locks on its file system" in caplog.text
    job = shares.Shares(tmp_path / ".featx", "2/2")
    job.enter(1)
    assert job.heartbeat.now() > 0
    with monkeypatch.context() as patch:
        patch.setattr("os.utime", lambda *args: refuse())
        assert job.heartbeat.now() == 0 and not job.gone and not job.is_lost("list", 1)
    assert job.heartbeat.now() > 0
    job.leave()


def test_a_claim_is_exclusive_and_passes_on_when_its_job_has_left_or_is_late(tmp_path, monkeypatch):
    first, second, third = (shares.Shares(tmp_path, "1/2") for _ in range(3))
    for job in (first, second, third):
        job.enter(5)
    assert first.publish(shares.PLAN, b"{}") and not second.publish(shares.PLAN, b"{}")
    assert (first.job, second.job > first.job, third.job > second.job) == (5, True, True)
    assert first.claim(first.name(1)) == (first.name(1), 1, ()) and second.claim(first.name(1)) is None
    first.leave()
    assert second.claim(first.name(1)) == (first.name(1), 2, (first.job,)) and third.claim(first.name(1)) is None
    os.utime(second.heartbeat.path, (1, os.stat(second.heartbeat.path).st_mtime - shares.LOST - 1))
    assert third.claim(first.name(1)) == (first.name(1), 3, (first.job, second.job))
    for job in (second, third):
        job.leave()
