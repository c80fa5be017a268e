"""Batches -> activations: FeatureExtractor(LightningModule), what users subclass."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
import torchvision
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from featx.data.batch import Batch
from featx.data.preprocess import Preprocessing
from featx.errors import BadValueError, UserError, count, log, note
from featx.model import build as networks
from featx.model.build import SEED, Weights
from featx.model.checkpoint import digest, fit, read_checkpoint
from featx.model.compute import SLICE as SLICE
from featx.model.compute import Passes, dtype_of
from featx.model.layers import Taps, resolve_layers
from featx.model.trace import Pool

REVISION = 1  # goes up whenever the pass gives other values than before: no run then takes rows of before
MANY_COLUMNS = 16384

T = TypeVar("T")


class FeatureExtractor(LightningModule):
    """Which network, with which weights, and which of its layers.

    To use your own network, override ``build_network``::

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
        self._state: dict[str, Tensor] | None = None  # of the file, while the network is built
        self._taps: Taps | None = None
        self._passes: Passes | None = None
        self._dtype_built = torch.float32
        self._digest: str | None = None
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

    @property
    def passes(self) -> Passes:
        """What runs all passes; anew for each run."""
        assert self._passes is not None, "configure_model() comes first"
        return self._passes

    @property
    def memory_layout(self) -> str:
        """The network's: contiguous or channels_last; from ``try_out`` on."""
        return self.passes.memory_layout

    @property
    def stages(self) -> dict[str, float]:
        """Seconds that cores took for the network."""
        return self.passes.stages

    def build_network(self) -> nn.Module:
        """Return the network: here, the one ``arch`` names, with the weights that ``weights`` names.

        The one method to override. Weights in a file are loaded afterwards, strictly.
        """
        self._named_network_built = True
        return networks.named(self.arch).build(self._choose_weights(), self._state)

    def check(self) -> None:
        """Raise UserError for what can be known before weights and images are read: arch, weights' name, layers."""
        if not self.layer_list:
            raise BadValueError("--model.layer []: expected at least one layer, such as fc7.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            good = values == "auto" or (len(values) == 3 and all(map(math.isfinite, values)))
            if not good or (name == "std" and values != "auto" and min(values) <= 0):
                raise BadValueError(f"--model.{name} {values}: expected three numbers as '[0.5,0.5,0.5]', std above 0.")
        if not self.own_network and networks.is_function(self.arch):
            networks.import_function(self.arch)  # it is called once, by configure_model
        elif not self.own_network:
            self._resolve(networks.build_empty(self.arch))
        weights = self._choose_weights()
        for name, usual in (("checkpoint_key", None), ("strict", True), ("unsafe_pickle", False)):
            if not weights.file and (value := getattr(self, name)) != usual:
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
            if (dtype := dtype_of(self.network)) != self._dtype_built:
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
        note("network", f"{self.title}, weights: {self.weights_used}")
        if self._state is not None:
            self.weights_told = fit(network, self._state, self.weights, self.title, self.strict, networks.guess_arch)
            self._state = None
        elif weights.random:
            log.warning("RANDOM WEIGHTS (seed %d): these features say nothing about what is in the images", SEED)
        elif as_built or networks.is_function(self.arch):
            self.weights_told = self._random_tensors(network)
        self.network = network.eval().requires_grad_(False)
        self._dtype_built = dtype_of(network)
        self.packages = networks.packages(network, type(self), self.arch if self._named_network_built else "")
        self._taps = Taps(network, self.layers, self.pool)
        self._passes = Passes(self, self._taps, self.preprocessing.normalize, self.title)

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
        preset = self.preset or Preprocessing.usual()
        if self._named_network_built and not self.preset:
            preset = networks.named(self.arch).preset(weights, self._state)
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
        assert self._taps is not None, "configure_model() comes first"
        self.network.eval()
        self._digest = None
        self._passes = Passes(self, self._taps, self.preprocessing.normalize, self.title)  # nothing of an earlier run's
        found = self._passes.try_out(batch.groups[0][1], self.channels_last, self._compiles)
        self.layers = {layer: each.module for layer, each in found.items()}
        rows = dict(self.predict_step(batch))
        self.stages.clear()  # the run's own, without a compiler's minute
        if many := [layer for layer, values in rows.items() if values.shape[1] > MANY_COLUMNS]:
            told = ", ".join(f"{layer} has {count(rows[layer].shape[1], 'column')}" for layer in many)
            pooled = self.pool == "none" and any(len(found[layer].shape) > 1 for layer in many)
            log.warning("%s%s", told, ": --model.pool avg takes one a channel instead" if pooled else "")
        return rows

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return each layer's rows, ``(B, D) float32``, for images ``(B, 3, H, W) uint8`` of one shape."""
        return self.passes.forward(images)

    def run(self, images: Tensor, network: Callable[[Tensor], T]) -> T:
        """Normalise images ``(B, 3, H, W) uint8``, give them to the network, or what runs it, and return the result.

        Raises:
            UserError: The network does not take them.
        """
        return self.passes.run(images, network)

    def predict_step(self, batch: Batch, batch_idx: int = 0, dataloader_idx: int = 0) -> Mapping[str, Tensor]:
        """Return each layer's rows, ``(B, D) float32``, in the order of the batch's names; nothing without an image.

        They may still be computed while the next batch is asked for: reading them waits for them.

        Raises:
            UserError: Images of different shapes gave rows of different lengths; or here, or where they are read.
        """
        return self.passes.rows(batch)

    def batches_at_once(self, batch_size: int) -> int:
        """Return how many batches may be computed at the same time."""
        return self.passes.batches_at_once(batch_size)

    def _choose_weights(self) -> Weights:
        return networks.choose_weights(self.arch, self.weights)
