"""``--writer.update true``: rows of unchanged images stay, new and changed images are computed, and nothing else."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import make_image
from tiny import run

from featx.commands.verify import check_file
from featx.results import load

FORMATS = ["csv", "npy", *(["parquet"] if find_spec("pyarrow") else [])]


def add(folder: Path, name: str, seed: int) -> None:
    """Make an image, with a time of its own as an image that was copied there has."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image(seed, (24, 20)).save(path, "PNG")
    os.utime(path, ns=(10**18 + seed, 10**18 + seed))


@pytest.fixture
def photos(tmp_path):
    """40 photographs in two class folders."""
    for i in range(40):
        add(tmp_path / "photos", f"{'ab'[i % 2]}/{i:02}.png", i)
    return tmp_path / "photos"


def change(photos: Path) -> None:
    """Add 11 images, in both folders and in one before them, remove 6, the first among them, and change 3."""
    for i in range(5):
        add(photos, f"a/{2 * i:02}-new.png", 100 + i)
        add(photos, f"b/{30 + i}-new.png", 200 + i)
    add(photos, "0/first.png", 300)
    for name in ("a/00", "a/02", "b/15", "b/17", "b/19", "b/39"):
        (photos / f"{name}.png").unlink()
    for i, name in enumerate(("a/04", "a/20", "b/33")):
        add(photos, f"{name}.png", 400 + i)


def lines(path: Path) -> dict[str, bytes]:
    return {line.split(b",")[0].decode(): line for line in path.read_bytes().splitlines()}


def values(out: Path, kind: str) -> tuple[list[str], np.ndarray]:
    path = out / "2" if (out / "2").is_dir() else out / f"2.{kind}"
    return load(path / f"*.{kind}" if path.is_dir() else path)


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
@pytest.mark.parametrize("options", [{}, {"header": True}, {"shard_rows": 16}], ids=str)
def test_only_new_and_changed_images_are_computed(photos, tmp_path, options):
    out, options = tmp_path / "out", {"format": FORMATS, "names": "relative"} | options
    run(photos, out, **options)
    before = {kind: dict(zip(*values(out, kind), strict=True)) for kind in FORMATS}
    change(photos)
    writer = run(photos, out, update=True, **options)
    assert writer.computed == 14
    run(photos, tmp_path / "scratch", **options)
    for kind in FORMATS:
        names, rows = values(out, kind)
        expected, of_scratch = values(tmp_path / "scratch", kind)
        assert names == expected
        assert np.allclose(rows, of_scratch, rtol=2e-6)
        kept = set(names) & set(before[kind]) - {"a/04.png", "a/20.png", "b/33.png"}
        assert len(kept) == 31
        for name, row in zip(names, rows, strict=True):
            assert name not in kept or row.tobytes() == before[kind][name].tobytes()
    for name in json.loads((out / "2.json").read_text())["files"]:
        if not name.endswith(".names.txt"):
            check_file(out / name)
    assert sorted(path.name for path in (out / ".featx" / "2").iterdir()) == ["images.gz"]
    assert not run(photos, out, update=True, **options).computed
    assert not run(photos, out, **options).computed
