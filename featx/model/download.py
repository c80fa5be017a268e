"""Download weights into torch's cache, or the hub's, whole and checked."""

import hashlib
import os
import re
import shutil
import threading
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from filelock import FileLock
from tqdm import tqdm

from featx.errors import MissingPathError, UserError, first_line, log

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
        if isinstance(err, HTTPError):
            err.close()  # else its connection is left to the collector
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
        except HTTPError as err:
            err.close()
            failure.clear()  # the server answers; the real request reports its error
        except BaseException as err:
            failure[:] = [getattr(err, "reason", err)]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if failure:
        raise OSError(first_line(failure[0])) from failure[0]


def from_hub(repo: str, *names: str) -> Path | None:
    """Return the first of some files that a repository of Hugging Face's hub has, from its cache or downloaded into it.

    The hub's own locks let one process download; a file whose name in the cache is a SHA-256 is compared with it.

    Args:
        repo: The repository, as ``facebook/dinov2-base``.
        names: The files, the best first.

    Returns:
        The file's path, or None if the repository has none of them.

    Raises:
        UserError: There is no such repository, it is not open to this user, or the hub cannot be reached.
    """
    hub: Any = import_module("huggingface_hub")
    errors, unknown = hub.errors, []
    try:
        for name in names:
            if isinstance(found := hub.try_to_load_from_cache(repo, name), str):
                return _checked_by_blob(Path(found))
            if found is None:  # else the cache knows that there is no such file
                unknown.append(name)
        if unknown:
            check_server(hub.constants.ENDPOINT)
        for name in unknown:
            try:
                if not name.endswith(".json"):
                    log.info("downloading %s of %s to %s", name, repo, hub.constants.HF_HUB_CACHE)
                return _checked_by_blob(Path(hub.hf_hub_download(repo, name, etag_timeout=TIMEOUT)))
            except errors.LocalEntryNotFoundError:  # no connection; one of the other kind, which says what is not there
                raise
            except errors.EntryNotFoundError:
                continue
    except UserError:
        raise
    except errors.GatedRepoError as err:
        raise UserError(
            f"{repo} is gated: its owner decides who may download it.\nAccept its terms at "
            f"{hub.constants.ENDPOINT}/{repo} and log in with hf auth login, or set HF_TOKEN."
        ) from err
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as err:
        raise MissingPathError(
            f"{repo}: the hub has no repository with this name, or it is private.\nExpected OWNER/NAME as in its "
            "address; log in with hf auth login for a private one. A folder begins with / or ./"
        ) from err
    except Exception as err:  # of many types, from its HTTP client
        raise UserError(
            f"{repo} cannot be downloaded from {hub.constants.ENDPOINT}\n({type(err).__name__}: "
            f"{first_line(err)[:200]}). Where there is a connection: hf download {repo} --local-dir FOLDER"
        ) from err
    return None


def _checked_by_blob(path: Path) -> Path:
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name) and digest(blob) != blob.name:  # a large file's name in the cache
        raise UserError(f"{path} is damaged: its SHA-256 is not {blob.name[:8]}….\nRemove {blob} to download it again.")
    return path
