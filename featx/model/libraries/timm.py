"""Networks of timm: ``timm/NAME``, with or without the tag of their weights."""

import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

from torch import nn

from featx.data.preprocess import Preprocessing
from featx.errors import BadValueError, UserError, did_you_mean, first_line
from featx.model.download import check_server
from featx.model.libraries.base import Library, State, Weights, import_library
from featx.model.names import match_names


class Timm(Library):
    """A network of timm."""

    def __init__(self, arch: str, image_size: int | None = None) -> None:
        super().__init__(arch, image_size)
        self._timm = import_library("timm", "timm/NAME", "timm")
        self._name = arch.removeprefix("timm/")
        known = [*self._timm.list_models(), *self._timm.list_pretrained()]
        if self._name not in known:
            near = did_you_mean(arch, [f"timm/{name}" for name in known])
            raise BadValueError(
                f"--model.arch {arch}: timm has no network with this name.{near}\n"
                "python -c \"import timm; print(*timm.list_models(), sep='\\n')\" lists them."
            )
        self._cfg = self._timm.get_pretrained_cfg(self._name)

    def published(self) -> dict[str, Weights]:
        """Return the weights of the name's tag."""
        found = Weights(f"timm/{self._cfg.architecture}.{self._cfg.tag}", entry=self._cfg)
        return {"auto": found, "DEFAULT": found} if self._cfg.has_weights else {}

    def preset(self, weights: Weights, state: State | None = None, network: nn.Module | None = None) -> Preprocessing:
        """Return timm's data config, which keeps its crop_pct at another image size."""
        data = self._timm.data.resolve_data_config(pretrained_cfg=self._cfg.to_dict())
        if self.image_size is not None:
            data["input_size"] = (3, self.image_size, self.image_size)
        return Preprocessing.of_timm(weights.name if weights.entry else self.arch, data)

    def build(self, weights: Weights, state: State | None = None) -> nn.Module:
        """Build it by timm, which loads its published weights itself."""
        if weights.entry is None:
            return self._create()
        hub = import_module("huggingface_hub")
        cfg = weights.entry
        try:
            overlay, cached = {}, None
            if cfg.hf_hub_id and not cfg.custom_load:
                cached = hub.try_to_load_from_cache(cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors")
            if isinstance(cached, str):
                overlay = {"file": cached}  # skips the hub's request, which takes 20 s to fail without a connection
            else:
                check_server(hub.constants.ENDPOINT if cfg.hf_hub_id else cfg.url)
            return self._create(pretrained=True, pretrained_cfg_overlay=overlay)
        except Exception as err:
            raise UserError(
                f"timm cannot download the weights of {weights.name}\n({type(err).__name__}: "
                f"{first_line(err)[:200]}). Use a file of weights: --model.weights FILE\n"
                "(--model.weights random for a trial)"
            ) from err

    def rename(self, network: nn.Module, state: State, file: str) -> State:
        """Resample position embeddings to ``image_size``, as timm does when it loads published weights."""
        adapt = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        if self.image_size is None or adapt is None:
            return state
        adapted: State = adapt(match_names(network, dict(state), file)[0], network)
        return adapted

    def _create(self, **options: Any) -> nn.Module:
        network: nn.Module
        if self.image_size is not None:
            with suppress(TypeError):  # without an image size of its own, as most convolutional networks
                network = self._timm.create_model(self._name, img_size=self.image_size, **options)
                return network
        network = self._timm.create_model(self._name, **options)
        return network
