"""Object stores, ``s3://bucket/photos``: their listing in a folder's order, and a batch's objects fetched together."""

import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, BinaryIO

from torch.utils.data import get_worker_info

from featx.data.selection import Selection
from featx.data.sources.archive import SUFFIXES, Archives
from featx.data.sources.base import Source
from featx.data.sources.fetcher import NO_BUCKET, NO_CREDENTIALS, NO_PATH, REFUSED_TO_ALL, Trouble, without_secrets
from featx.data.sources.members import FOLDER, Members
from featx.data.sources.patterns import select
from featx.data.sources.table import Table
from featx.errors import BadValueError, ImageError, MissingPathError, StoreError, UserError, rank

SCHEMES, HTTP = ("s3://", "gs://", "az://"), ("http://", "https://")
ACCESS = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for public data.",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS=key.json, or GOOGLE_SKIP_SIGNATURE=true for public data.",
    "az": "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_SKIP_SIGNATURE=true for public data.",
    "ht": "Expected a URL that can be read, with its user and password or its signature.",
}
TABLES = (".parquet", ".parq", ".pq")
WINDOW = 1 << 20  # bytes that are fetched where one after the other is read
GAP, LONGEST = 1 << 16, 1 << 23  # bytes between ranges that are fetched in one request, and of that
CONTINUES = "the same command continues where it stopped"


def is_url(where: str) -> bool:
    """Whether this is a URL, not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", where) is not None


def shown(where: str) -> str:
    """Return what messages and records call a URL: without what gives access."""
    return without_secrets(re.sub("(?<=[^/:])/+$", "", where))


class Fetcher:
    """A process that talks to a store, of this process alone, one request at a time.

    Args:
        url: As ``s3://bucket``.
        prefix: What is below it that matters.
        where: What messages call it.
        retry_seconds: How long requests are repeated.
    """

    def __init__(self, url: str, prefix: str, where: str, retry_seconds: float) -> None:
        self.where = where
        self._maker, self._number = os.getpid(), 0
        self._connection, theirs = Pipe()
        worker = get_worker_info()
        reports = not rank() and (worker is None or worker.id == 0)  # of several, one
        program = str(Path(__file__).with_name("fetcher.py"))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", program, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C and SIGTERM to the group are for this process, which needs its batch
            )
        self._connection.send(sys.path)
        self._connection.send((0, url, prefix, self.where, retry_seconds, reports))

    def ask(self, method: str, *args: Any) -> Iterator[tuple[str, Any]]:
        """Yield the answers to a request, each with its kind.

        Raises:
            BadValueError: The store refuses it.
            StoreError: The store failed.
        """
        self._number += 1
        with suppress(OSError):  # it has died, as receiving says
            self._connection.send((self._number, method, *args))
        while True:
            number, kind, value = self._receive()
            if kind == "bug":
                raise RuntimeError(value)
            if number != self._number:  # of an earlier request, whose answers nobody took
                continue
            if kind == "end":
                return
            if kind == "refused":
                raise _refused(
                    f"{self.where}/{args[0]}" if method == "open" and args[0] else self.where, Trouble(*value)
                )
            if kind == "failed":
                raise StoreError(f"--data.dir {self.where}: the store failed: {value}\nWhen it is back, {CONTINUES}.")
            yield kind, value

    def _receive(self) -> tuple[int, str, Any]:
        try:
            number, kind, value = self._connection.recv()
            return number, kind, self._connection.recv_bytes() if kind == "data" else value
        except (EOFError, OSError) as err:
            what = "the process that reads from the store died, most often for lack of memory"
            raise StoreError(f"--data.dir {self.where}: {what}.\nWith more of it, {CONTINUES}.") from err

    def __del__(self, own_pid: Callable[[], int] = os.getpid) -> None:  # as Python ends, os may be gone
        self._connection.close()
        if own_pid() == self._maker:
            self._process.kill()
            self._process.wait()


def _refused(where: str, trouble: Trouble) -> UserError:
    """Return what is wrong with a place that cannot be listed."""
    if trouble.status == 404 and trouble.code not in NO_BUCKET:
        return MissingPathError(f"--data.dir {where}: there is no such object ({trouble.words}).")
    if trouble.status == 404:
        what, remedy = (
            "there is no such bucket",
            "Expected one that exists; docs/stores.md says how to reach others.",
        )
    elif trouble.code == NO_PATH:
        what, remedy = "it has a name that obstore cannot read", "Rename the object, or read a prefix without it."
    elif trouble.status in (401, 403) or trouble.code in (*REFUSED_TO_ALL, NO_CREDENTIALS):
        what = "no permission" if trouble.code not in REFUSED_TO_ALL else "these credentials are not valid"
        remedy = ACCESS[where[:2]]
    else:
        what, remedy = "the store refuses it", ACCESS[where[:2]]
    return BadValueError(f"--data.dir {where}: {what} ({trouble.words}).\n{remedy}")


class Bucket:
    """What is below a prefix of a store, read through fetchers: each process has its own, and each of its threads.

    Args:
        where: As ``s3://bucket/photos``, or the URL of a file.
        retry_seconds: How long requests are repeated before the run ends.

    Attributes:
        where: What messages call it.
    """

    def __init__(self, where: str, retry_seconds: float) -> None:
        self.where = shown(where)
        scheme, _, rest = where.partition("://")
        bucket, _, prefix = rest.partition("/")
        self._place = (where, "") if where.startswith(HTTP) else (f"{scheme}://{bucket}", prefix.strip("/"))
        self._retry_seconds = retry_seconds
        self._maker, self._idle = os.getpid(), list[Fetcher]()

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs."""
        return vars(self) | {"_maker": 0, "_idle": []}

    def ask(self, method: str, *args: Any) -> Iterator[tuple[str, Any]]:
        """Yield the answers to a request, each with its kind.

        Raises:
            BadValueError: The store refuses it.
            StoreError: The store failed.
        """
        if self._maker != os.getpid():  # a fork: those of its parent are not for it
            self._maker, self._idle = os.getpid(), []
        try:
            fetcher = self._idle.pop()
        except IndexError:
            fetcher = Fetcher(*self._place, self.where, self._retry_seconds)
        try:
            yield from fetcher.ask(method, *args)
        except UserError:  # it has ended
            raise
        except GeneratorExit:
            self._idle.append(fetcher)
            raise
        self._idle.append(fetcher)

    def urls(self, members: Members) -> Iterator[str]:
        """Yield the URLs of all objects that were listed."""
        for place in range(len(members)):
            if members.kinds[place] >= 0:
                yield f"{self.where}/{members.name(place)}"

    def open(self, path: str) -> "RemoteFile":
        """Open a file by its URL as it is shown."""
        return RemoteFile(self, path.removeprefix(self.where).lstrip("/"))

    def list(self) -> Members:
        """Return all that is below the prefix, with stamps."""
        members = Members()
        for _, page in self.ask("list"):
            if page is None:  # from the start
                members = Members()
            for name, size, stamp in page or ():
                is_marker = not size and "." not in name.rpartition("/")[2]  # of a folder, as consoles make them
                members.add(name.encode(), FOLDER if is_marker else 0, 0, size, stamp)
        return members


class RemoteFile:
    """A file in a store, as ``Ranged``.

    Args:
        bucket: What it is in.
        name: Its name there.
    """

    def __init__(self, bucket: Bucket, name: str) -> None:
        ((_, (self.size, self.stamp)),) = bucket.ask("open", name)
        self._bucket, self._name = bucket, name
        self._held = threading.local()  # what is ready, by its begin

    def read(self, length: int, at: int) -> bytes:
        """Return bytes from a place on, fewer at the end."""
        end = min(at + length, self.size)
        if at >= end:
            return b""
        for window in (0, WINDOW):  # what follows is mostly next
            if window:
                self.ahead([(at, max(end, at + window))])
            parts: list[tuple[int, bytes]] = getattr(self._held, "parts", [])
            for begin, data in parts:
                if begin <= at and end <= begin + len(data):
                    return data[at - begin : end - begin]
        raise ImageError("truncated: the store sent less than it was asked for")

    def ahead(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch ranges together, in one request what lies side by side."""
        joined = list[list[int]]()
        for begin, end in sorted(ranges):
            end = min(end, self.size)
            if joined and begin - joined[-1][1] <= GAP and end - joined[-1][0] <= LONGEST:
                joined[-1][1] = max(end, joined[-1][1])
            elif begin < end:
                joined.append([begin, end])
        self._held.parts, parts = [], list[tuple[int, bytes]]()
        for (begin, _), (kind, value) in zip(joined, self._ask(joined), strict=False):
            if kind == "data":
                parts.append((begin, value))
            elif kind == "denied":
                raise PermissionError(value or "no permission")
            else:
                raise ImageError(f"its archive is {value}".replace("is changed", "has changed"))
        self._held.parts = parts

    def _ask(self, ranges: list[list[int]]) -> Iterator[tuple[str, Any]]:
        wanted = [(begin, end) for begin, end in ranges]
        yield from self._bucket.ask("ranges", self._name, self.stamp, wanted)


class ObjectStore(Archives):
    """Images below a prefix in an object store, in the order that they would have as files of a folder.

    Args:
        bucket: The prefix.
        members: What is below it.
        files: A list of the images, or their paths, as for a folder.
        selection: The suffixes of images, and which images to leave out.

    Raises:
        BadValueError: There is no image, or no permission to read any.
        StoreError: The store failed.
    """

    lost = "nothing is left of it"

    def __init__(
        self, bucket: Bucket, members: Members, files: str | Sequence[str] | None, selection: Selection
    ) -> None:
        self.archives, self._bucket, self.where = [], bucket, bucket.where
        if (nothing := self._arrange([members], files, selection, None)) is not None:
            found = f" Left out: {nothing.left_out}." if nothing.left_out else ""
            known = " ".join(selection.suffixes)
            raise BadValueError(
                f"--data.dir {self.where}: no image below it.{found}\n"
                f"Expected a prefix of images, or of one folder per class, with the suffixes {known}."
            )
        self._check_permission()

    def read(self, places: Sequence[int]) -> Iterator[BinaryIO | Exception]:
        """Yield the contents of objects, fetched together, or why there is none."""
        wanted = [(self.names[place], int(self.sizes[place]), int(self.stamps[place])) for place in places]
        for kind, value in self._bucket.ask("read", wanted):
            if kind == "data":
                yield io.BytesIO(value)
            elif kind == "denied" and not value:
                yield PermissionError("no permission")
            else:
                yield ImageError(value)

    def path(self, place: int) -> str:
        """Return an image's URL."""
        return f"{self.where}/{self.names[place]}"

    def is_lost(self) -> bool:
        """Whether there is nothing below the prefix any more."""
        return bool(dict(self._bucket.ask("is_empty"))["empty"])

    def _check_permission(self) -> None:
        """Raise BadValueError if none of three images may be read."""
        some = sorted({0, len(self) // 2, len(self) - 1})
        if all(isinstance(file, PermissionError) for file in self.read(some)):
            raise BadValueError(
                f"--data.dir {self.where}: no permission to read {self.names[0]}, although it may be listed.\n"
                "Expected credentials that may read the objects, too."
            )


def check_url(where: str) -> None:
    """Raise BadValueError unless this is a URL of a store, and obstore is installed."""
    if where.startswith(HTTP) and not re.search(r"\.\w+$", shown(where)):
        raise BadValueError(
            f"--data.dir {shown(where)}: over HTTP images cannot be listed.\n"
            "Expected an archive, or a bucket, such as s3://bucket/photos, gs://bucket/photos or az://container/photos."
        )
    if not where.startswith(SCHEMES + HTTP) or not where.partition("://")[2].strip("/"):
        raise BadValueError(
            f"--data.dir {shown(where)}: expected a folder, or the URL of a bucket, such as s3://bucket/photos, "
            "gs://bucket/photos or az://container/photos."
        )
    if find_spec("obstore") is None:
        raise BadValueError(f"--data.dir {where}: obstore is not installed: pip install 'featx[remote]'")


def find_in_store(
    where: str, files: str | Sequence[str] | None, selection: Selection, column: str | None, cache: Path | None,
    retry_seconds: float,
) -> Source:  # fmt: skip
    """Return the source of images that a URL names, as ``sources.find`` does for a path."""
    check_url(where)
    url = shown(where)
    pattern = re.search(r"[*?]|\{[^{}]*(,|\.\.)[^{}]*\}", url)
    if where.startswith(HTTP):
        bucket, paths = Bucket(where, retry_seconds), [url]
    elif pattern:
        bucket = Bucket(url[: pattern.start()].rpartition("/")[0], retry_seconds)
        paths = select(url, bucket.urls(bucket.list()))
    elif url.lower().endswith(SUFFIXES + TABLES):
        bucket, paths = Bucket(url.rpartition("/")[0], retry_seconds), [url]
    else:
        bucket = Bucket(where, retry_seconds)
        members = bucket.list()
        paths = [url for url in bucket.urls(members) if url.lower().endswith(SUFFIXES + TABLES)]
        if not paths or any(map(selection.is_image, bucket.urls(members))):
            if column is not None:
                raise BadValueError(f"--data.column {column}: {url} has images, which have no columns. Leave it out.")
            return ObjectStore(bucket, members, files, selection)
    if all(path.lower().endswith(TABLES) for path in paths):
        if files is not None:
            raise BadValueError(
                f"--data.files {files}: --data.dir {url} is a table, whose rows are read in their order."
            )
        return Table(url, sorted(paths), selection, column, bucket.open)
    return Archives(url, sorted(paths), files, selection, column, cache, bucket.open)
