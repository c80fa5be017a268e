"""Compute the rows of batches: in slices on the cores of a CPU or on a GPU, in the memory layout that suits."""

import math
import os
import textwrap
import time
import traceback
from collections import UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from featx.data.batch import Batch
from featx.errors import UserError, first_few, first_line, log
from featx.model.build import SEED
from featx.model.layers import Found, Taps
from featx.model.reads import attributes_set
from featx.model.reduce import Reduction
from featx.model.trace import first_difference
from featx.process.cores import cores_per_process, usable_cores
from featx.process.shared import LOCK, Shared, one_core

# Images that one core computes at a time. On a CPU the last bits of a result depend on the numbers of images and of
# threads, so both are fixed: one thread per slice, and one slice per core at a time. Of 8, 16 and 32, 16 was the best
# or within 10% of it for AlexNet, VGG16, ResNet-50, MobileNetV3-small (in channels_last) and ViT-B/16. With 32, a run
# of AlexNet takes 3 to 5% less time, but its memory sometimes grows by tens of MiB.
SLICE = 16
SLICES_PER_CORE = 2  # running or waiting, so that all cores have work until the next batch arrives
FEATX, TORCH = (os.path.dirname(path) + os.sep for path in (os.path.dirname(__file__), torch.__file__))
SAME = 1e-5  # relative difference (L2): the memory layout may change last bits only

T = TypeVar("T")
Part = tuple[dict[str, Tensor], float]  # the rows of a slice, and the core's seconds for them


@contextmanager
def _full_precision() -> Iterator[None]:
    """Let cuDNN compute float32 convolutions in full precision, not with ten bits of mantissa (TF32).

    https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """
    flags: Any = torch.backends.cudnn
    name: str = "allow_tf32"
    value: bool | str = False
    try:
        before = flags.allow_tf32
    except RuntimeError:  # torch refuses to read it after the process has set the flags of torch 2.9
        flags, name, value = flags.conv, "fp32_precision", "ieee"
        before = flags.fp32_precision
    setattr(flags, name, value)
    try:
        yield
    finally:
        setattr(flags, name, before)


FULL_PRECISION = Shared(_full_precision)


def dtype_of(network: nn.Module) -> torch.dtype:
    """Return the dtype of a network's first floating-point parameter."""
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def check_dtype(network: nn.Module, built: torch.dtype, title: str) -> None:
    """Raise UserError if a network is not of the dtype that it was ``built`` in."""
    if (dtype := dtype_of(network)) != built:
        raise UserError(
            f"{title}: an earlier Trainer's precision converted its network from {built} to {dtype}.\n"
            "Create a new FeatureExtractor for this run."
        )


class Rows(UserDict[str, Tensor]):
    """Each layer's rows, ``(B, D) float32``, of a batch that may still be in progress; ``finish`` waits for them."""

    def __init__(self, finish: Callable[[], dict[str, Tensor]]) -> None:
        self._finish = finish

    @cached_property
    def data(self) -> dict[str, Tensor]:  # type: ignore[override]
        """The rows, as soon as they are computed."""
        return self._finish()

    def to(self, *device: Any, **how: Any) -> dict[str, Tensor]:
        """Return the rows on a device; Lightning calls this to collect predictions."""
        return {layer: rows.to(*device, **how) for layer, rows in self.items()}


class Passes:
    """All passes of a run: on a CPU in slices, each on one core, else in whole batches.

    Args:
        model: Has the device, and the Trainer with the precision and number of processes.
        taps: The network and its hooks.
        normalize: Turns images ``(B, 3, H, W) uint8`` into the network's input.
        title: The network's name in messages.
        stochastic: Whether the network may draw random numbers, which are then seeded for each batch.
        reduction: What becomes of the rows afterwards.

    Attributes:
        memory_layout: contiguous or channels_last, chosen by ``try_out``.
        reduction: As given.
        stages: Seconds of all cores in the network.
    """

    def __init__(
        self,
        model: LightningModule,
        taps: Taps,
        normalize: Callable[[Tensor], Tensor],
        title: str,
        stochastic: bool,
        reduction: Reduction,
    ) -> None:
        self.memory_layout = "contiguous"
        self.stages: dict[str, float] = defaultdict(float)
        self._model = model
        self._taps = taps
        self._network = taps.network
        self._normalize = normalize
        self._title = title
        self._stochastic = stochastic
        self.reduction = reduction
        self._one_at_a_time = False  # whether the network keeps something in its modules during a pass
        self._compiled: Callable[[Tensor], dict[str, Tensor]] | None = None
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._running: deque[Future[Part]] = deque()

    def try_out(self, images: Tensor, channels_last: Literal["auto"] | bool, compiles: bool) -> dict[str, Found]:
        """Run the first pass, choose the memory layout, and return each layer; see ``FeatureExtractor.try_out``."""
        with ThreadPoolExecutor(1, initializer=one_core) as thread:
            found = thread.submit(self._first_passes, images[:1]).result()
            self.memory_layout = thread.submit(self._choose_layout, images.shape[1:], channels_last).result()
        if compiles:
            self._compiled = torch.compile(self._taps.take, fullgraph=True, dynamic=False)
        return found

    def _first_passes(self, image: Tensor) -> dict[str, Found]:
        """Return each layer; raise UserError if two more passes differ in any bit of the rows."""
        before = torch.get_rng_state()
        with self._seeded():
            found = self.run(image, self._taps.find)

        def run(network: Callable[[Tensor], T]) -> T:
            with self._seeded():
                return self.run(image, network)

        one = run(self._taps)
        with attributes_set(self._network) as changed:
            other = run(self._taps)
        self._one_at_a_time = bool(changed)
        if changed:
            log.info("threads: one, since %s sets attributes in its passes: %s", self._title, first_few([*changed]))
        if all(torch.equal(one[layer].view(torch.int32), other[layer].view(torch.int32)) for layer in one):  # NaN too
            return found
        where = first_difference(self._network, run)
        torch.set_rng_state(before)
        refused = f"{self._title} gives different rows in two passes of one image. {where}"
        if self._stochastic:
            raise UserError(
                f"--model.stochastic true: {refused}\nTorch's random numbers were the same in both. Expected a network "
                "that draws no others, such as numpy's, and keeps no state."
            )
        raise UserError(
            f"--model.stochastic false: {refused}\nExpected a network without random numbers in eval mode. "
            "--model.stochastic true takes this one, and seeds them for each batch."
        )

    @contextmanager
    def _seeded(self, batch: int = 0) -> Iterator[None]:
        """Within this context, a stochastic network draws the random numbers of a batch, in whichever run it is.

        All threads have one generator on a CPU: https://docs.pytorch.org/docs/stable/random.html. It is restored.
        """
        if not self._stochastic:
            yield
            return
        gpus = [self._model.device] if self._model.device.type == "cuda" else []
        with LOCK, torch.random.fork_rng(gpus):
            (torch.default_generator.manual_seed if self._on_cpu else torch.manual_seed)(SEED + batch)
            yield

    def _choose_layout(self, shape: torch.Size, wanted: Literal["auto"] | bool) -> str:
        """Convert the network to the layout that suits it, and return the layout's name.

        All processes and runs choose the same, since only the network, still on the CPU and in its own precision, and
        random images of the shape ``(3, H, W)`` decide.
        """

        def rows(layout: torch.memory_format) -> dict[str, Tensor]:
            self._network.to(memory_format=layout)
            with torch.inference_mode():
                return self._taps(pixels.contiguous(memory_format=layout))

        self._network.to(memory_format=torch.contiguous_format)  # an earlier run may have changed it
        convolves = any(isinstance(module, nn.Conv2d) for module in self._network.modules())
        if wanted is False or (wanted == "auto" and (self._stochastic or not convolves)):  # noise follows the layout
            return "contiguous"
        seeded = torch.Generator().manual_seed(SEED)
        pixels = self._normalize(torch.randint(256, (2, *shape), dtype=torch.uint8, generator=seeded))
        try:
            expected, found = rows(torch.contiguous_format), rows(torch.channels_last)
            changed = [layer for layer in expected
                       if not (found[layer] - expected[layer]).norm() <= SAME * expected[layer].norm()]  # fmt: skip
            if wanted is True or not changed:
                return "channels_last"
            reason = f"gives different rows for {', '.join(changed)}"
        except Exception as err:  # a network may raise anything: .view(), for example, needs contiguous tensors
            if wanted is True:
                raise UserError(
                    f"--model.channels_last true: {self._title} fails in this memory layout: {first_line(err)}\n"
                    "--model.channels_last auto uses it only where it works."
                ) from err
            reason = f"raises {type(err).__name__}"
        self._network.to(memory_format=torch.contiguous_format)
        log.info("memory layout: contiguous, since %s %s in channels_last", self._title, reason)
        return "contiguous"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return each layer's rows, ``(B, D) float32``, for images ``(B, 3, H, W) uint8`` of one shape."""
        if self._compiled is None:
            return self.run(images, self._taps)
        # Each number of images is compiled anew, and a dynamic one changes last bits, so a CPU gets one number only.
        more = max(0, SLICE - len(images)) if self._on_cpu else 0
        rows = self.run(torch.cat([images, images.new_zeros(more, *images.shape[1:])]), self._compiled)
        return {layer: values[: len(images)] for layer, values in rows.items()}

    def run(self, images: Tensor, network: Callable[[Tensor], T]) -> T:
        """Normalize images and call the network, or a function in its place; see ``FeatureExtractor.run``."""
        layout = torch.channels_last if self.memory_layout == "channels_last" else torch.contiguous_format
        precision = FULL_PRECISION if self._model.device.type == "cuda" else nullcontext()
        with torch.inference_mode(), self._autocast(), precision:
            pixels = self._normalize(images).to(dtype_of(self._network)).contiguous(memory_format=layout)
            try:
                return network(pixels)
            except (torch.OutOfMemoryError, UserError):
                raise
            except Exception as err:  # a network may raise anything
                if type(err).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    raise UserError(
                        f"--model.compile true: torch.compile fails for {self._title} on this machine: "
                        f"{textwrap.shorten(first_line(err), 300)}\nIt needs a C++ compiler, and images of few shapes. "
                        "--model.compile false turns it off."
                    ) from err
                frames = traceback.extract_tb(err.__traceback__)
                if frames[-1].filename.startswith(FEATX):
                    raise
                place = next((f"  {each.filename}:{each.lineno}, in {each.name}\n" for each in reversed(frames)
                              if not each.filename.startswith((FEATX, TORCH))), "")  # fmt: skip
                raise UserError(
                    f"{self._title} failed on images of the shape {tuple(images.shape[1:])}: {type(err).__name__}: "
                    f"{textwrap.shorten(first_line(err), 300)}\n{place}If it needs another shape, set --data.resize "
                    "and --data.crop.\nIf it needs other inputs than one tensor (B, 3, H, W), return the part of it "
                    "that takes images\nin build_network() of a subclass."
                ) from err

    def rows(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return each layer's rows of a batch; see ``FeatureExtractor.predict_step``."""
        if not batch.groups:
            return {}
        most = SLICE if self._on_cpu else len(batch.names)
        slices = [(rows[i : i + most], images[i : i + most])
                  for rows, images in batch.groups for i in range(0, len(rows), most)]  # fmt: skip
        places = torch.tensor([row for rows, _ in slices for row in rows]).argsort()
        if not self._on_cpu:
            with self._seeded(batch.number):
                rows = _join([self._model.forward(images) for _, images in slices], places)
            return self._copied(rows) if self._model.device.type == "cuda" else self.reduction(rows)
        threads = self._threads
        if self._stochastic:
            return self._finish(threads.submit(self._in_turn, batch.number, slices).result(), places)
        futures = [threads.submit(self._timed, images) for _, images in slices]
        self._running.extend(futures)
        while len(self._running) > SLICES_PER_CORE * self._cores:
            self._running.popleft().result()
        return Rows(lambda: self._finish([future.result() for future in futures], places))

    def _copied(self, rows: dict[str, Tensor]) -> Rows:
        """Copy rows from the GPU on a separate stream, while it computes the next batch."""
        self._copies.wait_stream(torch.cuda.current_stream(self._model.device))
        with torch.cuda.stream(self._copies):
            copies = {layer: values.to("cpu", non_blocking=True) for layer, values in rows.items()}  # in pinned memory
        for values in rows.values():
            values.record_stream(self._copies)  # else the next batch could reuse its memory during the copy
        arrived = self._copies.record_event()

        def finish() -> dict[str, Tensor]:
            arrived.synchronize()
            return self.reduction(copies)

        return Rows(finish)

    def _timed(self, images: Tensor) -> Part:
        begin = time.thread_time()
        rows = self.reduction(self._model.forward(images))
        return rows, time.thread_time() - begin

    def _in_turn(self, batch: int, slices: list[tuple[list[int], Tensor]]) -> list[Part]:
        with self._seeded(batch):
            return [self._timed(images) for _, images in slices]

    def _finish(self, parts: list[Part], places: Tensor) -> dict[str, Tensor]:
        self.stages["network"] += sum(seconds for _, seconds in parts)
        return _join([rows for rows, _ in parts], places)

    def wait(self) -> None:
        """Wait for the passes in progress; reading their rows raises what went wrong."""
        wait(self._running)

    def batches_at_once(self, batch_size: int) -> int:
        """Return how many batches may be in progress at the same time."""
        return math.ceil(SLICES_PER_CORE * self._cores * SLICE / batch_size) if self._on_cpu else 1

    @property
    def _on_cpu(self) -> bool:
        return self._model.device.type == "cpu"

    @property
    def _cores(self) -> int:
        trainer = self._model._trainer  # None without one, where .trainer raises
        return cores_per_process(trainer) if trainer is not None else usable_cores()

    @property
    def _threads(self) -> ThreadPoolExecutor:  # a Trainer set after the first batch may leave fewer cores
        if (cores := 1 if self._one_at_a_time else self._cores) not in self._pools:
            self._pools[cores] = ThreadPoolExecutor(cores, "network", initializer=one_core)
        return self._pools[cores]

    @cached_property
    def _copies(self) -> Any:
        return torch.cuda.Stream(self._model.device)  # type: ignore[no-untyped-call]

    def _autocast(self) -> AbstractContextManager[Any]:
        # Autocast is set per thread, and Lightning turns it on in the main thread only. The plugins of true precisions
        # set the default dtype of all threads, on which nothing here depends.
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
