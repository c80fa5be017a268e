"""``featx verify``: one line for what is wrong with a file, and rows computed again."""

import base64
import gzip
import io
import json
import re
import shutil
import sys

import numpy as np
import pytest
from conftest import make_image
from PIL import Image
from tiny import run

from featx.cli import main

TINY = ("--model", "tiny.Tiny")  # whose code a record alone does not run
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "photos").mkdir()
    for i in range(20):
        make_image(i, (30, 30)).save(folder / "photos" / f"{i:02}.png")
    (folder / "photos" / "a,b.png").write_bytes(b"broken")
    make_image(77, (30, 30)).save(folder / "photos" / 'c"d\ne,.png')
    for name, options in (("plain", {}), ("header", {"header": True, "names": "relative"})):
        run(folder / "photos", folder / name, **options)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made / "plain", tmp_path / "plain")
    return tmp_path / "plain" / "2.csv"


@pytest.mark.parametrize("name", ["plain", "header"])
def test_a_file_as_it_was_written_is_right(made, name, capsys):
    assert main(["verify", str(made / name / "2.csv"), "--images", str(made / "photos"), *TINY]) == 0
    assert "21 rows of 4 values as recorded; 21 rows recomputed, the largest relative difference is 0.0e+00" in (
        capsys.readouterr().out
    )


def test_rows_of_images_that_an_earlier_version_padded_are_computed_so_again(made, tmp_path, capsys):
    run(made / "photos", tmp_path, data={"resize": 20, "crop": 30, "pad": True})
    record = json.loads((tmp_path / "2.json").read_text())
    del record["run"]["options"]["data"]["pad"], record["identity"]["preprocessing"]["pad"]
    (tmp_path / "2.json").write_text(json.dumps(record))
    assert main(["verify", str(tmp_path / "2.csv"), "--images", str(made / "photos"), *TINY]) == 0
    assert "21 rows recomputed, the largest relative difference is 0.0e+00" in capsys.readouterr().out


def change_a_digit(data):
    return data.replace(b"1", b"2", 1)


def swap_rows(data):
    lines = data.split(b"\n")
    lines[2], lines[3] = lines[3], lines[2]
    return b"\n".join(lines)


HARM = {
    "values differ": lambda data: data[:-2] + (b"1" if data[-2:-1] != b"1" else b"2") + data[-1:],
    "row 3 is named b'03.png', expected b'02.png'": swap_rows,
    "20 rows, expected 21": lambda data: data[data.index(b"\n") + 1 :],
    "rows of 4 and 5 values, expected 4": lambda data: data[:-1] + b",1.0\n",
}


@pytest.mark.parametrize("words", HARM)
def test_what_is_wrong_is_one_line_and_exit_1(copy, words, capsys):
    copy.write_bytes(HARM[words](copy.read_bytes()))
    assert main(["verify", str(copy)]) == 1
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1


def test_a_folder_of_shards_is_told_shard_by_shard(made, tmp_path, capsys):
    run(made / "photos", tmp_path, shard_rows=8, format=["csv", "npy"])
    assert main(["verify", str(tmp_path / "2"), "--images", str(made / "photos"), *TINY]) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 6 and "2/00002.npy: 5 rows of 4 values as recorded; 5 rows recomputed" in told[-1]
    assert sum("8 rows of 4" in line for line in told) == 4 and "relative difference is 0.0e+00" in told[2]
    shard = tmp_path / "2" / "00001.csv"
    shard.write_bytes(swap_rows(shard.read_bytes()))
    assert main(["verify", str(shard), str(tmp_path / "2" / "00000.csv")]) == 1
    out, err = capsys.readouterr()
    assert "2/00001.csv: row 3 is named" in err and "2/00000.csv: " in out
    (tmp_path / "2" / "00001.npy").unlink()
    assert main(["verify", str(tmp_path / "2")]) == 2
    assert "2/00001.npy: no such file" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 2
    assert f"{tmp_path}.json: no such file" in capsys.readouterr().err


def test_several_files_are_each_told(copy, made, capsys):
    copy.write_bytes(copy.read_bytes()[:-5])
    assert main(["verify", str(made / "plain" / "2.csv"), str(copy)]) == 1
    out, err = capsys.readouterr()
    assert out.count("as recorded") == 1 and err.count("\n") == 1


def test_other_images_give_other_rows(made, tmp_path, capsys):
    shutil.copytree(made / "photos", tmp_path / "photos")
    make_image(99, (30, 30)).save(tmp_path / "photos" / "00.png")
    assert main(["verify", str(made / "plain" / "2.csv"), "--images", str(tmp_path / "photos"), *TINY]) == 1
    assert "the largest relative difference is" in capsys.readouterr().err


def test_what_is_no_result_is_exit_2(tmp_path, capsys):
    (tmp_path / "x.csv").touch()
    assert main(["verify", str(tmp_path / "x.csv")]) == 2
    assert "x.json: no such file" in capsys.readouterr().err
    assert main(["verify"]) == 2


@pytest.mark.parametrize(("old", "new", "words"), [
    ('"precision": "32-true"', '"precision": "bf16-mixed"', "--trainer.precision bf16-mixed cannot be recomputed"),
])  # fmt: skip
def test_rows_that_this_machine_would_compute_otherwise_are_not_compared(made, copy, old, new, words, capsys, caplog):
    record = copy.with_suffix(".json")
    assert old in record.read_text()
    record.write_text(record.read_text().replace(old, new))
    assert main(["verify", str(copy), "--images", str(made / "photos"), *TINY]) == 2
    assert words in capsys.readouterr().err + caplog.text


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Rows of arrays of four bands that a reader of one's own reads, from the second as grey."""
    folder = tmp_path_factory.mktemp("seen")
    (folder / "arrays").mkdir()
    for i in range(3):
        np.save(folder / "arrays" / f"{i}.npy", np.stack([np.array(make_image(i, (30, 20), "L")) / 255.0] * 4, axis=-1))
    (folder / "npy_reader.py").write_text("import numpy\n\n\ndef read(path):\n    return numpy.load(path)[::-1]\n")
    sys.path.insert(0, str(folder))
    data = {"suffixes": [".npy"], "bands": [2], "value_range": (0, 1), "reader": "npy_reader.read"}
    run(folder / "arrays", folder / "rows", data=data)
    yield folder
    sys.path.remove(str(folder))


def test_rows_are_computed_again_as_they_were_seen_and_a_reader_is_named_for_that(seen, capsys):
    file, words = str(seen / "rows" / "2.csv"), ("--images", str(seen / "arrays"), *TINY)
    assert main(["verify", file, *words]) == 2
    assert f"--images {seen / 'arrays'} --model tiny.Tiny --data.reader npy_reader.read" in capsys.readouterr().err
    assert main(["verify", file, *words, "--data.reader", "npy_reader.other"]) == 2
    assert "--data.reader npy_reader.other: " in capsys.readouterr().err
    assert main(["verify", file, *words, "--data.reader", "npy_reader.read"]) == 0
    assert "3 rows recomputed, the largest relative difference is 0.0e+00" in capsys.readouterr().out


def test_thumbnails_are_seen_as_the_rows_were_by_a_reader_that_is_named(seen, capsys):
    file, page = seen / "rows" / "2.csv", seen / "rows" / "2.html"
    for words, thumbnails in (
        ((), 0),
        (("--data.reader", "npy_reader.x"), 0),
        (("--data.reader", "npy_reader.read"), 3),
    ):
        assert main(["show", str(file), *words]) == 0
        data = json.loads(gzip.decompress(base64.b64decode(re.search(r'id="data">([^<]*)<', page.read_text())[1])))
        assert len(data["thumbnails"]) == thumbnails
        told = capsys.readouterr().err
        assert ("If you trust that code: --data.reader npy_reader.read" in told) == (thumbnails == 0)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["thumbnails"]["0"]))))
    assert np.abs(shown.astype(int) - np.asarray(make_image(0, (30, 20), "L"))[::-1, :, None]).mean() < 8


def test_rows_of_a_table_are_computed_again_from_it(made, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import table

    images = [path.read_bytes() for path in sorted((made / "photos").glob("0*.png"))]
    columns = {"preview": images[::-1], "photo": images, "label": ["x", "y"] * 5}
    parquet.write_table(table(columns), tmp_path / "photos.parquet")
    run(tmp_path / "photos.parquet", tmp_path / "out", data={"column": "photo"})
    file, moved = str(tmp_path / "out" / "2.csv"), tmp_path / "moved.parquet"
    (tmp_path / "photos.parquet").rename(moved)
    assert main(["verify", file, "--images", str(moved), *TINY]) == 0
    assert "10 rows recomputed, the largest relative difference is 0.0e+00" in capsys.readouterr().out
    parquet.write_table(table(columns | {"photo": images[::-1]}), moved)
    assert main(["verify", file, "--images", str(moved), *TINY]) == 1
