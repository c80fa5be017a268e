"""Archives -> images: tar and zip files, read in place, each as the folder that it would be unpacked to."""

import errno
import os
import re
import shlex
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featx.data.selection import LeftOut, Selection
from featx.data.sources import tar
from featx.data.sources import zip as zipped
from featx.data.sources.base import LocalFile, Names, Ranged, Source
from featx.data.sources.directory import read_list
from featx.data.sources.members import FOLDER, Members
from featx.data.sources.saved import Saved
from featx.data.sources.unpacked import NOT_FILES, Places, Unpacked
from featx.errors import BadValueError, ImageError, UserError

SUFFIXES = (".tar", ".zip")
MOST_BYTES = (1 << 31) - (1 << 20)  # of an image; one system call reads hardly more
AHEAD = 1 << 26  # bytes that are fetched before they are read
AT_ONCE = 8  # archives in a store whose members are listed
OPEN_FILES = 64  # archives that a process has open at once
UNPACKERS = {  # by first bytes, of files that people call archives and that are packed as a whole
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4",
}  # fmt: skip


class Archive(NamedTuple):
    """An archive, as it was when its members were listed."""

    path: str
    size: int
    stamp: int
    is_zip: bool

    def is_same(self, now: Ranged) -> bool:
        """Whether nobody has changed it."""
        return (now.size, now.stamp) == (self.size, self.stamp)


class Archives(Source):
    """The images in one archive or several, in ImageFolder's order, as if they were unpacked.

    Several archives are read one after the other, each in its own order, and names begin with the archive's. Either
    the images in class folders are read, in all of them, or, if there are none, those in no folder.

    Args:
        where: What the user named.
        paths: The archives, in order.
        files: A file that lists the images, or their names, in the order of the rows; None: all.
        selection: The suffixes of images, and which images to leave out.
        column: Of the files of a sample, as WebDataset names them (``0001.left.jpg`` is the file ``left.jpg`` of the
            sample ``0001``), the one to read; None: all images.
        cache: A file that keeps the lists of tars' members for the next run; None: none does.
        opener: Opens an archive.

    Raises:
        BadValueError: A file is not an archive, or damaged, or there is no image in it.
        UserError: It cannot be read.
    """

    lost = "the archive is gone, or has changed"

    def __init__(
        self,
        where: str,
        paths: Sequence[str],
        files: str | Sequence[str] | None = None,
        selection: Selection | None = None,
        column: str | None = None,
        cache: Path | None = None,
        opener: Callable[[str], Ranged] = LocalFile,
    ) -> None:
        self.where = paths[0] if len(paths) == 1 else _above(paths)
        self._opener, self._pid, self._open = opener, 0, lru_cache(OPEN_FILES)(opener)
        self.archives, tables, saved = list[Archive](), list[Members](), Saved(cache)
        # of files on a disk one after the other: reading headers takes a core, not time to wait
        with ThreadPoolExecutor(1 if opener is LocalFile else AT_ONCE) as threads:
            for archive, members in threads.map(partial(_index, opener=opener, saved=saved), paths):
                self.archives.append(archive)
                tables.append(members)
        saved.save()
        del saved
        if (nothing := self._arrange(tables, files, selection or Selection(), column)) is not None:
            raise _nothing(where, nothing, selection or Selection(), column)

    def _arrange(
        self, tables: list[Members], files: str | Sequence[str] | None, selection: Selection, column: str | None
    ) -> Unpacked | None:
        """Make members of the archives the rows, or return what else is in them."""
        unpacked = Unpacked(selection, column)
        if files is None:
            for members in tables:
                unpacked.add(members)
            self._take(tables, list(unpacked.rows()))
            self.classes = unpacked.classes
            self.left_out, self.images_left_out = unpacked.left_out, unpacked.images_left_out
        else:
            self.classes = [""]
            self._take(tables, [np.fromiter((place for _, place in t.in_order()), np.uint32) for t in tables])
            self._pick(read_list(files) if isinstance(files, str) else list(files), selection)
        return None if len(self) else unpacked

    def read(self, places: Sequence[int]) -> Iterator[BinaryIO | Exception]:
        """Yield the bytes of some images, or why they cannot be read."""
        ready = 0
        for number, place in enumerate(places):
            if number == ready:
                ready += self._get_ready(places[number:])
            try:
                file: BinaryIO | Exception = BytesIO(self._read(place))
            except (OSError, ImageError, MemoryError) as err:
                file = err
            yield file

    def is_lost(self) -> bool:
        """Whether an archive is gone, or is not the one whose members were listed."""
        try:
            return not all(archive.is_same(self._opener(archive.path)) for archive in self.archives)
        except OSError:
            return True

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs, which opens files of its own."""
        return {name: value for name, value in vars(self).items() if name != "_open"} | {"_pid": 0}

    def _read(self, place: int) -> bytes:
        kind, size, stored = int(self._kinds[place]), int(self.sizes[place]), int(self._stored[place])
        if kind == FOLDER:
            raise ImageError("a folder, not a file")
        if kind < 0:
            raise ImageError(f"a {NOT_FILES[kind]} in an archive, which featx does not read")
        if size < 0:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path(place))
        if max(size, stored) > MOST_BYTES:
            raise ImageError(f"{size:,} bytes; from an archive featx reads at most {MOST_BYTES:,} per image")
        archive, offset = self.archives[self._which[place]], int(self._offsets[place])
        file = self._file(archive)
        if archive.is_zip:
            return zipped.read(file, offset, size, stored, int(self.stamps[place]), kind)
        return tar.read(file, offset, size)

    def _file(self, archive: Archive) -> Ranged:
        """Return an archive, open."""
        if self._pid != os.getpid():  # a fork has the files of its parent
            self._pid, self._open = os.getpid(), lru_cache(OPEN_FILES)(self._opener)
        file = self._open(archive.path)
        if not archive.is_same(file):
            raise ImageError("its archive has changed during the run")
        return file

    def _get_ready(self, places: Sequence[int]) -> int:
        """Announce what will be read, as much as may be in memory, and return of how many images."""
        wanted, total, number = defaultdict[int, list[tuple[int, int]]](list), 0, 0
        for place in places:
            begin, length = int(self._offsets[place]), int(self._stored[place])
            length += zipped.HEADER if self.archives[self._which[place]].is_zip else 0
            total += length
            if number and total > AHEAD:
                break
            number += 1
            if self._kinds[place] >= 0 and length > 0:
                wanted[self._which[place]].append((begin, begin + length))
        for which, ranges in wanted.items():
            with suppress(OSError, ImageError):  # reading says it
                self._file(self.archives[which]).ahead(ranges)
        return number

    def _take(self, tables: list[Members], rows: list[Places]) -> None:
        """Make these members of the archives the rows; the tables are emptied on the way, to save memory."""
        self.names = self._names(tables, rows)
        packed = any(members.stored is not members.sizes for members in tables)
        stored = _gather(tables, "stored", rows) if packed else None
        for members in tables:
            members.stored = members.sizes
        self.sizes, self.stamps = _gather(tables, "sizes", rows), _gather(tables, "stamps", rows).astype("<i8")
        self._offsets, self._kinds = _gather(tables, "offsets", rows), _gather(tables, "kinds", rows)
        self.sizes[self._kinds < 0] = self.stamps[self._kinds < 0] = -1
        self._stored = self.sizes if stored is None else stored
        self._which = np.repeat(np.arange(len(tables), dtype=np.int32), [len(places) for places in rows])

    def _names(self, tables: list[Members], rows: list[Places]) -> Names:
        blob, ends = bytearray(), array("q", [0])
        several = self.archives if len(tables) > 1 else []
        prefixes = [os.fsencode(os.path.relpath(archive.path, self.where or ".")) + b"/" for archive in several]
        for prefix, members, places in zip(prefixes or [b""], tables, rows, strict=True):
            for place in places:
                blob += prefix
                blob += members.blob[members.ends[place] : members.ends[place + 1]]
                ends.append(len(blob))
            members.blob, members.ends = bytearray(), array("q")
        return Names(bytes(blob), np.asarray(ends))

    def _pick(self, names: list[str], selection: Selection) -> None:
        """Make some of the rows, and what is not in the archives, the rows."""
        left = LeftOut(selection)
        chosen = [name for name in names if not left.excludes(name)]
        found = [self.names.find(name) for name in chosen]
        places = np.array([-1 if place is None else place for place in found], np.int64)
        blobs = [os.fsencode(name) for name in chosen]
        self.names = Names(b"".join(blobs), np.cumsum([0, *map(len, blobs)], dtype="<i8"))
        for column in ("sizes", "stamps", "_stored", "_offsets", "_kinds", "_which"):
            values = getattr(self, column)[places]
            values[places < 0] = 0 if column in ("_kinds", "_which") else -1
            setattr(self, column, values)
        self.left_out = left.describe()


def _gather(tables: list[Members], column: str, rows: list[Places]) -> NDArray[Any]:
    """Return a column of some members, which the tables then no longer have."""
    columns = [np.asarray(vars(table)[column])[places] for table, places in zip(tables, rows, strict=True)]
    for table in tables:
        setattr(table, column, vars(table)[column][:0])
    return np.concatenate(columns)


def _index(path: str, opener: Callable[[str], Ranged], saved: Saved) -> tuple[Archive, Members]:
    """Open an archive and list its members."""
    try:
        if os.path.isdir(path):
            raise BadValueError(
                f"--data.dir {path}: this is a folder. Expected one folder, or a pattern of tars or zips."
            )
        file = opener(path)
        head = file.read(tar.BLOCK, 0) if file.size else b""
        if tar.is_tar(head):
            members, is_zip = saved.get(path, file), False
            if members is None:
                members = tar.index(path, file)
                saved.add(path, file, members)
        elif head and zipped.is_zip(file):
            members, is_zip = zipped.index(path, file), True
        else:
            raise _no_archive(path, head)
    except UserError:
        raise
    except OSError as err:
        raise UserError(f"--data.dir {path}: {err.strerror}. Expected a tar or zip file.") from err
    return Archive(path, file.size, file.stamp, is_zip), members


def _above(paths: Sequence[str]) -> str:
    """Return the folder, or the part of the URL, that all are below."""
    folders = [path.rpartition("/")[0] for path in paths]
    return folders[0] if len(set(folders)) == 1 else os.path.commonpath(folders)


def _no_archive(path: str, head: bytes) -> BadValueError:
    where = f"--data.dir {path}"
    if tool := next((tool for magic, tool in UNPACKERS.items() if head.startswith(magic)), ""):
        unpacked = re.sub(r"(\.tar)?\.\w+$", "", path) + ".tar"
        return BadValueError(
            f"{where}: packed with {tool} as a whole, so that no image can be read alone. This makes a tar of it:\n"
            f"{tool} -dc {shlex.quote(path)} > {shlex.quote(unpacked)}"
        )
    if head.startswith(b"PK\3\4"):
        return BadValueError(f"{where}: cut off: the end of the zip is missing. Copy or download it again.")
    return BadValueError(
        f"{where}: this is a file, and not a tar, zip or Parquet file. Expected a folder of images, such as "
        f"{os.path.dirname(path) or '.'}, or one of these files."
    )


def _nothing(where: str, unpacked: Unpacked, selection: Selection, column: str | None) -> BadValueError:
    if unpacked.columns:
        others = ", ".join(name for name, _ in unpacked.columns.most_common(5))
        return BadValueError(f"--data.column {column}: no such images in {where}. Expected one of: {others}.")
    found = f" Left out: {unpacked.left_out}." if unpacked.left_out else ""
    return BadValueError(
        f"--data.dir {where}: no image in it.{found}\n"
        f"Expected an archive of images, or of one folder per class, with the suffixes {' '.join(selection.suffixes)}."
    )
