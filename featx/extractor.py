"""Batches -> activations: FeatureExtractor(LightningModule), what users subclass."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from featx import network as networks
from featx.checkpoint import digest, fit, read_checkpoint
from featx.datamodule import Batch, cores_per_process, usable_cores
from featx.layers import Taps, resolve_layers
from featx.messages import BadValueError, UserError, count, log
from featx.network import SEED, Weights
from featx.preprocess import Preprocessing
from featx.trace import Pool

# Images that one core computes at a time. On a CPU the last bits of a result depend on how many images and threads
# compute it, so both are fixed: one thread a slice, and as many slices at once as there are cores. Of 8, 16 and 32,
# 16 was the best or within 20 % of it for AlexNet, VGG16, ResNet-50 and ViT-B/16.
SLICE = 16
MANY_COLUMNS = 16384

T = TypeVar("T")


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
            network's last Linear; or the path of any module (featx layers lists them); a list as [fc6,fc7] takes
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

    Attributes:
        network: The network, from ``configure_model`` on.
        preprocessing: What the images have to go through for these weights.
        layers: Each layer with the path of its module.
        weights_used: What the network's weights are, in words.
        weights_digest: SHA-256 of the weights as they were loaded.
        weights_told: What is not plainly so: a fitted classifier, tensors that stayed random.

    Raises:
        UserError: From ``check`` and ``configure_model``, what cannot be used. ``ValueError`` and
            ``FileNotFoundError`` are among its bases.
    """

    network: nn.Module
    preprocessing: Preprocessing
    layers: dict[str, str]
    weights_used: str
    weights_digest: str
    weights_told: list[str]

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
        self._state: dict[str, Tensor] | None = None  # of the file, while the network is built
        self._taps: Taps | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._named_network_built = False

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
                raise BadValueError(f"--model.{name} {values}: expected three numbers, as [0.5,0.5,0.5], std above 0.")
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
        """Build the network, load its weights and hook its layers, once."""
        if self._taps is not None:
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
        self.weights_digest = digest(network)
        self._taps = Taps(network, self.layers, self.pool)

    def _build(self, seed: int) -> nn.Module:
        self._named_network_built = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # what stays random is the same in every process and every run
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

    def try_out(self, batch: Batch) -> dict[str, Tensor]:
        """Run one small batch and return its rows, ``(B, D) float32`` of each layer.

        Raises:
            UserError: The images do not go through the network, or a layer cannot be taken.
        """
        rows = self.predict_step(batch)
        if self._pool is not None:
            self._pool.shutdown()  # the run's own number of cores may be another
            self._pool = None
        self._warn_of_many({layer: values.shape[1] for layer, values in rows.items()})
        return rows

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return each layer's rows, ``(B, D) float32``, for images ``(B, 3, H, W) uint8`` of one shape."""
        assert self._taps is not None, "configure_model() comes first"
        return self.run(images, self._taps)

    def run(self, images: Tensor, network: Callable[[Tensor], T]) -> T:
        """Normalise images ``(B, 3, H, W) uint8``, give them to the network, or what runs it, and return the result.

        Raises:
            UserError: The network does not take them.
        """
        with torch.inference_mode(), self._precision():
            pixels = self.preprocessing.normalize(images).to(self._network_dtype())
            try:
                return network(pixels)
            except (torch.OutOfMemoryError, UserError):
                raise
            except (RuntimeError, AssertionError, ValueError) as err:  # torchvision's networks raise all three
                raise UserError(
                    f"{self.title} failed on images of the shape {tuple(images.shape[1:])}: "
                    f"{str(err).splitlines()[0]}\nIf it cannot take them, --data.resize and --data.crop change it."
                ) from err

    def predict_step(self, batch: Batch, batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return each layer's rows, ``(B, D) float32``, in the order of the batch's names; nothing without an image.

        Raises:
            UserError: Images of different shapes gave rows of different lengths.
        """
        if not batch.groups:
            return {}
        slices = [(rows[i : i + self._slice], images[i : i + self._slice])
                  for rows, images in batch.groups for i in range(0, len(rows), self._slice)]  # fmt: skip
        if self.device.type == "cpu":
            parts = list(self._threads().map(self.forward, [images for _, images in slices]))
        else:
            parts = [self.forward(images) for _, images in slices]
        order = torch.tensor([row for rows, _ in slices for row in rows])
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

    @property
    def _slice(self) -> int:
        return SLICE if self.device.type == "cpu" else 1 << 30

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            cores = cores_per_process(self.trainer) if self._trainer is not None else usable_cores()
            self._pool = ThreadPoolExecutor(cores, "network", initializer=torch.set_num_threads, initargs=(1,))
        return self._pool

    def _precision(self) -> AbstractContextManager[Any]:
        # Autocast belongs to a thread, and Lightning switches it on in the main one only.
        return self.trainer.precision_plugin.forward_context() if self._trainer is not None else nullcontext()

    def _network_dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.network.parameters() if p.is_floating_point()), torch.float32)

    def _choose_weights(self) -> Weights:
        return networks.choose_weights(self.arch, self.weights)
