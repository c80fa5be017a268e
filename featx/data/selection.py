"""Which names in the data folder are images that people mean, and what is said of the rest."""

import os
from collections import Counter

from torchvision.datasets.folder import IMG_EXTENSIONS

from featx.errors import count

# Folders that Synology, macOS, Linux and Windows keep among people's files, in small letters.
SYSTEM_FOLDERS = ("@eadir", "__macosx", "lost+found", "$recycle.bin", "system volume information")
# Images with suffixes that torchvision does not have: nothing takes them, but people miss them.
OTHER_IMAGES = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".dng")


def is_image(name: str) -> bool:
    """Whether a name has the suffix of an image, large or small."""
    return name.lower().endswith(IMG_EXTENSIONS)


class LeftOut:
    """What is found in a data folder and not taken.

    Attributes:
        images: How many images there are among it, thumbnails in system folders aside.
        suffixes: Files with other suffixes, by these.
        files: Hidden files, by name or by what names of their kind begin or end with.
        folders: Hidden and system folders, by name.
        loops: Links to a folder in which they lie themselves.
        unread: Folders that cannot be read, with why.
    """

    def __init__(self) -> None:
        self.images = 0
        self.suffixes, self.files, self.folders = Counter[str](), Counter[str](), Counter[str]()
        self.loops: list[str] = []
        self.unread: dict[str, str] = {}

    def add_folder(self, path: str) -> None:
        """Count a hidden or a system folder, and what a hidden one holds."""
        name = os.path.basename(path)
        self.folders[name] += 1
        if name.lower() not in SYSTEM_FOLDERS:
            self.images += sum(is_image(name) for _, _, names in os.walk(path) for name in names)

    def add_file(self, name: str) -> None:
        """Count a file that is hidden or is no image.

        ``._a.jpg`` is what macOS notes on an image; ``.a.jpg.icloud`` stands for one that iCloud has and this disk not.
        """
        suffix = os.path.splitext(name)[1]
        if not name.startswith("."):
            self.suffixes[suffix or "none"] += 1
        else:
            self.files["._*" if name.startswith("._") else ".*.icloud" if suffix == ".icloud" else name] += 1
        self.images += not name.startswith("._") and name.removesuffix(".icloud").lower().endswith(
            (*IMG_EXTENSIONS, *OTHER_IMAGES)
        )

    def describe(self, loose: int, empty: set[str]) -> str:
        """Say all of it in one line, or return nothing.

        Args:
            loose: How many images lie beside the class folders.
            empty: Class folders without images.
        """
        empty -= {path.split("/")[0] for path in self.unread}
        unread = [f"{_short(path)}: {why}" for path, why in sorted(self.unread.items())]
        parts = (
            (loose, "image", " beside the class folders", list[str]()),
            (self.suffixes.total(), "file", " with other suffixes", _often(self.suffixes)),
            (len(empty), "class folder", " without images", sorted(empty)),
            (self.folders.total(), "hidden or system folder", "", _often(self.folders)),
            (self.files.total(), "hidden file", "", _often(self.files)),
            (len(self.loops), "link", " back to a folder around", sorted(self.loops)),
            (len(unread), "folder", " that cannot be read", unread),
        )
        return ", ".join(f"{count(number, noun)}{what}{_some(names)}" for number, noun, what, names in parts if number)


def _often(names: Counter[str]) -> list[str]:
    return [name for name, _ in sorted(names.items(), key=lambda item: (-item[1], item[0]))]


def _short(path: str) -> str:
    return path if len(path) <= 80 else f"{path[:40]}…{path[-39:]}"


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""
