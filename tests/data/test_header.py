"""What headers say, without decoding."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import tifffile
from conftest import make_image
from PIL import Image, ImageCms

from featx.data import header
from featx.data.sources import open_file

SIZE = (48, 32)
EXIF = Image.Exif()
EXIF[header.ORIENTATION] = 6


def read_header(path: str, page: int | None = None) -> header.Header:
    with open_file(path) as file:
        return header.read(file, path, page)


def lab_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


@pytest.mark.parametrize(
    ("name", "mode", "how", "expected"),
    [
        ("a.jpg", "RGB", {}, {"format": "JPEG", "color": "RGB", "depth": "8-bit"}),
        ("a.jpg", "L", {"exif": EXIF}, {"color": "grey", "orientation": 6}),
        ("a.jpg", "CMYK", {"icc_profile": lab_profile()}, {"color": "CMYK", "profile": "Lab identity built-in"}),
        ("a.png", "RGB", {"exif": EXIF, "icc_profile": lab_profile()}, {"orientation": 6, "has_alpha": False}),
        ("a.png", "RGB", {"icc_profile": lab_profile()}, {"profile": "Lab identity built-in", "orientation": 1}),
        ("a.png", "RGB", {"icc_profile": b"nonsense"}, {"profile": "damaged"}),
        ("a.png", "LA", {}, {"color": "grey", "has_alpha": True, "bits": 8}),
        ("a.png", "P", {"transparency": 0}, {"color": "palette", "has_alpha": True}),
        ("a.png", "1", {}, {"color": "grey", "depth": "1-bit"}),
        ("a.png", "I;16", {}, {"format": "PNG", "depth": "16-bit grey", "needs_range": False}),
        ("a.png", "RGB", {"save_all": True, "append_images": [make_image(2, SIZE)]}, {"has_more": True}),
        ("a.gif", "P", {"save_all": True, "append_images": [make_image(2, SIZE)]}, {"format": "GIF", "has_more": True}),
        ("a.webp", "RGBA", {"exif": EXIF}, {"color": "RGB", "orientation": 6, "has_more": False}),
        ("a.tif", "F", {}, {"format": "TIFF", "depth": "32-bit float grey", "needs_range": True}),
        ("a.tif", "RGB", {"icc_profile": lab_profile()}, {"profile": "Lab identity built-in", "color": "RGB"}),
        ("a.bmp", "RGB", {}, {"format": "BMP", "profile": "", "orientation": 1}),
    ],
)
def test_a_header_says_what_is_in_the_file(name, mode, how, expected, tmp_path):
    image = make_image(1, SIZE)
    image = Image.new(mode, SIZE) if mode in ("F", "I;16") else image.convert(mode)
    image.save(tmp_path / name, **how)

    read = read_header(str(tmp_path / name))

    assert (read.width, read.height) == SIZE
    assert {field: getattr(read, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("values", "how", "expected"),
    [
        (np.zeros((7, 32, 48), "u2"), {"planarconfig": "separate"}, {"color": "7-band", "needs_bands": True}),
        (np.zeros((32, 48, 4), "u1"), {"photometric": "rgb", "extrasamples": [0]}, {"color": "RGB and 1 more"}),
        (np.zeros((32, 48, 4), "u1"), {"photometric": "rgb", "extrasamples": [2]}, {"color": "RGB", "has_alpha": True}),
        (np.zeros((32, 48), "i1"), {}, {"depth": "8-bit signed grey", "needs_range": True}),
        (np.zeros((32, 48), "u4"), {}, {"depth": "32-bit grey", "needs_range": True}),
        (np.zeros((3, 32, 48), "u1"), {}, {"has_more": True, "color": "grey"}),
        (np.zeros((32, 48), "u1"), {"extratags": [(274, 3, 1, 6, True)]}, {"orientation": 6, "has_more": False}),
    ],
)
def test_a_tiffs_bands_pages_and_types(values, how, expected, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", values, **{"photometric": "minisblack"} | how)
    read = read_header(str(tmp_path / "a.tif"))
    assert (read.width, read.height) == SIZE
    assert {field: getattr(read, field) for field in expected} == expected


def test_reduced_pages_of_a_tiff_are_not_pages(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(np.zeros((32, 48), "u1"))
        file.write(np.zeros((16, 24), "u1"), subfiletype=1)
    assert not read_header(str(tmp_path / "a.tif")).has_more


def test_a_page_is_looked_at_by_its_number_or_is_the_first_that_is_no_thumbnail(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(np.zeros((16, 24), "u1"), subfiletype=1)
        file.write(np.zeros((32, 48), "u1"))
        file.write(np.zeros((20, 30), "u2"))
    assert read_header(str(tmp_path / "a.tif")).width == 48
    assert read_header(str(tmp_path / "a.tif"), 3)[2:6] == ("u", 16, 30, 20)


@pytest.mark.parametrize(
    ("values", "color", "depth"),
    [
        (np.zeros((32, 48), "f4"), "grey", "32-bit float grey"),
        (np.zeros((32, 48, 3), "u1"), "RGB", "8-bit"),
        (np.zeros((32, 48, 6), ">i2"), "6-band", "16-bit signed color"),
        (np.zeros((32, 48), bool), "grey", "1-bit"),
    ],
)
def test_an_array_says_its_shape_and_type(values, color, depth, tmp_path):
    np.save(tmp_path / "a.npy", values)
    read = read_header(str(tmp_path / "a.npy"))
    assert (read.format, read.width, read.height) == ("NPY", *SIZE)
    assert (read.color, read.depth, read.needs_bands) == (color, depth, color == "6-band")


def test_a_pgm_says_its_maxval(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 # a camera\n48 32 4095\n" + bytes(2 * 48 * 32))
    assert read_header(str(tmp_path / "a.pgm")).depth == "12-bit grey"


def test_exif_after_the_pixels_of_a_png_counts(tmp_path):
    make_image(1, SIZE).save(file := io.BytesIO(), "PNG")
    data = EXIF.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    (tmp_path / "a.png").write_bytes(file.getvalue()[:-12] + chunk + file.getvalue()[-12:])
    assert read_header(str(tmp_path / "a.png")).orientation == 6


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="not a file"):
        read_header(str(tmp_path / "a.jpg"))


def test_too_many_pixels_are_refused_in_a_png_too(tmp_path):
    make_image(1, SIZE).save(file := io.BytesIO(), "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", 60000, 60000)
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(Image.DecompressionBombError):
        read_header(str(tmp_path / "a.png"))
