"""Folder -> images: find every file in ImageFolder's order, decode one to RGB, say what was left out."""

import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from featx.messages import BadValueError, ImageError, MissingPathError, UserError, count

ValueRange = tuple[float, float]

SIXTEEN_BITS: ValueRange = (0, 65535)


class ImageTree(ImageFolder):  # type: ignore[misc]
    """torchvision's ImageFolder, which also takes a flat folder and counts what it leaves out.

    Rows follow its order: class folders sorted, then the files of each sorted::

        root/
          cats/felix.jpg     row 0
          cats/tom.png       row 1
          dogs/old/rex.jpg   row 2

    A root without class folders is one class, named ``""``; folders in which there is no image do not count there,
    so that an output folder beside the photographs changes nothing. After
    https://github.com/pytorch/vision/blob/main/torchvision/datasets/folder.py and, for flat folders,
    https://github.com/pytorch/vision/issues/4925.

    Attributes:
        names: Paths of the images below ``root``, with ``/``, in the order of the rows.
        left_out: What was found and left out, in words, or ``""``.

    Args:
        root: The folder.

    Raises:
        MissingPathError: No such folder.
        BadValueError: A file in its place, or no image in it.
    """

    def __init__(self, root: str) -> None:
        check_folder(root)
        self._unknown: Counter[str] = Counter()
        self._loose: list[str] = []
        try:
            super().__init__(root, is_valid_file=self._is_image, allow_empty=True)
            samples: list[tuple[str, int]] = self.samples
            if not samples and self._loose:  # no class folder holds an image: a flat folder
                self._unknown.clear()
                self.classes, self.class_to_idx = [""], {"": 0}
                samples = self.make_dataset(root, self.class_to_idx, None, self._is_image, True)
                self._loose = []
        except OSError as err:
            raise UserError(f"--data.dir {root}: {err.strerror}: {err.filename}") from err
        prefix = len(os.path.join(root, ""))
        self.names = [path[prefix:].replace(os.sep, "/") for path, _ in samples]
        used = {label for _, label in samples}
        self._empty = [name for name, label in self.class_to_idx.items() if label not in used]
        # The tuples are not needed again, and a million of them are 200 MB.
        del self.samples, self.imgs, self.targets
        self.left_out = self._describe_left_out()
        if not self.names:
            found = f" It holds {self.left_out}." if self.left_out else ""
            known = " ".join(IMG_EXTENSIONS)
            raise BadValueError(
                f"--data.dir {root}: no image in it.{found}\n"
                f"Expected a folder of images, or of one folder a class, with the suffixes {known}."
            )

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        """Return the path of an image, to open it."""
        return os.path.join(str(self.root), self.names[index])

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the class folders; a folder without any is one class, named ``""``."""
        folders = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.name)
                elif self._is_image(entry.name):
                    self._loose.append(entry.name)
        if not folders:
            self._loose = []
            self._unknown.clear()  # make_dataset will see these files again
        classes = sorted(folders) or [""]
        return classes, {name: label for label, name in enumerate(classes)}

    def _is_image(self, path: str) -> bool:
        if path.lower().endswith(IMG_EXTENSIONS):
            return True
        name = os.path.basename(path)
        if not name.startswith("."):
            self._unknown[os.path.splitext(name)[1] or "none"] += 1
        return False

    def _describe_left_out(self) -> str:
        parts = []
        if self._loose:
            parts.append(f"{count(len(self._loose), 'image')} beside the class folders")
        if self._unknown:
            suffixes = ", ".join(suffix for suffix, _ in self._unknown.most_common(3))
            more = ", …" if len(self._unknown) > 3 else ""
            parts.append(f"{count(self._unknown.total(), 'file')} with other suffixes ({suffixes}{more})")
        empty = [name for name in self._empty if name]
        if empty:
            names = ", ".join(empty[:3]) + (", …" if len(empty) > 3 else "")
            parts.append(f"{count(len(empty), 'class folder')} without images ({names})")
        return ", ".join(parts)


def check_folder(root: str) -> None:
    """Raise MissingPathError or BadValueError unless there is a folder of that name."""
    if not os.path.exists(root):
        raise MissingPathError(f"--data.dir {root}: no such folder. Expected a folder of images.")
    if not os.path.isdir(root):
        raise BadValueError(
            f"--data.dir {root}: this is a file. Expected a folder of images, such as {os.path.dirname(root) or '.'}"
        )


def read_image(path: str, value_range: ValueRange | None = None) -> Image.Image:
    """Decode an image to 8-bit RGB, as ``Image.open(path).convert("RGB")`` does, but without its clipping above 8 bits.

    EXIF rotation is not applied; of an animation the first frame is taken. Grey values of 16 bits are scaled to
    0..255 from 0..65535, those of 32 bits (integer or float) from ``value_range``, and rounded; what lies outside
    of the range becomes black or white.

    Args:
        path: The file.
        value_range: The values of images above 8 bits that become black and white.

    Raises:
        ImageError: The file cannot be read.
        BadValueError: Its values need a ``value_range``, or one that was given cannot be applied.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on palettes and broken EXIF change no pixel
            with Image.open(path) as image:
                _check_depth(image, path, value_range)
                if _is_deep(image):
                    return _scale(image, path, value_range or SIXTEEN_BITS)
                return image.convert("RGB")
    except UserError:
        raise
    except Exception as err:  # PIL raises OSError, SyntaxError, ValueError, struct.error ... for broken files
        raise ImageError(f"{path}: {_reason(err, path)}") from err


def check_image(path: str, value_range: ValueRange | None = None) -> None:
    """Raise BadValueError if the file's header says that it needs a ``value_range``, and for no other fault."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                _check_depth(image, path, value_range)
    except UserError:
        raise
    except Exception:
        return  # read_image will say it, in its place


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _check_depth(image: Image.Image, path: str, value_range: ValueRange | None) -> None:
    # PIL gives 16-bit PGM as mode I, already scaled to 0..65535.
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if _is_deep(image) and not sixteen and value_range is None:
        kind = "float" if image.mode == "F" else "integer"
        raise BadValueError(
            f"{path}: 32-bit {kind} values (mode {image.mode}) have no black and white of their own.\n"
            "--data.value_range says which values those are, for instance --data.value_range [0,1]"
        )
    if value_range is not None and not _is_deep(image) and _packs_sixteen_bits(image):
        raise BadValueError(
            f"{path}: PIL reads only the upper 8 of the 16 bits of a colour image, so that --data.value_range "
            "cannot be applied to it. Convert it to 16-bit grey or 8-bit colour."
        )


def _packs_sixteen_bits(image: Image.Image) -> bool:
    return any(";16" in str(tile[3]) for tile in getattr(image, "tile", []))


def _scale(image: Image.Image, path: str, value_range: ValueRange) -> Image.Image:
    values = np.asarray(image).astype(np.float64)  # (H, W)
    if not np.isfinite(values).all():
        raise ImageError(f"{path}: holds values that are nan or infinite")
    low, high = value_range
    grey = np.rint(np.clip((values - low) * 255 / (high - low), 0, 255)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _reason(err: Exception, path: str) -> str:
    if isinstance(err, OSError) and err.strerror:
        return err.strerror
    if isinstance(err, UnidentifiedImageError):
        return "empty" if os.path.getsize(path) == 0 else "not an image that PIL can read"
    return f"{err} ({type(err).__name__})"
