"""Networks of transformers against its own calls, with its Pillow processors; folders that save_pretrained writes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import make_image, relative_error
from transformers import AutoImageProcessor, AutoModel

import featx

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
