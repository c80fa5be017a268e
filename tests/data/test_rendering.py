"""--data.exif_rotate, --data.srgb and --data.background: the picture as Pillow makes it so, whatever the format."""

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from conftest import make_image
from PIL import Image, ImageCms, ImageOps

from featx import ImageFolderDataModule
from featx.data.decode import decode, read_or_fault
from featx.data.pillow import to_rgb
from featx.data.preprocess import Preprocessing
from featx.data.view import View
from featx.errors import BadValueError

SIZE = (33, 20)
PICTURE = make_image(3, SIZE)
WHITE = (255, 255, 255)
WIDE = imagecodecs.cms_profile("rgb", whitepoint=[0.3127, 0.329, 1.0], gamma=1.8,
                               primaries=[0.64, 0.33, 1, 0.21, 0.71, 1, 0.15, 0.06, 1])  # fmt: skip
GREY = imagecodecs.cms_profile("gray", whitepoint=[0.3127, 0.329, 1.0], gamma=1.0)


def cmyk_profile():
    """An ICC profile of inks: a table of their 16 corners, from inks to Lab."""
    corners = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(16, 4)
    light = 1 - np.minimum(corners[:, :3] * 0.8 + corners[:, 3:] * 0.9, 1)
    lab = np.stack(
        [light.mean(1) * 255, 128 + 60 * (light[:, 0] - light[:, 1]), 128 + 60 * (light[:, 1] - light[:, 2])], 1
    )
    identity = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    linear = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + 4 * linear + lab.round().astype(np.uint8).tobytes()
    table += 3 * linear
    head = struct.pack(">4s4s4s4s", b"\2\x10\0\0", b"prtr", b"CMYK", b"Lab ") + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    tag = struct.pack(">I4sII", 1, b"A2B0", 144, len(table))
    return struct.pack(">I4s", 132 + 12 + len(table), bytes(4)) + head + tag + table


CMYK = cmyk_profile()


def encode(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def by_file(folder, data, view):
    (folder / "x").write_bytes(data)
    decoded = read_or_fault(str(folder), "x", view)
    assert decoded.fault is None, decoded.fault
    return decoded.pixels


def exif(orientation):
    found = Image.Exif()
    found[274] = orientation
    return found.tobytes()


FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "TIFF deflate", "JPEG2000")


def with_metadata(format, orientation=1, profile=b"", image=PICTURE):
    """An image with both, as each format has them."""
    if format.startswith("TIFF"):
        tags = [(274, 3, 1, orientation, True)] + [(34675, 7, len(profile), profile, True)] * bool(profile)
        how = {"photometric": "minisblack" if image.mode == "L" else "separated" if image.mode == "CMYK" else "rgb"}
        file = io.BytesIO()
        tifffile.imwrite(
            file, np.asarray(image), extratags=tags, compression="deflate" if " " in format else None, **how
        )
        return file.getvalue()
    if format == "JPEG2000":
        data = encode(image, format)
        found = b"\2\0\0" + profile
        color = struct.pack(">I", len(found) + 8) + b"colr" + found if profile else b""
        at = data.index(b"colr") - 4  # of the box that Pillow writes, which says sRGB
        plain = data[at : at + int.from_bytes(data[at : at + 4], "big")]
        start = data.index(b"jp2h") - 4
        size = int.from_bytes(data[start : start + 4], "big") - len(plain) + len(color or plain)
        data = (
            data[:start] + struct.pack(">I", size) + data[start + 4 : at] + (color or plain) + data[at + len(plain) :]
        )
        box = b"uuidJpgTiffExif->JP2" + exif(orientation).removeprefix(b"Exif\0\0")
        return data + struct.pack(">I", len(box) + 4) + box
    lossless = {"quality": 95} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    return encode(image, format, exif=exif(orientation), icc_profile=profile or None, **lossless)


def as_is(data):
    return Image.fromarray(decode(io.BytesIO(data), "x").pixels)


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("format", FORMATS)
def test_orientation_is_applied_in_every_format(tmp_path, format, orientation):
    data = with_metadata(format, orientation)
    plain = as_is(data)
    assert plain.size == SIZE
    turned = Image.Exif()
    turned[274] = orientation
    plain.getexif()[274] = orientation
    expected = np.asarray(ImageOps.exif_transpose(plain))
    assert np.array_equal(by_file(tmp_path, data, View(exif_rotate=True)), expected)
    assert np.array_equal(to_rgb(plain, View(exif_rotate=True)), expected)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_that_cannot_be_read_turns_nothing(tmp_path, format):
    data = encode(PICTURE, format, exif=b"Exif\0\0no TIFF at all")
    assert np.array_equal(by_file(tmp_path, data, View(exif_rotate=True)), by_file(tmp_path, data, View()))


def to_srgb(image, profile):
    return np.asarray(ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"),
                                                outputMode="RGB"))  # fmt: skip


@pytest.mark.parametrize(
    ("format", "mode"),
    [(format, "RGB") for format in FORMATS]
    + [(format, "L") for format in ("JPEG", "PNG", "TIFF", "JPEG2000")]
    + [(format, "CMYK") for format in ("JPEG", "TIFF", "TIFF deflate")],
)
def test_colors_are_converted_from_an_embedded_profile(tmp_path, format, mode):
    profile = {"RGB": WIDE, "L": GREY, "CMYK": CMYK}[mode]
    data = with_metadata(format, 6, profile, PICTURE.convert(mode))
    if mode == "CMYK":
        stored = Image.open(io.BytesIO(data)) if format == "JPEG" else PICTURE.convert(mode)
    else:
        stored = as_is(data).convert(mode)
    expected = to_srgb(stored, profile)
    assert np.abs(expected.astype(int) - np.asarray(stored.convert("RGB"))).max() > 20
    assert np.abs(by_file(tmp_path, data, View(srgb=True)).astype(int) - expected).max() == 0
    both = by_file(tmp_path, data, View(srgb=True, exif_rotate=True))
    assert np.array_equal(both, np.rot90(expected, -1))


def test_a_grey_image_with_a_profile_of_colors_is_grey_of_these_and_one_of_other_inks_is_listed(tmp_path):
    grey = PICTURE.convert("L")
    data = with_metadata("PNG", 1, WIDE, grey)
    assert np.array_equal(by_file(tmp_path, data, View(srgb=True)), to_srgb(grey.convert("RGB"), WIDE))
    for profile, reason in (
        (GREY, "its color profile is for L, and the image is RGB"),
        (CMYK, "its color profile is for CMYK, and the image is RGB"),
        (b"no profile", "its color profile cannot be used (cannot open profile from string)"),
    ):
        (tmp_path / "x.png").write_bytes(encode(PICTURE, "PNG", icc_profile=profile))
        assert read_or_fault(str(tmp_path), "x.png", View(srgb=True)).fault.reason == reason
        assert read_or_fault(str(tmp_path), "x.png").fault is None


def test_a_png_with_a_large_profile_is_converted_and_one_with_a_damaged_one_is_listed(tmp_path):
    large = WIDE + bytes(1 << 21)
    large = len(large).to_bytes(4, "big") + large[4:]
    data = encode(PICTURE, "PNG", icc_profile=large)
    assert np.array_equal(by_file(tmp_path, data, View(srgb=True)), to_srgb(PICTURE, WIDE))
    at = data.index(b"iCCP") + 20
    (tmp_path / "x.png").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert read_or_fault(str(tmp_path), "x.png").fault is None
    assert read_or_fault(str(tmp_path), "x.png", View(srgb=True)).fault.reason == "damaged"


def transparent(mode):
    image = PICTURE.convert("L" if mode == "LA" else "RGB")
    image.putalpha(make_image(9, SIZE, "L"))
    return image.quantize(16) if mode == "PA" else image  # a palette of RGBA


def over(image, color):
    below = Image.new("RGBA", image.size, (*color, 255))
    return np.asarray(Image.alpha_composite(below, image.convert("RGBA")).convert("RGB"))


@pytest.mark.parametrize("color", [WHITE, (10, 200, 30)])
@pytest.mark.parametrize(
    ("format", "mode"),
    [("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "PA"), ("WEBP", "RGBA"), ("GIF", "PA"), ("AVIF", "RGBA"), ("TIFF", "RGBA"),
     ("TIFF", "LA"), ("JPEG2000", "RGBA")],
)  # fmt: skip
def test_transparent_pixels_show_the_background(tmp_path, format, mode, color):
    image = transparent(mode)
    if format == "GIF":
        image = PICTURE.quantize(16)
        image.info["transparency"] = 3
    data = encode(image, format, **({"lossless": True} if format == "WEBP" else {}))
    view = View(background=color)
    stored = Image.open(io.BytesIO(data))
    expected = over(stored, color)
    assert (expected != by_file(tmp_path, data, View())).any()
    assert np.array_equal(by_file(tmp_path, data, view), expected)
    assert np.array_equal(to_rgb(Image.open(io.BytesIO(data)), view), expected)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "I;16", "L 2"])
def test_the_transparent_color_of_a_png_shows_the_background(tmp_path, mode):
    kind, *bits = mode.split()
    image = (
        Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.uint16) * 257)
        if kind == "I;16"
        else PICTURE.convert(kind)
    )
    values = np.asarray(image)
    if bits:  # Pillow writes such only from palettes: 2 bits of grey, unpacked
        values = np.asarray(PICTURE.convert("L")) // 64
        rows = np.packbits(np.unpackbits(values[..., None], axis=-1)[..., -2:].reshape(20, -1), axis=1)
        chunks = [
            (b"IHDR", struct.pack(">IIBBBBB", *SIZE, 2, 0, 0, 0, 0)),
            (b"tRNS", struct.pack(">H", int(values[0, 0]))),
            (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
            (b"IEND", b""),
        ]
        data = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in chunks
        )
    else:
        key = tuple(values[0, 0].tolist()) if kind == "RGB" else int(values[0, 0])
        data = encode(image, "PNG", transparency=key)
    clear = (values.reshape(*values.shape[:2], -1) == values[0, 0]).all(-1)
    expected = np.where(clear[..., None], (1, 2, 3), by_file(tmp_path, data, View()))
    assert clear.any() and not clear.all()
    assert np.array_equal(by_file(tmp_path, data, View(background=(1, 2, 3))), expected)


@pytest.mark.parametrize("extra", ["unassalpha", "assocalpha", "unspecified"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_an_extra_sample_of_a_tiff_is_transparency_if_the_file_says_so(tmp_path, extra, dtype):
    values = np.asarray(transparent("RGBA"))
    stored = values.copy()
    if extra == "assocalpha":
        stored[..., :3] = np.round(values[..., :3] * (values[..., 3:] / 255.0))
    most = 1 if dtype == np.float32 else np.iinfo(dtype).max
    file = io.BytesIO()
    tifffile.imwrite(file, (stored / 255.0 * most).astype(dtype), photometric="rgb", extrasamples=[extra])
    view = View((0, 1) if dtype == np.float32 else None, background=WHITE)
    found = by_file(tmp_path, file.getvalue(), view).astype(int)
    expected = values[..., :3] if extra == "unspecified" else over(Image.fromarray(values), WHITE)
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("value_range", [None, (0, 65535)])
def test_16_bit_colors_of_a_png_show_the_background(tmp_path, value_range):
    values = np.asarray(transparent("RGBA")).astype(np.uint16) * 257
    expected = over(transparent("RGBA"), WHITE)
    for stored in (values, values[..., [0, 3]]):
        data = imagecodecs.png_encode(np.ascontiguousarray(stored))
        found = by_file(tmp_path, data, View(value_range, background=WHITE))
        wanted = expected if stored is values else np.repeat(expected[..., :1], 3, -1)
        assert np.array_equal(found, wanted)
    key = values[5, 7, :3]
    data = imagecodecs.png_encode(np.ascontiguousarray(values[..., :3]))
    body = b"tRNS" + struct.pack(">3H", *key.tolist())
    chunk = struct.pack(">I", 6) + body + struct.pack(">I", zlib.crc32(body))
    at = data.index(b"IDAT") - 4
    found = by_file(tmp_path, data[:at] + chunk + data[at:], View(value_range, background=WHITE))
    clear = (values[..., :3] == key).all(-1)
    assert np.array_equal(found, np.where(clear[..., None], 255, values[..., :3] >> 8))


def test_all_three_at_once(tmp_path):
    image = transparent("RGBA")
    data = encode(image, "PNG", icc_profile=WIDE, exif=exif(8))
    converted = Image.fromarray(to_srgb(image.convert("RGB"), WIDE))
    converted.putalpha(image.getchannel("A"))
    expected = np.rot90(over(converted, WHITE), 1)
    assert np.array_equal(by_file(tmp_path, data, View(exif_rotate=True, srgb=True, background=WHITE)), expected)


def test_they_are_part_of_the_identity_only_where_they_are_set(tmp_path):
    PICTURE.save(tmp_path / "0.png")
    plain = ImageFolderDataModule(str(tmp_path)).identity(Preprocessing.usual())
    assert not {"exif_rotate", "srgb", "background"} & plain.keys()
    options = {"exif_rotate": True, "srgb": True, "background": (255, 255, 255)}
    given = ImageFolderDataModule(str(tmp_path), **options).identity(Preprocessing.usual())
    assert given == plain | options | {"background": [255, 255, 255]}
    assert View.of(given) == View(exif_rotate=True, srgb=True, background=[255, 255, 255])


def test_impossible_backgrounds_are_refused():
    with pytest.raises(
        BadValueError, match=r"--data.background \[0, 0, 256\]: expected red, green and blue from 0 to 255"
    ):
        View(background=(0, 0, 256))
    with pytest.raises(BadValueError, match="not a record that featx can use"):
        View.of({"background": ["x", 0, 0]})
