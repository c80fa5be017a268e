"""Where images are: each kind of source is a file here, and ``find`` chooses the one that ``--data.dir`` names."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from featx.data.selection import Selection
from featx.data.sources.archive import Archives
from featx.data.sources.base import Names, Source, open_file
from featx.data.sources.directory import ImageTree, check_list, read_list
from featx.data.sources.patterns import archives_in, expand
from featx.data.sources.store import check_url, find_in_store, is_url
from featx.data.sources.table import SUFFIXES, Table, files_of
from featx.errors import BadValueError, UserError

__all__ = [
    "Archives",
    "ImageTree",
    "Names",
    "Source",
    "check",
    "exists",
    "expand",
    "find",
    "is_folder",
    "open_file",
    "read_list",
]


def check(where: str, files: str | None) -> None:
    """Raise UserError if there is no such source, or no such list."""
    (check_url if is_url(where) else expand)(where)
    if files is not None:
        check_list(files)


def exists(where: str) -> bool:
    """Whether a user names anything that is there."""
    if is_url(where):
        return True
    with suppress(UserError):
        return bool(expand(where))
    return False


def is_folder(where: str) -> bool:
    """Whether images are files of their own in a folder, or would be if it was there."""
    if is_url(where) or not exists(where):
        return not is_url(where)
    return not (_tables(paths := expand(where)) or _archives(paths))


def find(
    where: str,
    files: str | Sequence[str] | None = None,
    selection: Selection | None = None,
    column: str | None = None,
    cache: Path | None = None,
    retry_seconds: float = 300,
) -> Source:
    """Return the source of images that a user names.

    Args:
        where: A folder, an archive, a table, a pattern of the paths of archives or tables, or a URL of any of them.
        files: A file that lists the images, or their paths, in the order of the rows; None: all.
        selection: The suffixes of images, and which images to leave out.
        column: The column of a table, or the file of a sample in an archive, that is the image; None: the only one.
        cache: A file that keeps what takes long to list, for the next run; None: nothing is kept.
        retry_seconds: How long requests are repeated while a store fails.

    Raises:
        UserError: There is no such source, it cannot be read, or there is no image in it.
    """
    if is_url(where):
        return find_in_store(where, files, selection or Selection(), column, cache, retry_seconds)
    paths = expand(where)
    if tables := _tables(paths):
        if files is not None:
            raise BadValueError(
                f"--data.files {files}: --data.dir {where} is a table, whose rows are read in their order. "
                "--data.exclude leaves some out."
            )
        return Table(where, tables, selection, column)
    if archives := _archives(paths):
        return Archives(where, archives, files, selection, column, cache)
    if column is not None:
        raise BadValueError(
            f"--data.column {column}: --data.dir {where} is a folder of images, which has no columns. Leave it out."
        )
    return ImageTree(paths[0], files, selection)


def _tables(paths: list[str]) -> list[str]:
    """Return the files of the table that a user names, in order, or []."""
    if len(paths) == 1:
        return files_of(paths[0])
    return paths if all(path.lower().endswith(SUFFIXES) for path in paths) else []


def _archives(paths: list[str]) -> list[str]:
    """Return the archives that a user names, in order, or [] if it is one folder of images."""
    return archives_in(paths[0]) if len(paths) == 1 and os.path.isdir(paths[0]) else paths
