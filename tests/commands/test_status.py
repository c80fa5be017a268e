"""featx status: what it reads from the journals of a run."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import REPO
from tiny import run

from featx.commands.status import status
from featx.errors import ImageError, UserError
from featx.writer import shares

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def stopped(photos, tmp_path):
    """A run of 37 images that stopped at an image in its fourth batch of eight."""
    shutil.copytree(photos, tmp_path / "photos")
    bad = tmp_path / "photos" / "cats" / sorted(path.name for path in (tmp_path / "photos" / "cats").iterdir())[4]
    bad.write_bytes(b"")
    with pytest.raises(ImageError):
        run(tmp_path / "photos", tmp_path / "out", data={"on_error": "stop"})
    return tmp_path / "out"


def test_an_unfinished_run_has_its_batches_counted(stopped, capsys):
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    assert status([str(stopped), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)["layers"]["2"]
    assert about["finished"] is False and about["images"] == 37 and about["faults"] == 1
    assert about["done"] in (32, 37) and about["images_per_second"] > 0 and about["seconds_since_last_rows"] >= 0
    status([str(stopped)])
    line = capsys.readouterr().out
    assert line.startswith(f"2: {about['done']} of 37 images, 1 fault, ") and " images/s, 0:" in line
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*") if path.is_file()}.items() <= before.items()


def test_a_finished_run_says_so_without_torch(photos, tmp_path):
    run(photos, tmp_path)
    code = "import sys; from featx.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    line = [sys.executable, "-c", code, "status", str(tmp_path)]
    done = subprocess.run(line, cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2: finished, 37 images\n"), done.stderr


def test_a_folder_without_a_run_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match=r"no run of featx in it. Expected the --writer\.out_dir of featx predict"):
        status([str(tmp_path)])
    with pytest.raises(UserError, match=r"unrecognized arguments: --yaml"):
        status([str(tmp_path), "--yaml"])


def test_a_layer_is_named_as_the_user_named_it(photos, tmp_path, capsys):
    run(photos, tmp_path, layer=["2:1", "2"])
    assert (tmp_path / "2%3A1.csv").exists() and status([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "2: finished, 37 images\n2:1: finished, 37 images\n"


def test_shares_are_listed_with_their_jobs(photos, tmp_path, capsys):
    run(photos, tmp_path, data={"shard": "1/3"})
    job = shares.Shares(tmp_path / ".featx", "2/3", lambda: {"images": 10})
    job.enter(1)
    job.claim(job.name(2))
    status([str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)["shares"]
    assert (found["of"], found["done"], found["left"]) == (3, 1, 1) and found["in_work"][0]["share"] == 2
    status([str(tmp_path)])
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first == "shares: 1 of 3 done, 1 in work, 1 left"
    assert second.startswith(f"[2/3] process {os.getpid()} on ") and " heartbeat " in second
    job.leave()
    status([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1] == "shares: 1 of 3 done, 0 in work, 2 left"
