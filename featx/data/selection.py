"""Which files in the data folder are images to read, and the line that counts the others."""

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence, Set

from torchvision.datasets.folder import IMG_EXTENSIONS

from featx.data import heif
from featx.errors import BadValueError, count

# Folders that Synology, macOS, Linux and Windows keep among people's files, in lower case.
SYSTEM_FOLDERS = ("@eadir", "__macosx", "lost+found", "$recycle.bin", "system volume information")
# Suffixes of images that torchvision does not have: --data.suffixes can add them.
OTHER_IMAGES = (".avif", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jp2", ".jpe")


class Selection:
    """Which images to read: suffixes in addition to torchvision's, and patterns of paths to leave out.

    Args:
        suffixes: Such as ``.jfif``, in upper or lower case.
        exclude: Patterns of the path below the data folder, such as ``*_mask.png`` and ``thumbs/*``, in which ``*``
            matches any characters, including ``/``.

    Attributes:
        exclude: The patterns.
        more: The suffixes in addition to torchvision's, in lower case.
        suffixes: All suffixes.

    Raises:
        BadValueError: The suffixes or patterns are not a list, or pillow-heif is missing.
    """

    def __init__(self, suffixes: Sequence[str] | None = None, exclude: Sequence[str] | None = None) -> None:
        self.exclude = _strings("exclude", exclude, '["*_mask.png","thumbs/*"]')
        self.more = [suffix.lower() for suffix in _strings("suffixes", suffixes, '[".jfif",".avif"]')]
        if wrong := [suffix for suffix in self.more if not re.fullmatch(r"\.[^./]+", suffix)]:
            raise BadValueError(f"--data.suffixes {wrong[0]}: expected suffixes with their dot, as '[.jfif,.avif]'.")
        if set(self.more) & set(heif.SUFFIXES) and not heif.is_installed():
            raise BadValueError(f"--data.suffixes {','.join(self.more)}: {heif.REMEDY}")
        self.suffixes = (*IMG_EXTENSIONS, *self.more)
        self._excluded = re.compile("|".join(map(fnmatch.translate, self.exclude)) or "(?!)")

    def is_image(self, name: str) -> bool:
        """Whether a name has the suffix of an image, in upper or lower case."""
        return name.lower().endswith(self.suffixes)

    def excludes(self, path: str) -> bool:
        """Whether to leave out a path below the data folder."""
        return self._excluded.match(path) is not None


def _strings(option: str, value: Sequence[str] | None, example: str) -> list[str]:
    """Return an option's value as a list; one that YAML could not parse arrives as a string."""
    if isinstance(value, str) and value.startswith("["):
        raise BadValueError(
            f"--data.{option} {value}: not a list: YAML gives a bare *, @, !, % or & another meaning.\n"
            f"Expected a list with each item in quotes, such as '{example}'."
        )
    return [value] if isinstance(value, str) else list(value or [])


def is_hidden(folder: str) -> bool:
    """Whether a folder, by its name, is one that systems keep among people's files."""
    return folder.startswith(".") or folder.lower() in SYSTEM_FOLDERS


class LeftOut:
    """What is in a data folder and not read.

    Args:
        selection: Which images to read.

    Attributes:
        images: The number of images in it, except those in system folders.
        suffixes: The number of files by other suffixes.
        files: The number of hidden files by name; those of macOS and iCloud by pattern.
        folders: The number of hidden and system folders by name.
        loops: Links to folders that they are in.
        unread: Why folders cannot be read, by path.
        excluded: The number of images left out by patterns.
        members: The number of members of archives by what is wrong with them, as a noun and more words.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self.images = self.excluded = 0
        self.suffixes, self.files, self.folders = Counter[str](), Counter[str](), Counter[str]()
        self.members = Counter[tuple[str, str]]()
        self.loops: list[str] = []
        self.unread: dict[str, str] = {}

    def takes(self, folder: str, name: str) -> bool:
        """Whether to read a file; one that is not an image, or is excluded, is counted.

        Args:
            folder: The path of its folder below the data folder, with / at its end, or ``""``.
            name: Its name.
        """
        if name.startswith(".") or not self._selection.is_image(name):
            self.add_file(name)
            return False
        return not self.excludes(folder + name)

    def excludes(self, path: str) -> bool:
        """Whether to leave out an image, which is counted."""
        excluded = self._selection.excludes(path)
        self.excluded += excluded
        return excluded

    def add_folder(self, name: str, files: Iterable[str]) -> None:
        """Count a hidden or system folder, and the images in a hidden one.

        Folders in it are not searched: a file server's ``.snapshot`` contains everything several times.

        Args:
            name: Its name.
            files: The names of the files that are directly in it; those of a system folder are not looked at.
        """
        self.folders[name] += 1
        if name.lower() not in SYSTEM_FOLDERS:
            self.images += sum(map(self._selection.is_image, files))

    def add_file(self, name: str) -> None:
        """Count a file that is hidden or not an image.

        ``._a.jpg`` is macOS's metadata of an image; ``.a.jpg.icloud`` replaces an image that is only in iCloud.
        """
        suffix = os.path.splitext(name)[1]
        if not name.startswith("."):
            self.suffixes[suffix or "none"] += 1
        else:
            self.files["._*" if name.startswith("._") else ".*.icloud" if suffix == ".icloud" else name] += 1
        known = (*self._selection.suffixes, *OTHER_IMAGES)
        self.images += not name.startswith("._") and name.removesuffix(".icloud").lower().endswith(known)

    def add_members(self, noun: str, what: str, number: int = 1, images: int = 0) -> None:
        """Count members of archives, ``noun`` and ``what`` in words, and the images among them."""
        if number:
            self.members[noun, what] += number
            self.images += images

    def describe(self, loose: int = 0, empty: Set[str] = frozenset()) -> str:
        """Return one line with all counts, or ``""``.

        Args:
            loose: The number of images beside the class folders.
            empty: Class folders without images.
        """
        empty = empty - {path.split("/")[0] for path in self.unread}
        unread = [f"{_short(path)}: {why}" for path, why in sorted(self.unread.items())]
        missed = [suffix for suffix in OTHER_IMAGES if suffix in map(str.lower, self.suffixes)]
        hint = f"; --data.suffixes '[{','.join(missed)}]' reads images" if missed else ""
        parts = (
            (self.excluded, "image", " by --data.exclude"),
            (loose, "image", " beside the class folders"),
            (self.suffixes.total(), "file", f" with other suffixes{_some(_often(self.suffixes), hint)}"),
            (len(empty), "class folder", f" without images{_some(sorted(empty))}"),
            (self.folders.total(), "hidden or system folder", _some(_often(self.folders))),
            (self.files.total(), "hidden file", _some(_often(self.files))),
            (len(self.loops), "link", f" back to a folder around{_some(sorted(self.loops))}"),
            (len(unread), "folder", f" that cannot be read{_some(unread)}"),
            *((number, noun, what) for (noun, what), number in self.members.items()),
        )
        return ", ".join(f"{count(number, noun)}{what}" for number, noun, what in parts if number)


def _often(names: Counter[str]) -> list[str]:
    return [name for name, _ in sorted(names.items(), key=lambda item: (-item[1], item[0]))]


def _short(path: str) -> str:
    return path if len(path) <= 80 else f"{path[:40]}…{path[-39:]}"


def _some(names: list[str], hint: str = "") -> str:
    return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}{hint})"
