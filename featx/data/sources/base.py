"""What every source of images has: names, sizes and stamps of all images, and the bytes of some."""

import hashlib
import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, BinaryIO, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from featx.errors import ImageError


class Names(Sequence[str]):
    """Paths of images in one bytes object: a million of them take little memory, and no worker process copies it.

    A path that is not UTF-8 has surrogates, as file names in Python do.

    Args:
        blob: All paths, one after the other.
        ends: Where each ends, ``(N + 1,) int64``, after a 0.
    """

    def __init__(self, blob: bytes, ends: NDArray[np.int64]) -> None:
        self.blob = blob
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # its IndexError, and what -1 means
        return self.blob[self.ends[index] : self.ends[index + 1]].decode("utf-8", "surrogateescape")

    def find(self, name: str) -> int | None:
        """Return the place of a name, or None if it is not among them."""
        order, hashes = self._by_hash
        wanted = hash(name)
        for place in order[np.searchsorted(hashes, wanted) : np.searchsorted(hashes, wanted, "right")]:
            if self[place] == name:
                return int(place)
        return None

    @cached_property
    def _by_hash(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The places in the order of the names' hashes, and these: 16 bytes per name."""
        hashes = np.fromiter(map(hash, self), np.int64, len(self))
        order = np.argsort(hashes)
        return order, hashes[order]


class Ranged(Protocol):
    """A file of many images, open, of which several threads read some bytes each.

    Attributes:
        size: Its bytes.
        stamp: What changes with its content: a time in ns, or a checksum.
    """

    @property
    def size(self) -> int: ...  # noqa: D102, in the class's docstring
    @property
    def stamp(self) -> int: ...  # noqa: D102

    def read(self, length: int, at: int) -> bytes:
        """Return bytes from a place on, fewer at the end."""

    def ahead(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Get ready what will be read soon: the begin and the end of each range, in their order."""


class LocalFile:
    """A file on a disk, as ``Ranged``; closed when nothing uses it any more.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    @property
    def size(self) -> int:
        """Return its bytes now, 0 if it is a pipe or a device."""
        found = os.fstat(self._fd)
        return found.st_size if stat.S_ISREG(found.st_mode) else 0

    @property
    def stamp(self) -> int:
        """Return the time of its last change, in ns."""
        return os.fstat(self._fd).st_mtime_ns

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # as Python ends, os may be gone
        if hasattr(self, "_fd"):
            close(self._fd)

    def read(self, length: int, at: int) -> bytes:
        """Return bytes from a place on, fewer at the end."""
        return os.pread(self._fd, length, at)

    def ahead(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Do nothing: the system reads ahead."""


class AsFile(io.RawIOBase):
    """A ``Ranged`` as a file that can be sought.

    Args:
        file: The file.
    """

    def __init__(self, file: Ranged) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        """Whether it can be read: yes."""
        return True

    def seekable(self) -> bool:
        """Whether it can be sought: yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, and return it."""
        self._at = offset + (0, self._at, self._file.size)[whence]
        return self._at

    def tell(self) -> int:
        """Return the place."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, and return how many bytes there were."""
        data = self._file.read(len(buffer), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class Source(ABC):
    """Images in the order of the rows, wherever they are.

    It is made in the main process and used in all of its workers, to which it is copied by a fork: whatever must not be
    shared, such as an open file, is opened at the first ``read`` in each process.

    Attributes:
        where: The folder, archive, table or URL, as it was given.
        names: Paths of the images below it, with ``/``, in the order of the rows.
        sizes: Their sizes in bytes, ``(N,) int64``; -1 where they are not known, or there is no file.
        stamps: Besides the size, what changes with an image's content, ``(N,) int64``: the time of a file's last change
            in ns, or a checksum; -1 where there is no file.
        classes: Names of the class folders, sorted, or ``[""]``.
        left_out: One line that counts what was left out, or ``""``.
        images_left_out: How many images that is.
        lost: What is reported if ``is_lost`` during a run.
        column: The column of a table that has the images, or ``""``.
    """

    where: str
    names: Names
    sizes: NDArray[np.int64]
    stamps: NDArray[np.int64]
    classes: list[str]
    left_out: str = ""
    images_left_out: int = 0
    lost: str = "the folder is gone, or empty"
    column: str = ""

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, places: Sequence[int]) -> Iterator[BinaryIO | Exception]:
        """Yield the files of some images, open for reading and seeking, each when it is asked for.

        Args:
            places: Their places in the order of the rows; those of a batch follow each other.

        Yields:
            For each image its file, which the caller closes, or the exception that says why there is none: then the
            image is at fault. What is raised ends the run.
        """

    def some(self, places: NDArray[np.int64]) -> "Source":
        """Return some of the images, by their places, in the same order."""
        return Some(self, places)

    def path(self, place: int) -> str:
        """Return what an error message calls an image."""
        return os.path.join(self.where, self.names[place])

    def is_lost(self) -> bool:
        """Whether all of it is gone: it was removed, or its disk is."""
        return not os.path.exists(self.where)

    def digest(self) -> str:
        """Return the SHA-256 of all names, sizes and stamps, in order."""
        digest = hashlib.sha256(self.names.blob)
        for numbers in (self.names.ends, self.sizes, self.stamps):
            digest.update(numbers.data)
        return digest.hexdigest()

    def digest_of_names(self) -> str:
        """Return the SHA-256 of all names, in order."""
        digest = hashlib.sha256(self.names.blob)
        digest.update(self.names.ends.data)
        return digest.hexdigest()


class Some(Source):
    """Some images of a source, in its order.

    Args:
        source: The source.
        places: Their places in its order.
    """

    def __init__(self, source: Source, places: NDArray[np.int64]) -> None:
        self._source, self._places = source, places
        encoded = [source.names[place].encode("utf-8", "surrogateescape") for place in places]
        self.names = Names(b"".join(encoded), np.cumsum([0, *map(len, encoded)], dtype="<i8"))
        self.sizes, self.stamps = source.sizes[places], source.stamps[places]
        self.where, self.classes, self.lost, self.column = source.where, source.classes, source.lost, source.column

    def read(self, places: Sequence[int]) -> Iterator[BinaryIO | Exception]:
        """Yield the files of some of them, as the source does."""
        return self._source.read([int(self._places[place]) for place in places])

    def path(self, place: int) -> str:
        """Return what the source calls an image."""
        return self._source.path(int(self._places[place]))

    def is_lost(self) -> bool:
        """Whether all of the source is gone."""
        return self._source.is_lost()


def open_file(path: str) -> BinaryIO:
    """Open a file to read an image.

    Raises:
        ImageError: It is not a file.
        OSError: It cannot be opened.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):  # a pipe would be waited for, and /dev/zero has no end
        raise ImageError("a folder, not a file" if stat.S_ISDIR(mode) else "a pipe or a device, not a file")
    return open(path, "rb")
