"""Checks of the output before the first batch."""

import math
import os
import shutil
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from featx.data.batch import Images
from featx.errors import BadValueError, UserError, count, log, note, size_in_words
from featx.writer.disk import DiskError
from featx.writer.folder import UPDATE, LayerState
from featx.writer.formats import FORMATS, is_plain, row_name


def check_options(
    out_dir: str, format: object, formats: Sequence[str], dtype: str, update: bool, overwrite: bool
) -> None:
    """Raise BadValueError if an option of the FeatureWriter has a bad value, or does not go with another."""
    if not formats or set(formats) - FORMATS.keys():
        raise BadValueError(f"--writer.format {format}: expected csv, npy, parquet or a list such as '[csv,npy]'.")
    if dtype == "float16" and formats == ["csv"]:
        raise BadValueError("--writer.dtype float16: csv is always float32. Use --writer.format npy or parquet.")
    if update and overwrite:
        raise BadValueError(
            "--writer.update true: keeps the rows of unchanged images, and --writer.overwrite true removes them.\n"
            "Expected one of the two."
        )
    if "://" in out_dir:
        raise BadValueError(f"--writer.out_dir {out_dir}: expected a folder on a local or shared disk.")


def check_jobs(shard: str, overwrite: bool) -> None:
    """Raise BadValueError if an option does not go with ``--data.shard``."""
    if overwrite:
        raise BadValueError(
            f"--writer.overwrite true: with --data.shard {shard} each job would remove the others' rows.\n"
            "Remove the folder before you start the jobs, or use another --writer.out_dir."
        )


def check_limit(batches: float) -> None:
    """Raise BadValueError if the Trainer leaves out batches: 1.0 is all of them."""
    if batches != 1.0:
        raise BadValueError(
            f"--trainer.limit_predict_batches {batches}: rows would be missing. Use a folder with fewer images instead."
        )


def check_folder(folder: Path, formats: Iterable[str]) -> None:
    """Raise BadValueError if an output folder is a file or not writable; create nothing."""
    if folder.suffix[1:] in FORMATS and not folder.exists():
        raise BadValueError(
            f"--writer.out_dir {folder}: expected a folder, this looks like a file.\n"
            f"--writer.out_dir {folder.with_suffix('')} writes {folder.with_suffix('')}/LAYER{folder.suffix}."
        )
    parent = _existing_parent(folder)
    if not parent.is_dir():
        raise BadValueError(f"--writer.out_dir {folder}: {parent} is a file. Expected a folder.")
    for name in formats:
        FORMATS[name].check()
    if not os.access(parent, os.W_OK | os.X_OK) or not shutil.disk_usage(parent).total:  # /proc has no space
        raise BadValueError(f"--writer.out_dir {folder}: {parent} is not writable. Use another folder.")


def _existing_parent(folder: Path) -> Path:
    """Return the folder, or the nearest parent that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_shards(shard_rows: int | None, batch_size: int) -> None:
    """Raise BadValueError if shards are not whole batches, the unit that is distributed and resumed."""
    if shard_rows is not None and (shard_rows < 1 or shard_rows % batch_size):
        above = math.ceil(max(shard_rows, 1) / batch_size) * batch_size
        raise BadValueError(
            f"--writer.shard_rows {shard_rows}: expected a multiple of --data.batch_size {batch_size}, such as {above}."
        )


def check_space(
    folder: Path,
    states: Mapping[str, LayerState],
    images: Images,
    sample: Mapping[str, Tensor],
    processes: int,
    to_compute: int,
    updated: Container[str],
) -> int:
    """Check the size of the output against the free space, print both, and return the size in bytes.

    Args:
        folder: The output folder.
        states: The layers with work left.
        images: All images.
        sample: One row per layer, ``(1, D) float32``.
        processes: The number of processes; the parts of all but one are copied when they are joined.
        to_compute: The number of images whose rows are not in finished files.
        updated: The layers whose finished files stay until new ones are complete.

    Raises:
        DiskError: The output does not fit.
    """
    name = os.fsencode(row_name(images.names[0], next(iter(states.values())).identity["names"]))
    total = left = 0
    for layer, state in states.items():
        values = sample[layer].numpy()
        row = {part: len(format.encode([name], values)[0]) for part, format in state.parts.items()}
        rows = sum(row.values()) * to_compute
        folder_of_parts = state.folder / UPDATE if layer in updated else state.folder
        on_disk = sum(path.stat().st_size for part in state.parts for path in folder_of_parts.glob(f"*.{part}"))
        copied = rows * (processes - 1) // processes
        if state.sharded:  # only shards that several processes share are copied
            copied = min(copied, rows * len(state.shards[0].images) * (processes - 1) // len(images))
        # Formats whose parts are of another format are written when the rows are joined.
        made = sum(format.size(name, values) for format in state.formats if format.part not in format.suffixes)
        if layer in updated:  # all rows are copied, also from formats whose parts are of another format
            suffixes = {format.suffixes[0] for format in state.formats}
            copied = sum(size if part in suffixes else 2 * size for part, size in row.items()) * len(images)
        total += sum(format.size(name, values) for format in state.formats) * len(images)
        left += max(0, rows - on_disk) + copied + made * len(images)
    free = shutil.disk_usage(_existing_parent(folder)).free
    note("output", f"about {size_in_words(total)} in {folder}, {size_in_words(free)} free")
    if left > free:
        raise DiskError(
            f"--writer.out_dir {folder}: needs about {size_in_words(left)} more, its disk has {size_in_words(free)} "
            "free. Free some space, or use a folder on another disk."
        )
    return total


def check_same_images(where: str, digests: Sequence[str]) -> None:
    """Raise UserError if the processes have lists of images with different digests."""
    if len(set(digests)) > 1:
        raise UserError(f"--data.dir {where}: the processes see different images. The folder changed or is not shared.")


def check_seen(out_dir: str, seen: Sequence[bool]) -> None:
    """Raise UserError if a process does not see the files of process 0; ``seen`` is by rank."""
    if not all(seen):
        raise UserError(
            f"--writer.out_dir {out_dir}: rank {seen.index(False)} does not see what rank 0 writes there. "
            "Expected a folder that all machines share."
        )


def warn_of_names(paths: Sequence[str], names: str) -> None:
    """Warn of row names that simple CSV readers misread, and of names that several images share."""
    rows = [row_name(path, names) for path in paths]
    if quoted := sum(not is_plain(os.fsencode(name)) for name in rows):
        log.warning(
            "%s with a comma, a quote, a line break or a leading #: quoted in CSV, which DEMUD misreads",
            count(quoted, "name"),
        )
    if shared := [name for name, images in Counter(rows).items() if images > 1]:
        log.warning(
            "%s in several folders (%s%s): --writer.names relative tells the rows apart",
            count(len(shared), "file name"),
            os.fsencode(shared[0]).decode(errors="replace"),
            ", …" if len(shared) > 1 else "",
        )
