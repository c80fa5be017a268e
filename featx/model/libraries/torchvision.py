"""Classification networks of torchvision, for example ``alexnet``."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

from featx.data.preprocess import Preprocessing
from featx.errors import BadValueError, did_you_mean
from featx.model.checkpoint import read_checkpoint
from featx.model.download import digest, digest_in, fetch
from featx.model.libraries.base import Library, State, Weights

TRANSFORM_INPUT = ("googlenet", "inception_v3")  # these networks adapt images to their weights' own mean
POSITIONS = "encoder.pos_embedding"


class Torchvision(Library):
    """A classification network of torchvision."""

    def __init__(self, arch: str, image_size: int | None = None) -> None:
        super().__init__(arch, image_size)
        if arch not in (known := models.list_models(module=models)):
            raise BadValueError(
                f"--model.arch {arch}: torchvision has no classification network with this name."
                f"{did_you_mean(arch, known)}\n"
                "https://docs.pytorch.org/vision/stable/models.html lists them. For other networks give timm/NAME,\n"
                "hf/NAME, open_clip/NAME, or package.module.name of a function that returns one."
            )
        self._entries = models.get_model_weights(arch)

    def published(self) -> dict[str, Weights]:
        """Return torchvision's entries."""
        best = self._entries.DEFAULT
        named = {"auto": best, "DEFAULT": best, **self._entries.__members__}
        return {name: Weights(str(entry), entry=entry) for name, entry in named.items()}

    def preset(self, weights: Weights, state: State | None = None, network: nn.Module | None = None) -> Preprocessing:
        """Return the transforms of an entry; a ViT's at the image size of the file's weights."""
        size = _image_size(state)
        recipe = self._recipe(weights, size)
        preset = Preprocessing.of_weights(recipe)
        if self.arch in TRANSFORM_INPUT:
            preset = replace(preset, source=f"{recipe}; then the network's own transform_input")
        if self.image_size is None and size not in (None, preset.crop):
            return replace(preset, resize=size, crop=size, source=f"{recipe}, at the {size} pixels of the weights")
        return self.resized(preset)

    def build(self, weights: Weights, state: State | None = None) -> nn.Module:
        """Build it as torchvision's own builder does for its weights."""
        options: dict[str, Any] = {"weights": weights.entry}
        is_vit = self.arch.startswith("vit_")
        file = fetch(weights.entry.url) if weights.entry is not None else None
        if is_vit and (weights.entry is None or self.image_size):
            size, patch = self.image_size or _image_size(state), int(self.arch[-2:])
            fits = size is not None and (self.image_size or size % patch == 0)  # else the file is another network's
            options = {"image_size": size if fits else self._recipe(weights, None).meta["min_size"][0]}
        elif self.arch in TRANSFORM_INPUT and weights.entry is None:
            # With published weights, GoogLeNet's builder drops its auxiliary heads, and Inception's keeps its own.
            aux = self.arch == "inception_v3" and (state is None or any("AuxLogits." in name for name in state))
            options |= {"transform_input": True, "init_weights": False, "aux_logits": aux}
        network: nn.Module = models.get_model(self.arch, **options)
        if is_vit and self.image_size and file:
            network.load_state_dict(self.rename(network, read_checkpoint(str(file)), str(file)))
        return network

    def rename(self, network: nn.Module, state: State, file: str) -> State:
        """Interpolate a ViT's position embedding to ``image_size``."""
        name = next((name for name in state if name.endswith(POSITIONS)), None)
        if self.image_size is None or name is None or not self.arch.startswith("vit_"):
            return state
        found = interpolate_embeddings(self.image_size, int(self.arch[-2:]), {POSITIONS: state[name]})
        return {**state, name: found[POSITIONS]}

    def _recipe(self, weights: Weights, size: int | None) -> Any:
        if weights.file and len(self._entries) > 1 and (published := self._published_as(Path(weights.file))):
            return published
        first = self._entries.__members__.get("IMAGENET1K_V1", self._entries.DEFAULT)
        of_size = (entry for entry in (first, *self._entries) if entry.transforms().crop_size == [size])
        return weights.entry or next(of_size, first)

    def _published_as(self, file: Path) -> Any:
        """Return the entry of the weights that a file contains, whatever its name, or None."""
        size = file.stat().st_size / 2**20
        near = [entry for entry in self._entries if abs(entry.meta["_file_size"] - size) < 0.01]
        found = digest(file) if near else ""
        return next((entry for entry in near if found.startswith(digest_in(entry.url) or "none")), None)


def _image_size(state: State | None) -> int | None:
    """Return the image size in pixels that a ViT's weights were trained at, or None for another network."""
    state = state or {}
    patches = [value for name, value in state.items() if name.endswith(POSITIONS)]
    convs = [value for name, value in state.items() if name.endswith("conv_proj.weight")]
    if not patches or not convs or patches[0].ndim != 3 or convs[0].ndim != 4 or not patches[0].shape[1]:
        return None
    return math.isqrt(patches[0].shape[1] - 1) * convs[0].shape[-1] or None  # (1, 1 + patches, D), (D, 3, side, side)


def guess_arch(shapes: Mapping[str, torch.Size], empty: Any) -> str | None:
    """Return the arch that best fits these tensors by name and shape, if more than half of them fit.

    Building all 80 would take seconds, so only the ten with the nearest numbers of parameters are built, by ``empty``.
    The right one is among them even without its classifier, unless that is most of the network, as in VGG.
    """
    size = sum(shape.numel() for name, shape in shapes.items() if not name.startswith("aux"))  # num_params omits them
    sizes = {arch: models.get_model_weights(arch).DEFAULT.meta["num_params"] for arch in models.list_models(models)}
    scores = {}
    for arch in sorted(sizes, key=lambda arch: abs(math.log(sizes[arch] / max(1, size))))[:10]:
        own = {name: value.shape for name, value in empty(arch).state_dict().items() if value.ndim}
        same = sum(own.get(name) == shape for name, shape in shapes.items())
        scores[arch] = same / max(len(own), len(shapes))
    best = max(scores, key=lambda arch: scores[arch])
    return best if scores[best] > 0.5 else None
