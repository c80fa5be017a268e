"""A table -> images: a column of Parquet files, or of a Hugging Face dataset on disk, in the order of the rows."""

import hashlib
import io
import json
import os
import re
import threading
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from featx.data.selection import LeftOut, Selection
from featx.data.sources.base import AsFile, LocalFile, Names, Ranged, Source
from featx.data.sources.columns import (
    Column,
    as_texts,
    clean,
    features_of,
    image_column,
    label_column,
    path_columns,
    values_of,
)
from featx.errors import BadValueError, BrokenSourceError, ImageError, StoreError, UserError, either, first_line, log

SUFFIXES = (".parquet", ".parq", ".pq", ".arrow")
BESIDE = (".md", ".json", ".txt", ".crc")  # what is in a folder of tables, and is none
COMPARED = 1 << 30  # bytes of a table whose images are compared one by one, which takes seconds at the start of a run
AT_ONCE = 16  # rows that are read together: each is copied out of the file


class Table(Source):
    """The images in a column of a table, which is one file or several.

    The column has the bytes of image files: it is binary, or Hugging Face's struct of ``bytes`` and ``path``. An image
    is named ``class/path``: its class, if a column has labels, and its path, which is that in the struct, else in the
    first column of ``NAMES`` that there is, else the number of its row. Where two have the same name, the number of the
    row comes before each path, as in ``cats/000007/felix.jpg``.

    What identifies the content of an image is its size and its CRC-32. In a table of more than 1 GB, or in a store, it
    is the size and the time of its file, and its row there: its bytes are read once, by the run.

    Args:
        where: What the user calls the table.
        files: Its files, in the order of the rows.
        selection: Which images to leave out.
        column: The column; None: the only one that can be images.
        opener: Opens a file.

    Raises:
        BadValueError: A file is not a table, or there is no such column of images.
    """

    def __init__(
        self,
        where: str,
        files: Sequence[str],
        selection: Selection | None = None,
        column: str | None = None,
        opener: Callable[[str], Ranged] = LocalFile,
    ) -> None:
        self.where, self._files, self._local, self._opener = where, list(files), threading.local(), opener
        selection = selection or Selection()
        self._starts, self._firsts, self._stamps = array("q", [0]), list[int](), list[int]()
        stamps = []
        for path in files:
            with _reporting(where, path):
                file = self._open(path)
                if not self._firsts:
                    schema = file.schema
                    self.column = image_column(schema, where, column)
            if not file.schema.equals(schema):
                raise BadValueError(f"--data.dir {where}: the columns of {path} differ from those of {files[0]}.")
            self._firsts.append(len(self._starts) - 1)
            for rows in file.rows:
                self._starts.append(self._starts[-1] + rows)
            self._stamps.append(self._stamp(path))
            stamps.append(self._stamps[-1] + np.arange(sum(file.rows)))  # a name may be the number of another row
        if (parts := re.search(r"-of-(\d+)\.\w+$", files[0])) and os.path.isdir(where) and int(parts[1]) > len(files):
            log.warning("%s: ONLY %s OF %s FILES OF THE TABLE ARE THERE", where, len(files), int(parts[1]))
        self._path = next(filter(self._has_value, path_columns(schema, self.column)), None)
        self._label = label_column(schema)
        self._labels = features_of(schema).get(self._label[0], {}).get("names") if self._label else None
        names, kept, self.classes, unique = _pack(self._named(numbered=False), selection)
        if not unique:
            names, kept, self.classes, _ = _pack(self._named(numbered=True), selection)
        left = LeftOut(selection)
        left.excluded = len(kept) - len(names)
        self.left_out = left.describe(0, set())
        self._rows = np.flatnonzero(kept)
        self.names, self.stamps = names, np.concatenate(stamps)[self._rows].astype("<i8")
        self.sizes = np.full(len(names), -1, "<i8")
        if not names:
            raise BadValueError(
                f"--data.dir {where}: no row in it{f'. Left out: {self.left_out}' if left.excluded else ''}."
            )
        if opener is LocalFile and sum(map(os.path.getsize, files)) <= COMPARED:
            self._sum_up()

    def _sum_up(self) -> None:
        """Set the sizes and checksums of the images, so that one can change, or be repaired, without the others."""
        cursor = _Cursor(self)
        for place, row in enumerate(self._rows.tolist()):
            try:
                value = cursor.value(row)
            except Exception as err:
                raise BrokenSourceError(f"{self._broken(row, err)}\n{BrokenSourceError.advice}") from err
            found = (len(value), zlib.crc32(value)) if isinstance(value, bytes) else (-1, -1)
            self.sizes[place], self.stamps[place] = found

    def _broken(self, row: int, err: Exception) -> BrokenSourceError:
        """Return one of pyarrow's many errors: a part of the file is lost, and its other images with it."""
        return BrokenSourceError(f"{self._files[self.place(row)[0]]}, row {row}: cannot be read: {first_line(err)}")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is open: a process opens the table by itself."""
        return {**vars(self), "_local": None}

    def read(self, places: Sequence[int]) -> Iterator[BinaryIO | Exception]:
        """Yield the images of some rows, read one after the other."""
        for place in places:
            row = int(self._rows[place])
            try:
                value = self._cursor().value(row)
            except StoreError:
                raise
            except Exception as err:
                yield self._broken(row, err)
                continue
            yield ImageError(value) if isinstance(value, str) else io.BytesIO(value)

    def is_lost(self) -> bool:
        """Whether all files of the table are gone."""
        for path in self._files:
            with suppress(OSError):
                self._opener(path)
                return False
        return True

    def _cursor(self) -> "_Cursor":
        """Return this thread's cursor: several may read at once, and a fork has none of what its parent has open."""
        if self._local is None:
            self._local = threading.local()
        cursor: _Cursor | None = getattr(self._local, "cursor", None)
        if cursor is None or cursor.process != os.getpid():
            cursor = self._local.cursor = _Cursor(self)
        return cursor

    def place(self, row: int) -> tuple[int, int, int, int]:
        """Return where a row is: the number of its file, and its group in that, with the first row and the end."""
        group = bisect_right(self._starts, row) - 1
        number = bisect_right(self._firsts, group) - 1
        return number, group - self._firsts[number], self._starts[group], self._starts[group + 1]

    def open(self, number: int) -> "_Parquet | _Arrow":
        """Open a file, which must be the one that was listed."""
        if self._stamp(self._files[number]) != self._stamps[number]:
            raise OSError("it was changed during the run")
        return self._open(self._files[number])

    def _open(self, path: str) -> "_Parquet | _Arrow":
        if self._opener is not LocalFile:
            return _Parquet(AsFile(self._opener(path)))
        return (_Arrow if path.lower().endswith(".arrow") else _Parquet)(path)

    def _stamp(self, path: str) -> int:
        """Return a number that changes with a file's size and time."""
        found = self._opener(path)
        return int(hashlib.sha256(f"{found.size} {found.stamp}".encode()).hexdigest()[:15], 16)

    def _texts(self, *columns: Column) -> Iterator[list[list[str | None]]]:
        """Yield the values of small columns as text, some rows at a time."""
        for path in self._files:
            with _reporting(self.where, path):
                file = self._open(path)
                for batch in file.read(range(len(file.rows)), columns, 1 << 16):
                    yield [as_texts(values_of(batch, column)) for column in columns] or [[None] * len(batch)]

    def _has_value(self, column: Column) -> bool:
        return any(text for (texts,) in self._texts(column) for text in texts)

    def _named(self, numbered: bool) -> Iterator[tuple[str, str]]:
        """Yield the name and the class of each row; ``numbered``: with its number in each name."""
        columns, row = [column for column in (self._path, self._label) if column], 0
        for texts in self._texts(*columns):
            paths = texts[0] if self._path else [None] * len(texts[0])
            labels = texts[-1] if self._label else [None] * len(paths)
            for path, label in zip(paths, labels, strict=True):
                name, kind = clean(path), self._class(label)
                name = f"{row:06}/{name}".rstrip("/") if numbered or not name else name
                yield f"{kind}/{name}" if kind and not name.startswith(f"{kind}/") else name, kind
                row += 1

    def _class(self, label: str | None) -> str:
        """Return a label as the name of a folder, "" if there is none."""
        if label is None or self._labels is None:
            return clean(label).replace("/", "_")
        known = 0 <= int(label) < len(self._labels)  # -1: not labelled
        return clean(self._labels[int(label)]).replace("/", "_") if known else ""


class _Cursor:
    """Reads the rows of a table one after the other; for one before the last, it begins again with its group."""

    def __init__(self, table: Table) -> None:
        self.process = os.getpid()
        self._table = table
        self._number = -1  # of the open file
        self._begin = self._end = self._stop = 0  # of the rows in memory, and of the group

    def value(self, row: int) -> bytes | str:
        """Return an image, or why there is none."""
        if not self._begin <= row < self._stop:
            number, group, begin, stop = self._table.place(row)
            if number != self._number:
                self._file, self._number = self._table.open(number), number
            self._batches = self._file.read([group], [(self._table.column,)], AT_ONCE)
            self._begin, self._end, self._stop = begin, begin, stop
        while row >= self._end:
            stop, self._stop = self._stop, 0  # after an error, begin again
            batch = next(self._batches, None)
            if batch is None:
                raise OSError("it has fewer rows than it says")
            self._values = batch.column(self._table.column)
            self._begin, self._end, self._stop = self._end, self._end + len(batch), stop
        scalar = self._values[row - self._begin]
        inside = hasattr(scalar, "keys")  # a struct's; asking for its bytes alone is three times as fast
        value = (scalar["bytes"] if inside and scalar.is_valid else scalar).as_py()
        if value is not None:
            return bytes(value)
        path = inside and (scalar.as_py() or {}).get("path")
        return f"not in the table, which has only its path, {path}" if path else "no image: the value is null"


class _Parquet:
    """A Parquet file.

    Attributes:
        schema: Its columns.
        rows: Of each of its groups.
    """

    def __init__(self, path: Any) -> None:
        from pyarrow import parquet

        # Only so are pages in memory, not whole groups of rows: https://github.com/apache/arrow/issues/39820
        self._file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        self.schema, about = self._file.schema_arrow, self._file.metadata
        self.rows = [about.row_group(group).num_rows for group in range(about.num_row_groups)]

    def read(self, groups: Sequence[int], columns: Sequence[Column], at_once: int) -> Iterator[Any]:
        """Yield the rows of some groups as record batches of ``at_once`` rows at most."""
        names = [".".join(column) for column in columns]
        if groups:  # some versions of pyarrow fail without: https://github.com/apache/arrow/issues/45343
            # Its threads would not survive the fork of a worker: https://github.com/Lightning-AI/litData/pull/832
            yield from self._file.iter_batches(at_once, list(groups), names, use_threads=False)


class _Arrow:
    """A stream of record batches, as Hugging Face's ``save_to_disk`` writes it; has what ``_Parquet`` has."""

    def __init__(self, path: str) -> None:
        import pyarrow as pa

        self._path, self._starts, self.rows = path, list[int](), list[int]()
        with pa.memory_map(path) as file, pa.ipc.open_stream(file) as stream:
            self.schema = stream.schema
            if any(pa.types.is_dictionary(field.type) for field in self.schema):
                raise OSError("it has a dictionary, which no dataset of Hugging Face has")
            while True:
                start = file.tell()
                try:
                    self.rows.append(len(stream.read_next_batch()))
                except StopIteration:
                    break
                self._starts.append(start)

    def read(self, groups: Sequence[int], columns: Sequence[Column], at_once: int) -> Iterator[Any]:
        """Yield groups as record batches whose values stay in the file until they are used."""
        import pyarrow as pa

        for group in groups:
            with pa.memory_map(self._path) as file:  # one per group: what was used is then no longer in memory
                file.seek(self._starts[group])
                batch = pa.ipc.read_record_batch(pa.ipc.read_message(file), self.schema)
                batch.validate(full=True)  # offsets that lead out of the file would end the process
                yield batch


@contextmanager
def _reporting(where: str, path: str) -> Iterator[None]:
    """Raise BadValueError for a table that cannot be read, or where pyarrow is not installed."""
    try:
        from pyarrow import ArrowException
    except ImportError as err:
        raise BadValueError(
            f"--data.dir {where}: a table needs pyarrow, which is not installed: pip install 'featx[parquet]'"
        ) from err
    try:
        yield
    except UserError:
        raise
    except (ArrowException, OSError, UnicodeError) as err:
        kind = "a Hugging Face dataset on disk" if path.endswith(".arrow") else "Parquet"
        what = path if path == where else f"{where}: {path}"
        raise BadValueError(f"--data.dir {what}: {first_line(err).rstrip('.')}. Expected {kind}.") from err


def files_of(where: str) -> list[str]:
    """Return the files of the table that a path is, in the order of their names, or [] if it is none.

    A folder is a table if it holds nothing but Parquet files, or if ``save_to_disk`` wrote it.

    Raises:
        BadValueError: It has several tables, such as a training and a test split.
    """
    if not os.path.isdir(where):
        return [where] if where.lower().endswith(SUFFIXES) and os.path.isfile(where) else []
    if os.path.isfile(state := os.path.join(where, "state.json")):
        with suppress(OSError, ValueError, KeyError, TypeError), open(state, "rb") as file:
            return [os.path.join(where, one["filename"]) for one in json.load(file)["_data_files"]]
    found, names, data = list[str](), list[str](), ""
    if os.path.isfile(splits := os.path.join(where, "dataset_dict.json")):
        with suppress(OSError, ValueError, KeyError, TypeError), open(splits, "rb") as file:
            names = [os.path.join(where, name) for name in json.load(file)["splits"]]
    with suppress(OSError), os.scandir(where) as entries:
        for entry in () if names else entries:
            name = entry.name.lower()
            if name.startswith((".", "_")) or name.endswith(BESIDE):  # _SUCCESS, README.md
                continue
            if name == "data" and entry.is_dir():  # in a repository of Hugging Face's
                data = entry.path
            elif name.endswith(SUFFIXES[:-1]) and entry.is_file():
                found.append(entry.path)
            else:
                return []
    if data and not found:
        return files_of(data)
    found.sort()
    numbered = re.compile(r"-\d+-of-\d+(?=\.\w+$)")  # train-00000-of-00003.parquet
    if any(map(numbered.search, found)):
        names = sorted({numbered.sub("-*", path) for path in found})
    if len(names) > 1:
        raise BadValueError(f"--data.dir {where}: holds several tables. Expected one, such as {either(names)}.")
    return [] if data else found


def _pack(rows: Iterator[tuple[str, str]], selection: Selection) -> tuple[Names, NDArray[np.bool_], list[str], bool]:
    """Return the names of the rows that are kept, which they are, their classes, and whether all names differ."""
    blob, ends, kept, digests, classes = bytearray(), array("q", [0]), array("b"), array("Q"), {""}
    for name, kind in rows:
        encoded = name.encode("utf-8", "surrogateescape")
        digests.frombytes(hashlib.blake2b(encoded, digest_size=8).digest())
        kept.append(not selection.excludes(name))
        if kept[-1]:
            classes.add(kind)
            blob += encoded
            ends.append(len(blob))
    names = Names(bytes(blob), np.array(ends, "<i8"))
    ordered = np.sort(np.asarray(digests))  # np.unique would import numpy.ma
    unique = not (ordered[1:] == ordered[:-1]).any()
    return names, np.array(kept, bool), sorted(classes - {""}) or [""], bool(unique)
