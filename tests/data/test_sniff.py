"""What a file is that is not an image, in words."""

import imagecodecs
import numpy as np
import pytest
from conftest import make_image
from PIL import features

from featx.data.decode import read_or_fault
from featx.data.view import View

GREY = np.asarray(make_image(3, (30, 20), "L")).astype(np.uint16)
PAGE = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body><svg></svg>"


def encode_12_bit_jpeg(exif=b""):
    data = imagecodecs.jpeg_encode(GREY * 16, bitspersample=12)
    return data[:2] + exif + data[2:]


FILES = {
    "phone.jpg": (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + bytes(40), "HEIC named .jpg"),
    "page.JPEG": (PAGE, "a saved web page named .JPEG"),
    "xhtml.png": (b'<?xml version="1.0"?>\n' + PAGE, "a saved web page named .png"),
    "denied.png": (b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>AccessDenied', "XML named .png"),
    "logo.png": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg">', "an SVG drawing named .png"),
    "pointer.jpg": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a Git LFS pointer (git lfs pull fetches the image) named .jpg",
    ),
    "12bit.jpg": (encode_12_bit_jpeg(), "a 12-bit JPEG"),
    "camera.jpg": (encode_12_bit_jpeg(b"\xff\xe1\xea\x60Exif" + bytes(59994)), "a 12-bit JPEG"),
    "16bit.jpg": (imagecodecs.ljpeg_encode(GREY * 256), "a lossless JPEG"),
    "ls.jpg": (imagecodecs.jpegls_encode(GREY.astype(np.uint8)), "JPEG-LS named .jpg"),
    "xl.jpg": (imagecodecs.jpegxl_encode(GREY.astype(np.uint8)), "JPEG XL named .jpg"),
    "scan.tif": (b"%PDF-1.4\n", "a PDF named .tif"),
    "book.jpg": (b"PK\x03\x04" + bytes(30), "a zip archive named .jpg"),
    "._a.jpg": (b"\0\x05\x16\x07" + bytes(50), "a macOS metadata file (AppleDouble) named .jpg"),
    "x-ray.jpg": (bytes(128) + b"DICM" + bytes(9), "DICOM named .jpg"),
    "film.jpg": (b"\0\0\0\x18ftypmp42" + bytes(30), "a video named .jpg"),
    "denied.jpg": (b'{"error": "not found"}', "text named .jpg"),
    "lost.jpg": (bytes(5000), "nothing but zeros named .jpg"),
    "header.png": (b"\x89PNG\r\n\x1a\n" + bytes(50), "damaged"),
    "header.webp": (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(20), "damaged"),
    "noise.jpg": (b"\x80\x81no image", "not an image that PIL can read"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_could_not_be_read_says_what_it_is(tmp_path, name):
    data, reason = FILES[name]
    (tmp_path / name).write_bytes(data)
    decoded = read_or_fault(str(tmp_path), name)
    assert decoded.pixels is None and decoded.fault.reason == reason
    assert read_or_fault(str(tmp_path), name, View(strict=False))[:2] == decoded[:2]


def test_what_this_installation_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.WebPImagePlugin.SUPPORTED", False)
    check = features.check
    monkeypatch.setattr(features, "check", lambda feature: feature != "webp" and check(feature))
    (tmp_path / "x.webp").write_bytes(imagecodecs.webp_encode(np.array(make_image(3, (30, 20)))))
    fault = read_or_fault(str(tmp_path), "x.webp").fault
    assert fault.reason == "WebP, which this installation of Pillow cannot decode"
