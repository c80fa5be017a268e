"""A folder of images -> counts of what is in it: all headers, and the faults of some images, or all, decoded."""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from featx.data import header
from featx.data.batch import Batch, Remark, Remarks
from featx.data.header import Header
from featx.data.module import FIRST, ImageFolderDataModule
from featx.data.preprocess import Preprocessing
from featx.data.sources import find
from featx.process.cores import usable_cores

CHUNK = 256  # images that are looked at together


class Overview:
    """What is in a folder of images.

    Args:
        data: The folder, and the options that say how images are read.
        decode_all: Whether to decode all images, not only some from all parts of the folder and the first of each kind.

    Attributes:
        data: As given.
        images: The images.
        found: By category, such as ``format``, and by value, such as ``JPEG``: how many images, and the first one.
        sizes: Width and height of each image in pixels, ``(N, 2) int32``; 0 if its header cannot be read.
        decoded: How many images were decoded.

    Raises:
        UserError: There is no image in the folder, or no folder.
    """

    def __init__(self, data: ImageFolderDataModule, decode_all: bool = False) -> None:
        self.data = data
        self.images = data.images = find(
            data.dir, data.files, data.selection, data.column, retry_seconds=data.retry_seconds
        )
        data.batch_size = 1  # a batch is an image
        self.found: dict[str, Remarks] = defaultdict(dict)
        self.sizes = np.zeros((len(self.images), 2), np.int32)
        self.decoded = 0
        self._step = 1 if decode_all else -(-len(self.images) // FIRST)
        self._kinds = set[tuple[object, ...]]()

    def look(self) -> None:
        """Read all headers and decode some images or all, with a progress bar on a terminal."""
        total, preset = len(self.images), Preprocessing.usual()
        with (
            ThreadPoolExecutor(usable_cores()) as pool,
            tqdm(total=total, unit=" images", leave=False, disable=None) as bar,
        ):
            for begin in range(0, total, CHUNK):
                places = range(begin, min(begin + CHUNK, total))
                headers = pool.map(self._header, places, self.images.read(places))
                to_decode = [
                    place for place, read in zip(places, headers, strict=True) if self._add_header(place, read)
                ]
                bar.update(len(places) - len(to_decode))
                for batch in pool.map(lambda place: self.data.read_batch(place, preset), to_decode):
                    self._add_decoded(batch)
                    bar.update()

    def distinct_sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the sizes that images have, ``(S, 2)``, most frequent first, and how many have each, ``(S,)``."""
        known = self.sizes[self.sizes.any(axis=1)].astype(np.int64)
        packed, times = np.unique(known @ [1 << 32, 1], return_counts=True)
        order = np.argsort(-times, kind="stable")
        return np.stack(np.divmod(packed[order], 1 << 32), axis=1), times[order]

    def _header(self, place: int, file: BinaryIO | Exception) -> Header | None:
        if isinstance(file, Exception):
            return None
        with file, suppress(Exception):  # decoding it says why, or reads it nevertheless
            if not self.data.view.reader:  # which alone knows what is in a file
                return header.read(file, self.images.names[place], self.data.view.page)
        return None

    def _add_header(self, place: int, read: Header | None) -> bool:
        """Count what a header says, and return whether to decode the image."""
        view = self.data.view
        if read is None:
            return not view.reader or place % self._step == 0
        name, kind = self.images.names[place], (read.format, read.color, read.depth, read.has_alpha)
        self.sizes[place] = read.width, read.height
        found = {"format": read.format, "color": read.color, "depth": read.depth, "profile": read.profile}
        if read.orientation != 1:
            found["orientation"] = str(read.orientation)
        if read.has_alpha:
            found["transparency"] = read.format
        if read.has_more:
            found["pages" if read.format == "TIFF" else "frames"] = read.format
        for category, value in found.items():
            self._add(category, value, name)
        is_new = kind not in self._kinds
        self._kinds.add(kind)
        fails = (read.needs_range and not view.value_range) or (read.needs_bands and not view.bands)
        return fails or is_new or place % self._step == 0

    def _add_decoded(self, batch: Batch) -> None:
        self.decoded += 1
        for fault in batch.faults:
            self._add("unreadable", f"{fault.reason}{' (used)' if fault.used else ''}", fault.path)
        for kind, remark in batch.remarks.items():
            self._add("remarks", kind, remark["first"])

    def _add(self, category: str, value: str, name: str) -> None:
        if value:
            self.found[category].setdefault(value, Remark(images=0, first=name))["images"] += 1
