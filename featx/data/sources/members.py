"""What is in one archive: a table of its members, with no object per member, and their order as a folder's."""

import heapq
from array import array
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

FOLDER, LINK, SPARSE, SPECIAL = -1, -2, -3, -4  # kinds of members that hold no image's bytes
RUN = 1 << 14  # members that are sorted together, before the runs are merged


class Members:
    """The members of an archive, in its order, under the names that they would have in an empty folder.

    Each folder is a member, even if the archive has no entry for it.

    Args:
        is_packed: Whether members take another number of bytes in the archive than their size.

    Attributes:
        blob: All names, one after the other.
        ends: Where each ends, after a 0.
        kinds: How the bytes of a member are packed, from 0, as its archive has it; or ``FOLDER``, ``LINK`` ...
        offsets: Where a member is in the archive.
        sizes: The bytes of each.
        stored: How many bytes it takes there.
        stamps: A checksum of each, or of as much as is known.
        outside: How many members lead out of the folder, or have a name that no file can have.
        duplicates: How many were left out because a later one has the same name, as ``in_order`` found.
        duplicate: The first such name.
        after: How many bytes follow the archive's end.
    """

    def __init__(self, is_packed: bool = False) -> None:
        self.blob, self.ends = bytearray(), array("q", [0])
        self.kinds, self.stamps = array("h"), array("I")
        self.offsets, self.sizes = array("q"), array("q")
        self.stored = array("q") if is_packed else self.sizes
        self.outside = self.duplicates = self.after = 0
        self.duplicate = ""
        self._folders, self._last = set[bytes](), b""

    def __len__(self) -> int:
        return len(self.kinds)

    def add(self, path: bytes, kind: int, offset: int = 0, size: int = 0, stamp: int = 0, stored: int = 0) -> None:
        """Add a member, and the folders that it is in."""
        name = clean(path)
        if name is None:
            self.outside += 1
            return
        if kind == FOLDER:
            self._add_folder(name)
            return
        folder = name.rpartition(b"/")[0]
        if folder != self._last:
            self._add_folder(folder)
            self._last = folder
        self._put(name, kind, offset, size, stamp, stored)

    def name(self, place: int) -> str:
        """Return a member's name."""
        return self.blob[self.ends[place] : self.ends[place + 1]].decode("utf-8", "surrogateescape")

    def in_order(self) -> Iterator[tuple[str, int]]:
        """Yield the names and places of all members, of those with one name the last, in ImageFolder's order.

        What is in no folder comes first; then follow the folders at the top, in each the folders by their whole paths,
        in each of these its members.
        """
        self.duplicates, self.duplicate = 0, ""
        name, last = "", -1
        for place in self._sorted():
            name, before = self.name(place), name
            if last >= 0 and name != before:
                yield before, last
            elif last >= 0:
                self.duplicates += 1
                self.duplicate = self.duplicate or name
            last = int(place)
        if last >= 0:
            yield name, last

    def _sorted(self) -> NDArray[np.uint32]:
        runs = []
        for begin in range(0, len(self), RUN):  # a million keys at once would take 100 MB
            places = range(begin, min(begin + RUN, len(self)))
            runs.append(array("I", sorted(places, key=self._key)))
        return np.fromiter(heapq.merge(*runs, key=self._key), np.uint32, len(self))

    def _key(self, place: int) -> str:
        folder, _, name = self.name(place).rpartition("/")
        top, _, below = folder.partition("/")
        return f"{top}\0{below}\0{name}"

    def _add_folder(self, name: bytes) -> None:
        while name and name not in self._folders:
            self._folders.add(name)
            self._put(name, FOLDER, 0, 0, 0, 0)
            name = name.rpartition(b"/")[0]

    def _put(self, name: bytes, kind: int, offset: int, size: int, stamp: int, stored: int) -> None:
        self.blob += name
        self.ends.append(len(self.blob))
        self.kinds.append(kind)
        self.offsets.append(offset)
        self.sizes.append(size)
        self.stamps.append(stamp)
        if self.stored is not self.sizes:
            self.stored.append(stored)


def clean(path: bytes) -> bytes | None:
    """Return a member's path as ``a/b.jpg``, or None if it leads out of the folder, or no file can have it.

    The ``/`` of absolute paths is removed, as tar and unzip do.

    Example:
        >>> clean(b"./a//b.jpg")
        b'a/b.jpg'
    """
    path = path.removeprefix(b"./")
    if b"/." in path or b"//" in path or path[:1] in (b"", b".", b"/") or path[-1:] == b"/":
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
        if b".." in parts:
            return None
        path = b"/".join(parts)
    return None if not path or b"\0" in path else path
