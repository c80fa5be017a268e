"""Lists of tars' members, kept for the next run and for other processes: making one reads all of a tar's headers."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from featx.data.sources.base import Ranged
from featx.data.sources.members import Members
from featx.errors import rank

FORMAT = 2
COLUMNS = ("ends", "kinds", "stamps", "offsets", "sizes")


class Saved:
    """The lists that a run saved; a missing, damaged or older file is no list.

    A list is used only for the archive whose path, size and time it has.

    Args:
        path: The file; None: there are none, and none are saved.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known = dict[str, dict[str, Any]]()
        self._used = list[tuple[dict[str, Any], Members]]()
        self._is_new = False
        with suppress(OSError, ValueError):
            self._known = self._read_head() if path else {}

    def get(self, path: str, found: Ranged) -> Members | None:
        """Return the list of an archive, or None."""
        about = self._known.get(_absolute(path))
        if not about or not self._path or (about["size"], about["stamp"]) != (found.size, found.stamp):
            return None
        members = Members()
        with suppress(OSError, EOFError, ValueError), self._path.open("rb") as file:
            file.seek(about["begin"])
            members.blob = bytearray(file.read(about["bytes"]))
            members.outside, members.after = about["outside"], about["after"]
            for column in COLUMNS:
                values = getattr(members, column)
                del values[:]
                values.fromfile(file, about["members"] + (column == "ends"))
            self._used.append((about, members))
            return members
        return None

    def add(self, path: str, found: Ranged, members: Members) -> None:
        """Add the list of an archive to those to save."""
        about = {"path": _absolute(path), "size": found.size, "stamp": found.stamp}
        about |= {"members": len(members), "bytes": len(members.blob)}
        self._used.append((about | {"outside": members.outside, "after": members.after}, members))
        self._is_new = True

    def save(self) -> None:
        """Write all lists, in process 0, if one of them is new."""
        if self._path is None or not self._is_new or rank():
            return
        about = json.dumps([about for about, _ in self._used])
        digest = hashlib.sha256(about.encode())
        for part in self._parts():
            digest.update(part)
        fresh = self._path.with_name(f".{self._path.name}.new")
        with suppress(OSError):  # without it the next run lists the members once more
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with os.fdopen(os.open(fresh, flags, 0o666), "wb") as file:
                file.write(f"{FORMAT} {digest.hexdigest()} {about}\n".encode())
                file.writelines(self._parts())
            fresh.replace(self._path)

    def _parts(self) -> Iterator[memoryview]:
        for _, members in self._used:
            yield memoryview(members.blob)
            yield from (memoryview(getattr(members, column)) for column in COLUMNS)

    def _read_head(self) -> dict[str, dict[str, Any]]:
        """Return what is known of each archive, by its path, if the file is whole."""
        assert self._path is not None
        with self._path.open("rb") as file:
            number, wanted, about = file.readline().split(b" ", 2)
            begin, digest = file.tell(), hashlib.sha256(about.rstrip(b"\n"))
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if int(number) != FORMAT or digest.hexdigest() != wanted.decode():
            return {}
        known = json.loads(about)
        for archive in known:
            archive["begin"] = begin
            widths = {column: getattr(Members(), column).itemsize for column in COLUMNS}
            begin += archive["bytes"] + sum(widths.values()) * archive["members"] + widths["ends"]
        return {archive["path"]: archive for archive in known}


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)
