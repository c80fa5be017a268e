"""The modules of a network as one pass calls them."""

import pytest
import torch
from conftest import random_network
from torch import nn
from torchvision import models

from featx.errors import BadValueError
from featx.model.trace import Trace


def traced(network: nn.Module, *shape: int) -> Trace:
    with torch.inference_mode():
        return Trace(network.eval(), torch.rand(2, *shape))


class Aux(nn.Module):
    """Has an auxiliary head, its last module, which no pass in eval mode calls."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)
        self.aux = nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.fc(x)
        return (self.head(hidden), self.aux(hidden)) if self.training else self.head(hidden)


def test_modules_are_in_the_order_of_execution():
    assert list(traced(nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 2)), 3).calls) == [
        "0.0",
        "0.1",
        "0",
        "1",
    ]


def test_no_hook_stays():
    traced(network := nn.Sequential(nn.Linear(3, 2)), 3)
    assert not network[0]._forward_hooks


def test_the_head_is_the_linear_that_gives_the_output():
    assert traced(Aux(), 6).head() == "head"
    same = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Dropout())
    assert traced(same, 4).head() == "4", "others have its shape"
    nn.init.constant_(same[4].bias, torch.nan)
    assert traced(same, 4).head() == "4", "NaN or not"


@pytest.mark.parametrize(
    ("arch", "path"),
    [
        ("alexnet", "classifier.6"),
        ("vgg11_bn", "classifier.6"),
        ("resnet18", "fc"),
        ("mobilenet_v3_small", "classifier.3"),
        ("densenet121", "classifier"),
        ("googlenet", "fc"),
        ("swin_t", "head"),
    ],
)
def test_the_head_of_torchvisions(arch, path):
    extra = {"init_weights": False} if arch == "googlenet" else {}
    assert traced(random_network(arch, **extra), 3, 64, 64).head() == path


class Heads(nn.Module):
    """A network with two heads and, in ``forward``, what it makes of them."""

    def __init__(self, forward):
        super().__init__()
        self.fc, self.other, self.gate, self.combine = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4), forward

    def forward(self, x):
        return self.combine(self, x)


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda own, x: (own.fc(x) + own.other(x)) / 2, "2 Linears have the shape of the network's output: fc, other"),
        (lambda own, x: (own.fc(x), own.gate(x)), "2 Linears have the shape of the network's output: fc, gate"),
        (lambda own, x: {"logits": own.fc(x), "scaled": own.gate(x) / 9}, "2 Linears .* fc, gate"),
        (lambda own, x: x * own.fc(x).sigmoid(), "the network's output is not that of a Linear"),
        (lambda own, x: own.fc(x).relu_(), "the network's output is not that of a Linear"),
        (lambda own, x: x, "the network's output is not that of a Linear"),
        (lambda own, x: own.fc(own.fc(x)), "the network calls the Linear fc 2 times per pass"),
        (lambda own, x: own.fc(x.T @ x), r"the Linear fc receives the shape \(6, 6\) for 2 images"),
        (lambda own, x: own.fc(x[:, None]), "the network's output is not that of a Linear"),
    ],
)
def test_several_heads_or_none_are_refused(forward, words):
    with pytest.raises(BadValueError, match=f"^{words}$"):
        traced(Heads(forward), 6).head()


def test_the_head_of_an_output_in_a_dict_is_found():
    assert traced(Heads(lambda own, x: {"logits": own.fc(x), "hidden": [x, own.gate(x)[:, :2]]}), 6).head() == "fc"


@pytest.mark.parametrize("arch", ["swin_t", "swin_v2_t", "convnext_tiny", "maxvit_t", "resnet18", "efficientnet_b0"])
def test_the_channel_axis_is_right_in_networks_that_mix_layouts(arch):
    """The expected layout follows from the names of the modules; neither layout may be mistaken for the other."""
    trace = traced(random_network(arch), 3, *((224, 224) if arch == "maxvit_t" else (64, 96)))
    found = {path: trace.channel_axis(path) for path, call in trace.calls.items()
             if len(call.returned) == 4 and call.returned[0] == 2}  # fmt: skip
    last = set()
    if arch.startswith("swin"):  # from the first Permute to the last one, all is (B, H, W, C)
        last = {path for path in found if path not in ("features.0.0", "permute", "avgpool")}
    if arch.startswith("convnext"):  # inside each block, from one Permute to the next
        last = {path for path in found if ".block." in path and path.split(".")[-1] in "12345" and path[-2] == "."}
    if arch == "maxvit_t":
        parts = ("partition", "attn_layer", "mlp_layer", "stochastic_dropout")
        last = {path for path in found if any(part in path for part in parts) and not path.endswith("departition_op")}
        last -= {path for path in found if path.endswith(("window_attention", "grid_attention"))}
    for path, axis in found.items():
        assert axis in (None, -1 if path in last else 1), path
    known = [path for path, axis in found.items() if axis]
    assert len(known) >= 0.9 * len(found)


def test_a_shape_that_both_layouts_share_is_refused():
    class Block(nn.Module):
        def forward(self, x):
            return x + 1

    network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(4, 4), Block())
    trace = traced(network, 4, 4, 4)
    assert trace.channel_axis("0") == 1 and trace.channel_axis("1") == -1
    with pytest.raises(BadValueError, match=r"2 returns \(4, 4, 4\) per image, and it is unclear"):
        trace.shape("2", "avg")
    assert trace.shape("2", "none") == (2, 4, 4, 4)


def test_a_shape_of_neither_layout_is_refused_in_a_network_with_both():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.ReLU())
    assert traced(network, 3, 5, 6).channel_axis("2") is None  # (B, 4, 30): 30 tokens of 4, but as (B, C, L)
    assert (
        traced(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Upsample(scale_factor=2)), 3, 5, 6).channel_axis("2")
        == 1
    )


def test_conv1d_gives_channels_first_and_a_transformer_tokens():
    assert traced(nn.Sequential(nn.Conv1d(3, 5, 1), nn.ReLU()), 3, 7).channel_axis("1") == 1
    encoder = models.vit_b_16(image_size=32).encoder
    assert traced(encoder, 5, 768).channel_axis("layers.encoder_layer_0") == -1
