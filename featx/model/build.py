"""Build a network by name: torchvision's, timm's, or one that an importable function returns."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from featx.data.preprocess import Preprocessing
from featx.errors import BadValueError, MissingPathError, UserError, did_you_mean, first_line
from featx.model.download import check_server, digest, digest_in, fetch
from featx.process import imports
from featx.process.lightning import DispatchMode
from featx.process.shared import LOCK, Shared

SEED = 0
TRANSFORM_INPUT = ("googlenet", "inception_v3")  # these networks adapt images to their weights' own mean

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """The weights for a network: published, from a file, or random."""

    name: str  # in messages and in the record
    entry: Any = None  # of published weights: torchvision's weights entry or timm's pretrained cfg
    file: str | None = None
    random: bool = False


class _Torchvision:
    """A classification network of torchvision, for example ``alexnet``."""

    def __init__(self, arch: str) -> None:
        if arch not in (known := models.list_models(module=models)):
            raise BadValueError(
                f"--model.arch {arch}: torchvision has no classification network with this name."
                f"{did_you_mean(arch, known)}\n"
                "https://docs.pytorch.org/vision/stable/models.html lists them. For other networks give timm/NAME,\n"
                "or package.module.name of a function that returns one."
            )
        self._arch = arch
        self._entries = models.get_model_weights(arch)

    def published(self) -> dict[str, Weights]:
        best = self._entries.DEFAULT
        named = {"auto": best, "DEFAULT": best, **self._entries.__members__}
        return {name: Weights(str(entry), entry=entry) for name, entry in named.items()}

    def preset(self, weights: Weights, state: State | None = None, network: nn.Module | None = None) -> Preprocessing:
        size = _image_size(state)
        recipe = self._recipe(weights, size)
        preset = Preprocessing.of_weights(recipe)
        if self._arch in TRANSFORM_INPUT:
            preset = replace(preset, source=f"{recipe}; then the network's own transform_input")
        if size in (None, preset.crop):
            return preset
        return replace(preset, resize=size, crop=size, source=f"{recipe}, at the {size} pixels of the weights")

    def build(self, weights: Weights, state: State | None = None) -> nn.Module:
        options: dict[str, Any] = {"weights": weights.entry}
        if weights.entry is not None:
            fetch(weights.entry.url)
        elif self._arch.startswith("vit_"):
            size, patch = _image_size(state), int(self._arch[-2:])
            fits = size is not None and size % patch == 0  # else the file is another network's
            options["image_size"] = size if fits else self._recipe(weights, None).meta["min_size"][0]
        elif self._arch in TRANSFORM_INPUT:
            # With published weights, GoogLeNet's builder drops its auxiliary heads, and Inception's keeps its own.
            aux = self._arch == "inception_v3" and (state is None or any("AuxLogits." in name for name in state))
            options |= {"transform_input": True, "init_weights": False, "aux_logits": aux}
        network: nn.Module = models.get_model(self._arch, **options)
        return network

    def _recipe(self, weights: Weights, size: int | None) -> Any:
        if weights.file and len(self._entries) > 1 and (published := self._published_as(Path(weights.file))):
            return published
        first = self._entries.__members__.get("IMAGENET1K_V1", self._entries.DEFAULT)
        of_size = (entry for entry in (first, *self._entries) if entry.transforms().crop_size == [size])
        return weights.entry or next(of_size, first)

    def _published_as(self, file: Path) -> Any:
        """Return the entry of the weights that a file contains, whatever its name, or None."""
        size = file.stat().st_size / 2**20
        near = [entry for entry in self._entries if abs(entry.meta["_file_size"] - size) < 0.01]
        found = digest(file) if near else ""
        return next((entry for entry in near if found.startswith(digest_in(entry.url) or "none")), None)


def _image_size(state: State | None) -> int | None:
    """Return the image size in pixels that a ViT's weights were trained at, or None for another network."""
    state = state or {}
    patches = [value for name, value in state.items() if name.endswith("encoder.pos_embedding")]
    convs = [value for name, value in state.items() if name.endswith("conv_proj.weight")]
    if not patches or not convs or patches[0].ndim != 3 or convs[0].ndim != 4 or not patches[0].shape[1]:
        return None
    return math.isqrt(patches[0].shape[1] - 1) * convs[0].shape[-1] or None  # (1, 1 + patches, D), (D, 3, side, side)


class _Timm:
    """A network of timm: ``timm/NAME``, with or without the tag of its weights."""

    def __init__(self, arch: str) -> None:
        try:
            self._timm: Any = import_module("timm")
        except ImportError as err:
            raise UserError(
                f"--model.arch timm/NAME: timm cannot be imported ({first_line(err)}).\n"
                "Install it: pip install 'featx[timm]'"
            ) from err
        self._arch, self._name = arch, arch.removeprefix("timm/")
        known = [*self._timm.list_models(), *self._timm.list_pretrained()]
        if self._name not in known:
            near = did_you_mean(arch, [f"timm/{name}" for name in known])
            raise BadValueError(
                f"--model.arch {arch}: timm has no network with this name.{near}\n"
                "python -c \"import timm; print(*timm.list_models(), sep='\\n')\" lists them."
            )
        self._cfg = self._timm.get_pretrained_cfg(self._name)

    def published(self) -> dict[str, Weights]:
        found = Weights(f"timm/{self._cfg.architecture}.{self._cfg.tag}", entry=self._cfg)
        return {"auto": found, "DEFAULT": found} if self._cfg.has_weights else {}

    def preset(self, weights: Weights, state: State | None = None, network: nn.Module | None = None) -> Preprocessing:
        data = self._timm.data.resolve_data_config(pretrained_cfg=self._cfg.to_dict())
        return Preprocessing.of_timm(weights.name if weights.entry else self._arch, data)

    def build(self, weights: Weights, state: State | None = None) -> nn.Module:
        if weights.entry is None:
            network: nn.Module = self._timm.create_model(self._name)
            return network
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
            network = self._timm.create_model(self._name, pretrained=True, pretrained_cfg_overlay=overlay)
        except Exception as err:
            raise UserError(
                f"timm cannot download the weights of {weights.name}\n({type(err).__name__}: "
                f"{first_line(err)[:200]}). Use a file of weights: --model.weights FILE\n"
                "(--model.weights random for a trial)"
            ) from err
        return network


class _Function:
    """A function that returns a network: ``package.module.name``."""

    def __init__(self, arch: str) -> None:
        self._arch = arch

    def published(self) -> dict[str, Weights]:
        return {"auto": Weights(f"as {self._arch}() made them")}

    def preset(self, weights: Weights, state: State | None = None, network: nn.Module | None = None) -> Preprocessing:
        return preset_of(network)

    def build(self, weights: Weights, state: State | None = None) -> nn.Module:
        arch = self._arch
        function = import_function(arch)
        try:
            network = function()
        except Exception as err:
            raise BadValueError(
                f"--model.arch {arch}: calling {arch}() failed: {type(err).__name__}: {first_line(err)}\n"
                "Expected a function without arguments that returns an nn.Module. To pass arguments, call it in "
                "build_network()\nof a subclass of featx.FeatureExtractor, and give that as --model."
            ) from err
        if not isinstance(network, nn.Module):
            raise BadValueError(
                f"--model.arch {arch}: {arch}() returned a {type(network).__name__}. Expected an nn.Module."
            )
        return network


def check_program(network: nn.Module, layers: list[str], title: str) -> None:
    """Raise BadValueError if layers are inside a TorchScript or exported program, which calls no modules."""
    for path, module in network.named_modules():
        graph = module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ()
        exported = any(isinstance(node.target, torch._ops.OpOverload) for node in graph)
        if (exported or isinstance(module, torch.jit.ScriptModule)) and (
            not path or any(layer.startswith(f"{path}.") for layer in layers)
        ):
            kind = "a program of torch.export" if exported else "a TorchScript program"
            raise BadValueError(
                f"--model.layer {', '.join(layers)}: {f'{path} of ' if path else ''}{title} is {kind}, which does not\n"
                "call its modules, so that their outputs cannot be taken. Expected the network that it was made from."
            )


def preset_of(network: nn.Module | None) -> Preprocessing:
    """Return the preprocessing that a network carries, as those of timm do, or the usual one for ImageNet."""
    cfg = getattr(network, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or "input_size" not in cfg:
        return Preprocessing.usual()
    data = import_module("timm.data").resolve_data_config(pretrained_cfg=cfg)
    return Preprocessing.of_timm(f"timm/{cfg.get('architecture', type(network).__name__)}", data)


def import_function(arch: str) -> Callable[[], Any]:
    """Import the function that ``--model.arch`` names; raise UserError if that fails."""
    return imports.import_function(arch, "--model.arch", "a function that returns an nn.Module")


def named(arch: str) -> _Torchvision | _Timm | _Function:
    """Return a network's description; raise UserError if there is none with this name.

    ``published()`` returns its published weights by their names in ``--model.weights``. ``preset(weights, state,
    network)`` returns their preprocessing; for random weights and files that are not published, that of the first
    recipe. ``build(weights, state)`` returns the network with published weights, or ready for a file's ``state``; it
    raises UserError if weights cannot be downloaded, or a function cannot be imported or fails.
    """
    if arch.startswith("timm/"):
        return _Timm(arch)
    return _Function(arch) if is_function(arch) else _Torchvision(arch)


def is_function(arch: str) -> bool:
    """Return whether ``--model.arch`` names a function, ``package.module.name``."""
    return "." in arch and not arch.startswith("timm/")


def choose_weights(arch: str, weights: str) -> Weights:
    """Resolve ``--model.weights``: auto, DEFAULT, an entry's name, random, or a file; else raise UserError."""
    if weights == "random":
        return Weights(f"random (seed {SEED})", random=True)
    published = named(arch).published()
    if weights in published:
        return published[weights]
    if os.path.isfile(weights):
        return Weights(weights, file=weights)
    if os.path.isdir(weights):
        raise BadValueError(f"--model.weights {weights}: this is a folder. Expected a file of weights.")
    if weights in ("auto", "DEFAULT"):
        raise BadValueError(
            f"--model.weights {weights}: there are no published weights for {arch}.\n"
            "Expected a file of weights, or random for a trial."
        )
    names = [*(name for name in published if name != "DEFAULT"), "random"]
    raise MissingPathError(
        f"--model.weights {weights}: no such file or published weights.{did_you_mean(weights, names)}\n"
        f"Expected a file, or one of {', '.join(names)}."
    )


def build_empty(arch: str) -> nn.Module:
    """Build a network to look at its modules and shapes; only a function's network has values."""
    network = named(arch)
    if is_function(arch):
        return network.build(Weights("none"))
    try:
        with _BuildMode(empty=True):
            return network.build(Weights("none"))
    except RuntimeError:  # timm's hybrids find a shape by running an image through their stem, which needs values
        with _BuildMode():
            return network.build(Weights("none"))


def guess_arch(shapes: Mapping[str, torch.Size]) -> str | None:
    """Return the torchvision arch that best fits these tensors by name and shape, if more than half of them fit.

    Building all 80 would take seconds, so only the ten with the nearest numbers of parameters are built. The right one
    is among them even without its classifier, unless that is most of the network, as in VGG.
    """
    size = sum(shape.numel() for name, shape in shapes.items() if not name.startswith("aux"))  # num_params omits them
    sizes = {arch: models.get_model_weights(arch).DEFAULT.meta["num_params"] for arch in models.list_models(models)}
    scores = {}
    for arch in sorted(sizes, key=lambda arch: abs(math.log(sizes[arch] / max(1, size))))[:10]:
        own = {name: value.shape for name, value in build_empty(arch).state_dict().items() if value.ndim}
        same = sum(own.get(name) == shape for name, shape in shapes.items())
        scores[arch] = same / max(len(own), len(shapes))
    best = max(scores, key=lambda arch: scores[arch])
    return best if scores[best] > 0.5 else None


@contextmanager
def seeded(seed: int, arch: str | None) -> Iterator[None]:
    """Build a network within this context with the same random numbers in every process and every run.

    The process's random generator and default dtype have no effect on it, and stay as they were. ``arch`` is None if
    the user's code builds the network.
    """
    if arch is not None and not is_function(arch):
        with FLOAT32, _BuildMode(seed):
            yield
    else:  # the user's code may seed or use the process's generator
        with FLOAT32, LOCK, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield


@contextmanager
def _float32() -> Iterator[None]:
    before = torch.get_default_dtype()  # some Trainers set it to that of --trainer.precision
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


FLOAT32 = Shared(_float32)


class _BuildMode(DispatchMode):  # type: ignore[no-untyped-call]
    """Seeds or leaves out the values of networks that this thread builds; other threads are not affected.

    The random numbers are the same as after ``torch.manual_seed``. If ``empty``, parameters have a shape and no values.
    ``torch.device("meta")`` fails, since RegNet and many timm networks compute their widths with tensors.

    https://docs.pytorch.org/docs/stable/notes/extending.html#extending-all-torch-api-with-modes
    """

    def __init__(self, seed: int = SEED, empty: bool = False) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)
        self._empty = empty

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one of torch's operations."""
        kwargs = kwargs or {}
        if self._empty and func is torch.ops.aten.empty.memory_format and 0 not in args[0]:  # 0: a new storage
            return func(*args, **kwargs | {"device": "meta"})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func.overloadpacket(*args, **kwargs | {"generator": self._generator})


@cache
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()  # takes 0.3 s


def packages(network: nn.Module, owner: type, arch: str) -> dict[str, str]:
    """Return the versions of the installed packages that contain a network's code, besides torch and torchvision.

    ``owner`` is the FeatureExtractor's class, ``arch`` the name that the network was built by, or nothing.
    """
    code = {type(module).__module__.split(".")[0] for module in network.modules()}
    code |= {owner.__module__.split(".")[0], *([arch.split(".")[0]] if is_function(arch) else [])}
    if not (code := code - {"torch", "torchvision", "featx", "__main__"}):
        return {}
    installed = _distributions()
    return {name: version(name) for name in sorted({name for top in code for name in installed.get(top, ())})}
