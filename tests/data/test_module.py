"""Images -> batches: options, groups of equal shape, faults, and which batches are a process's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import loader, make_image
from lightning.fabric.utilities.apply_func import move_data_to_device
from PIL import Image

from featx.data.batch import Batch
from featx.data.module import ImageFolderDataModule, _WholeBatches
from featx.data.preprocess import Preprocessing
from featx.errors import BadValueError, MissingPathError, UserError
from featx.process.cores import cores_per_process, quotas, usable_cores


@pytest.mark.parametrize("batches", [[], [0], [4], [1, 3, 4], range(5)])
def test_only_whole_batches_are_dealt_and_only_the_last_is_short(batches):
    sampler = _WholeBatches(37, 8, batches)
    expected = [row for batch in batches for row in range(batch * 8, min(batch * 8 + 8, 37))]
    assert list(sampler) == expected and len(sampler) == len(expected)


def test_batches_carry_names_numbers_and_uint8(photos):
    data, batches = loader(photos, batch_size=8, num_workers=0)
    batches = list(batches)
    assert [batch.number for batch in batches] == [0, 1, 2, 3, 4]
    assert [len(batch.names) for batch in batches] == [8, 8, 8, 8, 5]
    assert [name for batch in batches for name in batch.names] == list(data.images.names)
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
    assert [(batch.number, len(batch.names)) for batch in batches] == [(3, 8), (4, 5)]


@pytest.fixture
def some_broken(tmp_path):
    """Seven images, of which 2, 3 and 4 cannot be read and 6 is damaged so that PIL does not see it."""
    for i in range(7):
        make_image(i, (60 + i % 2, 50)).save(tmp_path / f"{i}.jpg", quality=95)
    (tmp_path / "2.jpg").write_text("no image")
    (tmp_path / "3.jpg").unlink()
    (tmp_path / "3.jpg").mkdir()
    (tmp_path / "4.jpg").unlink()
    (tmp_path / "4.jpg").symlink_to("nowhere")
    data = (tmp_path / "6.jpg").read_bytes()
    (tmp_path / "6.jpg").write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_has_no_row_and_is_listed_in_its_place(some_broken, workers):
    _, batches = loader(some_broken, num_workers=workers, batch_size=2, resize=None, crop=None)
    first, second, third, last = batches
    assert [batch.number for batch in (first, second, third, last)] == [0, 1, 2, 3]
    assert [batch.size for batch in (first, second, third, last)] == [2, 2, 2, 1]
    assert first.names == ["0.jpg", "1.jpg"] and first.faults == []
    assert [(rows, list(images.shape)) for rows, images in first.groups] == [
        ([0], [1, 3, 50, 60]),
        ([1], [1, 3, 50, 61]),
    ]
    assert (second.names, second.groups) == ([], [])
    assert second.faults == [
        ("2.jpg", "text named .jpg", "ImageError: text named .jpg", False),
        ("3.jpg", "a folder, not a file", "ImageError: a folder, not a file", False),
    ]
    assert third.names == ["5.jpg"] and [rows for rows, _ in third.groups] == [[0]]
    assert [fault.path for fault in third.faults] == ["4.jpg"]
    assert last.names == [] and last.faults[0].reason in ("damaged", "truncated")


def test_not_strictly_a_damaged_image_has_a_row_and_is_listed_nevertheless(some_broken):
    _, batches = loader(some_broken, num_workers=0, strict=False, batch_size=7)
    (batch,) = batches
    assert batch.names == ["0.jpg", "1.jpg", "5.jpg", "6.jpg"] and batch.size == 7
    assert [(fault.path, fault.used) for fault in batch.faults] == [
        ("2.jpg", False), ("3.jpg", False), ("4.jpg", False), ("6.jpg", True),
    ]  # fmt: skip


def test_an_image_too_narrow_to_be_resized_is_listed_and_not_tried(tmp_path):
    Image.new("L", (65500, 1)).save(tmp_path / "a.jpg")
    _, (batch,) = loader(tmp_path, num_workers=0, resize=256)
    (fault,) = batch.faults
    assert fault.reason == "65500 x 1: more than 178,956,970 pixels when its short side is 256"
    assert batch.names == [] and fault.path == "a.jpg"
    _, (batch,) = loader(tmp_path, num_workers=0, resize=16, crop=16)
    assert batch.names == ["a.jpg"] and batch.faults == []


def test_an_image_smaller_than_the_crop_is_listed_or_padded(tmp_path):
    for i, size in enumerate([(60, 50), (60, 40), (300, 60)]):
        make_image(i, size).save(tmp_path / f"{i}.png")
    data, (batch,) = loader(tmp_path, num_workers=0, resize=None, crop=50)
    assert batch.names == ["0.png", "2.png"]
    (fault,) = batch.faults
    assert fault[:2] == ("1.png", "60 x 40: smaller than the crop of 50. --data.pad true pads it with black")
    assert data.turbo_saves(Preprocessing.usual()) is not None  # which measures with the others
    _, (batch,) = loader(tmp_path, num_workers=0, resize=None, crop=50, pad=True)
    assert (batch.names, batch.faults) == (["0.png", "1.png", "2.png"], [])
    assert not batch.groups[0][1][1, :, :5].any() and batch.groups[0][1][1, :, 5:45].any()


def make_remarkable(folder, number):
    """Make so many photographs; every third is black instead, and every fourth 16-bit grey of a 12-bit camera."""
    for i in range(number):
        grey = np.random.default_rng(i).integers(0, 4096, (30, 30), dtype=np.uint16)
        image = (
            Image.new("RGB", (30, 30))
            if i % 3 == 2
            else Image.fromarray(grey)
            if i % 4 == 3
            else make_image(i, (30, 30))
        )
        image.save(folder / f"{i:02}.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_one_colour_and_dark_ones_are_counted_and_the_first_dark_one_is_warned_of(tmp_path, caplog, workers):
    make_remarkable(tmp_path, 12)
    (tmp_path / "05.png").write_text("no image")
    data, batches = loader(tmp_path, num_workers=workers, batch_size=6)
    batches = [data.on_before_batch_transfer(batch, 0) for batch in batches]
    assert [batch.remarks for batch in batches] == [
        {"dark": {"images": 1, "first": "03.png"}, "one_colour": {"images": 1, "first": "02.png"}},
        {"dark": {"images": 1, "first": "07.png"}, "one_colour": {"images": 2, "first": "08.png"}},
    ]
    (told,) = [message for message in caplog.messages if "16-bit grey" in message]
    assert (
        told.startswith("03.png: 16-bit grey without a value above 4,095") and "--data.value_range '[0,4095]'" in told
    )
    _, (batch, _) = loader(tmp_path, num_workers=0, batch_size=6, value_range=(0, 4095))
    assert batch.remarks.keys() == {"one_colour"}


def test_a_lost_folder_is_not_so_many_bad_images(some_broken):
    data, batches = loader(some_broken, num_workers=0, batch_size=2)
    bad = list(batches)[1]
    assert data.on_before_batch_transfer(bad, 0) is bad
    some_broken.rename(some_broken.with_name("elsewhere"))
    with pytest.raises(UserError, match=r"--data.dir .*: the folder is gone, or empty. It held 2.jpg") as err:
        data.on_before_batch_transfer(bad, 0)
    assert err.value.exit_status == 4


def test_a_network_is_tried_with_the_first_image_that_can_be_read(some_broken):
    preset = Preprocessing.usual()
    data = ImageFolderDataModule(str(some_broken))
    data.setup()
    for name in ("0.jpg", "1.jpg"):
        (some_broken / name).write_text("broken")
    assert data.first_batch(preset).names == ["5.jpg"]
    (some_broken / "5.jpg").write_text("broken")
    ((rows, images),) = data.first_batch(preset).groups
    assert rows == [0] and images.shape == (1, 3, 224, 224)


def test_only_the_images_of_a_list_are_read_and_a_missing_one_is_listed(photos, tmp_path, caplog):
    (tmp_path / "list").write_text("cats/image-02.jpg\nlost.jpg\nants/image-00.jpg\n")
    with caplog.at_level("INFO"):
        _, (batch,) = loader(photos, num_workers=0, files=str(tmp_path / "list"))
    assert batch.names == ["cats/image-02.jpg", "ants/image-00.jpg"]
    assert batch.faults == [("lost.jpg", "no such file", "FileNotFoundError: No such file or directory", False)]
    assert f"3 of {photos}, listed in {tmp_path / 'list'}" in caplog.text


def test_a_missing_list_is_reported_before_the_folder_is_looked_through(photos):
    with pytest.raises(MissingPathError, match=r"--data.files nowhere: no such file"):
        ImageFolderDataModule(str(photos), files="nowhere").check()


def test_turbo_has_the_same_names_and_nearly_the_same_pixels(photos):
    exact, turbo = (list(loader(photos, num_workers=0, decoder=decoder)[1]) for decoder in ("exact", "turbo"))
    for ours, theirs in zip(exact, turbo, strict=True):
        assert ours.names == theirs.names
        difference = (ours.groups[0][1].int() - theirs.groups[0][1].int()).abs()
        assert difference.max() <= 2 and difference.any()


def make_float(path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(path)


def test_an_image_that_needs_an_option_is_listed_wherever_it_is(tmp_path):
    for name in ("0.tif", "2.tif"):
        make_float(tmp_path / name)
    make_image(1, (40, 40)).save(tmp_path / "1.png")
    data, (batch,) = loader(tmp_path, num_workers=0)
    assert (batch.names, [fault.path for fault in batch.faults]) == (["1.png"], ["0.tif", "2.tif"])
    assert all("--data.value_range" in fault.reason for fault in batch.faults)
    assert data.first_batch(Preprocessing.usual()).names == ["1.png"]


def test_a_run_is_refused_before_it_begins_where_all_that_can_be_opened_need_an_option(tmp_path):
    for i in range(1, 65):
        make_float(tmp_path / f"{i:02}.tif")
    (tmp_path / "00.jpg").write_text("no image")
    make_image(1, (40, 40)).save(tmp_path / "65.png")  # beyond those that are looked at
    words = r"^01.tif: 32-bit float .*--data.value_range '\[0,1\]'\nNone of the first 64 images can be read"
    with pytest.raises(BadValueError, match=words):
        ImageFolderDataModule(str(tmp_path)).setup()
    ImageFolderDataModule(str(tmp_path), value_range=(0, 1)).setup()
    for name in ("63.tif", "64.tif"):
        (tmp_path / name).unlink()
    ImageFolderDataModule(str(tmp_path)).setup()


def test_a_run_is_refused_where_all_of_the_first_images_are_smaller_than_the_crop(tmp_path):
    make_image(1, (40, 40)).save(tmp_path / "1.png")
    data = ImageFolderDataModule(str(tmp_path), resize=None)
    data.setup()
    with pytest.raises(BadValueError, match=r"^1.png: 40 x 40: smaller than the crop of 224. --data.pad true"):
        data.first_batch(Preprocessing.usual())
    (tmp_path / "1.png").write_text("no image")  # which no option would help
    assert data.first_batch(Preprocessing.usual()).groups[0][1].shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "--data.batch_size 0: expected a whole number of at least 1"),
        ({"num_workers": -1}, "--data.num_workers -1: expected a whole number of at least 0"),
        ({"resize": 0}, "--data.resize 0"),
        ({"crop": -3}, "--data.crop -3"),
        (
            {"interpolation": "lanczos", "decoder": "turbo"},
            "--data.interpolation lanczos: expected bilinear or bicubic",
        ),
        ({"value_range": (4, 4)}, "low below high"),
        ({"value_range": (0, float("nan"))}, "low below high"),
    ],
)
def test_impossible_values_are_refused(options, words):
    with pytest.raises(BadValueError, match=words):
        ImageFolderDataModule("photos", **options)


def test_options_stand_over_the_preset():
    preset = Preprocessing.usual()
    assert ImageFolderDataModule("x").preprocessing(preset) == preset
    changed = ImageFolderDataModule("x", resize=224, crop=None).preprocessing(preset)
    assert (changed.resize, changed.crop, changed.interpolation) == (224, None, "bilinear")
    assert changed.source.endswith("with your options")


@pytest.mark.parametrize(
    ("options", "resize", "crop"),
    [({"resize": 32}, 32, 224), ({"crop": 300}, 256, 300), ({"resize": 5, "crop": 6}, 5, 6)],
)
def test_a_crop_larger_than_the_resized_images_is_refused_unless_they_are_to_be_padded(options, resize, crop):
    words = (
        rf"--data.resize {resize} with --data.crop {crop}: .*\nExpected --data.crop {resize} or less.*--data.pad true"
    )
    with pytest.raises(BadValueError, match=words):
        ImageFolderDataModule("x", **options).preprocessing(Preprocessing.usual())
    assert ImageFolderDataModule("x", **options, pad=True).preprocessing(Preprocessing.usual()).pad


def test_padding_is_part_of_the_identity_where_it_decides_and_nowhere_else():
    def identity(**options):
        return ImageFolderDataModule("x", **options).identity(Preprocessing.usual())["preprocessing"]

    for options in ({}, {"resize": 224}, {"resize": None, "crop": None}, {"crop": 256}):
        assert "pad" not in identity(**options) and identity(**options) == identity(**options, pad=True)
    assert identity(resize=None)["pad"] is False and identity(resize=None, pad=True)["pad"] is True
    assert identity(resize=32, pad=True)["pad"] is True


def test_a_selection_is_part_of_the_identity_when_it_is_asked_for():
    def identity(**options):
        found = ImageFolderDataModule("x", **options).identity(Preprocessing.usual())
        return {name: found[name] for name in ("exclude", "suffixes") if name in found}

    assert identity() == identity(exclude=[], suffixes=[]) == {}
    assert identity(exclude="*_mask.png") == identity(exclude=["*_mask.png"]) == {"exclude": ["*_mask.png"]}
    assert identity(suffixes=[".JFIF", ".avif"]) == {"suffixes": [".jfif", ".avif"]}


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, [1.5]),
        ("0::/outside\n", {"cpu.max": "200000 100000\n"}, [2.0]),
        (
            "4:cpu,cpuacct:/j\n3:memory:/j\n",
            {"cpu/j/cpu.cfs_quota_us": "50000", "cpu/j/cpu.cfs_period_us": "100000"},
            [0.5],
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
    ],
)
def test_quotas_of_both_versions_of_cgroups_are_found_up_to_the_top(tmp_path, own, files, expected):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    assert list(quotas(str(tmp_path / "own"), str(tmp_path / "root"))) == expected
    assert list(quotas(str(tmp_path / "nowhere"))) == []


def test_batches_say_what_decoding_and_resizing_took(photos):
    for batch in loader(photos, num_workers=0, batch_size=16)[1]:
        assert all(0 < seconds < 10 for seconds in batch.seconds)


def test_a_batch_goes_whole_through_lightnings_transfer_and_pinning(photos):
    batch = next(iter(loader(photos, num_workers=0, batch_size=8)[1]))
    moved = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(moved, Batch) and moved[:2] == batch[:2] and moved[3:] == batch[3:]
    assert [(rows, images.device.type) for rows, images in moved.groups] == [(list(range(8)), "meta")]


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    assert 1 <= usable_cores() <= 6
    monkeypatch.setattr("featx.process.cores.usable_cores", lambda: 6)
    assert cores_per_process(SimpleNamespace(num_devices=2)) == 3
    assert cores_per_process(SimpleNamespace(num_devices=100)) == 1
