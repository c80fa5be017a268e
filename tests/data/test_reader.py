"""--data.reader: a function of the user's reads the files, and what it does is checked and recorded."""

import hashlib
import re
import sys

import numpy as np
import pytest
from conftest import REPO, loader, make_image
from products import fits_file, pds_files

from featx import ImageFolderDataModule
from featx.data import reader
from featx.data.decode import read_or_fault
from featx.data.preprocess import Preprocessing
from featx.data.view import View
from featx.errors import BadValueError

DOCS = (REPO / "docs" / "images.md").read_text()
PICTURE = np.array(make_image(3, (70, 50)))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of readers that can be imported for this test, and return its name."""

    def write(text, name="some_readers"):
        (tmp_path / f"{name}.py").write_text(text)
        return name

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in ("some_readers", "fits_reader", "pds_reader"):
        sys.modules.pop(name, None)
    reader.find.cache_clear()
    reader.digest.cache_clear()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.raw").write_bytes(PICTURE.tobytes())
    return tmp_path / "images"


def code(body):
    values = "values = np.fromfile(path, np.uint8).reshape(50, 70, 3)"
    return f"import numpy as np\n\ndef read(path):\n    {values}\n    {body}\n"


@pytest.mark.parametrize(
    ("body", "view", "expected"),
    [
        ("return values", {}, PICTURE),
        ("return values[..., 0]", {}, np.repeat(PICTURE[..., :1], 3, -1)),
        ("return values.astype(np.uint16) * 257", {}, PICTURE),
        ("return values / 255", {"value_range": (0, 1)}, PICTURE),
        ("return np.concatenate([values, values], 2)", {"bands": [6, 2, 1]}, PICTURE[..., [2, 1, 0]]),
        ("return values[..., 0] > 99", {}, np.repeat((PICTURE[..., :1] > 99) * 255, 3, -1)),
    ],
)
def test_what_the_reader_returns_is_the_image(folder, module, body, view, expected):
    name = f"{module(code(body))}.read"
    decoded = read_or_fault(str(folder), "a.raw", View(**view, reader=name))
    assert decoded.fault is None and np.array_equal(decoded.pixels, expected) and decoded.kind == name


SHAPES = r"\(H, W\) or \(H, W, 3\), or more channels with --data.bands"


@pytest.mark.parametrize(
    ("body", "reason", "needs_option"),
    [
        ("raise KeyError('x')", r"READ failed: KeyError: 'x'", False),
        ("raise SystemExit(3)", r"READ failed: SystemExit: 3", False),
        (
            "return None",
            rf"READ returned a NoneType: expected a numpy array without a mask, {SHAPES}",
            True,
        ),
        (
            "return np.ma.array(values)",
            rf"READ returned a MaskedArray: expected a numpy array .*{SHAPES}",
            True,
        ),
        (
            "return values.T",
            rf"READ returned uint8 of shape \(3, 70, 50\): expected numbers, {SHAPES}",
            True,
        ),
        ("return values[None]", rf"READ returned uint8 of shape \(1, 50, 70, 3\): .*{SHAPES}", True),
        ("return values.astype(complex)", rf"READ returned complex128 of shape .*{SHAPES}", True),
        (
            "return values / 255",
            r"64-bit float values \(READ\) have no black and white .*--data.value_range",
            True,
        ),
    ],
)
def test_what_it_raises_and_what_is_no_image_is_listed(folder, module, body, reason, needs_option):
    fault = read_or_fault(str(folder), "a.raw", View(reader=f"{module(code(body))}.read")).fault
    assert re.match(reason.replace("READ", "some_readers.read"), fault.reason) and fault.needs_option == needs_option
    data = ImageFolderDataModule(str(folder), suffixes=[".raw"], reader="some_readers.read")
    if needs_option:
        with pytest.raises(BadValueError, match=r"^a.raw: (some_readers.read returned|64-bit float)"):
            data.setup()
    else:
        data.setup()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.read", r"--data.reader nowhere.read: nowhere is neither in this folder nor installed"),
        ("nowhere", r"--data.reader nowhere: nowhere is neither in this folder nor installed"),
        ("some_readers.raed", r"--data.reader some_readers.raed: .*Did you mean read\?"),
        ("some_readers.x", r"--data.reader some_readers.x: its type is int. Expected a function that takes a path"),
    ],
)
def test_a_reader_that_cannot_be_imported_is_refused(folder, module, name, words):
    module(code("return values") + "\nx = 3\n")
    with pytest.raises(BadValueError, match=words):
        ImageFolderDataModule(str(folder), suffixes=[".raw"], reader=name).check()


def test_options_that_read_files_are_refused_with_it():
    for name, value in {"exif_rotate": True, "srgb": True, "background": (0, 0, 0), "page": 1}.items():
        with pytest.raises(BadValueError, match=f"--data.{name}: not for --data.reader a.b, which reads"):
            View(**{name: value}, reader="a.b")


def test_its_name_and_the_digest_of_its_code_are_in_the_identity(folder, module):
    text = code("return values")
    name = f"{module(text)}.read"
    data = ImageFolderDataModule(str(folder), suffixes=[".raw"], reader=name)
    identity = data.identity(Preprocessing.usual())
    assert identity["reader"] == name
    assert identity["reader_source"] == hashlib.sha256(text.encode()).hexdigest()
    _, (batch,) = loader(folder, num_workers=0, suffixes=[".raw"], reader=name)
    assert batch.names == ["a.raw"] and batch.readers == {name: 1}


def example(name):
    return re.search(rf"```python\n(# {name}.py\n.*?)```", DOCS, re.DOTALL)[1]


def test_the_reader_of_fits_in_docs_reads_images_and_cubes(tmp_path, module):
    module(example("fits_reader"), "fits_reader")
    values = PICTURE.astype(np.int16) * 2 - 100
    fits_file(tmp_path / "cube.fits", np.moveaxis(values, -1, 0))
    fits_file(tmp_path / "image.fits", values[..., 0])
    view = {"value_range": (-100, 410), "reader": "fits_reader.read"}
    found = read_or_fault(str(tmp_path), "cube.fits", View(**view, bands=[3, 2, 1]))
    assert found.fault is None and np.array_equal(found.pixels, PICTURE[..., ::-1])
    found = read_or_fault(str(tmp_path), "image.fits", View(**view))
    assert found.fault is None and np.array_equal(found.pixels, np.repeat(PICTURE[..., :1], 3, -1))
    (tmp_path / "bad.fits").write_bytes(b"SIMPLE  =")
    assert read_or_fault(str(tmp_path), "bad.fits", View(**view)).fault.reason.startswith(
        "fits_reader.read failed: OSError"
    )


@pytest.mark.filterwarnings("ignore")
def test_the_reader_of_pds_in_docs_reads_pds3_and_pds4(tmp_path, module):
    module(example("pds_reader"), "pds_reader")
    pds_files(tmp_path, PICTURE[..., 0].astype(np.int16) * 16)
    view = View((0, 4080), reader="pds_reader.read")
    for name in ("pds3.img", "pds4.xml"):
        found = read_or_fault(str(tmp_path), name, view)
        assert found.fault is None, found.fault
        assert np.array_equal(found.pixels, np.repeat(PICTURE[..., :1], 3, -1))
