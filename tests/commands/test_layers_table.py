"""``featx layers``: the table, its JSON, and what it leaves out."""

import json
import re
import sys

import pytest
import torch
from conftest import featx
from torch import nn

from featx import FeatureExtractor
from featx.cli import main
from featx.commands.layers import Row, as_table
from featx.model.extractor import SLICE
from featx.model.layers import Taps
from featx.writer.formats import csv_row


class Tiny(FeatureExtractor):
    """Ends as AlexNet does, and has all that cannot be taken."""

    def build_network(self) -> nn.Module:
        return Net()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU(inplace=True)
        self.turn = Turn()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.classifier = nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)
        )

    def forward(self, x):
        x = self.relu(self.relu(self.conv(x)))
        self.turn(x.flatten(1))
        return self.classifier(self.attend(*[x.flatten(2).mT] * 3)[0].mean(1))


class Turn(nn.Module):
    def forward(self, x):
        return x.T


@pytest.fixture
def layers(capsys, monkeypatch, tmp_path):
    """Run ``featx layers ARGS`` in this process, in an empty folder, and return its status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*args):
        status = main(["layers", *map(str, args)])
        return status, *capsys.readouterr()

    return run


TINY = ("--model", "test_layers_table.Tiny", "--data.crop", "12")


def test_every_layer_stands_on_its_line_in_the_order_of_execution(layers):
    status, table, told = layers(*TINY)
    lines = [line.split() for line in table.splitlines()]
    assert status == 0
    assert lines[0] == ["path", "alias", "type", "shape", "columns", "bytes", "time%"]
    assert [" ".join(line[:-2]) for line in lines[1:]] == [
        "conv Conv2d 4x10x10 400",
        "relu:1 ReLU 4x10x10 400",
        "relu:2 ReLU 4x10x10 400",
        "attend#0 MultiheadAttention 100x4 400",
        "attend#1 MultiheadAttention 100x100 10000",
        "classifier.0 fc6 Linear 6 6",
        "classifier.1 ReLU 6 6",
        "classifier.2 fc7 Linear 6 6",
        "classifier.3 ReLU 6 6",
        "penultimate input of classifier.4 6 6",
        "classifier.4 fc8 Linear 3 3",
        "classifier Sequential 3 3",
    ]
    assert "3x12x12" in told
    assert "not listed: 1 never called (attend.out_proj); 1 without one row per image (turn)" in told


def test_json_has_the_same_fields_and_nothing_else_on_stdout(layers):
    status, text, _ = layers(*TINY, "--json")
    rows = json.loads(text)
    assert status == 0 and len(rows) == 12
    assert rows[6] | {"bytes": 0, "time": 0} == {
        "path": "classifier.1",
        "alias": "",
        "type": "ReLU",
        "shape": [6],
        "columns": 6,
        "bytes": 0,
        "time": 0,
    }
    times = [row["time"] for row in rows]
    assert times == sorted(times) and times[-1] <= 100


def test_every_listed_path_can_be_taken_and_has_the_columns_and_bytes_that_were_told(layers):
    _, text, _ = layers(*TINY, "--json", "--model.pool", "avg")
    rows = {row["path"]: row for row in json.loads(text)}
    model = Tiny(pool="avg")
    model.configure_model()
    images = torch.randint(256, (SLICE, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for path, row in rows.items():
        taken = model.run(images[:1], Taps(model.network, {path: path}, "avg"))[path]
        assert taken.shape == (1, row["columns"])
        assert len(csv_row(b"", taken[0].numpy())) == row["bytes"]
    assert rows["conv"]["columns"] == 4 and rows["conv"]["shape"] == [4, 10, 10]


def test_the_size_is_that_of_the_weights_recipe_unless_the_options_say_otherwise(layers):
    rows = json.loads(
        layers("--model.arch", "mobilenet_v3_small", "--json", "--data.resize", "64", "--data.crop", "null")[1]
    )
    assert rows[0]["path"] == "features.0.0" and rows[0]["shape"] == [16, 32, 32]
    rows = json.loads(layers("--model.arch", "efficientnet_b1", "--json")[1])
    assert rows[0]["shape"] == [32, 120, 120]  # of 240 pixels


def test_a_command_line_and_a_config_of_predict_serve_here(layers, tmp_path):
    (tmp_path / "c.yaml").write_text("data: {batch_size: 512, crop: 12, dir: photos}\ntrainer: {devices: -1}\n")
    assert layers("--config", "c.yaml", "--model", "test_layers_table.Tiny", "--writer.header", "true")[0] == 0
    assert layers(*TINY, "--data.dir", "nowhere", "--model.layer", "fc7")[0] == 0


def test_a_network_without_penultimate_says_so(layers):
    status, table, told = layers("--model.arch", "squeezenet1_1", "--data.crop", "64")
    assert status == 0 and "penultimate" not in table
    assert "no penultimate: the network's output is not that of a Linear.\nUse --model.layer embedding." in told


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--model.arch", "resnet5"), "--model.arch resnet5: torchvision has no .* Did you mean resnet50"),
        (("--model.arhc", "resnet50"), "--model.arhc: no such option. Did you mean --model.arch"),
        (("--model.pool", "mean"), "--model.pool mean: expected none, avg, max or cls."),
        (("--data.crop", "0"), "--data.crop 0: expected a whole number of at least 1"),
        (("--json", "--data.crop"), "--data.crop: expected a value after it: auto, a whole number, null."),
        (("--data.crop", "8"), r"alexnet failed on images of the shape \(3, 8, 8\)"),
    ],
)
def test_mistakes_are_told_as_for_predict(layers, args, words):
    status, out, told = layers(*args)

    assert status == 2 and out == "" and re.search(words, told), told
    assert "featx predict" not in told and told.count("\n") <= 12


def test_help_is_one_screen_and_names_its_options(layers):
    status, out, _ = layers("--help")
    lines = out.splitlines()
    assert status == 0 and len(lines) <= 48 and max(map(len, lines)) <= 80
    for option in ("--model.arch", "--model.weights", "--model.pool", "--data.crop", "--json", "--model CLASS"):
        assert option in out


def test_a_table_of_alexnet_resnet_and_vit_fits_into_eighty_columns():
    paths = {
        "encoder.layers.encoder_layer_11.dropout": ("Dropout", (197, 768), 151296, 1761356),
        "encoder.layers.encoder_layer_11.mlp.0": ("Linear", (197, 3072), 605184, 6737541),
        "encoder.layers.encoder_layer_11": ("EncoderBlock", (197, 768), 151296, 1600336),
        "conv_proj": ("Conv2d", (768, 14, 14), 150528, 1622585),
    }
    rows = [Row(path, "", kind, shape, columns, size, 100.0) for path, (kind, shape, columns, size) in paths.items()]
    lines = as_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 80
    assert all(path in line.split() for path, line in zip(paths, lines[1:], strict=True))


def test_featx_layers_as_a_process():
    done = featx("layers", "--model.arch", "resnet18", "--data.crop", "32", python=(sys.executable,))
    assert done.returncode == 0 and "Traceback" not in done.stderr
    fc = next(line for line in done.stdout.splitlines() if line.startswith("fc "))
    assert fc.split()[:4] == ["fc", "Linear", "1000", "1000"]
    assert "RANDOM" not in done.stderr and "random (seed 0)" in done.stderr
