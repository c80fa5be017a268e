"""Folder -> images: find every file in ImageFolder's order, and say what was left out."""

import errno
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets import ImageFolder, VisionDataset

from featx.data.selection import LeftOut, Selection, is_hidden
from featx.data.sources.base import Names, Source, open_file
from featx.errors import BadValueError, ImageError, MissingPathError, UserError

LOOKED_AT = 256  # images of a list that another process made
NOT_READ = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)  # other errors may come from a failing disk


class _Folder:
    """What is directly in one folder: the names of its images, their sizes in bytes and times in ns; its folders."""

    def __init__(self, path: str) -> None:
        self.path = path  # below the root, with / at its end, or ""
        self.folders: list[str] = []
        self.names: list[str] = []
        self.sizes, self.stamps = array("q"), array("q")

    def add(self, name: str, size: int = -1, mtime: int = -1) -> None:
        self.names.append(name)
        self.sizes.append(size)
        self.stamps.append(mtime)

    def in_order(self) -> "_Folder":
        """Return a copy with the images sorted by name."""
        other = _Folder(self.path)
        for i in sorted(range(len(self.names)), key=self.names.__getitem__):
            other.add(self.names[i], self.sizes[i], self.stamps[i])
        return other


class ImageTree(Source, ImageFolder):  # type: ignore[misc]
    """torchvision's ImageFolder, which also takes a flat folder or a list, and counts what it leaves out.

    Rows follow its order: class folders sorted, in each the folders by their paths, in each the files::

        root/
          cats/felix.jpg     row 0
          cats/tom.png       row 1
          dogs/old/rex.jpg   row 2

    A root without class folders is one class, named ``""``; folders without images do not count as class folders, so
    that an output folder beside the photographs changes nothing. Hidden files and folders, whose names begin with a
    dot, and ``SYSTEM_FOLDERS`` are left out at any depth: they hold what systems keep beside photographs. After
    https://github.com/pytorch/vision/blob/main/torchvision/datasets/folder.py and, for flat folders,
    https://github.com/pytorch/vision/issues/4925.

    Unlike torchvision, it takes a folder that has an image's name and no images in it for that image, which then cannot
    be read; it does not follow links to folders that they are in, and leaves out folders below the root that it may not
    read, or whose path is too long.

    Args:
        root: The folder.
        files: A file that lists the images, one path below ``root`` per line, in the order of the rows, or the paths
            themselves; no other images are then looked for.
        selection: The suffixes of images, and which images to leave out.

    Raises:
        MissingPathError: There is no such folder, or no such list.
        BadValueError: It is a file, there is no image in it, or the list cannot be used.
        UserError: It cannot be read.
    """

    def __init__(self, root: str, files: str | Sequence[str] | None = None, selection: Selection | None = None) -> None:
        check_folder(root)
        VisionDataset.__init__(self, root)  # ImageFolder keeps one tuple per image: 200 MB per million
        self.where = root
        self.classes = [""]
        self._selection = selection or Selection()
        self._left = LeftOut(self._selection)
        self.names, self.sizes, self.stamps = _pack(self._find() if files is None else [self._listed(files)])
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        if not self.names:
            found = f" Left out: {self.left_out}." if self.left_out else ""
            known = " ".join(self._selection.suffixes)
            raise BadValueError(
                f"--data.dir {root}: no image in it.{found}\n"
                f"Expected a folder of images, or of one folder per class, with the suffixes {known}."
            )

    def read(self, places: Sequence[int]) -> Iterator[BinaryIO | Exception]:
        """Yield the files of some images, or why one cannot be opened."""
        for place in places:
            try:
                file: BinaryIO | Exception = open_file(self.path(place))
            except (OSError, ImageError) as err:
                file = err
            yield file

    @classmethod
    def restored(cls, root: str, images: Iterable[tuple[str, int, int]]) -> "ImageTree":
        """Return images that another process has listed: their paths, sizes and mtimes, in the order of the rows.

        Raises:
            BadValueError: One of some that are looked at is not in this folder, or is another.
        """
        check_folder(root)
        tree, folder = cls.__new__(cls), _Folder("")
        VisionDataset.__init__(tree, root)
        tree.where = root
        for image in images:
            folder.add(*image)
        tree.names, tree.sizes, tree.stamps = _pack([folder])
        tree.classes = list(dict.fromkeys(name.rpartition("/")[0].partition("/")[0] for name in folder.names))
        tree.class_to_idx = {name: label for label, name in enumerate(tree.classes)}
        for index in np.unique(np.linspace(0, len(tree) - 1, LOOKED_AT, dtype=np.int64)).tolist():
            if _look(tree.path(index)) != (tree.sizes[index], tree.stamps[index]):
                raise BadValueError(
                    f"--data.dir {root}: {tree.names[index]} is missing, or its size or time is not what the first job "
                    "found.\nExpected the same images for all jobs of a run."
                )
        return tree

    def is_lost(self) -> bool:
        """Whether nothing is left of the folder: it was removed, or its disk is gone."""
        with suppress(OSError), os.scandir(self.where) as entries:
            return next(entries, None) is None
        return True

    def _find(self) -> Iterator[_Folder]:
        """Yield the folders that hold images, in order, their images sorted; then describe what was left out."""
        top = self._scan("")
        classes = sorted(top.folders)
        used = set()
        for name in classes:
            for folder in self._walk(name):
                used.add(name)
                yield folder
        flat = False
        if not used:  # no class folder holds an image: a flat folder, if anything
            for name in filter(self._selection.is_image, classes):
                self._add(name, top)
            flat = bool(top.names)
        if flat:
            yield top.in_order()
        else:
            self.classes = classes or [""]
        loose = 0 if flat else len(top.names)
        self.left_out = self._left.describe(loose, set(self.classes) - used - {""})
        self.images_left_out = self._left.images + loose

    def _walk(self, name: str) -> list[_Folder]:
        """Return the folders that hold images, from a class folder down, sorted by their paths."""
        folders: dict[str, _Folder] = {}  # each before those that it holds
        waiting = [name]
        while waiting:
            path = waiting.pop()
            folders[path] = self._scan(path)
            waiting += [f"{path}/{child}" for child in folders[path].folders]
        holding = set()
        for path in reversed(folders):
            above, _, last = path.rpartition("/")
            if folders[path].names:
                holding.add(path)
            if path in holding:
                holding.add(above)
            elif above and self._selection.is_image(last):
                self._add(last, folders[above])
        return [folders[path].in_order() for path in sorted(folders) if folders[path].names]

    def _scan(self, path: str) -> _Folder:
        """Return what is directly in one folder."""
        folder = _Folder(f"{path}/" if path else "")
        try:
            with os.scandir(os.path.join(str(self.root), path)) as entries:
                for entry in entries:
                    self._sort_in(entry, folder)
        except OSError as err:
            if not path or err.errno not in NOT_READ:
                raise UserError(f"--data.dir {self.root}: {err.strerror}: {err.filename}") from err
            self._left.unread[path] = str(err.strerror)
        return folder

    def _sort_in(self, entry: os.DirEntry[str], folder: _Folder) -> None:
        name = entry.name
        if _is_folder(entry):
            if is_hidden(name):
                self._left.add_folder(name, _files_in(entry.path))
            elif entry.is_symlink() and self._leads_back(folder.path + name):
                self._left.loops.append(folder.path + name)
            else:
                folder.folders.append(name)
        elif self._left.takes(folder.path, name):
            folder.add(name, *_look(entry))

    def _add(self, name: str, folder: _Folder, file: str | None = None) -> None:
        """Add an image to its folder, unless it is excluded; without a file, the image is a folder."""
        if not self._left.excludes(folder.path + name):
            folder.add(name, *(_look(file) if file is not None else ()))

    def _listed(self, files: str | Sequence[str]) -> _Folder:
        folder = _Folder("")
        for name in read_list(files) if isinstance(files, str) else files:
            self._add(name, folder, os.path.join(str(self.root), name))
        self.left_out = self._left.describe(0, set())
        return folder

    def _leads_back(self, path: str) -> bool:
        parts = path.split("/")
        above = ["/".join(parts[:depth]) for depth in range(len(parts))]  # from the root, "", to its own folder
        root = str(self.root)
        return any(os.path.samefile(os.path.join(root, path), os.path.join(root, folder)) for folder in above)


def check_folder(root: str) -> None:
    """Raise MissingPathError or BadValueError unless this is a folder."""
    if not os.path.exists(root):
        raise MissingPathError(f"--data.dir {root}: no such folder. Expected a folder of images.")
    if not os.path.isdir(root):
        raise BadValueError(
            f"--data.dir {root}: this is a file. Expected a folder of images, such as {os.path.dirname(root) or '.'}"
        )


def check_list(path: str) -> None:
    """Raise MissingPathError unless the list exists."""
    if not os.path.exists(path):
        raise MissingPathError(f"--data.files {path}: no such file. Expected a list of images, one path per line.")


def read_list(path: str) -> list[str]:
    """Return the paths of a list of images, one per line, in its order, each as ``a/b.jpg``.

    Raises:
        MissingPathError: There is no such file.
        BadValueError: There is no path in it, one twice, or one that is not below the data folder.
        UserError: It cannot be read.
    """
    check_list(path)
    try:
        with open(path, "rb") as file:
            lines = file.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as err:
        raise UserError(f"--data.files {path}: {err.strerror}. Expected a list of images, one path per line.") from err
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.removesuffix(b"\r").decode("utf-8", "surrogateescape")
        if not words.strip():
            continue
        where = f"--data.files {path}, line {number}: {words[:200]!r}"
        if os.path.isabs(words) or ".." in words.split("/") or "\0" in words:
            raise BadValueError(f"{where} is not below --data.dir.\nExpected paths below it, such as cats/felix.jpg.")
        name = os.path.normpath(words)
        if name in seen:
            raise BadValueError(f"{where} is already in line {seen[name]}.\nExpected each image once.")
        seen[name] = number
    if not seen:
        raise BadValueError(f"--data.files {path}: no path in it. Expected one path below --data.dir per line.")
    return list(seen)


def _pack(folders: Iterable[_Folder]) -> tuple[Names, NDArray[np.int64], NDArray[np.int64]]:
    blob, ends, sizes, stamps = bytearray(), array("q", [0]), array("q"), array("q")
    for folder in folders:
        for name in folder.names:
            blob += (folder.path + name).encode("utf-8", "surrogateescape")
            ends.append(len(blob))
        sizes += folder.sizes
        stamps += folder.stamps
    return Names(bytes(blob), np.array(ends, "<i8")), np.array(sizes, "<i8"), np.array(stamps, "<i8")


def _look(path: str | os.DirEntry[str]) -> tuple[int, int]:
    """Return a file's size in bytes and its mtime in ns, -1 for each if it cannot be looked at."""
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _files_in(path: str) -> Iterator[str]:
    """Yield the names of a folder's files; it is read when the first is asked for."""
    yield from next(os.walk(path), ("", [], []))[2]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
