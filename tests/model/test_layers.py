"""Layers become modules and rows: aliases, hooks that copy, pooling, passes that end early."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ALEXNET_LAYERS, random_network
from torch import nn
from torchvision import models

from featx.errors import BadValueError, UserError
from featx.model.layers import Taps, find_aliases, resolve_layers


def test_fc6_fc7_fc8_are_the_linears_of_the_classifier(alexnet):
    assert find_aliases(alexnet) == ALEXNET_LAYERS
    assert find_aliases(random_network("resnet18")) == {}


def test_aliases_are_found_in_a_network_that_contains_such_a_network(alexnet):
    own = nn.Sequential(nn.Identity(), alexnet)
    assert find_aliases(own) == {alias: f"1.{path}" for alias, path in ALEXNET_LAYERS.items()}
    assert find_aliases(nn.ModuleList([alexnet, random_network("vgg11")])) == {}  # of which network?


@pytest.mark.parametrize("arch", ["vgg11", "vgg16_bn"])
def test_vggs_have_the_same_aliases(arch):
    with torch.device("meta"):
        network = models.get_model(arch)
    assert find_aliases(network) == {"fc6": "classifier.0", "fc7": "classifier.3", "fc8": "classifier.6"}


def test_custom_aliases_win(alexnet):
    own = {"fc7": "classifier.5", "end": "features.12", "penultimate": "avgpool"}
    assert resolve_layers(alexnet, ["fc6", *own], "mine", own) == {"fc6": "classifier.1", **own}
    with pytest.raises(BadValueError, match=r"layer end, an alias of features.99: mine has no such layer"):
        resolve_layers(alexnet, ["end"], "mine", {"end": "features.99"})


def test_any_module_path_is_a_layer(alexnet):
    assert resolve_layers(alexnet, ["features.0", "fc7"], "alexnet") == {
        "features.0": "features.0",
        "fc7": "classifier.4",
    }


def test_an_unknown_layer_is_reported_with_the_nearest(alexnet):
    with pytest.raises(BadValueError, match=r"--model.layer fc9: alexnet has no such layer. Did you mean fc"):
        resolve_layers(alexnet, ["fc9"], "alexnet")
    with pytest.raises(BadValueError, match="fc7 is named twice"):
        resolve_layers(alexnet, ["fc7", "fc7"], "alexnet")


def test_taps_copy_an_output_before_the_next_relu_changes_it(alexnet):
    images = torch.randn(2, 3, 224, 224)
    network = random_network("alexnet")
    network.load_state_dict(alexnet.state_dict())
    with torch.inference_mode():
        found = Taps(network, {"fc6": "classifier.1", "conv": "features.0"})(images)
    assert (found["fc6"] < 0).any() and (found["conv"] < 0).any()
    assert found["fc6"].shape == (2, 4096) and found["conv"].shape == (2, 64 * 55 * 55)
    expected = alexnet.features[0](images).flatten(1)
    assert torch.equal(found["conv"], expected)


class Unusable(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Linear(3, 2)
        self.unused = nn.Linear(3, 2)
        self.pair = Pair()

    def forward(self, x):
        self.pair(x)
        return self.used(self.used(x)[:, :1].expand(-1, 3))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("unused", "never calls unused"),
        ("used", "used is called 2 times: expected used:1 to used:2, or used:all for all of them"),
        ("pair", "pair returns a tuple. Expected pair#0 or pair#1"),
    ],
)
def test_modules_without_one_call_or_one_tensor_are_refused(path, words):
    with pytest.raises(UserError, match=words):
        Taps(Unusable(), {path: path})(torch.zeros(4, 3))


def test_an_output_without_one_row_per_image_is_refused():
    class Swapped(nn.Module):
        def forward(self, x):
            return x.T

    with pytest.raises(UserError, match=r"shape \(3, 2\) for 2 images"):
        Taps(nn.Sequential(Swapped()), {"0": "0"})(torch.zeros(4, 3))


def test_penultimate_is_the_input_of_the_head_after_the_relu(alexnet):
    images = torch.rand(3, 3, 64, 64)
    taps = Taps(alexnet, {"penultimate": "penultimate", "fc7": "classifier.4", "fc8": "classifier.6"})
    with torch.inference_mode():
        found = taps(images)
        hidden = alexnet.classifier[:6](alexnet.avgpool(alexnet.features(images)).flatten(1))
    assert torch.equal(found["penultimate"], hidden) and torch.equal(found["penultimate"], found["fc7"].relu())
    assert taps.find(images)["penultimate"] == ("input of classifier.6", (4096,))


@pytest.mark.parametrize("arch", ["resnet18", "vit_b_16"])
def test_penultimate_of_networks_with_a_bare_head(arch):
    network = random_network(arch, **({"image_size": 32} if arch == "vit_b_16" else {}))
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        found = Taps(network, {"penultimate": "penultimate"})(images)["penultimate"]
        head = network.fc if arch == "resnet18" else network.heads.head
        nn.init.eye_(head.weight[: found.shape[1]]), nn.init.zeros_(head.bias)
        assert torch.allclose(network(images)[:, : found.shape[1]], found, atol=1e-5)


def test_a_network_without_penultimate_is_refused():
    with pytest.raises(
        BadValueError, match=r"layer penultimate: the network's output is not that of a Linear.\nUse --model.layer emb"
    ):
        Taps(random_network("squeezenet1_1"), {"penultimate": "penultimate"})(torch.rand(1, 3, 64, 64))


class Layouts(nn.Module):
    """Channels first, then last, then tokens, then none."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 5, 1)
        self.last = nn.Linear(5, 4)
        self.tokens = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.last(self.first(x).permute(0, 2, 3, 1))  # (B, H, W, 4)
        return self.head(self.tokens(x.flatten(1, 2)).mean(1))


LAYOUTS = {path: path for path in ("first", "last", "tokens", "head")}


def test_pools_go_over_all_but_batch_and_channel():
    network, images = Layouts().eval(), torch.randn(2, 3, 6, 7)
    whole = {path: [] for path in LAYOUTS}
    for path in LAYOUTS:
        network.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: whole[path].append(o.clone()))
    with torch.inference_mode():
        flat, avg, most = (Taps(network, dict(LAYOUTS), pool)(images) for pool in ("none", "avg", "max"))
    first, last, tokens, head = (whole[path][-1] for path in LAYOUTS)
    assert torch.equal(flat["first"], first.reshape(2, 5 * 6 * 7)) and torch.equal(flat["last"], last.reshape(2, -1))
    assert torch.allclose(avg["first"], first.mean((2, 3))) and torch.equal(most["first"], first.amax((2, 3)))
    assert torch.allclose(avg["last"], last.mean((1, 2))) and torch.equal(most["last"], last.amax((1, 2)))
    assert torch.allclose(avg["tokens"], tokens.mean(1)) and torch.equal(most["tokens"], tokens.amax(1))
    assert torch.equal(avg["head"], head) and torch.equal(most["head"], head) and torch.equal(flat["head"], head)


def test_cls_takes_the_first_token_and_nothing_else():
    network, images = Layouts().eval(), torch.randn(2, 3, 6, 7)
    with torch.inference_mode():
        every = Taps(network, {"tokens": "tokens"})(images)["tokens"]
        assert torch.equal(Taps(network, {"tokens": "tokens"}, "cls")(images)["tokens"], every[:, :4])
        for path in ("first", "last", "head"):
            with pytest.raises(BadValueError, match=f"cls takes the first of N tokens .*, but {path} returns"):
                Taps(network, {path: path}, "cls")(images)
        with pytest.raises(BadValueError, match="but penultimate returns"):
            Taps(network, {"penultimate": "penultimate"}, "cls")(images)


def test_pooling_and_rows_use_float32():
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()).to(torch.bfloat16)
    nn.init.ones_(network[0].weight), nn.init.zeros_(network[0].bias)
    images = torch.full((1, 1, 32, 32), 1.0, dtype=torch.bfloat16)
    images[0, 0, 0, 0] = 2
    with torch.inference_mode():
        assert Taps(network, {"1": "1"}, "avg")(images)["1"].item() == 1 + 1 / 1024  # bfloat16 has 1 or 1.0078
        assert Taps(network, {"1": "1"})(images)["1"].dtype == torch.float32


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return x


def test_a_pass_ends_at_the_deepest_layer_with_the_bits_of_a_whole_one():
    network = random_network("vgg11")
    network.classifier.append(behind := Counted())
    images = torch.rand(2, 3, 32, 32)
    layers = {"a": "features.3", "b": "features.0"}
    with torch.inference_mode():
        found = (taps := Taps(network, dict(layers)))(images)
        assert behind.passes == 1  # the first pass, which checks the layers
        assert all(torch.equal(found[layer], rows) for layer, rows in taps(images).items())
        assert behind.passes == 1
        whole = Taps(network, layers | {"end": "classifier.7"})(images)
    assert behind.passes == 1 + 2
    assert list(found) == ["a", "b"] and all(torch.equal(found[layer], whole[layer]) for layer in found)


def test_other_calls_of_the_network_are_left_alone():
    network = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    images = torch.rand(2, 3)
    expected = network(images)
    taps = Taps(network, {"0": "0"})
    taps(images)
    assert torch.equal(network(images), expected)
    assert torch.equal(Taps(network, {"1": "1"})(images)["1"], expected)


def test_a_network_that_catches_exceptions_ends_there_too():
    class Stubborn(nn.Sequential):
        def forward(self, x):
            try:
                return super().forward(x)
            except Exception:
                return x

    network = Stubborn(nn.Linear(3, 2), behind := Counted())
    Taps(network, {"0": "0"})(torch.rand(2, 3))
    assert behind.passes == 1


def test_passes_of_several_threads_do_not_mix():
    network = random_network("squeezenet1_1")
    images = [torch.rand(1 + i % 3, 3, 40, 40) for i in range(24)]
    taps = Taps(network, {"early": "features.0", "late": "classifier.1"})
    with torch.inference_mode():
        alone = [taps(each) for each in images]

    def run(each):
        with torch.inference_mode():
            return fresh(each)

    fresh = Taps(random_network("squeezenet1_1"), dict(taps.layers))  # the first passes come at once, too
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        together = list(threads.map(run, images))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.allclose(one[layer], other[layer], atol=1e-5) for layer in one)


def test_a_module_that_later_images_do_not_reach_is_reported():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    taps = Taps(Moody(), {"layer": "layer"})
    taps(torch.ones(2, 3))
    with pytest.raises(UserError, match="calls layer 0 times for these images, but 1 time for"):
        taps(-torch.ones(2, 3))


def test_a_module_with_two_paths_is_found_by_both():
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    network.again = network[0]
    network.forward = lambda x: network[1](network[0](x))
    images = torch.rand(2, 3)
    layers = resolve_layers(network, ["0", "again"], "mine")
    found = Taps(network, layers)(images)
    assert torch.equal(found["0"], found["again"])
