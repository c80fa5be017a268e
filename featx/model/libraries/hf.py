"""Vision models of transformers: ``hf/OWNER/NAME`` of the hub, ``hf//absolute/path`` or ``hf/./folder``."""

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from featx.data.preprocess import Preprocessing
from featx.errors import BadValueError, MissingPathError, UserError, first_line
from featx.model.download import from_hub
from featx.model.libraries.base import Library, State, Tower, UnknownPresetError, Weights, import_library
from featx.model.names import PREFIXES, WRAPPERS, under, unwrap
from featx.process.shared import Shared

CONFIG, PROCESSORS = "config.json", ("processor_config.json", "preprocessor_config.json")  # of transformers 5, and 4
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Processors that resize, crop, scale and normalize, and nothing else.
PLAIN = ("Beit", "Bit", "Blip", "CLIP", "ChineseCLIP", "DINOv3ViT", "DeiT", "MobileNetV1", "MobileNetV2", "OwlViT",
         "Pvt", "Siglip", "ViT")  # fmt: skip
STEPS = {
    "size", "crop_size", "crop_pct", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "resample",
    "rescale_factor", "image_mean", "image_std",
}  # fmt: skip
NO_STEPS = {
    "image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "do_convert_rgb", "data_format",
    "default_to_square", "size_divisor", "do_reduce_labels", "reduce_labels", "return_tensors",
}  # fmt: skip
LEFT_OUT = {  # of a config: how to load it, and what to return
    "auto_map", "quantization_config", "fusion_config", "distributed_config", "attn_implementation", "dtype",
    "torch_dtype", "torchscript", "return_dict", "output_hidden_states", "output_attentions",
}  # fmt: skip


class HuggingFace(Library):
    """A vision model of transformers, by ``AutoModel`` and the settings of its image processor; none of its own code.

    Of a model of images and text, only the part for images is built.
    """

    def __init__(self, arch: str, image_size: int | None = None) -> None:
        super().__init__(arch, image_size)
        self._transformers = import_library("transformers", "hf/NAME", "hf")
        self._repo = arch.removeprefix("hf/")
        is_folder = self._repo in (".", "..") or self._repo.startswith(("/", "./", "../", "~/"))
        self._folder = Path(self._repo).expanduser() if is_folder else None
        if self._folder and not self._folder.is_dir():
            raise MissingPathError(f"--model.arch {arch}: no such folder. Expected one that save_pretrained wrote.")

    def published(self) -> dict[str, Weights]:
        """Return the weights in the folder, or on the hub."""
        found = self._find(*FILES) if self._folder else None
        if self._folder and found is None:
            return {}
        weights = Weights(self.arch, entry=self._repo, file=str(found) if found else None)
        return {"auto": weights, "DEFAULT": weights}

    def fetch(self, weights: Weights) -> Weights:
        """Download the hub's weights."""
        if weights.file or weights.random:
            return weights
        if (file := self._find(*FILES)) is None:
            raise UserError(f"--model.arch {self.arch}: the repository has none of {', '.join(FILES)}.")
        index = (self._read(file.name) or {}).get("weight_map") if file.suffix == ".json" else None
        for shard in sorted({str(name) for name in index.values()} if isinstance(index, dict) else ()):
            self._find(os.path.basename(shard))  # reading them reports what is missing
        return Weights(weights.name, weights.entry, str(file))

    def _find(self, *names: str) -> Path | None:
        """Return the first file of these that there is."""
        if self._folder:
            return next((path for name in names if (path := self._folder / name).is_file()), None)
        try:
            return from_hub(self._repo, *names)
        except UserError as err:
            meant = (
                f"\nThere is a folder {self._repo}: --model.arch hf/./{self._repo}" if os.path.isdir(self._repo) else ""
            )
            raise type(err)(f"--model.arch {self.arch}: {err.args[0]}{meant}") from err

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._find(name)
        try:
            values = json.loads(path.read_bytes()) if path else None
        except ValueError as err:
            raise BadValueError(f"--model.arch {self.arch}: {path} is damaged ({first_line(err)}).") from err
        if not isinstance(values, dict | None):
            raise BadValueError(f"--model.arch {self.arch}: {path} is not a JSON object.")
        return values

    def _config(self) -> Any:
        values = self._read(CONFIG)
        if values is None:
            clip = "\nIt is one of open_clip: --model.arch open_clip/hf-hub:" + self._repo
            hint = clip if self._find("open_clip_config.json") else " Expected a model of transformers."
            raise BadValueError(f"--model.arch {self.arch}: it has no {CONFIG}.{hint}")
        kind, known = values.get("model_type"), self._transformers.CONFIG_MAPPING
        if "model_type" not in values and "architecture" in values:
            name = self._repo.removeprefix("timm/")
            raise BadValueError(f"--model.arch {self.arch}: it is a network of timm: --model.arch timm/{name}")
        if not isinstance(kind, str) or kind not in known:
            own = ", and its own code is never run" if "auto_map" in values else ""
            raise BadValueError(
                f"--model.arch {self.arch}: transformers {self._transformers.__version__} has no model_type {kind}"
                f"{own}.\nExpected a model whose code is part of transformers; a newer transformers may have it."
            )
        if values.get("quantization_config"):
            raise BadValueError(f"--model.arch {self.arch}: its weights are quantized. Expected the full ones.")
        try:
            with QUIET:
                return known[kind].from_dict(_plain(values))
        except Exception as err:  # of any type
            raise BadValueError(f"--model.arch {self.arch}: its {CONFIG} cannot be used: {first_line(err)}") from err

    def _model(self) -> tuple[Any, Any]:
        """Return the class of the model and its config."""
        config = self._config()
        named = (getattr(config, "architectures", None) or [""])[0]
        known = self._transformers.MODEL_MAPPING
        if isinstance(named, str) and named.endswith("VisionModelWithProjection"):
            model = getattr(self._transformers, named, None)
        else:
            model = known.get(type(config), None)
        model = model[0] if isinstance(model, tuple) else model
        takes_images = model is not None and (
            hasattr(model, "get_image_features") or getattr(model, "main_input_name", "") == "pixel_values"
        )
        if not takes_images:
            raise BadValueError(
                f"--model.arch {self.arch}: a model of type {config.model_type} does not take images alone.\n"
                "Expected a vision model, or one of images and text such as CLIP or SigLIP."
            )
        if hasattr(config, "mask_ratio"):
            config.mask_ratio = 0.0
        if (text := getattr(config, "text_config", None)) is not None:
            text.num_hidden_layers = 0  # of the part that is not used
        return model, config

    def build(self, weights: Weights, state: State | None = None) -> nn.Module:
        """Build the model, with the tensors of ``state`` as transformers names them, from older files too."""
        model, config = self._model()
        options: dict[str, Any] = {}
        with QUIET:
            if state is None:
                network = model._from_config(config, dtype=torch.float32)
            else:
                tensors = _without_prefix(state, f"{model.base_model_prefix}.")
                has_pooler = any("pooler" in name for name in tensors)
                if not has_pooler and "add_pooling_layer" in inspect.signature(model).parameters:
                    options["add_pooling_layer"] = False  # as in a file of a classifier: it would be random
                network, info = model.from_pretrained(
                    None, config=config, state_dict=tensors, dtype=torch.float32, ignore_mismatched_sizes=True,
                    output_loading_info=True, **options,
                )  # fmt: skip
        for name in [name for name in network._modules if name.startswith("text_")]:
            delattr(network, name)
        projects = hasattr(model, "get_image_features")
        takes = inspect.signature(model.get_image_features if projects else model.forward).parameters
        extra = {"interpolate_pos_encoding": True} if self.image_size and "interpolate_pos_encoding" in takes else {}
        network.masks_at_random = config.model_type == "vit_mae"
        own = {"forward": _forward, "__module__": __name__}
        network.__class__ = type(model.__name__, (Tower, model), own)
        network.vector = "get_image_features" if projects else f"output of {model.__name__}"
        network.extra = extra
        network.has_class_token = any(
            "cls_token" in name or "class_emb" in name for name, _ in network.named_parameters()
        )
        values = config.to_dict()
        values.pop("transformers_version", None)
        network.config_digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
        if state is not None:
            wrong = {name: torch.empty(shape) for name, shape, _ in info["mismatched_keys"]}
            lost = {*info["missing_keys"], *wrong}
            network.loaded = {name: value for name, value in network.state_dict().items() if name not in lost}
            others = sorted(name for name in info["unexpected_keys"] if not name.startswith("text_"))
            network.loaded |= wrong | {name: torch.empty(0) for name in others}
        return network  # type: ignore[no-any-return]

    def rename(self, network: nn.Module, state: State, file: str) -> State:
        """Return what ``build`` took from the file."""
        loaded: State = vars(network).pop("loaded", state)
        return loaded

    def preset(self, weights: Weights, state: State | None = None, network: nn.Module | None = None) -> Preprocessing:
        """Return the settings of the model's image processor, as Pillow does them."""
        paths = [path for name in PROCESSORS if (path := self._find(name))]
        if not paths:
            raise self._unknown(f"it has no {PROCESSORS[-1]}")
        path = paths[-1]
        try:
            with QUIET:
                auto = self._transformers.AutoImageProcessor
                processor = auto.from_pretrained(str(path.parent), use_fast=False, trust_remote_code=False)
        except Exception as err:  # of any type
            raise self._unknown(f"its {path.name} cannot be used: {first_line(err)[:200]}") from err
        kind = type(processor).__name__.removesuffix("Pil").removesuffix("Fast").removesuffix("ImageProcessor")
        values = {key: value for key, value in processor.to_dict().items() if not key.startswith("_")}
        others = [key for key, value in values.items() if key not in STEPS | NO_STEPS and value not in (None, False)]
        if kind not in (*PLAIN, "ConvNext", "Levit") or others:
            does = f"does more than resize, crop and normalize{': ' * bool(others)}{', '.join(others)}"
            raise self._unknown(f"its {type(processor).__name__} {does}")
        try:
            return self.resized(_preset(kind, values, self.arch))
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as err:
            raise self._unknown(f"its {path.name} cannot be used: {first_line(err)}") from err

    def _unknown(self, why: str) -> UnknownPresetError:
        return UnknownPresetError(
            f"--model.arch {self.arch}: how its images are preprocessed is unknown, since {why}.\n"
            "Expected --model.mean, --model.std and --model.image_size with it; the short side is then resized to "
            "256/224 of that, bilinear, and the\nimage cropped. --data.resize, --data.crop and --data.interpolation "
            "change these steps."
        )


def _preset(kind: str, values: dict[str, Any], source: str) -> Preprocessing:
    """Return the steps of an image processor; raise ValueError for one that cannot be done exactly."""
    resize = crop = None
    squash = False
    size = {key: value for key, value in dict(values.get("size") or {}).items() if value is not None}
    if values.get("do_resize"):
        if size.keys() == {"shortest_edge"}:
            resize = int(size["shortest_edge"])
        elif size.keys() == {"height", "width"} and size["height"] == size["width"]:
            resize, squash = int(size["height"]), True
        else:
            raise ValueError(f"size {json.dumps(size)}; expected a shortest_edge, or a height equal to the width")
        if kind == "ConvNext" and not squash and resize < 384:  # else it squashes
            resize, crop = int(resize / values.get("crop_pct", 224 / 256)), resize
        elif kind == "ConvNext":
            squash = True
        if kind == "Levit" and not squash:
            resize = int(256 / 224 * resize)
    if values.get("do_center_crop"):
        sides = dict(values["crop_size"])
        if sides["height"] != sides["width"]:
            raise ValueError(f"crop_size {json.dumps(sides)}; expected a height equal to the width")
        crop = int(sides["height"])
    scale = values.get("rescale_factor", 1 / 255) if values.get("do_rescale") else 1
    mean, std = [0.0] * 3, [1.0] * 3
    if values.get("do_normalize"):
        mean, std = list(values["image_mean"]), list(values["image_std"])
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0 or scale <= 0:
        raise ValueError(f"image_mean {mean}, image_std {std}, rescale_factor {scale}")
    to_one = 1 if scale == 1 / 255 else 1 / (255 * scale)  # featx's own scale is 0..1
    return Preprocessing(
        resize=resize,
        crop=crop,
        interpolation=Image.Resampling(values.get("resample", 2)).name.lower(),
        mean=(mean[0] * to_one, mean[1] * to_one, mean[2] * to_one),
        std=(std[0] * to_one, std[1] * to_one, std[2] * to_one),
        source=source,
        squash=squash,
        pad=crop is not None and resize is not None and resize < crop,
        floor=crop is not None,
    )


def _plain(values: Any) -> Any:
    """Return a config without code, kernels, quantization, private settings, and what to return."""
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()
                if key not in LEFT_OUT and not key.startswith("_")}  # fmt: skip
    return values


def _without_prefix(state: State, base: str) -> dict[str, Tensor]:
    """Return tensors without the names of wrappers, and of attributes that contain the model, which most begin with.

    ``base`` is what the names of a model with a head begin with, such as ``vit.``
    """
    tensors = {unwrap(name, WRAPPERS): value for name, value in state.items()}
    inner = {name[: name.index(f".{base}") + 1] for name in tensors if f".{base}" in name} if base != "." else set()
    for prefix in inner:
        if 2 * len(part := under(prefix, tensors)) > len(tensors):
            return part
    for prefix in PREFIXES:
        if 2 * len(part := under(f"{prefix}.", tensors)) > len(tensors):
            return part
    return tensors


def _forward(self: Any, images: Tensor) -> Tensor:
    """Return the vector of each image, ``(B, D)``.

    It is that of ``get_image_features``; else of a projection, of the pooler, the class token after the last norm, or
    the mean over the places.
    """
    if self.vector == "get_image_features":
        found = self.get_image_features(pixel_values=images, **self.extra)
    else:
        extra = self.extra
        if self.masks_at_random:  # https://github.com/huggingface/transformers/issues/16101: nothing masked, as sorted
            side = images.shape[-1] // self.config.patch_size
            extra = extra | {"noise": torch.arange(side**2, device=images.device).expand(len(images), -1)}
        found = super(Tower, self).forward(pixel_values=images, **extra)
    vector = found
    if not isinstance(found, Tensor):
        named = (getattr(found, name, None) for name in ("image_embeds", "pooler_output"))
        vector = next((value for value in named if value is not None), None)
        if vector is None:
            last = found.last_hidden_state
            vector = last.mean((2, 3)) if last.ndim == 4 else last[:, 0] if self.has_class_token else last.mean(1)
    rows: Tensor = vector.flatten(1)
    return rows


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' bars, reports and notes on loading."""
    talk: Any = import_library("transformers", "hf/NAME", "hf").utils.logging
    level, bars = talk.get_verbosity(), talk.is_progress_bar_enabled()
    talk.set_verbosity(logging.CRITICAL)
    talk.disable_progress_bar()
    try:
        yield
    finally:
        talk.set_verbosity(level)
        if bars:
            talk.enable_progress_bar()


QUIET = Shared(_quiet)
