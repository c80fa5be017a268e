"""The one door to the disk: every byte that a run writes goes through here, and every failure is told in its words."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from featx.errors import UserError

GOES_ON = "What is on disk stays good: with that mended, the same command goes on."


class DiskError(UserError, OSError):
    """The disk failed while a run was writing: exit status 4."""

    exit_status = 4


class BusyError(UserError, BlockingIOError):
    """Another run is alive in the folder."""


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn the system's refusal into a DiskError with the path, the system's own words and what to do."""
    try:
        yield
    except UserError:  # reported already
        raise
    except OSError as err:
        full = err.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = f"Free space on the disk of {path.parent}" if full else f"Look at the disk of {path.parent}"
        raise DiskError(f"{path}: {err.strerror or err}. {todo}.\n{GOES_ON}") from err


def open_to_write(path: Path, at: int = 0) -> BinaryIO:
    """Open a file to write from a position on, made if missing, cut off there if longer; a link is not followed."""
    if path.is_symlink():
        raise DiskError(f"{path}: is a link, and featx writes only to files of its own. Remove it.\n{GOES_ON}")
    with told(path):
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b", buffering=0)
        file.truncate(at)
        file.seek(at)
        return file


def write(file: BinaryIO, path: Path, data: bytes) -> None:
    """Write all of the bytes."""
    view = memoryview(data)
    with told(path):
        while view:  # an unbuffered file may take a part only
            view = view[file.write(view) :]


def sync(file: BinaryIO, path: Path) -> None:
    """Return when the file's bytes are on disk."""
    with told(path):
        os.fsync(file.fileno())


def close(file: BinaryIO, path: Path) -> None:
    """Close a file; network file systems report failed writes here."""
    with told(path):
        file.close()


def rename(old: Path, new: Path) -> None:
    """Give a file its final name, replacing what had it, and make that durable."""
    with told(new):
        os.replace(old, new)
        folder = os.open(new.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as err:
            if err.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
                raise
        finally:
            os.close(folder)


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    with told(path):
        path.unlink(missing_ok=True)


def replace(path: Path, data: bytes) -> None:
    """Put bytes into a file, whole or not at all."""
    fresh = path.with_name(f".{path.name}.new")
    file = open_to_write(fresh)
    try:
        write(file, fresh, data)
        sync(file, fresh)
    finally:
        close(file, fresh)
    rename(fresh, path)


def append_range(file: BinaryIO, path: Path, source: Path, start: int, end: int) -> None:
    """Append bytes ``start`` to ``end`` of another file, in the kernel where it can."""
    with told(path), source.open("rb") as src:
        at, kernel = start, True
        while at < end:
            if kernel:
                try:
                    moved = os.copy_file_range(src.fileno(), file.fileno(), min(end - at, 1 << 30), offset_src=at)
                except OSError as err:
                    if err.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                        raise
                    kernel = False
                    continue
            else:
                moved = os.sendfile(file.fileno(), src.fileno(), at, min(end - at, 1 << 30))
            if not moved:
                raise OSError(errno.EIO, f"{source} ends at byte {at}, expected {end}")
            at += moved


class Lock:
    """A folder's lock, which excludes other processes and this one's other runs.

    The system releases it when the process ends, however it ends: a forked worker drops its copy at once, as of
    filelock 3.30, https://github.com/tox-dev/filelock/issues/634.

    Args:
        path: The file that is locked, made if missing.
        what: What is locked, for the message.

    Raises:
        BusyError: Another run has it.
        DiskError: The file system has no locks, or refuses.
    """

    def __init__(self, path: Path, what: str) -> None:
        # A soft lock would outlive a killed process.
        self._lock = FileLock(path, thread_local=False, fallback_to_soft=False)
        with told(path):
            try:
                self._lock.acquire(blocking=False)
            except Timeout as err:
                raise BusyError(f"{what}: another run is writing there. Wait for it, or give another folder.") from err

    def release(self) -> None:
        """Let other runs in."""
        self._lock.release()
