"""``shards/{000..127}.tar`` -> paths: patterns that featx expands itself, and folders of nothing but archives."""

import glob
import os
import re
from collections.abc import Iterable, Iterator

from featx.data.selection import Selection
from featx.errors import BadValueError, MissingPathError, first_few

MOST = 1_000_000  # paths
RANGE = re.compile(r"(\d+)\.\.(\d+)")
BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")


def expand(where: str) -> list[str]:
    """Return the paths that a pattern stands for, sorted: ``*``, ``?``, ``{000..127}`` and ``{a,b}``.

    What exists is what it is, whatever is in its name.

    Raises:
        MissingPathError: There is no such path, or for one of the alternatives in braces.
        BadValueError: The pattern stands for too many paths.
    """
    if os.path.exists(where):
        return [where]
    found, missing = set[str](), list[str]()
    for number, path in enumerate(_alternatives(where)):
        if number == MOST:
            raise BadValueError(f"--data.dir {where}: more than {MOST:,} paths. Expected a pattern of fewer.")
        # in square brackets there may be a year, and braces are expanded already
        matching = glob.glob(path.replace("[", "[[]")) if re.search(r"[*?]", path) else [path] * os.path.exists(path)
        found.update(matching)
        missing += [] if matching else [path]
    if remote := re.match(r"(s3|gs|az|https?):/(?=[^/])", where):  # as a pathlib.Path makes it
        raise MissingPathError(f"--data.dir {where}: no such folder. Did you mean {remote[0]}/{where[remote.end() :]}?")
    if missing == [where] and not re.search(r"[*?]", where):
        what = "file or folder" if os.path.splitext(where)[1] else "folder"
        raise MissingPathError(f"--data.dir {where}: no such {what}. Expected a folder of images, or an archive.")
    if not found:
        raise MissingPathError(f"--data.dir {where}: nothing matches this pattern. Expected archives, or a folder.")
    if missing:
        raise MissingPathError(
            f"--data.dir {where}: nothing at {first_few(missing)}.\nExpected an archive for each alternative in braces."
        )
    return sorted(found)


def select(pattern: str, names: Iterable[str]) -> list[str]:
    """Return those of some names that a pattern stands for, sorted.

    Raises:
        MissingPathError: There is none for it, or for one of the alternatives in braces.
    """
    names, found, missing = list(names), set[str](), list[str]()
    for one in _alternatives(pattern):
        words = "".join({"*": "[^/]*", "?": "[^/]"}.get(char, re.escape(char)) for char in one)
        matching = list(filter(re.compile(words).fullmatch, names))
        found.update(matching)
        missing += [] if matching else [one]
    if missing:
        raise MissingPathError(f"--data.dir {pattern}: nothing at {first_few(missing)}.\nExpected archives.")
    return sorted(found)


def archives_in(folder: str, suffixes: tuple[str, ...] = (".tar", ".zip")) -> list[str]:
    """Return the archives in a folder, sorted, if there are no folders and no images beside them."""
    found, selection = [], Selection()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if selection.is_image(entry.name) or entry.is_dir():
                    return []
                if entry.name.lower().endswith(suffixes):
                    found.append(entry.path)
    except OSError:  # the folder's own listing reports it
        return []
    return sorted(found)


def _alternatives(pattern: str) -> Iterator[str]:
    braces = BRACES.search(pattern)
    if not braces:
        yield pattern
        return
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    for word in _words(braces.group(1)):
        yield from _alternatives(f"{before}{word}{after}")


def _words(inside: str) -> Iterator[str]:
    if numbers := RANGE.fullmatch(inside):
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        for number in range(int(first), int(last) + 1):
            yield f"{number:0{width}}"
    else:
        yield from inside.split(",")
