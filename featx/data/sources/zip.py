"""A zip -> its members, by its central directory: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT."""

import stat
import zlib
from struct import Struct, error
from typing import NamedTuple

from featx.data.sources.base import Ranged
from featx.data.sources.members import FOLDER, LINK, SPECIAL, Members
from featx.errors import BadValueError, ImageError

STORED, DEFLATED = 0, 8
METHODS = {1: "shrink", 6: "implode", 9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 98: "PPMd"}
ENCRYPTED = 1 << 14  # added to the method in a member's kind
END, END_64 = Struct("<4s4H2LH"), Struct("<4sQ2H2L4Q")
LOCATOR_64 = Struct("<4sLQL")
ENTRY, LOCAL = Struct("<4s4B4HL2L5H2L"), Struct("<4s5H3L2H")
HEADER = LOCAL.size + 1024  # of a member, with its name, which is mostly shorter
FIELD = Struct("<2H")
ZIP64, UNICODE_NAME = 0x0001, 0x7075  # extra fields
UTF_8 = 0x800  # a flag
MS_DOS, UNIX, MACOS = 0, 3, 19  # systems that made an entry
CHUNK = 1 << 20  # of the central directory, read at a time


class _End(NamedTuple):
    entries: int
    size: int  # of the central directory
    begin: int  # where it is in the file
    before: int  # bytes before the archive, which its offsets leave out


def is_zip(file: Ranged) -> bool:
    """Whether a file ends as a zip does; it may begin with a program that unpacks it."""
    return _find_end(file) >= 0


def index(path: str, file: Ranged) -> Members:
    """Return the members of a zip; the stamp of each is the CRC-32 of its bytes.

    Raises:
        BadValueError: Its central directory is damaged, or it is one of several volumes.
    """
    members = Members(is_packed=True)
    try:
        end = _read_end(file)
        _add_entries(members, file, end)
    except (error, ValueError, OverflowError) as err:
        raise BadValueError(
            f"--data.dir {path}: a damaged zip: {err}.\nCopy or download the archive again; zip -FF may save a part."
        ) from err
    return members


def read(file: Ranged, offset: int, size: int, stored: int, crc: int, kind: int) -> bytes:
    """Return a member's bytes.

    Raises:
        ImageError: It is encrypted, packed in a way that is not read, or damaged.
    """
    if kind & ENCRYPTED:
        raise ImageError("encrypted in its archive")
    if kind not in (STORED, DEFLATED):
        raise ImageError(
            f"packed by method {kind}{f' ({METHODS[kind]})' if kind in METHODS else ''}, of which featx reads only "
            "deflate; zip packs it so"
        )
    head = file.read(HEADER + stored, offset)  # most names are shorter
    if len(head) < LOCAL.size or not head.startswith(b"PK\3\4"):
        raise ImageError("damaged: its archive has no such member")
    *_, name, extra = LOCAL.unpack_from(head)
    begin = LOCAL.size + name + extra
    data = head[begin : begin + stored]
    if len(data) < stored and begin > HEADER:
        data = file.read(stored, offset + begin)
    if len(data) < stored:
        raise ImageError("truncated: the archive ends in it")
    if kind == DEFLATED:
        unpacker = zlib.decompressobj(-15)
        try:
            data = unpacker.decompress(data, size + 1)  # 0 would be no limit
        except zlib.error as err:
            raise ImageError(f"damaged in its archive: {err}") from err
    if len(data) != size or zlib.crc32(data) != crc:
        raise ImageError("damaged in its archive: other bytes than its checksum says")
    return data


def _find_end(file: Ranged) -> int:
    """Return where the end record is, or -1."""
    begin = max(0, file.size - END.size - 0xFFFF)  # a comment of that length may follow it
    tail = file.read(file.size - begin, begin)
    at = tail.rfind(b"PK\5\6")
    while at >= 0:
        if at + END.size <= len(tail) and at + END.size + END.unpack_from(tail, at)[-1] <= len(tail):
            return begin + at
        at = tail.rfind(b"PK\5\6", 0, at)
    return -1


def _read_end(file: Ranged) -> _End:
    at = _find_end(file)
    _, disk, first_disk, _, entries, length, offset, _ = END.unpack(file.read(END.size, at))
    locator = file.read(LOCATOR_64.size, at - LOCATOR_64.size) if at >= LOCATOR_64.size else b""
    if locator.startswith(b"PK\6\7"):
        at -= LOCATOR_64.size + END_64.size
        record = file.read(END_64.size, max(at, 0))
        if not record.startswith(b"PK\6\6"):  # it may be longer than this
            at = LOCATOR_64.unpack(locator)[2]
            record = file.read(END_64.size, at)
        signature, _, _, _, disk, first_disk, _, entries, length, offset = END_64.unpack(record)
        if signature != b"PK\6\6":
            raise ValueError("the end of its zip64 directory is missing")
    if disk or first_disk:
        raise ValueError("one of several volumes; zip -s 0 joins them")
    before = at - length - offset
    if before < 0:
        raise ValueError("its directory is said to be where the file ends")
    return _End(entries, length, offset + before, before)


def _add_entries(members: Members, file: Ranged, end: _End) -> None:
    chunk, at, begin, stop = b"", 0, end.begin, end.begin + end.size
    for _ in range(end.entries):
        if len(chunk) - at < ENTRY.size + 3 * 0xFFFF and begin < stop:
            more = file.read(min(CHUNK, stop - begin), begin)
            begin += len(more) or stop
            chunk, at = chunk[at:] + more, 0
        entry = ENTRY.unpack_from(chunk, at)
        signature, _, host, _, _, flags, method, _, _, crc, stored, size, *lengths, _, _, mode, offset = entry
        name_end = at + ENTRY.size + lengths[0]
        extra_end = name_end + lengths[1]
        name, extra = chunk[at + ENTRY.size : name_end], chunk[name_end:extra_end]
        at = extra_end + lengths[2]
        if signature != b"PK\1\2" or at > len(chunk):
            raise ValueError("its directory is shorter than it says")
        fields = _fields(extra) if extra else {}
        if 0xFFFFFFFF in (size, stored, offset):
            words = fields.get(ZIP64, b"")
            wide = iter([int.from_bytes(words[i : i + 8], "little") for i in range(0, len(words) - 7, 8)])
            size, stored, offset = (next(wide, n) if n == 0xFFFFFFFF else n for n in (size, stored, offset))
        if not name.isascii() or b"\\" in name:
            name = _decode(name, host, flags, fields)
        kind = method + (ENCRYPTED if flags & 1 else 0)
        is_unix = host in (UNIX, MACOS)
        if name.endswith(b"/"):
            kind = FOLDER
        elif is_unix and stat.S_ISLNK(mode >> 16):
            kind = LINK
        elif is_unix and stat.S_IFMT(mode >> 16) not in (0, stat.S_IFREG):
            kind = SPECIAL
        members.add(name, kind, end.before + offset, size, crc, stored)


def _fields(extra: bytes) -> dict[int, bytes]:
    """Return extra fields by number; the rest of damaged ones is ignored, as unzip does."""
    found, at = dict[int, bytes](), 0
    while at + 4 <= len(extra):
        number, length = FIELD.unpack_from(extra, at)
        found[number] = extra[at + 4 : at + 4 + length]
        at += 4 + length
    return found


def _decode(name: bytes, host: int, flags: int, fields: dict[int, bytes]) -> bytes:
    """Return a name in UTF-8, as unzip unpacks it on Linux."""
    unicode = fields.get(UNICODE_NAME, b"")
    if not flags & UTF_8 and unicode[:5] == b"\1" + zlib.crc32(name).to_bytes(4, "little"):
        name = unicode[5:]
    elif not flags & UTF_8 and host not in (UNIX, MACOS):  # macOS does not say that it writes UTF-8
        name = name.decode("cp437").encode()
    # .NET wrote backslashes for folders until 4.6.1
    return name.replace(b"\\", b"/") if host == MS_DOS and b"/" not in name else name
