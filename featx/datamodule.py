"""Images -> batches: ImageFolderDataModule, which deals whole batches to the processes, in order."""

import math
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, NamedTuple

from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor, stack
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from featx.images import ImageTree, ValueRange, check_folder, check_image, read_image
from featx.messages import BadValueError, UserError, count, log
from featx.preprocess import Interpolation, Preprocessing

Sample = tuple[int, str, Tensor | UserError]


class Batch(NamedTuple):
    """Some images in the order of the rows, with their names beside them all the way.

    Attributes:
        number: Which batch of the whole run this is, from 0, whatever process has it.
        names: Paths of the images below the data folder, one a row.
        groups: Images of equal shape, ``(G, 3, H, W) uint8``, each with the G rows of the batch that they are.
        errors: What is wrong with images that could not be read.
    """

    number: int
    names: list[str]
    groups: list[tuple[list[int], Tensor]]
    errors: list[UserError]


class ImageFolderDataModule(LightningDataModule):
    """Where the images are, and what is done to them before the network.

    Args:
        dir: Folder of the images: one folder a class, as torchvision's ImageFolder takes them, or just images.
        batch_size: Images a batch.
        num_workers: Processes that decode images; auto: by the cores that this process may use.
        resize: Short side after resizing, in pixels; auto: what the weights were trained with; null: no resize.
        crop: Side of the centre crop, in pixels; auto: what the weights were trained with; null: no crop.
        interpolation: PIL's filter for resizing; auto: what the weights were trained with.
        value_range: Values that become black and white in images above 8 bits, as [0,4095]; 16-bit: all 65536.

    Raises:
        UserError: From ``setup``: no folder, no image, or images that need a ``value_range``. ``ValueError`` and
            ``FileNotFoundError`` are among its bases.
    """

    def __init__(
        self,
        dir: str,
        batch_size: int = 64,
        num_workers: Literal["auto"] | int = "auto",
        resize: Literal["auto"] | int | None = "auto",
        crop: Literal["auto"] | int | None = "auto",
        interpolation: Interpolation = "auto",
        value_range: ValueRange | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("resize", resize, 1),
            ("crop", crop, 1),
        ):
            if isinstance(value, int) and value < least:
                raise BadValueError(f"--data.{name} {value}: expected a whole number of at least {least}.")
        if value_range is not None and not -math.inf < value_range[0] < value_range[1] < math.inf:
            raise BadValueError(f"--data.value_range {list(value_range)}: expected [low,high] with low below high.")
        self.dir = dir
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.resize = resize
        self.crop = crop
        self.interpolation = interpolation
        self.value_range = value_range
        self.images: ImageTree | None = None
        # A rank without a batch is no mistake: https://github.com/Lightning-AI/pytorch-lightning/issues/13580
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def check(self) -> None:
        """Raise UserError for a folder that is not there, without listing it."""
        check_folder(self.dir)

    def setup(self, stage: str | None = None) -> None:
        """List the images, once, and look at the first headers."""
        if self.images is not None:
            return
        images = ImageTree(self.dir)
        for index in range(min(len(images), 64)):
            check_image(images.path(index), self.value_range)
        classes = f" in {count(len(images.classes), 'class folder')}" if images.classes != [""] else ""
        log.info("images: %s%s of %s", count(len(images), "image"), classes, self.dir)
        if images.left_out:
            log.warning("left out of %s: %s", self.dir, images.left_out)
        self.images = images

    def preprocessing(self, preset: Preprocessing) -> Preprocessing:
        """Return what the network was trained with, ``preset``, with this module's options put over it."""
        options = {"resize": self.resize, "crop": self.crop, "interpolation": self.interpolation}
        given: dict[str, Any] = {name: value for name, value in options.items() if value != "auto"}
        return replace(preset, **given, source=preset.source + ", with your options") if given else preset

    def first_batch(self, preset: Preprocessing) -> Batch:
        """Return the first image as a batch, read in this process, to try a network with."""
        assert self.images is not None
        images = _Images(self.images, self.preprocessing(preset), self.value_range)
        return self.on_before_batch_transfer(_Collate(self.batch_size)([images[0]]), 0)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this process's batches, a contiguous run of the whole."""
        assert self.images is not None and self.trainer is not None
        cores = cores_per_process(self.trainer)
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        # A CPU's network needs the cores more than its decoders do; beside a GPU decoding is all there is to do.
        workers = (cores if on_gpu else max(1, cores // 2)) if self.num_workers == "auto" else self.num_workers
        chosen = " (--data.num_workers)" if self.num_workers != "auto" else ""
        log.info("cores: %d for each process, %s%s", cores, count(workers, "data worker"), chosen)
        preset: Any = self.trainer.lightning_module.preprocessing
        return DataLoader(
            _Images(self.images, self.preprocessing(preset), self.value_range),
            batch_size=self.batch_size,
            sampler=_WholeBatches(len(self.images), self.batch_size, self.trainer.world_size, self.trainer.global_rank),
            num_workers=workers,
            collate_fn=_Collate(self.batch_size),
            pin_memory=on_gpu,
            worker_init_fn=_leave_the_end_to_the_main_process,
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Raise the first error of a batch, in the main process, where the user hears it."""
        if batch.errors:
            raise batch.errors[0]
        return batch


class _Images(Dataset[Sample]):
    def __init__(self, images: ImageTree, preprocessing: Preprocessing, value_range: ValueRange | None) -> None:
        self.images = images
        self.preprocessing = preprocessing
        self.value_range = value_range

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        name = self.images.names[index]
        try:
            image: Image.Image = read_image(self.images.path(index), self.value_range)
        except UserError as err:
            return index, name, err  # raised here, it would arrive wrapped in a worker's traceback
        return index, name, self.preprocessing.to_tensor(image)


class _Collate:
    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __call__(self, samples: list[Sample]) -> Batch:
        shapes: dict[tuple[int, ...], list[int]] = {}
        errors: list[UserError] = []
        tensors: list[Tensor] = []
        for row, (_, _, image) in enumerate(samples):
            if isinstance(image, UserError):
                errors.append(image)
            else:
                shapes.setdefault(tuple(image.shape), []).append(row)
                tensors.append(image)
        names = [name for _, name, _ in samples]
        if errors:
            return Batch(samples[0][0] // self.batch_size, names, [], errors)
        groups = [(rows, stack([tensors[row] for row in rows])) for rows in shapes.values()]  # (G, 3, H, W) each
        return Batch(samples[0][0] // self.batch_size, names, groups, [])


class _WholeBatches(DistributedSampler[Any]):
    """The images of one process: whole batches, contiguous, in order, none twice.

    It is a DistributedSampler so that Lightning puts none of its own in its place, which would deal single images
    round robin and repeat some: https://github.com/Lightning-AI/pytorch-lightning/issues/10782.
    """

    def __init__(self, images: int, batch_size: int, processes: int, rank: int) -> None:
        batches = math.ceil(images / batch_size)
        first, stop = (batches * r // processes * batch_size for r in (rank, rank + 1))
        self.rows = range(first, min(stop, images))

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def cores_per_process(trainer: Any) -> int:
    """Return how many cores one process of the run may use: affinity and cgroup quota over this machine's processes."""
    return max(1, usable_cores() // max(1, int(trainer.num_devices)))


def usable_cores() -> int:
    """Return how many cores this process may use, at least 1: what affinity and the cgroup's quota leave of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no quota ("max"), another version of cgroups, or another system
    return max(1, cores)


def _leave_the_end_to_the_main_process(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group
    show = sys.excepthook

    def hook(kind: type[BaseException], err: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, ConnectionError):  # the thread that hands out tensors, when nobody takes them any more
            show(kind, err, trace)

    sys.excepthook = hook
