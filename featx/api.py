"""From Python in one line: ``featx.extract``, the command line's options as keywords, in memory or to files."""

import csv
import inspect
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from featx import options as command_line
from featx.datamodule import Batch, ImageFolderDataModule
from featx.decode import Fault, describe, to_rgb
from featx.extractor import FeatureExtractor
from featx.formats import Floats
from featx.images import ImageTree
from featx.messages import BadValueError, ImageError, did_you_mean
from featx.options import TRAINER
from featx.predict import prepare, refusal
from featx.reader import load, stack
from featx.state import ERRORS_HEADER, USED, file_name
from featx.writer import FeatureWriter

Source = str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | Iterable[Image.Image]
NOT_HERE = ("dir", "out_dir", "layer", "on_error", "dry_run")  # parameters of extract, or of no use in it


def extract(
    source: Source,
    layer: str | list[str] = "fc7",
    *,
    out_dir: str | os.PathLike[str] | None = None,
    errors: Literal["raise", "return"] = "raise",
    model: type[FeatureExtractor] = FeatureExtractor,
    **options: Any,
) -> tuple[Any, ...]:
    """Compute the features of images, in memory or to files.

    As one line, and with what ``--data.batch_size 32`` is on the command line::

        names, values = featx.extract("photos", layer="fc7", weights="alexnet.pth", batch_size=32)

    Args:
        source: A folder of images; or paths of images; or PIL images, taken as they come, which are named 0, 1, 2 ...
        layer: A layer, or a list of them.
        out_dir: Write files there, as ``featx predict`` does, and go on where a run was ended; only of a folder.
        errors: What images that cannot be read do: raise the first, or return them all.
        model: A subclass of FeatureExtractor.
        options: The command line's options without their group, as ``arch``, ``pool``, ``resize``, ``devices`` (1,
            unless given), and with ``out_dir`` also ``format``, ``header`` ...; of ``strict``, which two groups have,
            ``model_strict`` and ``data_strict``.

    Returns:
        The names of the rows as a list, and their values, ``(N, D) float32``, in the same order; for a list of layers
        a dict of values by layer. With ``errors="return"`` a list of the images that cannot be read stands behind,
        each with ``path``, ``reason`` and ``exception``; all but those that were ``used`` all the same have no row.
        With ``out_dir`` the values are those of the first format; npy's stay on disk, mapped read-only, but for those
        of several shards.

    Raises:
        ImageError: An image cannot be read; with ``out_dir`` after the files were written.
        ValueError: An option cannot be used; its message has the command line's words.
        FileNotFoundError: A folder, a list or a file of weights is not there.
        OSError: The disk failed.
    """
    if errors not in ("raise", "return"):
        raise BadValueError(f"errors={errors!r}: expected 'raise' or 'return'.")
    dir = os.fspath(source) if isinstance(source, str | os.PathLike) else ""
    if out_dir is not None and not dir:
        raise BadValueError(f"out_dir={str(out_dir)!r}: expected a folder as source. files= lists the images in it.")
    groups: dict[str, dict[str, Any]] = {"model": {"layer": layer}, "data": {"dir": dir}, "writer": {}, "trainer": {}}
    if out_dir is not None:
        groups["writer"]["out_dir"] = os.fspath(out_dir)
    _sort_in(options, groups, model)
    with _quiet():
        made = _make(groups, model)
        if out_dir is not None:
            names, features, faults = _to_files(made, groups["trainer"])
        else:
            names, features, faults = _in_memory(source, made, groups["trainer"], errors == "raise")
    lost = [fault for fault in faults if not fault.used]
    if lost and errors == "raise":
        raise ImageError(
            f"{len(lost)} of {len(lost) + len(names):,} images cannot be read, the first is {lost[0].path}: "
            f"{lost[0].reason}\nThe files have the others. errors='return' returns these and the list."
        )
    values = features[layer] if isinstance(layer, str) else features
    return (names, values, faults) if errors == "return" else (names, values)


def _sort_in(options: dict[str, Any], groups: dict[str, dict[str, Any]], model: type) -> None:
    """Put keywords into the groups of the command line that know them."""
    homes: dict[str, list[str]] = {name: ["trainer"] for name in TRAINER}
    for group, owner in (("model", model), ("data", ImageFolderDataModule), ("writer", FeatureWriter)):
        for name in inspect.signature(owner).parameters:
            homes.setdefault(name, []).append(group)
    files = "out_dir" in groups["writer"]
    known = {}
    for name, found in homes.items():
        for group in found:
            if name not in NOT_HERE and (group != "writer" or name == "names" or files):
                known[f"{group}_{name}" if len(found) > 1 else name] = (group, name)
    for word, value in options.items():
        if word not in known:
            near = [f"{group}_{word}" for group in homes.get(word, [])]
            told = f" Did you mean {' or '.join(near)}?" if known.keys() & near else did_you_mean(word, known)
            if homes.get(word) == ["writer"] and not files:
                told = " It is for files: give out_dir, too."
            raise BadValueError(f"{word}={value!r}: no such option.{told}\n{command_line.SEE}")
        group, name = known[word]
        groups[group][name] = os.fspath(value) if isinstance(value, os.PathLike) else value


def _make(groups: dict[str, dict[str, Any]], model: type) -> Any:
    """Return the three objects, made as the command line makes them, with its checks of types and choices."""
    parser = command_line.Parser(default_env=False)
    for group, owner in (("model", model), ("data", ImageFolderDataModule), ("writer", FeatureWriter)):
        parser.add_class_arguments(owner, group)
    return parser.instantiate_classes(parser.parse_object({name: groups[name] for name in ("model", "data", "writer")}))


def _trainer(given: dict[str, Any], callback: Callback) -> Trainer:
    try:
        return Trainer(**{"devices": 1} | given, callbacks=[callback], logger=False, enable_checkpointing=False,
                       enable_model_summary=False, enable_progress_bar=False)  # fmt: skip
    except (MisconfigurationException, ValueError, TypeError, ImportError) as err:
        raise refusal(err, given) from err


def _to_files(made: Any, trainer_options: dict[str, Any]) -> tuple[list[str], dict[str, Floats], list[Fault]]:
    writer: FeatureWriter = made.writer
    trainer = _trainer(trainer_options, writer)
    bar = _Bar()
    trainer.callbacks.append(bar)  # type: ignore[attr-defined]
    if prepare(trainer, made.model, made.data, writer):
        bar.total = len(made.data.images)
        _predict(trainer, made.model, datamodule=made.data)
        writer.wait()
    folder, names, features, faults = Path(writer.out_dir), list[str](), {}, list[Fault]()
    for layer in made.model.layers:
        file = f"{file_name(layer)}/*.{writer.formats[0]}" if writer.shard_rows else file_name(layer, writer.formats[0])
        names, features[layer] = load(folder / file, mmap=True)
        faults = _listed(folder / file_name(layer, "errors.csv"))
    return names, features, faults


def _listed(path: Path) -> list[Fault]:
    """Return the images that a finished run could not read."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = [(row[0], row[1], row[2]) for row in csv.reader(file)]
    assert rows[0] == ERRORS_HEADER
    return [Fault(name, why.removeprefix(USED), said, why.startswith(USED)) for name, why, said in rows[1:]]


def _in_memory(
    source: Any, made: Any, trainer_options: dict[str, Any], stop: bool
) -> tuple[list[str], dict[str, Floats], list[Fault]]:
    bar = _Bar(stop)
    trainer = _trainer(trainer_options, bar)
    if trainer.world_size > 1:
        raise BadValueError(
            f"devices={trainer_options.get('devices')!r}: each of several processes would return its own share.\n"
            "With out_dir= they write one file, of which all return the rows."
        )
    data: ImageFolderDataModule = made.data
    made.model.check()
    if pictures := _pictures(source, data):
        made.model.configure_model()
        bar.total = len(source) if isinstance(source, Sized) else None
        _predict(trainer, made.model, dataloaders=_Batches(pictures, data, made.model))
    else:
        data.check()
        data.setup()
        made.model.configure_model()
        bar.total = len(data.images or [])
        _predict(trainer, made.model, datamodule=data)
    names = bar.names if made.writer.names == "relative" else [os.path.basename(name) for name in bar.names]
    return names, {layer: stack(bar.chunks.get(layer, [])) for layer in made.model.layers}, bar.faults


def _pictures(source: Any, data: ImageFolderDataModule) -> Iterator[Image.Image] | None:
    """Return PIL images, or None where the source is paths, which the data module then has."""
    if isinstance(source, str | os.PathLike):
        return None
    images = iter(source)
    first = next(images, None)
    if first is None:
        raise BadValueError("source: nothing in it. Expected a folder, paths of images, or PIL images.")
    if not isinstance(first, str | os.PathLike):
        return chain([first], images)
    paths = [os.path.abspath(path) for path in chain([first], images)]
    data.dir = os.path.commonpath([os.path.dirname(path) for path in paths])
    data.images = ImageTree(data.dir, [os.path.relpath(path, data.dir) for path in paths])
    return None


class _Batches:
    """PIL images as they come, in batches."""

    def __init__(self, pictures: Iterator[Image.Image], data: ImageFolderDataModule, model: FeatureExtractor) -> None:
        self.pictures = pictures
        self.data = data
        self.preprocessing = data.preprocessing(model.preprocessing)

    def __iter__(self) -> Iterator[Batch]:
        for number in count():
            first = number * self.data.batch_size
            images: dict[str, Tensor] = {}
            faults = []
            size = 0
            for size, picture in enumerate(islice(self.pictures, self.data.batch_size), 1):
                name = str(first + size - 1)
                image = self._read(name, picture)
                if isinstance(image, Fault):
                    faults.append(image)
                else:
                    images[name] = image
            if not size:
                return
            shapes: dict[torch.Size, list[int]] = {}
            for row, image in enumerate(images.values()):
                shapes.setdefault(image.shape, []).append(row)
            tensors = list(images.values())
            groups = [(rows, torch.stack([tensors[row] for row in rows])) for rows in shapes.values()]
            yield Batch(number, list(images), groups, faults, size)

    def _read(self, name: str, picture: Any) -> Tensor | Fault:
        if not isinstance(picture, Image.Image):
            raise BadValueError(
                f"source: number {name} is a {type(picture).__name__}. Expected PIL images, as the first was one, or "
                "paths of images."
            )
        try:
            pixels = to_rgb(picture, self.data.value_range)
            return self.preprocessing.to_tensor(pixels, self.data.decoder)
        except Exception as err:  # it may still have to be decoded
            return describe(err, name, name)


class _Bar(Callback):
    """Show a progress bar and keep what comes: rows in memory mode, where no writer takes them."""

    def __init__(self, stop: bool | None = None) -> None:
        self.stop = stop  # at an image that cannot be read; None: rows are not kept
        self.total: int | None = None
        self.names: list[str] = []
        self.faults: list[Fault] = []
        self.chunks: dict[str, list[Floats]] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where ipywidgets are missing, the bar is one of text
            from tqdm.auto import tqdm
        hide = not trainer.is_global_zero or not (sys.stderr.isatty() or "ipykernel" in sys.modules)
        share = self.total and -(-self.total // trainer.world_size)
        self.bar = tqdm(total=share, unit=" images", disable=hide)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        self.bar.update(batch.size)
        if self.stop is None:
            return
        lost = [fault for fault in batch.faults if not fault.used]
        if lost and self.stop:
            raise ImageError(
                f"{lost[0].path}: {lost[0].reason} ({lost[0].exception})\n"
                "errors='return' goes on, and returns the images that cannot be read beside the rows."
            )
        self.names += batch.names
        self.faults += batch.faults
        for layer, rows in outputs.items():
            self.chunks.setdefault(layer, []).append(rows.cpu().numpy())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


def _predict(trainer: Trainer, model: FeatureExtractor, **data: Any) -> None:
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.predict(model, return_predictions=False, **data)
    except SystemExit as err:
        if isinstance(err.__context__, KeyboardInterrupt):  # Lightning turns it into the end of the process
            signal.signal(signal.SIGINT, interrupt)
            raise KeyboardInterrupt from None
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's banners and tips out of a notebook."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for category in (PossibleUserWarning, FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
