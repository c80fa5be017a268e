"""Where images are: each kind of source is a file here, and ``find`` chooses the one that ``--data.dir`` names."""

import os
from collections.abc import Sequence
from pathlib import Path

from featx.data.selection import Selection
from featx.data.sources.archive import Archives
from featx.data.sources.base import Names, Source, open_file
from featx.data.sources.directory import ImageTree, check_list, read_list
from featx.data.sources.patterns import archives_in, expand
from featx.data.sources.store import ObjectStore, check_url, is_url
from featx.errors import BadValueError

__all__ = ["Archives", "ImageTree", "Names", "Source", "check", "find", "open_file", "read_list"]


def check(where: str, files: str | None) -> None:
    """Raise UserError if there is no such source, or no such list."""
    (check_url if is_url(where) else expand)(where)
    if files is not None:
        check_list(files)


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
        where: A folder, an archive, a pattern of archives' paths, or the URL of a bucket or of a prefix in it.
        files: A file that lists the images, or their paths, in the order of the rows; None: all.
        selection: The suffixes of images, and which images to leave out.
        column: The column of a table, or the file of a sample in an archive, that is the image; None: the only one.
        cache: A file that keeps what takes long to list, for the next run; None: nothing is kept.
        retry_seconds: How long requests are repeated while a store fails.

    Raises:
        UserError: There is no such source, it cannot be read, or there is no image in it.
    """
    if is_url(where):
        return ObjectStore(where, files, selection, retry_seconds)
    paths = expand(where)
    if paths != [where] or not os.path.isdir(where):
        return Archives(where, paths, files, selection, column, cache)
    if archives := archives_in(where):
        return Archives(where, archives, files, selection, column, cache)
    if column is not None:
        raise BadValueError(
            f"--data.column {column}: --data.dir {where} is a folder of images, which has no columns. Leave it out."
        )
    return ImageTree(where, files, selection)
