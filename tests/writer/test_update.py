"""``--writer.update true``: rows of unchanged images stay, new and changed images are computed, and nothing else."""

import csv
import gzip
import itertools
import json
import os
import shutil
import warnings
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_image
from PIL import Image
from tiny import Scale, run

import featx
from featx import FeatureWriter
from featx.commands.verify import check_file, verify
from featx.errors import UserError
from featx.results import load
from featx.writer import disk
from featx.writer.update import Update

pytestmark = pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")  # nothing to do
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


ALL = {"format": FORMATS, "names": "relative"}


def contents(out: Path) -> dict[str, bytes]:
    """Return all files of an output folder but the record, whose times differ; of that, what does not."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    found[".featx/2/images.gz"] = gzip.decompress(found[".featx/2/images.gz"])
    record = json.loads(found.pop("2.json"))
    del record["run"], record["generations"][1:]
    return found | {"2.json": json.dumps(record["generations"][0] and record).encode()}


class Killed(BaseException):
    """Ends a run at a line, and everything that it would still do to the disk."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let all operations on the disk fail from the nth on that an update does once its rows are there."""
    left, finish = itertools.repeat(0), Update.finish

    def begin(self, *args):
        nonlocal left
        left = itertools.count(number, -1)
        return finish(self, *args)

    def counted(real):
        def operate(*args, **options):
            if next(left) < 0:
                raise Killed
            return real(*args, **options)

        return operate

    monkeypatch.setattr(Update, "finish", begin)
    for name in ("open_to_write", "write", "sync", "rename", "remove", "replace", "append_range"):
        monkeypatch.setattr(disk, name, counted(getattr(disk, name)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that the kill left open
@pytest.mark.parametrize("options", [{}, {"shard_rows": 16}], ids=str)
def test_killed_at_any_operation_on_the_disk_it_continues(photos, tmp_path, options, monkeypatch):
    options = ALL | options
    (photos / "a/20.png").write_bytes(b"no image")
    run(photos, tmp_path / "old", **options)
    change(photos)
    (photos / "b/35.png").write_bytes(b"no image")
    shutil.copytree(tmp_path / "old", tmp_path / "clean")
    run(photos, tmp_path / "clean", update=True, **options)
    number, killed = 0, True
    while killed:
        out = tmp_path / f"killed-{number}"
        shutil.copytree(tmp_path / "old", out)
        with monkeypatch.context() as patched:
            kill_at(patched, number)
            try:
                run(photos, out, update=True, **options)
                killed = False
            except Killed:
                for path in (tmp_path / "old").rglob("2*.*"):
                    complete = (out / ".featx/2/update/complete.json").exists()
                    complete |= (out / "2.json").read_bytes() != (tmp_path / "old/2.json").read_bytes()
                    assert complete or (out / path.relative_to(tmp_path / "old")).read_bytes() == path.read_bytes()
        run(photos, out, update=True, **options)
        assert contents(out) == contents(tmp_path / "clean"), number
        shutil.rmtree(out)
        number += 7
    assert number > 50


def test_images_that_become_readable_or_damaged_or_have_another_name(photos, tmp_path):
    out, damaged = tmp_path / "out", (photos / "a/04.png").read_bytes()[:200]
    add(photos, "a/same.png", 500)
    add(photos, "b/same.png", 501)
    for name in ("a/20", "a/22", "b/21"):
        (photos / f"{name}.png").write_bytes(b"no image")
    writer = run(photos, out)
    before, rows = lines(out / "2.csv"), (out / "2.csv").read_bytes().splitlines()
    add(photos, "a/20.png", 20)  # was listed
    (photos / "a/04.png").write_bytes(damaged)  # had a row
    (photos / "b/05.png").rename(photos / "a/05-renamed.png")
    add(photos, "b/same.png", 502)
    (photos / "b/21.png").unlink()  # was listed
    writer = run(photos, out, update=True)
    assert writer.computed == 4 and writer.faults == 2
    with (out / "2.errors.csv").open(newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["path", "a/04.png", "a/22.png"]
    run(photos, tmp_path / "scratch")
    assert [line.split(b",")[0] for line in (out / "2.csv").read_bytes().splitlines()] == [
        line.split(b",")[0] for line in (tmp_path / "scratch" / "2.csv").read_bytes().splitlines()
    ]
    after, again = lines(out / "2.csv"), (out / "2.csv").read_bytes().splitlines()
    assert after["05-renamed.png"].split(b",")[1:] == before["05.png"].split(b",")[1:]
    same, of_before = ([line for line in some if line.startswith(b"same")] for some in (again, rows))
    assert same[0] == of_before[0] and same[1] != of_before[1]
    assert check_file(out / "2.csv")["errors"] == 2


def test_after_an_update_the_same_command_computes_listed_images_that_can_be_read(photos, tmp_path):
    out = tmp_path / "out"
    (photos / "a/20.png").write_bytes(b"no image")
    run(photos, out)
    add(photos, "a/new.png", 100)
    assert run(photos, out, update=True).computed == 1
    assert not run(photos, out).computed
    add(photos, "a/20.png", 20)
    writer = run(photos, out)
    assert writer.computed == 1 and not writer.faults and not (out / "2.errors.csv").exists()
    record = check_file(out / "2.csv")
    assert [one["images"] for one in record["generations"]] == [40, 1, 1]
    assert all(one["date"] and one["device"] for one in record["generations"])


def test_only_listed_images_have_changed_so_that_their_whole_batches_are_computed(photos, tmp_path):
    (photos / "a/20.png").write_bytes(b"no image")
    run(photos, tmp_path / "out")
    add(photos, "a/20.png", 20)
    run(photos, tmp_path / "out", update=True)
    run(photos, tmp_path / "scratch")
    assert (tmp_path / "out/2.csv").read_bytes() == (tmp_path / "scratch/2.csv").read_bytes()
    assert "generations" not in check_file(tmp_path / "out/2.csv")


def test_images_are_only_removed(photos, tmp_path):
    run(photos, tmp_path / "out", **ALL)
    (photos / "a/20.png").unlink()
    assert not run(photos, tmp_path / "out", update=True, **ALL).computed
    (photos / "a/22.png").write_bytes(b"no image")
    for i in range(0, 20, 2):
        (photos / f"a/{i:02}.png").unlink()
    assert run(photos, tmp_path / "out", update=True, **ALL).computed == 1
    run(photos, tmp_path / "scratch", **ALL)
    for kind in FORMATS:
        (names, rows), (expected, of_scratch) = values(tmp_path / "out", kind), values(tmp_path / "scratch", kind)
        assert names == expected and np.allclose(rows, of_scratch, rtol=2e-6)


def test_that_most_images_are_gone_is_reported(photos, tmp_path, caplog):
    run(photos, tmp_path / "out")
    (tmp_path / "new.txt").write_text("a/00.png\nb/01.png\n")
    run(photos, tmp_path / "out", update=True, data={"files": str(tmp_path / "new.txt")})
    assert "MORE IMAGES ARE GONE (38) THAN LEFT (2)" in caplog.text


def test_what_an_update_does_not_do_is_refused(photos, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"--writer.update true: .*--writer.overwrite true removes"):
        run(photos, out, update=True, overwrite=True)
    run(photos, out)
    add(photos, "a/new.png", 100)
    before = contents_of_files(out)
    with pytest.raises(UserError, match=r"1 image added since .*\n--writer.update true keeps the other rows"):
        run(photos, out)
    with pytest.raises(UserError, match="names: basename -> relative"):
        run(photos, out, update=True, names="relative")
    with pytest.raises(UserError, match=r"--writer.format npy: .*/2 has csv, and .*\nExpected --writer.format csv."):
        run(photos, out, update=True, format="npy")
    assert contents_of_files(out) == before
    (out / "2.csv").write_bytes(before["2.csv"].replace(b"0.", b"1.", 1))
    with pytest.raises(UserError, match=r"2.csv: does not match 2.json: it was changed"):
        run(photos, out, update=True)
    (out / "2.csv").unlink()
    with pytest.raises(UserError, match=r"2.csv: is missing, so its rows cannot be kept"):
        run(photos, out, update=True)
    (out / "2.csv").write_bytes(before["2.csv"])
    (out / ".featx/2/images.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"images.gz: does not list the images of 2.json"):
        run(photos, out, update=True)


def contents_of_files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_layers_of_which_one_is_finished(photos, tmp_path):
    out = tmp_path / "out"
    run(photos, out)
    before = lines(out / "2.csv")
    change(photos)
    writer = run(photos, out, layer=["2", "1"], update=True)
    assert writer.computed == 45  # layer 1 has no rows yet
    after = lines(out / "2.csv")
    assert all(after[name] == before[name] for name in after.keys() & before.keys() - {"04.png", "20.png", "33.png"})
    run(photos, tmp_path / "scratch", layer=["2", "1"])
    assert (out / "1.csv").read_bytes() == (tmp_path / "scratch/1.csv").read_bytes()
    assert (out / "2.csv").read_bytes() == (tmp_path / "scratch/2.csv").read_bytes()  # which rounds nothing
    assert "generations" not in check_file(out / "1.csv")
    assert [one["images"] for one in check_file(out / "2.csv")["generations"]] == [40, 14]


def test_counts_of_the_record_are_those_of_a_run_from_scratch(photos, tmp_path, monkeypatch):
    def forward(self, rows):  # the third column is infinite, or too large for float16, or neither
        found = rows[:, :4] * 1.0
        found[:, 2] = torch.where(found[:, 2] > 0.1, torch.inf, torch.where(found[:, 2] < -0.1, 1e5, found[:, 2]))
        return found

    monkeypatch.setattr(Scale, "forward", forward)
    options = {"format": ["npy"], "dtype": "float16"}
    for name in ("a/30", "a/32", "b/35"):
        Image.new("RGB", (24, 20), "red").save(photos / f"{name}.png")
    run(photos, tmp_path / "out", **options)
    change(photos)
    (photos / "a/30.png").unlink()
    add(photos, "a/32.png", 600)
    Image.new("RGB", (24, 20), "blue").save(photos / "b/01.png")
    run(photos, tmp_path / "out", update=True, **options)
    run(photos, tmp_path / "scratch", **options)
    found, expected = (json.loads((tmp_path / name / "2.json").read_text()) for name in ("out", "scratch"))
    keys = ("rows", "errors", "errors_used", "values_not_finite", "rows_not_finite", "values_overflowed", "remarks",
            "readers", "inputs")  # fmt: skip
    assert {key: found[key] for key in keys} == {key: expected[key] for key in keys}
    assert found["values_overflowed"] and found["values_not_finite"] and found["remarks"]["one_colour"]["images"] == 2


def test_ten_updates_leave_nothing_behind(photos, tmp_path):
    run(photos, tmp_path / "out", **ALL)
    for i in range(10):
        add(photos, f"a/{i}-new.png", 100 + i)
        (photos / f"b/{2 * i + 1:02}.png").unlink()
        assert run(photos, tmp_path / "out", update=True, **ALL).computed == 1
    assert sorted(path.name for path in (tmp_path / "out/.featx/2").iterdir()) == ["images.gz"]
    assert len(check_file(tmp_path / "out/2.csv")["generations"]) == 11
    run(photos, tmp_path / "scratch", **ALL)
    assert (tmp_path / "out/2.csv").read_bytes() == (tmp_path / "scratch/2.csv").read_bytes()


def interrupted(photos: Path, out: Path, images: int, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    """Update until so many images have been computed."""
    real, left = FeatureWriter.write_on_batch_end, itertools.count(images - 8, -8)

    def write_on_batch_end(*args):
        real(*args)
        if next(left) <= 0:
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(FeatureWriter, "write_on_batch_end", write_on_batch_end)
        run(photos, out, update=True, **options)


@pytest.mark.parametrize("options", [{}, {"shard_rows": 16}], ids=str)
def test_images_change_again_while_an_update_is_interrupted(photos, tmp_path, options, monkeypatch):
    out, options = tmp_path / "out", ALL | options
    run(photos, out, **options)
    for i in range(30):
        add(photos, f"b/{i:02}-new.png", 100 + i)
    interrupted(photos, out, 16, monkeypatch, **options)
    interrupted(photos, out, 8, monkeypatch, **options)  # the same update continues
    for i in range(4):
        add(photos, f"a/{i:02}-new.png", 200 + i)
    add(photos, "b/02-new.png", 300)  # which had its row
    (photos / "b/03-new.png").unlink()
    interrupted(photos, out, 8, monkeypatch, **options)  # of 11: 6 of the first list, 4 added since and 1 changed
    add(photos, "a/05-new.png", 400)
    writer = run(photos, out, update=True, **options)
    assert writer.computed == 4
    run(photos, tmp_path / "scratch", **options)
    for kind in FORMATS:
        (names, rows), (expected, of_scratch) = values(out, kind), values(tmp_path / "scratch", kind)
        assert names == expected and np.allclose(rows, of_scratch, rtol=2e-6)
    assert sorted(path.name for path in (out / ".featx" / "2").iterdir()) == ["images.gz"]
    record = json.loads((out / "2.json").read_text())
    assert [one["images"] for one in record["generations"]] == [40, 34]


def test_an_archive_has_other_members(photos, tmp_path):
    def pack() -> Path:
        (tmp_path / "photos.zip").unlink(missing_ok=True)
        return Path(shutil.make_archive(str(tmp_path / "photos"), "zip", photos))

    run(pack(), tmp_path / "out")
    before = lines(tmp_path / "out/2.csv")
    change(photos)
    add(photos, "b/01.png", 1)
    assert run(pack(), tmp_path / "out", update=True).computed == 14
    run(pack(), tmp_path / "scratch")
    after, scratch = lines(tmp_path / "out/2.csv"), lines(tmp_path / "scratch/2.csv")
    assert list(after) == list(scratch) and after["01.png"] == before["01.png"]


@pytest.mark.skipif("parquet" not in FORMATS, reason="needs pyarrow")
def test_rows_of_a_table_without_names_move(photos, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    def write(name: str, letter: str) -> None:
        images = [path.read_bytes() for path in sorted((photos / letter).iterdir())]
        (tmp_path / "table").mkdir(exist_ok=True)
        parquet.write_table(pa.table({"image": pa.array(images[:12], pa.binary())}), tmp_path / "table" / name)
        os.utime(tmp_path / "table" / name, (10**9, 10**9))

    write("1.parquet", "a")
    run(tmp_path / "table", tmp_path / "out")
    write("2.parquet", "b")
    assert run(tmp_path / "table", tmp_path / "out", update=True).computed == 12
    write("0.parquet", "b")  # row 12 was the first of 2.parquet, and is the first of 1.parquet
    run(tmp_path / "table", tmp_path / "out", update=True)
    run(tmp_path / "table", tmp_path / "scratch")
    (names, rows), (expected, of_scratch) = values(tmp_path / "out", "csv"), values(tmp_path / "scratch", "csv")
    assert names == expected and np.allclose(rows, of_scratch, rtol=2e-6)


def test_verify_recomputes_rows_in_other_batches_than_an_update(three_photos, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(three_photos, photos)
    options = {"arch": "squeezenet1_1", "weights": "random", "layer": "features", "pool": "avg", "batch_size": 2}
    featx.extract(photos, out_dir=tmp_path / "out", **options)
    shutil.copy(photos / "1.png", photos / "0-new.png")
    names, rows = featx.extract(photos, out_dir=tmp_path / "out", update=True, **options)
    assert names == ["0-new.png", "0.png", "1.png", "2.png"]
    assert np.allclose(rows, featx.extract(photos, **options)[1], rtol=2e-6)
    (photos / "2.png").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert featx.extract(photos, out_dir=tmp_path / "out", update=True, **options)[0] == names[:3]
    shutil.copy(three_photos / "2.png", photos / "2.png")
    featx.extract(photos, out_dir=tmp_path / "out", update=True, **options)
    assert not verify([str(tmp_path / "out/features.csv"), "--images", str(photos)])
    assert "4 rows recomputed in other batches, the largest relative difference is" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{}, {"shard_rows": 16}], ids=str)
@pytest.mark.parametrize("jobs", [["2/3", "3/3", "1/3"], ["auto"], ["1/2", None]], ids=str)
def test_jobs_update_with_the_bytes_of_one_run(photos, tmp_path, jobs, options):
    options = ALL | options
    (photos / "a/20.png").write_bytes(b"no image")
    run(photos, tmp_path / "out", **options)
    change(photos)
    shutil.copytree(tmp_path / "out", tmp_path / "clean")
    run(photos, tmp_path / "clean", update=True, **options)
    before = contents_of_files(tmp_path / "out")
    computed = 0
    for shard in jobs:
        assert before.items() <= contents_of_files(tmp_path / "out").items()
        computed += run(photos, tmp_path / "out", update=True, data={"shard": shard}, **options).computed
    assert computed == 14
    found, expected = contents(tmp_path / "out"), contents(tmp_path / "clean")
    assert found.pop(".featx/lock", None) == expected.pop(".featx/lock", None) and found == expected
    assert not run(photos, tmp_path / "out", update=True, data={"shard": jobs[0]}, **options).computed
    assert "shares" not in os.listdir(tmp_path / "out/.featx")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that the kill left open
@pytest.mark.parametrize("next_job", ["1/2", "auto", None])
def test_a_job_that_ends_in_its_join_is_replaced(photos, tmp_path, monkeypatch, next_job):
    run(photos, tmp_path / "out", **ALL)
    change(photos)
    shutil.copytree(tmp_path / "out", tmp_path / "clean")
    run(photos, tmp_path / "clean", update=True, **ALL)
    run(photos, tmp_path / "out", update=True, data={"shard": "2/2"}, **ALL)
    for number in range(3, 90, 9):
        shutil.copytree(tmp_path / "out", tmp_path / "killed")
        with monkeypatch.context() as patched, suppress(Killed):
            kill_at(patched, number)
            run(photos, tmp_path / "killed", update=True, data={"shard": "1/2"}, **ALL)
        run(photos, tmp_path / "killed", update=True, data={"shard": next_job}, **ALL)
        assert not (tmp_path / "killed/.featx/shares/plan.json").exists()  # without which the others mean nothing
        shutil.rmtree(tmp_path / "killed/.featx/shares", ignore_errors=True)
        assert contents(tmp_path / "killed") == contents(tmp_path / "clean"), number
        shutil.rmtree(tmp_path / "killed")


def test_a_stopped_job_that_wakes_up_after_a_later_update_changes_nothing(photos, tmp_path, monkeypatch):
    run(photos, tmp_path / "out", **ALL)
    add(photos, "a/1-new.png", 100)
    with monkeypatch.context() as patched:
        patched.setattr("featx.writer.update.complete", lambda state: None)
        run(photos, tmp_path / "out", update=True, **ALL)
    shutil.copytree(tmp_path / "out/.featx/2/update", tmp_path / "stale")
    add(photos, "a/2-new.png", 101)
    assert run(photos, tmp_path / "out", update=True, **ALL).computed == 1
    before = contents_of_files(tmp_path / "out")
    shutil.copytree(tmp_path / "stale", tmp_path / "out/.featx/2/update")
    run(photos, tmp_path / "out", update=True, **ALL)
    assert contents_of_files(tmp_path / "out") == before
