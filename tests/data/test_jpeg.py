"""JPEG: stray bytes that concern no pixel, and scans that are not in the file."""

import io

import numpy as np
import pytest
from conftest import make_image
from PIL import Image

from featx.data import jpeg
from featx.data.decode import read_or_fault


def encode(image, **how):
    file = io.BytesIO()
    image.save(file, "JPEG", **how)
    return file.getvalue()


def by_pil(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def read(folder, data):
    (folder / "x.jpg").write_bytes(data)
    return read_or_fault(str(folder), "x.jpg")


HOW = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
}


def whole(how):
    how = dict(HOW[how])
    return encode(make_image(5, (70, 50)).convert(how.pop("mode", "RGB")), quality=90, **how)


def padded(data, stray, where):
    """Put stray bytes before segments: those before the first scan, all, or the last."""
    starts = [segment.start for segment in jpeg.segments(data)]
    scan = next(i for i, segment in enumerate(jpeg.segments(data)) if segment.marker == jpeg.SOS)
    chosen = {"between": starts[1 : scan + 1], "everywhere": starts[1:], "before the end": starts[-1:]}[where]
    for start in reversed(chosen):
        data = data[:start] + stray + data[start:]
    return data


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("stray", "where"),
    [
        (bytes(1), "before the end"),
        (bytes(16), "before the end"),
        (bytes(5), "everywhere"),
        (b"\xff" * 7, "everywhere"),
        (b"\r\n", "between"),
        (b"a camera's\xff\0note", "between"),
    ],
)
def test_stray_bytes_that_concern_no_pixel_are_passed_over(tmp_path, how, stray, where):
    data = padded(whole(how), stray, where)
    found = read(tmp_path, data)
    assert found.fault is None and np.array_equal(found.pixels, by_pil(data))
    assert np.array_equal(found.pixels, by_pil(whole(how)))
    found = read(tmp_path, data + b"after the end")
    assert found.fault is None


@pytest.mark.parametrize("how", HOW)
def test_zeros_over_the_end_of_a_scan_are_damage(tmp_path, how):
    data = whole(how)
    for size in (8, 40, 300):
        assert read(tmp_path, data[: -2 - size] + bytes(size) + data[-2:]).pixels is None
        assert read(tmp_path, data[: -2 - size] + bytes(2 * size) + data[-2:]).pixels is None


def test_other_bytes_that_a_scan_did_not_use_are_damage(tmp_path):
    assert read(tmp_path, padded(whole("baseline"), b"1234" * 9, "before the end")).fault.reason == "damaged"


def oddities():
    usual, grey, inks = whole("baseline"), whole("grey"), whole("CMYK")
    yield "JFIF 2", usual.replace(b"JFIF\0\1", b"JFIF\0\2")
    for data in (usual, grey):
        yield "SOS", data.replace(b"\0\x3f\0", b"\1\x05\x21", 1)
    for transform in (1, 2, 3, 99):
        adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])
        yield f"Adobe {transform}", usual[:2] + adobe + usual[20:]
        yield f"CMYK {transform}", inks.replace(inks[6:18], inks[6:17] + bytes([transform]))


@pytest.mark.parametrize(("kind", "data"), list(oddities()))
def test_an_odd_header_is_passed_over_and_damage_after_it_is_not(tmp_path, kind, data):
    found = read(tmp_path, data)
    assert found.fault is None and np.array_equal(found.pixels, by_pil(data))
    half = len(data) * 2 // 3
    assert read(tmp_path, data[:half] + b"\xff\xd9").pixels is None
    assert read(tmp_path, data[:half] + bytes(200) + data[half + 200 :]).pixels is None


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_progressive_jpeg_without_its_last_scans_is_truncated(tmp_path, mode):
    data = encode(make_image(5, (70, 50), mode), progressive=True, quality=90)
    assert read(tmp_path, data).fault is None
    scans = [segment.start for segment in jpeg.segments(data) if segment.marker == jpeg.SOS]
    for start in scans[1:]:
        cut = data[:start] + b"\xff\xd9"
        by_pil(cut)  # in silence
        found = read(tmp_path, cut)
        assert found.pixels is None and found.fault.reason == "truncated"


def test_a_jpeg_in_scans_of_one_component_is_whole_with_all_of_them(tmp_path):
    """As some scanners write: three scans, each with its own tables."""
    data = encode(make_image(5, (64, 48)), progressive=True, quality=90)
    segments = list(jpeg.segments(data))
    frame = next(segment for segment in segments if segment.marker in jpeg.FRAMES)
    assert data[frame.content + 5] == 3
    baseline = encode(make_image(5, (64, 48), "L"), quality=90)
    parts = list(jpeg.segments(baseline))
    scan = next(segment for segment in parts if segment.marker == jpeg.SOS)
    coded = baseline[scan.end : -2]
    frame = next(segment for segment in parts if segment.marker in jpeg.FRAMES)
    three = baseline[: frame.content + 5] + b"\3" + b"".join(bytes([i, 0x11, 0]) for i in (1, 2, 3))
    three = three[: frame.start + 2] + (17).to_bytes(2, "big") + three[frame.content :]
    tables = baseline[frame.end : scan.start]
    scans = [b"\xff\xda\0\x08\1" + bytes([i, 0, 0, 63, 0]) + coded for i in (1, 2, 3)]
    data = three + tables + b"".join(scans) + b"\xff\xd9"
    found = read(tmp_path, data)
    assert found.fault is None and np.array_equal(found.pixels, by_pil(data))
    for kept in (scans[:1], scans[:2]):
        cut = three + tables + b"".join(kept) + b"\xff\xd9"
        assert read(tmp_path, cut).fault.reason == "truncated"
