import numpy as np
import pytest
import torch
from conftest import ALEXNET_LAYERS, loader, oracle, random_network, relative_error
from torch import nn
from torchvision import models

from featx import FeatureExtractor
from featx.messages import BadValueError, UserError


def extract(photos, model, batch_size=16, **options):
    model.configure_model()
    _, batches = loader(photos, batch_size=batch_size, num_workers=0, **options)
    outputs = [model.predict_step(batch) for batch in batches]
    return {layer: torch.cat([output[layer] for output in outputs]).numpy() for layer in model.layers}


@pytest.mark.parametrize("batch_size", [1, 37])
def test_fc6_fc7_fc8_equal_plain_torch(photos, alexnet, alexnet_file, batch_size):
    found = extract(photos, FeatureExtractor(list(ALEXNET_LAYERS), weights=str(alexnet_file)), batch_size)
    _, expected = oracle(photos, alexnet, list(ALEXNET_LAYERS.values()))
    for layer, values in zip(ALEXNET_LAYERS, expected, strict=True):
        assert found[layer].dtype == np.float32
        assert relative_error(found[layer], values) < 1e-5
        assert (found[layer] < 0).any()


def test_mixed_shapes_without_a_crop_equal_plain_torch(photos, alexnet, alexnet_file):
    found = extract(photos, FeatureExtractor("fc7", weights=str(alexnet_file)), resize=224, crop=None)
    _, (expected,) = oracle(photos, alexnet, ["classifier.4"], resize=224, crop=None)
    assert relative_error(found["fc7"], expected) < 1e-5


def test_the_number_of_threads_changes_no_bit(photos, alexnet_file, monkeypatch):
    found = []
    for cores in (1, 2, 5):
        monkeypatch.setattr("featx.extractor.usable_cores", lambda cores=cores: cores)
        found.append(extract(photos, FeatureExtractor("fc7", weights=str(alexnet_file)), 37)["fc7"])
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_random_weights_are_the_same_every_time_and_said_loudly(caplog):
    first, second = (FeatureExtractor(weights="random", arch="resnet18", layer="avgpool") for _ in range(2))
    torch.manual_seed(5)
    first.configure_model()
    torch.manual_seed(6)
    second.configure_model()
    pairs = zip(first.network.state_dict().values(), second.network.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert "RANDOM WEIGHTS" in caplog.text and first.weights_used == "random (seed 0)"


def test_the_network_is_in_eval_mode_and_needs_no_gradient():
    model = FeatureExtractor(weights="random")
    model.configure_model()
    assert not model.network.training
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


class Ten(FeatureExtractor):
    def build_network(self) -> nn.Module:
        return models.alexnet(num_classes=10)


class Filled(FeatureExtractor):
    def build_network(self) -> nn.Module:
        network = models.alexnet(num_classes=10)
        nn.init.zeros_(network.classifier[6].weight)
        nn.init.ones_(network.classifier[6].bias)
        return network


def test_a_network_of_ones_own_takes_a_file(photos, tmp_path):
    own = random_network("alexnet", seed=3, num_classes=10)
    torch.save({"state_dict": {f"module.{k}": v for k, v in own.state_dict().items()}}, tmp_path / "w.pth.tar")
    found = extract(photos, Ten(["fc7", "fc8"], weights=str(tmp_path / "w.pth.tar")))
    _, expected = oracle(photos, own, ["classifier.4", "classifier.6"])
    assert relative_error(found["fc7"], expected[0]) < 1e-5
    assert relative_error(found["fc8"], expected[1]) < 1e-5 and found["fc8"].shape == (37, 10)


def test_without_weights_a_network_of_ones_own_stays_as_it_was_built(photos):
    model = Filled("fc8")
    found = extract(photos, model)["fc8"]
    assert np.array_equal(found, np.ones((37, 10), np.float32))
    assert model.weights_used == "as Filled.build_network() made them"


def test_names_of_weights_mean_nothing_to_a_network_of_ones_own():
    for name in ("DEFAULT", "random"):
        with pytest.raises(BadValueError, match=f"--model.weights {name}: Ten builds its own network"):
            Ten(weights=name).configure_model()


def test_build_network_must_return_a_module():
    class Forgot(FeatureExtractor):
        def build_network(self):
            models.alexnet(num_classes=10)

    with pytest.raises(BadValueError, match=r"build_network\(\) returned None"):
        Forgot().configure_model()


def test_images_that_do_not_go_through_are_told_with_their_shape(photos):
    model = FeatureExtractor(weights="random")
    with pytest.raises(UserError, match=r"alexnet failed on images of the shape \(3, 16, 16\)"):
        extract(photos, model, resize=16, crop=16)


def test_rows_of_different_lengths_are_refused(photos):
    model = FeatureExtractor("features.0", weights="random")
    with pytest.raises(UserError, match="columns for images of different shapes in one batch"):
        extract(photos, model, resize=64, crop=None)


def test_pool_and_penultimate_through_the_extractor(photos):
    model = FeatureExtractor(["features.0", "penultimate"], weights="random", pool="avg")
    found = extract(photos, model)
    _, (conv, hidden) = oracle(photos, random_network("alexnet", seed=0), ["features.0", "classifier.5"])
    assert relative_error(found["features.0"], conv.reshape(37, 64, -1).mean(2)) < 1e-5
    assert relative_error(found["penultimate"], hidden) < 1e-5
    assert model.layers == {"features.0": "features.0", "penultimate": "input of classifier.6"}


def test_many_columns_are_told_with_the_way_out(three_photos, caplog):
    def told(layer, pool="none"):
        caplog.clear()
        model = FeatureExtractor(layer, weights="random", pool=pool)
        model.configure_model()
        data, _ = loader(three_photos)
        model.try_out(data.first_batch(model.preprocessing))
        return caplog.text

    assert "features.0 has 193,600 columns: --model.pool avg takes one a channel instead" in told(["features.0", "fc7"])
    assert "columns" not in told("features.0", "avg") and "columns" not in told(["fc6", "features.12"])


def test_a_layer_that_gives_no_row_an_image_is_told_before_the_first_batch(three_photos):
    model = FeatureExtractor("layer1.0.relu", arch="resnet18", weights="random")
    model.configure_model()
    data, _ = loader(three_photos)
    with pytest.raises(UserError, match=r"^--model.layer layer1.0.relu: .* more than once in a pass, 2 times"):
        model.try_out(data.first_batch(model.preprocessing))


def test_layers_and_arch_are_checked_before_weights_are_looked_for():
    with pytest.raises(BadValueError, match="fc9"):
        FeatureExtractor("fc9").check()
    with pytest.raises(BadValueError, match="resnet18 has no such layer"):
        FeatureExtractor("fc7", arch="resnet18").check()
    with pytest.raises(BadValueError, match="at least one layer"):
        FeatureExtractor([]).check()
