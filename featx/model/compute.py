"""A hooked network and batches -> rows: in slices on the cores of a CPU, or on a GPU, and in which memory layout."""

import math
import textwrap
import time
from collections import UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from featx.data.batch import Batch
from featx.errors import UserError, first_line, log
from featx.model.build import SEED
from featx.model.layers import Found, Taps
from featx.process.cores import cores_per_process, usable_cores
from featx.process.shared import Shared, one_core

# Images that one core computes at a time. On a CPU the last bits of a result depend on how many images and threads
# compute it, so both are fixed: one thread a slice, and as many slices at once as there are cores. Of 8, 16 and 32,
# 16 was the best or within 10 % of it for AlexNet, VGG16, ResNet-50, MobileNetV3-small (in channels_last) and ViT-B/16.
# 32 makes a run of AlexNet 3 to 5 % shorter, but its memory then grows by tens of MiB, by chance.
SLICE = 16
SLICES_A_CORE = 2  # begun or waiting, so that all cores have work until the next batch is here
SAME = 1e-5  # relative (L2): the memory layout may change last bits only

T = TypeVar("T")
Part = tuple[dict[str, Tensor], float]  # of a slice the rows, and the seconds that a core took for them


@contextmanager
def _full_precision() -> Iterator[None]:
    """Let cuDNN compute convolutions of float32 as such, not with ten bits of mantissa (TF32).

    https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """
    flags: Any = torch.backends.cudnn
    name: str = "allow_tf32"
    value: bool | str = False
    try:
        before = flags.allow_tf32
    except RuntimeError:  # not to be read where the process has set the flags of torch 2.9
        flags, name, value = flags.conv, "fp32_precision", "ieee"
        before = flags.fp32_precision
    setattr(flags, name, value)
    try:
        yield
    finally:
        setattr(flags, name, before)


FULL_PRECISION = Shared(_full_precision)


def dtype_of(network: nn.Module) -> torch.dtype:
    """Return the dtype of a network's first parameter of floats."""
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


class Rows(UserDict[str, Tensor]):
    """Each layer's rows, ``(B, D) float32``, of a batch that may still be computed: reading them waits for them.

    Args:
        finish: Waits for the rows and returns them.
    """

    def __init__(self, finish: Callable[[], dict[str, Tensor]]) -> None:
        self._finish = finish

    @cached_property
    def data(self) -> dict[str, Tensor]:  # type: ignore[override]
        """The rows, waited for."""
        return self._finish()

    def to(self, *device: Any, **how: Any) -> dict[str, Tensor]:
        """Return the rows on a device: so Lightning takes them where it is to return them all at the end."""
        return {layer: rows.to(*device, **how) for layer, rows in self.items()}


class Passes:
    """All passes of a run: on a CPU in slices, each on one core, else of whole batches.

    Args:
        model: Whose device, and whose Trainer's precision and number of processes, hold at each pass.
        taps: The network with what takes its layers.
        normalize: Makes what the network takes of images ``(B, 3, H, W) uint8``.
        title: What the network is called in messages.

    Attributes:
        memory_layout: contiguous or channels_last; what suits the network from ``try_out`` on.
        stages: Seconds that cores took for the network.
    """

    def __init__(self, model: LightningModule, taps: Taps, normalize: Callable[[Tensor], Tensor], title: str) -> None:
        self.memory_layout = "contiguous"
        self.stages: dict[str, float] = defaultdict(float)
        self._model = model
        self._taps = taps
        self._network = taps.network
        self._normalize = normalize
        self._title = title
        self._compiled: Callable[[Tensor], dict[str, Tensor]] | None = None
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._running: deque[Future[Part]] = deque()

    def try_out(self, images: Tensor, channels_last: Literal["auto"] | bool, compiles: bool) -> dict[str, Found]:
        """Run the first pass, with a few images, which shows what each layer is, and choose layout and compiler.

        Raises:
            UserError: The images do not go through the network, or a layer cannot be taken.
        """
        with ThreadPoolExecutor(1, initializer=one_core) as thread:
            found = thread.submit(self.run, images, self._taps.find).result()
            self.memory_layout = thread.submit(self._choose_layout, images.shape[1:], channels_last).result()
        if compiles:
            self._compiled = torch.compile(self._taps.take, fullgraph=True, dynamic=False)
        return found

    def _choose_layout(self, shape: torch.Size, wanted: Literal["auto"] | bool) -> str:
        """Bring the network into the layout that suits it, and return that one's name.

        In all processes and in every run it comes to the same, since nothing decides but the network, before it goes
        to a device or another precision, and one random image of the shape ``(3, H, W)``.
        """

        def rows(layout: torch.memory_format) -> dict[str, Tensor]:
            self._network.to(memory_format=layout)
            with torch.inference_mode():
                return self._taps(pixels.contiguous(memory_format=layout))

        self._network.to(memory_format=torch.contiguous_format)  # an earlier run may have left it in the other one
        convolves = any(isinstance(module, nn.Conv2d) for module in self._network.modules())
        if wanted is False or (wanted == "auto" and not convolves):
            return "contiguous"
        image = torch.randint(256, (2, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(SEED))
        pixels = self._normalize(image)
        try:
            expected, found = rows(torch.contiguous_format), rows(torch.channels_last)
            far = [layer for layer in expected
                   if not (found[layer] - expected[layer]).norm() <= SAME * expected[layer].norm()]  # fmt: skip
            if wanted is True or not far:
                return "channels_last"
            why = f"other rows of {', '.join(far)}"
        except Exception as err:  # whatever a network raises: .view(), for one, wants what is contiguous
            if wanted is True:
                raise UserError(
                    f"--model.channels_last true: {self._title} fails in this memory layout: {first_line(err)}\n"
                    "--model.channels_last auto uses it only where it works."
                ) from err
            why = type(err).__name__
        self._network.to(memory_format=torch.contiguous_format)
        log.info("memory layout: contiguous, since %s in channels_last: %s", self._title, why)
        return "contiguous"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return each layer's rows, ``(B, D) float32``, for images ``(B, 3, H, W) uint8`` of one shape."""
        if self._compiled is None:
            return self.run(images, self._taps)
        # Each number of images would be compiled anew, to other last bits where it is left open: on a CPU it is one.
        more = max(0, SLICE - len(images)) if self._on_cpu else 0
        rows = self.run(torch.cat([images, images.new_zeros(more, *images.shape[1:])]), self._compiled)
        return {layer: values[: len(images)] for layer, values in rows.items()}

    def run(self, images: Tensor, network: Callable[[Tensor], T]) -> T:
        """Normalise images and give them to the network, or what runs it; see ``FeatureExtractor.run``."""
        layout = torch.channels_last if self.memory_layout == "channels_last" else torch.contiguous_format
        exactly = FULL_PRECISION if self._model.device.type == "cuda" else nullcontext()
        with torch.inference_mode(), self._autocast(), exactly:
            pixels = self._normalize(images).to(dtype_of(self._network)).contiguous(memory_format=layout)
            try:
                return network(pixels)
            except (torch.OutOfMemoryError, UserError):
                raise
            except (RuntimeError, AssertionError, ValueError) as err:  # torchvision's networks raise all three
                if type(err).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    raise UserError(
                        f"--model.compile true: torch.compile fails for {self._title} on this machine: "
                        f"{textwrap.shorten(first_line(err), 300)}\nIt needs a C++ compiler, and images of few shapes. "
                        "--model.compile false does without it."
                    ) from err
                raise UserError(
                    f"{self._title} failed on images of the shape {tuple(images.shape[1:])}: "
                    f"{str(err).splitlines()[0]}\nIf it cannot take them, --data.resize and --data.crop change it."
                ) from err

    def rows(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return each layer's rows of a batch, which may still be computed; see ``FeatureExtractor.predict_step``."""
        if not batch.groups:
            return {}
        most = SLICE if self._on_cpu else len(batch.names)
        slices = [(rows[i : i + most], images[i : i + most])
                  for rows, images in batch.groups for i in range(0, len(rows), most)]  # fmt: skip
        places = torch.tensor([row for rows, _ in slices for row in rows]).argsort()
        if not self._on_cpu:
            rows = _join([self._model.forward(images) for _, images in slices], places)
            return self._copied(rows) if self._model.device.type == "cuda" else rows
        threads = self._threads
        futures = [threads.submit(self._timed, images) for _, images in slices]
        self._running.extend(futures)
        while len(self._running) > SLICES_A_CORE * self._cores:
            self._running.popleft().result()
        return Rows(lambda: self._finish(futures, places))

    def _copied(self, rows: dict[str, Tensor]) -> Rows:
        """Copy rows from the GPU beside what it computes next, on a stream of their own."""
        self._copies.wait_stream(torch.cuda.current_stream(self._model.device))
        with torch.cuda.stream(self._copies):
            copies = {layer: values.to("cpu", non_blocking=True) for layer, values in rows.items()}  # in pinned memory
        for values in rows.values():
            values.record_stream(self._copies)  # else its memory is given to the next batch while it is copied
        arrived = self._copies.record_event()

        def finish() -> dict[str, Tensor]:
            arrived.synchronize()
            return copies

        return Rows(finish)

    def _timed(self, images: Tensor) -> Part:
        begin = time.thread_time()
        return self._model.forward(images), time.thread_time() - begin

    def _finish(self, futures: list["Future[Part]"], places: Tensor) -> dict[str, Tensor]:
        parts = [future.result() for future in futures]
        self.stages["network"] += sum(seconds for _, seconds in parts)
        return _join([rows for rows, _ in parts], places)

    def batches_at_once(self, batch_size: int) -> int:
        """Return how many batches may be computed at the same time."""
        return math.ceil(SLICES_A_CORE * self._cores * SLICE / batch_size) if self._on_cpu else 1

    @property
    def _on_cpu(self) -> bool:
        return self._model.device.type == "cpu"

    @property
    def _cores(self) -> int:
        trainer = self._model._trainer  # None without one, where .trainer raises
        return cores_per_process(trainer) if trainer is not None else usable_cores()

    @property
    def _threads(self) -> ThreadPoolExecutor:  # the Trainer may come after the first batch, with fewer cores
        if (cores := self._cores) not in self._pools:
            self._pools[cores] = ThreadPoolExecutor(cores, "network", initializer=one_core)
        return self._pools[cores]

    @cached_property
    def _copies(self) -> Any:
        return torch.cuda.Stream(self._model.device)  # type: ignore[no-untyped-call]

    def _autocast(self) -> AbstractContextManager[Any]:
        # Autocast belongs to a thread, and Lightning switches it on in the main one only. What the plugins of true
        # precisions switch is the default dtype of all threads, which nothing here depends on.
        plugin = self._model._trainer.precision_plugin if self._model._trainer is not None else None
        return plugin.forward_context() if isinstance(plugin, MixedPrecision) else nullcontext()


def _join(parts: list[dict[str, Tensor]], places: Tensor) -> dict[str, Tensor]:
    """Return the rows of slices in the order of their batch."""
    features = {}
    for layer in parts[0]:
        if len(widths := {part[layer].shape[1] for part in parts}) > 1:
            raise UserError(
                f"--model.layer {layer}: {' and '.join(map(str, sorted(widths)))} columns for images of different "
                "shapes in one batch.\nGive them one shape with --data.crop, or take a layer after the pooling."
            )
        found = torch.cat([part[layer] for part in parts])  # (B, D), as grouped
        features[layer] = found[places.to(found.device)]
    return features
