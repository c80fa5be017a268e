"""JPEGs -> pixels on the GPU, by nvJPEG through torchvision; the CPU decodes what nvJPEG cannot, or must not, have."""

import io
import os
import stat
import warnings
from contextlib import suppress
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from featx.messages import BadValueError, first_line


def check(device: torch.device) -> None:
    """Raise BadValueError where nvJPEG cannot be had."""
    if device.type != "cuda":
        raise BadValueError(
            f"--data.decoder cuda: this run is on {device.type}. Expected an NVIDIA GPU: --trainer.accelerator gpu.\n"
            "--data.decoder turbo is the fast one on a CPU."
        )
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        _decode([file.getvalue()], device)
    except RuntimeError as err:
        raise BadValueError(f"--data.decoder cuda: torchvision has no nvJPEG here: {first_line(err)}") from err


def read_encoded(path: str) -> bytes | None:
    """Return the bytes of a JPEG that nvJPEG can have, or None, where the CPU decodes, or says what is wrong.

    nvJPEG passes what libjpeg-turbo warns of, so that a file without its end marker is not for it; and it takes any
    three components for YCbCr, so that those that are RGB, by libjpeg's rules, are not either.
    """
    with suppress(Exception), warnings.catch_warnings():  # the CPU's decoder will say it
        warnings.simplefilter("ignore")
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb") as file:
            data = file.read()
        if data.endswith(b"\xff\xd9"):
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                components = [component[0] for component in getattr(image, "layer", [])]
                ycc = "jfif" in image.info or image.info.get("adobe_transform", components == [1, 2, 3]) == 1
                if image.mode == "L" or (image.mode == "RGB" and ycc):
                    return data
    return None


def decode(coded: list[bytes], device: torch.device) -> list[Tensor | None]:
    """Decode JPEGs to ``(3, H, W) uint8`` each on the device; None stands for one that cannot be."""
    try:
        return list(_decode(coded, device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # it gives all or none
        return [None] if len(coded) == 1 else [decode([data], device)[0] for data in coded]


def _decode(coded: list[bytes], device: torch.device) -> list[Tensor]:
    tensors: Any = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in coded]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision 0.29 calls it deprecated
        images: list[Tensor] = decode_jpeg(tensors, ImageReadMode.RGB, device) if tensors else []
    return images
