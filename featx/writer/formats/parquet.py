"""Parquet; requires pyarrow, which the extra ``parquet`` installs."""

import os
from collections.abc import Iterable, Iterator
from io import RawIOBase
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from featx.errors import BadValueError
from featx.writer import disk
from featx.writer.formats.base import Floats, Rows, class_name, row_name
from featx.writer.formats.npy import Npy

GROUP_BYTES = 64 << 20  # of values per row group: large enough to read fast, small enough to fit in memory
GROUP_ROWS = 122_880  # maximum per row group: duckdb's own size, the unit that its threads read


class Parquet(Npy):
    r"""Made from the rows of an npy file.

    Columns: ``image``, the row's name; ``path``, the image's path below the data folder; ``class``, its first folder,
    or null; and the layer, a fixed-size list. Bytes in a name that are not UTF-8 are escaped, for example ``\xe9``.
    """

    suffixes = ("parquet",)

    @staticmethod
    def check() -> None:
        """Raise BadValueError if pyarrow is not installed."""
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as err:
            raise BadValueError("parquet: pyarrow is not installed. Install it: pip install 'featx[parquet]'") from err

    def size(self, name: bytes, values: Floats) -> int:
        """Return the size of a row's values before compression, its name and its path."""
        return len(self.encode([name], values)[0]) + 2 * len(name)

    def finish(self, rows: Path, fresh: str, paths: Iterable[str], metadata: bytes) -> dict[str, Path]:
        """Write the rows and their images, with one row group in memory at a time."""
        import pyarrow as pa
        from pyarrow import parquet

        array: Any = np.load(rows, mmap_mode="r")  # (N, D)
        values = pa.list_(pa.field("element", pa.from_numpy_dtype(array.dtype), nullable=False), self.columns)
        fields = [pa.field("image", pa.string()), pa.field("path", pa.string()), pa.field("class", pa.string())]
        schema = pa.schema([*fields, pa.field(self.layer, values)], {"featx": metadata})
        group = max(1, min(GROUP_ROWS, GROUP_BYTES // max(1, array[:1].nbytes)))
        path, remaining = Path(f"{fresh}.parquet"), iter(paths)
        file = disk.open_to_write(path)
        # duckdb 2.0 cannot read byte-stream-split float16.
        split = [] if array.dtype == np.float16 else [f"{self.layer}.list.element"]
        options = {"compression": "zstd", "use_dictionary": ["class"], "write_statistics": ["image", "path", "class"],
                   "use_byte_stream_split": split}  # fmt: skip
        sink = pa.PythonFile(_Sink(file, path), "w")
        with disk.reporting(path), parquet.ParquetWriter(sink, schema, **options) as writer:
            for start in range(0, len(array), group):
                names = [self.as_stored(os.fsencode(name)).decode() for name in islice(remaining, group)]
                flat = pa.array(np.array(array[start : start + group]).reshape(-1))
                columns = [
                    pa.array([row_name(name, self.identity["names"]) for name in names]),
                    pa.array(names),
                    pa.array([class_name(name) or None for name in names], pa.string()),
                    pa.FixedSizeListArray.from_arrays(flat, type=values),
                ]
                writer.write_table(pa.table(columns, schema=schema), row_group_size=group)
        disk.sync(file, path)
        disk.close(file, path)
        return {"parquet": path}

    @staticmethod
    def as_stored(name: bytes) -> bytes:
        """Return a name with all bytes that are not UTF-8 escaped, since Parquet takes UTF-8 only."""
        return name.decode(errors="backslashreplace").encode()

    @staticmethod
    def read(path: Path, mmap: bool) -> Iterator[Rows]:
        """Yield one row group at a time."""
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
            raise BadValueError(f"{path}: {err}. Expected Parquet written by featx.") from err


class _Sink(RawIOBase):
    """Lets pyarrow write through ``disk``, which reports failures."""

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
