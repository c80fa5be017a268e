"""Mutated files of every format: a row is an independent decoder's, or a fault is listed; nothing crashes or grows."""

import io
import random
import re
import resource
from collections import Counter

import imagecodecs
import numpy as np
import pytest
import tifffile
from conftest import make_image

from featx.data import gif
from featx.data.decode import read_or_fault

SIZE = (40, 30)


def save(format, mode="RGB", **how):
    file = io.BytesIO()
    make_image(3, SIZE, mode).save(file, format, **how)
    return file.getvalue()


def save_tiff(values, **how):
    file = io.BytesIO()
    tifffile.imwrite(file, values, **how)
    return file.getvalue()


PHOTO = np.array(make_image(3, SIZE))
GREY = PHOTO[..., 0]

WHOLE = {
    "JPEG": lambda: [
        save("JPEG"), save("JPEG", "L", quality=90), save("JPEG", progressive=True), save("JPEG", subsampling=0),
        save("JPEG", restart_marker_blocks=2), save("JPEG", optimize=True, quality=30),
    ],
    "PNG": lambda: [
        save("PNG"), save("PNG", "L"), save("PNG", "P"), save("PNG", "LA"), save("PNG", "RGBA"), save("PNG", "1"),
        imagecodecs.png_encode(PHOTO.astype(np.uint16) * 257),
    ],
    "TIFF": lambda: [
        *(save_tiff(values, photometric=photometric, compression=compression, **how)
          for compression in (None, "deflate", "lzw", "packbits", "jpeg")
          for values, photometric in ((PHOTO, "rgb"), (GREY, "minisblack"))
          for how in ({"rowsperstrip": 8}, {"tile": (16, 16)})),
        save_tiff(GREY.astype(np.uint16) * 257, photometric="minisblack", rowsperstrip=8),
        save_tiff(np.moveaxis(PHOTO, -1, 0), photometric="rgb", planarconfig="separate", compression="zstd"),
    ],
    "WEBP": lambda: [save("WEBP"), save("WEBP", lossless=True), save("WEBP", "RGBA"), save("WEBP", quality=95)],
    "BMP": lambda: [save("BMP"), save("BMP", "L"), save("BMP", "P"), save("BMP", "1")],
    "PPM": lambda: [
        save("PPM"), save("PPM", "L"), save("PPM", "1"),
        b"P2 40 30 255\n" + b" ".join(b"%d" % value for value in GREY.ravel()),
        b"P5 40 30 4095\n" + (GREY.astype(">u2") * 16).tobytes(),
    ],
    "GIF": lambda: [save("GIF", "P"), save("GIF", "L"), save("GIF", "P", interlace=0)],
}  # fmt: skip


def as_rgb(values):
    """Grey or colours with or without alpha, of at most 8 bits, as ``(H, W, 3) uint8``."""
    values = values[..., None] if values.ndim == 2 else values
    return values[..., :1].repeat(3, axis=2) if values.shape[2] < 3 else values[..., :3]


def by_libpng(data):
    values = imagecodecs.png_decode(data)
    return as_rgb((values >> 8).astype(np.uint8) if values.dtype == np.uint16 else values)


def by_tifffile(data):
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        values, white = page.asarray(maxworkers=1).reshape(page.shaped), 2**page.bitspersample - 1
    values = np.moveaxis(values[:, 0, ..., 0], 0, -1) if page.shaped[0] > 1 else values[0, 0]
    if page.photometric == 3:
        return (np.asarray(page.colormap).T >> 8).astype(np.uint8)[values[..., 0].astype(int)]
    if page.photometric not in (0, 1, 2, 6):
        raise NotImplementedError(f"photometric {page.photometric}")
    if white > 255 and page.photometric == 2:
        values = values >> (page.bitspersample - 8)
    else:
        values = np.rint(values * (255.0 / white))
    return as_rgb((255 - values if page.photometric == 0 else values).astype(np.uint8))


def by_numpy(data):
    """A PNM as its definition has it: https://netpbm.sourceforge.net/doc/"""
    kind, width, height, maxval, start = data[:2], 0, 0, 1, 0
    words, at = [], 2
    while len(words) < (2 if kind == b"P4" else 3):
        found = re.compile(rb"(?:\s|#[^\r\n]*)*(\d+)").match(data, at)
        words.append(int(found[1]))
        at = found.end()
    width, height, maxval = (*words, 1)[:3]
    start = at + 1
    if kind == b"P4":
        rows = np.frombuffer(data, np.uint8, height * -(-width // 8), start).reshape(height, -1)
        return as_rgb(255 * (1 - np.unpackbits(rows, axis=1)[:, :width]))
    shape = (height, width, 3) if kind == b"P6" else (height, width)
    count = height * width * (3 if kind == b"P6" else 1)
    if kind == b"P2":
        values = np.array(data[at:].split()[:count]).astype(int)
    else:
        values = np.frombuffer(data, ">u2" if maxval > 255 else np.uint8, count, start)
    return as_rgb(np.rint(np.minimum(values.reshape(shape), maxval) / maxval * 255).astype(np.uint8))


DECODERS = {
    "JPEG": lambda data: imagecodecs.jpeg8_decode(data, outcolorspace="RGB"),
    "PNG": by_libpng,
    "TIFF": by_tifffile,
    "WEBP": lambda data: as_rgb(imagecodecs.webp_decode(data)),
    "BMP": lambda data: as_rgb(imagecodecs.bmp_decode(data)),
    "PPM": by_numpy,
    "GIF": lambda data: as_rgb(imagecodecs.gif_decode(gif.first_picture(data))),
}


def mutate(rng, data):
    """Truncate a file, flip bits of it, set a run of it to zero, or change bytes of its header."""
    data = bytearray(data)
    at, how = rng.randrange(len(data)), rng.choice(["truncated", "flipped", "zeroed", "header"])
    if how == "truncated":
        del data[at:]
    elif how == "flipped":
        for _ in range(rng.choice([1, 1, 2, 10])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "zeroed":
        run = min(rng.choice([4, 20, 100]), len(data) - at)
        data[at : at + run] = bytes(run)
    else:
        for _ in range(rng.choice([1, 1, 3])):
            data[rng.randrange(min(len(data), 200))] = rng.choice([0, 1, 2, 127, 128, 255, rng.randrange(256)])
    return bytes(data)


MAY_REFUSE = ("BMP", "TIFF")  # whose headers have no checksum: the other decoder is stricter about some fields


def covers_its_screen(data):
    """Whether the picture of a GIF covers the screen: what is around it has no colour of its own."""
    at = data.find(b"\x2c", 13 + 3 * 256)
    return data[6:10] == data[at + 5 : at + 9] and data[at + 1 : at + 5] == bytes(4)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB


@pytest.mark.parametrize("turns", [200, pytest.param(2000, marks=pytest.mark.torture)])
@pytest.mark.parametrize("name", WHOLE)
def test_a_mutated_file_is_what_an_independent_decoder_sees_or_a_fault(tmp_path, name, turns):
    rng, whole, path, before = random.Random(f"{name} {turns}"), WHOLE[name](), tmp_path / "x", peak()
    rights = []
    for data in whole:
        path.write_bytes(data)
        rights.append(read_or_fault(str(tmp_path), "x").pixels)
        assert np.array_equal(rights[-1], DECODERS[name](data))
    outcomes = Counter()
    for turn in range(turns):
        which = rng.randrange(len(whole))
        data = mutate(rng, whole[which])
        path.write_bytes(data)
        pixels, fault, *_ = read_or_fault(str(tmp_path), "x")
        assert (pixels is None) == (fault is not None)
        if pixels is None:
            outcomes["fault"] += 1
        elif not np.array_equal(pixels, rights[which]):
            outcomes["another picture"] += 1
            try:
                other = DECODERS[name](data)
            except Exception:
                assert name in MAY_REFUSE, f"turn {turn}: only featx has a row"
            else:
                same = np.array_equal(pixels, other)
                assert same or (name == "GIF" and not covers_its_screen(data)), f"turn {turn}: a picture of its own"
    assert outcomes["fault"] and sum(outcomes.values()) <= turns
    assert peak() < max(2_000_000, before + 100_000)  # kB; tests before it in this process may have taken more
