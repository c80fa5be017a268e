import os
import re

import numpy as np
import pytest
from conftest import make_image
from PIL import Image
from torchvision.datasets import ImageFolder

from featx.images import ImageTree, check_image, read_image
from featx.messages import BadValueError, ImageError, MissingPathError


def test_rows_follow_imagefolder(photos):
    ours, theirs = ImageTree(str(photos)), ImageFolder(str(photos))
    assert [ours.path(i) for i in range(len(ours))] == [path for path, _ in theirs.samples]
    assert len(ours) == 37 and ours.classes == theirs.classes
    assert ours.names[0] == "ants/image-00.jpg" and "bees/wild/image-01.JPEG" in ours.names
    assert ours.left_out == ""


def test_a_trailing_slash_changes_no_name(photos):
    assert ImageTree(f"{photos}/").names == ImageTree(str(photos)).names


def test_a_flat_folder_is_taken_as_it_is(tmp_path):
    for name in ("b.png", "a.jpg", "C.png"):
        make_image(1, (8, 8)).save(tmp_path / name)
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "fc7.csv").touch()
    tree = ImageTree(str(tmp_path))
    assert tree.names == ["C.png", "a.jpg", "b.png"] and tree.classes == [""]
    assert tree.left_out == "1 file with other suffixes (.csv)"


def test_what_imagefolder_leaves_out_is_counted(tmp_path):
    for folder in ("cats", "dogs", "empty"):
        (tmp_path / folder).mkdir()
    for name in ("cats/1.png", "cats/2.png", "loose.png"):
        make_image(1, (8, 8)).save(tmp_path / name)
    for name in ("cats/.DS_Store", "cats/x.gif", "dogs/y.gif", "dogs/notes"):
        (tmp_path / name).touch()
    tree = ImageTree(str(tmp_path))
    assert tree.names == ["cats/1.png", "cats/2.png"]
    assert tree.left_out == (
        "1 image beside the class folders, 3 files with other suffixes (.gif, none), "
        "2 class folders without images (dogs, empty)"
    )


def test_no_folder_a_file_and_no_image_are_told(tmp_path):
    with pytest.raises(MissingPathError, match=r"--data.dir .*nowhere: no such folder"):
        ImageTree(str(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(BadValueError, match=r"this is a file. Expected a folder of images"):
        ImageTree(str(tmp_path / "file"))
    (tmp_path / "file").rename(tmp_path / "a.txt")
    with pytest.raises(BadValueError, match=r"no image in it. It holds 1 file with other suffixes \(.txt\)"):
        ImageTree(str(tmp_path))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_8_bit_modes_are_what_convert_gives(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode in ("CMYK", "YCbCr") else "image.png")
    make_image(3, (30, 20), mode).save(path)
    assert np.array_equal(read_image(str(path)), Image.open(path).convert("RGB"))


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    make_image(3, (30, 20), "P").save(tmp_path / "p.png", transparency=bytes(range(200)))
    assert read_image(str(tmp_path / "p.png")).mode == "RGB"


def test_exif_rotation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    make_image(3, (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(str(tmp_path / "turned.jpg")).size == (30, 20)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, suffix):
    grey = np.asarray(make_image(4, (30, 20), "L"))
    path = str(tmp_path / f"deep{suffix}")
    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    assert np.array_equal(np.asarray(read_image(path))[:, :, 0], grey)


def test_big_endian_16_bits_are_scaled(tmp_path):
    grey = np.asarray(make_image(4, (30, 20), "L"))
    path = tmp_path / "big.tif"
    Image.frombytes("I;16B", (30, 20), (grey.astype(np.uint16) * 257).astype(">u2").tobytes()).save(path)
    assert np.array_equal(np.asarray(read_image(str(path)))[:, :, 0], grey)


def test_value_range_scales_a_12_bit_camera(tmp_path):
    path = str(tmp_path / "camera.png")
    Image.fromarray(np.array([[0, 4095, 2048, 5000]], np.uint16)).save(path)
    assert np.asarray(read_image(path, (0, 4095)))[0, :, 0].tolist() == [0, 255, 128, 255]


def test_value_range_leaves_8_bits_alone(tmp_path):
    path = str(tmp_path / "image.png")
    make_image(3, (30, 20)).save(path)
    assert np.array_equal(read_image(path, (0, 4095)), read_image(path))


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "float"), (np.int32, "integer")])
def test_32_bits_need_a_value_range(tmp_path, dtype, kind):
    path = str(tmp_path / "deep.tif")
    Image.fromarray(np.array([[0, 1, 2, 4]], dtype)).save(path)
    for look in (read_image, check_image):
        with pytest.raises(BadValueError, match=f"32-bit {kind} values .*\n--data.value_range says"):
            look(path)
    assert np.asarray(read_image(path, (0, 4)))[0, :, 0].tolist() == [0, 64, 128, 255]


def test_value_range_is_refused_where_pil_drops_the_lower_bits(tmp_path):
    ihdr = make_image(3, (2, 2))
    ihdr.save(tmp_path / "x.png")
    path = tmp_path / "rgb16.png"
    _write_16_bit_rgb_png(path)
    assert read_image(str(path)).size == (2, 1)
    with pytest.raises(BadValueError, match="only the upper 8 of the 16 bits"):
        read_image(str(path), (0, 4095))


def _write_16_bit_rgb_png(path):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    rows = b"\0" + struct.pack(">6H", 0, 1000, 65535, 4095, 5, 6)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_values_that_are_not_finite_are_an_error(tmp_path):
    path = str(tmp_path / "nan.tif")
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(path)
    with pytest.raises(ImageError, match="nan or infinite"):
        read_image(path, (0, 1))


def test_what_cannot_be_read_is_told_with_its_path(tmp_path):
    make_image(3, (300, 200)).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no image")
    os.symlink(tmp_path / "nowhere", tmp_path / "link.jpg")
    for name, reason in {
        "half.jpg": "truncated",
        "empty.jpg": "empty",
        "text.jpg": "not an image",
        "link.jpg": "No such file or directory",
    }.items():
        with pytest.raises(ImageError, match=rf"{re.escape(name)}: .*{reason}"):
            read_image(str(tmp_path / name))
        check_image(str(tmp_path / name))  # looks only for what a value_range could mend
