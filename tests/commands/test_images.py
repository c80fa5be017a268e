"""``featx images``: its counts, its examples, what cannot be read, and how a run would see it."""

import json
import os
import re
import sys

import numpy as np
import pytest
import tifffile
from conftest import make_image
from PIL import Image

from featx.cli import main

SIZE = (48, 32)


@pytest.fixture
def images(capsys, monkeypatch, tmp_path):
    """Run ``featx images ARGS`` in this process, in an empty folder, and return its status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*args):
        status = main(["images", *map(str, args)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    exif = Image.Exif()
    exif[274] = 6
    for i in range(4):
        make_image(i, SIZE).save(root / f"{i}.jpg")
    make_image(5, (64, 32)).save(root / "phone.jpg", exif=exif)
    make_image(6, SIZE, "RGBA").save(root / "logo.png")
    make_image(7, (16, 16), "CMYK").save(root / "print.jpg")
    Image.fromarray(np.arange(48 * 32, dtype=np.uint16).reshape(32, 48) * 40).save(root / "camera.png")
    make_image(8, SIZE).save(root / "two.webp", save_all=True, append_images=[make_image(9, SIZE)])
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    root = tmp_path_factory.mktemp("damaged")
    for i in range(200):
        make_image(0, SIZE).save(root / f"{i:03}.jpg")
    (root / "005.jpg").write_bytes((root / "004.jpg").read_bytes()[:-200] + b"\xff\xd9")  # which Pillow fills up
    (root / "030.jpg").write_bytes(b"")
    (root / "031.jpg").write_text("<html>404")
    return root


def test_a_mixed_folder_in_aligned_lines_with_examples(images, mixed):
    status, out, err = images(mixed)

    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) <= 20
    assert len({re.match(r"(\w[\w ]*:)? +", line).end() for line in lines}) == 1
    table = dict(re.findall(r"^([\w ]+): +(.*)$", out, re.MULTILINE))
    assert table["images"] == f"9 of {mixed}"
    assert table["left out"] == "1 file with other suffixes (.txt)"
    assert table["size"] == "7 of 48x32, 1 of 16x16; 3 sizes, from 16x16 (print.jpg) to 64x32 (phone.jpg)"
    assert table["format"] == "6 JPEG, 2 PNG (camera.png), 1 WEBP (two.webp)"
    assert table["color"] == "7 RGB, 1 grey (camera.png), 1 CMYK (print.jpg)"
    assert table["depth"] == "8 8-bit, 1 16-bit grey"
    assert "1 16-bit grey (camera.png): 0 is black, the highest value white; --data.value_range '[LOW,HIGH]'" in out
    assert table["orientation"] == "1 of value 6 (phone.jpg): not rotated; --data.exif_rotate true rotates them"
    assert table["transparency"].startswith("1 PNG (logo.png): ignored")
    assert table["frames"] == "1 WEBP (two.webp): the first is taken"
    assert table["decoded"] == "9 of 9 images"


def test_remarks_on_decoded_images_are_printed(images, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.arange(48 * 32, dtype=np.uint16).reshape(32, 48)).save(tmp_path / "photos" / "camera.png")

    _, out, _ = images("photos")
    assert " 1 image of 16-bit grey, nearly black without --data.value_range (camera.png)\n" in f"{out}\n"


def test_json_has_the_same_counts(images, mixed):
    status, out, _ = images(mixed, "--json")

    found = json.loads(out)
    assert status == 0
    assert found["dir"] == str(mixed) and found["images"] == 9 and found["decoded"] == 9 and found["classes"] == []
    assert found["format"] == {
        "JPEG": {"images": 6, "first": "0.jpg"},
        "PNG": {"images": 2, "first": "camera.png"},
        "WEBP": {"images": 1, "first": "two.webp"},
    }
    assert found["size"] == {"48x32": 7, "16x16": 1, "64x32": 1}
    assert found["orientation"]["6"]["first"] == "phone.jpg" and found["unreadable"] == {}


def test_the_options_of_a_run_say_how_images_would_be_seen(images, mixed):
    seen = ("--data.exif_rotate", "true", "--data.background", "[255,255,255]")
    _, out, _ = images("--json", mixed, "--data.value_range", "[0,4095]", "--data.exclude", "*.webp", *seen)

    found = json.loads(out)
    assert found["images"] == 8 and found["left_out"].startswith("1 image by --data.exclude")
    assert found["depth"]["16-bit grey"]["seen"] == "black and white are [0.0, 4095.0]"
    assert found["orientation"]["6"]["seen"] == "rotated"
    assert found["transparency"]["PNG"]["seen"] == "put on the color [255, 255, 255]"


def test_values_without_a_range_of_their_own_are_all_counted_as_unreadable(images, tmp_path):
    (tmp_path / "dems").mkdir()
    for i in range(100):
        tifffile.imwrite(tmp_path / "dems" / f"{i:03}.tif", np.full((8, 8), i, "f4"))

    status, out, _ = images("dems")
    assert status == 3
    assert "100 32-bit float grey (000.tif): cannot be read; --data.value_range '[LOW,HIGH]' is needed" in out
    assert "unreadable:  100 images\n             100 (000.tif): 32-bit float values" in out

    status, out, _ = images("dems", "--data.value_range", "[0,100]")
    assert status == 0 and "black and white are [0.0, 100.0]" in out and "decoded:  50 of 100 images" in out
    assert re.search("^ +50 images of one single colou?r", out, re.MULTILINE)


def test_unreadable_headers_are_always_found_and_damaged_data_by_all(images, damaged):
    status, out, _ = images(damaged)
    assert status == 3 and "unreadable:  2 images" in out
    assert "1 (030.jpg): empty" in out and "1 (031.jpg): a saved web page named .jpg" in out
    assert "of 200 images; --all decodes all" in out

    status, out, _ = images(damaged, "--all")
    assert status == 3 and "decoded:     200 of 200 images" in out and "1 (005.jpg): damaged" in out

    status, out, _ = images(damaged, "--all", "--data.strict", "false")
    assert status == 3 and "1 (005.jpg): damaged (used)" in out


def test_images_without_colors_are_all_counted_and_the_first_of_each_other_kind_is_decoded(images, tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(130):
        make_image(0, SIZE).save(tmp_path / "photos" / f"{i:03}.jpg")
    bands = np.zeros((7, 8, 8), "u2")
    for i in range(130, 135):
        tifffile.imwrite(tmp_path / "photos" / f"{i}.tif", bands, photometric="minisblack", planarconfig="separate")
    make_image(0, SIZE, "L").save(tmp_path / "photos" / "136.jpg")
    (tmp_path / "photos" / "136.jpg").write_bytes((tmp_path / "photos" / "136.jpg").read_bytes()[:-100])

    status, out, _ = images("photos")
    assert status == 3 and "5 (130.tif): 7 channels (grey TIFF)" in out
    assert "5 7-band (130.tif): cannot be read; --data.bands '[3,2,1]' is needed" in out
    assert "1 (136.jpg): truncated" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "images: the folder is missing. Expected featx images DIR."),
        (("nowhere",), "--data.dir nowhere: no such folder."),
        ((".",), "--data.dir .: no image in it."),
        ((".", "other"), "--data.dir . other: 2 values, expected one."),
        ((".", "--data.crop", "0"), "--data.crop 0: expected a whole number of at least 1"),
        ((".", "--al"), "--al: no such option. Did you mean --all"),
        ((".", "--data.crp", "3"), "--data.crp: no such option. Did you mean --data.crop"),
    ],
)
def test_mistakes(images, args, words):
    status, out, err = images(*args)
    assert status == 2 and out == "" and words in err and err.count("\n") <= 4


def test_the_command_line_and_config_of_a_run_work(images, mixed, tmp_path):
    (tmp_path / "run.yaml").write_text(f"data:\n  dir: {mixed}\n  batch_size: 7\nmodel:\n  arch: resnet50\n")
    status, out, _ = images("--config", "run.yaml", "--model.layer", "fc", "--writer.format", "npy")
    assert status == 0 and out.startswith("images:        9 of ")


def test_names_print_in_one_line_each(images, tmp_path):
    (tmp_path / "photos").mkdir()
    make_image(0, SIZE, "RGBA").save(os.fsencode(tmp_path) + b"/photos/a\n\x1b[31m\xff.png")
    status, out, _ = images("photos")
    assert status == 0 and r"1 PNG (a\n\x1b[31m\udcff.png): ignored" in out


def test_help_is_one_screen(images):
    status, out, _ = images("--help")
    assert status == 0 and len(out.splitlines()) <= 60 and max(map(len, out.splitlines())) <= 80
    assert "--json" in out and "--all" in out and "--data.value_range" in out and "--data.batch_size" not in out


def test_random_bytes_are_faults_and_nothing_else(images, tmp_path):
    (tmp_path / "noise").mkdir()
    random = np.random.default_rng(0)
    beginnings = [b"", b"\x89PNG\r\n\x1a\n", b"II*\0\x08\0\0\0", b"MM\0+\0\x08\0\0", b"\xff\xd8\xff\xe0", b"GIF89a"]
    beginnings += [
        b"BM",
        b"RIFF\0\1\0\0WEBPVP8 ",
        b"P5 9 x",
        b"\0\0\0\x0cjP  \r\n\x87\n",
        b"\0\0\0\x18ftypavif",
        b"\x93NUMPY\1\0",
    ]
    for i in range(110):
        data = beginnings[i % len(beginnings)] + random.bytes(i * 9)
        suffix = "npy" if data.startswith(b"\x93") else "jpg"
        (tmp_path / "noise" / f"{i:03}.{suffix}").write_bytes(data)

    status, out, err = images("noise", "--json", "--data.suffixes", "[.npy]")
    unreadable = json.loads(out)["unreadable"].values()
    assert status == 3 and err == "" and sum(remark["images"] for remark in unreadable) == 110


def test_a_reader_of_ones_own_reads_some_of_the_images(images, tmp_path):
    (tmp_path / "frames").mkdir()
    for i in range(200):
        (tmp_path / "frames" / f"{i:03}.raw").write_bytes(bytes([i] * 64 if i != 4 else [0]))
    code = "import numpy\ndef read(path):\n    return numpy.fromfile(path, 'u1').reshape(8, 8)\n"
    (tmp_path / "raw_frames.py").write_text(code)

    status, out, _ = images("frames", "--data.suffixes", "[.raw]", "--data.reader", "raw_frames.read")
    assert status == 3 and "decoded:     50 of 200 images; --all decodes all" in out and "1 (004.raw): " in out


def test_a_table_is_looked_at_like_a_folder(tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import table

    make_image(1, (30, 20)).save(tmp_path / "a.png")
    image = (tmp_path / "a.png").read_bytes()
    images = [image] * 300 + [image[:50], None]
    parquet.write_table(table({"image": images}), tmp_path / "a.parquet", row_group_size=40)
    assert main(["images", str(tmp_path / "a.parquet"), "--all"]) == 3
    out = capsys.readouterr().out
    assert "302 of " in out and "301 PNG" in out and "1 (000301): no image: the value is null" in out
    assert re.search("decoded: +302 of 302 images", out)
