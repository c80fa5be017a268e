"""HEIC -> an image: pillow-heif's pixels, for HEIC's own suffixes only, and nothing is registered."""

import io

import numpy as np
import pytest
from conftest import make_image
from PIL import Image

from featx.data import heif
from featx.data.decode import read_or_fault
from featx.data.module import ImageFolderDataModule
from featx.errors import BadValueError

pillow_heif = pytest.importorskip("pillow_heif")


def encode(image: Image.Image, **how: object) -> bytes:
    pillow_heif.from_pillow(image).save(file := io.BytesIO(), quality=-1, **how)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_heic_gives_its_pixels_and_pillow_knows_no_more_than_before(tmp_path, mode):
    image = make_image(3, (60, 40), mode)
    (tmp_path / "a.HEIC").write_bytes(data := encode(image))
    decoded = read_or_fault(str(tmp_path), "a.HEIC")
    expected = pillow_heif.open_heif(io.BytesIO(data)).to_pillow().convert("RGB")
    assert np.array_equal(decoded.pixels, np.asarray(expected)) and decoded.kind == "HEIF"
    assert (
        np.abs(decoded.pixels.astype(int) - np.asarray(image.convert("RGB"))).mean() < 10
    )  # its colours are of half the size
    assert "HEIF" not in Image.OPEN


def test_the_rotation_that_is_a_part_of_the_picture_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # which pillow-heif writes as HEIC's own, as phones do
    (tmp_path / "a.heic").write_bytes(encode(make_image(3, (60, 40)), exif=exif.tobytes()))
    assert read_or_fault(str(tmp_path), "a.heic").pixels.shape == (60, 40, 3)


def test_a_heic_that_is_cut_off_is_listed(tmp_path):
    data = encode(make_image(3, (60, 40)))
    for name, cut in (("half.heic", len(data) // 2), ("last.heic", len(data) - 20)):
        (tmp_path / name).write_bytes(data[:cut])
        assert read_or_fault(str(tmp_path), name).fault.reason == "damaged"


def test_only_files_with_heics_suffixes_are_read_as_such(tmp_path):
    data = encode(make_image(3, (60, 40)))
    for name in ("a.jpg", "b.heic"):
        (tmp_path / name).write_bytes(data)
    make_image(3, (60, 40)).save(tmp_path / "c.heic", "JPEG")
    assert read_or_fault(str(tmp_path), "a.jpg").fault.reason == "HEIC named .jpg"
    assert [read_or_fault(str(tmp_path), name).kind for name in ("b.heic", "c.heic")] == ["HEIF", "JPEG"]


def test_without_pillow_heif_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(heif, "find_spec", lambda name: None)
    (tmp_path / "a.heic").write_bytes(encode(make_image(3, (60, 40))))
    fault = read_or_fault(str(tmp_path), "a.heic").fault
    assert fault.reason == "HEIC, but pillow-heif is not installed: pip install 'featx[heic]'"
    with pytest.raises(BadValueError, match=r"suffixes .jfif,.heic: pillow-heif is not installed: pip install"):
        ImageFolderDataModule("x", suffixes=[".jfif", ".heic"])


def test_a_heic_of_too_many_pixels_is_listed(tmp_path, monkeypatch):
    monkeypatch.setattr("featx.data.decode.MOST_PIXELS", 2399)
    (tmp_path / "a.heic").write_bytes(encode(make_image(3, (60, 40))))
    assert "pixels" in read_or_fault(str(tmp_path), "a.heic").fault.reason
