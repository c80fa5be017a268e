"""Files that an earlier version of featx left are taken up: finished ones are recognised, unfinished ones completed.

``kept/VERSION`` is an output folder as that version wrote it: layer 2 finished, with one image that cannot be read, and
layer 1 killed after two of five batches. Only what differs from machine to machine is set here: the images' times and,
in the files, the versions of the libraries and the name of the processor.
"""

import json
import os
import re
import shutil
import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import torchvision

import featx
from featx.cli import main
from featx.process.cores import device_name
from featx.results import load

KEPT = sorted((Path(__file__).parent / "kept").iterdir())
# No random numbers in it, and nothing whose rounding depends on the machine.
NETWORK = """\
import torch
from torch import nn


def network():
    linear = nn.Linear(48, 5)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(240).remainder(7).sub(3).div(8).reshape(5, 48))
        linear.bias.copy_(torch.arange(5) / 4)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), linear)
"""
LINE = ("predict", "--data.dir", "photos", "--model.arch", "tiny_kept.network", "--data.resize", "null", "--data.crop",
        "null", "--data.batch_size", "2")  # fmt: skip


def make_photos() -> None:
    """Make nine images of 8x8 pixels, one of them cut off, with the bytes and the times that they had then."""
    for i in range(9):
        path = Path("photos", "ab"[i % 2], f"{i}.ppm")
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = bytes((31 * i + 7 * place * (i + 1)) % 256 for place in range(8 * 8 * 3))
        path.write_bytes(b"P6 8 8 255\n" + (pixels[:100] if i == 5 else pixels))
        os.utime(path, ns=(10**18, 10**18 + i))


def as_of_this_machine(path: Path) -> None:
    """Set the versions of the libraries and the processor's name in a record or a journal."""
    if path.suffix == ".json":
        record = json.loads(path.read_text())
        versions = record["identity"]["versions"]
        versions |= {"torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": PIL.__version__,
                     "simplejpeg": version("simplejpeg")}  # fmt: skip
        path.write_text(json.dumps(record))
    else:
        lines = []
        for line in path.read_text().splitlines():
            text = re.sub('"AMD EPYC"', json.dumps(device_name(torch.device("cpu"))), line[9:])
            lines.append(f"{zlib.crc32(text.encode()):08x} {text}\n")
        path.write_text("".join(lines))


@pytest.fixture(params=KEPT, ids=lambda path: path.name)
def kept(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the photographs, the network and ``features``, in which the tests run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("tiny_kept.py").write_text(NETWORK)
    make_photos()
    shutil.copytree(request.param, "features")
    for path in [*Path("features").rglob("*.json"), *Path("features").rglob("*.journal")]:
        as_of_this_machine(path)
    return tmp_path / "features"


def test_a_finished_file_of_an_earlier_version_is_finished(kept, capsys):
    before = (kept / "2.csv").read_bytes()
    assert main([*LINE, "--model.layer", "2"]) == 3
    assert "already finished, nothing to do: 8 rows" in capsys.readouterr().out
    assert (kept / "2.csv").read_bytes() == before


def test_its_unreadable_image_is_repaired_and_the_other_rows_are_kept(kept):
    whole = Path("photos/b/5.ppm").read_bytes() + bytes(92)
    Path("photos/b/5.ppm").write_bytes(whole)
    before = (kept / "2.csv").read_bytes().splitlines()
    assert main([*LINE, "--model.layer", "2"]) == 0
    after = (kept / "2.csv").read_bytes().splitlines()
    assert [line.split(b",")[0] for line in after] == [b"%d.ppm" % i for i in (0, 2, 4, 6, 8, 1, 3, 5, 7)]
    assert after[:6] + after[8:] == before[:6] + before[7:]  # of the batch that is computed again, 3 and 5, not 3


def test_its_images_change_and_its_rows_are_kept(kept):
    shutil.copy("photos/a/2.ppm", "photos/a/3-new.ppm")
    Path("photos/a/8.ppm").unlink()
    before = (kept / "2.csv").read_bytes().splitlines()
    assert main([*LINE, "--model.layer", "2", "--writer.update", "true"]) == 3
    after = (kept / "2.csv").read_bytes().splitlines()
    assert [line.split(b",")[0] for line in after] == [b"%s.ppm" % i for i in b"0 2 3-new 4 6 1 3 7".split()]
    assert after[:2] + after[3:] == before[:4] + before[5:]
    rows = load(kept / "2.csv")[1]
    assert np.allclose(rows[1], rows[2], rtol=2e-6)  # of the same pixels
    assert main([*LINE, "--model.layer", "2"]) == 3
    assert [one["images"] for one in featx.record(kept / "2.csv")["generations"]] == [9, 1]


def test_an_unfinished_run_of_an_earlier_version_is_completed(kept, caplog):
    part = next((kept / ".featx" / "1").glob("*.csv")).read_bytes()
    assert main([*LINE, "--model.layer", "1", "--writer.format", "[csv,npy]"]) == 3
    assert (kept / "1.csv").read_bytes().startswith(part)
    main([*LINE, "--model.layer", "1", "--writer.format", "[csv,npy]", "--writer.out_dir", "anew"])
    for suffix in ("csv", "names.txt"):
        assert (kept / f"1.{suffix}").read_bytes() == (kept.parent / "anew" / f"1.{suffix}").read_bytes()
    assert np.array_equal(load(kept / "1.npy")[1], load(kept.parent / "anew" / "1.npy")[1])


def test_another_run_into_its_folder_is_refused(kept, capsys):
    assert main([*LINE, "--model.layer", "2", "--data.batch_size", "3"]) == 2
    assert "batch_size: 2 -> 3" in capsys.readouterr().err
    assert main([*LINE, "--model.layer", "1", "--writer.format", "[csv,npy]", "--writer.header", "true"]) == 2
    assert "header: false -> true" in capsys.readouterr().err
