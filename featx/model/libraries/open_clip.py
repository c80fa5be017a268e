"""Image towers of open_clip: ``open_clip/NAME``, or ``open_clip/hf-hub:OWNER/NAME`` of the hub."""

import copy
import hashlib
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize

from featx.data.preprocess import Preprocessing
from featx.errors import BadValueError, UserError, did_you_mean, first_line
from featx.model.download import from_hub
from featx.model.libraries.base import Library, State, Tower, Weights, import_library
from featx.model.names import WRAPPERS, unwrap

HUB = "hf-hub:"
CONFIG = "open_clip_config.json"
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


class OpenClip(Library):
    """A network of open_clip, of which only the image tower is built."""

    def __init__(self, arch: str, image_size: int | None = None) -> None:
        super().__init__(arch, image_size)
        self._clip = import_library("open_clip", "open_clip/NAME", "open_clip")
        self._name = arch.removeprefix("open_clip/")
        self._repo = self._name.removeprefix(HUB) if self._name.startswith(HUB) else None
        known = self._clip.list_models()
        if self._repo is None and self._name not in known:
            near = did_you_mean(arch, [f"open_clip/{name}" for name in known])
            raise BadValueError(
                f"--model.arch {arch}: open_clip has no network with this name.{near}\n"
                "python -c \"import open_clip; print(*open_clip.list_models(), sep='\\n')\" lists them.\n"
                "One of the hub is open_clip/hf-hub:OWNER/NAME."
            )

    def published(self) -> dict[str, Weights]:
        """Return the weights by their tags; ``auto`` is that of a network with one."""
        if self._repo is not None:
            return dict.fromkeys(("auto", "DEFAULT"), Weights(self.arch, entry={"hf_hub": f"{self._repo}/"}))
        tags = self._clip.list_pretrained_tags_by_model(self._name)
        found = {
            tag: Weights(f"{self.arch} {tag}", entry=self._clip.get_pretrained_cfg(self._name, tag)) for tag in tags
        }
        return {"auto": next(iter(found.values())), **found} if len(found) == 1 else found

    def fetch(self, weights: Weights) -> Weights:
        """Download published weights."""
        if weights.entry is None:
            return weights
        repo, _, name = weights.entry.get("hf_hub", "").rpartition("/")
        if not repo:
            raise UserError(
                f"--model.weights {weights.name.split()[-1]}: they are not on the hub. Download them from "
                f"{weights.entry.get('url')}\nand give the file."
            )
        safe = [f"{name.rpartition('.')[0]}.safetensors"] if name else []
        found = self._from_hub(repo, *safe, *([name] if name else FILES))
        if found is None:
            raise UserError(f"--model.arch {self.arch}: {repo} has none of {', '.join([*safe, name or FILES[0]])}.")
        return Weights(weights.name, weights.entry, str(found))

    def _from_hub(self, repo: str, *names: str) -> Path | None:
        try:
            return from_hub(repo, *names)
        except UserError as err:
            raise type(err)(f"--model.arch {self.arch}: {err.args[0]}") from err

    def _config(self) -> dict[str, Any]:
        """Return what the network is made of: ``model_cfg``, and ``preprocess_cfg`` if the hub's has one."""
        if self._repo is None:
            return {"model_cfg": copy.deepcopy(self._clip.get_model_config(self._name))}
        if (path := self._from_hub(self._repo, CONFIG)) is None:
            raise BadValueError(f"--model.arch {self.arch}: the repository has no {CONFIG}. Expected one of open_clip.")
        return self._read(path)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            values = json.loads(path.read_bytes())
        except ValueError as err:
            raise BadValueError(f"--model.arch {self.arch}: {path} is damaged ({first_line(err)}).") from err
        if not isinstance(values, dict):
            raise BadValueError(f"--model.arch {self.arch}: {path} is not a JSON object.")
        return values

    def build(self, weights: Weights, state: State | None = None) -> nn.Module:
        """Build the image tower."""
        config = self._config()["model_cfg"]
        vision = config["vision_cfg"] | {"timm_model_pretrained": False}
        if self.image_size is not None:
            vision["image_size"] = self.image_size
        quick = bool(config.get("quick_gelu", False))
        is_resnet = isinstance(vision.get("layers"), list)  # which has no GELU
        trained: dict[str, Any] = weights.entry or {}
        if weights.file and self._repo is None and (path := Path(weights.file).with_name(CONFIG)).is_file():
            trained = self._read(path).get("model_cfg", {})
        if trained.get("quick_gelu") and not quick and not is_resnet:
            # https://github.com/mlfoundations/open_clip/issues/771
            raise BadValueError(
                f"--model.weights {weights.file or weights.name.split()[-1]}: these were trained with QuickGELU, "
                f"{self._name} has GELU.\nExpected --model.arch open_clip/{self._name}-quickgelu."
            )
        # open_clip.create_model() would build the text tower, too, and download the config of some.
        make = import_module("open_clip.model")._build_vision_tower
        visual = make(config["embed_dim"], vision, quick, None)
        if self.image_size is not None and hasattr(visual, "set_input_size"):
            visual.set_input_size(self.image_size)  # one of timm
        return _ImageTower(visual, "multimodal_cfg" in config, {"vision": vision, "quick_gelu": quick})

    def rename(self, network: nn.Module, state: State, file: str) -> State:
        """Return the tensors of other makers by open_clip's names, and position embeddings at ``image_size``."""
        found = {unwrap(name, WRAPPERS): value for name, value in state.items()}
        found = dict(import_module("open_clip.convert").convert_state_dict(network, found))
        if self.image_size is not None:
            import_module("open_clip.model").resize_pos_embed(found, network)
            positions, trunk = found.get("visual.trunk.pos_embed"), getattr(network.visual, "trunk", None)
            if positions is not None and trunk is not None and positions.shape != trunk.pos_embed.shape:
                resample = import_module("timm.layers").resample_abs_pos_embed
                before = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
                size = trunk.patch_embed.grid_size
                found["visual.trunk.pos_embed"] = resample(positions, new_size=size, num_prefix_tokens=before)
        return {name: value for name, value in found.items() if name.startswith("visual.")} or found

    def preset(self, weights: Weights, state: State | None = None, network: nn.Module | None = None) -> Preprocessing:
        """Return that of a tag, of the configs beside a file or on the hub, or else of the first tag of the network."""
        config = self._config()
        size, given, source = config["model_cfg"]["vision_cfg"].get("image_size", 224), {}, self.arch
        if self._repo is not None:
            given = config.get("preprocess_cfg", {})
        elif weights.entry is not None:
            given, source = weights.entry, weights.name
        elif weights.file and (beside := self._beside(Path(weights.file))):
            given, source = beside
        elif tags := self._clip.list_pretrained_tags_by_model(self._name):
            given, source = self._clip.get_pretrained_cfg(self._name, tags[0]), f"{self.arch} {tags[0]}"
        steps = import_module("open_clip.transform").PreprocessCfg()
        keys = {key: given[key] for key in vars(steps) if given.get(key) is not None}
        steps = type(steps)(**{"size": size} | keys)
        sides = [*steps.size] if isinstance(steps.size, list | tuple) else [steps.size] * 2
        if sides[0] != sides[1] or steps.resize_mode not in ("shortest", "squash"):
            raise BadValueError(
                f"--model.arch {self.arch}: takes images of {sides[1]} x {sides[0]} pixels, resize_mode "
                f"{steps.resize_mode}.\nExpected a network that takes square images in resize_mode shortest or squash."
            )
        return self.resized(
            Preprocessing(
                resize=sides[0],
                crop=sides[0],
                interpolation="bilinear" if steps.interpolation == "bilinear" else "bicubic",
                mean=tuple(steps.mean),
                std=tuple(steps.std),
                source=source,
                squash=steps.resize_mode == "squash",
            )
        )

    def _beside(self, file: Path) -> tuple[dict[str, Any], str] | None:
        """Return the preprocessing in a file next to the weights, in open_clip's words, and where it is from."""
        if (path := file.with_name(CONFIG)).is_file() and (found := self._read(path).get("preprocess_cfg")):
            return found, str(path)
        if not (path := file.with_name("preprocessor_config.json")).is_file():
            return None
        values = self._read(path)
        size = values.get("size", values.get("crop_size"))
        if isinstance(size, dict):
            size = size.get("shortest_edge", size.get("height"))
        found = {"size": size, "mean": values.get("image_mean"), "std": values.get("image_std")}
        found["interpolation"] = {2: "bilinear", 3: "bicubic"}.get(values.get("resample", 3))
        found["resize_mode"] = "shortest" if values.get("do_center_crop", True) else "squash"
        return found, str(path)


class _ImageTower(Tower):
    """``encode_image`` of open_clip's networks; CoCa's gives rows of length 1."""

    vector = "encode_image"

    def __init__(self, visual: nn.Module, normalizes: bool, config: dict[str, Any]) -> None:
        super().__init__()
        self.visual = visual
        self._normalizes = normalizes
        self.config_digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()

    def forward(self, images: Tensor) -> Tensor:
        """Return the vector of each image, ``(B, D)``."""
        found = self.visual(images)
        vector: Tensor = found[0] if isinstance(found, tuple) else found
        return normalize(vector, dim=-1) if self._normalizes else vector
