"""Which tensors a pass reads until its layers are computed, and what a file must therefore contain."""

import pytest
import torch
from conftest import random_network
from torch import nn
from torchvision import models

from featx.errors import BadValueError
from featx.model.checkpoint import fit
from featx.model.reads import tensors_read


class Parts(nn.Module):
    """A parameter of its own, a module whose weight is read without a call, one that is shared, and two heads."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.late = nn.Parameter(torch.ones(1))
        self.enter = nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.unused = nn.Linear(8, 2)
        self.head = nn.Linear(8, 2)
        self.tied = self.head

    def forward(self, images):
        x = self.enter(images * self.scale).flatten(2).mT
        x = self.attention(x, x, x, need_weights=False)[0].mean(1)
        return self.head(x) * self.late


def read(network, layer, side=8):
    before = torch.get_rng_state()
    found = tensors_read(network, {layer: layer}, "none", torch.zeros(2, 3, side, side))
    assert torch.equal(torch.get_rng_state(), before)
    return found


def test_every_tensor_that_an_operation_reads_is_found_called_or_not():
    network = Parts().eval()
    first = {"scale", "enter.weight", "enter.bias"}
    assert read(network, "enter") == first
    attention = {f"attention.{name}" for name, _ in network.attention.named_parameters()}
    head = {"head.weight", "head.bias", "tied.weight", "tied.bias"}
    assert read(network, "head") == first | attention | head
    assert read(network, "penultimate") == first | attention
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert read(network, "unused") is None and read(network, "enter", side=1) is None


def load(network, state, layer, side=64):
    return fit(network, state, "f", "it", tensors_read=lambda network: read(network, layer, side))


def test_what_comes_after_the_layers_need_not_be_in_the_file_or_fit():
    source, target = random_network("resnet18"), random_network("resnet18", seed=2)
    body = {name: value for name, value in source.state_dict().items() if not name.startswith("fc.")}
    head = target.fc.weight.clone()
    told = "not needed for the layers: 2 of 102 tensors stay random: fc.weight; fc.bias"
    assert load(target, body, "avgpool") == [told]
    assert torch.equal(target.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert torch.equal(target.fc.weight, head)
    other = {"fc.1.weight": torch.ones(7, 512), "fc.weight": torch.ones(3)}
    assert load(target, body | other, "penultimate") == [told]
    early = {name: value for name, value in body.items() if name.startswith(("conv1", "bn1", "layer1"))}
    assert load(random_network("resnet18", seed=2), early, "layer1")[0].startswith(
        "not needed for the layers: 77 of 102"
    )


@pytest.mark.parametrize(
    ("layer", "change", "words"),
    [
        ("fc", {}, "missing from the file: fc.weight; fc.bias\n"),
        ("avgpool", {"layer4.1.bn2.bias": None}, "missing from the file: layer4.1.bn2.bias\n"),
        ("layer1", {"layer1.0.conv1.weight": torch.ones(3)}, r"of another shape or type: layer1.0.conv1.weight \(3,\)"),
        ("avgpool", {"layer4.2.conv1.weight": torch.ones(3)}, "not in the network: layer4.2.conv1.weight"),
        ("avgpool", {"layer5.0.conv1.weight": torch.ones(3)}, "not in the network: layer5.0.conv1.weight"),
    ],
)
def test_what_the_layers_need_must_be_in_the_file_and_fit(layer, change, words):
    network = random_network("resnet18")
    body = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")} | change
    with pytest.raises(BadValueError, match=words):
        load(network, {name: value for name, value in body.items() if value is not None}, layer)


def test_of_a_network_with_windows_the_first_block_suffices():
    network = models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=3).eval()
    found = read(network, "features.1", side=32)
    assert found == {name for name in network.state_dict() if name.startswith(("features.0.", "features.1."))}
