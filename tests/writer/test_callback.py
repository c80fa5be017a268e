"""Activations -> files: rows, names, records and shards, by a Trainer put together by hand."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENV, REPO, make_image, oracle, predict, random_network, read_csv, relative_error
from lightning.pytorch import Trainer
from tiny import Scale, Tiny, run

from featx import FeatureExtractor, FeatureWriter, ImageFolderDataModule
from featx.errors import BadValueError, ImageError, UserError
from featx.results import load, read, record
from featx.writer.disk import DiskError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_a_users_own_trainer_writes_the_file(photos, tmp_path):
    writer = run(photos, tmp_path / "new" / "out")
    assert sorted(os.listdir(tmp_path / "new" / "out")) == [".featx", "2.csv", "2.json"]
    names, values = read_csv(writer.files["2"][0])
    assert len(names) == 37 == writer.computed and values.shape == (37, 4)
    assert names == [os.path.basename(name) for name in ImageFolderDataModuleNames(photos)]


def ImageFolderDataModuleNames(photos):
    data = ImageFolderDataModule(str(photos))
    data.setup()
    return list(data.images.names)


def test_relative_names_and_a_header(photos, tmp_path):
    writer = run(photos, tmp_path, names="relative", header=True)
    lines = writer.files["2"][0].read_text().splitlines()
    assert lines[0] == "image,2.0,2.1,2.2,2.3" and len(lines) == 38
    assert lines[1].startswith("ants/image-00.jpg,")
    assert [line.split(",")[0] for line in lines[1:]] == ImageFolderDataModuleNames(photos)


def test_the_record_says_what_made_the_file(photos, tmp_path):
    run(photos, tmp_path)
    record = json.loads((tmp_path / "2.json").read_text())
    assert record["rows"] == 37 and record["columns"] == 4 and record["errors"] == 0
    data = (tmp_path / "2.csv").read_bytes()
    assert record["files"] == {"2.csv": {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}
    decides, about = record["identity"], record["run"]
    assert decides["network"] == "Tiny" and len(decides["weights"]) == 64 and decides["versions"]["torch"]
    assert decides["preprocessing"]["crop"] == 224 and decides["batch_size"] == 8
    assert about["weights"] == "as Tiny.build_network() made them" and about["processes"] == 1
    assert record["inputs"]["images"] == 37 and list(about["batches_by_device"].values()) == [5]


def test_npy_has_the_same_values_and_the_names_in_a_second_file(photos, tmp_path):
    writer = run(photos, tmp_path, format=["csv", "npy"], names="relative")
    assert sorted(os.listdir(tmp_path)) == [".featx", "2.csv", "2.json", "2.names.txt", "2.npy"]
    assert {path.name for path in writer.files["2"]} == {"2.csv", "2.npy", "2.names.txt"}
    values = np.load(tmp_path / "2.npy", mmap_mode="r")
    names, expected = read_csv(tmp_path / "2.csv")
    assert values.dtype == np.float32 and np.array_equal(values, expected)
    assert (tmp_path / "2.names.txt").read_text().splitlines() == names


def test_every_format_has_the_same_rows_alone_and_with_others(odd_photos, tmp_path):
    pytest.importorskip("pyarrow")
    run(odd_photos, tmp_path / "all", format=["csv", "npy", "parquet"])
    names, values = load(tmp_path / "all" / "2.csv")
    assert len(names) == 10 and values.shape == (10, 4)
    for suffix in (".npy", ".parquet"):
        found_names, found = load(tmp_path / "all" / f"2{suffix}")
        assert np.array_equal(found, values)
        assert found_names == ([name.replace("\udce9", r"\xe9") for name in names] if suffix == ".parquet" else names)
    run(odd_photos, tmp_path / "one", format="parquet")
    assert (tmp_path / "one" / "2.parquet").read_bytes() == (tmp_path / "all" / "2.parquet").read_bytes()
    assert sorted(os.listdir(tmp_path / "one")) == [".featx", "2.errors.csv", "2.json", "2.parquet"]


READERS = {
    "pyarrow": lambda module, path: __import__("pyarrow.parquet").parquet.read_table(path).to_pydict(),
    "pandas": lambda module, path: module.read_parquet(path).to_dict("list"),
    "polars": lambda module, path: module.read_parquet(path).to_dict(as_series=False),
    "duckdb": lambda module, path: {
        name: list(values) for name, values in module.sql(f"from '{path}'").fetchnumpy().items()
    },
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("reader", READERS)
def test_four_libraries_read_the_parquet(photos, tmp_path, reader, dtype):
    pytest.importorskip("pyarrow")
    module = pytest.importorskip(reader)
    run(photos, tmp_path, format=["npy", "parquet"], dtype=dtype)
    table = READERS[reader](module, str(tmp_path / "2.parquet"))
    paths = ImageFolderDataModuleNames(photos)
    assert list(table) == ["image", "path", "class", "2"]
    assert table["path"] == paths and table["image"] == [os.path.basename(path) for path in paths]
    assert table["class"] == [path.split("/")[0] for path in paths]
    values = np.array([list(row) for row in table["2"]], dtype)
    assert np.array_equal(values, np.load(tmp_path / "2.npy"))


def test_parquet_says_what_made_it_and_is_compressed_by_byte_streams(photos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    run(photos, tmp_path, format="parquet")
    with parquet.ParquetFile(tmp_path / "2.parquet") as file:
        said = json.loads(file.schema_arrow.metadata[b"featx"])
        column = file.metadata.row_group(0).column(3)
    record = json.loads((tmp_path / "2.json").read_text())
    assert said == {name: record[name] for name in ("layer", "rows", "columns", "errors", "identity")}
    assert column.compression == "ZSTD" and "BYTE_STREAM_SPLIT" in column.encodings


def test_parquet_row_groups_fit_in_memory(photos, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    run(photos, tmp_path / "whole", format="parquet")
    monkeypatch.setattr("featx.writer.formats.parquet.GROUP_BYTES", 10 * 4 * 4)
    run(photos, tmp_path / "tens", format="parquet")
    assert [len(names) for names, _ in read(tmp_path / "tens" / "2.parquet")] == [10, 10, 10, 7]
    whole, tens = load(tmp_path / "whole" / "2.parquet"), load(tmp_path / "tens" / "2.parquet")
    assert whole[0] == tens[0] and np.array_equal(whole[1], tens[1])


@pytest.fixture
def odd_photos(tmp_path):
    """Images with awkward names and one that cannot be read, in a folder of classes."""
    names = ["a,b.png", 'c"d.png', "e\nf.png", "#g.png", "h\\n.png", "plain.png", "猫.png", os.fsdecode(b"\xe9.png")]
    for i, name in enumerate([*names, "x.png", "y.png", "z.png"]):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        make_image(i, (30, 30)).save(folder / name)
    (tmp_path / "photos" / "b" / "y.png").write_bytes(b"broken")
    return tmp_path / "photos"


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_a_repaired_image_recomputes_only_its_batch(odd_photos, tmp_path, format):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    broken = odd_photos / "b" / "y.png"
    out = tmp_path / "out"
    assert run(odd_photos, out, format=format).faults == 1
    made = (out / f"2.{format}").read_bytes()
    make_image(1, (30, 30)).save(broken)
    again = run(odd_photos, out, format=format)
    assert (again.computed, again.faults) == (3, 0)
    assert made != (out / f"2.{format}").read_bytes() and len(load(out / f"2.{format}")[0]) == 11
    assert sorted(os.listdir(out / ".featx" / "2")) == ["images.gz"]
    run(odd_photos, tmp_path / "clean", format=format)
    assert (out / f"2.{format}").read_bytes() == (tmp_path / "clean" / f"2.{format}").read_bytes()


def test_a_repair_at_the_end_leaves_the_finished_file_alone_until_the_new_one_is_whole(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    last = sorted((tmp_path / "photos" / "cats").iterdir())[-1]
    data = last.read_bytes()
    last.write_bytes(b"broken")
    run(tmp_path / "photos", tmp_path / "out")
    with (tmp_path / "out" / "2.csv").open("rb") as old:
        before = (tmp_path / "out" / "2.csv").read_bytes()
        last.write_bytes(data)
        assert run(tmp_path / "photos", tmp_path / "out").faults == 0
        assert old.read() == before
    assert (tmp_path / "out" / "2.csv").read_bytes() != before


def test_values_too_large_for_float16_are_counted_and_reported(photos, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Scale, "factor", torch.tensor([1, 1e9, float("inf"), 1]))
    run(photos, tmp_path, format="npy", dtype="float16")
    values = np.load(tmp_path / "2.npy")
    assert values.dtype == np.float16 and np.isinf(values[:, 1:3]).all() and np.isfinite(values[:, [0, 3]]).all()
    assert "2: 37 values too large for float16 became infinite: --writer.dtype float32 keeps them" in caplog.text
    assert json.loads((tmp_path / "2.json").read_text())["values_overflowed"] == 37
    with pytest.raises(BadValueError, match="dtype: float16 -> float32"):
        run(photos, tmp_path, format="npy")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"format": "hdf5"}, "--writer.format hdf5: expected csv, npy, parquet or a list such as"),
        ({"format": []}, "expected csv, npy"),
        ({"dtype": "float16"}, "--writer.dtype float16: csv is always float32"),
    ],
)
def test_impossible_formats_are_refused(options, words):
    with pytest.raises(BadValueError, match=words):
        FeatureWriter(**options)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["2.csv", "2.names.txt", "2.errors.csv", "2.json"])
def test_a_file_that_featx_did_not_write_is_never_replaced(photos, tmp_path, name, overwrite):
    (tmp_path / name).write_text('{"hello": 1}')
    with pytest.raises(BadValueError, match=rf"{name}: (exists, and no record says that featx|not a record of featx)"):
        run(photos, tmp_path, format=["csv", "npy"], overwrite=overwrite)
    assert (tmp_path / name).read_text() == '{"hello": 1}'
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [name]


def test_values_that_are_not_finite_are_written_and_counted(photos, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Scale, "factor", torch.tensor([1, float("nan"), float("inf"), float("-inf")]))
    run(photos, tmp_path)
    assert "111 values nan or infinite, in 37 rows" in caplog.text
    row = (tmp_path / "2.csv").read_text().splitlines()[0].split(",")
    assert row[2] == "nan" and row[3].lstrip("-") == "inf" and row[4].lstrip("-") == "inf"


def test_awkward_names_read_back_and_those_that_demud_misreads_are_reported(tmp_path, caplog):
    names = ["a,b.png", 'c"d.png', "e\nf.png", "#g.png", "plain.png", "猫.png", os.fsdecode(b"\xe9.png")]
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, name in enumerate(names):
        make_image(i, (30, 30)).save(folder / name)
    run(folder, tmp_path / "out")
    assert read_csv(tmp_path / "out" / "2.csv")[0] == sorted(names)
    assert b"\n\xe9.png," in (tmp_path / "out" / "2.csv").read_bytes()
    assert "4 names with a comma, a quote, a line break or a leading #" in caplog.text


def test_repeated_basenames_are_reported_once_with_the_remedy(tmp_path, caplog):
    for folder in ("cats", "dogs"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for name in ("1.png", "2.png"):
            make_image(len(name), (30, 30)).save(tmp_path / "photos" / folder / name)
    run(tmp_path / "photos", tmp_path / "out")
    told = [record.getMessage() for record in caplog.records if "several folders" in record.getMessage()]
    assert told == ["2 file names in several folders (1.png, …): --writer.names relative tells the rows apart"]
    caplog.clear()
    run(tmp_path / "photos", tmp_path / "relative", names="relative")
    assert "several folders" not in caplog.text


def test_rows_that_differ_in_length_end_the_run_without_a_file(tmp_path):
    (tmp_path / "photos").mkdir()
    for i, width in enumerate([64] * 8 + [90]):
        make_image(i, (width, 64)).save(tmp_path / "photos" / f"{i}.png")

    class Plain(FeatureExtractor):
        def build_network(self):
            return torch.nn.Sequential(torch.nn.Identity())

    with pytest.raises(UserError, match=r"--model.layer 0: .* columns from 8.png on, expected 12288 as before"):
        run(tmp_path / "photos", tmp_path / "out", layer="0", model=Plain, data={"resize": None, "crop": None})
    assert os.listdir(tmp_path / "out") == [".featx"]


def test_an_unreadable_image_ends_the_run_without_a_file_if_asked(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(20):
        make_image(i, (30, 30)).save(folder / f"{i:02}.png")
    (folder / "17.png").write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"photos/17.png: text named .png \(ImageError"):
        run(folder, tmp_path / "out", data={"on_error": "stop"})
    assert os.listdir(tmp_path / "out") == [".featx"]


def test_a_limit_on_the_batches_is_refused(photos, tmp_path):
    with pytest.raises(BadValueError, match="limit_predict_batches 2: rows would be missing"):
        run(photos, tmp_path, trainer_options={"limit_predict_batches": 2})


def test_an_output_folder_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BadValueError, match=r"--writer.out_dir .*file is a file. Expected a folder"):
            FeatureWriter(str(out)).check()
    FeatureWriter(str(tmp_path / "new" / "deep")).check()
    assert not (tmp_path / "new").exists()


def read_as_demud(path: Path) -> tuple[list[str], np.ndarray]:
    """Read a CSV by DEMUD's rules: no comments, every comma splits, the first field is the label."""
    labels, rows = [], []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            label, *fields = line.split(",")
            labels.append(label)
            rows.append([float(field) if field else float("nan") for field in fields])
    return labels, np.array(rows)


def test_demud_reads_the_file(photos, tmp_path, alexnet, alexnet_file):
    predict(photos, tmp_path, "--model.layer", "fc8", "--model.weights", alexnet_file)
    labels, values = read_as_demud(tmp_path / "fc8.csv")
    names, (expected,) = oracle(photos, alexnet, ["classifier.6"])
    assert labels == names and relative_error(values, expected) < 1e-5


def test_any_module_path_becomes_a_file(photos, tmp_path):
    class Pool(FeatureExtractor):
        def build_network(self):
            return random_network("resnet18")

    writer = run(photos, tmp_path, layer=["avgpool", "layer4.1.bn2"], model=Pool, data={"crop": 64})
    assert read_csv(writer.files["avgpool"][0])[1].shape == (37, 512)
    assert read_csv(writer.files["layer4.1.bn2"][0])[1].shape == (37, 512 * 2 * 2)


SHARDS = [f"{number:05}" for number in range(3)]


@pytest.mark.parametrize("format", ["csv", "npy", "parquet"])
def test_shards_contain_the_rows_of_one_file_in_order(photos, tmp_path, format):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    run(photos, tmp_path / "one", format=format, names="relative")
    writer = run(photos, tmp_path / "many", format=format, names="relative", shard_rows=16)
    assert sorted(os.listdir(tmp_path / "many")) == [".featx", "2", "2.json"]
    assert [path for path in writer.files["2"] if path.suffix == f".{format}"] == [
        tmp_path / "many" / "2" / f"{shard}.{format}" for shard in SHARDS
    ]
    names, values = load(tmp_path / "one" / f"2.{format}")
    sizes = [len(load(tmp_path / "many" / "2" / f"{shard}.{format}")[0]) for shard in SHARDS]
    found_names, found = load(tmp_path / "many" / "2")
    assert sizes == [16, 16, 5] and found_names == names and np.array_equal(found, values)
    assert sorted(os.listdir(tmp_path / "many" / ".featx" / "2")) == ["images.gz"]
    for name, said in record(tmp_path / "many" / "2" / f"00001.{format}")["files"].items():
        data = (tmp_path / "many" / name).read_bytes()
        assert said["sha256"] == hashlib.sha256(data).hexdigest() and said["bytes"] == len(data)


def test_a_shard_that_one_process_computed_is_written_once(photos, tmp_path, monkeypatch):
    copied = []
    monkeypatch.setattr("featx.writer.disk.append_range", lambda *args: copied.append(args))
    run(photos, tmp_path, format=["csv", "npy"], header=True, shard_rows=16)
    assert not copied
    assert [len(load(tmp_path / "2" / f"{shard}.csv")[0]) for shard in SHARDS] == [16, 16, 5]


def test_a_run_interrupted_within_a_shard_continues_to_the_same_shards(photos, tmp_path, monkeypatch):
    run(photos, tmp_path / "clean", format=["csv", "npy"], shard_rows=16)
    compute, calls = Tiny.predict_step, []

    def end(self, batch, *args):
        calls.append(batch)
        if len(calls) == 5:  # the first is the trial before the run
            raise KeyError("ended")
        return compute(self, batch, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tiny, "predict_step", end)
        with pytest.raises(KeyError, match="ended"):
            run(photos, tmp_path / "out", format=["csv", "npy"], shard_rows=16)
    assert sorted(os.listdir(tmp_path / "out")) == [".featx"]
    assert run(photos, tmp_path / "out", format=["csv", "npy"], shard_rows=16).computed == 13
    assert shards(tmp_path / "out") == shards(tmp_path / "clean")
    assert run(photos, tmp_path / "out", format=["csv", "npy"], shard_rows=16).computed == 0


def shards(out):
    return {path.name: path.read_bytes() for path in (out / "2").iterdir()}


def test_a_repair_recomputes_its_batch_and_leaves_other_shards_alone(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    broken = tmp_path / "photos" / "bees" / "wild" / "image-10.jpg"
    data, out, options = broken.read_bytes(), tmp_path / "out", {"format": ["csv", "npy"], "shard_rows": 16}
    broken.write_bytes(b"broken")
    assert run(tmp_path / "photos", out, **options).faults == 1
    assert [len(load(out / "2" / f"{shard}.npy")[0]) for shard in SHARDS] == [16, 15, 5]
    others = {name: (out / "2" / name).stat().st_ino for name in ("00000.csv", "00000.npy", "00002.csv", "00002.npy")}
    broken.write_bytes(data)
    again = run(tmp_path / "photos", out, **options)
    assert (again.computed, again.faults) == (8, 0)
    assert {name: (out / "2" / name).stat().st_ino for name in others} == others
    run(photos, tmp_path / "clean", **options)
    assert shards(out) == shards(tmp_path / "clean")
    assert sorted(os.listdir(out / ".featx" / "2")) == ["images.gz"]


def test_the_rows_per_shard_are_part_of_the_identity(photos, tmp_path):
    run(photos, tmp_path, shard_rows=16)
    with pytest.raises(BadValueError, match="shard_rows: 16 -> 8"):
        run(photos, tmp_path, shard_rows=8)
    stranger = tmp_path / "2" / "00009.csv"
    stranger.write_text("read with the others, it would be one of them")
    with pytest.raises(BadValueError, match=r"2/00009.csv: exists, and no record says that featx wrote it"):
        run(photos, tmp_path, shard_rows=24, overwrite=True)
    stranger.unlink()
    run(photos, tmp_path, shard_rows=24, overwrite=True)
    assert sorted(shards(tmp_path)) == ["00000.csv", "00001.csv"]
    run(photos, tmp_path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [".featx", "2.csv", "2.json"]


def test_shards_need_no_space_for_a_second_copy(photos, tmp_path, monkeypatch):
    trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
    model, data = Tiny("2"), ImageFolderDataModule(str(photos), batch_size=8)
    data.setup()
    model.configure_model()
    sample = model.try_out(data.first_batch(model.preprocessing))
    one, many = FeatureWriter(str(tmp_path / "one")), FeatureWriter(str(tmp_path / "many"), shard_rows=8)
    for writer in (one, many):
        writer.inspect(trainer, model, data, {"2": 4})
    free = one.check_space(data.images, sample, 1) * 5 // 4
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    many.check_space(data.images, sample, 2)
    with pytest.raises(DiskError, match=r"needs about .* more"):
        one.check_space(data.images, sample, 2)


def test_unknown_files_in_the_folder_of_shards_are_refused(photos, tmp_path):
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "notes.csv").touch()
    with pytest.raises(BadValueError, match=r"2/notes.csv: exists, and no record says that featx"):
        run(photos, tmp_path, shard_rows=16)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "2").touch()
    with pytest.raises(BadValueError, match=r"file/2: is a file. --writer.shard_rows needs a folder"):
        run(photos, tmp_path / "file", shard_rows=16, overwrite=True)


@pytest.mark.parametrize("rows, near", [(20, 24), (0, 8), (-8, 8), (3, 8)])
def test_shards_that_are_not_whole_batches_are_refused(photos, tmp_path, rows, near):
    with pytest.raises(
        BadValueError, match=rf"shard_rows {rows}: expected a multiple of --data.batch_size 8, such as {near}\."
    ):
        run(photos, tmp_path / "out", shard_rows=rows)
    assert not (tmp_path / "out").exists()


def test_shards_that_load_cannot_join_are_reported(photos, tmp_path):
    run(photos, tmp_path, format=["csv", "npy"], shard_rows=16)
    with pytest.raises(BadValueError, match=r"2: holds .csv and .npy. Expected one, such as .*2/\*.csv"):
        load(tmp_path / "2")
    assert len(load(tmp_path / "2" / "*.npy")[0]) == 37
    (tmp_path / "2" / "00001.csv").unlink()
    with pytest.raises(BadValueError, match=r"2 shards, the last is 00002.csv. Some are missing"):
        load(tmp_path / "2" / "*.csv")
    with pytest.raises(FileNotFoundError, match="no shards"):
        load(tmp_path / "3" / "*.csv")


FOLDER_READERS = READERS | {
    "duckdb": lambda module, path: {
        name: list(values) for name, values in module.sql(f"from '{path}/*.parquet'").fetchnumpy().items()
    },
}


@pytest.mark.parametrize("reader", READERS)
def test_four_libraries_read_a_folder_of_parquet_as_one_table(photos, tmp_path, reader):
    pytest.importorskip("pyarrow")
    module = pytest.importorskip(reader)
    run(photos, tmp_path, format="parquet", shard_rows=16)
    table = FOLDER_READERS[reader](module, str(tmp_path / "2"))
    assert table["path"] == ImageFolderDataModuleNames(photos)
    assert np.array_equal(np.array([list(row) for row in table["2"]], np.float32), load(tmp_path / "2")[1])


PEAK = """
import os, resource, sys, time
import torch
from featx import FeatureExtractor, cli
from featx.writer import journal
from featx.writer.callback import FeatureWriter

class Wide(FeatureExtractor):
    def build_network(self):
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(192, 1024))

add, seen = journal.Part.add, []

def add_slowly(self, *args):
    time.sleep(0.05)  # several times what a batch takes before it
    add(self, *args)
    seen.append(0)
    if len(seen) == 8:  # all is warm
        open("/proc/self/clear_refs", "w").write("5")

journal.Part.add = add_slowly
# a row is 4 KiB
model = "--model __main__.Wide --model.layer 2 --model.channels_last false".split()
data = ["--data.dir", sys.argv[1], *"--data.resize 32 --data.crop 32 --data.num_workers 1".split()]
assert cli.main(["predict", *data, *model, "--writer.out_dir", sys.argv[2]]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak can be forgotten on Linux only")
def test_memory_does_not_grow_with_the_images_even_if_the_disk_is_slow(tmp_path):
    for i in range(50):
        make_image(i, (32, 32)).save(tmp_path / f"{i}.jpg")
    peaks = []
    for images in (1000, 7000):
        folder = tmp_path / f"{images}"
        folder.mkdir()
        for i in range(images):
            os.link(tmp_path / f"{i % 50}.jpg", folder / f"{i:05}.jpg")
        command = [sys.executable, "-c", PEAK, folder, tmp_path / f"out-{images}"]
        done = subprocess.run(command, env=ENV | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert (peaks[1] - peaks[0]) / 6000 < 2  # KiB an image
