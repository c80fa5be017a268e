"""Download weights into torch's cache, whole and checked."""

import hashlib
import os
import shutil
import threading
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from filelock import FileLock
from tqdm import tqdm

from featx.errors import UserError, first_line, log

TIMEOUT = 20  # seconds without an answer


def fetch(url: str) -> Path:
    """Download weights into torch's cache, once for all processes, and return the file's path.

    The file gets its name only when it is whole. ``torch.hub`` does the same, but without a lock or a timeout:
    https://github.com/pytorch/pytorch/issues/34934.

    Raises:
        UserError: The file cannot be downloaded, or its digest is not the one in its name.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / os.path.basename(urlparse(url).path)
    if path.exists():
        return _checked(path)
    remedy = f"Put the file into {folder}\nor use another: --model.weights FILE (--model.weights random for a trial)"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists():
                return _checked(path)
            check_server(url)
            log.info("downloading %s to %s", url, folder)
            _download(url, path)
    except OSError as err:
        raise UserError(f"weights cannot be downloaded from {url}\n({first_line(err)}). {remedy}") from err
    finally:
        Path(f"{path}.lock").unlink(missing_ok=True)
    return path


def _download(url: str, path: Path) -> None:
    partial = path.with_name(f"{path.name}.partial")
    request = Request(url, headers={"User-Agent": "featx"})
    try:
        with urlopen(request, timeout=TIMEOUT) as answer, partial.open("wb") as file:
            size = int(answer.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(answer, "read", size or None, bytes=False, unit="B", unit_scale=True) as read:
                shutil.copyfileobj(read, file, 1 << 20)
        if partial.stat().st_size < size:
            raise OSError(f"the connection ended after {partial.stat().st_size:,} of {size:,} bytes")
        if wrong := _wrong_digest(partial, path.name):
            raise OSError(f"invalid hash: {wrong}")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _checked(path: Path) -> Path:
    if wrong := _wrong_digest(path, path.name):
        raise UserError(
            f"{path} is damaged: {wrong}.\nRemove it to download it again, or replace it with the right file."
        )
    return path


def _wrong_digest(path: Path, name: str) -> str:
    """Return how a file's digest differs from the one in a name, or nothing."""
    if not (expected := digest_in(name)) or (found := digest(path)).startswith(expected):
        return ""
    return f"its SHA-256 begins with {found[:8]}, expected {expected}"


def digest_in(name: str) -> str:
    """Return the first digits of a file's SHA-256 in its name, or nothing."""
    found = torch.hub.HASH_REGEX.search(name)
    return found.group(1) if found else ""


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_server(url: str) -> None:
    """Raise OSError unless the server answers in time, name resolution and all its addresses included."""
    failure: list[BaseException] = [TimeoutError(f"no answer within {TIMEOUT} s")]

    def ask() -> None:
        try:
            with urlopen(Request(url, method="HEAD", headers={"User-Agent": "featx"}), timeout=TIMEOUT):
                failure.clear()
        except HTTPError:
            failure.clear()  # the server answers; the real request reports its error
        except BaseException as err:
            failure[:] = [getattr(err, "reason", err)]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if failure:
        raise OSError(first_line(failure[0])) from failure[0]
