"""The command line as users run it: as a process."""

import fcntl
import json
import os
import pty
import socket
import struct
import subprocess
import sys
import termios

import pytest
import torch
from conftest import (
    ALEXNET_LAYERS,
    ENV,
    REPO,
    featx,
    launch,
    make_image,
    on_two_machines,
    oracle,
    predict,
    read_csv,
    relative_error,
)
from torchvision import models

from featx.cli import main


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["--version"]])
def test_help_does_not_import_torch(args):
    code = f"import sys, featx.cli; assert featx.cli.main({args}) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], env=ENV | {"PYTHONPATH": str(REPO)}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"featx" in done.stdout


def test_predict_help_is_about_two_screens_and_says_how_to_see_the_rest():
    done = featx("predict", "--help")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) < 117 and max(map(len, lines)) <= 80
    assert "--help_all" in done.stdout and "--data.dir" in done.stdout and "--model.weights" in done.stdout
    everything = featx("predict", "--help_all").stdout
    assert "--trainer.max_time" in everything and "--writer.header" in everything


def test_the_main_job(photos, tmp_path, alexnet, alexnet_file):
    line = ("--model.layer", "[fc6,fc7,fc8]", "--model.weights", alexnet_file)
    done = predict(photos, "out", *line, cwd=tmp_path, python=(sys.executable,))
    names, expected = oracle(photos, alexnet, list(ALEXNET_LAYERS.values()))
    for layer, values in zip(ALEXNET_LAYERS, expected, strict=True):
        found_names, found = read_csv(tmp_path / "out" / f"{layer}.csv")
        assert found_names == names and relative_error(found, values) < 1e-5
    assert sorted(os.listdir(tmp_path)) == ["out"]  # no lightning_logs, no config.yaml
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        [".featx", *(f"{layer}{s}" for layer in ALEXNET_LAYERS for s in (".csv", ".json"))]
    )
    first, *files = done.stdout.splitlines()
    assert first.startswith("37 rows in ") and first.endswith(" images/s")
    assert files == [f"out/{layer}.csv" for layer in ALEXNET_LAYERS]
    told = done.stderr.splitlines()
    assert len(told) <= 8 and not any(word in done.stderr for word in ("Tip", "TPU", "litlogger", "\r"))
    assert any("resize 256 bilinear, crop 224 (AlexNet_Weights.IMAGENET1K_V1)" in line for line in told)
    assert any("data worker" in line for line in told)
    predict(photos, tmp_path / "one", "--model.layer", "fc6", "--model.weights", alexnet_file)
    assert (tmp_path / "one" / "fc6.csv").read_bytes() == (tmp_path / "out" / "fc6.csv").read_bytes()


def torchrun_two_nodes(photos, out, *args):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nodes = [
        subprocess.Popen(
            f"{sys.executable} -m torch.distributed.run --nnodes 2 --node_rank {node} --nproc_per_node 1 --master_addr "
            f"127.0.0.1 --master_port {port} -m featx predict --trainer.num_nodes 2".split()
            + list(map(str, ("--data.dir", photos, "--writer.out_dir", out, *args))),
            env=ENV | {"PYTHONPATH": str(REPO)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    for node in nodes:
        _, told = node.communicate(timeout=300)
        assert node.returncode == 0, told


def slurm_two_tasks(photos, out, *args):
    """Start two processes with the variables that srun sets: Lightning takes its cluster from them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "night", "SLURM_NODELIST": "127.0.0.1"}
    common |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "MASTER_PORT": port}
    tasks = [
        subprocess.Popen(
            list(map(str, (sys.executable, "-m", "featx", "predict", "--data.dir", photos, "--writer.out_dir", out)))
            + list(map(str, (*DDP, *args))),
            env=ENV | common | {"PYTHONPATH": str(REPO), "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    for task in tasks:
        _, told = task.communicate(timeout=300)
        assert task.returncode == 0, told


DDP = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


def test_the_file_is_the_same_whatever_processes_workers_and_cores(photos, tmp_path):
    """Of a network whose last bits differ between one thread and two."""
    base = ("--model.arch", "squeezenet1_1", "--model.weights", "random", "--model.layer", "classifier")
    base += ("--data.batch_size", "8", "--writer.header", "true")
    predict(photos, tmp_path / "one", *base, "--data.num_workers", "1")
    predict(photos, tmp_path / "two-workers", *base, "--data.num_workers", "2")
    predict(photos, tmp_path / "no-worker", *base, "--data.num_workers", "0")
    predict(photos, tmp_path / "one-core", *base, python=("taskset", "-c", "0", sys.executable))
    predict(photos, tmp_path / "ddp", *base, *DDP)
    torchrun_two_nodes(photos, tmp_path / "torchrun", *base)
    slurm_two_tasks(photos, tmp_path / "slurm", *base)
    expected = (tmp_path / "one" / "classifier.csv").read_bytes()
    assert expected.count(b"\n") == 38
    for run in ("two-workers", "no-worker", "one-core", "ddp", "torchrun", "slurm"):
        assert (tmp_path / run / "classifier.csv").read_bytes() == expected, run
        assert sorted(os.listdir(tmp_path / run)) == [".featx", "classifier.csv", "classifier.json"], run
    assert "random (seed 0)" in json.loads((tmp_path / "one" / "classifier.json").read_text())["run"]["weights"]


def test_a_rank_without_a_batch_is_no_trouble(three_photos, tmp_path):
    base = ("--model.arch", "squeezenet1_1", "--model.weights", "random", "--model.layer", "classifier")
    predict(three_photos, tmp_path / "one", *base)
    done = on_two_machines("predict", "--data.dir", three_photos, "--writer.out_dir", tmp_path / "two", *base)
    assert done.returncode == 0, done.stderr
    expected = (tmp_path / "one" / "classifier.csv").read_bytes()
    assert expected.count(b"\n") == 3
    assert (tmp_path / "two" / "classifier.csv").read_bytes() == expected


OWN = """\
from lightning.pytorch import Callback
from torchvision import models
from featx import FeatureExtractor

class MyExtractor(FeatureExtractor):
    def build_network(self):
        return models.alexnet(num_classes=10)

class NotOne:
    pass

class Lacking(Callback):
    def __init__(self):
        import no_such_thing
"""


@pytest.fixture(scope="module")
def mess(tmp_path_factory, alexnet_file):
    """A folder with everything that a user can get wrong."""
    folder = tmp_path_factory.mktemp("mess")
    (folder / "photos").mkdir()
    make_image(1, (30, 30)).save(folder / "photos" / "1.png")
    (folder / "empty").mkdir()
    (folder / "file").touch()
    (folder / "text.pth").write_text("not a checkpoint")
    (folder / "typo.yaml").write_text("data:\n  batchsize: 3\n")
    (folder / "broken.yaml").write_text("data: [\n")
    (folder / "my_module.py").write_text(OWN)
    torch.save(models.resnet18(weights=None).state_dict(), folder / "resnet18.pth")
    os.symlink(alexnet_file, folder / "good.pth")
    return folder


MISTAKES = [
    ("--data.dir nowhere", ["--data.dir nowhere", "no such folder"]),
    ("--data.dir empty", ["--data.dir empty", "no image"]),
    ("--data.dir file", ["--data.dir file", "a file", "Expected a folder"]),
    ("--data.dir photos --model.layer fc9", ["--model.layer fc9", "Did you mean", "fc7"]),
    ("--data.dir photos --model.arch alexnt", ["--model.arch alexnt", "Did you mean alexnet?"]),
    ("--data.dir photos --data.batchsize 3", ["--data.batchsize", "Did you mean --data.batch_size"]),
    ("--data.dir photos --model.lyer fc7", ["--model.lyer", "Did you mean --model.layer"]),
    ("--data.dir photos --config typo.yaml", ["--data.batchsize", "Did you mean --data.batch_size"]),
    ("--data.dir photos --config broken.yaml", ["config"]),
    ("--data.dir photos --config missing.yaml", ["--config", "missing.yaml"]),
    ("--data.dir photos --model.weights missing.pth", ["--model.weights missing.pth", "no such file"]),
    ("--data.dir photos --model.weights text.pth", ["--model.weights text.pth", "not a PyTorch checkpoint"]),
    (
        "--data.dir photos --model.weights resnet18.pth",
        ["resnet18.pth", "does not fit alexnet", "--model.arch resnet18"],
    ),
    ("--data.dir photos --model.weights IMAGENET1K_V7", ["IMAGENET1K_V7", "Did you mean IMAGENET1K_V1?"]),
    ("--data.dir photos --writer.out_dir file", ["--writer.out_dir file", "is a file"]),
    ("--data.dir photos --writer.out_dir feats.csv", ["feats.csv: expected a folder", "feats writes feats/LAYER.csv"]),
    ("--data.dir photos --trainer.callbacks my_module.Lacking", ["my_module.Lacking: No module named 'no_such_thing'"]),
    ("--data.dir photos --model.weights good.pth --writer.out_dir /proc/features", ["--writer.out_dir /proc/features"]),
    ("--data.dir photos --data.batch_size 0", ["--data.batch_size 0", "at least 1"]),
    ("--data.dir photos --data.batch_size many", ["--data.batch_size many", "a whole number"]),
    ("--data.dir photos --data.resize large", ["--data.resize large", "auto, a whole number or null"]),
    ("--data.dir photos --data.interpolation cubic", ["--data.interpolation cubic", "Did you mean bicubic?"]),
    ("--data.dir photos --writer.format excel", ["--writer.format excel", "expected csv"]),
    ("--data.dir photos --trainer.accelerator gpu --trainer.devices 99", ["--trainer.devices 99"]),
    ("--data.dir photos --trainer.strategy dpp", ["--trainer.strategy dpp", "ddp"]),
    ("--data.dir photos --model my_module.NotOne", ["--model my_module.NotOne", "subclass of featx.FeatureExtractor"]),
    ("--data.dir photos --model my_module.Missing", ["--model my_module.Missing", "no attribute 'Missing'"]),
    ("--data.dir photos --model.weights", ["--model.weights", "expected a value"]),
    ("--data.dir photos stray", ["photos stray", "2 values, expected one"]),
    ("--model.layer fc7", ["--data.dir", "missing"]),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_a_few_words_and_exit_2(mess, line, words):
    before = sorted(os.listdir(mess))
    done = featx("predict", *line.split(), cwd=mess)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) <= 12 and "Traceback" not in done.stderr and done.stdout == ""
    for word in words:
        assert word in done.stderr
    assert sorted(os.listdir(mess)) == before


def test_weights_that_cannot_be_downloaded_name_url_cache_and_way_out(mess, tmp_path):
    done = featx(
        "predict",
        "--data.dir",
        "photos",
        cwd=mess,
        env={"TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 12
    for word in (
        "download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        f"{tmp_path}/hub/checkpoints",
        "--model.weights FILE",
    ):
        assert word in done.stderr


def test_a_mistake_under_ddp_is_told_once(mess):
    done = featx("predict", "--data.dir", "photos", "--model.layer", "fc9", *DDP, cwd=mess)
    assert done.returncode == 2 and done.stderr.count("fc9: alexnet") == 1


def test_a_network_of_ones_own_from_the_command_line(mess, photos, tmp_path):
    torch.save(models.alexnet(num_classes=10).state_dict(), tmp_path / "ten.pth")
    for line in (
        ("--model.weights", tmp_path / "ten.pth", "--model", "my_module.MyExtractor", "--model.layer", "fc8"),
        ("--model=my_module.MyExtractor", "--model.layer=fc8", f"--model.weights={tmp_path / 'ten.pth'}"),
    ):
        done = predict(photos, tmp_path / "out", *line, cwd=mess)
        assert read_csv(tmp_path / "out" / "fc8.csv")[1].shape == (37, 10)
        assert f"weights: {tmp_path / 'ten.pth'}" in done.stderr
    own = ("--model", "my_module.MyExtractor", "--model.layer", "fc8")
    done = predict(photos, tmp_path / "as-built", *own, cwd=mess)
    assert "as MyExtractor.build_network() made them" in done.stderr


def test_the_last_of_a_repeated_option_wins(photos, tmp_path, alexnet_file):
    predict(photos, tmp_path, "--model.layer", "fc6", "--model.weights", alexnet_file, "--model.layer", "fc8")
    assert (tmp_path / "fc8.csv").exists() and not (tmp_path / "fc6.csv").exists()


def test_environment_variables_decide_nothing():
    env = {"JSONARGPARSE_DEFAULT_ENV": "true", "PL_DATA__DIR": "/elsewhere", "PL_TRAINER_DEVICES": "7"}
    done = featx("predict", "--data.dir", "x", "--print_config", env=env)
    assert "dir: x" in done.stdout and "devices: auto" in done.stdout


def test_a_printed_config_can_be_used(photos, tmp_path, alexnet_file):
    line = ("--model.weights", alexnet_file, "--model.layer", "[fc7,fc8]", "--data.crop", "null")
    printed = featx("predict", "--data.dir", photos, *line, "--print_config")
    (tmp_path / "c.yaml").write_text(printed.stdout)
    again = featx("predict", "--config", tmp_path / "c.yaml", "--print_config")
    assert again.stdout == printed.stdout and "crop: null" in printed.stdout


def test_a_terminal_gets_a_bar_with_images_a_second(photos, tmp_path, alexnet_file):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    line = ("predict", "--data.dir", photos, "--writer.out_dir", tmp_path, "--model.weights", alexnet_file)
    process = launch(*line, stderr=theirs)
    os.close(theirs)
    told = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        told += piece
    process.communicate()
    assert process.returncode == 0 and b"37/37" in told and b"images/s" in told


def test_an_answer_that_cannot_be_written_is_no_success():
    buffered = {name: value for name, value in ENV.items() if name != "PYTHONUNBUFFERED"}
    for args in (["--version"], ["--help"]):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "featx", *args]
            done = subprocess.run(command, env=buffered, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert done.stderr == "featx: error: stdout cannot be written to: No space left on device\n"


def in_bash(line, **names):
    """Run a line of bash in which $featx is the command."""
    env = ENV | {"PYTHONPATH": str(REPO), "featx": f"{sys.executable} -m featx"}
    env |= {name: str(value) for name, value in names.items()}
    return subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["--help", "predict --help"])
def test_a_reader_that_goes_is_no_fault(command, unbuffered):
    done = in_bash(f"$featx {command} | head -1; exit ${{PIPESTATUS[0]}}", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("usage: featx")


@pytest.mark.parametrize("where", ["| true", "2>&1 | true", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_rows_are_whole_whoever_reads_what_is_printed(where, three_photos, tmp_path):
    line = "$featx predict --data.dir $photos --writer.out_dir $out --model.layer classifier"
    line += " --model.arch squeezenet1_1 --model.weights random"
    done = in_bash(f"{line} {where}; exit ${{PIPESTATUS[0]}}", photos=three_photos, out=tmp_path)
    assert done.returncode == 0 and "rror" not in done.stderr
    names, values = read_csv(tmp_path / "classifier.csv")
    assert names == ["0.png", "1.png", "2.png"] and values.shape == (3, 1000)
    assert main(["verify", str(tmp_path / "classifier.csv")]) == 0


def test_options_without_a_command_are_sent_to_predict(capsys):
    assert main(["--data.dir", "my photos", "--model=a.B"]) == 2
    said = "featx: error: --data.dir: expected a command before it:\nfeatx predict --data.dir 'my photos' --model=a.B\n"
    assert capsys.readouterr().err == said
    assert main(["--verison"]) == 2 and "Did you mean --version?" in capsys.readouterr().err
    assert main(["predikt", "--data.dir", "photos"]) == 2 and "Did you mean predict?" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "lines"), [("0", 5), ("1", 0)])
def test_a_dry_run_is_reported_by_rank_0_alone(rank, lines, three_photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    line = ["predict", "--data.dir", str(three_photos), "--writer.out_dir", str(tmp_path), "--data.batch_size", "2"]
    line += ["--model.arch", "squeezenet1_0", "--model.weights", "random", "--model.layer", "features.0"]
    assert main([*line, "--writer.dry_run", "true"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == lines and os.listdir(tmp_path) == []


def test_the_end_of_a_run_of_which_nothing_could_be_read_says_that(tmp_path, alexnet_file):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"no image")
    line = ("--data.dir", "photos", "--model.weights", alexnet_file)
    done = featx("predict", *line, cwd=tmp_path)
    assert done.returncode == 3 and "no image could be read" in done.stderr and "the wall" not in done.stderr
