"""One file -> pixels: PIL's very values, or a fault in words, whatever the file does."""

import io
import os
import random
import struct
import zlib
from base64 import b85decode

import numpy as np
import pytest
import simplejpeg
from conftest import make_image
from PIL import Image, ImageFile

from featx.data.batch import Fault
from featx.data.decode import read_image, read_or_fault
from featx.data.view import View
from featx.errors import BadValueError, ImageError


def encode(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def read(folder, data, name="image.jpg", **how):
    """What featx makes of a file with these bytes."""
    (folder / name).write_bytes(data)
    return read_or_fault(str(folder), name, View(**how))[:2]


def by_pil(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


# 30 x 20 pixels with a luminance sampled at 4x2 of the colours, as cjpeg -sample 4x2 writes it: beyond simplejpeg.
SAMPLED_4X2 = zlib.decompress(b85decode(
    "c-pm)y)Q&T6vfZEqj<#@Z;*Hjgj&HSXe2(0Cte~^kgQEMS{hNl)=JbARQ`pfP$?8bu@Qxc0^2AQVv8+MsK(jOM{Q2d+&lL-Gj}rKK0G1L"
    "()ko5KnbCN?HG%gz$8++s654tT*k8URph9ns(C}o@quHUVh?o=A#jw#>{CqG#c8hbnmdY1JmHEe33qLf`&u>lYR)2a9OsseS;a>9ZYAyi"
    "RISy1gjc(=lw)0Ps$~^TwwURfO!40p&fz0;qu+5B=IK1cB@)23KkM6|vyL{2DfE+=?-c3z14NuauP4m?2EG^`QP2tV&SMHMw|7Se+1X*~"
    "Z7zDQRjw8;Hg8a<4TOg;ugZ32"
))  # fmt: skip


def adobe_marker(data, transform):
    return data[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform]) + data[2:]


def jpegs():
    """JPEGs of every kind that comes about, by what is special about them."""
    for size in ((1, 1), (7, 5), (33, 18), (250, 167)):
        image = make_image(7, size)
        for how in (
            {},
            {"subsampling": 0, "quality": 98},
            {"subsampling": 1, "progressive": True},
            {"keep_rgb": True, "subsampling": 0},
            {"restart_marker_blocks": 1},
            {"quality": 3, "optimize": True},
            {"exif": b"Exif\0\0" + bytes(40)},
        ):
            yield f"{size} {how}", encode(image, **how)
        for mode in ("L", "CMYK"):
            yield f"{size} {mode}", encode(image.convert(mode))
            yield f"{size} {mode} progressive", encode(image.convert(mode), progressive=True)
        for subsampling in ("440", "411"):
            data = simplejpeg.encode_jpeg(np.array(image), colorsubsampling=subsampling)
            yield f"{size} {subsampling}", data
    usual = encode(make_image(7, (33, 18)))
    yield "profile", encode(make_image(7, (250, 167)), icc_profile=bytes(3000))
    yield "two pictures", encode(make_image(7, (33, 18)), "MPO", save_all=True, append_images=[make_image(8, (33, 18))])
    yield "JFIF 2", usual.replace(b"JFIF\0\1", b"JFIF\0\2")
    yield "no JFIF", usual[:2] + usual[20:]
    for transform in (0, 1, 2):
        yield f"Adobe {transform}", adobe_marker(usual[:2] + usual[20:], transform)
    inks = encode(make_image(7, (33, 18), "CMYK"))
    yield "YCCK", inks.replace(inks[6:18], inks[6:17] + b"\2")
    yield "sampled 4x2", SAMPLED_4X2
    yield "something after the end", usual + b"comment" * 9


def test_jpegs_of_every_kind_are_what_pil_makes_of_them_to_the_bit(tmp_path):
    for kind, data in jpegs():
        pixels, fault = read(tmp_path, data)
        assert fault is None and np.array_equal(pixels, by_pil(data)), kind


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_8_bit_modes_are_what_convert_gives(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode in ("CMYK", "YCbCr") else "image.png")
    make_image(3, (30, 20), mode).save(path)
    assert np.array_equal(read_image(str(path)), Image.open(path).convert("RGB"))


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    make_image(3, (30, 20), "P").save(tmp_path / "p.png", transparency=bytes(range(200)))
    assert read_image(str(tmp_path / "p.png")).shape == (20, 30, 3)


def test_exif_rotation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    make_image(3, (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(str(tmp_path / "turned.jpg")).shape == (20, 30, 3)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, suffix):
    grey = np.asarray(make_image(4, (30, 20), "L"))
    path = str(tmp_path / f"deep{suffix}")
    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    assert np.array_equal(read_image(path)[:, :, 0], grey)


def test_big_endian_16_bits_are_scaled(tmp_path):
    grey = np.asarray(make_image(4, (30, 20), "L"))
    path = tmp_path / "big.tif"
    Image.frombytes("I;16B", (30, 20), (grey.astype(np.uint16) * 257).astype(">u2").tobytes()).save(path)
    assert np.array_equal(read_image(str(path))[:, :, 0], grey)


def test_value_range_scales_a_12_bit_camera(tmp_path):
    path = str(tmp_path / "camera.png")
    Image.fromarray(np.array([[0, 4095, 2048, 5000]], np.uint16)).save(path)
    assert read_image(path, View((0, 4095)))[0, :, 0].tolist() == [0, 255, 128, 255]


@pytest.mark.parametrize(("brightest", "dark"), [(4095, True), (4096, False)])
def test_16_bit_grey_that_is_nearly_black_is_noticed_unless_a_value_range_says_what_is_white(tmp_path, brightest, dark):
    Image.fromarray(np.array([[0, brightest]], np.uint16)).save(tmp_path / "camera.png")
    assert read_or_fault(str(tmp_path), "camera.png").remarks == ("dark",) * dark
    assert not read_or_fault(str(tmp_path), "camera.png", View((0, 65535))).remarks


def test_a_file_that_would_start_a_program_is_not_opened(tmp_path):
    data = encode(make_image(3, (30, 20)), "EPS")
    assert Image.open(io.BytesIO(data)).format == "EPS"
    pixels, fault = read(tmp_path, data)
    assert pixels is None and fault.reason == "PostScript named .jpg"


def test_value_range_leaves_8_bits_alone(tmp_path):
    path = str(tmp_path / "image.png")
    make_image(3, (30, 20)).save(path)
    assert np.array_equal(read_image(path, View((0, 4095))), read_image(path))


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "float"), (np.int32, "integer")])
def test_32_bits_need_a_value_range(tmp_path, dtype, kind):
    path = str(tmp_path / "deep.tif")
    Image.fromarray(np.array([[0, 1, 2, 4]], dtype)).save(path)
    with pytest.raises(BadValueError, match=f"32-bit {kind} values .*\n--data.value_range says"):
        read_image(path)
    assert read_image(path, View((0, 4)))[0, :, 0].tolist() == [0, 64, 128, 255]


def test_infinite_values_are_an_error(tmp_path):
    path = str(tmp_path / "inf.tif")
    Image.fromarray(np.array([[0, np.inf]], np.float32)).save(path)
    with pytest.raises(ImageError, match="holds values that are infinite"):
        read_image(path, View((0, 1)))


def test_where_pil_has_another_libjpeg_its_values_are_taken_and_damage_is_still_found(tmp_path, monkeypatch):
    monkeypatch.setattr("featx.data.decode.PIL_HAS_TURBO", False)
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args: decode(*args) ^ 1)
    data = encode(make_image(3, (30, 20)), quality=95)
    assert np.array_equal(read(tmp_path, data)[0], by_pil(data))
    assert read(tmp_path, data[: len(data) // 2] + b"\xff\xd9")[0] is None


@pytest.mark.parametrize(("suffix", "format"), [(".png", "JPEG"), (".jpg", "PNG"), (".JPEG", "GIF"), (".bmp", "TIFF")])
def test_what_a_file_is_goes_by_its_content(tmp_path, suffix, format):
    data = encode(make_image(3, (30, 20)), format)
    pixels, fault = read(tmp_path, data, f"image{suffix}")
    assert fault is None and np.array_equal(pixels, by_pil(data))


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (2, 3000)])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_smallest_and_the_longest_are_read(tmp_path, size, format):
    pixels, fault = read(tmp_path, encode(make_image(3, size), format))
    assert fault is None and pixels.shape == (size[1], size[0], 3) and pixels.dtype == np.uint8


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, format):
    frames = [make_image(seed, (30, 20)) for seed in (1, 2, 3)]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.array_equal(read(tmp_path, data)[0], by_pil(data))


FORMATS = {
    "JPEG": {}, "PNG": {}, "BMP": {}, "PPM": {}, "GIF": {}, "WEBP": {"lossless": True}, "TIFF": {},
    "TIFF lzw": {"compression": "tiff_lzw"}, "TIFF deflate": {"compression": "tiff_deflate"},
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("strict", [True, False])
def test_half_a_file_is_no_image_in_any_format_even_where_pil_would_fill_it_up(tmp_path, format, strict, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(make_image(3, (130, 120)), format.split()[0], **FORMATS[format])
    for share in (0.02, 0.3, 0.5, 0.8):
        pixels, fault = read(tmp_path, data[: int(len(data) * share)], strict=strict)
        assert pixels is None and not fault.used


def damaged_jpegs():
    """Files that PIL reads without a word, though half the picture is grey or shifted."""
    image = make_image(5, (160, 120))
    for name, how in {"baseline": {}, "progressive": {"progressive": True}, "CMYK": {}, "L": {}}.items():
        data = encode(image.convert(name) if name in ("CMYK", "L") else image, quality=95, **how)
        half = len(data) // 2
        yield f"{name}, an end marker after the half", data[:half] + b"\xff\xd9"
        yield f"{name}, zeros in the middle", data[:half] + bytes(400) + data[half + 400 :]
        yield f"{name}, a piece missing", data[:half] + data[half + 300 :]


@pytest.mark.parametrize(("kind", "data"), list(damaged_jpegs()), ids=[kind for kind, _ in damaged_jpegs()])
def test_a_damaged_jpeg_is_no_image_and_used_only_where_that_was_asked_for(tmp_path, kind, data):
    pixels, fault = read(tmp_path, data)
    assert pixels is None and fault.reason in ("damaged", "truncated") and not fault.used
    assert fault.exception.startswith("ValueError: ")
    pixels, again = read(tmp_path, data, strict=False)
    assert again == fault._replace(used=True) and np.array_equal(pixels, by_pil(data))


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_a_png_with_a_wrong_checksum_is_no_image(tmp_path, mode):
    data = bytearray(encode(make_image(3, (30, 20), "L").convert(mode), "PNG"))
    data[data.index(b"IEND") - 5] ^= 1  # of the pixels' chunk: PIL does not look at it
    by_pil(bytes(data))
    pixels, fault = read(tmp_path, bytes(data), "x.png")
    assert pixels is None
    assert fault == ("x.png", "damaged", "SyntaxError: broken PNG file (bad header checksum in b'IDAT')", False)


def test_whatever_happens_to_a_file_it_is_pils_image_or_a_fault(tmp_path):
    rng = random.Random(5)
    image = make_image(9, (48, 40))
    whole = [encode(image), encode(image, progressive=True), encode(image.convert("CMYK")), encode(image, "PNG"),
             encode(image.convert("L"), restart_marker_blocks=2), encode(image.convert("P"), "PNG")]  # fmt: skip
    read_all = 0
    for turn in range(600):
        data = bytearray(rng.choice(whole))
        at = rng.randrange(2, len(data))
        if turn % 4 == 0:
            data[at:] = b"\xff\xd9" * (turn % 8 == 0)
        elif turn % 4 == 1:
            data[at : at + rng.randrange(40)] = rng.randbytes(rng.randrange(40))
        else:
            for _ in range(rng.choice([1, 1, 3, 20])):
                data[rng.randrange(len(data) if turn % 4 == 2 else 600)] = rng.randrange(256)
        pixels, fault = read(tmp_path, bytes(data))
        assert (pixels is None) == (fault is not None)
        if pixels is not None:
            read_all += 1
            assert np.array_equal(pixels, by_pil(bytes(data))), turn
    assert 0 < read_all < 600


def bomb(format):
    """A small file whose header says 13,400 x 13,400 pixels."""
    data = bytearray(encode(Image.new("RGB", (8, 8)), format))
    if format == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 13400, 13400)
    else:
        data[16:24] = struct.pack(">II", 13400, 13400)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("limit", [None, 10**9])
def test_a_decompression_bomb_is_no_image_whatever_pils_limit_was_set_to(tmp_path, format, strict, limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    pixels, fault = read(tmp_path, bomb(format), strict=strict)
    assert pixels is None and fault.reason == "more than 178,956,970 pixels"
    assert fault.exception.startswith("DecompressionBombError: ")


def test_faults_are_reported_in_words_without_the_machines_paths(tmp_path):
    make_image(3, (300, 200)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no image")
    os.symlink(tmp_path / "nowhere", tmp_path / "link.jpg")
    os.symlink("round.jpg", tmp_path / "round.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")  # to open one would wait for ever
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    words = {
        "half.png": ("truncated", "OSError: Truncated File Read"),
        "empty.jpg": ("empty", "ImageError: empty"),
        "text.jpg": ("text named .jpg", "ImageError: text named .jpg"),
        "link.jpg": ("a link to nothing", "FileNotFoundError: No such file or directory"),
        "lost.jpg": ("no such file", "FileNotFoundError: No such file or directory"),
        "round.jpg": (
            "cannot be read: Too many levels of symbolic links",
            "OSError: Too many levels of symbolic links",
        ),
        "folder.jpg": ("a folder, not a file", "ImageError: a folder, not a file"),
        "pipe.jpg": ("a pipe or a device, not a file", "ImageError: a pipe or a device, not a file"),
    }
    for name, (reason, exception) in words.items():
        for strict in (True, False):
            found = read_or_fault(str(tmp_path), name, View(strict=strict))
            assert found == (None, Fault(name, reason, exception), "", ())
    fault = read_or_fault(str(tmp_path), "float.tif").fault
    assert "32-bit float values" in fault.reason and "--data.value_range" in fault.reason and "\n" not in fault.reason


@pytest.mark.parametrize(
    ("err", "reason"),
    [
        (PermissionError(13, "Permission denied", "/a/b.jpg"), "no permission to read it"),
        (OSError(5, "Input/output error", "/a/b.jpg"), "cannot be read: Input/output error"),
        (MemoryError(), "not enough memory to decode it"),
        (RecursionError("too deep"), "damaged"),
        (struct.error("unpack requires a buffer"), "damaged"),
        (zlib.error("Error -3"), "damaged"),
        (SyntaxError("broken\n  file"), "damaged"),
    ],
)
def test_no_exception_of_a_decoder_goes_through(tmp_path, monkeypatch, err, reason):
    def fail(*_, **__):
        raise err

    monkeypatch.setattr(Image, "open", fail)
    pixels, fault = read(tmp_path, b"anything")
    assert pixels is None and fault.reason == reason
    assert fault.exception.startswith(type(err).__name__) and "/a/" not in fault.exception + fault.reason
    assert "\n" not in fault.exception
