"""Tables -> images: Parquet and Hugging Face datasets on disk give the rows of a folder, or say why they do not."""

import io
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import loader, make_image
from tiny import run

from featx import extract, load
from featx.data.selection import Selection
from featx.data.sources import check, find
from featx.data.sources.table import files_of
from featx.errors import BadValueError, BrokenSourceError, MissingPathError
from featx.writer.folder import read_errors
from featx.writer.records import changed_inputs, save_inputs

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402


def png(seed: int, size: tuple[int, int] = (12, 8)) -> bytes:
    file = io.BytesIO()
    make_image(seed, size).save(file, "PNG")
    return file.getvalue()


IMAGES = [png(seed) for seed in range(4)]


def write(path: Path, columns, **options) -> Path:
    parquet.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return path


def names(path: Path, **options) -> list[str]:
    return list(find(str(path), **options).names)


def values(path: Path, **options) -> list[bytes | str]:
    images = find(str(path), **options)
    return [str(file) if isinstance(file, Exception) else file.read() for file in images.read(range(len(images)))]


@pytest.fixture(scope="module")
def dataset(photos):
    """The photographs as ``datasets`` has them."""
    datasets = pytest.importorskip("datasets")
    tree = find(str(photos))
    classes = sorted({name.split("/")[0] for name in tree.names})
    columns = {
        "image": [{"bytes": Path(tree.path(i)).read_bytes(), "path": name} for i, name in enumerate(tree.names)],
        "kind": [classes.index(name.split("/")[0]) for name in tree.names],
    }
    types = {"image": datasets.Image(), "kind": datasets.ClassLabel(names=classes)}
    return datasets.Dataset.from_dict(columns, datasets.Features(types))


WRITERS = {
    "groups.parquet": lambda dataset, path: dataset.to_parquet(path, batch_size=7),
    "group.parquet": lambda dataset, path: dataset.to_parquet(path, batch_size=1000),
    "shards": lambda dataset, path: [
        dataset.shard(3, i, contiguous=True).to_parquet(path / f"data/train-{i:05}-of-00003.parquet") for i in range(3)
    ],
    "saved": lambda dataset, path: dataset.save_to_disk(path, num_shards=3),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_table_gives_the_rows_of_the_folder(photos, dataset, tmp_path, kind):
    (tmp_path / "shards" / "data").mkdir(parents=True)
    (tmp_path / "shards" / "README.md").touch()
    WRITERS[kind](dataset, tmp_path / kind)
    assert find(str(tmp_path / kind)).classes == ["ants", "bees", "cats"]
    for path, out in ((photos, "folder"), (tmp_path / kind, "table")):
        run(path, tmp_path / out, format=["csv", "parquet"], data={"num_workers": 2})
    # save_to_disk keeps only the name of a path, without its folders, which are in Parquet's column path
    for name in ["2.csv", "2.parquet"][: 1 if kind == "saved" else 2]:
        assert (tmp_path / "table" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()


def test_rows_are_read_in_any_order_and_by_several_threads(tmp_path):
    images = [png(seed) for seed in range(50)]
    table = find(str(write(tmp_path / "a.parquet", {"image": images}, row_group_size=20)))
    order = [49, 0, 17, 18, 3, 20, 19, 48, 2]
    assert [file.read() for file in table.read(order)] == [images[i] for i in order]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: next(table.read([i])).read(), range(50))) == images
    assert [file.read() for file in pickle.loads(pickle.dumps(table)).read([5, 4])] == [images[5], images[4]]


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_a_group_of_rows_is_never_in_memory_as_a_whole(tmp_path, compression):
    photo = bytes(100_000)
    pages = {"write_batch_size": 4, "data_page_size": 1 << 20, "use_dictionary": False, "compression": compression}
    path = write(tmp_path / "a.parquet", {"image": [photo] * 600}, **pages)  # 60 MB in one group
    assert parquet.ParquetFile(path).num_row_groups == 1
    before, most = pa.total_allocated_bytes(), 0
    for file in find(str(path)).read(range(600)):
        assert len(file.read()) == len(photo)
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 12 << 20


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary()), "binary_view", "struct"]
)
def test_every_type_of_bytes_is_read(tmp_path, kind):
    if kind == "struct":
        column = pa.array([{"bytes": image} for image in IMAGES])
    else:
        column = pa.array(IMAGES, pa.binary_view() if kind == "binary_view" else pa.binary())
        column = column.dictionary_encode() if pa.types.is_dictionary(column.type) else column
    assert values(write(tmp_path / "a.parquet", {"image": column})) == IMAGES


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, ["000000", "000001", "000002", "000003"]),
        ({"id": [7, 8, 9, None]}, ["7", "8", "9", "000003"]),
        ({"id": [7, 8, 9, 10], "file_name": ["a.png", "b.png", "c.png", "d.png"]},
         ["a.png", "b.png", "c.png", "d.png"]),
        ({"path": ["https://x.org/c/a.png", "/c/b.png", "../c.png", "d//e.png"]},
         ["x.org/c/a.png", "c/b.png", "c.png", "d/e.png"]),
        ({"path": [None] * 4, "__key__": ["a", "b", "c", "d"]}, ["a", "b", "c", "d"]),
        ({"path": ["a.png", "b.png", "a.png", "c.png"]},
         ["000000/a.png", "000001/b.png", "000002/a.png", "000003/c.png"]),
        ({"path": ["a.png", "b.png", "cats/c.png", "a.png"], "label": ["cats", "dogs", "cats", None]},
         ["cats/a.png", "dogs/b.png", "cats/c.png", "a.png"]),
        ({"id": [7, 8, 9, 10], "class": [1, 0, None, 1]}, ["1/7", "0/8", "9", "1/10"]),
        ({"id": [7, 8, 9, 10], "label": ["a/b", "..", "", "c"]}, ["a_b/7", "8", "9", "c/10"]),
        ({"id": [7, 8, 9, 10], "label": [0.5, 1, 1, 1]}, ["7", "8", "9", "10"]),
    ],
)  # fmt: skip
def test_a_name_is_the_class_and_the_path_or_the_number_of_the_row(tmp_path, columns, expected):
    assert names(write(tmp_path / "a.parquet", {"image": IMAGES, **columns})) == expected


def test_a_path_beside_the_bytes_comes_first_and_may_have_any_bytes(tmp_path):
    paths = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"\xe9\nb")]
    )
    structs = pa.StructArray.from_arrays([pa.array(IMAGES[:2]), paths], ["bytes", "path"])
    path = write(tmp_path / "a.parquet", {"image": structs, "path": ["x", "y"], "image.path": ["v", "w"]})
    assert names(path) == ["\udce9", "\nb"]


def test_excluded_rows_are_left_out_and_counted(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": IMAGES, "key": ["a", "b", "c", "d"]})
    images = find(str(path), selection=Selection(exclude=["b", "c"]))
    assert list(images.names) == ["a", "d"] and images.left_out == "2 images by --data.exclude"
    assert [file.read() for file in images.read([0, 1])] == [IMAGES[0], IMAGES[3]]


def test_an_excluded_row_changes_no_other_name(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": IMAGES, "path": ["x/a.png", "x/a.png", "b.png", "c.png"]})
    assert names(path, selection=Selection(exclude="*/a.png")) == ["000002/b.png", "000003/c.png"]


def test_an_image_that_is_not_there_is_listed(tmp_path):
    column = [
        {"bytes": IMAGES[0], "path": "a.png"},
        {"bytes": None, "path": "b.png"},
        None,
        {"bytes": b"", "path": "d.png"},
    ]
    write(tmp_path / "a.parquet", {"image": column})
    run(tmp_path / "a.parquet", tmp_path / "out")
    assert [(fault.path, fault.reason) for fault in read_errors(tmp_path / "out" / "2.errors.csv")] == [
        ("b.png", "not in the table, which has only its path, b.png"),
        ("000002", "no image: the value is null"),
        ("d.png", "empty"),
    ]


@pytest.mark.parametrize("compared", [True, False])
def test_a_damaged_image_is_listed_and_repaired_it_has_its_row(tmp_path, monkeypatch, compared):
    table = {"image": [*IMAGES[:3], IMAGES[3][:60]], "key": ["a", "b", "c", "d"]}
    if not compared:  # as if it had more than 1 GB: a rewritten table is another
        monkeypatch.setattr("featx.data.sources.table.COMPARED", 0)
    path = write(tmp_path / "a.parquet", table)
    before = find(str(path))
    run(path, tmp_path / "out")
    assert load(tmp_path / "out" / "2.csv")[0] == ["a", "b", "c"]
    write(path, table | {"image": IMAGES})
    save_inputs(tmp_path / "images.gz", before)
    changed = "1 image changed" if compared else "4 images changed"
    assert changed_inputs(tmp_path / "images.gz", find(str(path)), set()) == changed
    if not compared:
        with pytest.raises(BadValueError, match=r"(?s)changed since that run began.*--writer.overwrite"):
            run(path, tmp_path / "out")
    run(path, tmp_path / "out", overwrite=not compared)
    run(write(tmp_path / "clean.parquet", table | {"image": IMAGES}), tmp_path / "clean")
    assert (tmp_path / "out" / "2.csv").read_bytes() == (tmp_path / "clean" / "2.csv").read_bytes()


@pytest.mark.parametrize(("workers", "compared"), [(0, 0), (1, 0), (0, 1 << 30)])
def test_a_page_that_cannot_be_read_ends_the_run_which_goes_on_when_it_can(tmp_path, monkeypatch, workers, compared):
    monkeypatch.setattr("featx.data.sources.table.COMPARED", compared)
    images = [png(seed) for seed in range(96)]
    path = write(tmp_path / "a.parquet", {"image": images}, row_group_size=16)
    run(path, tmp_path / "clean")
    whole, time = path.read_bytes(), path.stat().st_mtime_ns
    start = parquet.ParquetFile(path).metadata.row_group(5).column(0).data_page_offset
    path.write_bytes(whole[:start] + bytes(40) + whole[start + 40 :])
    shutil.os.utime(path, ns=(time, time))
    with pytest.raises(
        BrokenSourceError, match=r"a\.parquet, row 80: cannot be read: (.|\n)*run the same command again"
    ):
        run(path, tmp_path / "out", data={"num_workers": workers})
    assert not (tmp_path / "out" / "2.csv").exists()
    path.write_bytes(whole)
    shutil.os.utime(path, ns=(time, time))
    run(path, tmp_path / "out")
    assert (tmp_path / "out" / "2.csv").read_bytes() == (tmp_path / "clean" / "2.csv").read_bytes()


def test_a_table_that_is_replaced_during_the_run_ends_it(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": IMAGES})
    table = find(str(path))
    write(path, {"image": IMAGES[::-1]})
    (err,) = table.read([0])
    assert isinstance(err, BrokenSourceError) and "changed during the run" in str(err)


TEXT = {"url": ["https://x.org/a.png"] * 4}
SEVERAL = {"a": IMAGES, "b": IMAGES}


@pytest.mark.parametrize(
    ("columns", "column", "message"),
    [
        (SEVERAL, None, r"several columns can be images. Expected --data.column a or b"),
        (SEVERAL, "c", "--data.column c: .* has no such column.*\nIt has: a .binary., b .binary."),
        (SEVERAL | TEXT, "url", "--data.column url: string, not images"),
        (TEXT, None, "no column of images.*Files that a column only names are not read.\nIt has: url .string."),
        ({"images": [[image] for image in IMAGES]}, None, r"no column of images.*\n.*list<"),
        ({"image": [list(image) for image in IMAGES]}, None, r"no column of images.*\n.*list<"),
        ({"image": pa.array([], pa.binary())}, None, "no row in it"),
        (pa.table([IMAGES, IMAGES], ["image", "image"]), None, "no column of images"),
    ],
)
def test_a_table_whose_images_are_not_found_is_refused_with_its_columns(tmp_path, columns, column, message):
    with pytest.raises(BadValueError, match=message):
        find(str(write(tmp_path / "a.parquet", columns)), column=column)


def test_a_column_is_chosen_by_its_name(tmp_path):
    path = write(tmp_path / "a.parquet", {"mask": IMAGES[::-1], "my.photo": IMAGES})
    assert values(path, column="my.photo") == IMAGES and values(path, column="mask") == IMAGES[::-1]
    run(path, tmp_path / "out", data={"column": "mask"})
    with pytest.raises(BadValueError, match=r"column: mask -> my.photo"):
        run(path, tmp_path / "out", data={"column": "my.photo"})


def test_a_column_without_an_image_among_the_first_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", {"audio": [b"RIFF....WAVE"] * 70})
    with pytest.raises(BadValueError, match=r"--data.column audio: none of its first 64 values is an image.*000000: "):
        run(path, tmp_path / "out")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"hello" * 100])
def test_what_is_no_table_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadValueError, match=rf"{name}: .*Expected (Parquet|a Hugging Face)"):
        find(str(tmp_path / name))


def test_lengths_that_lead_out_of_the_file_are_refused(tmp_path):
    batch = pa.record_batch([pa.array(IMAGES)], ["image"])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, batch.schema) as stream:
        stream.write_batch(batch)
    assert values(tmp_path / "a.arrow") == IMAGES
    ends = np.cumsum([0, *map(len, IMAGES)]).astype("<i4")
    data = (tmp_path / "a.arrow").read_bytes()
    assert data.count(ends.tobytes()) == 1
    (tmp_path / "a.arrow").write_bytes(
        data.replace(ends.tobytes(), (ends + np.array([0, 0, 0, 0, 1 << 30], "<i4")).tobytes())
    )
    with pytest.raises(BadValueError, match=r"a.arrow: .*offset for slot 4 out of bounds"):
        values(tmp_path / "a.arrow")


def test_a_table_needs_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"image": IMAGES})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadValueError, match=r"pip install 'featx\[parquet\]'"):
        find(str(path))


def test_a_list_of_files_is_refused_for_a_table(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": IMAGES})
    (tmp_path / "list.txt").write_text("a\n")
    with pytest.raises(BadValueError, match=r"--data.files .*list.txt: .* is a table.*--data.exclude"):
        find(str(path), str(tmp_path / "list.txt"))


def test_a_folder_of_nothing_but_parquet_is_one_table(tmp_path):
    for name, some in (("b.parquet", IMAGES[2:]), ("a.parquet", IMAGES[:2]), ("ab.parquet", [])):  # one is empty
        write(tmp_path / name, {"image": pa.array(some, pa.binary())})
    for name in ("README.md", "_SUCCESS", ".a.parquet.crc"):
        (tmp_path / name).touch()
    assert values(tmp_path) == IMAGES
    check(str(tmp_path), None)
    make_image(1, (8, 8)).save(tmp_path / "photo.png")
    assert files_of(str(tmp_path)) == [] and names(tmp_path) == ["photo.png"]


def test_a_folder_of_images_may_have_a_folder_of_tables(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "cats").mkdir()
    write(tmp_path / "data" / "a.parquet", {"image": IMAGES})
    make_image(1, (8, 8)).save(tmp_path / "cats" / "felix.png")
    assert files_of(str(tmp_path)) == [] and names(tmp_path) == ["cats/felix.png"]


def test_a_folder_that_lacks_a_part_of_the_table_is_noticed(tmp_path, caplog):
    write(tmp_path / "train-00001-of-00002.parquet", {"image": IMAGES})
    assert len(names(tmp_path)) == 4 and "ONLY 1 OF 2 FILES OF THE TABLE ARE THERE" in caplog.text


def test_parts_with_other_columns_are_refused(tmp_path):
    write(tmp_path / "a.parquet", {"image": IMAGES})
    write(tmp_path / "b.parquet", {"photo": IMAGES})
    with pytest.raises(BadValueError, match=r"the columns of .*b.parquet differ from those of .*a.parquet"):
        find(str(tmp_path))


def test_one_of_several_splits_is_asked_for(tmp_path):
    for split in ("test", "train"):
        write(tmp_path / f"{split}-00000-of-00001.parquet", {"image": IMAGES})
    with pytest.raises(BadValueError, match=r"several tables. Expected one, such as .*test-\*.parquet or .*train-\*"):
        find(str(tmp_path))
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "train").mkdir()
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(BadValueError, match=r"several tables. Expected one, such as .*saved/train or .*saved/test"):
        find(str(saved))


def test_more_excluded_rows_than_read_are_as_asked(tmp_path, caplog):
    path = write(
        tmp_path / "a.parquet", {"image": IMAGES, "key": ["a1", "a2", "a3", "b"], "label": ["x", "x", "y", "y"]}
    )
    caplog.set_level("INFO")
    loader(path, exclude="*/a*")
    assert "images:        1 in 1 class of " in caplog.text and "MORE IMAGES ARE LEFT OUT" not in caplog.text


def test_extract_takes_a_table(tmp_path):
    path = write(
        tmp_path / "a.parquet", {"image": [png(seed, (256, 256)) for seed in range(3)], "key": ["a", "b", "c"]}
    )
    found, rows = extract(path, weights="random", layer="features.0", pool="avg", num_workers=0)
    assert found == ["a", "b", "c"] and rows.shape == (3, 64)
    with pytest.raises(MissingPathError):
        extract(tmp_path / "b.parquet")


def test_workers_read_whole_batches_of_a_table(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": [png(seed, (230, 240)) for seed in range(10)]}, row_group_size=3)
    data, batches = loader(path, batch_size=4, num_workers=2)
    assert [batch.names for batch in batches] == [list(data.images.names[i : i + 4]) for i in (0, 4, 8)]
