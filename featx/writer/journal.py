"""Parts: the rows that are safely on disk, each with a journal of its batches, and how they are joined to a file."""

import hashlib
import json
import re
import zlib
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from featx.data.batch import Fault, Remarks
from featx.errors import BadValueError
from featx.writer import disk
from featx.writer.formats import PARTS, SUFFIXES

FORMAT = 2  # of journals and records; docs/promises.md lists all formats. Older ones stay readable.
# Everything that featx writes in a layer's folder below .featx; nothing else there is ever removed.
NUMBERED = rf"(?P<session>\d{{6}})(-\d{{5}})?(-\d{{5,}})?\.({'|'.join(PARTS)}|journal)"  # process, shard
# The number is of the job that joins: a stopped one may go on while another joins.
MADE = "|".join(map(re.escape, [*SUFFIXES, "json", "errors.csv", "gz"]))
JOINED = rf"(\d{{6}}-)?(joined|rows)(-\d{{5,}})?\.({MADE})"
OF_UPDATE = r"complete\.json|list-[0-9a-f]{16}\.gz"
OWN = re.compile(rf"\.?({NUMBERED}|{JOINED}|run\.json|images\.gz|{OF_UPDATE})(\.new)?")

Noted = list[Any]  # of one row: how many values are not finite, how many overflowed, and the kinds of remarks
Piece = tuple[Path, int, int]  # file, start, end
Span = tuple[int, int, int]  # start, end, CRC-32 of the bytes between


class Entry(NamedTuple):
    """One batch in a journal.

    Attributes:
        batch: Its number in the whole run.
        rows: The number of its rows.
        columns: Values per row.
        not_finite: How many rows contain nan or infinity, how many such values, and how many overflowed in float16.
        spans: The position of the rows in the part of each format.
        device: The device that computed them.
        faults: The images that could not be read.
        readers: The revision of the reader of each kind of image file; None in format 1.
        remarks: Counts of images with a row that something is remarkable about.
        noted: Of each image of which the counts above count something, as ``Noted`` has it.
    """

    batch: int
    rows: int
    columns: int
    not_finite: Sequence[int]
    spans: dict[str, Span]
    device: str
    faults: list[Fault]
    readers: dict[str, int] | None = None
    remarks: Remarks = {}  # noqa: RUF012, nobody changes it
    noted: dict[str, Noted] = {}  # noqa: RUF012, likewise


class Head(NamedTuple):
    """The first line of a journal.

    Attributes:
        files: Names of the part's files, one per format.
        run: Digest of the run's identity; empty in format 1.
    """

    files: list[str]
    run: str = ""


class Placed(NamedTuple):
    """An entry whose bytes are on disk, with the part of each format."""

    entry: Entry
    files: dict[str, Path]


def encode_line(value: Any) -> bytes:
    """Return a line of a journal: a value as JSON, after its CRC-32."""
    text = json.dumps(value, separators=(",", ":")).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def encode(head: Head, entries: Iterable[Entry]) -> bytes:
    """Return a journal."""
    first = {"format": FORMAT, "run": head.run, "files": head.files}
    return b"".join(map(encode_line, [first, *entries]))


def read(path: Path) -> tuple[Head, list[Entry]]:
    """Return what ``decode`` returns for a file."""
    return decode(path.read_bytes(), path)


def decode(data: bytes, path: Path) -> tuple[Head, list[Entry]]:
    """Return a journal's head and its entries up to the first damaged line; ``path`` is for the message.

    Raises:
        BadValueError: A newer featx wrote it.
    """
    values: list[Any] = []
    for line in data.split(b"\n")[:-1]:  # a last line without a line break is incomplete
        crc, _, text = line.partition(b" ")
        if crc != b"%08x" % zlib.crc32(text):
            break
        values.append(json.loads(text))
    first, *entries = values or [[]]
    if isinstance(first, list):  # format 1
        return Head(first), list(map(_entry, entries))
    check_format(path, first)
    return Head(first["files"], first["run"]), list(map(_entry, entries))


def check_format(path: Path, content: dict[str, Any]) -> None:
    """Raise BadValueError for a journal or record in a format that this version does not know."""
    if (found := content.get("format", 1)) not in range(1, FORMAT + 1):
        raise BadValueError(
            f"{path}: format {found} is from a newer featx; this version reads formats up to {FORMAT}.\n"
            "Upgrade featx, or use another --writer.out_dir."
        )


def _entry(values: list[Any]) -> Entry:
    entry = Entry(*values)
    spans = {format: (start, end, crc) for format, (start, end, crc) in entry.spans.items()}
    return entry._replace(spans=spans, faults=[Fault(*fault) for fault in entry.faults])


class Part:
    """The rows of one layer that one process writes, in one file per format, and their journal.

    Args:
        folder: Where to write them.
        stem: Prefix of the file names, not in use yet.
        run: Digest of the run's identity.
        heads: The first bytes of a final file, by format; every part starts with them, so that it can become that file.
    """

    def __init__(self, folder: Path, stem: str, run: str, heads: dict[str, bytes]) -> None:
        self.journal_path = folder / f"{stem}.journal"
        self.paths = {format: folder / f"{stem}.{format}" for format in heads}
        self.sha256 = {format: hashlib.sha256(head) for format, head in heads.items()}
        self._ends = {format: len(head) for format, head in heads.items()}
        self._waiting = [encode(Head([path.name for path in self.paths.values()], run), [])]
        with ExitStack() as stack:  # closes the files if one cannot be opened
            self._files = {format: self._open(path, stack) for format, path in self.paths.items()}
            for format, head in heads.items():
                disk.write(self._files[format], self.paths[format], head)
            self._journal = self._open(self.journal_path, stack)
            self.sync()
            self._opened = stack.pop_all()

    def _open(self, path: Path, stack: ExitStack) -> BinaryIO:
        file = disk.open_to_write(path, new=True)  # another job's is never written to
        stack.callback(disk.close, file, path)
        return file

    def add(self, entry: Entry, texts: dict[str, bytes]) -> None:
        """Write a batch's rows and set the entry's spans; the batch counts as done after the next ``sync``."""
        for format, text in texts.items():
            disk.write(self._files[format], self.paths[format], text)
            self.sha256[format].update(text)
            start, end = self._ends[format], self._ends[format] + len(text)
            entry.spans[format], self._ends[format] = (start, end, zlib.crc32(text)), end
        self._waiting.append(encode_line(entry))

    def sync(self) -> None:
        """Sync the rows, then their lines in the journal."""
        if not self._waiting:
            return
        for format, file in self._files.items():
            disk.sync(file, self.paths[format])
        disk.write(self._journal, self.journal_path, b"".join(self._waiting))
        disk.sync(self._journal, self.journal_path)
        self._waiting.clear()

    def digests(self) -> dict[Path, str]:
        """Return the SHA-256 of each file as written so far."""
        return {path: self.sha256[format].hexdigest() for format, path in self.paths.items()}

    def close(self) -> None:
        """Close all files without a sync."""
        self._opened.close()


def journals(folder: Path) -> Iterator[Path]:
    """Yield the journals in a folder, older sessions first."""
    for path in sorted(folder.glob("*.journal")):
        if re.fullmatch(NUMBERED, path.name) and path.is_file() and not path.is_symlink():
            yield path


def read_parts(
    folder: Path,
    formats: Iterable[str],
    run: str,
    results: Collection[str],
    session: str = "",
    only: Container[int] | None = None,
    jobs: Collection[int] | None = None,
) -> dict[int, Placed]:
    """Return a run's batches, by number, whose rows are on disk in all of the formats.

    The latest journal wins. Older sessions are not trusted: a journal must be from the same run and name only files of
    the layer, and the parts' bytes must match its checksums.

    Args:
        folder: Where the parts are.
        formats: The formats.
        run: Digest of the run's identity. Journals of format 1 have none; ``run.json`` was compared instead.
        results: The layer's finished files, relative to the folder.
        session: The session that is ending, to return only its batches, unchecked.
        only: The batches to look for; None for all.
        jobs: The sessions to look in; None for all.
    """

    def is_part(name: str) -> bool:
        return re.fullmatch(f"{NUMBERED}|{JOINED}", name) is not None and not (folder / name).is_symlink()

    done: dict[int, Placed] = {}
    wanted = set(formats)
    for path in journals(folder):
        if path.name.startswith(session) and (jobs is None or int(path.name[:6]) in jobs):
            try:
                head, entries = read(path)
            except OSError as err:
                if err.errno not in disk.GONE:
                    raise
                continue  # another job has joined the parts
            if only is not None:
                entries = [entry for entry in entries if entry.batch in only]
            own = [name for name in head.files if is_part(name) or name in results]
            files = {format: folder / name for name in own if (format := Path(name).suffix[1:]) in wanted}
            if wanted == files.keys() and head.run in ("", run):
                to_check = files.items() if not session else ()
                damaged = set[int]().union(*(_damaged(file, format, entries) for format, file in to_check))
                done |= {entry.batch: Placed(entry, files) for entry in entries if entry.batch not in damaged}
    return done


def _damaged(path: Path, format: str, entries: list[Entry]) -> set[int]:
    bad = {entry.batch for entry in entries}
    with suppress(OSError), path.open("rb") as file:
        for entry in entries:
            start, end, crc = entry.spans[format]
            file.seek(start)
            data = file.read(end - start)
            if len(data) == end - start and zlib.crc32(data) == crc:
                bad.remove(entry.batch)
    return bad


def next_session(folder: Path) -> int:
    """Return the number of the next session, after those of all files in a folder."""
    found = (re.fullmatch(NUMBERED, path.name) for path in folder.glob("*"))
    return 1 + max((int(name["session"]) for name in found if name), default=0)


def pieces(format: str, placed: Iterable[Placed]) -> list[Piece]:
    """Return the bytes of batches in one format, adjacent ones as one piece."""
    found: list[Piece] = []
    for entry, files in placed:
        start, end, _ = entry.spans[format]
        if found and found[-1][0] == files[format] and found[-1][2] == start:
            found[-1] = (files[format], found[-1][1], end)
        elif end > start:
            found.append((files[format], start, end))
    return found


def join(ranges: list[Piece], head: bytes, fresh: Path, keep: Path, copy: bool = False) -> Path:
    """Join a head and pieces of parts to one file, and return its path, on disk and ready to be renamed.

    If the first piece follows the head in its part, the part becomes the file and the rest is appended to it. If that
    fails, the part's own batches are still where its journal says.

    Args:
        ranges: The pieces after the head.
        head: The first bytes.
        fresh: Path of a new file, in case no part can become it.
        keep: A finished file, which is never written to; it is returned if it is complete already.
        copy: Whether no part may become the file, since a job that was stopped may go on writing to its part.
    """
    path = fresh
    first = ranges[0][0] if ranges else keep
    finished = keep.exists() and first.samefile(keep)  # a kept journal uses another path for it
    if finished and ranges == [(first, len(head), keep.stat().st_size)]:
        with disk.reporting(keep), keep.open("rb") as old:
            if old.read(len(head)) == head:
                return keep
    own = not (finished or copy) and all(source != first for source, _, _ in ranges[1:])
    if ranges and own and ranges[0][1] == len(head):
        path = first
        file = disk.open_to_write(path, ranges[0][2])
        ranges = ranges[1:]
    else:
        file = disk.open_to_write(path)
        disk.write(file, path, head)
    try:
        for source, start, end in ranges:
            disk.append_range(file, path, source, start, end)
        file.seek(0)
        if file.read(len(head)) != head:
            file.seek(0)
            disk.write(file, path, head)
        disk.sync(file, path)
    finally:
        disk.close(file, path)
    return path


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with disk.reporting(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
