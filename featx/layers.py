"""fc6 -> classifier.1; a module's path -> a hook that copies its output; what is said of a wrong one."""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from featx.messages import BadValueError, UserError, did_you_mean


def find_aliases(network: nn.Module) -> dict[str, str]:
    """Return ``fc6``, ``fc7`` and ``fc8`` with their module paths for networks built like AlexNet, else nothing.

    That is: three Linears, the last one at the end, in a Sequential called ``classifier``. The names are those of
    the AlexNet paper's Caffe model, https://github.com/BVLC/caffe/tree/master/models/bvlc_alexnet.
    """
    classifier = getattr(network, "classifier", None)
    if not isinstance(classifier, nn.Sequential):
        return {}
    linears = [name for name, module in classifier.named_children() if isinstance(module, nn.Linear)]
    names = [name for name, _ in classifier.named_children()]
    if len(linears) != 3 or linears[-1] != names[-1]:
        return {}
    return {alias: f"classifier.{name}" for alias, name in zip(("fc6", "fc7", "fc8"), linears, strict=True)}


def resolve_layers(network: nn.Module, layers: list[str], what: str) -> dict[str, str]:
    """Return each layer with the path of its module.

    Args:
        network: Where to look them up.
        layers: Aliases or module paths, as the user gave them.
        what: What the network is called, for the message.

    Raises:
        BadValueError: The network has no such layer, or one is named twice.
    """
    aliases = find_aliases(network)
    paths = [path for path, _ in network.named_modules() if path]
    found = {}
    for layer in layers:
        if layer in found:
            raise BadValueError(f"--model.layer: {layer} is named twice. Expected each layer once.")
        path = aliases.get(layer, layer)
        if path not in paths:
            known = [*aliases, *paths]
            own = f"{', '.join(aliases)}, or a" if aliases else "a"
            last = f" such as {paths[-1]}" if paths else ""
            raise BadValueError(
                f"--model.layer {layer}: {what} has no such layer.{did_you_mean(layer, known)}\n"
                f"Expected {own} path of one of its modules,{last}."
            )
        found[layer] = path
    return found


class Taps:
    """Forward hooks that copy the outputs of some modules, whichever thread runs the pass.

    Each output is copied before anything behind its module can change it in place, as AlexNet's ReLUs do:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.ReLU.html.

    Args:
        network: The network whose modules are hooked.
        layers: Each layer with the path of its module.

    Example:
        >>> Taps(alexnet, {"fc7": "classifier.4"})(images)["fc7"].shape
        torch.Size([64, 4096])
    """

    def __init__(self, network: nn.Module, layers: dict[str, str]) -> None:
        self.network = network
        self.layers = layers
        self._pass = threading.local()
        for layer, path in layers.items():
            network.get_submodule(path).register_forward_hook(self._copier(layer, path))

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Run one pass and return each layer's output, ``(B, D) float32``, row-major where it had more dimensions.

        Args:
            images: What the network takes, ``(B, 3, H, W)``.

        Raises:
            UserError: A module was not called, called twice, or returned something else than a tensor of B rows.
        """
        outputs: dict[str, Tensor] = {}
        self._pass.outputs = outputs
        self.network(images)
        for layer, path in self.layers.items():
            if layer not in outputs:
                raise UserError(f"--model.layer {layer}: the network never calls {path}. Take another of its modules.")
            output = outputs[layer]
            if output.ndim == 0 or len(output) != len(images):
                raise UserError(
                    f"--model.layer {layer}: {path} returns the shape {tuple(output.shape)} for "
                    f"{len(images)} images. Expected a first dimension of one entry an image."
                )
        return {layer: outputs[layer].reshape(len(images), -1) for layer in self.layers}

    def _copier(self, layer: str, path: str) -> Any:
        def copy(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise UserError(
                    f"--model.layer {layer}: {path} returns a {type(output).__name__}. Expected a module that "
                    "returns one tensor."
                )
            if layer in self._pass.outputs:
                raise UserError(
                    f"--model.layer {layer}: the network calls {path} more than once in a pass. Expected a module "
                    "that it calls once."
                )
            copied = output.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            self._pass.outputs[layer] = copied

        return copy
