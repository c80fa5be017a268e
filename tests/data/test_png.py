"""PNG: data that end early, in every kind, and whole pixels beside damaged or large text."""

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
from conftest import make_image
from PIL import Image

from featx.data import png
from featx.data.decode import read_image, read_or_fault
from featx.data.view import View

SIZE = (29, 21)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def rows_of(bits, channels, width, rows, seed=1):
    """Unfiltered rows of random samples."""
    size = -(-width * bits * channels // 8)
    values = np.random.default_rng(seed).integers(1, 256, (rows, size), dtype=np.uint8)
    return [b"\0" + row.tobytes() for row in values]


def build(bits, colour_type, interlaced=False, keep=1.0, extra=b"", black=False):
    """A PNG with right checksums, of whose rows a share is in the data."""
    width, height = SIZE
    passes = png.PASSES if interlaced else ((0, 0, 1, 1),)
    rows = []
    for left, top, across, down in passes:
        columns, lines = -(-(width - left) // across), -(-(height - top) // down)
        rows += rows_of(bits, png.CHANNELS[colour_type], columns, lines, seed=left + 8 * top)
    if black:
        rows = [bytes(len(row)) for row in rows]
    data = b"".join(rows[: int(len(rows) * keep)]) + extra
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, interlaced)
    palette = chunk(b"PLTE", np.random.default_rng(3).integers(0, 256, 768, dtype=np.uint8).tobytes()[: 3 << bits])
    packed = zlib.compress(data)
    half = len(packed) // 2
    body = [chunk(b"IHDR", header), palette * (colour_type == 3), chunk(b"tEXt", b"a\0b"),
            chunk(b"IDAT", packed[:half]), chunk(b"IDAT", packed[half:]), chunk(b"IEND", b"")]  # fmt: skip
    return png.MAGIC + b"".join(body)


KINDS = [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2), (1, 3), (2, 3), (4, 3), (8, 3), (8, 4), (16, 4),
         (8, 6), (16, 6)]  # fmt: skip


def read(folder, data, value_range=None):
    (folder / "x.png").write_bytes(data)
    return read_or_fault(str(folder), "x.png", View(value_range))


@pytest.mark.parametrize(("bits", "colour_type"), KINDS)
@pytest.mark.parametrize("interlaced", [False, True])
def test_a_png_whose_data_end_early_is_no_image_though_its_checksums_are_right(tmp_path, bits, colour_type, interlaced):
    whole = read(tmp_path, build(bits, colour_type, interlaced))
    expected = Image.open(tmp_path / "x.png")
    if expected.mode == "I;16":
        assert np.array_equal(whole.pixels[..., 0], np.rint(np.asarray(expected) / 257))
    else:
        assert np.array_equal(whole.pixels, expected.convert("RGB"))
    assert read(tmp_path, build(bits, colour_type, interlaced, extra=b"more")).pixels is not None
    assert read(tmp_path, build(bits, colour_type, interlaced, black=True)).pixels.max() <= 255
    for keep in (0.1, 0.5, 0.99):
        data = build(bits, colour_type, interlaced, keep)
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # in silence
        for value_range in (None, (0, 4095)):
            found = read(tmp_path, data, value_range)
            assert found.pixels is None and found.fault.reason in ("truncated", "damaged"), keep


@pytest.mark.parametrize("colour_type", [2, 4, 6])
def test_16_bit_colour_is_its_upper_8_bits_and_scaled_with_a_value_range(tmp_path, colour_type):
    channels = png.CHANNELS[colour_type]
    values = np.random.default_rng(6).integers(0, 4096, (21, 29, channels), dtype=np.uint16)
    data = imagecodecs.png_encode(values)
    colours = values[..., :1].repeat(3, axis=2) if channels == 2 else values[..., :3]
    assert np.array_equal(read(tmp_path, data).pixels, colours >> 8)
    assert np.array_equal(read(tmp_path, data, (0, 4095)).pixels, np.rint(colours * 255.0 / 4095))


def insert(data, *chunks):
    return data[:33] + b"".join(chunks) + data[33:]


TEXTS = {
    "text": [chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000)))],
    "profile": [chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2_000_000)))],
    "wrong checksums": [chunk(kind, b"a\0b")[:-1] + b"x" for kind in (b"tEXt", b"iTXt", b"eXIf", b"tIME", b"iCCP")],
    "nonsense": [chunk(kind, b"\xff") for kind in (b"gAMA", b"pHYs", b"cHRM", b"iTXt", b"acTL", b"fcTL")],
}


@pytest.mark.parametrize("texts", TEXTS)
def test_what_is_in_chunks_that_change_no_pixel_does_not_matter(tmp_path, texts):
    data = build(8, 2)
    assert np.array_equal(read(tmp_path, insert(data, *TEXTS[texts])).pixels, read(tmp_path, data).pixels)


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"IDAT", b"tRNS"])
def test_a_wrong_checksum_of_a_chunk_that_pixels_need_is_damage(tmp_path, kind):
    data = build(8, 3)
    data = bytearray(data.replace(chunk(b"tEXt", b"a\0b"), chunk(b"tRNS", b"abc")))
    at = data.index(kind)
    data[at + 4 + int.from_bytes(data[at - 4 : at], "big")] ^= 1
    assert read(tmp_path, bytes(data)).fault.reason == "damaged"


def test_a_palette_that_is_lost_is_damage(tmp_path):
    data = build(8, 3)
    assert read(tmp_path, data.replace(b"PLTE", b"pLTE")).fault.reason == "damaged"
    assert read(tmp_path, data[:-12]).fault.reason == "truncated"


def test_an_interlaced_photograph_is_what_pillow_reads(tmp_path):
    pixels = np.array(make_image(3, (30, 20)))
    (tmp_path / "x.png").write_bytes(imagecodecs.png_encode(pixels, level=1))
    assert np.array_equal(read_image(str(tmp_path / "x.png")), pixels)
