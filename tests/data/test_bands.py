"""--data.bands, ranges per band, --data.page, nodata and .npy: what instruments write, as its values say."""

import io

import numpy as np
import pytest
import tifffile
from conftest import loader, make_image

from featx.data.batch import report
from featx.data.decode import read_or_fault
from featx.data.view import View
from featx.errors import BadValueError

SIZE = (70, 50)
SCENE = np.stack([np.array(make_image(i, SIZE, "L")) for i in range(7)], axis=-1)  # (50, 70, 7)
RGB = SCENE[..., [3, 2, 1]]


def tiff(values, **how):
    file = io.BytesIO()
    tifffile.imwrite(file, values, **how)
    return file.getvalue()


def see(folder, data, view, name="x.tif"):
    (folder / name).write_bytes(data)
    return read_or_fault(str(folder), name, view)


def pixels(folder, data, view, name="x.tif"):
    decoded = see(folder, data, view, name)
    assert decoded.fault is None, decoded.fault
    return decoded.pixels


DTYPES = {
    np.uint8: None,
    np.int8: (-128, 127),
    np.uint16: (0, 65535),
    np.int16: (-1000, 10000),
    np.uint32: (0, 2**32 - 1),
    np.int32: (-(2**31), 2**31 - 1),
    np.float16: (0, 1),
    np.float32: (-3, 7),
    np.float64: (0, 1e-9),
}


def stored_as(dtype):
    if DTYPES[dtype] is None:
        return SCENE
    low, high = DTYPES[dtype]
    scaled = low + SCENE / 255.0 * (high - low)
    return (np.rint(scaled) if np.issubdtype(dtype, np.integer) else scaled).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize(
    "how",
    [{}, {"tile": (16, 32)}, {"compression": "deflate"}, {"bigtiff": True}, {"byteorder": ">", "rowsperstrip": 7}],
)
def test_three_bands_are_seen_of_seven(tmp_path, dtype, planes, how):
    values = stored_as(dtype)
    stored = np.moveaxis(values, -1, 0) if planes else values
    data = tiff(stored, photometric="minisblack", planarconfig="separate" if planes else "contig", **how)
    view = View(DTYPES[dtype], bands=[4, 3, 2])
    assert np.abs(pixels(tmp_path, data, view).astype(int) - RGB).max() <= (dtype == np.float16)
    one = pixels(tmp_path, data, View(DTYPES[dtype], bands=[7]))
    assert np.abs(one.astype(int) - SCENE[..., 6:]).max() <= (dtype == np.float16)


def test_16_bits_need_no_range_and_each_band_may_have_its_own(tmp_path):
    values = SCENE.astype(np.uint16) * 257
    data = tiff(values, photometric="minisblack", planarconfig="contig")
    assert np.array_equal(pixels(tmp_path, data, View(bands=[4, 3, 2])), RGB)
    ranges = [(0, 65535), (0, 65535 / 2), (10000, 20000)]
    found = pixels(tmp_path, data, View(ranges, bands=[4, 4, 2]))
    chosen = values[..., [3, 3, 1]].astype(float)
    for i, (low, high) in enumerate(ranges):
        assert np.array_equal(found[..., i], np.rint(np.clip((chosen[..., i] - low) * 255 / (high - low), 0, 255)))
    three = tiff(values[..., :3], photometric="rgb")
    assert np.array_equal(pixels(tmp_path, three, View(ranges))[..., 0], SCENE[..., 0])
    fault = see(tmp_path, tiff(values[..., 0]), View(ranges)).fault
    assert fault.reason == "1 band: --data.value_range has 3 ranges, expected one per band"


def test_bands_are_taken_of_any_format(tmp_path):
    image = make_image(3, SIZE)
    for name, mode, options in (("x.png", "RGB", {}), ("x.png", "P", {}), ("x.webp", "RGB", {"lossless": True})):
        kept = image.convert(mode)
        kept.save(tmp_path / name, **options)
        data, expected = (tmp_path / name).read_bytes(), np.asarray(kept.convert("RGB"))[..., [2, 2, 0]]
        assert np.array_equal(pixels(tmp_path, data, View(bands=[3, 3, 1]), name), expected)
    image.save(tmp_path / "x.jpg")
    plain = read_or_fault(str(tmp_path), "x.jpg").pixels
    found = read_or_fault(str(tmp_path), "x.jpg", View(bands=[2])).pixels
    assert np.array_equal(found, np.repeat(plain[..., 1:2], 3, -1))
    palette = tiff(
        np.asarray(image.convert("P")),
        photometric="palette",
        colormap=np.arange(768, dtype=np.uint16).reshape(3, 256) * 80,
    )
    plain = pixels(tmp_path, palette, View())
    assert np.array_equal(pixels(tmp_path, palette, View(bands=[3, 2, 1])), plain[..., ::-1])
    grey = tiff(255 - SCENE[..., 0], photometric="miniswhite")
    assert np.array_equal(pixels(tmp_path, grey, View(bands=[1, 1, 1])), np.repeat(SCENE[..., :1], 3, -1))


@pytest.mark.parametrize("channels", [3, 7])
def test_channels_without_colors_need_bands_and_bands_need_channels(tmp_path, channels):
    data = tiff(SCENE[..., :channels], photometric="minisblack", planarconfig="contig")
    fault = see(tmp_path, data, View()).fault
    assert fault.needs_option
    assert fault.reason == (
        f"{channels} channels (grey TIFF), none of which is said to be red, green or blue. "
        "--data.bands says which to take, for instance --data.bands '[3,2,1]'"
    )
    fault = see(tmp_path, data, View(bands=[9, 1, 1])).fault
    assert fault.needs_option
    assert fault.reason == f"{channels} channels (grey TIFF): --data.bands [9, 1, 1] takes channel 9"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bands": [4, 3]}, r"--data.bands \[4, 3\]: expected three bands or one, from 1, as '\[4,3,2\]'"),
        ({"bands": [0, 1, 2]}, r"--data.bands \[0, 1, 2\]: expected three bands or one, from 1"),
        ({"page": 0}, "--data.page 0: expected a whole number of at least 1"),
        ({"bands": [1], "srgb": True}, "--data.srgb true: expected false with --data.bands"),
        ({"bands": [1], "value_range": [(0, 1)] * 3}, "expected one range per band of --data.bands"),
        ({"value_range": [(0, 1), (1, 1), (0, 1)]}, r": expected '\[low,high\]' with low below high"),
        ({"value_range": [(0, 1)] * 2}, r"--data.value_range .*, or one such range per band"),
    ],
)  # fmt: skip
def test_impossible_views_are_refused(options, words):
    with pytest.raises(BadValueError, match=words):
        View(**options)


def nodata(value):
    return [(42113, 2, 0, value, True)]


@pytest.mark.parametrize(
    ("dtype", "tag"),
    [(np.float32, "-9999"), (np.float32, "nan"), (np.float32, "-3.4028234663852886e+38"), (np.int16, "32767"),
     (np.int16, "-32768.0"), (np.uint16, "65535"), (np.float64, "1e30"), (np.float32, None), (np.float32, "inf")],
)  # fmt: skip
def test_nodata_is_the_low_end_and_remarked_on(tmp_path, dtype, tag):
    heights = SCENE[..., 0].astype(dtype) * 10
    expected = np.rint(np.clip((heights.astype(float) - 100) * 255 / 2000, 0, 255))
    view = View((100, 2100))
    tags = nodata(tag) if tag else []
    decoded = see(tmp_path, tiff(heights, extratags=tags), view)
    assert np.array_equal(decoded.pixels[..., 1], expected) and decoded.remarks == ()
    heights[10:20, 30:50] = dtype(float(tag or "nan"))
    expected[10:20, 30:50] = 0
    decoded = see(tmp_path, tiff(heights, extratags=tags), view)
    assert np.array_equal(decoded.pixels[..., 1], expected) and decoded.remarks == ("nodata",)


def test_a_channel_that_has_the_value_of_nodata_by_chance_is_data_in_unsigned_colors(tmp_path):
    values = RGB.copy()
    values[0, 0], values[1, 1] = (255, 3, 4), (255, 255, 255)
    decoded = see(tmp_path, tiff(values, photometric="rgb", extratags=nodata("255")), View())
    assert decoded.pixels[0, 0].tolist() == [255, 3, 4] and decoded.pixels[1, 1].tolist() == [0, 0, 0]
    assert decoded.remarks == ("nodata",)
    signed = np.where(values == 255, np.int16(999), values)
    decoded = see(tmp_path, tiff(signed, photometric="rgb", extratags=nodata("999")), View((0, 255)))
    assert decoded.pixels[0, 0].tolist() == [0, 3, 4]


@pytest.mark.parametrize("tag", ["-9999", "no number", "4e9", "1.5"])
def test_a_tag_that_no_value_can_have_says_nothing(tmp_path, tag):
    decoded = see(tmp_path, tiff(SCENE[..., 0].astype(np.uint16) * 257, extratags=nodata(tag)), View())
    assert np.array_equal(decoded.pixels, np.repeat(SCENE[..., :1], 3, -1)) and decoded.remarks == ()


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint16, np.uint8])
@pytest.mark.parametrize("tag", [None, "7"])
def test_parts_that_a_sparse_file_has_not_are_nodata(tmp_path, dtype, tag):
    values = SCENE[..., 0].astype(dtype)
    data = bytearray(tiff(values, rowsperstrip=10, extratags=nodata(tag) if tag else []))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        for code in (273, 279):
            entry = file.pages.first.tags[code]
            size = entry.valuebytecount // entry.count
            data[entry.valueoffset + size : entry.valueoffset + 2 * size] = bytes(size)  # the second strip
    view = View(None if dtype in (np.uint8, np.uint16) else (-100, 155))
    decoded = see(tmp_path, bytes(data), view)
    full = pixels(tmp_path, tiff(values), view)
    full[10:20] = 0
    if tag:
        full[values == 7] = 0
    assert np.array_equal(decoded.pixels, full) and "nodata" in decoded.remarks


def test_a_page_is_chosen_and_thumbnails_are_passed_over(tmp_path):
    small, other, third = SCENE[:5, :7, 0], SCENE[..., 1], SCENE[..., 2]
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(small, subfiletype=1)
        writer.write(other)
        writer.write(third, compression="deflate")
    data = file.getvalue()
    for page, expected in ((None, other), (1, small), (2, other), (3, third)):
        assert np.array_equal(pixels(tmp_path, data, View(page=page))[..., 0], expected)
    fault = see(tmp_path, data, View(page=4)).fault
    assert fault.needs_option and fault.reason == "3 pages: --data.page 4 is not in it"
    only = tiff(small, subfiletype=1)
    assert np.array_equal(pixels(tmp_path, only, View())[..., 0], small)


def test_a_frame_of_an_animation_is_a_page_and_other_formats_have_one(tmp_path):
    frames = [make_image(i, SIZE) for i in range(3)]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    data = (tmp_path / "x.webp").read_bytes()
    for page, frame in ((None, 0), (1, 0), (3, 2)):
        assert np.array_equal(pixels(tmp_path, data, View(page=page), "x.webp"), np.asarray(frames[frame]))
    for name in ("x.png", "x.jpg", "x.bmp", "x.webp"):
        if name != "x.webp":
            frames[0].save(tmp_path / name)
        fault = read_or_fault(str(tmp_path), name, View(page=4)).fault
        assert fault.reason == f"{'3 pages' if name == 'x.webp' else '1 page'}: --data.page 4 is not in it"
        assert read_or_fault(str(tmp_path), name, View(page=1)).fault is None


def test_frames_after_the_first_are_not_looked_at_unless_one_is_asked_for(tmp_path):
    frames = [make_image(i, SIZE, "P") for i in range(3)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    data = (tmp_path / "x.gif").read_bytes()
    third = pixels(tmp_path, data, View(page=3), "x.gif")
    assert np.array_equal(third, np.asarray(frames[2].convert("RGB")))
    cut = see(tmp_path, data[: 2 * len(data) // 3], View(), "x.gif")
    assert np.array_equal(cut.pixels, np.asarray(frames[0].convert("RGB")))
    assert see(tmp_path, data[: 2 * len(data) // 3], View(page=3), "x.gif").fault


def npy(values, **how):
    file = io.BytesIO()
    np.save(file, values, **how)
    return file.getvalue()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["C", "F", ">"])
def test_arrays_are_read_as_instruments_files_are(tmp_path, dtype, order):
    values = stored_as(dtype)
    values = values.astype(values.dtype.newbyteorder(order)) if order == ">" else np.array(values, order=order)
    found = pixels(tmp_path, npy(values), View(DTYPES[dtype], bands=[4, 3, 2]), "x.npy")
    assert np.abs(found.astype(int) - RGB).max() <= (dtype == np.float16)
    found = pixels(tmp_path, npy(values[..., 0]), View(DTYPES[dtype]), "x.npy")
    assert np.abs(found.astype(int) - SCENE[..., :1]).max() <= (dtype == np.float16)


def test_arrays_of_three_channels_are_colors_and_of_two_values_black_and_white(tmp_path):
    assert np.array_equal(pixels(tmp_path, npy(RGB), View(), "x.npy"), RGB)
    assert np.array_equal(pixels(tmp_path, npy(RGB[..., 0] > 99), View(), "x.npy")[..., 0], (RGB[..., 0] > 99) * 255)
    heights = RGB[..., 0].astype(np.float32)
    heights[3] = np.nan
    decoded = see(tmp_path, npy(heights), View((0, 255)), "x.npy")
    assert decoded.remarks == ("nodata",) and not decoded.pixels[3].any()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(np.array([{}], object)), "an array of Python objects of shape (1,): EXPECTED"),
        (npy(np.zeros((2, 3, 4, 5))), "an array of float64 of shape (2, 3, 4, 5): EXPECTED"),
        (npy(np.zeros((2, 0))), "an array of float64 of shape (2, 0): EXPECTED"),
        (npy(np.zeros((2, 3), complex)), "an array of complex128 of shape (2, 3): EXPECTED"),
        (npy(RGB)[:-1], "truncated"),
        (npy(RGB)[:40], "damaged"),
        (npy(SCENE), "7 channels (numpy array), none of which is said to be red, green or blue. --data.bands says "
         "which to take, for instance --data.bands '[3,2,1]'"),
    ],
)  # fmt: skip
def test_other_arrays_are_listed(tmp_path, data, reason):
    found = see(tmp_path, data, View(), "x.npy").fault.reason
    assert found == reason.replace("EXPECTED", "expected numbers, (H, W) or (H, W, C)")


def test_an_array_that_claims_to_be_huge_is_not_made(tmp_path):
    header = npy(np.zeros((1, 1), np.uint8))[:-1]
    data = header.replace(b"(1, 1), }" + b" " * 10, b"(100000, 99999), }" + b" ")
    assert see(tmp_path, data, View(), "x.npy").fault.reason == "more than 178,956,970 pixels"
    assert see(tmp_path, npy(RGB), View(), "x.jpg").fault.reason == "a numpy array named .jpg"


def test_images_with_nodata_are_counted_and_arrays_are_found_by_their_suffix(tmp_path, caplog):
    for i in range(4):
        values = SCENE.astype(np.float32)
        if i % 2:
            values[0] = np.nan
        np.save(tmp_path / f"{i}.npy", values)
    make_image(1, SIZE).save(tmp_path / "a.png")
    options = {"suffixes": [".npy"], "bands": [4, 3, 2], "value_range": [(0.0, 255.0)] * 3, "batch_size": 8}
    _, (batch,) = loader(tmp_path, num_workers=0, **options)
    assert batch.names == ["0.npy", "1.npy", "2.npy", "3.npy"]
    assert batch.remarks == {"nodata": {"images": 2, "first": "1.npy"}}
    assert batch.faults[0].reason == "3 channels (image): --data.bands [4, 3, 2] takes channel 4"
    report(batch.remarks)
    assert caplog.messages[-1] == "nodata in 2 images (1.npy, …)"
