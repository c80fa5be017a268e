"""Turn batches into activations: FeatureExtractor, a LightningModule that users can subclass."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
import torchvision
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from featx.data.batch import Batch
from featx.data.preprocess import Preprocessing, given_channels
from featx.errors import BadValueError, log, note
from featx.model import build as networks
from featx.model.build import SEED
from featx.model.checkpoint import digest, fit, read_checkpoint, with_normalizer
from featx.model.compute import SLICE as SLICE
from featx.model.compute import Passes, check_dtype, dtype_of
from featx.model.layers import DEFAULT, Taps, default_layer, resolve_layers
from featx.model.libraries.base import Library, Tower, Weights
from featx.model.libraries.function import import_function, preset_of
from featx.model.reads import tensors_read
from featx.model.reduce import Reduction, check_columns, warn_of_many_columns
from featx.model.trace import Pool

REVISION = 1  # increase it whenever the pass gives different values, so that no run resumes with older rows

T = TypeVar("T")


class FeatureExtractor(LightningModule):
    """Computes the activations of a network's layers.

    To use your own network, override ``build_network``::

        class Mine(FeatureExtractor):
            def build_network(self) -> nn.Module:
                return torchvision.models.alexnet(num_classes=10)

    and give its weights with ``--model.weights FILE``, or load them there. Two class attributes are optional:
    ``layer_aliases`` names layers, for example ``{"embedding": "backbone.fc"}``, and ``preset`` is the preprocessing,
    for example ``Preprocessing.of_weights(ResNet50_Weights.IMAGENET1K_V2)``; the default is that of a network of timm,
    else the usual for ImageNet.

    Args:
        layer: fc6, fc7 or fc8 of AlexNet and networks built like it, before the ReLU; embedding, the vector that the
            network's makers call an image's features; penultimate, the input of the Linear that gives the output; or
            the path of any module (featx layers lists them); PATH:2, its second call; PATH#0, the first member of its
            output. A list such as '[fc6,fc7]' takes several in one pass. auto: fc7, or embedding if there is none.
        arch: Name of a torchvision classification network; timm/NAME; hf/NAME or hf/./folder, of transformers;
            open_clip/NAME; or package.module.name of a function that returns a network.
        weights: auto: the best published for the arch; DEFAULT or a name such as IMAGENET1K_V1; a file; random.
        image_size: Side of the images that the network gets, in pixels; null: as the weights were trained.
        pool: How to reduce a layer with several values per channel or token: none keeps them all, C,H,W row-major;
            avg or max keeps one per channel, over all positions or tokens; cls keeps the first token.
        reduce: Project wider layers at random to so many columns.
        normalize: Whether to scale each row to length 1.
        checkpoint_key: Where the weights are in the file, for example model.ema; null: under one of the usual keys.
        strict: Whether the file must have all that the layers need; false: load what fits, the rest stays random.
        mean: Mean of the three channels, on the scale 0..1; auto: as the weights were trained.
        std: Standard deviation of the three channels, on the same scale; auto: as the weights were trained.
        channels_last: Use this memory layout, faster for convolutions; auto: if a trial gives the same rows with it.
        stochastic: Whether the network may draw random numbers in eval mode; they are seeded for each batch.
        compile: Compile the network with torch.compile, which needs a C++ compiler and a minute at the start.

    Attributes:
        network: The network, from ``configure_model`` on.
        preprocessing: The preprocessing that the weights need.
        layers: Each layer with the path of its module.
        weights_used: Description of the weights.
        weights_notes: Exceptions to it: a resized classifier, tensors that stay random.
        layer_by_default: Whether ``layer`` was auto; it is the layer itself once the network is known.
        packages: Versions of the installed packages that contain the network's code, besides torch and torchvision.

    Raises:
        UserError: From ``check`` and ``configure_model``, for a wrong value of an option. Its subclasses are also
            ``ValueError`` or ``FileNotFoundError``.
    """

    network: nn.Module
    preprocessing: Preprocessing
    layers: dict[str, str]
    weights_used: str
    weights_notes: list[str]
    packages: dict[str, str]

    layer_aliases: dict[str, str] = {}  # noqa: RUF012, a ClassVar could not be set per instance
    preset: Preprocessing | None = None

    def __init__(
        self,
        layer: str | list[str] = "auto",
        arch: str = "alexnet",
        weights: str = "auto",
        image_size: int | None = None,
        pool: Pool = "none",
        reduce: int | None = None,
        normalize: bool = False,
        checkpoint_key: str | None = None,
        strict: bool = True,
        mean: Literal["auto"] | list[float] = "auto",
        std: Literal["auto"] | list[float] = "auto",
        channels_last: Literal["auto"] | bool = "auto",
        stochastic: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if image_size is not None and image_size < 1:
            raise BadValueError(f"--model.image_size {image_size}: expected a whole number of at least 1, or null.")
        self.layer = layer
        self.arch = arch
        self.weights = weights
        self.image_size = image_size
        self.pool: Pool = pool
        self.reduce = reduce
        self.normalize = normalize
        self.checkpoint_key = checkpoint_key
        self.strict = strict
        self.mean = mean
        self.std = std
        self.channels_last = channels_last
        self.stochastic = stochastic
        self.compile = compile  # type: ignore[assignment, method-assign]  # the option's name hides nn.Module's method
        self._compiles = compile
        self.layer_by_default = False
        self._state: dict[str, Tensor] | None = None  # of the file, while the network is built
        self._weights: Weights | None = None
        self._taps: Taps | None = None
        self._passes: Passes | None = None
        self._dtype_built = torch.float32
        self._digest: str | None = None
        self._named_network_built = False

    @property
    def weights_digest(self) -> str:
        """SHA-256 of the weights at the beginning of the run."""
        if self._digest is None:
            self._digest = digest(self.network)
        return self._digest

    @property
    def own_network(self) -> bool:
        """Whether a subclass builds the network."""
        return type(self).build_network is not FeatureExtractor.build_network

    @property
    def layer_list(self) -> list[str]:
        """The layers as the user named them."""
        return [self.layer] if isinstance(self.layer, str) else list(self.layer)

    @property
    def title(self) -> str:
        """The network's name in messages and in the record."""
        return type(self).__name__ if self.own_network else self.arch

    @property
    def passes(self) -> Passes:
        """The passes of the current run."""
        assert self._passes is not None, "configure_model() comes first"
        return self._passes

    @property
    def memory_layout(self) -> str:
        """The network's memory layout, contiguous or channels_last, chosen by ``try_out``."""
        return self.passes.memory_layout

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of all cores in the network."""
        return self.passes.stages

    def build_network(self) -> nn.Module:
        """Return the network that ``arch`` names, with published weights if ``weights`` names them.

        This is the method to override. The weights in a file are loaded afterwards.
        """
        self._named_network_built = True
        return networks.build(self._library, self._weights or Weights("none"), self._state)

    def check(self) -> None:
        """Raise UserError for mistakes that show before weights and images are read: arch, name of weights, layers."""
        if not self.layer_list:
            raise BadValueError("--model.layer []: expected at least one layer, such as fc7.")
        given_channels(mean=self.mean, std=self.std)
        check_columns(self.reduce)
        if not self.own_network and networks.is_function(self.arch):
            import_function(self.arch)  # configure_model calls it
        elif not self.own_network:
            self._resolve(networks.build_empty(self.arch, self.image_size))
        weights = networks.choose_weights(self.arch, self.weights)
        if not weights.file:
            networks.check_no_file(self.weights, checkpoint_key=(self.checkpoint_key, None), strict=(self.strict, True))

    def configure_model(self) -> None:
        """Build the network, load its weights and hook its layers, once.

        Raises:
            UserError: An option has a wrong value, or the Trainer of an earlier run converted the network.
        """
        if self._taps is not None:
            check_dtype(self.network, self._dtype_built, self.title)
            return
        self.check()
        weights = networks.choose_weights(self.arch, self.weights)
        weights = self._library.fetch(weights)
        if weights.file:
            self._state = read_checkpoint(weights.file, self.checkpoint_key)
        self._weights = weights
        network = self._build(SEED)
        if not self._named_network_built and not weights.file:
            networks.check_own_weights(self.weights, self.title)
        networks.check_program(network, self.layer_list, self.title)
        self.layers = self._resolve(network)
        self.preprocessing = self._choose_preprocessing(weights, network)
        as_built = self.own_network and not weights.file
        self.weights_used = f"as {self.title}.build_network() made them" if as_built else weights.name
        self.weights_notes = []
        note("network", f"{self.title}, weights: {self.weights_used}")
        if self._state is not None:
            state, file = self._state, str(weights.file)
            if self._named_network_built:
                state = dict(self._library.rename(network, state, file))
            self.weights_notes = fit(
                network, state, file, self.title, self.strict, networks.guess_arch, self._tensors_read
            )
            self._state = None
        elif weights.random:
            log.warning("RANDOM WEIGHTS (seed %d): these features say nothing about what the images show", SEED)
        elif as_built or networks.is_function(self.arch):
            self.weights_notes = networks.random_tensors(network, self._build(SEED + 1))
        if self.image_size is not None:
            networks.check_image_size(network, self.image_size, self.title, dtype_of(network))
        self.network = network.eval().requires_grad_(False)
        self._dtype_built = dtype_of(network)
        self.packages = networks.packages(network, type(self), self.arch if self._named_network_built else "")
        self._taps = Taps(network, self.layers, self.pool)
        self._passes = self._new_passes(self._taps)

    def _new_passes(self, taps: Taps) -> Passes:
        reduction = Reduction(self.reduce, self.normalize)
        return Passes(self, taps, self.preprocessing.normalize, self.title, self.stochastic, reduction)

    def _build(self, seed: int) -> nn.Module:
        self._named_network_built = False
        with networks.seeded(seed, None if self.own_network else self.arch):
            return networks.checked(self.build_network(), self.title)

    @property
    def _library(self) -> Library:
        return networks.named(self.arch, self.image_size)

    def _resolve(self, network: nn.Module) -> dict[str, str]:
        if self.layer == DEFAULT:
            self.layer = default_layer(network, self.layer_aliases)
            self.layer_by_default = True
        return resolve_layers(network, self.layer_list, self.title, self.layer_aliases)

    def _choose_preprocessing(self, weights: Weights, network: nn.Module) -> Preprocessing:
        given: dict[str, Any] = given_channels(mean=self.mean, std=self.std)
        if self.preset or not self._named_network_built:
            preset = self.preset or preset_of(network)
            preset = preset if self.image_size is None else preset.at(self.image_size)
        else:
            preset = networks.choose_preset(
                self._library, weights, self._state, network, knows_channels=len(given) == 2
            )
        if len(given) < 2 and self._state is not None:
            preset, self._state = with_normalizer(preset, network.state_dict(), self._state, self.weights)
        return replace(preset, **given, source=f"{preset.source}, with your {' and '.join(given)}") if given else preset

    def _tensors_read(self, network: nn.Module) -> set[str] | None:
        side = self.preprocessing.crop or self.preprocessing.resize or 224
        return tensors_read(network, self.layers, self.pool, torch.zeros(2, 3, side, side, dtype=dtype_of(network)))

    def identity(self, layer: str, precision: str) -> dict[str, Any]:
        """Return everything in the model that affects a value of a layer's rows, as plain values for JSON."""
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
            **({"stochastic": True} if self.stochastic else {}),
            **({"image_size": self.image_size} if self.image_size is not None else {}),
            **({"config": self.network.config_digest} if isinstance(self.network, Tower) else {}),
            **self.passes.reduction.identity(layer),
        }

    def try_out(self, batch: Batch) -> dict[str, Tensor]:
        """Run one small batch, choose the memory layout, and return each layer's rows, ``(B, D) float32``.

        Raises:
            UserError: The network fails on the images, or a layer cannot be taken.
        """
        assert self._taps is not None, "configure_model() comes first"
        self.network.eval()
        self._digest = None
        self._passes = self._new_passes(self._taps)
        found = self._passes.try_out(batch.groups[0][1], self.channels_last, self._compiles)
        self.layers = {layer: each.module for layer, each in found.items()}
        rows = dict(self.predict_step(batch))
        self.stages.clear()  # the trial, with its minute of compiling, does not count
        poolable = [layer for layer, each in found.items() if self.pool == "none" and len(each.shape) > 1]
        warn_of_many_columns(rows, poolable)
        return rows

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return each layer's rows, ``(B, D) float32``, for images ``(B, 3, H, W) uint8`` of one shape."""
        return self.passes.forward(images)

    def run(self, images: Tensor, network: Callable[[Tensor], T]) -> T:
        """Normalize images ``(B, 3, H, W) uint8`` and return what the network, or a function in its place, returns.

        Raises:
            UserError: The network fails on them.
        """
        return self.passes.run(images, network)

    def predict_step(self, batch: Batch, batch_idx: int = 0, dataloader_idx: int = 0) -> Mapping[str, Tensor]:
        """Return each layer's rows, ``(B, D) float32``, in the order of the batch's names; nothing without an image.

        The rows may still be in progress when the next batch is requested: reading them waits for them.

        Raises:
            UserError: Here or when the rows are read: images of different shapes gave rows of different lengths.
        """
        return self.passes.rows(batch)

    def on_predict_end(self) -> None:
        """Wait for the passes in progress: Lightning moves the network next, during which an RNN cannot run."""
        self.passes.wait()

    def batches_at_once(self, batch_size: int) -> int:
        """Return how many batches may be in progress at the same time."""
        return self.passes.batches_at_once(batch_size)
