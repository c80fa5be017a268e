"""TIFF -> pixels: Pillow's very values where it reads a kind rightly, else what the tags say, or a listed fault."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
import tifffile
from conftest import make_image
from PIL import Image, ImageCms

from featx.data import tiff
from featx.data.decode import read_image, read_or_fault
from featx.data.pillow import MOST_PIXELS
from featx.data.view import View
from featx.errors import BadValueError, ImageError

SIZE = (70, 50)
SMOOTH = np.array(make_image(3, SIZE))  # (50, 70, 3)
GREY = SMOOTH[..., 0]


def write(values, **how):
    """A TIFF as tifffile writes it."""
    file = io.BytesIO()
    tifffile.imwrite(file, values, **how)
    return file.getvalue()


def build(strips, **tags):
    """A little-endian TIFF of these strips and numbered tags (``t258=8``), as no library would write it."""
    entries = {256: SIZE[0], 257: SIZE[1], 258: 8, 259: 1, 262: 1, 277: 1, 278: SIZE[1]}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    at, offsets = 8, []
    for strip in strips:
        offsets.append(at if strip else 0)
        at += len(strip)
    entries = {273: offsets, 279: [len(strip) for strip in strips]} | entries
    extra, fields = b"", []
    directory = at + 2 + 12 * len(entries) + 4
    for code, value in sorted(entries.items()):
        numbers = value if isinstance(value, list) else [value]
        data = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(data) > 4:
            data, extra = struct.pack("<I", directory + len(extra)), extra + data
        fields.append(struct.pack("<HHI", code, 4, len(numbers)) + data)
    head = b"II*\0" + struct.pack("<I", at) + b"".join(strips)
    return head + struct.pack("<H", len(fields)) + b"".join(fields) + bytes(4) + extra


def ours(data, value_range=None):
    return tiff.read(io.BytesIO(data), View(value_range), MOST_PIXELS)[0]


def by_pil(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def image_of(mode):
    image = make_image(3, SIZE)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    if mode in ("LA", "RGBA"):
        image = image.convert("L" if mode == "LA" else "RGB")
        image.putalpha(make_image(9, SIZE, "L"))
    return image.convert(mode)


COMPRESSIONS = (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "group3", "group4", "tiff_ccitt")
PLAIN = [
    (mode, compression)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")
    for compression in COMPRESSIONS
    if (mode == "1" or compression not in ("group3", "group4", "tiff_ccitt"))
    and (mode not in ("1", "P", "LAB") or compression != "jpeg")
]


@pytest.mark.parametrize(("mode", "compression"), PLAIN)
def test_what_pillow_reads_rightly_keeps_its_very_values(mode, compression):
    for rows in (None, 16):
        file = io.BytesIO()
        image_of(mode).save(file, "TIFF", compression=compression, tiffinfo={278: rows} if rows else {})
        assert np.array_equal(ours(file.getvalue()), by_pil(file.getvalue()))


def test_colours_multiplied_with_their_alpha_are_divided_by_it():
    values = np.random.default_rng(4).integers(0, 256, (50, 70, 4), dtype=np.uint8)
    values[:5, :, 3] = 0
    data = build([values.tobytes()], t258=[8] * 4, t262=2, t277=4, t338=1)
    assert np.array_equal(ours(data), by_pil(data))
    grey = build([values[..., 2:].tobytes()], t258=[8] * 2, t277=2, t338=1)
    assert np.array_equal(ours(grey), by_pil(data)[..., 2:].repeat(3, axis=2))


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "packbits", "jpeg"])
@pytest.mark.parametrize(
    "how",
    [{}, {"tile": (32, 32)}, {"planarconfig": "separate"}, {"planarconfig": "separate", "tile": (16, 48)},
     {"byteorder": ">"}, {"bigtiff": True}],
)  # fmt: skip
def test_tiles_planes_byte_orders_and_bigtiff_are_what_pillow_reads(compression, how):
    kinds = {"rgb": SMOOTH, "separated": np.dstack([SMOOTH, GREY]), "minisblack": GREY, "miniswhite": GREY}
    for photometric, values in kinds.items():
        if values.ndim == 2 and "planarconfig" in how:
            continue
        planes = np.moveaxis(values, -1, 0) if "planarconfig" in how else values
        data = write(planes, photometric=photometric, compression=compression, **how)
        assert np.array_equal(ours(data), by_pil(data)), photometric


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("order", [1, 2])
def test_grey_of_less_than_8_bits_is_what_pillow_reads(bits, photometric, order):
    row = -(-SIZE[0] * bits // 8)
    packed = np.random.default_rng(1).integers(0, 256, row * SIZE[1], dtype=np.uint8).tobytes()
    data = build([packed], t258=bits, t262=photometric, t266=order)
    assert np.array_equal(ours(data), by_pil(data))


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
def test_jpeg_with_colours_at_every_second_pixel_is_what_pillow_reads(subsampling):
    for how in ({}, {"rowsperstrip": 16}, {"tile": (32, 32)}):
        data = write(SMOOTH, photometric="ycbcr", compression="jpeg", subsampling=subsampling, **how)
        assert np.array_equal(ours(data), by_pil(data))


@pytest.mark.parametrize(("across", "down"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_ycbcr_without_jpeg_is_what_libtiff_makes_of_it_compressed_or_not(across, down):
    blocks = -(-SIZE[1] // down), -(-SIZE[0] // across)
    luma = np.random.default_rng(2).integers(0, 256, (*blocks, across * down), dtype=np.uint8)
    colours = np.random.default_rng(3).integers(60, 200, (*blocks, 2), dtype=np.uint8)
    packed = np.concatenate([luma, colours], axis=-1).tobytes()
    how = {"t258": [8, 8, 8], "t262": 6, "t277": 3, "t530": [across, down]}
    compressed = build([zlib.compress(packed)], t259=8, **how)
    expected = by_pil(compressed).astype(int)
    assert np.array_equal(ours(compressed), expected)
    assert np.abs(ours(build([packed], **how)) - expected).max() <= 1  # Pillow's table where it reads that, too
    with pytest.raises(tifffile.TiffFileError, match="truncated: strip or tile 0"):
        ours(build([packed[:-9]], **how))


def test_a_colour_map_of_16_bits_is_scaled_and_one_of_8_bits_taken_as_it_is():
    small = np.random.default_rng(5).integers(0, 256, (3, 256))
    expected = small.T[GREY]
    for scale in (256, 1):
        data = build([GREY.tobytes()], t262=3, t320=(small * scale).ravel().tolist())
        assert np.array_equal(ours(data), expected)
    with pytest.raises(tifffile.TiffFileError):
        ours(build([GREY.tobytes()], t262=3, t320=[0] * 30))


@pytest.mark.parametrize("compression", [None, "deflate", "lzw"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("white", [0, 65535])
def test_16_bit_grey_is_scaled_and_inverted_where_0_is_white(compression, byteorder, white):
    values = GREY.astype(np.uint16) * 257
    values = values if white else 65535 - values
    photometric = "minisblack" if white else "miniswhite"
    data = write(values, photometric=photometric, compression=compression, byteorder=byteorder)
    for value_range in (None, (0, 65535)):
        assert np.array_equal(ours(data, value_range)[..., 0], GREY)


@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_16_bit_colour_is_its_upper_8_bits_and_scaled_with_a_value_range(planes, compression):
    values = SMOOTH.astype(np.uint16) * 16
    stored = np.moveaxis(values, -1, 0) if planes else values
    how = {"planarconfig": "separate"} if planes else {}
    data = write(stored, photometric="rgb", compression=compression, **how)
    assert np.array_equal(ours(data), values >> 8)
    assert np.array_equal(ours(data, (0, 4080)), SMOOTH)


@pytest.mark.parametrize("bits", [9, 10, 12, 14])
def test_packed_bits_have_their_own_white(bits):
    most = 2**bits - 1
    values = (GREY.astype(int) * most + 127) // 255
    rows = ["".join(f"{value:0{bits}b}" for value in row) for row in values]
    packed = b"".join(int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in rows)
    data = build([packed], t258=bits)
    assert np.array_equal(ours(data)[..., 0], np.rint(values * 255 / most))
    assert np.array_equal(ours(data, (0, most // 4))[..., 0], np.rint(np.minimum(values * 255 / (most // 4), 255)))
    assert not read_dark(data)


def read_dark(data):
    return "dark" in tiff.read(io.BytesIO(data), View(), MOST_PIXELS)[1]


def test_a_12_bit_camera_in_16_bits_is_noticed():
    assert read_dark(write(GREY.astype(np.uint16) * 16)) and not read_dark(write(GREY.astype(np.uint16) * 17))


@pytest.mark.parametrize(
    ("dtype", "low", "high", "words"),
    [
        (np.int8, -128, 127, "8-bit signed integer values"),
        (np.int16, -32768, 32767, "16-bit signed integer values"),
        (np.int32, -(2**31), 2**31 - 1, "32-bit integer values"),
        (np.uint32, 0, 2**32 - 1, "32-bit integer values"),
        (np.float16, 0, 1, "16-bit float values"),
        (np.float32, -1, 1, "32-bit float values"),
        (np.float64, 0, 1e-6, "64-bit float values"),
    ],
)
def test_signed_wide_and_float_values_need_a_value_range(tmp_path, dtype, low, high, words):
    values = (low + np.arange(256.0) / 255 * (high - low)).astype(dtype)
    for photometric in ("minisblack", "miniswhite", "rgb"):
        stored = np.repeat(values[:, None], 3, 1).reshape(16, 16, 3) if photometric == "rgb" else values.reshape(16, 16)
        path = tmp_path / f"{photometric}.tif"
        path.write_bytes(write(stored, photometric=photometric, compression="deflate"))
        kind = {"f": "float ", "i": "signed ", "u": ""}[values.dtype.kind]
        what = f"{kind}{'RGB' if photometric == 'rgb' else 'grey'} TIFF"
        with pytest.raises(BadValueError, match=rf"{words} \({what}\).*\n--data.value_range says"):
            read_image(str(path))
        expected = np.arange(256).reshape(16, 16)
        found = read_image(str(path), View((low, high)))[..., 1].astype(int)
        assert np.abs(found - (255 - expected if photometric == "miniswhite" else expected)).max() <= 1


def test_orientation_is_not_applied_compressed_or_not():
    for compression in (None, "deflate"):
        data = write(SMOOTH, photometric="rgb", compression=compression, extratags=[(274, 3, 1, 6, True)])
        assert by_pil(data).shape == (70, 50, 3)
        assert np.array_equal(ours(data), SMOOTH)


ROWS = 10
STRIPS = [GREY[top : top + ROWS].tobytes() for top in range(0, SIZE[1], ROWS)]
PACK = {1: bytes, 8: zlib.compress, 32773: lambda data: b"".join(b"\0" + data[i : i + 1] for i in range(len(data)))}


@pytest.mark.parametrize("compression", PACK)
def test_a_strip_that_a_sparse_file_leaves_out_is_black(compression):
    strips = [PACK[compression](strip) for strip in STRIPS]
    data = build([strips[0], b"", *strips[2:]], t259=compression, t278=ROWS)
    expected = GREY.copy()
    expected[ROWS : 2 * ROWS] = 0
    assert np.array_equal(ours(data)[..., 0], expected)


@pytest.mark.parametrize("compression", PACK)
def test_strips_that_are_missing_short_or_outside_of_the_file_are_an_error(compression, tmp_path):
    strips = [PACK[compression](strip) for strip in STRIPS]
    how = {"t259": compression, "t278": ROWS}
    assert np.array_equal(ours(build(strips, **how))[..., 0], GREY)
    short = PACK[compression](STRIPS[1][:-70])
    damaged = {
        "missing": (build(strips[:3], **how), "truncated"),
        "short": (build([strips[0], short, *strips[2:]], **how), "damaged"),
        "outside": (build(strips, t273=[8, 8, 8, 8, 10**6], **how), "truncated"),
        "no bytes": (build(strips, t279=[0, *(len(strip) for strip in strips[1:])], **how), "damaged"),
        "no offset": (build(strips, t273=[0, 8, 8, 8, 8], **how), "damaged"),
        "no directory": (build(strips, **how)[:-300], "truncated"),
    }
    for name, (data, reason) in damaged.items():
        (tmp_path / name).write_bytes(data)
        decoded = read_or_fault(str(tmp_path), name)
        assert decoded.pixels is None and decoded.fault.reason == reason, (name, decoded.fault)


def test_a_deflate_strip_with_a_wrong_checksum_is_an_error():
    packed = bytearray(zlib.compress(GREY.tobytes()))
    packed[-1] ^= 1
    data = build([bytes(packed)], t259=8)
    with pytest.raises(RuntimeError, match="DEFLATE"):
        ours(data)


def test_damaged_jpeg_in_a_tiff_is_an_error():
    for values, photometric in ((GREY, "minisblack"), (SMOOTH, "ycbcr"), (SMOOTH, "rgb")):
        data = bytearray(write(values, photometric=photometric, compression="jpeg"))
        page = tifffile.TiffFile(io.BytesIO(data)).pages.first
        middle = page.dataoffsets[0] + page.databytecounts[0] // 2
        data[middle : middle + 100] = bytes(100)
        by_pil(bytes(data))  # in silence
        with pytest.raises(ValueError):
            ours(bytes(data))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (build([bytes(3500)], t262=32803), r"a TIFF of raw camera data \(CFA\)"),
        (build([bytes(3500)], t262=12), "a TIFF of photometric 12"),
        (build([bytes(3500)], t259=34676), "a TIFF with compression SGILOG, which this installation cannot decode"),
        (build([bytes(3500)], t259=12345), "a TIFF with compression 12345, which this installation cannot decode"),
        (build([bytes(28000)], t258=64, t339=6), "a grey TIFF of 64-bit values in sample format 6"),
        (build([bytes(3500)], t262=2), "a RGB TIFF of 1 channels: it needs 3"),
        (build([bytes(7000)], t258=16, t262=3, t320=[0] * 3 * 65536), "a 16-bit palette TIFF"),
        (write(np.zeros((2, 16, 70), np.uint8), volumetric=True, tile=(16, 16, 16)), "a volume of 2 slices"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named(data, words):
    with pytest.raises(ImageError, match=words):
        ours(data)


def test_a_first_page_of_any_size_is_checked_before_it_is_decoded():
    for tags in ({"t256": 10**5, "t257": 10**5}, {"t322": 10**5, "t323": 10**5}):
        with pytest.raises(Image.DecompressionBombError):
            ours(build([bytes(9)], **tags))


def test_tifffiles_remarks_are_not_logged_and_those_of_others_are(caplog):
    data = build([GREY.tobytes()], t34665=10**6)  # an EXIF directory that is not in the file
    heard = logging.getLogger("tifffile")
    filters = list(heard.filters)
    assert np.array_equal(ours(data)[..., 0], GREY)
    assert not caplog.records and heard.filters == filters
    build_broken = bytearray(data)
    at = build_broken.index(struct.pack("<HH", 262, 4))
    build_broken[at + 2] = 99  # PhotometricInterpretation of a type that does not exist: tifffile takes 0
    with pytest.raises(tifffile.TiffFileError, match="tag 262 cannot be read"):
        ours(bytes(build_broken))
    assert not caplog.records
    tifffile.TiffFile(io.BytesIO(build_broken))
    assert caplog.records


def test_of_several_pages_the_first_is_taken():
    assert np.array_equal(ours(write(np.stack([GREY, 255 - GREY]), photometric="minisblack"))[..., 0], GREY)


def test_a_tiff_named_otherwise_is_read_and_counted_as_one(tmp_path):
    (tmp_path / "a.jpg").write_bytes(write(SMOOTH, photometric="rgb"))
    decoded = read_or_fault(str(tmp_path), "a.jpg")
    assert decoded.kind == "TIFF" and np.array_equal(decoded.pixels, SMOOTH)
