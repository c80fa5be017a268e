"""An image -> a tensor: the weights' own transforms, to the bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_image
from torchvision import models, transforms

from featx.data.preprocess import Preprocessing
from featx.errors import BadValueError


@pytest.mark.parametrize("entry", [models.AlexNet_Weights.IMAGENET1K_V1, models.EfficientNet_B0_Weights.IMAGENET1K_V1])
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (40, 60), (1, 1)])
def test_preprocessing_equals_the_weights_own_transforms(entry, size):
    image = make_image(5, size)
    ours = Preprocessing.of_weights(entry)
    assert torch.equal(ours.normalize(ours.to_tensor(np.array(image))[None])[0], entry.transforms()(image))


def test_alexnet_says_256_224_bilinear():
    preset = Preprocessing.of_weights(models.AlexNet_Weights.IMAGENET1K_V1)
    assert str(preset) == "resize 256 bilinear, crop 224 (AlexNet_Weights.IMAGENET1K_V1)"
    assert preset.mean == (0.485, 0.456, 0.406)


def test_null_leaves_a_step_out():
    image = make_image(5, (50, 40))
    ours = Preprocessing(None, None, "bilinear", (0.0,) * 3, (1.0,) * 3, "a test")
    assert torch.equal(ours.to_tensor(np.array(image)), transforms.PILToTensor()(image))
    assert str(ours) == "no resize, no crop (a test)"


@pytest.mark.parametrize("decoder", ["exact", "turbo"])
@pytest.mark.parametrize("size", [(50, 40), (64, 40), (40, 64)])
def test_an_image_smaller_than_the_crop_is_refused_or_padded_as_torchvision_pads(size, decoder):
    image = make_image(5, size)
    ours = replace(Preprocessing.usual(), resize=None, crop=48)
    with pytest.raises(BadValueError, match=rf"{size[0]} x {size[1]}: smaller than the crop of 48. --data.pad true"):
        ours.to_tensor(np.array(image), decoder)
    padded = replace(ours, pad=True).to_tensor(np.array(image), decoder)
    expected = transforms.Compose([transforms.CenterCrop(48), transforms.PILToTensor()])(image)
    assert torch.equal(padded, expected)
    assert ours.to_tensor(np.array(make_image(5, (48, 48))), decoder).shape == (3, 48, 48)


def test_no_weights_of_torchvision_pad_and_those_of_timm_that_do_are_taken_so():
    for name in models.list_models(module=models):
        for entry in models.get_model_weights(name):
            assert not Preprocessing.of_weights(entry).may_pad, entry
    data = {
        "input_size": (3, 448, 448),
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": (0.0,),
        "std": (1.0,),
    }
    volo = Preprocessing.of_timm("timm/volo_d4_448", data | {"crop_pct": 1.15})
    assert (volo.resize, volo.crop, volo.pad) == (389, 448, True)
    assert not Preprocessing.of_timm("timm/x", data | {"crop_pct": 1.0}).pad


@pytest.mark.parametrize("decoder", ["exact", "turbo"])
def test_an_image_is_of_one_colour_when_all_its_pixels_are_the_same(decoder):
    ours = Preprocessing.usual()
    pixels = np.full((300, 260, 3), (200, 30, 4), np.uint8)
    assert Preprocessing.is_one_colour(ours.to_tensor(pixels, decoder))
    for place in ((150, 130, 2), (37, 19, 0), (260, 240, 1)):
        other = pixels.copy()
        other[place] ^= 63
        assert not Preprocessing.is_one_colour(ours.to_tensor(other, decoder))
    pixels[0, 0] = 0  # which the crop takes away
    assert Preprocessing.is_one_colour(ours.to_tensor(pixels, decoder))


def test_normalize_changes_nothing_in_place():
    images = torch.full((1, 3, 2, 2), 7, dtype=torch.uint8)
    Preprocessing.usual().normalize(images)
    assert images.eq(7).all()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(500, 375), (375, 501), (40, 60), (1, 1), (3000, 2)])
def test_turbo_is_at_most_two_grey_levels_off_exact(interpolation, size):
    pixels = np.array(make_image(5, size))
    ours = replace(Preprocessing.usual(), interpolation=interpolation)
    exact, turbo = ours.to_tensor(pixels), ours.to_tensor(pixels, "turbo")
    assert turbo.shape == exact.shape == (3, 224, 224) and turbo.dtype == exact.dtype == torch.uint8
    assert (turbo.int() - exact.int()).abs().max() <= 2


def test_turbo_without_steps_is_the_image_itself():
    pixels = np.array(make_image(5, (50, 40)))
    ours = Preprocessing(None, None, "bilinear", (0.0,) * 3, (1.0,) * 3, "a test")
    assert torch.equal(ours.to_tensor(pixels, "turbo"), ours.to_tensor(pixels, "exact"))


@pytest.mark.parametrize("width", [1, 2, 37, 224])
def test_normalizing_gives_the_same_bits_in_both_memory_layouts(width):
    ours = Preprocessing.usual()
    images = torch.randint(256, (3, 3, 5, width), dtype=torch.uint8)
    found = ours.normalize(images.contiguous(memory_format=torch.channels_last))
    expected = torch.stack([to_tensor_and_normalize(image, ours) for image in images])
    assert torch.equal(found, expected) and torch.equal(ours.normalize(images), expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


def to_tensor_and_normalize(image, ours):
    return transforms.Normalize(ours.mean, ours.std)(image.float().div(255))
