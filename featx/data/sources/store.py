"""Object stores, ``s3://bucket/photos``: their listing in a folder's order, and a batch's objects fetched together."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, BinaryIO

from torch.utils.data import get_worker_info

from featx.data.selection import Selection
from featx.data.sources.archive import Archives
from featx.data.sources.fetcher import REFUSED_TO_ALL, Trouble, without_secrets
from featx.data.sources.members import FOLDER, Members
from featx.errors import BadValueError, ImageError, StoreError, UserError, rank

SCHEMES, HTTP = ("s3", "gs", "az"), ("http", "https")
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
                raise _refused(self.where, Trouble(*value))
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

    def __del__(self) -> None:
        self._connection.close()
        if os.getpid() == self._maker:
            self._process.kill()
            self._process.wait()


def _refused(where: str, trouble: Trouble) -> BadValueError:
    """Return what is wrong with a place that cannot be listed."""
    if trouble.status == 404:
        what, remedy = "there is no such bucket", "Expected a bucket that exists, in the region of AWS_REGION."
    elif trouble.status in (401, 403) or trouble.code in REFUSED_TO_ALL:
        what = "no permission to list it" if trouble.code not in REFUSED_TO_ALL else "these credentials are not valid"
        remedy = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for public data."
    else:
        what, remedy = "the store refuses to list it", "docs/stores.md says what the environment has to say."
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
        self._place = (where, "") if scheme in HTTP else (f"{scheme}://{bucket}", prefix.strip("/"))
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

    def list(self) -> Members:
        """Return what is below the prefix."""
        members = Members()
        for _, page in self.ask("list"):
            if page is None:  # from the start
                members = Members()
            for name, size, stamp in page or ():
                is_marker = not size and "." not in name.rpartition("/")[2]  # of a folder, as consoles make them
                members.add(name.encode(), FOLDER if is_marker else 0, 0, size, stamp)
        return members


class ObjectStore(Archives):
    """Images below a prefix in an object store, in the order that they would have as files of a folder.

    Args:
        where: As ``s3://bucket/photos``.
        files: A list of the images, or their paths, as for a folder.
        selection: The suffixes of images, and which images to leave out.
        retry_seconds: How long requests are repeated before the run ends.

    Raises:
        BadValueError: There is no such bucket, no permission, or no image.
        StoreError: The store failed.
    """

    lost = "nothing is left of it"

    def __init__(
        self,
        where: str,
        files: str | Sequence[str] | None = None,
        selection: Selection | None = None,
        retry_seconds: float = 300,
    ) -> None:
        check_url(where)
        self.archives, self._bucket = [], Bucket(where, retry_seconds)
        self.where = self._bucket.where
        selection = selection or Selection()
        if (nothing := self._arrange([self._bucket.list()], files, selection, None)) is not None:
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
    scheme, _, rest = where.partition("://")
    if scheme in HTTP:
        raise BadValueError(
            f"--data.dir {shown(where)}: over HTTP images cannot be listed.\n"
            "Expected a bucket, such as s3://bucket/photos, gs://bucket/photos or az://container/photos."
        )
    if scheme not in SCHEMES or not rest.strip("/"):
        raise BadValueError(
            f"--data.dir {shown(where)}: expected a folder, or the URL of a bucket, such as s3://bucket/photos, "
            "gs://bucket/photos or az://container/photos."
        )
    if find_spec("obstore") is None:
        raise BadValueError(f"--data.dir {where}: obstore is not installed: pip install 'featx[remote]'")
