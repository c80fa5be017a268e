"""Members of archives -> the images in the folder that they would be unpacked to, as ``ImageTree`` finds them."""

import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from featx.data.selection import LeftOut, Selection, is_hidden
from featx.data.sources.members import FOLDER, LINK, SPARSE, SPECIAL, Members

Places = NDArray[np.uint32]
NOT_FILES = {LINK: "link", SPARSE: "sparse file", SPECIAL: "special file"}


class _Found(NamedTuple):
    """The images of one archive, by their places in it.

    Attributes:
        members: What is in the archive.
        loose: Images that are in no folder, in order.
        inside: Images in folders, in order.
        folders: Folders at the top that have an image's name.
    """

    members: Members
    loose: Places
    inside: Places
    folders: list[int]


class Unpacked:
    """Which members of archives are the images to read; all archives are judged together.

    Args:
        selection: The suffixes of images, and which images to leave out.
        column: The one to read of the files of a sample in WebDataset's sense; None: all images.

    Attributes:
        classes: Names of the class folders, sorted, or ``[""]``.
        left_out: One line that counts what was left out, or ``""``.
        images_left_out: How many images that is.
        columns: How many images are in other columns, by column.
    """

    def __init__(self, selection: Selection, column: str | None = None) -> None:
        self.classes = [""]
        self.left_out, self.images_left_out = "", 0
        self.columns = Counter[str]()
        self._selection, self._column, self._left = selection, column and column.lower(), LeftOut(selection)
        self._tops, self._used = set[str](), set[str]()  # class folders, and those with images
        self._found = list[_Found]()

    def add(self, members: Members) -> None:
        """Look at all members of an archive."""
        kept, nested, tops = array("I"), list[tuple[str, int]](), list[int]()
        hidden, holding = defaultdict[str, list[str]](list), {""}
        last, within, loose = "", "", 0
        for path, place in members.in_order():
            folder, slash, name = path.rpartition("/")
            if folder != last:
                last, within = folder, _hidden_part(folder)
            kind = members.kinds[place]
            if within:
                if folder == within and kind != FOLDER:
                    hidden[within].append(name)
            elif kind == FOLDER:
                if is_hidden(name):
                    hidden[path] = []
                elif not slash:
                    self._tops.add(name)
                    tops += [place] * self._selection.is_image(name)
                elif self._selection.is_image(name):
                    nested.append((path, place))
                    kept.append(place)
            elif kind < 0:
                self._left.add_members(NOT_FILES[kind], " in archives", images=self._selection.is_image(name))
            elif self._takes(folder + slash, name):
                kept.append(place)
                loose += not slash
                if folder not in holding:
                    holding.update(_with_parents(folder))
        for path, files in hidden.items():
            self._left.add_folder(os.path.basename(path), files)
        full = set[int]()
        for path, place in sorted(nested, key=lambda item: -item[0].count("/")):  # what is in a folder before it
            if path in holding or self._left.excludes(path):
                full.add(place)
            else:
                holding.update(_with_parents(path.rpartition("/")[0]))
        places = np.array([place for place in kept if place not in full] if full else kept, np.uint32)
        self._left.add_members("member", f" with the name of a later one ({members.duplicate})", members.duplicates)
        self._left.add_members("member", " whose path leads out of the archive", members.outside)
        self._left.add_members("byte", " after the end of an archive", members.after)
        self._used |= holding & self._tops
        self._found.append(_Found(members, places[:loose], places[loose:], tops))

    def rows(self) -> Iterator[Places]:
        """Yield the places of each archive's rows, in order, and then know the classes and what is left out."""
        if not self._used:  # no class folder holds an image: a flat folder, if anything
            self._found = [self._with_folders(found) for found in self._found]
        loose = sum(len(found.loose) for found in self._found)
        is_flat = not self._used and loose > 0
        self.classes = [""] if is_flat else sorted(self._tops) or [""]
        empty = set[str]() if is_flat else self._tops - self._used
        self.left_out = self._left.describe(0 if is_flat else loose, empty)
        self.images_left_out = self._left.images + (0 if is_flat else loose)
        for found in self._found:
            yield found.loose if is_flat else found.inside

    def _with_folders(self, found: _Found) -> _Found:
        """Return an archive with the folders at the top that have an image's name as images that cannot be read."""
        more = [place for place in found.folders if not self._left.excludes(found.members.name(place))]
        loose = sorted([*found.loose.tolist(), *more], key=found.members.name) if more else found.loose
        return found._replace(loose=np.array(loose, np.uint32))

    def _takes(self, folder: str, name: str) -> bool:
        if self._column is None or name.startswith("."):
            return self._left.takes(folder, name)
        column = name.partition(".")[2].lower()
        if column != self._column:
            if self._selection.is_image(name):
                self.columns[column] += 1
            self._left.add_members("file", " of other columns", images=self._selection.is_image(name))
            return False
        return not self._left.excludes(folder + name)


def _hidden_part(folder: str) -> str:
    """Return the path of the first hidden or system folder on the way to a folder, or ""."""
    parts = folder.split("/")
    return next(("/".join(parts[: i + 1]) for i, part in enumerate(parts) if is_hidden(part)), "")


def _with_parents(folder: str) -> Iterator[str]:
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]
