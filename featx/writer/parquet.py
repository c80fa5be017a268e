"""Rows -> Parquet, and back: what needs pyarrow, the extra ``parquet``."""

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from featx.errors import BadValueError
from featx.writer import disk
from featx.writer.formats import Floats

GROUP_BYTES = 64 << 20  # of values in a row group, enough to be read fast, and few enough to be read a piece at a time
GROUP_ROWS = 122_880  # at most: duckdb's own size, by which it deals a file to its threads


def check() -> None:
    """Raise BadValueError where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as err:
        raise BadValueError("parquet: pyarrow is not installed. Install it: pip install 'featx[parquet]'") from err


def write(path: Path, npy: Path, layer: str, paths: Iterable[str], relative: bool, about: bytes) -> None:
    r"""Write the rows of an ``.npy`` with the images that they belong to, one row group in memory at a time.

    Columns: ``image``, the row's name; ``path``, the image's path below the data folder; ``class``, its first folder,
    null without one; and the layer, a fixed-size list. Bytes of a name that are not UTF-8 become ``\xe9`` and so on.

    Args:
        path: The file to write.
        npy: ``(N, D)`` float32 or float16.
        layer: Name of the column of values.
        paths: Of the images, a row each.
        relative: Whether a row is named by its path, or by the file's name.
        about: What decided the values, as JSON, for the file's metadata.
    """
    import pyarrow as pa
    from pyarrow import parquet

    rows: Any = np.load(npy, mmap_mode="r")
    values = pa.list_(pa.field("element", pa.from_numpy_dtype(rows.dtype), nullable=False), rows.shape[1])
    fields = [pa.field("image", pa.string()), pa.field("path", pa.string()), pa.field("class", pa.string())]
    schema = pa.schema([*fields, pa.field(layer, values)], {"featx": about})
    group = max(1, min(GROUP_ROWS, GROUP_BYTES // max(1, rows[:1].nbytes)))
    file = disk.open_to_write(path)
    split = [f"{layer}.list.element"] if rows.dtype == np.float32 else []  # which duckdb 2.0 cannot read of float16
    with disk.told(path):
        options = {"compression": "zstd", "use_dictionary": ["class"], "write_statistics": ["image", "path", "class"],
                   "use_byte_stream_split": split}  # fmt: skip
        with parquet.ParquetWriter(pa.PythonFile(_Sink(file, path), "w"), schema, **options) as writer:
            names = iter(paths)
            for start in range(0, len(rows), group):
                some = [os.fsencode(name).decode(errors="backslashreplace") for name in islice(names, group)]
                flat = pa.array(np.array(rows[start : start + group]).reshape(-1))
                columns = [
                    pa.array(some if relative else [os.path.basename(name) for name in some]),
                    pa.array(some),
                    pa.array([name.partition("/")[0] if "/" in name else None for name in some], pa.string()),
                    pa.FixedSizeListArray.from_arrays(flat, type=values),
                ]
                writer.write_table(pa.table(columns, schema=schema), row_group_size=group)
    disk.sync(file, path)
    disk.close(file, path)


class _Sink:
    """What pyarrow writes to: featx's one door to the disk."""

    closed = False

    def __init__(self, file: Any, path: Path) -> None:
        self.file = file
        self.path = path

    def write(self, data: Any) -> int:
        disk.write(self.file, self.path, data)
        return len(data)

    def tell(self) -> int:
        return int(self.file.tell())

    def flush(self) -> None: ...

    def close(self) -> None: ...


def read(path: Path) -> Iterator[tuple[list[str], Floats]]:
    """Yield the names and values, ``(R, D)``, of each row group.

    Raises:
        BadValueError: pyarrow is not installed, or it is no such file.
    """
    check()
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            layer = file.schema_arrow.names[-1]
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["image", layer])
                rows = table.column(layer).combine_chunks()
                yield table.column("image").to_pylist(), rows.flatten().to_numpy().reshape(len(rows), -1)
    except (ArrowException, KeyError) as err:
        raise BadValueError(f"{path}: {err}. Expected Parquet as featx writes it.") from err
