"""Parquet, which needs pyarrow, the extra ``parquet``."""

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from featx.errors import BadValueError
from featx.writer import disk
from featx.writer.formats.base import Floats, Rows, row_name
from featx.writer.formats.npy import Npy

GROUP_BYTES = 64 << 20  # of values in a row group, enough to be read fast, and few enough to be read a piece at a time
GROUP_ROWS = 122_880  # at most: duckdb's own size, by which it deals a file to its threads


class Parquet(Npy):
    """Columns with the images' names, paths and classes; written from the rows as npy has them."""

    suffixes = ("parquet",)

    @staticmethod
    def check() -> None:
        """Raise BadValueError where pyarrow is not installed."""
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as err:
            raise BadValueError("parquet: pyarrow is not installed. Install it: pip install 'featx[parquet]'") from err

    def size(self, name: bytes, values: Floats) -> int:
        """Return the bytes of a row's values, which compression makes fewer, of its name and its path."""
        return len(self.encode([name], values)[0]) + 2 * len(name)

    def finish(self, rows: Path, fresh: str, paths: Iterable[str], about: bytes) -> dict[str, Path]:
        """Write the file from the rows."""
        path = Path(f"{fresh}.parquet")
        write(path, rows, self.layer, paths, self.identity["names"], about)
        return {"parquet": path}

    @staticmethod
    def read(path: Path, mmap: bool) -> Iterator[Rows]:
        """Yield the rows of each row group."""
        Parquet.check()
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


def write(path: Path, npy: Path, layer: str, paths: Iterable[str], names: str, about: bytes) -> None:
    r"""Write the rows of an ``.npy`` with the images that they belong to, one row group in memory at a time.

    Columns: ``image``, the row's name; ``path``, the image's path below the data folder; ``class``, its first folder,
    null without one; and the layer, a fixed-size list. Bytes of a name that are not UTF-8 become ``\xe9`` and so on.

    Args:
        path: The file to write.
        npy: ``(N, D)`` float32 or float16.
        layer: Name of the column of values.
        paths: Of the images, a row each.
        names: How a row is named: basename or relative.
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
            left = iter(paths)
            for start in range(0, len(rows), group):
                some = [os.fsencode(path).decode(errors="backslashreplace") for path in islice(left, group)]
                flat = pa.array(np.array(rows[start : start + group]).reshape(-1))
                columns = [
                    pa.array([row_name(path, names) for path in some]),
                    pa.array(some),
                    pa.array([path.partition("/")[0] if "/" in path else None for path in some], pa.string()),
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
