"""GIF: damage that Pillow passes over, and pictures after the first one."""

import io

import numpy as np
from conftest import make_image
from PIL import Image

from featx.data.decode import read_or_fault
from featx.data.view import View


def encode(*images, **how):
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], **how)
    return file.getvalue()


def read(folder, data, strict=True):
    (folder / "x.gif").write_bytes(data)
    return read_or_fault(str(folder), "x.gif", View(strict=strict))


def pictures(data):
    """Where the picture blocks begin."""
    at, found = 13 + 3 * 2 ** ((data[10] & 7) + 1), []
    while data[at] != 0x3B:
        if data[at] == 0x2C:
            found.append(at)
        at += 2 if data[at] == 0x21 else 11 + (3 * 2 ** ((data[at + 9] & 7) + 1) if data[at + 9] & 0x80 else 0)
        while data[at]:
            at += 1 + data[at]
        at += 1
    return found


def test_what_pillow_reads_of_a_damaged_gif_is_no_image(tmp_path):
    data = bytearray(encode(make_image(3, (40, 25), "P")))
    assert read(tmp_path, bytes(data)).fault is None
    data[10] = 0x80  # a palette of 2 colours: what follows it is skipped up to the next picture, or its like
    Image.open(io.BytesIO(data)).load()  # in silence
    assert read(tmp_path, bytes(data)).fault.reason == "damaged"
    assert read(tmp_path, bytes(data), strict=False).pixels.shape == (25, 40, 3)


def test_a_gif_that_is_cut_is_truncated(tmp_path):
    data = encode(make_image(3, (40, 25), "P"))
    for share in (0.1, 0.5, 0.9):
        assert read(tmp_path, data[: int(len(data) * share)]).fault.reason in ("truncated", "damaged")


def test_of_an_animation_only_the_first_picture_matters(tmp_path):
    data = encode(*(make_image(seed, (40, 25), "P") for seed in (1, 2, 3)), loop=0)
    first, second, _ = pictures(data)
    whole = read(tmp_path, data).pixels
    assert np.array_equal(whole, Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(read(tmp_path, data[: second + 30] + bytes(40) + data[second + 70 :]).pixels, whole)
    assert np.array_equal(read(tmp_path, data[: second + 30]).pixels, whole)
    assert first < second


def test_an_interlaced_gif_is_what_pillow_reads(tmp_path):
    for interlace in (0, 1):
        data = encode(make_image(3, (40, 25), "P"), interlace=interlace)
        assert np.array_equal(read(tmp_path, data).pixels, Image.open(io.BytesIO(data)).convert("RGB"))
