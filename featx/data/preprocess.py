"""An image -> what the network was trained on: resize, crop, mean and std, read off the weights' own transforms."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.models import AlexNet_Weights
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from featx.data.depth import Pixels
from featx.data.pillow import MOST_PIXELS, STRICT_PIL
from featx.errors import BadValueError, ImageError

REVISION = 1  # increase it whenever the steps below give other pixels: no run then uses earlier rows
Decoder = Literal["exact", "turbo"]
Interpolation = Literal["auto", "nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos"]


@dataclass(frozen=True)
class Preprocessing:
    """Resize the short side, crop the centre, scale to 0..1, subtract the mean, divide by the standard deviation.

    Equal to torchvision's classification transforms on a PIL image, up to float32 rounding. A resize or a crop of None
    leaves out that step.

    Args:
        resize: The short side after resizing, in pixels, or None.
        crop: The side of the centre crop, in pixels, or None.
        interpolation: torchvision's name of PIL's filter.
        mean: Mean of each channel, on the scale 0..1.
        std: Standard deviation of each channel, on the scale 0..1.
        source: Where these values come from.
        squash: Whether both sides are resized to ``resize``, so that the image is distorted.
        pad: Whether an image smaller than ``crop`` is padded with black; else it cannot be used.
        floor: Whether half a pixel of a margin is left out at the top and left, as transformers crop; else it is
            rounded to even, as torchvision does.
    """

    resize: int | None
    crop: int | None
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    squash: bool = False
    pad: bool = False
    floor: bool = False

    @classmethod
    def of_weights(cls, weights: Any) -> "Preprocessing":
        """Take the values from the ``transforms()`` of a torchvision weights entry."""
        preset = weights.transforms()
        return cls(
            resize=preset.resize_size[0],
            crop=preset.crop_size[0],
            interpolation=preset.interpolation.value,
            mean=tuple(preset.mean),
            std=tuple(preset.std),
            source=str(weights),
        )

    @classmethod
    def of_timm(cls, name: str, data: dict[str, Any]) -> "Preprocessing":
        """Take the values from a timm network's data config, as timm's own evaluation does.

        Raises:
            BadValueError: The network takes images that are not square, or another crop mode.
        """
        _, height, width = data["input_size"]
        if height != width or data["crop_mode"] not in ("center", "squash"):
            raise BadValueError(
                f"--model.arch {name}: takes images of {width} x {height} pixels in crop mode {data['crop_mode']}.\n"
                "Expected a network that takes square images in crop mode center or squash."
            )
        return cls(
            resize=math.floor(width / data["crop_pct"]),
            crop=width,
            interpolation=data["interpolation"],
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            source=name,
            squash=data["crop_mode"] == "squash",
            pad=data["crop_pct"] > 1,  # three of VOLO's, which timm evaluates so
        )

    def at(self, size: int) -> "Preprocessing":
        """Return the same for images of ``size`` pixels: that crop, and a resize in proportion."""
        resize = self.resize if self.resize is None or self.crop is None else self.resize * size // self.crop
        side = None if self.squash and self.crop is None else size
        return replace(self, resize=size if self.crop is None else resize, crop=side)

    @property
    def may_pad(self) -> bool:
        """Whether images may be smaller than the crop, in which case ``pad`` decides."""
        return self.crop is not None and (self.resize is None or self.resize < self.crop)

    @classmethod
    def usual(cls) -> "Preprocessing":
        """Return what most ImageNet networks were trained with, as torchvision gives it for AlexNet."""
        return replace(cls.of_weights(AlexNet_Weights.IMAGENET1K_V1), source="the usual one for ImageNet")

    def to_tensor(self, pixels: Pixels, decoder: Decoder = "exact") -> Tensor:
        """Resize, with antialiasing, and crop an RGB image to a ``(3, H, W) uint8`` tensor, channels last in memory.

        Args:
            pixels: The image, ``(H, W, 3) uint8``.
            decoder: exact: by PIL; turbo: on the tensor, in a third of the time, up to a few grey levels off.

        Raises:
            ImageError: The image is so long and narrow that resizing would make a decompression bomb of it.
            BadValueError: It is smaller than the crop, and not to be padded.
        """
        height, width = pixels.shape[:2]
        if self.resize is not None and self.resize**2 * max(height, width) / min(height, width) > MOST_PIXELS:
            raise ImageError(
                f"{width} x {height}: more than {MOST_PIXELS:,} pixels when its short side is {self.resize}"
            )
        method = InterpolationMode(self.interpolation)
        image: Any = Image.fromarray(pixels) if decoder == "exact" else torch.from_numpy(pixels).permute(2, 0, 1)
        with STRICT_PIL:  # PIL checks for a decompression bomb in a crop, too
            if self.resize is not None:
                size = [self.resize] * (2 if self.squash else 1)  # one number is the short side
                image = v2.resize(image, size, method, antialias=True)
            if self.crop is not None:
                height, width = v2.get_size(image)
                if min(height, width) < self.crop and not self.pad:
                    raise BadValueError(
                        f"{width} x {height}: smaller than the crop of {self.crop}. --data.pad true pads it with black"
                    )
                if self.floor:
                    top, left = (height - self.crop) // 2, (width - self.crop) // 2
                    image = v2.crop(image, top, left, self.crop, self.crop)  # outside the image it is black
                else:
                    image = v2.center_crop(image, [self.crop, self.crop])
        tensor: Tensor = v2.pil_to_tensor(image) if decoder == "exact" else image
        return tensor

    @staticmethod
    def is_one_colour(image: Tensor) -> bool:
        """Return whether all pixels of a ``(3, H, W) uint8`` image are the same; it takes 10 µs."""
        pixels = image.permute(1, 2, 0).numpy().tobytes()
        return pixels == pixels[:3] * (len(pixels) // 3)

    def normalize(self, images: Tensor) -> Tensor:
        """Turn ``(B, 3, H, W) uint8`` into float32, in the same memory layout.

        As ToTensor and Normalize do, operation for operation.
        """
        # With a true half --trainer.precision Lightning changes the default dtype, for all threads.
        mean, std = (torch.tensor(v, dtype=torch.float32, device=images.device) for v in (self.mean, self.std))
        if not images.is_contiguous(memory_format=torch.channels_last):
            return images.float().div_(255).sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
        batch, channels, height, width = images.shape
        # The three values of a pixel are too few for vector instructions; a line of pixels is long enough.
        lines = images.permute(0, 2, 3, 1).reshape(batch, height, width * channels).float()
        lines = lines.div_(255).sub_(mean.repeat(width)).div_(std.repeat(width))
        return lines.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def __str__(self) -> str:
        how = "squash to" if self.squash else "resize"
        resize = f"{how} {self.resize} {self.interpolation}" if self.resize is not None else "no resize"
        crop = f"crop {self.crop}" if self.crop is not None else "no crop"
        return f"{resize}, {crop} ({self.source})"


def given_channels(**options: Literal["auto"] | list[float]) -> dict[str, tuple[float, ...]]:
    """Return ``mean`` and ``std`` of the options, those that are not auto; raise BadValueError for a wrong value."""
    given = {name: tuple(values) for name, values in options.items() if values != "auto"}
    for name, values in given.items():
        if len(values) != 3 or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
            zero = "above 0, " if name == "std" else ""
            raise BadValueError(
                f"--model.{name} {options[name]}: expected three numbers {zero}such as '[0.5,0.5,0.5]'."
            )
    return given
