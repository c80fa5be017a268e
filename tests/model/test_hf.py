"""Networks of transformers against its own calls, with its Pillow processors; folders that save_pretrained writes."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import make_image, relative_error
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import AutoImageProcessor, AutoModel

import featx
from featx.commands.layers import layers
from featx.errors import BadValueError, MissingPathError, UserError
from featx.model.build import build_empty, choose_weights, named
from featx.model.extractor import FeatureExtractor

transformers.utils.logging.disable_progress_bar()
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES = {"image_size": 32, "patch_size": 8}
VISION, TEXT = SMALL | IMAGES, SMALL | {"vocab_size": 50, "max_position_embeddings": 8}
PHOTOS = [make_image(i, size) for i, size in enumerate([(61, 43), (43, 62), (50, 50), (39, 77), (32, 32)] * 2)]
SQUASH = {"size": {"height": 32, "width": 32}}
CROP = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
CASES = {
    "ViT": (SMALL | IMAGES, "ViT", SQUASH),
    "Dinov2": (SMALL | IMAGES | {"patch_size": 14}, "Bit", CROP),
    "Dinov2WithRegisters": (SMALL | IMAGES | {"num_register_tokens": 2}, "Bit", CROP),
    "CLIP": ({"vision_config": VISION, "text_config": TEXT, "projection_dim": 12}, "CLIP", CROP | {"size": 32}),
    "Siglip": ({"vision_config": VISION, "text_config": TEXT}, "Siglip", SQUASH),
    "ConvNext": ({"depths": [1] * 4, "hidden_sizes": [8, 12, 16, 20]}, "ConvNext", {"size": {"shortest_edge": 32}}),
    "ResNet": ({"depths": [1, 1], "hidden_sizes": [8, 12], "embedding_size": 8, "layer_type": "basic"}, "ConvNext",
               {"size": {"shortest_edge": 32}, "crop_pct": 0.9}),
    "Beit": (VISION, "Beit", SQUASH),
    "Swin": ({"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2],
              "window_size": 4}, "ViT", SQUASH),
    "DINOv3ViT": (VISION, "CLIP", CROP),
    "Deit": (VISION, "DeiT", {"size": {"height": 39, "width": 39}, "crop_size": {"height": 32, "width": 32}}),
}  # fmt: skip
NAMES = {"Deit": "DeiT"}


def save(folder: Path, kind: str, **changed: object) -> Path:
    """Write a small model of a kind, with random weights, and its processor."""
    options, processor, steps = CASES[kind]
    config = getattr(transformers, f"{NAMES.get(kind, kind)}Config")(**options | changed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = AutoModel.from_config(config)
        for parameter in network.parameters():  # also those that begin as zeros or ones
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    network.save_pretrained(folder)
    getattr(transformers, f"{processor}ImageProcessorPil")(**steps).save_pretrained(folder)
    return folder


def theirs(folder: Path, call: str = "") -> np.ndarray:
    """The model's image features by its own call, and its own processor with Pillow."""
    network = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = torch.cat([processor(images=photo, return_tensors="pt")["pixel_values"] for photo in PHOTOS])
    with torch.inference_mode():
        found = network.get_image_features(pixels) if call else network(pixels)
    return found.pooler_output.flatten(1).numpy()


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return save(tmp_path_factory.mktemp("vit"), "ViT")


@pytest.mark.parametrize("kind", CASES)
def test_embedding_is_the_models_own(kind, tmp_path):
    save(tmp_path, kind)
    _, rows = featx.extract(PHOTOS, arch=f"hf/{tmp_path}", num_workers=0)
    expected = theirs(tmp_path, "get_image_features" if kind in ("CLIP", "Siglip") else "")
    assert expected.std(0).max() > 1e-3, "the images differ"
    assert relative_error(rows, expected) < 1e-5


def test_the_processors_steps_are_done_exactly_or_refused(tmp_path):
    def preset(**changed):
        values = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "do_center_crop": False}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values | changed))
        return named(f"hf/{tmp_path}").preset(choose_weights(f"hf/{tmp_path}", "random"))

    for changed in (
        {},
        {"do_center_crop": True, "crop_size": {"height": 33, "width": 33}},
        {"do_center_crop": True, "crop_size": 48},  # larger: padded
        {"do_resize": False},
        {"size": {"height": 30, "width": 30}, "resample": 1},
        {"rescale_factor": 1 / 127.5, "do_normalize": False},
        {"do_rescale": False, "image_mean": [120, 110, 100], "image_std": [60, 50, 40], "resample": 0},
        {"image_processor_type": "LevitImageProcessor", "size": 32, "do_center_crop": True, "crop_size": 32},
        {"image_processor_type": "ConvNextImageProcessor", "size": 400},
        {"image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor", "size": 21},  # as of 2021
        {"image_processor_type": "ViTImageProcessorFast", "size": 21},
    ):
        ours = preset(**changed)
        processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
        for photo in PHOTOS[:5]:
            expected = processor(images=photo, return_tensors="pt")["pixel_values"]
            found = ours.normalize(ours.to_tensor(np.asarray(photo))[None])
            assert found.shape == expected.shape, changed
            assert torch.allclose(found, expected, rtol=1e-5, atol=2e-6), changed
    for changed, words in (
        ({"size": {"height": 30, "width": 20}}, r"size .* expected a shortest_edge, or a height equal to the width"),
        ({"size": {"shortest_edge": 30, "longest_edge": 50}}, "expected a shortest_edge"),
        ({"do_center_crop": True, "crop_size": {"height": 30, "width": 20}}, "crop_size .* equal to the width"),
        ({"do_pad": True}, "CLIPImageProcessorPil does more than resize, crop and normalize: do_pad"),
        ({"image_processor_type": "MobileViTImageProcessor"}, "MobileViTImageProcessorPil does more"),
        (
            {"image_processor_type": "MineImageProcessor", "auto_map": {"AutoImageProcessor": "mine.Mine"}},
            "cannot be used",
        ),
        ({"image_std": [0, 0, 0]}, "image_std"),
    ):
        with pytest.raises(BadValueError, match=rf"--model.arch .*preprocessed is unknown, since .*{words}"):
            preset(**changed)


def test_a_folder_without_a_processor_needs_mean_std_and_image_size(vit, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((vit / name).read_bytes())
    given = {"arch": f"hf/{tmp_path}", "num_workers": 0, "mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(
        BadValueError, match=r"it has no preprocessor_config.json.\nExpected --model.mean, .*image_size"
    ):
        featx.extract(PHOTOS, **given)
    _, rows = featx.extract(PHOTOS, **given, image_size=32, resize=32)
    ours = named(f"hf/{vit}").preset(choose_weights(f"hf/{vit}", "auto"))
    assert rows.shape == (10, 16) and ours.mean == (0.5,) * 3


def test_weights_are_the_folders_a_file_or_random(vit, tmp_path):
    arch = f"hf/{vit}"
    expected = theirs(vit)
    own = safetensors.torch.load_file(vit / "model.safetensors")
    network = AutoModel.from_pretrained(vit)
    torch.save({"state_dict": {f"model.{name}": value for name, value in own.items()}}, tmp_path / "lightning.ckpt")
    torch.save({f"module.{name}": value for name, value in network.state_dict().items()}, tmp_path / "new_names.pth")
    torch.save({f"model.net.vit.{name}": value for name, value in network.state_dict().items()}, tmp_path / "deep.pth")
    for file in ("lightning.ckpt", "new_names.pth", "deep.pth"):
        _, rows = featx.extract(PHOTOS, arch=arch, weights=tmp_path / file, num_workers=0)
        assert relative_error(rows, expected) < 1e-5, file
    _, rows = featx.extract(PHOTOS, arch=arch, weights="random", num_workers=0)
    assert relative_error(rows, expected) > 0.1
    again = featx.extract(PHOTOS, arch=arch, weights="random", num_workers=0)[1]
    assert np.array_equal(rows, again)


def test_a_file_must_have_all_that_the_layers_need(vit, tmp_path):
    own = safetensors.torch.load_file(vit / "model.safetensors")
    lost = next(name for name in own if "layer.1" in name and "key.weight" in name)
    torch.save({name: value for name, value in own.items() if name != lost}, tmp_path / "part.pth")
    torch.save(own | {lost: torch.zeros(3, 3)}, tmp_path / "other.pth")
    for file, words in (
        ("part.pth", "missing from the file: layers.1"),
        ("other.pth", r"layers.1.* \(3, 3\), expected"),
    ):
        with pytest.raises(BadValueError, match=rf"{file}: does not fit hf/[^$]*{words}"):
            featx.extract(PHOTOS, arch=f"hf/{vit}", weights=tmp_path / file, num_workers=0)
    names, _ = featx.extract(PHOTOS, "layers.0", arch=f"hf/{vit}", weights=tmp_path / "part.pth", num_workers=0)
    assert len(names) == 10


def test_a_classifiers_file_has_no_pooler_and_gives_the_class_token(tmp_path):
    config = transformers.ViTConfig(**SMALL | IMAGES, num_labels=5)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(**SQUASH).save_pretrained(tmp_path)
    _, rows = featx.extract(PHOTOS, ["embedding", "layernorm"], arch=f"hf/{tmp_path}", num_workers=0)
    assert np.array_equal(rows["embedding"], rows["layernorm"][:, :16])


@pytest.mark.parametrize("kind", ["Dinov2", "CLIP", "ResNet"])
def test_featx_layers_lists_what_the_model_calls(kind, tmp_path, capsys):
    assert layers(["--model.arch", f"hf/{save(tmp_path, kind)}", "--json"]) == 0
    paths = [row["path"] for row in json.loads(capsys.readouterr().out)]
    last = {"Dinov2": "layernorm", "CLIP": "visual_projection", "ResNet": "pooler"}[kind]
    assert len(paths) > 8 and paths[-1] == last, paths
    _, rows = featx.extract(PHOTOS[:2], paths[:3], arch=f"hf/{tmp_path}", num_workers=0)
    assert list(rows) == paths[:3]


def test_a_masked_autoencoder_sees_the_whole_image(tmp_path):
    config = transformers.ViTMAEConfig(**VISION, decoder_num_attention_heads=2, decoder_hidden_size=16)
    transformers.ViTMAEForPreTraining(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(**SQUASH).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    network = AutoModel.from_pretrained(tmp_path, mask_ratio=0.0).eval()
    with torch.inference_mode():
        expected = network(processor(images=PHOTOS, return_tensors="pt")["pixel_values"]).last_hidden_state[:, 0]
    _, rows = featx.extract(PHOTOS, arch=f"hf/{tmp_path}", num_workers=0)
    assert relative_error(rows, expected.numpy()) < 1e-5


def test_shards_and_a_pickle_of_tensors_are_read_and_nothing_in_them_runs(vit, tmp_path, monkeypatch):
    expected = theirs(vit)
    config = {name: (vit / name).read_bytes() for name in ("config.json", "preprocessor_config.json")}
    for name, content in config.items():
        for folder in ("shards", "bin", "evil"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_bytes(content)
    network = AutoModel.from_pretrained(vit)
    network.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert (tmp_path / "shards/model.safetensors.index.json").exists()
    torch.save(network.state_dict(), tmp_path / "bin/pytorch_model.bin")
    for folder in ("shards", "bin"):
        _, rows = featx.extract(PHOTOS, arch=f"hf/{tmp_path / folder}", num_workers=0)
        assert relative_error(rows, expected) < 1e-5

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({**network.state_dict(), "evil": Evil()}, tmp_path / "evil/pytorch_model.bin")
    featx.extract(PHOTOS, arch=f"hf/{tmp_path / 'evil'}", num_workers=0)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_folder_is_not_run(vit, tmp_path):
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass")
    code = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}
    values = json.loads((vit / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": code}))
    with pytest.raises(BadValueError, match=r"has no model_type mine, and its own code is never run.\nExpected"):
        build_empty(f"hf/{tmp_path}")
    kernels = {"_attn_implementation": "someone/kernels", "attn_implementation": "someone/kernels"}
    (tmp_path / "config.json").write_text(json.dumps(values | kernels | {"auto_map": code}))
    assert type(build_empty(f"hf/{tmp_path}")).__name__ == "ViTModel"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert"}, "of type bert does not take images alone"),
        ({"architecture": "resnet18", "num_features": 512}, r"a network of timm: --model.arch timm/"),
        ({"model_type": "vit", "quantization_config": {"bits": 4}}, "its weights are quantized"),
        ({"model_type": "clip", "text_config": 3}, r"config.json cannot be used"),
        ([], "not a JSON object"),
        (None, "it has no config.json"),
    ],
)
def test_what_is_no_vision_model_is_refused(config, words, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadValueError, match=rf"--model.arch hf/{tmp_path}: .*{words}"):
        build_empty(f"hf/{tmp_path}")


def test_of_clip_only_the_part_for_images_is_built(tmp_path):
    network = build_empty(f"hf/{save(tmp_path, 'CLIP')}")
    assert [name for name, _ in network.named_children()] == ["vision_model", "visual_projection"]
    assert all(parameter.is_meta for parameter in network.parameters() if parameter.ndim > 1)


def test_a_vision_model_with_projection_gives_its_projected_vector(tmp_path):
    config = transformers.CLIPVisionConfig(**VISION, projection_dim=12)
    network = transformers.CLIPVisionModelWithProjection(config).eval()
    network.save_pretrained(tmp_path)
    transformers.CLIPImageProcessorPil(**CROP).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    with torch.inference_mode():
        expected = network(processor(images=PHOTOS, return_tensors="pt")["pixel_values"]).image_embeds.numpy()
    _, rows = featx.extract(PHOTOS, arch=f"hf/{tmp_path}", num_workers=0)
    assert relative_error(rows, expected) < 1e-5


def test_image_size_interpolates_positions_and_is_in_the_identity(vit, tmp_path):
    network = AutoModel.from_pretrained(vit).eval()
    processor = AutoImageProcessor.from_pretrained(vit, backend="pil", size={"height": 48, "width": 48})
    with torch.inference_mode():
        pixels = processor(images=PHOTOS, return_tensors="pt")["pixel_values"]
        expected = network(pixels, interpolate_pos_encoding=True).pooler_output.numpy()
    _, rows = featx.extract(PHOTOS, arch=f"hf/{vit}", image_size=48, num_workers=0)
    assert relative_error(rows, expected) < 1e-5
    model = FeatureExtractor(arch=f"hf/{vit}", image_size=48)
    model.configure_model()
    assert str(model.preprocessing).startswith("squash to 48 bilinear, no crop")
    with pytest.raises(BadValueError, match=r"--model.image_size 4: hf/.* cannot take images of this size"):
        FeatureExtractor(arch=f"hf/{vit}", image_size=4).configure_model()


def test_the_identity_has_what_the_config_says(vit, tmp_path):
    def identity(folder):
        model = FeatureExtractor("layernorm", arch=f"hf/{folder}")
        model.configure_model()
        return {key: value for key, value in model.__dict__["_modules"]["network"].__dict__.items() if "digest" in key}

    for name in ("model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((vit / name).read_bytes())
    values = json.loads((vit / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert identity(tmp_path) == identity(vit)
    (tmp_path / "config.json").write_text(json.dumps(values | {"layer_norm_eps": 1e-3}))
    assert identity(tmp_path) != identity(vit)


ANSWER = SimpleNamespace(headers={}, request=None, status_code=404)


class Hub:
    """The hub, as a folder, in the place of huggingface_hub's functions."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.asked = folder, []
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: None)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)
        monkeypatch.setattr("featx.model.download.check_server", lambda url: None)

    def download(self, repo, name, **options):
        self.asked.append(name)
        if not (self.folder / name).exists():
            raise EntryNotFoundError(name)
        return str(self.folder / name)


def test_the_hubs_models_are_downloaded_with_the_first_form_of_weights_that_they_have(vit, tmp_path, monkeypatch):
    hub = Hub(vit, monkeypatch)
    _, rows = featx.extract(PHOTOS, arch="hf/someone/vit", num_workers=0)
    assert relative_error(rows, theirs(vit)) < 1e-5
    assert "model.safetensors" in hub.asked and "pytorch_model.bin" not in hub.asked
    hub.asked.clear()
    shards = tmp_path / "shards"
    AutoModel.from_pretrained(vit).save_pretrained(shards, max_shard_size="5KB")
    (shards / "preprocessor_config.json").write_bytes((vit / "preprocessor_config.json").read_bytes())
    hub.folder = shards
    _, rows = featx.extract(PHOTOS, arch="hf/someone/vit", num_workers=0)
    assert relative_error(rows, theirs(vit)) < 1e-5
    assert {path.name for path in shards.glob("*.safetensors")} <= {*hub.asked}
    hub.asked.clear()
    build_empty("hf/someone/vit")
    assert hub.asked == ["config.json"]


def fails(error, repo, name, **options):
    raise error("no", **{"response": ANSWER} if issubclass(error, RepositoryNotFoundError) else {})


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError, r"someone/vit is gated: .*\nAccept its terms at .*/someone/vit and log in with hf auth login"),
        (RepositoryNotFoundError, "the hub has no repository with this name, or it is private"),
        (LocalEntryNotFoundError, r"cannot be downloaded from .*\n.*hf download someone/vit --local-dir FOLDER"),
        (OSError, "cannot be downloaded from"),
        (HFValidationError, "the hub has no repository"),
    ],
)
def test_what_the_hub_does_not_give_is_one_message(error, words, monkeypatch, tmp_path):
    Hub(tmp_path, monkeypatch)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", partial(fails, error))
    with pytest.raises(UserError, match=rf"(?s)^--model.arch hf/someone/vi.*: .*{words}"):
        build_empty("hf/someone/vit")


def test_a_damaged_file_in_the_hubs_cache_is_reported(tmp_path, monkeypatch):
    blob = tmp_path / ("0" * 64)
    blob.write_bytes(b"{}")
    (tmp_path / "config.json").symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: str(tmp_path / name))
    with pytest.raises(UserError, match=r"config.json is damaged: its SHA-256 is not 00000000"):
        build_empty("hf/someone/vit")


def test_without_transformers_or_a_folder_the_message_says_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(MissingPathError, match=r"--model.arch hf/./nothing: no such folder"):
        named("hf/./nothing")
    with pytest.raises(MissingPathError, match=r"--model.arch hf/: : the hub has no repository with this name"):
        build_empty("hf/")
    (tmp_path / "clip").mkdir()
    monkeypatch.chdir(tmp_path)
    Hub(None, monkeypatch)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", partial(fails, RepositoryNotFoundError))
    with pytest.raises(
        MissingPathError, match=r"(?s)no repository .*\nThere is a folder clip: --model.arch hf/./clip$"
    ):
        build_empty("hf/clip")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"(?s)transformers cannot be imported .*pip install 'featx\[hf\]'"):
        named("hf/someone/vit")
