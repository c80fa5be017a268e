"""A network that an importable function returns: ``package.module.name``."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from featx.data.preprocess import Preprocessing
from featx.errors import BadValueError, first_line
from featx.model.libraries.base import Library, State, Weights
from featx.process import imports


class Function(Library):
    """A function that returns a network."""

    def published(self) -> dict[str, Weights]:
        """Return what the function built."""
        return {"auto": Weights(f"as {self.arch}() made them")}

    def preset(self, weights: Weights, state: State | None = None, network: nn.Module | None = None) -> Preprocessing:
        """Return what the network carries."""
        return self.resized(preset_of(network))

    def build(self, weights: Weights, state: State | None = None) -> nn.Module:
        """Call the function."""
        arch = self.arch
        function = import_function(arch)
        try:
            network = function()
        except Exception as err:
            raise BadValueError(
                f"--model.arch {arch}: calling {arch}() failed: {type(err).__name__}: {first_line(err)}\n"
                "Expected a function without arguments that returns an nn.Module. To pass arguments, call it in "
                "build_network()\nof a subclass of featx.FeatureExtractor, and give that as --model."
            ) from err
        if not isinstance(network, nn.Module):
            raise BadValueError(
                f"--model.arch {arch}: {arch}() returned a {type(network).__name__}. Expected an nn.Module."
            )
        return network


def preset_of(network: nn.Module | None) -> Preprocessing:
    """Return the preprocessing that a network carries, as those of timm do, or the usual one for ImageNet."""
    cfg = getattr(network, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or "input_size" not in cfg:
        return Preprocessing.usual()
    data = import_module("timm.data").resolve_data_config(pretrained_cfg=cfg)
    return Preprocessing.of_timm(f"timm/{cfg.get('architecture', type(network).__name__)}", data)


def import_function(arch: str) -> Callable[[], Any]:
    """Import the function that ``--model.arch`` names; raise UserError if that fails."""
    return imports.import_function(arch, "--model.arch", "a function that returns an nn.Module")
