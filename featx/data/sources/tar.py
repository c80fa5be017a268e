"""A tar -> its members, by one reading of its headers: https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html."""

import os
import shlex
from typing import NoReturn
from zlib import crc32

from featx.data.sources.base import Ranged
from featx.data.sources.members import FOLDER, LINK, SPARSE, SPECIAL, Members
from featx.errors import BadValueError, ImageError

BLOCK = 512
ZEROS = bytes(BLOCK)
WINDOW = 1 << 14  # bytes that are read at a time: the end of a member, the next header, and the begin of its member
SAMPLE = 1 << 12  # bytes at the begin and at the end of a member that its stamp depends on
LONGEST = 1 << 20  # of an extended header, which has a name
STORED = 0  # the one kind of member that holds an image
KINDS = {b"1": LINK, b"2": LINK, b"3": SPECIAL, b"4": SPECIAL, b"5": FOLDER, b"6": SPECIAL, b"S": SPARSE,
         b"D": FOLDER, b"M": SPECIAL, b"N": SPECIAL, b"V": SPECIAL}  # fmt: skip
WITHOUT_DATA = frozenset(b"123456")  # whatever size their headers have


class _Window:
    """A file, read some bytes at a time."""

    def __init__(self, file: Ranged) -> None:
        self._file, self._begin, self._bytes = file, 0, b""

    def read(self, at: int, length: int) -> bytes:
        """Return bytes of the file, fewer at its end."""
        begin = at - self._begin
        if begin < 0 or begin + length > len(self._bytes):
            self._bytes, self._begin, begin = self._file.read(max(length, WINDOW), at), at, 0
        return self._bytes[begin : begin + length]


def is_tar(head: bytes) -> bool:
    """Whether a file with this first block is a tar; an empty one is, too."""
    return len(head) == BLOCK and (head == ZEROS or _has_checksum(head))


def index(path: str, file: Ranged) -> Members:
    """Return the members of a tar: ustar, GNU's, and pax, with names of any length and sizes above 8 GB.

    Raises:
        BadValueError: It is cut off, or damaged.
    """
    return _Reading(path, file).members


class _Reading:
    """Reads all headers.

    Args:
        path: The tar, for messages.
        file: The tar, open.
    """

    def __init__(self, path: str, file: Ranged) -> None:
        self._path, self._size, self._window = path, file.size, _Window(file)
        self._last = b""  # the name of the last whole member
        self.members = Members()
        at: int | None = 0
        while at is not None:
            at = self._member(at)

    def _member(self, at: int) -> int | None:
        """Read a member with all of its headers, and return where the next one is, or None at the end."""
        long_name, pax, begin = b"", dict[bytes, bytes](), at
        while True:
            block = self._window.read(at, BLOCK)
            if block == ZEROS:
                if at > begin:
                    self._refuse(at)
                self._look_after_the_end(at)
                return None
            if len(block) < BLOCK or not _has_checksum(block):
                self._refuse(at, is_between=at == begin)
            kind, size, data = block[156:157], self._number(block[124:136], at), at + BLOCK
            if kind not in b"LKxXg":
                break
            content = self._extension(at, size)
            if kind == b"L":
                long_name = content.partition(b"\0")[0]
            elif kind in b"xX":
                pax |= self._records(content, at)
            at = data + -(-size // BLOCK) * BLOCK
        name = pax.get(b"path") or long_name or _name(block)
        if b"size" in pax:
            size = self._number(pax[b"size"], at, 10)
        if kind == b"S":  # with more headers if its map is long
            more = block[482]
            while more:
                more = (self._window.read(data, BLOCK) or self._refuse(at))[504]
                data += BLOCK
        if block[156] in WITHOUT_DATA:
            size = 0
        if data + size > self._size:
            self._refuse(at)
        code = KINDS.get(kind, STORED)
        if kind in b"\0" and name.endswith(b"/"):  # before 1988
            code = FOLDER
        if any(key.startswith(b"GNU.sparse.") for key in pax):
            code = SPARSE
            name = pax.get(b"GNU.sparse.name", name)
        self.members.add(name, code, data, size, self._stamp(block, data, size) if code == STORED else 0)
        self._last = name
        return data + -(-size // BLOCK) * BLOCK

    def _extension(self, at: int, size: int) -> bytes:
        """Return what an extended header holds."""
        if at + BLOCK + size > self._size or size > LONGEST:
            self._refuse(at)
        return self._window.read(at + BLOCK, size)

    def _records(self, content: bytes, at: int) -> dict[bytes, bytes]:
        """Return the ``LENGTH KEY=VALUE`` lines of a pax header."""
        found, begin = dict[bytes, bytes](), 0
        while begin < len(content) and content[begin]:
            space = content.find(b" ", begin, begin + 20)
            length = self._number(content[begin : max(space, begin)] or b"-", at, 10)
            key, equals, value = content[space + 1 : begin + length - 1].partition(b"=")
            if not equals or content[begin + length - 1 : begin + length] != b"\n":
                self._refuse(at)
            found[key] = value
            begin += length
        return found

    def _number(self, field: bytes, at: int, base: int = 8) -> int:
        try:
            number = _number(field, base)
        except ValueError:
            self._refuse(at)
        return number if number >= 0 else self._refuse(at)

    def _stamp(self, block: bytes, data: int, size: int) -> int:
        """Return a checksum of the time in a member's header and of the begin and the end of its bytes.

        That of all bytes would take a reading of the whole archive, and the archive's own time would make one repaired
        member a change of all.
        """
        try:
            time = _number(block[136:148])
        except ValueError:
            time = 0
        stamp = crc32(b"%d" % time)
        if size:
            stamp = crc32(self._window.read(data, min(size, SAMPLE)), stamp)
            rest = min(SAMPLE, max(0, size - SAMPLE))
            stamp = crc32(self._window.read(data + size - rest, rest), stamp)
        return stamp

    def _look_after_the_end(self, at: int) -> None:
        """Count the bytes after the blocks of zeros that end a tar: another tar, if several were joined."""
        while chunk := self._window.read(at, WINDOW):
            if stripped := chunk.lstrip(b"\0"):
                self.members.after = self._size - at - len(chunk) + len(stripped)
                return
            at += len(chunk)

    def _refuse(self, at: int, is_between: bool = False) -> NoReturn:
        """Raise BadValueError for an archive that ends, or makes no sense, at a header."""
        name = os.fsdecode(self._last.removeprefix(b"./"))
        after = f"the last whole member is {name}" if name else "no member of it is whole"
        if is_between and at == self._size and name:
            raise BadValueError(
                f"--data.dir {self._path}: cut off: {after}, and the end marker is missing.\n"
                "If it is whole, this adds the marker, two blocks of zeros: "
                f"head -c 1024 /dev/zero >> {shlex.quote(self._path)}"
            )
        raise BadValueError(
            f"--data.dir {self._path}: cut off or damaged at byte {min(at, self._size):,} of {self._size:,}; {after}.\n"
            "Copy or download the archive again."
        )


def read(file: Ranged, offset: int, size: int) -> bytes:
    """Return a member's bytes.

    Raises:
        ImageError: The archive ends before them.
    """
    data = file.read(size, offset)
    if len(data) != size:
        raise ImageError("truncated: the archive ends in it")
    return data


def _name(block: bytes) -> bytes:
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[257:263] == b"ustar\0":
        return block[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _number(field: bytes, base: int = 8) -> int:
    """Return the number in a field, in text or, where that is too short for it, in binary; raise ValueError."""
    if field[:1] in (b"\x80", b"\xff"):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    return int(field.partition(b"\0")[0] or b"0", base) if field.strip(b" \0") else 0


def _has_checksum(block: bytes) -> bool:
    """Whether the sum of a header's bytes is as it says, as unsigned or, in old archives, as signed numbers."""
    try:
        wanted = _number(block[148:156])
    except ValueError:
        return False
    used = block[:148] + block[156:]
    total = sum(used.translate(None, b"\0")) + 256
    return wanted == total or wanted == total - 256 * sum(byte > 127 for byte in used)
