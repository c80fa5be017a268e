"""Layers of modules that are called several times or return several tensors: ``relu:3``, ``attend#0``, ``step:all``."""

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from conftest import random_network
from torch import nn

from featx.errors import BadValueError, UserError
from featx.model.layers import Taps, resolve_layers
from featx.model.trace import Trace, named_tensors

STEPS = 3


@dataclass
class Hidden:
    """An output as many libraries have it."""

    last: torch.Tensor
    states: tuple[torch.Tensor, ...] = ()


class Block(nn.Module):
    def forward(self, x):
        return Hidden(x * 2, (x + 1, x - 1))


class Recurrent(nn.Module):
    """CORnet-like: one convolution and one in-place ReLU for every time step; then attention, an LSTM and others."""

    def __init__(self):
        super().__init__()
        self.step = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.attend = nn.MultiheadAttention(3, 1, batch_first=True)
        self.lstm = nn.LSTM(3, 5, num_layers=2, batch_first=True)
        self.slow = nn.LSTM(3, 5)
        self.block = Block()
        self.keys = nn.ModuleDict({"a:2": nn.Linear(3, 3), "a": nn.Linear(3, 3), "b#0": nn.Linear(3, 3)})
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        for _ in range(STEPS):
            x = self.relu(self.step(x))
        tokens, _ = self.attend(*[x.flatten(2).mT] * 3)  # (B, N, 3)
        hidden, (_, _) = self.lstm(tokens)
        self.slow(tokens.transpose(0, 1))
        for _ in range(2):
            tokens = self.block(self.keys["a"](self.keys["a:2"](self.keys["b#0"](tokens)))).last
        hidden += 1
        return self.head(hidden[:, -1])


def oracle(network: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a copy of all that each call of each module returns, by layer."""
    found: dict[str, torch.Tensor] = {}
    calls: dict[str, int] = {}

    def copy(path, output):
        calls[path] = calls.get(path, 0) + 1
        for member, value in named_tensors(output).items():
            found[f"{path}:{calls[path]}{member}"] = value.clone()

    handles = [module.register_forward_hook(lambda module, args, output, path=path: copy(path, output))
               for path, module in network.named_modules()]  # fmt: skip
    with torch.inference_mode():
        network(images)
    for handle in handles:
        handle.remove()
    return found


def take(network: nn.Module, layers: list[str], images: torch.Tensor, pool: str = "none") -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return Taps(network, resolve_layers(network, layers, "mine"), pool)(images)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return Recurrent().eval()


IMAGES = torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(1))


def test_each_call_has_its_values_before_later_changes_in_place(network):
    layers = [f"{path}:{number}" for number in range(1, STEPS + 1) for path in ("step", "relu")]
    found, expected = take(network, layers, IMAGES), oracle(network, IMAGES)
    assert list(found) == layers
    assert all(torch.equal(found[layer], expected[layer].flatten(1)) for layer in layers)
    assert (found["step:1"] < 0).any() and torch.equal(found["step:1"].relu(), found["relu:1"])


def test_both_relus_of_a_resnets_block():
    network, images = random_network("resnet18"), torch.rand(3, 3, 64, 64)
    layers = ["layer1.0.relu:2", "layer1.0.relu:1", "layer4.1.relu:2"]
    found, expected = take(network, layers, images), oracle(network, images)
    assert all(torch.equal(found[layer], expected[layer].flatten(1)) for layer in layers)
    assert not torch.equal(found["layer1.0.relu:1"], found["layer1.0.relu:2"])


@pytest.mark.parametrize(
    ("layer", "call"),
    [
        ("attend#0", "attend:1#0"),
        ("attend:1#1", "attend:1#1"),
        ("lstm#0", "lstm:1#0"),
        ("block:2#last", "block:2#last"),
        ("block:1#states#1", "block:1#states#1"),
    ],
)
def test_a_member_is_what_a_copy_at_that_call_has(network, layer, call):
    expected = oracle(network, IMAGES)[call]
    assert torch.equal(take(network, [layer], IMAGES)[layer], expected.flatten(1))
    if layer != "attend:1#1":  # (B, N, N) has no channels
        assert torch.allclose(take(network, [layer], IMAGES, "avg")[layer], expected.mean(1))


def test_a_tensor_has_the_name_of_its_place_in_the_output():
    one, two, three = (torch.full((2,), float(i)) for i in range(3))
    output = OrderedDict(pooled=one, deep=[two, None, Hidden(three)])
    assert named_tensors(output) == {"#pooled": one, "#deep#0": two, "#deep#2#last": three}
    assert named_tensors(one) == {"": one} and named_tensors(None) == {}
    output["deep"].append(output)
    assert "#deep#0" in named_tensors(output), "an output within itself"


def test_all_takes_every_call_in_order(network):
    with torch.inference_mode():
        taps = Taps(network, {"relu:all": "relu:all", "end": "head", "block:all#states#0": "block:all#states#0"})
        found = taps(IMAGES)
    names = ["relu:1", "relu:2", "relu:3", "end", "block:1#states#0", "block:2#states#0"]
    assert list(found) == names
    assert taps.find(IMAGES)["relu:2"] == ("relu:2", (3, 6, 5))
    each = take(network, ["relu:1", "relu:3"], IMAGES)
    assert torch.equal(each["relu:1"], found["relu:1"]) and torch.equal(each["relu:3"], found["relu:3"])
    with pytest.raises(BadValueError, match="relu:2 is named twice"):
        take(network, ["relu:all", "relu:2"], IMAGES)


def test_the_pass_ends_at_the_call_that_is_deepest(network):
    calls = []
    network.relu.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        (taps := Taps(network, {"relu:2": "relu:2", "step:1": "step:1"})).find(IMAGES)
        calls.clear()
        taps.take(IMAGES)
    assert len(calls) == 2


def test_a_module_with_these_characters_in_its_name_comes_first(network):
    expected = oracle(network, IMAGES)
    found = take(network, ["keys.a:2:1", "keys.a:1", "keys.b#0:2"], IMAGES)
    assert torch.equal(found["keys.a:2:1"], expected["keys.a:2:1"].flatten(1))
    assert torch.equal(found["keys.a:1"], expected["keys.a:1"].flatten(1))
    assert torch.equal(found["keys.b#0:2"], expected["keys.b#0:2"].flatten(1))
    with pytest.raises(BadValueError, match=r"keys\.a:2 is called 2 times: expected keys.a:2:1 to keys.a:2:2, or"):
        take(network, ["keys.a:2"], IMAGES)


def test_an_alias_can_name_a_call_and_have_one():
    network = random_network("alexnet")
    aliases = {"late": "features.1:1", "conv": "features.0"}
    layers = resolve_layers(network, ["late", "fc7:1", "conv:all"], "mine", aliases)
    assert layers == {"late": "features.1:1", "fc7:1": "classifier.4:1", "conv:all": "features.0:all"}
    with torch.inference_mode():
        assert list(Taps(network, layers)(torch.rand(1, 3, 64, 64))) == ["late", "fc7:1", "conv:1"]


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("relu:5", "relu is called 3 times: expected relu:1 to relu:3, or relu:all for all of them"),
        ("relu:0", "relu is called 3 times: expected relu:1 to relu:3"),
        ("block#last", "block is called 2 times: expected block:1#last to block:2#last, or block:all#last"),
        ("head:2", "head is called once: expected head"),
        ("attend", "attend returns a tuple. Expected attend#0 or attend#1"),
        ("attend#2", "attend returns a tuple. Expected attend#0 or attend#1"),
        ("block:1", "block:1 returns a Hidden. Expected block:1#last, block:1#states#0 or block:1#states#1"),
        ("head#0", "head returns a tensor. Expected head"),
        ("relu:-1", "mine has no such layer. Did you mean relu"),
        ("penultimate:1", "mine has no such layer. Did you mean penultimate"),
        ("keys#0", "the network never calls keys"),
        ("relu:1, #2", "a list in quotes, '\\[relu:1,#2]'"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(network, layer, words):
    with pytest.raises(BadValueError, match=words):
        take(network, [layer], IMAGES)


def test_a_member_whose_first_dimension_is_not_the_images_is_refused(network):
    with pytest.raises(BadValueError, match=r"lstm#1#0 returns the shape \(2, 1, 5\) for 1 image\. Expected one entry"):
        take(network, ["lstm#1#0"], IMAGES[:1])  # two layers look like two images only in the first pass
    with pytest.raises(BadValueError, match=r"slow#0 returns the shape \(30, 2, 5\) for 2 images"):
        take(network, ["slow#0"], IMAGES)


class Moody(nn.Module):
    """Calls its step as often as the first image's number says, or returns other things."""

    def __init__(self):
        super().__init__()
        self.step = nn.Identity()
        self.end = nn.Identity()

    def forward(self, x):
        for _ in range(int(x[0, 0])):
            x = self.step(x)
        return self.end(x)


def test_a_number_of_calls_that_depends_on_the_image_is_an_error_with_both_numbers():
    two, one, three = (torch.full((2, 3), float(number)) for number in (2, 1, 3))
    taps = Taps(Moody(), {"step:2": "step:2", "end": "end"})
    assert torch.equal(taps(two)["step:2"], two)
    with pytest.raises(UserError, match="calls step 1 time for these images, but 2 times for the first one"):
        taps(one)
    with pytest.raises(UserError, match="calls step at least 3 times for these images, but 2 times for the first one"):
        taps(three)
    assert torch.equal(taps(two)["step:2"], two)


def test_what_can_be_a_layer_is_listed_by_its_name(network):
    with torch.inference_mode():
        listed = Trace(network, IMAGES[:2]).layers("none")
    steps = [f"{path}:{number}" for path in ("step", "relu") for number in range(1, STEPS + 1)]
    linears = [f"keys.{path}:{number}" for path in ("b#0", "a:2", "a") for number in (1, 2)]
    blocks = [f"block:{number}#{member}" for number in (1, 2) for member in ("last", "states#0", "states#1")]
    others = ["attend#0", "attend#1", "lstm#0", "lstm#1#0", "lstm#1#1", "head"]  # of two images, as the LSTM's layers
    assert sorted(listed) == sorted([*steps, *linears, *blocks, *others])
