"""Batches -> activations: FeatureExtractor(LightningModule), what users subclass."""

import math
import textwrap
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
import torchvision
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from featx.data.batch import Batch
from featx.data.preprocess import Preprocessing
from featx.errors import BadValueError, UserError, count, first_line, log
from featx.model import build as networks
from featx.model.build import SEED, Weights
from featx.model.checkpoint import digest, fit, read_checkpoint
from featx.model.layers import Taps, resolve_layers
from featx.model.trace import Pool
from featx.process.cores import cores_per_process, usable_cores
from featx.process.shared import Shared, one_core

# Images that one core computes at a time. On a CPU the last bits of a result depend on how many images and threads
# compute it, so both are fixed: one thread a slice, and as many slices at once as there are cores. Of 8, 16 and 32,
# 16 was the best or within 10 % of it for AlexNet, VGG16, ResNet-50, MobileNetV3-small (in channels_last) and ViT-B/16.
# 32 makes a run of AlexNet 3 to 5 % shorter, but its memory then grows by tens of MiB, by chance.
SLICE = 16
REVISION = 1  # goes up whenever the pass gives other values than before: no run then takes rows of before
MANY_COLUMNS = 16384
SAME = 1e-5  # relative (L2): the memory layout may change last bits only

SLICES_A_CORE = 2  # begun or waiting, so that all cores have work until the next batch is here

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


class Rows(Mapping[str, Tensor]):
    """Each layer's rows, ``(B, D) float32``, of a batch that may still be computed: who reads them waits for them.

    Args:
        layers: The layers.
        finish: Waits for the rows and returns them.
    """

    def __init__(self, layers: Iterable[str], finish: Callable[[], dict[str, Tensor]]) -> None:
        self._layers = list(layers)
        self._finish = finish

    @cached_property
    def _rows(self) -> dict[str, Tensor]:
        return self._finish()

    def __getitem__(self, layer: str) -> Tensor:
        return self._rows[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def to(self, *device: Any, **how: Any) -> dict[str, Tensor]:
        """Return the rows on a device: so Lightning takes them where it is to return them all at the end."""
        return {layer: rows.to(*device, **how) for layer, rows in self.items()}


class FeatureExtractor(LightningModule):
    """Which network, with which weights, and which of its layers.

    To use a network of one's own, override ``build_network``::

        class Mine(FeatureExtractor):
            def build_network(self) -> nn.Module:
                return torchvision.models.alexnet(num_classes=10)

    and give its weights with ``--model.weights FILE``, or load them there. Two class attributes say more of it:
    ``layer_aliases``, names for layers' paths, as ``{"embedding": "backbone.fc"}``; and ``preset``, what its images go
    through, as ``Preprocessing.of_weights(ResNet50_Weights.IMAGENET1K_V2)``; without it the usual for ImageNet.

    Args:
        layer: fc6, fc7 or fc8 of AlexNet and networks built like it, before the ReLU; penultimate, the input of any
            network's last Linear; or the path of any module (featx layers lists them); a list as '[fc6,fc7]' takes
            several in one pass.
        arch: Name of a torchvision classification network, timm/NAME, or package.module.name of a function that
            returns a network.
        weights: auto: torchvision's best for the arch; DEFAULT or a name such as IMAGENET1K_V1; a file; random.
        pool: Of layers with more than one value a channel or token: none takes all, C,H,W row-major; avg or max one
            a channel, over all places or tokens; cls the first token.
        checkpoint_key: Where in the file the weights are, as model.ema; null: where checkpoints usually have them.
        strict: Whether the file must hold all of the network; false: load what fits, the rest stays random.
        unsafe_pickle: Whether loading the file may run code that is in it.
        mean: Mean of the three channels, on the scale 0..1; auto: what the weights were trained with.
        std: Standard deviation of the three channels, likewise.
        channels_last: Memory layout that convolutions are faster in; auto: where a trial shows the same rows in it.
        compile: Whether torch.compile makes the network's pass; it needs a C++ compiler and a minute at the start.

    Attributes:
        network: The network, from ``configure_model`` on.
        preprocessing: What the images have to go through for these weights.
        layers: Each layer with the path of its module.
        weights_used: What the network's weights are, in words.
        packages: Versions of the installed packages that the network's code comes from, besides torch and torchvision.
        weights_told: What is not plainly so: a fitted classifier, tensors that stayed random.
        memory_layout: contiguous or channels_last; from ``try_out`` on.
        stages: Seconds that cores took for the network.

    Raises:
        UserError: From ``check`` and ``configure_model``, what cannot be used. ``ValueError`` and
            ``FileNotFoundError`` are among its bases.
    """

    network: nn.Module
    preprocessing: Preprocessing
    layers: dict[str, str]
    weights_used: str
    weights_told: list[str]
    packages: dict[str, str]

    layer_aliases: dict[str, str] = {}  # noqa: RUF012, a ClassVar could not be set on one extractor
    preset: Preprocessing | None = None

    def __init__(
        self,
        layer: str | list[str] = "fc7",
        arch: str = "alexnet",
        weights: str = "auto",
        pool: Pool = "none",
        checkpoint_key: str | None = None,
        strict: bool = True,
        unsafe_pickle: bool = False,
        mean: Literal["auto"] | list[float] = "auto",
        std: Literal["auto"] | list[float] = "auto",
        channels_last: Literal["auto"] | bool = "auto",
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.arch = arch
        self.weights = weights
        self.pool: Pool = pool
        self.checkpoint_key = checkpoint_key
        self.strict = strict
        self.unsafe_pickle = unsafe_pickle
        self.mean = mean
        self.std = std
        self.channels_last = channels_last
        self.compile = compile  # type: ignore[assignment, method-assign]  # the option's name, over nn.Module's method
        self._compiles = compile
        self.memory_layout = "contiguous"
        self.stages: dict[str, float] = defaultdict(float)
        self._state: dict[str, Tensor] | None = None  # of the file, while the network is built
        self._taps: Taps | None = None
        self._compiled: Callable[[Tensor], dict[str, Tensor]] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._running: deque[Future[Part]] = deque()
        self._dtype_built = torch.float32
        self._digest: str | None = None
        self._copies: Any = None  # the CUDA stream on which rows come back
        self._named_network_built = False

    @property
    def weights_digest(self) -> str:
        """SHA-256 of the weights, as they are when a run begins."""
        if self._digest is None:
            self._digest = digest(self.network)
        return self._digest

    @property
    def own_network(self) -> bool:
        """Whether a subclass builds the network."""
        return type(self).build_network is not FeatureExtractor.build_network

    @property
    def layer_list(self) -> list[str]:
        """The layers asked for, as the user named them."""
        return [self.layer] if isinstance(self.layer, str) else list(self.layer)

    @property
    def title(self) -> str:
        """What the network is called in messages and in the record."""
        return type(self).__name__ if self.own_network else self.arch

    def build_network(self) -> nn.Module:
        """Return the network: here, the one ``arch`` names, with the weights that ``weights`` names.

        The one method to override. Weights in a file are loaded afterwards, strictly.
        """
        self._named_network_built = True
        return networks.build(self.arch, self._choose_weights(), self._state)

    def check(self) -> None:
        """Raise UserError for what can be known before weights and images are read: arch, weights' name, layers."""
        if not self.layer_list:
            raise BadValueError("--model.layer []: expected at least one layer, such as fc7.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            good = values == "auto" or (len(values) == 3 and all(map(math.isfinite, values)))
            if not good or (name == "std" and values != "auto" and min(values) <= 0):
                raise BadValueError(f"--model.{name} {values}: expected three numbers as '[0.5,0.5,0.5]', std above 0.")
        if not self.own_network:
            networks.check_arch(self.arch)
            if not networks.is_function(self.arch):  # that one is called once, by configure_model
                self._resolve(networks.build_empty(self.arch))
        weights = self._choose_weights()
        options = {"checkpoint_key": self.checkpoint_key, "strict": self.strict, "unsafe_pickle": self.unsafe_pickle}
        for name, value in options.items():
            if not weights.file and value != {"strict": True, "unsafe_pickle": False}.get(name):
                raise BadValueError(
                    f"--model.{name} {str(value).lower()}: it says how a file is read, and --model.weights "
                    f"{self.weights} is none."
                )

    def configure_model(self) -> None:
        """Build the network, load its weights and hook its layers, once.

        Raises:
            UserError: Something in them cannot be used, or the Trainer of an earlier run converted the network.
        """
        if self._taps is not None:
            if (dtype := self._network_dtype()) != self._dtype_built:
                raise UserError(
                    f"{self.title}: an earlier Trainer's precision converted its network from {self._dtype_built} to "
                    f"{dtype}.\nMake a new FeatureExtractor for another run."
                )
            return
        self.check()
        weights = self._choose_weights()
        if weights.file:
            self._state = read_checkpoint(weights.file, self.checkpoint_key, self.unsafe_pickle)
        network = self._build(SEED)
        if not self._named_network_built and not weights.file and self.weights != "auto":
            raise BadValueError(
                f"--model.weights {self.weights}: {self.title} builds its own network, to which this name says nothing."
                "\nExpected a file, or nothing: then the weights are what build_network() made them."
            )
        self.layers = self._resolve(network)
        self.preprocessing = self._choose_preprocessing(weights)
        as_built = self.own_network and not weights.file
        self.weights_used = f"as {self.title}.build_network() made them" if as_built else weights.name
        self.weights_told = []
        log.info("network: %s, weights: %s", self.title, self.weights_used)
        if self._state is not None:
            self.weights_told = fit(network, self._state, self.weights, self.title, self.strict)
            self._state = None
        elif weights.random:
            log.warning("RANDOM WEIGHTS (seed %d): these features say nothing about what is in the images", SEED)
        elif as_built or networks.is_function(self.arch):
            self.weights_told = self._random_tensors(network)
        self.network = network.eval().requires_grad_(False)
        self._dtype_built = self._network_dtype()
        self.packages = networks.packages(network, type(self), self.arch if self._named_network_built else "")
        self._taps = Taps(network, self.layers, self.pool)

    def _build(self, seed: int) -> nn.Module:
        self._named_network_built = False
        with networks.seeded(seed, None if self.own_network else self.arch):
            network = self.build_network()
        if not isinstance(network, nn.Module):
            raise BadValueError(f"--model {self.title}: build_network() returned {network!r}. Expected an nn.Module.")
        return network

    def _resolve(self, network: nn.Module) -> dict[str, str]:
        return resolve_layers(network, self.layer_list, self.title, self.layer_aliases)

    def _choose_preprocessing(self, weights: Weights) -> Preprocessing:
        built = self._named_network_built
        preset = self.preset or (
            networks.preset_of(self.arch, weights, self._state) if built else Preprocessing.usual()
        )
        options = {"mean": self.mean, "std": self.std}
        given: dict[str, Any] = {name: tuple(value) for name, value in options.items() if value != "auto"}
        return replace(preset, **given, source=f"{preset.source}, with your {' and '.join(given)}") if given else preset

    def _random_tensors(self, network: nn.Module) -> list[str]:
        """Say which tensors are random numbers: those that differ when the network is built from another seed."""
        again = self._build(SEED + 1).state_dict()
        found = [name for name, value in network.state_dict().items() if not torch.equal(value, again[name])]
        if not found:
            return []
        few = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
        told = f"{len(found)} of {count(len(again), 'tensor')} are random numbers (seed {SEED}): {few}"
        log.warning("RANDOM WEIGHTS: %s. --model.weights FILE gives trained ones", told)
        return [told]

    def identity(self, layer: str, precision: str) -> dict[str, Any]:
        """Return all of the model's that decides a value of a layer's rows, as plain values for JSON."""
        return {
            "network": self.title,
            "weights": self.weights_digest,
            "layer": layer,
            "module": self.layers[layer],
            "pool": self.pool,
            "precision": precision,
            "memory_layout": self.memory_layout,
            "compiled": self.compile,
            "images_a_slice": SLICE,
            "threads_a_slice": 1,
            "revisions": {"pass": REVISION},
            "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__, **self.packages},
        }

    def try_out(self, batch: Batch) -> dict[str, Tensor]:
        """Run one small batch, choose the memory layout, and return its rows, ``(B, D) float32`` of each layer.

        Raises:
            UserError: The images do not go through the network, or a layer cannot be taken.
        """
        self.network.eval()
        self._running.clear()  # what an earlier run left
        self._copies = None
        self.stages.clear()
        self._digest = None
        rows = dict(self.predict_step(batch))
        self.memory_layout = self._threads().submit(self._choose_layout, batch.groups[0][1].shape[1:]).result()
        if self._compiles:
            assert self._taps is not None
            self._compiled = torch.compile(self._taps.take, fullgraph=True, dynamic=False)
            rows = dict(self.predict_step(batch))
        if self._pool is not None:
            self._pool.shutdown()  # the run's own number of cores may be another
            self._pool = None
        self._warn_of_many({layer: values.shape[1] for layer, values in rows.items()})
        return rows

    def _choose_layout(self, shape: torch.Size) -> str:
        """Bring the network into the layout that suits it, and return that one's name.

        In all processes and in every run it comes to the same, since nothing decides but the network, before it goes
        to a device or another precision, and one random image of the shape ``(3, H, W)``.
        """
        self.network.to(memory_format=torch.contiguous_format)  # an earlier run may have left it in the other one
        wanted = self.channels_last
        if wanted == "auto" and not any(isinstance(module, nn.Conv2d) for module in self.network.modules()):
            wanted = False
        if wanted is False:
            return "contiguous"
        assert self._taps is not None
        image = torch.randint(256, (2, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(SEED))
        pixels = self.preprocessing.normalize(image)
        try:
            with torch.inference_mode():
                expected = self._taps(pixels)
            self.network.to(memory_format=torch.channels_last)
            with torch.inference_mode():
                found = self._taps(pixels.contiguous(memory_format=torch.channels_last))
            far = [layer for layer in expected
                   if not (found[layer] - expected[layer]).norm() <= SAME * expected[layer].norm()]  # fmt: skip
            if wanted is True or not far:
                return "channels_last"
            why = f"other rows of {', '.join(far)}"
        except Exception as err:  # whatever a network raises: .view(), for one, wants what is contiguous
            if wanted is True:
                raise UserError(
                    f"--model.channels_last true: {self.title} fails in this memory layout: {first_line(err)}\n"
                    "--model.channels_last auto uses it only where it works."
                ) from err
            why = f"{type(err).__name__}"
        self.network.to(memory_format=torch.contiguous_format)
        log.info("memory layout: contiguous, since %s in channels_last: %s", self.title, why)
        return "contiguous"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return each layer's rows, ``(B, D) float32``, for images ``(B, 3, H, W) uint8`` of one shape."""
        assert self._taps is not None, "configure_model() comes first"
        if self._compiled is None:
            return self.run(images, self._taps)
        # Each number of images would be compiled anew, to other last bits where it is left open: on a CPU it is one.
        more = max(0, SLICE - len(images)) if self.device.type == "cpu" else 0
        rows = self.run(torch.cat([images, images.new_zeros(more, *images.shape[1:])]), self._compiled)
        return {layer: values[: len(images)] for layer, values in rows.items()}

    def run(self, images: Tensor, network: Callable[[Tensor], T]) -> T:
        """Normalise images ``(B, 3, H, W) uint8``, give them to the network, or what runs it, and return the result.

        Raises:
            UserError: The network does not take them.
        """
        layout = torch.channels_last if self.memory_layout == "channels_last" else torch.contiguous_format
        exactly = FULL_PRECISION if self.device.type == "cuda" else nullcontext()
        with torch.inference_mode(), self._precision(), exactly:
            pixels = self.preprocessing.normalize(images).to(self._network_dtype()).contiguous(memory_format=layout)
            try:
                return network(pixels)
            except (torch.OutOfMemoryError, UserError):
                raise
            except (RuntimeError, AssertionError, ValueError) as err:  # torchvision's networks raise all three
                if type(err).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    raise UserError(
                        f"--model.compile true: torch.compile fails for {self.title} on this machine: "
                        f"{textwrap.shorten(first_line(err), 300)}\nIt needs a C++ compiler, and images of few shapes. "
                        "--model.compile false does without it."
                    ) from err
                raise UserError(
                    f"{self.title} failed on images of the shape {tuple(images.shape[1:])}: "
                    f"{str(err).splitlines()[0]}\nIf it cannot take them, --data.resize and --data.crop change it."
                ) from err

    def predict_step(self, batch: Batch, batch_idx: int = 0, dataloader_idx: int = 0) -> Mapping[str, Tensor]:
        """Return each layer's rows, ``(B, D) float32``, in the order of the batch's names; nothing without an image.

        They may still be computed while the next batch is asked for: whoever reads them waits for them.

        Raises:
            UserError: Images of different shapes gave rows of different lengths; or here, or where they are read.
        """
        if not batch.groups:
            return {}
        slices = [(rows[i : i + self._slice], images[i : i + self._slice])
                  for rows, images in batch.groups for i in range(0, len(rows), self._slice)]  # fmt: skip
        order = torch.tensor([row for rows, _ in slices for row in rows])
        if self.device.type != "cpu":
            rows = self._join([self.forward(images) for _, images in slices], order)
            return self._copied(rows) if self.device.type == "cuda" else rows
        threads = self._threads()
        futures = [threads.submit(self._timed, images) for _, images in slices]
        self._running.extend(futures)
        while len(self._running) > SLICES_A_CORE * self._cores:
            self._running.popleft().result()
        return Rows(self.layers, lambda: self._finish(futures, order))

    def _copied(self, rows: dict[str, Tensor]) -> Rows:
        """Copy rows from the GPU beside what it computes next, on a stream of their own."""
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            copies = {layer: values.to("cpu", non_blocking=True) for layer, values in rows.items()}  # in pinned memory
        for values in rows.values():
            values.record_stream(self._copies)  # else its memory is given to the next batch while it is copied
        arrived = self._copies.record_event()

        def finish() -> dict[str, Tensor]:
            arrived.synchronize()
            return copies

        return Rows(self.layers, finish)

    def _timed(self, images: Tensor) -> Part:
        begin = time.thread_time()
        return self.forward(images), time.thread_time() - begin

    def _finish(self, futures: list["Future[Part]"], order: Tensor) -> dict[str, Tensor]:
        parts = [future.result() for future in futures]
        self.stages["network"] += sum(seconds for _, seconds in parts)
        return self._join([rows for rows, _ in parts], order)

    def _join(self, parts: list[dict[str, Tensor]], order: Tensor) -> dict[str, Tensor]:
        features = {}
        for layer in self.layers:
            widths = {part[layer].shape[1] for part in parts}
            if len(widths) > 1:
                raise UserError(
                    f"--model.layer {layer}: {' and '.join(map(str, sorted(widths)))} columns for images of different "
                    "shapes in one batch.\nGive them one shape with --data.crop, or take a layer behind the pooling."
                )
            found = torch.cat([part[layer] for part in parts])  # (B, D), as grouped
            features[layer] = torch.empty_like(found).index_copy_(0, order.to(found.device), found)
        return features

    def _warn_of_many(self, columns: dict[str, int]) -> None:
        assert self._taps is not None
        many = [layer for layer, number in columns.items() if number > MANY_COLUMNS]
        if many:
            told = ", ".join(f"{layer} has {count(columns[layer], 'column')}" for layer in many)
            pooled = self.pool == "none" and any(len(self._taps.shapes[layer]) > 1 for layer in many)
            way_out = ": --model.pool avg takes one a channel instead" if pooled else ""
            log.warning("%s%s", told, way_out)

    def batches_at_once(self, batch_size: int) -> int:
        """Return how many batches may be computed at the same time."""
        return math.ceil(SLICES_A_CORE * self._cores * self._slice / batch_size) if self.device.type == "cpu" else 1

    @property
    def _slice(self) -> int:
        return SLICE if self.device.type == "cpu" else 1 << 30

    @property
    def _cores(self) -> int:
        return cores_per_process(self.trainer) if self._trainer is not None else usable_cores()

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._cores, "network", initializer=one_core)
        return self._pool

    def _precision(self) -> AbstractContextManager[Any]:
        # Autocast belongs to a thread, and Lightning switches it on in the main one only. What the plugins of true
        # precisions switch is the default dtype of all threads, which nothing here depends on.
        plugin = self.trainer.precision_plugin if self._trainer is not None else None
        return plugin.forward_context() if isinstance(plugin, MixedPrecision) else nullcontext()

    def _network_dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.network.parameters() if p.is_floating_point()), torch.float32)

    def _choose_weights(self) -> Weights:
        return networks.choose_weights(self.arch, self.weights)
