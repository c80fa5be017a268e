"""Parquet, which needs pyarrow, the extra ``parquet``."""

import os
from collections.abc import Iterable, Iterator
from io import RawIOBase
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
    r"""Written from the rows as npy has them.

    Columns: ``image``, the row's name; ``path``, the image's path below the data folder; ``class``, its first folder,
    null without one; and the layer, a fixed-size list. Bytes of a name that are not UTF-8 become ``\xe9`` and so on.
    """

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
        """Write the rows with their images, one row group in memory at a time."""
        import pyarrow as pa
        from pyarrow import parquet

        array: Any = np.load(rows, mmap_mode="r")  # (N, D)
        values = pa.list_(pa.field("element", pa.from_numpy_dtype(array.dtype), nullable=False), self.columns)
        fields = [pa.field("image", pa.string()), pa.field("path", pa.string()), pa.field("class", pa.string())]
        schema = pa.schema([*fields, pa.field(self.layer, values)], {"featx": about})
        group = max(1, min(GROUP_ROWS, GROUP_BYTES // max(1, array[:1].nbytes)))
        path, left = Path(f"{fresh}.parquet"), iter(paths)
        file = disk.open_to_write(path)
        split = (
            [] if array.dtype == np.float16 else [f"{self.layer}.list.element"]
        )  # which duckdb 2.0 cannot read of it
        options = {"compression": "zstd", "use_dictionary": ["class"], "write_statistics": ["image", "path", "class"],
                   "use_byte_stream_split": split}  # fmt: skip
        with (
            disk.told(path),
            parquet.ParquetWriter(pa.PythonFile(_Sink(file, path), "w"), schema, **options) as writer,
        ):
            for start in range(0, len(array), group):
                some = [os.fsencode(name).decode(errors="backslashreplace") for name in islice(left, group)]
                flat = pa.array(np.array(array[start : start + group]).reshape(-1))
                columns = [
                    pa.array([row_name(name, self.identity["names"]) for name in some]),
                    pa.array(some),
                    pa.array([name.partition("/")[0] if "/" in name else None for name in some], pa.string()),
                    pa.FixedSizeListArray.from_arrays(flat, type=values),
                ]
                writer.write_table(pa.table(columns, schema=schema), row_group_size=group)
        disk.sync(file, path)
        disk.close(file, path)
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


class _Sink(RawIOBase):
    """What pyarrow writes to: featx's one door to the disk."""

    def __init__(self, file: Any, path: Path) -> None:
        self.file = file
        self.path = path

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        disk.write(self.file, self.path, data)
        return len(data)

    def tell(self) -> int:
        return int(self.file.tell())
