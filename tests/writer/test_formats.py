"""Activations -> bytes: every float32 and every name comes back."""

import csv
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO

from featx.writer.formats import FORMATS, csv_row, is_plain
from featx.writer.formats.npy import NPY_HEAD, name_line, read_name_lines


def test_every_float32_reads_back_the_same():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    edges = np.array([0, 0x80000000, 1, 0x7F7FFFFF, 0x00800000, 0x007FFFFF, 0x3F800001], np.uint32)
    values = np.concatenate([bits, edges]).view(np.float32)
    values = values[np.isfinite(values)]
    fields = csv_row(b"x", values).decode().rstrip("\n").split(",")[1:]
    assert np.array_equal(np.array(fields, np.float32).view(np.uint32), values.view(np.uint32))
    digits = [text.lower().split("e")[0].replace(".", "").strip("-0") for text in fields[:2000]]
    shortest = [np.format_float_scientific(value, trim="-").split("e")[0] for value in values[:2000]]
    assert digits == [text.replace(".", "").strip("-0") for text in shortest]


def test_values_have_the_fewest_digits():
    assert csv_row(b"a.jpg", np.array([0.1, -2.5, 1e-7], np.float32)) == b"a.jpg,0.1,-2.5,1e-7\n"


def test_values_that_are_not_finite_are_written_as_nan_and_inf():
    row = np.array([1, np.nan, np.inf, -np.inf], np.float32)
    assert csv_row(b"a.jpg", row) == b"a.jpg,1.0,nan,inf,-inf\n"


NAMES = ["a.jpg", "a,b.jpg", 'a"b.jpg', "a\nb.jpg", "a\rb.jpg", "#a.jpg", " a .jpg", "猫.jpg", "a#b;c'd.jpg"]


@pytest.mark.parametrize("name", NAMES)
def test_any_csv_reader_gets_the_name_back(name):
    line = csv_row(name.encode(), np.zeros(2, np.float32)).decode()
    assert next(csv.reader(io.StringIO(line, newline=""))) == [name, "0.0", "0.0"]
    assert not line.startswith("#")
    assert is_plain(name.encode()) == line.startswith(name + ",")


def test_a_name_that_is_not_utf8_keeps_its_bytes():
    assert csv_row(b"\xff\xe9.jpg", np.zeros(1, np.float32)) == b"\xff\xe9.jpg,0.0\n"


def test_the_npy_head_has_a_fixed_length_and_numpy_reads_it():
    for rows, columns, dtype in ((0, 0, "float32"), (3, 4, "float16"), (10**12, 10**9, "float32")):
        head = FORMATS["npy"]("fc7", columns, {"dtype": dtype}).head(rows)
        assert len(head) == NPY_HEAD
        file = io.BytesIO(head)
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((rows, columns), False, np.dtype(dtype))
        assert file.tell() == NPY_HEAD


def test_names_read_back_from_their_lines():
    names = [b"a.jpg", b"a\nb", b"a\\nb", b"\\", b"\r\n\\\\n", b"\xff\xe9", "猫".encode(), b""]
    lines = b"".join(map(name_line, names))
    assert lines.count(b"\n") == len(names) and b"\r" not in lines and read_name_lines(lines) == names


def test_the_header_names_each_column():
    assert FORMATS["csv"]("fc7", 3, {"header": True}).head(9) == b"image,fc7.0,fc7.1,fc7.2\n"
    assert FORMATS["csv"]('m#a,"b', 2, {"header": True}).head(9) == b'image,"m#a,""b.0","m#a,""b.1"\n'


READING = (REPO / "docs" / "formats.md").read_text().partition("## Reading them without featx")[2].partition("\n## ")[0]


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", READING, re.DOTALL))
def test_other_libraries_read_all_rows_as_in_the_docs(block, tmp_path, monkeypatch):
    for module in re.findall(r"import (duckdb|pandas|polars)", block):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    Path("features").mkdir()
    names = [b"a.jpg", b"b,c\x85.jpg" if "latin-1" in block else "b,c\u2028.jpg".encode(), b"#d.jpg"]
    values = np.array([[np.nan, np.inf, -np.inf, 1], [2, -3, 1e-7, 0.1], [-0.0, 5, 6, 1e9]], np.float32)
    Path("features/fc7.csv").write_bytes(b"".join(map(csv_row, names, values)))
    np.save("features/fc7.npy", values)
    Path("features/fc7.names.txt").write_bytes(b"".join(map(name_line, names)))
    parquet = FORMATS["parquet"]("fc7", 4, {"names": "basename"})
    parquet.finish(Path("features/fc7.npy"), "features/fc7", map(os.fsdecode, names), b"{}")
    scope = {}
    for lines in block.split("\n\n"):
        exec(lines, scope)
        assert scope.pop("names", None) in (None, [os.fsdecode(name) for name in names])
        assert np.array_equal(scope.pop("values", values), values, equal_nan=True)
    if "nearest" in scope:
        distance = pytest.approx(np.linalg.norm(values[1] - values[2]))
        assert scope["nearest"][0] == ("#d.jpg", os.fsdecode(names[1]), distance)
