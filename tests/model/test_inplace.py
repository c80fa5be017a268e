"""No later module changes a hooked output, on every classification network of torchvision.

The reference is a pass in which no module, function or operator works in place, so that every output is still there
after the pass. The networks are whole, with the smallest images that they accept and weights that are cheap to make.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models

from featx.model.layers import Taps

HOOKED = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, batchnorm._NormBase)
SIDES = {"alexnet": 64, "inception_v3": 75, "maxvit_t": 224}
OPTIONS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
OPTIONS |= {arch: {"image_size": 32} for arch in ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32")}
OPTIONS["vit_h_14"] = {"image_size": 28}
# Half of the time of all, for the code of smaller ones with more or wider blocks.
LARGEST = {"efficientnet_v2_l", "regnet_y_128gf", "regnet_y_32gf", "resnet101", "vit_h_14", "vit_l_16", "vit_l_32",
           "wide_resnet101_2"}  # fmt: skip


def cheap_network(arch: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Build a network with slices of the same noise as weights; initializing them would take minutes."""
    with monkeypatch.context() as patch:
        for name in nn.init.__all__:
            if name.endswith("_"):
                patch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
        network = models.get_model(arch, weights=None, **OPTIONS.get(arch, {}))
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for parameter in network.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(noise)):
            part = flat[start : start + len(noise)]
            part.copy_(noise[: len(part)])
        if parameter.ndim > 1:
            parameter.data.div_(parameter[0].numel() ** 0.5)
    return network.eval().requires_grad_(False)


class OutOfPlace(TorchFunctionMode):
    """Make a new tensor in every function that would write into its argument."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("inplace"):
            kwargs["inplace"] = False
        name = func.__name__
        if name.endswith("_") and not name.endswith("__"):  # x += y is Tensor.add_, and binds what it returns
            func = getattr(Tensor, name[:-1], func)
        return func(*args, **kwargs)


class Untouched(TorchDispatchMode):
    """Fail if an operator writes into the memory of one of these tensors; Swin may fill its own mask in place."""

    def __init__(self, outputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.outputs = outputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            written = args[0].untyped_storage().data_ptr()
            assert all(output.untyped_storage().data_ptr() != written for output in self.outputs.values()), func
        return func(*args, **(kwargs or {}))


def reference(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the output of each module of the hooked kinds, from a pass without in-place operations."""
    flags = [module for module in network.modules() if getattr(module, "inplace", False)]
    outputs: dict[str, Tensor] = {}
    handles = [module.register_forward_hook(lambda module, inputs, output, path=path: outputs.update({path: output}))
               for path, module in network.named_modules() if isinstance(module, HOOKED)]  # fmt: skip
    for module in flags:
        module.inplace = False
    with Untouched(outputs), OutOfPlace():
        network(images)
    for module in flags:
        module.inplace = True
    for handle in handles:
        handle.remove()
    return outputs


@pytest.fixture(autouse=True)
def one_way_to_compute() -> Iterator[None]:
    """Use one thread, which suits small images, and no fast path in attention, as under a dispatch mode."""
    threads, fast = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.set_num_threads(threads)
    torch.backends.mha.set_fastpath_enabled(fast)


ARCHS = [
    pytest.param(arch, marks=pytest.mark.torture if arch in LARGEST else ()) for arch in models.list_models(models)
]


@pytest.mark.parametrize("arch", ARCHS)
def test_later_modules_never_change_a_hooked_output(arch, monkeypatch):
    network = cheap_network(arch, monkeypatch)
    side = SIDES.get(arch, OPTIONS.get(arch, {}).get("image_size", 32))
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = reference(network, images)
        expected = {path: output for path, output in outputs.items() if len(output) == len(images)}
        found = Taps(network, {path: path for path in expected})(images)
    assert len(expected) > 7
    of_no_image = outputs.keys() - expected.keys()  # Swin v2 computes biases that are the same for all images
    assert all(".cpb_mlp." in path for path in of_no_image)
    for path, output in expected.items():
        assert torch.equal(found[path], output.flatten(1)), path
        assert output.isfinite().all(), path
