import pytest
import torch
from conftest import ALEXNET_LAYERS, random_network
from torch import nn

from featx.layers import Taps, find_aliases, resolve_layers
from featx.messages import BadValueError, UserError


def test_fc6_fc7_fc8_are_the_linears_of_the_classifier(alexnet):
    assert find_aliases(alexnet) == ALEXNET_LAYERS
    assert find_aliases(random_network("resnet18")) == {}


def test_any_module_path_is_a_layer(alexnet):
    assert resolve_layers(alexnet, ["features.0", "fc7"], "alexnet") == {
        "features.0": "features.0",
        "fc7": "classifier.4",
    }


def test_an_unknown_layer_is_told_with_the_nearest(alexnet):
    with pytest.raises(BadValueError, match=r"--model.layer fc9: alexnet has no such layer. Did you mean fc"):
        resolve_layers(alexnet, ["fc9"], "alexnet")
    with pytest.raises(BadValueError, match="fc7 is named twice"):
        resolve_layers(alexnet, ["fc7", "fc7"], "alexnet")


def test_taps_copy_before_the_relu_behind_changes_it(alexnet):
    images = torch.randn(2, 3, 224, 224)
    network = random_network("alexnet")
    network.load_state_dict(alexnet.state_dict())
    with torch.inference_mode():
        found = Taps(network, {"fc6": "classifier.1", "conv": "features.0"})(images)
    assert (found["fc6"] < 0).any() and (found["conv"] < 0).any()
    assert found["fc6"].shape == (2, 4096) and found["conv"].shape == (2, 64 * 55 * 55)
    expected = alexnet.features[0](images).flatten(1)
    assert torch.equal(found["conv"], expected)


class Odd(nn.Module):
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
    [("unused", "never calls unused"), ("used", "calls used more than once"), ("pair", "pair returns a tuple")],
)
def test_modules_that_give_no_row_an_image_are_refused(path, words):
    with pytest.raises(UserError, match=words):
        Taps(Odd(), {path: path})(torch.zeros(4, 3))


def test_an_output_without_a_row_an_image_is_refused():
    class Swapped(nn.Module):
        def forward(self, x):
            return x.T

    with pytest.raises(UserError, match=r"shape \(3, 2\) for 2 images"):
        Taps(nn.Sequential(Swapped()), {"0": "0"})(torch.zeros(4, 3))
