"""The one rule for what is black and what is white, in every format."""

import io

import imagecodecs
import numpy as np
import pytest
from conftest import make_image
from PIL import Image

from featx.data.decode import read_image, read_or_fault
from featx.data.pillow import to_rgb
from featx.data.view import View
from featx.errors import BadValueError

COLOUR = np.asarray(make_image(4, (30, 20))).astype(np.uint16)
GREY = COLOUR[..., 0]
BIG_ENDIAN = ">u2"


def read(folder, data, value_range=None):
    (folder / "x.pgm").write_bytes(data)
    return read_or_fault(str(folder), "x.pgm", View(value_range))


def pnm(values, maxval, plain=False):
    kind = {(2, False): b"P5", (2, True): b"P2", (3, False): b"P6", (3, True): b"P3"}[values.ndim, plain]
    head = kind + b"\n# a camera's\n30 20 # pixels\n" + str(maxval).encode() + b"\n"
    if plain:
        return head + b"\n".join(b" ".join(b"%d" % value for value in row.ravel()) + b" # row" for row in values)
    return head + values.astype(BIG_ENDIAN).tobytes()


def png(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def scaled(values, low, high):
    return np.rint(np.clip((values.astype(float) - low) * 255 / (high - low), 0, 255)).astype(np.uint8)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("maxval", [300, 1023, 4095, 65535])
def test_a_pgms_maxval_is_white_and_a_value_range_means_the_values_in_the_file(tmp_path, plain, maxval):
    values = (GREY.astype(int) * maxval // 255).astype(np.uint16)
    data = pnm(values, maxval, plain)
    assert np.array_equal(read(tmp_path, data).pixels[..., 1], scaled(values, 0, maxval))
    for value_range in ((0, maxval), (20, 250)):
        found = read(tmp_path, data, value_range)
        assert np.array_equal(found.pixels, read(tmp_path, png(values), value_range).pixels)
        assert np.array_equal(found.pixels[..., 1], scaled(values, *value_range))
    assert not read(tmp_path, data).remarks


@pytest.mark.parametrize("plain", [True, False])
def test_a_ppms_colours_are_pillows_without_a_value_range_and_scaled_with_one(tmp_path, plain):
    values = COLOUR * 16
    data = pnm(values, 4095, plain)
    assert np.array_equal(read(tmp_path, data).pixels, Image.open(tmp_path / "x.pgm").convert("RGB"))
    assert np.array_equal(read(tmp_path, data, (0, 2000)).pixels, scaled(values, 0, 2000))


@pytest.mark.parametrize("plain", [True, False])
def test_a_pgm_that_ends_early_or_goes_beyond_its_maxval_has_no_row(tmp_path, plain):
    data = pnm(GREY * 16, 4095, plain)
    for value_range in (None, (0, 4095)):
        assert read(tmp_path, data[:-30], value_range).fault.reason == "truncated"
    beyond = read(tmp_path, pnm(GREY * 16, 1000, plain))
    assert (beyond.fault.reason == "damaged") if plain else np.array_equal(beyond.pixels[..., 0].max(), 255)
    assert read(tmp_path, pnm(GREY, 4095, True).replace(b" ", b" x ", 9)).fault is not None


def test_a_pgm_of_8_bits_is_what_pillow_reads_whatever_the_value_range(tmp_path):
    for maxval in (100, 255):
        data = b"P5 30 20 %d\n" % maxval + np.minimum(GREY, maxval).astype(np.uint8).tobytes()
        found = read(tmp_path, data, (0, 10)).pixels
        assert np.array_equal(found, Image.open(tmp_path / "x.pgm").convert("RGB"))


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_a_jpeg_2000_has_the_white_of_its_bits(tmp_path, bits):
    most = 2**bits - 1
    for values in (GREY, COLOUR):
        values = (values.astype(int) * most // 255).astype(np.uint16)
        data = imagecodecs.jpeg2k_encode(values, level=0, reversible=True, bitspersample=bits)
        expected = scaled(values, 0, most) if values.ndim == 2 else values >> (bits - 8)
        assert np.array_equal(read(tmp_path, data).pixels, np.broadcast_to(expected.T, (3, 30, 20)).T
                              if values.ndim == 2 else expected)  # fmt: skip
        assert np.array_equal(read(tmp_path, data, (0, most // 3)).pixels[..., 0],
                              scaled(values if values.ndim == 2 else values[..., 0], 0, most // 3))  # fmt: skip
    assert not read(tmp_path, data[: len(data) // 3]).pixels


def test_a_signed_jpeg_2000_needs_a_value_range(tmp_path):
    values = GREY.astype(np.int16) - 128
    data = imagecodecs.jpeg2k_encode(values, level=0, reversible=True)
    assert "16-bit signed integer values (JPEG2000)" in read(tmp_path, data).fault.reason
    assert np.array_equal(read(tmp_path, data, (-128, 127)).pixels[..., 0], GREY)


def test_a_picture_of_pillows_goes_by_its_mode():
    assert np.array_equal(to_rgb(Image.fromarray(GREY * 257))[..., 0], GREY)
    assert np.array_equal(to_rgb(Image.fromarray(GREY * 16), View((0, 4080)))[..., 0], GREY)
    for dtype, words in ((np.int32, "32-bit integer"), (np.float32, "32-bit float")):
        with pytest.raises(BadValueError, match=words):
            to_rgb(Image.fromarray(GREY.astype(dtype)))
        assert np.array_equal(to_rgb(Image.fromarray(GREY.astype(dtype)), View((0, 255)))[..., 0], GREY)


def test_a_portable_float_map_needs_a_value_range(tmp_path):
    Image.fromarray(GREY.astype(np.float32) / 255).save(tmp_path / "x.pfm", "PPM")
    with pytest.raises(BadValueError, match="32-bit float values"):
        read_image(str(tmp_path / "x.pfm"))
    assert np.array_equal(read_image(str(tmp_path / "x.pfm"), View((0, 1)))[..., 0], GREY)
