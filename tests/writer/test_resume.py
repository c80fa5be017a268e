"""Never lose a row, never write a wrong one: each test does the harm, and compares with the clean run's bytes."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from conftest import featx, launch, make_image, on_two_machines, predict
from start import Process

from featx.commands.verify import check_file
from featx.results import load

DDP = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
# A network that takes its time, so that there is a middle to be killed in, and whose rows are long.
SLOW = """\
import os
import time

import torch

from featx import FeatureExtractor


class Slow(FeatureExtractor):
    def build_network(self):
        torch.manual_seed(4)
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), Wait(192, 600))


class Steps(FeatureExtractor):
    def build_network(self):
        torch.manual_seed(4)
        return Twice()


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.step, self.relu = torch.nn.AdaptiveAvgPool2d(8), Wait(192, 192), torch.nn.ReLU(inplace=True)
        self.lstm = torch.nn.LSTM(8, 40, batch_first=True)

    def forward(self, images):
        rows = self.pool(images).flatten(1)
        for _ in range(2):
            rows = self.relu(self.step(rows))
        return self.lstm(rows.unflatten(1, (-1, 8)))


class Wait(torch.nn.Linear):
    def forward(self, rows):
        time.sleep(float(os.environ.get("WAIT", "0")))
        return super().forward(rows)
"""
FORMATS = ["csv", "npy", *(["parquet"] if find_spec("pyarrow") else [])]  # every promise holds for each of them
FILES = ["2.csv", "2.json", "2.names.txt", "2.npy", *(["2.parquet"] if "parquet" in FORMATS else [])]
BASE = ("--model", "slow.Slow", "--model.layer", "2", "--data.batch_size", "2", "--writer.format", json.dumps(FORMATS))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with 150 photographs, a module and a clean run's rows of them."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "slow.py").write_text(SLOW)
    for i in range(150):
        path = folder / "photos" / "abc"[i % 3] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image(i, (40, 30)).save(path)
    predict(folder / "photos", folder / "clean", *BASE, cwd=folder)
    return folder


def begin(place: Path, out: Path, *args: object, wait: float = 0.05) -> Process:
    """Start a run in a process group of its own, whose batches take ``wait`` seconds at least."""
    line = ("predict", "--data.dir", "photos", "--writer.out_dir", out, *BASE, *args)
    return launch(*line, cwd=place, env={"WAIT": str(wait)})


def lines_in_journals(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob(".featx/**/*.journal"))


def wait_for_rows(process: Process, out: Path, batches: int = 3) -> None:
    """Wait until some batches of this run are on disk."""
    deadline = time.monotonic() + 120
    before = lines_in_journals(out)
    while lines_in_journals(out) < before + batches + 1:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end(process: Process, how: signal.Signals, group: bool = True) -> tuple[int, str]:
    (os.killpg if group else os.kill)(process.pid, how)
    _, told = process.communicate(timeout=90)
    return process.returncode, told


def assert_same_as_clean(place: Path, out: Path) -> None:
    assert sorted(path.name for path in out.iterdir()) == [".featx", *FILES]
    for name in FILES:
        assert name == "2.json" or (out / name).read_bytes() == (place / "clean" / name).read_bytes(), name
    assert sorted(path.name for path in (out / ".featx" / "2").iterdir()) == ["images.gz"]


def finish(place: Path, out: Path, *args: object, run: Callable[..., CompletedProcess[str]] = featx) -> None:
    done = run("predict", "--data.dir", "photos", "--writer.out_dir", out, *BASE, *args, cwd=place)
    assert done.returncode == 0 and "2: continuing, " in done.stderr, done.stderr
    assert_same_as_clean(place, out)


@pytest.mark.parametrize("seed", [1])
def test_kill_9_at_any_moment_costs_nothing_but_the_batches_in_flight(place, tmp_path, seed):
    kill_and_finish(place, tmp_path, random.Random(seed), 3)


def test_kill_9_while_a_table_is_read_and_its_end_by_two_processes(place, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import table

    paths = sorted((place / "photos").glob("*/*.png"))
    columns = {"image": [path.read_bytes() for path in paths], "path": [path.name for path in paths]}
    columns["label"] = [path.parent.name for path in paths]
    parquet.write_table(table(columns), tmp_path / "photos.parquet", row_group_size=7)
    options = ("--data.dir", tmp_path / "photos.parquet")  # of the two, the last counts
    process = begin(place, tmp_path / "out", *options)
    wait_for_rows(process, tmp_path / "out", 30)
    end(process, signal.SIGKILL)
    finish(place, tmp_path / "out", *options, *DDP)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(5))
def test_kill_9_many_times(place, tmp_path, seed):
    kill_and_finish(place, tmp_path, random.Random(100 + seed), 4, *(DDP if seed % 2 else ()))


def kill_and_finish(place: Path, out: Path, chance: random.Random, kills: int, *args: object) -> None:
    for _ in range(kills):
        process = begin(place, out, *args)
        wait_for_rows(process, out, 1)
        time.sleep(chance.uniform(0, 0.8))
        assert not any((out / name).exists() for name in FILES)
        end(process, signal.SIGKILL)
    finish(place, out, *args)


def test_calls_and_members_reduced_and_scaled_are_the_same_after_a_kill_on_two_processes(place, tmp_path):
    line = ("--model", "slow.Steps", "--model.layer", '["step:all","relu:1","lstm#0"]')
    line += ("--model.reduce", "150", "--model.normalize", "true")
    predict(place / "photos", tmp_path / "clean", *BASE, *line, cwd=place)
    process = begin(place, tmp_path / "out", *line, *DDP)
    wait_for_rows(process, tmp_path / "out", 20)  # of two processes and four layers, each with a first line
    end(process, signal.SIGKILL)
    assert "relu:1: continuing, " in predict(place / "photos", tmp_path / "out", *BASE, *line, *DDP, cwd=place).stderr
    stems = {"step%3A1": 150, "step%3A2": 150, "relu%3A1": 150, "lstm%230": 150}
    names = [f"{stem}.{suffix}" for stem in stems for suffix in ("names.txt", *FORMATS)]
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "clean" / name).read_bytes() for name in names)
    for stem, columns in stems.items():
        _, values = load(tmp_path / "out" / f"{stem}.npy")
        assert values.shape == (150, columns) and np.allclose(np.linalg.norm(values, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("first", ["ddp", "one"])
def test_killed_on_some_processes_finished_on_others(place, tmp_path, first):
    process = begin(place, tmp_path, *(DDP if first == "ddp" else ()))
    wait_for_rows(process, tmp_path, 6)
    end(process, signal.SIGKILL)
    finish(place, tmp_path, run=featx if first == "ddp" else on_two_machines)


def test_a_run_on_archives_is_killed_and_finished_on_two_processes(place, tmp_path):
    (tmp_path / "tars").mkdir()
    for folder in "abc":
        with tarfile.open(tmp_path / "tars" / f"{folder}.tar", "w") as file:
            file.add(place / "photos" / folder, folder)
    where = ("--data.dir", f"{tmp_path}/tars/{{a,b,c}}.tar")
    predict(place / "photos", tmp_path / "clean", *BASE, *where, cwd=place)
    assert (tmp_path / "clean" / "2.csv").read_bytes() == (place / "clean" / "2.csv").read_bytes()
    process = begin(place, tmp_path / "out", *where)
    wait_for_rows(process, tmp_path / "out", 30)
    end(process, signal.SIGKILL)
    shutil.copy(place / "slow.py", tmp_path)
    finish(tmp_path, tmp_path / "out", *where, *DDP)


def test_shards_are_the_same_after_a_kill_and_on_another_number_of_processes(place, tmp_path):
    process = begin(place, tmp_path, "--writer.shard_rows", "20")
    wait_for_rows(process, tmp_path, 13)
    end(process, signal.SIGKILL)
    line = ("predict", "--data.dir", "photos", "--writer.out_dir", tmp_path, *BASE, "--writer.shard_rows", "20")
    done = on_two_machines(*line, cwd=place)  # which meet within a shard
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == str(tmp_path / "2"), done.stderr
    for suffix in ("csv", "names.txt"):
        shards = [path.read_bytes() for path in sorted((tmp_path / "2").glob(f"*.{suffix}"))]
        assert len(shards) == 8 and b"".join(shards) == (place / "clean" / f"2.{suffix}").read_bytes()
    for kind in FORMATS[1:]:
        assert np.array_equal(load(tmp_path / "2" / f"*.{kind}")[1], load(place / "clean" / f"2.{kind}")[1])
    for kind in FORMATS:
        assert [check_file(path)["rows"] for path in sorted((tmp_path / "2").glob(f"*.{kind}"))] == [20] * 7 + [10]


@pytest.mark.parametrize("args", [(), DDP], ids=["one", "ddp"])
def test_kill_9_during_an_update_leaves_the_old_files(place, tmp_path, args):
    shutil.copytree(place / "photos", tmp_path / "photos")
    shutil.copytree(place / "clean", tmp_path / "out")
    shutil.copy(place / "slow.py", tmp_path)
    for i in range(90):
        make_image(200 + i, (40, 30)).save(tmp_path / "photos" / "abc"[i % 3] / f"{i:03}-new.png")
    (tmp_path / "photos/b/100.png").unlink()
    shutil.copytree(tmp_path / "out", tmp_path / "clean")
    update = ("--writer.update", "true", *args)
    predict("photos", tmp_path / "clean", *BASE, *update[:2], cwd=tmp_path)
    for _ in range(3):
        process = begin(tmp_path, tmp_path / "out", *update)
        wait_for_rows(process, tmp_path / "out")
        assert "2: 0 of" not in featx("status", tmp_path / "out").stdout
        end(process, signal.SIGKILL)
        for name in FILES:
            assert (tmp_path / "out" / name).read_bytes() == (place / "clean" / name).read_bytes()
            assert name.endswith((".json", ".txt")) or check_file(tmp_path / "out" / name)["rows"] == 150
    done = featx("predict", "--data.dir", "photos", "--writer.out_dir", tmp_path / "out", *BASE, *update, cwd=tmp_path)
    assert done.returncode == 0 and "2: update: 149 rows kept, 90 images to compute, 1 image removed" in done.stderr
    assert "2: continuing, " in done.stderr and "Total length" not in done.stderr, done.stderr
    assert_same_as_clean(tmp_path, tmp_path / "out")


def test_sigterm_and_ctrl_c_end_with_a_message_and_the_run_continues(place, tmp_path):
    for how, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = begin(place, tmp_path)
        wait_for_rows(process, tmp_path)
        returned, told = end(process, how)
        assert returned == status and "Traceback" not in told, told
        assert "featx: interrupted. Run the same command again to continue." in told
        assert not (tmp_path / "2.csv").exists()
    finish(place, tmp_path)


@pytest.mark.parametrize(("how", "group", "status"), [("TERM", False, 143), ("TERM", True, 143), ("INT", True, 130)])
def test_two_processes_end_together_whether_one_or_both_are_signaled(place, tmp_path, how, group, status):
    process = begin(place, tmp_path, *DDP)
    wait_for_rows(process, tmp_path)
    returned, told = end(process, signal.Signals[f"SIG{how}"], group)
    assert returned == status and told.count("featx: ") == told.count("featx: interrupted") == 1, told
    deadline = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):  # none of them is left behind
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_others_in_words(place, tmp_path, lost):
    process = begin(place, tmp_path, *DDP)
    wait_for_rows(process, tmp_path)
    (child,) = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _is_rank_1_of(int(pid), process.pid)]
    os.kill(child if lost else process.pid, signal.SIGKILL)
    _, told = process.communicate(timeout=60)  # stderr is open as long as one of the two lives
    assert process.returncode == (1 if lost else -9)
    assert f"the process of rank {lost} was lost" in told and "Traceback" not in told, told
    finish(place, tmp_path)


def _is_rank_1_of(pid: int, parent: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return (
            int(stat.rsplit(")", 1)[1].split()[1]) == parent
            and b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()
        )
    except OSError:
        return False


def test_a_second_run_into_a_live_folder_is_refused_and_the_first_unharmed(place, tmp_path):
    process = begin(place, tmp_path, wait=0.5)
    wait_for_rows(process, tmp_path)
    second = featx("predict", "--data.dir", "photos", "--writer.out_dir", tmp_path, *BASE, cwd=place)
    assert second.returncode == 2 and "another run is writing there" in second.stderr
    _, told = process.communicate(timeout=90)
    assert process.returncode == 0, told
    assert_same_as_clean(place, tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, twice what the rows take."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_exit_4_and_with_space_the_same_command_finishes(place, small_disk):
    out = small_disk / "features"
    process = begin(place, out)
    wait_for_rows(process, out)
    os.kill(process.pid, signal.SIGSTOP)
    (small_disk / "hog").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 50_000))
    os.kill(process.pid, signal.SIGCONT)
    _, told = process.communicate(timeout=90)
    assert process.returncode == 4 and "No space left on device" in told and "Traceback" not in told, told
    assert f"{out}/.featx/2/" in told and "Free space" in told
    (small_disk / "hog").unlink()
    finish(place, out)


def test_a_disk_too_small_from_the_start_is_exit_4_before_the_first_batch(place, small_disk):
    (small_disk / "hog").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 50_000))
    done = featx("predict", "--data.dir", "photos", "--writer.out_dir", small_disk / "f", *BASE, cwd=place)
    assert done.returncode == 4 and "needs about" in done.stderr, done.stderr
    assert sorted(os.listdir(small_disk)) == ["hog"]


def test_a_finished_run_says_so_and_another_is_refused(place, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(place / "clean", out)
    again = predict("photos", out, *BASE, cwd=place)
    assert "already finished, nothing to do: 150 rows" in again.stdout
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    other = ("--data.batch_size", "3", "--data.crop", "200")
    refused = featx("predict", "--data.dir", "photos", "--writer.out_dir", out, *BASE, *other, cwd=place)
    assert refused.returncode == 2 and "batch_size: 2 -> 3" in refused.stderr, refused.stderr
    assert "preprocessing.crop: 224 -> 200" in refused.stderr and "--writer.overwrite true" in refused.stderr
    assert len(refused.stderr.splitlines()) <= 12
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    predict("photos", out, *BASE, *other, "--writer.overwrite", "true", cwd=place)
    assert json.loads((out / "2.json").read_text())["identity"]["batch_size"] == 3
    assert (out / "2.csv").read_bytes() != before["2.csv"]


def test_other_weights_are_refused_by_their_digest(place, tmp_path):
    weights = {"2.weight": torch.ones(600, 192), "2.bias": torch.zeros(600)}
    torch.save(weights, tmp_path / "other.pth")
    shutil.copytree(place / "clean", tmp_path / "out")
    line = ("--writer.out_dir", tmp_path / "out", *BASE, "--model.weights", tmp_path / "other.pth")
    refused = featx("predict", "--data.dir", "photos", *line, cwd=place)
    assert refused.returncode == 2 and "  weights: " in refused.stderr and "… -> " in refused.stderr, refused.stderr


def test_images_that_changed_are_counted_in_the_message(place, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(place / "photos", photos)
    shutil.copytree(place / "clean", out)
    line = ("--writer.out_dir", out, *BASE)
    predict(photos, *line[1:], cwd=place)  # the same names, sizes and times elsewhere are the same images
    make_image(7, (41, 30)).save(photos / "a" / "new.png")
    make_image(8, (41, 30)).save(photos / "a" / "new2.png")
    (photos / "b" / "001.png").unlink()
    make_image(9, (41, 30)).save(photos / "c" / "002.png")
    refused = featx("predict", "--data.dir", photos, *line, cwd=place)
    assert refused.returncode == 2 and "2 images added, 1 image removed, 1 image changed" in refused.stderr
    assert "--writer.overwrite true" in refused.stderr


def test_unreadable_images_are_listed_and_repaired_in_place(place, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(place / "photos", photos)
    repaired = {photos / "a" / "000.png": None, photos / "b" / "004.png": None}
    for path in repaired:
        repaired[path] = path.read_bytes()
        path.write_bytes(path.read_bytes()[:100])
    (photos / "c" / "005.png").unlink()
    (photos / "c" / "005.png").symlink_to("nowhere")
    run = ("predict", "--data.dir", photos, *BASE, "--writer.out_dir")
    one, two = featx(*run, tmp_path / "one", cwd=place), on_two_machines(*run, tmp_path / "two", cwd=place)
    assert one.returncode == two.returncode == 3, one.stderr + two.stderr
    assert "147 rows, 3 images could not be read, listed in " in one.stdout
    for name in {*FILES, "2.errors.csv"} - {"2.json"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with (tmp_path / "one" / "2.errors.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "reason", "exception"]
    assert [row[0] for row in rows] == ["a/000.png", "b/004.png", "c/005.png"]
    again = featx(*run, tmp_path / "one", cwd=place)
    assert again.returncode == 3 and "nothing to do" in again.stdout
    for path, data in repaired.items():
        path.write_bytes(data)
    assert on_two_machines(*run, tmp_path / "one", cwd=place).returncode == 3  # the link still dangles
    assert "1 image could not be read" in featx(*run, tmp_path / "one", cwd=place).stdout
    (photos / "c" / "005.png").unlink()
    shutil.copy(place / "photos" / "c" / "005.png", photos / "c" / "005.png")
    last = featx(*run, tmp_path / "one", cwd=place)
    assert last.returncode == 0, last.stderr
    assert_same_as_clean(place, tmp_path / "one")


def test_on_error_stop_ends_at_the_first_with_exit_3_and_can_continue(place, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(place / "photos", photos)
    bad = photos / "c" / "032.png"
    data = bad.read_bytes()
    bad.write_bytes(b"")
    line = ("predict", "--data.dir", photos, "--writer.out_dir", tmp_path / "out", *BASE)
    done = featx(*line, "--data.on_error", "stop", cwd=place)
    assert done.returncode == 3 and "c/032.png" in done.stderr and "empty" in done.stderr, done.stderr
    assert not (tmp_path / "out" / "2.csv").exists() and lines_in_journals(tmp_path / "out") > 10
    bad.write_bytes(data)
    stat = (place / "photos" / "c" / "032.png").stat()
    os.utime(bad, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_layers_of_two_runs_share_a_folder(place, tmp_path):
    predict("photos", tmp_path, *BASE, cwd=place)
    predict("photos", tmp_path, *BASE, "--model.layer", "1", cwd=place)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".featx", *(name.replace("2", "1", 1) for name in FILES), *FILES]
    both = predict("photos", tmp_path, *BASE, "--model.layer", '["1","2"]', cwd=place)
    assert "nothing to do" in both.stdout
