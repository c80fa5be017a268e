"""Every disk write of a run, with failures reported as DiskError."""

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from featx.errors import UserError, log

GONE = (errno.ENOENT, errno.ESTALE)  # NFS: https://github.com/tox-dev/filelock/pull/669
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
GOES_ON = "What is on disk is safe: fix this, then run the same command again to continue."


class DiskError(UserError, OSError):
    """The disk failed while a run was writing: exit status 4."""

    exit_status = 4


class BusyError(UserError, BlockingIOError):
    """Another run is writing to the folder."""


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turn an OSError into a DiskError with the path, the system's error and what to do."""
    try:
        yield
    except UserError:  # a DiskError is an OSError too
        raise
    except OSError as err:
        action = "Free space on" if err.errno in (errno.ENOSPC, errno.EDQUOT) else "Check"
        raise DiskError(f"{path}: {err.strerror or err}. {action} the disk of {path.parent}.\n{GOES_ON}") from err


def open_to_write(path: Path, at: int = 0, new: bool = False) -> BinaryIO:
    """Open a file for writing at a position, created if missing and truncated there; refuse a link.

    Args:
        path: The file.
        at: The position, in bytes.
        new: Whether it must be missing.
    """
    if path.is_symlink():
        raise DiskError(f"{path}: is a link, and featx writes only to its own files. Remove it.\n{GOES_ON}")
    with reporting(path):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | (os.O_EXCL if new else 0)
        file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        file.truncate(at)
        file.seek(at)
        return file


def write(file: BinaryIO, path: Path, data: bytes) -> None:
    """Write all of the bytes."""
    view = memoryview(data)
    with reporting(path):
        while view:  # an unbuffered write may be partial
            view = view[file.write(view) :]


def sync(file: BinaryIO, path: Path) -> None:
    """Flush a file to disk."""
    with reporting(path):
        os.fsync(file.fileno())


def close(file: BinaryIO, path: Path) -> None:
    """Close a file; network file systems report failed writes here."""
    with reporting(path):
        file.close()


def rename(old: Path, new: Path) -> None:
    """Rename a file durably, replacing any file of the new name."""
    with reporting(new):
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
    """Remove a file if it exists."""
    with reporting(path):
        path.unlink(missing_ok=True)


def replace(path: Path, data: bytes, fresh: Path | None = None) -> None:
    """Replace a file's content atomically.

    Args:
        path: The file.
        data: Its new content.
        fresh: A new file on the same file system, if another process may replace it at the same time.
    """
    fresh = fresh or path.with_name(f".{path.name}.new")
    file = open_to_write(fresh)
    try:
        write(file, fresh, data)
        sync(file, fresh)
    finally:
        close(file, fresh)
    rename(fresh, path)


def now(folder: Path) -> float:
    """Return the time by the clock of a folder's file system, or by this machine's if the folder is read-only."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.utime(file.fileno())  # a network file system takes its server's time
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def append_range(file: BinaryIO, path: Path, source: Path, start: int, end: int) -> None:
    """Append bytes ``start`` to ``end`` of another file, without copying them through this process."""
    with reporting(path), source.open("rb") as src:
        at, can_copy = start, True
        while at < end:
            size = min(end - at, 1 << 30)
            try:
                if can_copy:
                    moved = os.copy_file_range(src.fileno(), file.fileno(), size, offset_src=at)
                else:
                    moved = os.sendfile(file.fileno(), src.fileno(), at, size)
            except OSError as err:
                if not can_copy or err.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                can_copy = False
                continue
            if not moved:
                raise OSError(errno.EIO, f"{source} ends at byte {at}, expected {end}")
            at += moved


class Lock:
    """A folder's lock, which excludes other processes and other runs in this process.

    The system releases it when the process ends, even by SIGKILL: since filelock 3.30 a forked worker drops its copy
    at once, https://github.com/tox-dev/filelock/issues/634.

    Args:
        path: The lock file, created if missing.
        what: What is locked, for the message.
        shared: Whether to exclude only those that do not share it. filelock has no such lock on the same file.

    Raises:
        BusyError: Another run holds the lock.
        DiskError: The file system has no locks or refuses.
    """

    def __init__(self, path: Path, what: str, shared: bool = False) -> None:
        # A soft lock would survive a killed process.
        self._lock = None if shared else FileLock(path, thread_local=False, fallback_to_soft=False)
        self._file = -1
        with reporting(path):
            try:
                if self._lock is not None:
                    self._lock.acquire(blocking=False)
                else:
                    self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                    os.register_at_fork(after_in_child=self._close)
                    fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except (Timeout, BlockingIOError) as err:
                self._close()
                raise BusyError(f"{what}: another run is writing there. Wait for it, or use another folder.") from err
            except OSError as err:
                if not shared or err.errno not in NO_LOCKS:
                    raise
                log.warning("%s: no locks on its file system: start no run without --data.shard there meanwhile", what)

    def _close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def release(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
        self._close()
