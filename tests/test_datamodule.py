from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import loader
from PIL import Image

from featx.datamodule import ImageFolderDataModule, _WholeBatches, cores_per_process, usable_cores
from featx.messages import BadValueError, ImageError
from featx.preprocess import Preprocessing


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 8])
@pytest.mark.parametrize(("images", "batch_size"), [(37, 8), (3, 8), (40, 8), (1, 1)])
def test_whole_batches_are_dealt_once_and_in_order(processes, images, batch_size):
    shares = [list(_WholeBatches(images, batch_size, processes, rank)) for rank in range(processes)]
    assert [row for share in shares for row in share] == list(range(images))
    assert all(share[0] % batch_size == 0 for share in shares if share)
    assert max(len(s) for s in shares) - min(len(s) for s in shares) < 2 * batch_size
    assert [len(_WholeBatches(images, batch_size, processes, r)) for r in range(processes)] == list(map(len, shares))


def test_batches_carry_names_numbers_and_uint8(photos):
    data, batches = loader(photos, batch_size=8, num_workers=0)
    batches = list(batches)
    assert [batch.number for batch in batches] == [0, 1, 2, 3, 4]
    assert [len(batch.names) for batch in batches] == [8, 8, 8, 8, 5]
    assert [name for batch in batches for name in batch.names] == data.images.names
    ((rows, images),) = batches[0].groups
    assert rows == list(range(8)) and images.shape == (8, 3, 224, 224) and images.dtype == torch.uint8


def test_without_a_crop_equal_shapes_are_grouped_and_keep_their_rows(photos):
    _, batches = loader(photos, batch_size=37, num_workers=0, resize=64, crop=None)
    (batch,) = batches
    shapes = [images.shape[1:] for _, images in batch.groups]
    assert len(set(shapes)) == len(shapes) > 2
    assert sorted(row for rows, _ in batch.groups for row in rows) == list(range(37))
    for rows, images in batch.groups:
        for row, image in zip(rows, images, strict=True):
            alone = list(loader(photos, batch_size=1, num_workers=0, resize=64, crop=None)[1])[row]
            assert torch.equal(alone.groups[0][1][0], image)


def test_the_last_rank_of_many_gets_whole_batches(photos):
    _, batches = loader(photos, processes=2, rank=1, batch_size=8, num_workers=0)
    assert [(batch.number, len(batch.names)) for batch in batches] == [(2, 8), (3, 8), (4, 5)]


def test_an_unreadable_image_is_raised_in_the_main_process(photos, tmp_path):
    (tmp_path / "broken.jpg").write_text("no image")
    data, batches = loader(tmp_path, num_workers=1)
    (batch,) = batches
    with pytest.raises(ImageError, match=r"broken.jpg: not an image"):
        data.on_before_batch_transfer(batch, 0)


def test_deep_images_are_found_before_the_first_batch(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(BadValueError, match="value_range"):
        ImageFolderDataModule(str(tmp_path)).setup()
    ImageFolderDataModule(str(tmp_path), value_range=(0, 1)).setup()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "--data.batch_size 0: expected a whole number of at least 1"),
        ({"num_workers": -1}, "--data.num_workers -1: expected a whole number of at least 0"),
        ({"resize": 0}, "--data.resize 0"),
        ({"crop": -3}, "--data.crop -3"),
        ({"value_range": (4, 4)}, "low below high"),
        ({"value_range": (0, float("nan"))}, "low below high"),
    ],
)
def test_impossible_numbers_are_refused(options, words):
    with pytest.raises(BadValueError, match=words):
        ImageFolderDataModule("photos", **options)


def test_options_stand_over_the_preset():
    preset = Preprocessing.usual()
    assert ImageFolderDataModule("x").preprocessing(preset) == preset
    changed = ImageFolderDataModule("x", resize=224, crop=None).preprocessing(preset)
    assert (changed.resize, changed.crop, changed.interpolation) == (224, None, "bilinear")
    assert changed.source.endswith("with your options")


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    assert 1 <= usable_cores() <= 6
    monkeypatch.setattr("featx.datamodule.usable_cores", lambda: 6)
    assert cores_per_process(SimpleNamespace(num_devices=2)) == 3
    assert cores_per_process(SimpleNamespace(num_devices=100)) == 1
