"""Images -> batches: ImageFolderDataModule, which deals whole batches to the processes, in order."""

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import PIL
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import stack
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from featx.data import preprocess, sources
from featx.data.batch import Batch, Fault, Sample
from featx.data.decode import READERS, decode_or_fault, describe
from featx.data.depth import ValueRange
from featx.data.preprocess import Decoder, Interpolation, Preprocessing
from featx.data.selection import Selection
from featx.data.sources import Source
from featx.data.view import View
from featx.data.workers import Context, choose, send, start
from featx.errors import BadValueError, BrokenSourceError, ImageError, LostFolderError, UserError, count, log, note
from featx.process.cores import cores_per_process
from featx.process.shared import on_one_core

FIRST = 64  # images that are looked at before a run begins


class ImageFolderDataModule(LightningDataModule):
    """Where the images are, and what is done to them before the network.

    Args:
        dir: Folder of images, or of one folder per class, as for torchvision's ImageFolder.
        batch_size: Images per batch.
        num_workers: Processes that decode images; auto: as many as there are cores for this process.
        resize: Short side after resizing, in pixels; auto: as the weights were trained; null: no resize.
        crop: Side of the centre crop, in pixels; auto: as the weights were trained; null: no crop.
        interpolation: PIL's filter for resizing; auto: as the weights were trained.
        pad: Pad images smaller than the crop with black.
        value_range: Values that become black and white in images of more than 8 bits, as '[0,4095]', or a list of such
            ranges, one per band; null: as the file says.
        files: A file that lists the images to read, one path below dir per line, in the order of the rows; null: all.
        exclude: Paths to leave out, as '["*_mask.png","thumbs/*"]'.
        suffixes: More suffixes of images, as '[.jfif,.avif,.heic]'.
        on_error: For an image that cannot be read: list it and go on, or stop.
        strict: Refuse images with damaged data; false: use what PIL makes of them, and list them.
        decoder: exact: PIL's values to the bit; turbo: resizes faster, up to a few grey levels off.
        exif_rotate: Rotate images as their Orientation says, in EXIF or in a TIFF's tags.
        srgb: Convert colors with an ICC profile to sRGB.
        background: Color behind transparent pixels, as '[255,255,255]'; null: transparency is ignored.
        bands: Channels to see as red, green and blue, or one as grey, from 1, as '[4,3,2]'; null: grey and RGB.
        page: Page of files with several, from 1; null: the first that is not a thumbnail.
        reader: A function that reads the files, as my_module.read; it takes a path and returns an array.
        column: The column of a table, or the member of a sample, that is the image; null: the only one.
        retry_seconds: How long requests are repeated while an object store fails, in seconds.
        shard: Share of this job, as 3/64; auto: one after another.

    Raises:
        UserError: From ``setup``: no folder, no image, or all images need an option, such as ``value_range``.
            ``ValueError`` and ``FileNotFoundError`` are among its bases.
    """

    def __init__(
        self,
        dir: str,
        batch_size: int = 64,
        num_workers: Literal["auto"] | int = "auto",
        resize: Literal["auto"] | int | None = "auto",
        crop: Literal["auto"] | int | None = "auto",
        interpolation: Interpolation = "auto",
        pad: bool = False,
        value_range: ValueRange | None = None,
        files: str | None = None,
        exclude: str | list[str] | None = None,
        suffixes: str | list[str] | None = None,
        on_error: Literal["list", "stop"] = "list",
        strict: bool = True,
        decoder: Decoder = "exact",
        exif_rotate: bool = False,
        srgb: bool = False,
        background: tuple[int, int, int] | None = None,
        bands: list[int] | None = None,
        page: int | None = None,
        reader: str | None = None,
        column: str | None = None,
        retry_seconds: int = 300,
        shard: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("resize", resize, 1),
            ("crop", crop, 1),
            ("retry_seconds", retry_seconds, 0),
        ):
            if isinstance(value, int) and value < least:
                raise BadValueError(f"--data.{name} {value}: expected a whole number of at least {least}.")
        if decoder != "exact" and interpolation not in ("auto", "bilinear", "bicubic"):
            raise BadValueError(
                f"--data.interpolation {interpolation}: expected bilinear or bicubic with --data.decoder {decoder}.\n"
                "--data.decoder exact has all of PIL's filters."
            )
        if shard is not None:
            _check_shard(shard)
        self.dir = dir
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.resize = resize
        self.crop = crop
        self.interpolation = interpolation
        self.pad = pad
        self.files = files
        self.selection = Selection(suffixes, exclude)
        self.column = column
        self.exclude = exclude
        self.suffixes = suffixes
        self.shard = shard
        self.on_error = on_error
        self.retry_seconds = retry_seconds
        self.decoder = decoder
        self.view = View(value_range, strict, exif_rotate, srgb, background, bands, page, reader)
        vars(self).update(vars(self.view))  # its options, for the record
        self.cache: Path | None = None  # of lists that take long to make; ``prepare`` knows where
        self.images: Source | None = None
        self.batches: Iterable[int] | None = None  # those of this process; None: all
        self.readers = READERS
        self.workers = 0
        self._used = False  # the list of images, by a run
        self._dark_reported = False
        # A rank may be without a batch: https://github.com/Lightning-AI/pytorch-lightning/issues/13580
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def check(self) -> None:
        """Raise UserError if the folder or the list does not exist."""
        sources.check(self.dir, self.files)
        self.view.check()

    def setup(self, stage: str | None = None) -> None:
        """List the images, once per run, and check that one of the first can be read with these options."""
        self.batches, self._dark_reported = None, False
        if self.images is not None and (not self._used or self.shard is not None):  # all jobs have one list
            return
        self._used = False
        images = sources.find(self.dir, self.files, self.selection, self.column, self.cache, self.retry_seconds)
        kind = "class" if images.column else "class folder"
        classes = f" in {count(len(images.classes), kind)}" if images.classes != [""] else ""
        listed = f", listed in {self.files}" if self.files else ""
        note("images", f"{len(images):,}{classes} of {images.where}{listed}")
        if images.left_out:
            log.warning("left out of %s: %s", images.where, images.left_out)
        if images.images_left_out > len(images):
            log.warning(
                "MORE IMAGES ARE LEFT OUT (%s) THAN READ (%s). featx reads the images in class folders, or in %s "
                "itself if there are none; --data.files LIST reads exactly the images that it lists",
                f"{images.images_left_out:,}", f"{len(images):,}", images.where,
            )  # fmt: skip
        self.images = images
        samples = partial(self._first_samples, Preprocessing(None, None, "bilinear", (), (), ""))
        if _first_read(samples()) is None and images.column:
            fault = next(samples()).fault
            raise BadValueError(
                f"--data.column {images.column}: none of its first {min(FIRST, len(images))} values is an image that "
                f"can be read. The first is {fault and fault.path}: {fault and fault.reason}"
            )

    def restrict(self, places: NDArray[np.int64]) -> None:
        """Leave only some of the images, by their places, until the next ``setup``."""
        assert self.images is not None
        self.images, self._used = self.images.some(places), True

    def restore(self, read: Callable[[], Iterable[tuple[str, int, int]]]) -> None:
        """Use the list of images that another job has made of a folder, paths, sizes and mtimes; check some of them.

        Archives and tables have lists of their own, which each job reads.
        """
        if sources.is_folder(self.dir):
            self.images = sources.ImageTree.restored(sources.expand(self.dir)[0], read())
            note("images", f"{len(self.images):,} of {self.images.where}, as another job has listed them")

    def preprocessing(self, preset: Preprocessing) -> Preprocessing:
        """Return ``preset``, what the network was trained with, as changed by this module's options.

        Raises:
            BadValueError: The crop is larger than what images are resized to, and ``pad`` is false.
        """
        options = {"resize": self.resize, "crop": self.crop, "interpolation": self.interpolation}
        given: dict[str, Any] = {name: value for name, value in options.items() if value != "auto"}
        if self.pad:
            given["pad"] = True
        made = replace(preset, **given, source=preset.source + ", with your options") if given else preset
        if made.may_pad and made.resize is not None and not made.pad:
            raise BadValueError(
                f"--data.resize {made.resize} with --data.crop {made.crop}: images would be smaller than the crop.\n"
                f"Expected --data.crop {made.resize} or less, --data.resize {made.crop} or more, or --data.pad true, "
                "which pads with black."
            )
        return made

    def identity(self, preset: Preprocessing) -> dict[str, Any]:
        """Return everything about the data that decides a value, as plain values for JSON."""
        preprocessing = asdict(self.preprocessing(preset))
        del preprocessing["source"]  # it decides no value
        if not self.preprocessing(preset).may_pad:
            del preprocessing["pad"]
        if not preprocessing["floor"]:
            del preprocessing["floor"]
        asked = {"exclude": self.selection.exclude, "suffixes": self.selection.more, "column": self.column}
        return {name: value for name, value in asked.items() if value} | {
            "preprocessing": json.loads(json.dumps(preprocessing)),
            "decoder": self.decoder,
            **json.loads(json.dumps(self.view.identity())),
            "batch_size": self.batch_size,
            "revisions": {"preprocessing": preprocess.REVISION},
            "versions": {"pillow": PIL.__version__, "simplejpeg": version("simplejpeg")},
        }

    def first_batch(self, preset: Preprocessing, samples: Iterable[Sample] | None = None) -> Batch:
        """Return a batch of the first image that can be read, read in this process, to try a network with.

        If none of the first 64 can be read, the image is grey.

        Args:
            preset: The preprocessing that the network was trained with.
            samples: Images that are not in the folder.

        Raises:
            BadValueError: None of these can be read, and some need an option.
        """
        if (sample := _first_read(samples or self._first_samples(self.preprocessing(preset)))) is not None:
            return Collate(self.batch_size)([sample])
        preprocessing = self.preprocessing(preset)
        side = max(256, preprocessing.crop or 0)
        grey = preprocessing.to_tensor(np.full((side, side, 3), 128, np.uint8), self.decoder)
        return Collate(self.batch_size)([Sample(0, "", grey, None)])

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this process's batches, a contiguous run of the whole."""
        assert self.images is not None and self.trainer is not None
        self._used = True
        if self.batches is None:  # no writer shared them out: all of them
            self.batches = range(math.ceil(len(self.images) / self.batch_size))
        cores = cores_per_process(self.trainer)
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        most = len(self.batches) if isinstance(self.batches, Sized) else len(self.images)
        self.workers = workers = choose(self.num_workers, cores, most)
        threads = "" if on_gpu else f", {count(cores, 'network thread')}"
        note("cores", f"{cores} per process: {count(workers, 'data worker')}{threads}")
        preset: Any = self.trainer.lightning_module.preprocessing
        collate = Collate(self.batch_size)
        return DataLoader(
            self._read_as(self.preprocessing(preset)),
            batch_size=self.batch_size,
            sampler=_WholeBatches(len(self.images), self.batch_size, self.batches),
            num_workers=workers,
            collate_fn=partial(send, collate) if workers else collate,
            pin_memory=on_gpu,
            worker_init_fn=start,
            # Workers know what this process has imported, and need no script that can be imported again, as with
            # forkserver, the default of Python 3.14. https://docs.python.org/3/library/multiprocessing.html
            multiprocessing_context=Context() if workers and sys.platform == "linux" else None,
            generator=torch.Generator(),  # else it would draw a number from the process's own
        )

    def on_before_batch_transfer(self, batch: Batch | UserError, dataloader_idx: int) -> Batch:
        """Report, in the main process, what a batch says about the whole run.

        Raises:
            BrokenSourceError: A part of a table cannot be read.
            LostFolderError: The images are gone.
            UserError: Their source failed.
        """
        if isinstance(batch, UserError):
            raise batch
        self._end_if_broken(batch)
        if batch.faults and self.images is not None and self.images.is_lost():
            raise LostFolderError(
                f"--data.dir {self.images.where}: {self.images.lost}. It held {batch.faults[0].path}.\n"
                "If its disk or network share was lost, reconnect it and run the same command again."
            )
        if "dark" in batch.remarks and not self._dark_reported:
            self._dark_reported = True
            log.warning(
                "%s: 16-bit grey without a value above 4,095 becomes nearly black. If it is from a 12-bit camera, use "
                "--data.value_range '[0,4095]'",
                batch.remarks["dark"]["first"],
            )
        return batch

    def read_batch(self, number: int, preset: Preprocessing) -> Batch:
        """Return a batch of the run, read in this process."""
        images = self._read_as(self.preprocessing(preset))
        first = number * self.batch_size
        batch = Collate(self.batch_size)(list(images.read(range(first, min(first + self.batch_size, len(images))))))
        self._end_if_broken(batch)
        return batch

    def _end_if_broken(self, batch: Batch) -> None:
        if broken := next((fault for fault in batch.faults if fault.ends_the_run), None):
            raise BrokenSourceError(f"{broken.reason}\n{BrokenSourceError.advice}")

    def fault(self, name: str, preset: Preprocessing) -> Fault | None:
        """Return what is wrong with an image now."""
        assert self.images is not None
        place = self.images.names.find(name)
        return None if place is None else self._read_as(self.preprocessing(preset))[place].fault

    def turbo_saves(self, preset: Preprocessing, images: int = 16) -> float:
        """Return how many seconds of a core ``--data.decoder turbo`` would save per image, measured on the first."""
        assert self.images is not None
        preprocessing = self.preprocessing(preset)
        some = range(min(images, len(self.images)))
        files = zip(some, self.images.read(some), strict=True)
        found = [decode_or_fault(file, "", self.images.names[place], self.view).pixels for place, file in files]
        taken: dict[Decoder, list[float]] = {"exact": [], "turbo": []}
        with on_one_core():
            for pixels in (pixels for pixels in found if pixels is not None):
                with suppress(UserError):  # such an image has no row
                    for decoder, seconds in taken.items():
                        begin = time.thread_time()
                        preprocessing.to_tensor(pixels, decoder)
                        seconds.append(time.thread_time() - begin)
        return median(taken["exact"]) - median(taken["turbo"]) if taken["exact"] else 0.0

    def _first_samples(self, preprocessing: Preprocessing) -> Iterator[Sample]:
        images = self._read_as(preprocessing)
        return map(images.__getitem__, range(min(FIRST, len(images))))  # one by one: the first is mostly enough

    def _read_as(self, preprocessing: Preprocessing) -> "_Images":
        assert self.images is not None
        return _Images(self.images, preprocessing, self.view, self.decoder)


@dataclass
class _Images(Dataset[Sample]):
    images: Source
    preprocessing: Preprocessing
    view: View
    decoder: Decoder

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> Sample:
        return next(self.read([place]))

    def __getitems__(self, places: Sequence[int]) -> list[Sample] | UserError:
        """Return the samples of a batch, as torch's DataLoader asks for them, or in a worker why there are none."""
        try:
            return list(self.read(places))
        except UserError as err:
            if get_worker_info() is None:
                raise
            return err  # raised, it would arrive with a traceback in its message

    def read(self, places: Sequence[int]) -> Iterator[Sample]:
        """Yield images as the network takes them, or their faults."""
        begin = time.thread_time()
        for place, file in zip(places, self.images.read(places), strict=True):
            tensor, name, path = None, self.images.names[place], self.images.path(place)
            pixels, fault, kind, remarks = decode_or_fault(file, path, name, self.view)
            decoded = time.thread_time()
            if pixels is not None:
                try:
                    tensor = self.preprocessing.to_tensor(pixels, self.decoder)
                except (ImageError, BadValueError, MemoryError) as err:  # raised in a worker, it would arrive wrapped
                    fault = describe(err, path, name)
            end = time.thread_time()
            yield Sample(place, name, tensor, fault, (decoded - begin, end - decoded), kind, remarks)
            begin = end


def _check_shard(shard: str) -> None:
    """Raise BadValueError unless this is a share such as 3/64, or auto."""
    found = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", shard)
    share, shares = map(int, found.groups()) if found else (0, 0)
    if shard != "auto" and not 1 <= share <= shares:
        what = f"shares are counted from 1. Expected 1/{shares} to {shares}/{shares}" if shares else "expected 3/64"
        raise BadValueError(f"--data.shard {shard}: {what}, or auto.")


def _first_read(samples: Iterable[Sample]) -> Sample | None:
    """Return the first of the ``FIRST`` samples with an image, or None where there is none.

    Raises:
        BadValueError: There is none, and some need an option, as all that follow probably do.
    """
    faults = []
    for sample in islice(samples, FIRST):
        if sample.image is not None:
            return sample
        faults += [sample.fault] if sample.fault is not None else []
        if faults and faults[-1].ends_the_run:
            raise BadValueError(faults[-1].reason)
    if needing := next((fault for fault in faults if fault.needs_option), None):
        among = f"\nNone of the first {len(faults)} images can be read." if faults[1:] else ""
        raise BadValueError(f"{needing.path}: {needing.reason}{among}")
    return None


class Collate:
    """Samples in the order of the rows -> their batch.

    Args:
        batch_size: Images per batch.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __call__(self, samples: list[Sample]) -> Batch:
        """Return a batch; its number follows from the place of its first sample."""
        read = [(sample.name, sample.image) for sample in samples if sample.image is not None]
        shapes: dict[tuple[int, ...], list[int]] = {}
        for row, (_, image) in enumerate(read):
            shapes.setdefault(tuple(image.shape), []).append(row)
        # (G, 3, H, W) each, in memory as channels_last, which is how decoders write an image
        groups = [(rows, stack([read[row][1].permute(1, 2, 0) for row in rows]).permute(0, 3, 1, 2))
                  for rows in shapes.values()]  # fmt: skip
        faults = [sample.fault for sample in samples if sample.fault is not None]
        decode, resize = (sum(stage) for stage in zip(*(sample.seconds for sample in samples), strict=True))
        number, names = samples[0].place // self.batch_size, [name for name, _ in read]
        kinds = {sample.kind for sample in samples if sample.image is not None}
        readers = {kind: READERS.get(kind, 1) for kind in sorted(kinds)}
        remarkable = {sample.name: found for sample in samples if (found := list(_remarkable(sample)))}
        return Batch(number, names, groups, faults, len(samples), (decode, resize), readers, remarkable)


def _remarkable(sample: Sample) -> Iterator[str]:
    """Yield the kinds of remarks on an image that has a row."""
    if sample.image is not None:
        yield from sample.remarks
    if sample.image is not None and Preprocessing.is_one_colour(sample.image):
        yield "one_colour"


class _WholeBatches(DistributedSampler[Any]):
    """The images of one process: whole batches, in order, none twice; only the run's last one is short.

    It is a DistributedSampler so that Lightning does not replace it by its own, which would deal out single images in
    turn and repeat some: https://github.com/Lightning-AI/pytorch-lightning/issues/10782.
    """

    def __init__(self, images: int, batch_size: int, batches: Iterable[int]) -> None:
        self.images = images
        self.batch_size = batch_size
        self.batches = batches

    def __iter__(self) -> Iterator[int]:
        for batch in self.batches:
            yield from range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.images))

    def __len__(self) -> int:
        if not isinstance(self.batches, Sized):
            raise TypeError("the batches of shares that this job has not taken yet are unknown")
        return int(sum(min(self.batch_size, self.images - batch * self.batch_size) for batch in self.batches))
