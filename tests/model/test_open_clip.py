"""Image towers of open_clip against its own encode_image, with its own transforms; weights in files."""

import open_clip
import pytest
import safetensors.torch
import torch
from conftest import make_image, relative_error

import featx

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


@pytest.mark.parametrize("name", CONFIGS)
def test_embedding_is_that_of_encode_image(name, tmp_path):
    file, network = save(tmp_path, name)
    _, rows = featx.extract(PHOTOS, arch=f"open_clip/{name}", weights=str(file), num_workers=0)
    expected = theirs(network)
    assert expected.std(0).max() > 1e-4, "the images differ"
    assert relative_error(rows, expected) < 1e-5
