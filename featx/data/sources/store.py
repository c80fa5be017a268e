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

from featx.data.selection import SYSTEM_FOLDERS, LeftOut, Selection
from featx.data.sources.directory import ImageTree, _Folder, _pack, read_list
from featx.data.sources.fetcher import REFUSED_TO_ALL, Trouble, without_secrets
from featx.errors import BadValueError, ImageError, StoreError, UserError, rank

SCHEMES = ("s3", "gs", "az")
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
        retry_seconds: How long a request that fails is made again.
    """

    def __init__(self, url: str, prefix: str, retry_seconds: float) -> None:
        self.where = f"{url}/{prefix}".rstrip("/")
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


class ObjectStore(ImageTree):
    """Images below a prefix in an object store, in the order that they would have as files of a folder.

    Each process reads through a ``Fetcher`` of its own, which it starts at its first ``read``; threads that read at the
    same time have one each.

    Args:
        where: As ``s3://bucket/photos``.
        files: A list of the images, or their paths, as for a folder.
        selection: The suffixes of images, and which images to leave out.
        retry_seconds: How long a request that fails is made again before the run ends.

    Raises:
        BadValueError: There is no such bucket, no permission, or no image.
        StoreError: The store failed.
    """

    def __init__(
        self,
        where: str,
        files: str | Sequence[str] | None = None,
        selection: Selection | None = None,
        retry_seconds: float = 300,
    ) -> None:
        check(where)
        self.where = shown(where)
        scheme, _, rest = self.where.partition("://")
        bucket, _, self._prefix = rest.partition("/")
        self._url = f"{scheme}://{bucket}"
        self._retry_seconds = retry_seconds
        self._maker, self._idle = os.getpid(), list[Fetcher]()
        self._listing = self._list()
        self._arrange(files, selection)
        self._check_permission()

    def read(self, places: Sequence[int]) -> Iterator[BinaryIO | Exception]:
        """Yield the contents of objects, fetched together, or why there is none."""
        wanted = [(self.names[place], int(self.sizes[place]), int(self.stamps[place])) for place in places]
        for kind, value in self._ask("read", wanted):
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
        return bool(dict(self._ask("is_empty"))["empty"])

    def _ask(self, method: str, *args: Any) -> Iterator[tuple[str, Any]]:
        """Yield the answers of a fetcher that nothing else uses meanwhile."""
        if self._maker != os.getpid():  # a fork: the parent's are not for it
            self._maker, self._idle = os.getpid(), []
        try:
            fetcher = self._idle.pop()
        except IndexError:
            fetcher = Fetcher(self._url, self._prefix, self._retry_seconds)
        try:
            yield from fetcher.ask(method, *args)
        except UserError:  # it has ended
            raise
        except GeneratorExit:
            self._idle.append(fetcher)
            raise
        self._idle.append(fetcher)

    def _list(self) -> dict[str, _Folder]:
        """Return what is directly in each folder below the prefix."""
        found: dict[str, _Folder] = {"": _Folder("")}
        for _, page in self._ask("list"):
            if page is None:  # from the start
                found = {"": _Folder("")}
            for name, size, stamp in page or ():
                above, _, last = name.rpartition("/")
                _folder(found, above).add(last, size, stamp)
        return found

    def _arrange(self, files: str | Sequence[str] | None, selection: Selection | None) -> None:
        self.root = self.where
        self.classes = [""]
        self._selection = selection or Selection()
        self._left = LeftOut(self._selection)
        self.names, self.sizes, self.stamps = _pack(self._find() if files is None else [self._listed(files)])
        self._listing = {}
        if not self.names:
            found = f" Left out: {self.left_out}." if self.left_out else ""
            known = " ".join(self._selection.suffixes)
            raise BadValueError(
                f"--data.dir {self.where}: no image below it.{found}\n"
                f"Expected a prefix of images, or of one folder per class, with the suffixes {known}."
            )

    def _scan(self, path: str) -> _Folder:
        listed = self._listing.pop(path)
        folder = _Folder(listed.path)
        for name in listed.folders:
            if name.startswith(".") or name.lower() in SYSTEM_FOLDERS:
                self._left.add_folder(name)
            else:
                folder.folders.append(name)
        folders = set(listed.folders)
        for name, size, stamp in zip(listed.names, listed.sizes, listed.stamps, strict=True):
            if size == 0 and (name in folders or "." not in name):  # a marker of a folder, as consoles make them
                continue
            if self._selection.is_image(name) and not name.startswith("."):
                if self._selection.excludes(folder.path + name):
                    self._left.excluded += 1
                else:
                    folder.add(name, size, stamp)
            else:
                self._left.add_file(name)
        return folder

    def _listed(self, files: str | Sequence[str]) -> _Folder:
        names = read_list(files) if isinstance(files, str) else files
        wanted = dict.fromkeys(name for name in names if not self._selection.excludes(name))
        self._left.excluded += len(names) - len(wanted)
        known = {}
        for listed in self._listing.values():
            for name, size, stamp in zip(listed.names, listed.sizes, listed.stamps, strict=True):
                if listed.path + name in wanted:
                    known[listed.path + name] = size, stamp
        folder = _Folder("")
        for name in wanted:
            folder.add(name, *known.get(name, (-1, -1)))
        self.left_out = self._left.describe(0, set())
        return folder

    def _check_permission(self) -> None:
        """Raise BadValueError if none of three images may be read."""
        some = sorted({0, len(self) // 2, len(self) - 1})
        if all(isinstance(file, PermissionError) for file in self.read(some)):
            raise BadValueError(
                f"--data.dir {self.where}: no permission to read {self.names[0]}, although it may be listed.\n"
                "Expected credentials that may read the objects, too."
            )


def _folder(found: dict[str, _Folder], path: str) -> _Folder:
    """Return a folder's listing, which is made with those above it."""
    if path not in found:
        above, _, last = path.rpartition("/")
        _folder(found, above).folders.append(last)
        found[path] = _Folder(f"{path}/")
    return found[path]


def check(where: str) -> None:
    """Raise BadValueError unless this is a URL of a store, and obstore is installed."""
    scheme, _, rest = where.partition("://")
    if scheme in ("http", "https"):
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
