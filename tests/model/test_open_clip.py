"""Image towers of open_clip against its own encode_image, with its own transforms; weights in files."""

import json
import sys

import open_clip
import pytest
import safetensors.torch
import torch
from conftest import make_image, relative_error

import featx
from featx.commands.layers import layers
from featx.errors import BadValueError, MissingPathError, UserError
from featx.model.build import build_empty, choose_weights, named

PHOTOS = [make_image(i, size) for i, size in enumerate([(61, 43), (43, 62), (50, 50), (39, 77), (32, 32)] * 2)]
TEXT = {"context_length": 4, "vocab_size": 20, "width": 8, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
POOL = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2, "output_tokens": True}
CONFIGS = {
    "tiny-ViT": {"vision_cfg": VIT},
    "tiny-ViT-quickgelu": {"vision_cfg": VIT, "quick_gelu": True},
    "tiny-RN": {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}},
    "tiny-timm": {"vision_cfg": {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "",
                                 "timm_proj": "linear"}, "custom_text": True},
    "tiny-map": {"vision_cfg": {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map",
                                "timm_proj": "none"}, "custom_text": True},
    "tiny-CoCa": {"vision_cfg": VIT | POOL, "multimodal_cfg": TEXT | {"dim_head": 4}, "custom_text": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def configs(tmp_path, monkeypatch):
    """Make the small networks known to open_clip, with tags of their own."""
    known = dict(open_clip.factory._MODEL_CONFIGS)
    for name, config in CONFIGS.items():
        known[name] = {"embed_dim": 12, "text_cfg": TEXT, **config}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", known)


def save(folder, name, prefix=""):
    """Write random weights of a network, and return the file and the whole network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = open_clip.create_model(name).eval()
        for parameter in network.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    file = folder / "open_clip_model.safetensors"
    safetensors.torch.save_file({prefix + key: value.clone() for key, value in network.state_dict().items()}, file)
    return file, network


def theirs(network, **steps):
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(size=32, **steps), False)
    with torch.inference_mode():
        return network.encode_image(torch.stack([transform(photo) for photo in PHOTOS])).numpy()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "tiny-map"])
def test_embedding_is_that_of_encode_image(name, tmp_path):
    file, network = save(tmp_path, name)
    _, rows = featx.extract(PHOTOS, arch=f"open_clip/{name}", weights=str(file), num_workers=0)
    expected = theirs(network)
    assert expected.std(0).max() > 1e-4, "the images differ"
    assert relative_error(rows, expected) < 1e-5


def test_only_the_image_tower_is_built():
    network = build_empty("open_clip/tiny-CoCa")
    assert [name for name, _ in network.named_children()] == ["visual"]


def tag(monkeypatch, name, **cfg):
    """Publish weights of one of the small networks as the tag ``laion``."""
    known = open_clip.pretrained._pcfg(hf_hub="someone/tiny/", **cfg)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"laion": known})


@pytest.mark.parametrize(("name", "last"), [("tiny-ViT", "visual.ln_post"), ("tiny-RN", "visual.attnpool")])
def test_featx_layers_lists_what_can_be_taken(name, last, capsys):
    assert layers(["--model.arch", f"open_clip/{name}", "--json"]) == 0
    columns = {row["path"]: row["columns"] for row in json.loads(capsys.readouterr().out)}
    assert [*columns][-2:] == [last, "visual"] and columns["visual"] == 12
    _, rows = featx.extract(PHOTOS[:2], [*columns], arch=f"open_clip/{name}", weights="random", num_workers=0)
    assert {layer: values.shape[1] for layer, values in rows.items()} == columns


def test_published_weights_have_tags(tmp_path, monkeypatch):
    tag(monkeypatch, "tiny-ViT", mean=(0.5,) * 3, std=(0.4,) * 3, resize_mode="squash", interpolation="bilinear")
    file, network = save(tmp_path, "tiny-ViT")
    monkeypatch.setattr("featx.model.libraries.open_clip.from_hub", lambda repo, *names: tmp_path / names[0])
    for weights in ("laion", "auto"):
        _, rows = featx.extract(PHOTOS, arch="open_clip/tiny-ViT", weights=weights, num_workers=0)
        steps = {"mean": (0.5,) * 3, "std": (0.4,) * 3, "resize_mode": "squash", "interpolation": "bilinear"}
        assert relative_error(rows, theirs(network, **steps)) < 1e-5
    _, of_file = featx.extract(PHOTOS, arch="open_clip/tiny-ViT", weights=file, num_workers=0)
    assert relative_error(of_file, rows) == 0, "a file gets the preprocessing of the first tag"
    source = named("open_clip/tiny-ViT").preset(choose_weights("open_clip/tiny-ViT", str(file))).source
    assert source == "open_clip/tiny-ViT laion"
    with pytest.raises(MissingPathError, match=r"lion: no such file or published weights. Did you mean laion"):
        choose_weights("open_clip/tiny-ViT", "lion")


def test_of_several_tags_one_must_be_named():
    with pytest.raises(BadValueError, match=r"auto: open_clip/ViT-B-32 has several.*\nExpected .*laion2b_s34b_b79k"):
        choose_weights("open_clip/ViT-B-32", "auto")
    assert choose_weights("open_clip/ViT-B-32", "laion2b_s34b_b79k").name == "open_clip/ViT-B-32 laion2b_s34b_b79k"


def test_weights_trained_with_quickgelu_are_refused_for_a_network_without(monkeypatch):
    tag(monkeypatch, "tiny-ViT", quick_gelu=True)
    with pytest.raises(BadValueError, match=r"laion: .* QuickGELU, tiny-ViT has GELU.\nExpected .*tiny-ViT-quickgelu"):
        named("open_clip/tiny-ViT").build(choose_weights("open_clip/tiny-ViT", "laion"))


def test_a_file_trained_with_quickgelu_is_refused_if_its_config_says_so(tmp_path):
    file, _ = save(tmp_path, "tiny-ViT-quickgelu")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIGS["tiny-ViT-quickgelu"]}))
    with pytest.raises(BadValueError, match=r"model.safetensors: these were trained with QuickGELU"):
        featx.extract(PHOTOS, arch="open_clip/tiny-ViT", weights=file, num_workers=0)


@pytest.mark.parametrize("beside", ["open_clip_config.json", "preprocessor_config.json"])
def test_a_file_gets_the_preprocessing_beside_it(beside, tmp_path):
    file, network = save(tmp_path, "tiny-ViT")
    values = {"size": 32, "mean": [0.3] * 3, "std": [0.4] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    if beside == "open_clip_config.json":
        values = {"model_cfg": {}, "preprocess_cfg": values}
    else:
        values = {"size": {"height": 32, "width": 32}, "image_mean": [0.3] * 3, "image_std": [0.4] * 3, "resample": 2}
        values["do_center_crop"] = False
    (tmp_path / beside).write_text(json.dumps(values))
    _, rows = featx.extract(PHOTOS, arch="open_clip/tiny-ViT", weights=file, num_workers=0)
    steps = {"mean": (0.3,) * 3, "std": (0.4,) * 3, "resize_mode": "squash", "interpolation": "bilinear"}
    assert relative_error(rows, theirs(network, **steps)) < 1e-5


def test_a_repository_of_the_hub_has_config_and_weights(tmp_path, monkeypatch):
    _, network = save(tmp_path, "tiny-ViT")
    config = {
        "model_cfg": {"embed_dim": 12, "text_cfg": TEXT, "vision_cfg": VIT},
        "preprocess_cfg": {"mean": [0.2] * 3},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("featx.model.libraries.open_clip.from_hub", lambda repo, *names: tmp_path / names[0])
    _, rows = featx.extract(PHOTOS, arch="open_clip/hf-hub:someone/tiny", num_workers=0)
    assert relative_error(rows, theirs(network, mean=(0.2,) * 3)) < 1e-5


def test_a_trainers_file_has_a_prefix_and_half_precision(tmp_path):
    _, network = save(tmp_path, "tiny-ViT")
    state = {f"module.{name}": value.half() for name, value in network.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {}}, tmp_path / "epoch_3.pt")
    _, rows = featx.extract(PHOTOS, arch="open_clip/tiny-ViT", weights=tmp_path / "epoch_3.pt", num_workers=0)
    network.load_state_dict({name: value.half().float() for name, value in network.state_dict().items()})
    assert relative_error(rows, theirs(network)) < 1e-5


@pytest.mark.parametrize("name", ["tiny-ViT", "tiny-timm", "tiny-map"])
def test_image_size_interpolates_positions_as_open_clip_does(name, tmp_path):
    file, _ = save(tmp_path, name)
    network = open_clip.create_model(name, pretrained=str(file), force_image_size=64, weights_only=True).eval()
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(size=64), False)
    with torch.inference_mode():
        expected = network.encode_image(torch.stack([transform(photo) for photo in PHOTOS])).numpy()
    _, rows = featx.extract(PHOTOS, arch=f"open_clip/{name}", weights=file, image_size=64, num_workers=0)
    assert relative_error(rows, expected) < 1e-5


def test_a_mistyped_name_is_reported_with_the_nearest_and_what_is_missing_with_its_extra(monkeypatch):
    with pytest.raises(BadValueError, match=r"no network with this name. Did you mean open_clip/ViT-B-32"):
        named("open_clip/ViT-B32")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"(?s)open_clip cannot be imported .*pip install 'featx\[open_clip\]'"):
        named("open_clip/ViT-B-32")
