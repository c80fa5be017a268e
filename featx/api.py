"""``featx.extract``: features from Python in one line, in memory or to files, with the command line's options."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice, tee
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch.utils.data import Dataset

from featx.commands import options as command_line
from featx.data.batch import Batch, Fault, Remarks, Sample, add_up, report, with_zero_rows
from featx.data.decode import describe
from featx.data.module import Collate, ImageFolderDataModule
from featx.data.pillow import to_rgb
from featx.data.sources import find
from featx.data.sources.dataset import items, picture_of
from featx.errors import SEE, BadValueError, ImageError, did_you_mean, either
from featx.model.extractor import FeatureExtractor
from featx.model.layers import DEFAULT
from featx.process.lightning import NOTHING_TO_COMPUTE, PLAIN, keep_default_dtype, keep_signals, make_trainer
from featx.process.progress import Progress
from featx.process.shared import Shared, ignored, on_one_core
from featx.results import load, stack
from featx.run import prepare, set_up
from featx.writer.callback import FeatureWriter
from featx.writer.folder import file_name, read_errors
from featx.writer.formats import Floats, row_name

Source = str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | Iterable[Image.Image] | Dataset[Any]
# which warn about each other
LIBRARIES = r"(lightning|torch|torchvision|torchmetrics|timm|transformers|open_clip|huggingface_hub|jsonargparse)\b"
NOT_HERE = ("dir", "out_dir", "layer", "on_error", "dry_run", "shard")  # extract's own parameters, or useless in it


def extract(
    source: Source,
    layer: str | list[str] = "auto",
    *,
    out_dir: str | os.PathLike[str] | None = None,
    errors: Literal["raise", "return"] = "raise",
    model: type[FeatureExtractor] = FeatureExtractor,
    **options: Any,
) -> tuple[Any, ...]:
    """Compute the features of images, in memory or to files.

    Options of the command line, such as ``--data.batch_size 32``, are keywords::

        names, values = featx.extract("photos", layer="fc7", weights="alexnet.pth", batch_size=32)

    Args:
        source: A folder of images, an archive or a table; or paths of images; or PIL images, which are named 0, 1, 2
            ...; or a map-style Dataset of torch, or one of Hugging Face, that has PIL images, alone or beside labels.
        layer: A layer, or a list of layers; auto: fc7, or embedding of a network without it.
        out_dir: Write files there and continue an interrupted run, as ``featx predict`` does; only for a folder.
        errors: For images that cannot be read: ``raise`` the first one, or ``return`` them all.
        model: A subclass of FeatureExtractor.
        options: The command line's options without their group, such as ``arch``, ``pool``, ``resize``, ``devices``
            (default 1), and with ``out_dir`` also ``format``, ``header`` ... Two groups have ``strict``: use
            ``model_strict`` and ``data_strict``.

    Returns:
        The names of the rows, a list, and their values, ``(N, D) float32``, in the same order; for a list of layers
        and for ``PATH:all`` a dict of values by layer. ``errors="return"`` adds a third: the list of images that cannot
        be read, each with ``path``, ``reason`` and ``exception``; only those that were ``used`` anyway have a row.
        With ``out_dir`` the values come from the first format; an npy file stays on disk, mapped read-only, unless
        there are several shards.

    Raises:
        ImageError: An image cannot be read; with ``out_dir``, raised after the files are written.
        ValueError: An option cannot be used.
        FileNotFoundError: A folder, a list or a file of weights does not exist.
        OSError: The disk failed.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker, as it imports the script again
        sys.exit(
            "featx.extract: on this system data workers import the script, which calls it again.\n"
            "Call it below if __name__ == '__main__', or with num_workers=0."
        )
    if errors not in ("raise", "return"):
        raise BadValueError(f"errors={errors!r}: expected 'raise' or 'return'.")
    dir = os.fspath(source) if isinstance(source, str | os.PathLike) else ""
    if out_dir is not None and not dir:
        raise BadValueError(
            f"out_dir={str(out_dir)!r}: expected a folder, an archive or a table as source. Select a folder's images "
            "with files=."
        )
    owners = {"model": model, "data": ImageFolderDataModule, "writer": FeatureWriter}
    with QUIET, on_one_core():
        parser = command_line.Parser(default_env=False)  # which checks types and choices
        for group, owner in owners.items():
            parser.add_class_arguments(owner, group)
        known = {group: list(parser.get_defaults()[group].as_dict()) for group in owners}  # with a subclass's **options
        groups = _sort_in(options, known, out_dir is not None)
        groups["model"]["layer"], groups["data"]["dir"] = layer, dir
        if out_dir is not None:
            groups["writer"]["out_dir"] = os.fspath(out_dir)
        trainer_options = groups.pop("trainer")
        made = parser.instantiate_classes(parser.parse_object(groups))
        if out_dir is not None:
            names, features, faults = _to_files(made, trainer_options)
        else:
            names, features, faults = _in_memory(source, made, trainer_options, errors == "raise")
    lost = [fault for fault in faults if not fault.used]
    if lost and errors == "raise":
        raise ImageError(
            f"{len(lost)} of {len(lost) + len(names):,} images cannot be read, the first is {lost[0].path}: "
            f"{lost[0].reason}\nThe files have the others. errors='return' returns their rows and these errors."
        )
    several = not isinstance(layer, str) or (layer != DEFAULT and layer not in features)  # PATH:all
    values = features if several else next(iter(features.values()))
    return (names, values, faults) if errors == "return" else (names, values)


def _sort_in(options: dict[str, Any], names: dict[str, list[str]], files: bool) -> dict[str, dict[str, Any]]:
    """Return keywords by the command line's groups; ``names`` are those of the options of each."""
    homes = [("trainer", name) for name in command_line.TRAINER]
    homes += [(group, name) for group, of_group in names.items() for name in of_group]
    often = Counter(name for _, name in homes)
    known = {
        f"{group}_{name}" if often[name] > 1 else name: (group, name)
        for group, name in homes
        if name not in NOT_HERE and (files or group != "writer" or name == "names")
    }
    groups: dict[str, dict[str, Any]] = {group: {} for group in ("trainer", *names)}
    for word, value in options.items():
        if word not in known:
            near = [whole for whole, (_, name) in known.items() if name == word]
            hint = f" Did you mean {either(near)}?" if near else did_you_mean(word, known)
            if ("writer", word) in homes and often[word] == 1 and not files:
                hint = " It applies to files: add out_dir."
            raise BadValueError(f"{word}={value!r}: no such option.{hint}\n{SEE}")
        group, name = known[word]
        groups[group][name] = os.fspath(value) if isinstance(value, os.PathLike) else value
    return groups


def _trainer(given: dict[str, Any], rows: Callback, progress: Progress) -> Trainer:
    options: dict[str, Any] = {"devices": 1, "callbacks": [rows, progress]} | PLAIN | given
    trainer = make_trainer(partial(Trainer, **options), given, forks=True)
    keep_signals(trainer)
    keep_default_dtype(trainer)
    return trainer


def _to_files(made: Any, trainer_options: dict[str, Any]) -> tuple[list[str], dict[str, Floats], list[Fault]]:
    writer: FeatureWriter = made.writer
    trainer = _trainer(trainer_options, writer, Progress())
    if prepare(trainer, made.model, made.data, writer):
        _predict(trainer, made.model, datamodule=made.data)
        writer.wait()
    folder, names, features, faults = Path(writer.out_dir), list[str](), {}, list[Fault]()
    for layer in made.model.layers:
        file = f"{file_name(layer)}/*.{writer.formats[0]}" if writer.shard_rows else file_name(layer, writer.formats[0])
        names, features[layer] = load(folder / file, mmap=True)
        faults = read_errors(folder / file_name(layer, "errors.csv"))
    return names, features, faults


def _in_memory(
    source: Any, made: Any, trainer_options: dict[str, Any], stop: bool
) -> tuple[list[str], dict[str, Floats], list[Fault]]:
    rows = _Rows(stop)
    trainer = _trainer(trainer_options, rows, Progress(len(source) if isinstance(source, Sized) else 0))
    if trainer.world_size > 1:
        raise BadValueError(
            f"devices={trainer_options.get('devices')!r}: each process would return only its share of the rows.\n"
            "With out_dir= they write one file, and each returns all rows."
        )
    data: ImageFolderDataModule = made.data
    if pictures := _pictures(source, data):
        samples, ahead = tee(_samples(pictures, data, made.model))
        set_up(made.model, data, ahead)
        del ahead  # tee would keep every sample for it
        _predict(trainer, made.model, dataloaders=_batches(samples, data.batch_size))
    else:
        data.check()
        set_up(made.model, data)
        _predict(trainer, made.model, datamodule=data)
    names = [row_name(name, made.writer.names) for name in rows.names]
    return names, {layer: stack(rows.chunks[layer]) for layer in made.model.layers}, rows.faults


def _pictures(source: Any, data: ImageFolderDataModule) -> Iterator[Any] | None:
    """Return PIL images, or None if the source is paths, which then go to the data module."""
    if isinstance(source, str | os.PathLike):
        return None
    if isinstance(source, Mapping):
        parts = ", ".join(map(str, source))
        raise BadValueError(f"source: a {type(source).__name__} of {parts}. Expected one of them, as source[...].")
    images = items(source, data.column)
    first = next(images, None)
    if first is None:
        raise BadValueError("source: nothing in it. Expected a folder, paths of images, or PIL images.")
    if not isinstance(first, str | os.PathLike):
        return chain([first], images)
    paths = [os.path.abspath(path) for path in chain([first], images)]
    data.dir = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = [os.path.relpath(path, data.dir) for path in paths]
    data.images = find(data.dir, names, data.selection, data.column)
    return None


def _samples(pictures: Iterator[Any], data: ImageFolderDataModule, model: FeatureExtractor) -> Iterator[Sample]:
    """Yield PIL images, or items of a dataset, as the data module's samples; the model must be configured."""
    preprocessing = data.preprocessing(model.preprocessing)
    for index, item in enumerate(pictures):
        name, pixels, fault = str(index), None, None
        picture = item if isinstance(item, Exception) else picture_of(item, name, data.column)
        try:
            if isinstance(picture, Exception):
                raise picture
            pixels = preprocessing.to_tensor(to_rgb(picture, data.view), data.decoder)
        except Exception as err:  # PIL may decode it only now
            fault = describe(err, name, name)
        yield Sample(index, name, pixels, fault)


def _batches(samples: Iterator[Sample], batch_size: int) -> Iterator[Batch]:
    collate = Collate(batch_size)
    while some := list(islice(samples, batch_size)):
        yield collate(some)


class _Rows(Callback):
    """Collects rows in memory."""

    def __init__(self, stop: bool) -> None:
        self.stop = stop  # at the first image that cannot be read
        self.names: list[str] = []
        self.faults: list[Fault] = []
        self.remarks: Remarks = {}
        self.chunks: dict[str, list[Floats]] = defaultdict(list)
        self.zeros: dict[str, Remarks] = defaultdict(dict)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        lost = [fault for fault in batch.faults if not fault.used]
        if lost and self.stop:
            raise ImageError(
                f"{lost[0].path}: {lost[0].reason} ({lost[0].exception})\n"
                "errors='return' continues, and returns such images besides the rows."
            )
        self.names += batch.names
        self.faults += batch.faults
        self.remarks = add_up([self.remarks, batch.remarks])
        for layer, rows in outputs.items():
            self.chunks[layer].append(values := rows.cpu().numpy())
            if pl_module.normalize:
                found = with_zero_rows(batch._replace(remarkable={}), values).remarks
                self.zeros[layer] = add_up([self.zeros[layer], found])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        report(self.remarks)
        for layer, remarks in self.zeros.items():
            report(remarks, layer)


def _predict(trainer: Trainer, model: FeatureExtractor, **data: Any) -> None:
    # Lightning ignores Ctrl-C after the first, and a DataLoader with workers leaves its own handler of SIGCHLD
    numbers = {signal.SIGINT, getattr(signal, "SIGCHLD", signal.SIGINT)}
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        trainer.predict(model, return_predictions=False, **data)
    except SystemExit as err:
        if isinstance(err.__context__, KeyboardInterrupt):  # Lightning turns it into the end of the process
            raise KeyboardInterrupt from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's banners and tips."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))}
    try:
        for logger in levels:
            logger.setLevel(logging.WARNING)
        nothing = ignored("", UserWarning, message=NOTHING_TO_COMPUTE)
        with ignored("", PossibleUserWarning), ignored(LIBRARIES, FutureWarning, DeprecationWarning), nothing:
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


QUIET = Shared(_quiet)
