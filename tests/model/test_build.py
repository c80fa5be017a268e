"""Networks by name: torchvision's, timm's and any function's, with the preprocessing of their weights."""

import dataclasses
import hashlib
import sys
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import make_image
from torchvision import models

from featx import FeatureExtractor, Preprocessing
from featx.errors import BadValueError, MissingPathError, UserError
from featx.model.build import build_empty, choose_weights, named, seeded
from featx.model.checkpoint import digest, fit
from featx.model.download import digest_in
from featx.model.libraries.base import Weights
from featx.model.libraries.function import import_function

RANDOM = Weights("random", random=True)


def test_weights_are_an_entry_a_file_or_random(tmp_path):
    default = models.AlexNet_Weights.DEFAULT
    assert [choose_weights("alexnet", name).entry for name in ("auto", "DEFAULT", "IMAGENET1K_V1")] == [default] * 3
    assert choose_weights("resnet50", "auto").entry is models.ResNet50_Weights.IMAGENET1K_V2
    assert choose_weights("alexnet", "random").random
    (tmp_path / "w.pth").touch()
    assert choose_weights("alexnet", str(tmp_path / "w.pth")).file == str(tmp_path / "w.pth")
    with pytest.raises(MissingPathError, match=r"IMAGENET1K_V9: no such file.*Did you mean IMAGENET1K_V1"):
        choose_weights("alexnet", "IMAGENET1K_V9")
    with pytest.raises(BadValueError, match="this is a folder"):
        choose_weights("alexnet", str(tmp_path))


def test_a_file_gets_the_preprocessing_of_the_first_recipe(tmp_path):
    assert named("resnet50").preset(choose_weights("resnet50", "random")).resize == 256
    assert named("resnet50").preset(choose_weights("resnet50", "DEFAULT")).resize == 232


def test_a_published_file_gets_the_preprocessing_of_its_weights_whatever_its_name(tmp_path, monkeypatch):
    path = tmp_path / "mine.pth"
    path.write_bytes(bytes(3 << 20))
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    entry = models.ResNet50_Weights.IMAGENET1K_V2
    url = f"https://download.pytorch.org/models/resnet50-{digits}.pth"
    published = dataclasses.replace(entry.value, url=url, meta=entry.meta | {"_file_size": 3.0})
    monkeypatch.setattr(entry, "_value_", published)
    preset = named("resnet50").preset(choose_weights("resnet50", str(path)))
    assert (preset.resize, preset.source) == (232, "ResNet50_Weights.IMAGENET1K_V2")
    path.write_bytes(bytes((3 << 20) - 1) + b"1")
    assert named("resnet50").preset(choose_weights("resnet50", str(path))).resize == 256


def test_torchvision_states_what_recognizes_its_files():
    entries = [entry for arch in models.list_models(module=models) for entry in models.get_model_weights(arch)]
    assert len(entries) > 100 and all(entry.meta["_file_size"] > 1 for entry in entries)
    assert all(len(digest_in(entry.url)) >= 8 for entry in entries)


def test_a_timm_network_of_a_function_or_subclass_gets_its_own_preprocessing():
    class Mine(FeatureExtractor):
        def build_network(self):
            return timm.create_model("test_vit.r160_in1k")

    class Own(Mine):
        preset = Preprocessing.usual()

    expected = named("timm/test_vit.r160_in1k").preset(RANDOM)
    for model in (FeatureExtractor("norm", arch="timm.models.test_vit"), Mine("norm")):
        model.configure_model()
        assert replace(model.preprocessing, source="") == replace(expected, source="")
        assert model.preprocessing.source == "timm/test_vit" and expected.mean == (0.5, 0.5, 0.5)
    own = Own("norm")
    own.configure_model()
    assert own.preprocessing == Preprocessing.usual()


def test_an_unknown_arch_is_reported_with_the_nearest():
    named("vit_b_16")
    with pytest.raises(BadValueError, match=r"--model.arch alexnt: .* Did you mean alexnet"):
        named("alexnt")
    with pytest.raises(BadValueError, match="no classification network"):
        named("fasterrcnn_resnet50_fpn")


@pytest.mark.parametrize("arch", ["squeezenet1_1", "regnet_y_400mf", "timm/davit_tiny", "timm/levit_128s"])
def test_the_empty_network_has_the_tensors_of_the_real_one_and_no_values(arch):
    empty, real = build_empty(arch), named(arch).build(RANDOM)
    assert all(parameter.is_meta for parameter in empty.parameters() if parameter.numel() > 10000)
    shapes = [{name: value.shape for name, value in n.state_dict().items()} for n in (empty, real)]
    assert shapes[0] == shapes[1] and not any(parameter.is_meta for parameter in real.parameters())


def test_a_network_that_needs_values_to_find_its_shapes_is_built_with_them():
    assert build_empty("timm/vit_tiny_r_s16_p8_224").head.out_features == 1000


@pytest.mark.parametrize("arch", ["resnet18", "swin_t", "timm/levit_128s"])
def test_random_numbers_are_those_of_torch_and_the_process_keeps_its_own_generator(arch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = digest(named(arch).build(RANDOM))
    before, dtype = torch.get_rng_state(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with seeded(3, arch):
            found = digest(named(arch).build(RANDOM))
        build_empty(arch)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(dtype)
    assert found == expected and torch.equal(torch.get_rng_state(), before)


def test_a_network_is_built_as_the_builder_of_its_published_weights_does():
    assert named("inception_v3").build(RANDOM).transform_input and named("inception_v3").preset(RANDOM).crop == 299
    assert "the network's own transform_input" in named("inception_v3").preset(RANDOM).source
    assert named("googlenet").build(RANDOM).transform_input and named("googlenet").build(RANDOM).aux1 is None
    assert build_empty("vit_h_14").image_size == named("vit_h_14").preset(RANDOM).crop == 518


@pytest.mark.parametrize("aux", [True, False])
def test_the_file_decides_whether_inception_has_its_auxiliary_head(aux):
    state = models.inception_v3(aux_logits=aux, init_weights=False).state_dict()
    network = named("inception_v3").build(Weights("f", file="f"), state)
    assert (network.AuxLogits is not None) == aux and network.transform_input
    assert fit(network, state, "f", "inception_v3") == []


@pytest.mark.parametrize(
    ("size", "source"), [(224, "SWAG_LINEAR_V1"), (518, "SWAG_E2E_V1"), (448, "at the 448 pixels")]
)
def test_the_file_decides_the_image_size_of_a_vit(size, source, tmp_path):
    file = Weights("f", file=tmp_path / "f")
    file.file.touch()
    with torch.device("meta"):
        state = models.vit_h_14(image_size=size).state_dict()
        network = named("vit_h_14").build(file, {"module." + name: value for name, value in state.items()})
    assert network.image_size == size and network.encoder.pos_embedding.shape == state["encoder.pos_embedding"].shape
    preset = named("vit_h_14").preset(file, state)
    assert preset.crop == size and source in preset.source


def test_timms_data_config_is_followed_to_the_bit():
    for name, resize in (
        ("timm/resnet18.tv_in1k", 256),
        ("timm/resnet18", 235),
        ("timm/dm_nfnet_f1.dm_in1k", 246),
    ):
        named(name)
        preset = named(name).preset(RANDOM)
        cfg = timm.get_pretrained_cfg(name.removeprefix("timm/"))
        theirs = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict()))
        image = make_image(3, (320, 241))
        assert torch.equal(preset.normalize(preset.to_tensor(np.asarray(image))[None])[0], theirs(image))
        assert preset.resize == resize
    assert "squash to 246 bicubic, crop 224" in str(preset)


def test_timms_published_weights_come_from_its_cache(tmp_path, monkeypatch):
    network = timm.create_model("resnet10t")
    torch.nn.init.ones_(network.fc.bias)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: str(tmp_path / name))
    weights = choose_weights("timm/resnet10t", "auto")
    assert weights.name == "timm/resnet10t.c3_in1k"
    assert digest(named("timm/resnet10t").build(weights)) == digest(network)


def test_timms_weights_that_cannot_be_downloaded_are_reported(monkeypatch):
    def no_way_out(url):
        raise OSError(f"no way to {url}")

    monkeypatch.setattr("featx.model.libraries.timm.check_server", no_way_out)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: None)
    with pytest.raises(UserError, match=r"timm cannot download the weights of timm/resnet10t.c3_in1k\n.*no way to"):
        named("timm/resnet10t").build(choose_weights("timm/resnet10t", "auto"))
    with pytest.raises(BadValueError, match=r"auto: there are no published weights for timm/botnet50ts_256"):
        choose_weights("timm/botnet50ts_256", "auto")


def test_without_timm_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"(?s)timm cannot be imported .*pip install 'featx\[timm\]'"):
        named("timm/resnet18")


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("timm/resnt18", r"timm has no network with this name. Did you mean timm/resne?t?\d+"),
        ("timm/vit_base_patch16_sapiens2.fb", "takes images of 768 x 1024 pixels in crop mode squash"),
        ("antialiased_cnns.alexnt", "antialiased_cnns.alexnt is neither in .* Did you mean alexnet"),
        ("antialiased_cnn.alexnet", "antialiased_cnn is neither in this folder nor installed"),
        ("nets.wrong", "calling nets.wrong.. failed: ZeroDivisionError: division by zero"),
        ("nets.needs", r"needs.. failed: TypeError: .*'width'\n.*call it in build_network"),
        ("nets.nothing", "nets.nothing.. returned a NoneType. Expected an nn.Module"),
        ("nets.number", "its type is int. Expected a function"),
        ("broken.net", "importing broken failed: ZeroDivisionError: division by zero"),
        ("lacking.net", "importing lacking failed: ModuleNotFoundError: No module named 'not_here'"),
        ("quits.net", "importing quits failed: SystemExit: 3"),
        (".net", "importing  failed: ValueError: Empty module name"),
    ],
)
def test_an_arch_that_cannot_be_built_is_reported(tmp_path, monkeypatch, arch, words):
    files = {
        "nets": "def wrong(): 1 / 0\ndef needs(width): pass\ndef nothing(): pass\nnumber = 3",
        "broken": "1 / 0",
        "lacking": "import not_here",
        "quits": "raise SystemExit(3)",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadValueError, match=rf"--model.arch {arch}: .*{words}"):
        named(arch).preset(RANDOM)
        named(arch).build(RANDOM)


def test_a_function_that_is_also_a_module_is_the_function():
    import_function("antialiased_cnns.alexnet")
    network = named("antialiased_cnns.alexnet").build(choose_weights("antialiased_cnns.alexnet", "auto"))
    assert type(network).__name__ == "AlexNet" and "blurpool" in type(network.features[2]).__module__
    import_function("torchvision.models.resnet.resnet18")


PHOTOS = [make_image(i, size) for i, size in enumerate([(300, 280), (250, 333)])]


def test_image_size_of_timm_resamples_positions_as_timm_does(tmp_path):
    network = timm.create_model("vit_tiny_patch16_224", depth=1)
    torch.save({f"module.{name}": value for name, value in network.state_dict().items()}, tmp_path / "w.pth")
    larger = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=240).eval()
    larger.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(network.state_dict(), larger))
    cfg = timm.get_pretrained_cfg("vit_tiny_patch16_224").to_dict() | {"input_size": (3, 240, 240)}
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg))
    library = named("timm/vit_tiny_patch16_224", 240)
    assert library.preset(RANDOM).crop == 240 and library.preset(RANDOM).resize == 266
    found = library.build(RANDOM)
    state = library.rename(found, torch.load(tmp_path / "w.pth"), "w.pth")
    assert torch.equal(state["pos_embed"], larger.pos_embed)
    image = library.preset(RANDOM).to_tensor(np.asarray(PHOTOS[0]))
    assert torch.equal(library.preset(RANDOM).normalize(image[None])[0], theirs(PHOTOS[0]))


@pytest.mark.parametrize(
    ("arch", "size", "crop"),
    [("timm/resnet10t", 64, 64), ("resnet18", 96, 96), ("timm/vit_small_patch14_dinov2", 28, 28)],
)
def test_networks_take_another_image_size(arch, size, crop):
    model = FeatureExtractor("embedding", arch=arch, weights="random", image_size=size)
    model.configure_model()
    assert model.preprocessing.crop == crop and model.identity("embedding", "32-true")["image_size"] == size


def test_a_vit_of_torchvision_has_its_positions_interpolated(tmp_path, monkeypatch):
    entry = models.ViT_B_16_Weights.IMAGENET1K_V1
    with torch.device("meta"):
        shapes = models.vit_b_16().state_dict()
    state = {name: torch.zeros(value.shape) for name, value in shapes.items()}
    state["encoder.pos_embedding"] = torch.rand(shapes["encoder.pos_embedding"].shape)
    torch.save(state, tmp_path / "w.pth")
    monkeypatch.setattr("featx.model.libraries.torchvision.fetch", lambda url: tmp_path / "w.pth")
    library = named("vit_b_16", 256)
    expected = models.vision_transformer.interpolate_embeddings(256, 16, dict(state))["encoder.pos_embedding"]
    assert torch.equal(library.build(Weights("best", entry=entry)).encoder.pos_embedding, expected)
    of_file = library.rename(
        library.build(Weights("f", file="f"), state), {"module." + n: v for n, v in state.items()}, "f"
    )
    assert torch.equal(of_file["module.encoder.pos_embedding"], expected)
    preset = library.preset(Weights("best", entry=entry))
    assert (preset.resize, preset.crop) == (292, 256)


@pytest.mark.parametrize(("arch", "size"), [("vit_b_32", 100), ("timm/vit_tiny_patch16_224", 10)])
def test_a_network_that_cannot_take_an_image_size_is_refused(arch, size):
    model = FeatureExtractor("embedding", arch=arch, weights="random", image_size=size)
    with pytest.raises(BadValueError, match=rf"--model.image_size {size}: {arch} cannot take images of this size"):
        model.configure_model()


def test_the_default_layer_is_fc7_or_the_embedding():
    for arch, layer in (("alexnet", "fc7"), ("vgg11", "fc7"), ("resnet18", "embedding")):
        model = FeatureExtractor(arch=arch, weights="random")
        model.check()
        assert model.layer == layer
    with pytest.raises(BadValueError, match=r"--model.layer fc7: resnet18 has no such layer"):
        FeatureExtractor("fc7", arch="resnet18", weights="random").check()
    with pytest.raises(BadValueError, match="image_size 0: expected a whole number"):
        FeatureExtractor(image_size=0)
