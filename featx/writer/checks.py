"""What of the output can be found wrong before the first batch."""

import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from featx.data.batch import Images
from featx.errors import BadValueError, count, log, note, size_in_words
from featx.writer.disk import DiskError
from featx.writer.folder import LayerState
from featx.writer.formats import FORMATS, is_plain, row_name


def check_folder(folder: Path, formats: Iterable[str]) -> None:
    """Raise BadValueError where an output folder is a file or cannot be written to; nothing is made yet."""
    if folder.suffix[1:] in FORMATS and not folder.exists():
        raise BadValueError(
            f"--writer.out_dir {folder}: expected a folder, this looks like a file.\n"
            f"--writer.out_dir {folder.with_suffix('')} writes {folder.with_suffix('')}/LAYER{folder.suffix}."
        )
    nearest = _nearest(folder)
    if not nearest.is_dir():
        raise BadValueError(f"--writer.out_dir {folder}: {nearest} is a file. Expected a folder.")
    for name in formats:
        FORMATS[name].check()
    if not os.access(nearest, os.W_OK | os.X_OK) or not shutil.disk_usage(nearest).total:  # /proc has no space
        raise BadValueError(f"--writer.out_dir {folder}: {nearest} cannot be written to.")


def _nearest(folder: Path) -> Path:
    """Return the folder or, until it is made, what is there of its path."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_shards(shard_rows: int | None, batch_size: int) -> None:
    """Raise BadValueError where shards are not whole batches, which are what is dealt and resumed."""
    if shard_rows is not None and (shard_rows < 1 or shard_rows % batch_size):
        above = math.ceil(max(shard_rows, 1) / batch_size) * batch_size
        raise BadValueError(
            f"--writer.shard_rows {shard_rows}: expected a multiple of --data.batch_size {batch_size}, as {above}."
        )


def check_space(
    folder: Path, states: Mapping[str, LayerState], images: Images, sample: Mapping[str, Tensor], processes: int
) -> int:
    """Hold the size of the output against the free space, tell both, and return the size in bytes.

    Args:
        folder: The output folder.
        states: The layers with something to do.
        images: All images.
        sample: A row of each layer, ``(1, D) float32``.
        processes: How many write a part; those of all but one are copied at the end.

    Raises:
        DiskError: It cannot fit.
    """
    name = os.fsencode(row_name(images.names[0], next(iter(states.values())).identity["names"]))
    needed = left = 0
    for layer, state in states.items():
        values = sample[layer].numpy()
        rows = sum(len(format.encode([name], values)[0]) for format in state.parts.values()) * len(images)
        there = sum(path.stat().st_size for part in state.parts for path in state.folder.glob(f"*.{part}"))
        copied = rows * (processes - 1) // processes
        if state.sharded:  # of each process at most a shard that it began within
            copied = min(copied, rows * len(state.shards[0].images) * (processes - 1) // len(images))
        made = sum(format.size(name, values) for format in state.formats if format.part not in format.suffixes)
        needed += sum(format.size(name, values) for format in state.formats) * len(images)
        left += max(0, rows - there) + copied + made * len(images)  # such are written when the rows are joined
    free = shutil.disk_usage(_nearest(folder)).free
    note("output", f"about {size_in_words(needed)} in {folder}, {size_in_words(free)} free")
    if left > free:
        raise DiskError(
            f"--writer.out_dir {folder}: about {size_in_words(left)} more are needed, "
            f"{size_in_words(free)} are free on its disk. Free some, or give a folder on another."
        )
    return needed


def warn_of_names(paths: Sequence[str], names: str) -> None:
    """Warn of rows' names that simple readers of CSV do not get back, and of such as several images have."""
    rows = [row_name(path, names) for path in paths]
    odd = sum(not is_plain(os.fsencode(name)) for name in rows)
    if odd:
        log.warning(
            "%s with a comma, a quote, a line break or a leading #: quoted as CSV wants it, DEMUD misreads it",
            count(odd, "name"),
        )
    twice = [name for name, times in Counter(rows).items() if times > 1] if len(set(rows)) < len(rows) else []
    if twice:
        log.warning(
            "%s in several folders (%s%s): --writer.names relative tells the rows apart",
            f"{count(len(twice), 'file name')} {'stands' if len(twice) == 1 else 'stand'}",
            os.fsencode(twice[0]).decode(errors="replace"),
            ", …" if len(twice) > 1 else "",
        )
