"""A name -> nn.Module: a network of torchvision or timm, or what any importable function returns."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import packages_distributions, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models

from featx.data.preprocess import Preprocessing
from featx.errors import BadValueError, MissingPathError, UserError, did_you_mean, first_line
from featx.model.download import fetch, knock
from featx.process.shared import LOCK, Shared

SEED = 0
TIMM = "timm/"
TRANSFORM_INPUT = ("googlenet", "inception_v3")  # their weights want images of another mean, which they make themselves


@dataclass(frozen=True)
class Weights:
    """Which weights a network is to get.

    Args:
        name: What it is called in messages and in the record.
        entry: What torchvision or timm knows of weights that it publishes: a weights entry, a pretrained cfg.
        file: A file of the user's.
        random: Whether they are random numbers.
    """

    name: str
    entry: Any = None
    file: str | None = None
    random: bool = False


def is_function(arch: str) -> bool:
    """Return whether ``--model.arch`` names a function, ``package.module.name``."""
    return "." in arch and not arch.startswith(TIMM)


def check_arch(arch: str) -> None:
    """Raise UserError unless torchvision or timm has a network of this name, or it is a function to import."""
    if arch.startswith(TIMM):
        _timm_name(arch)
    elif is_function(arch):
        _import(arch)
    elif arch not in (known := models.list_models(module=models)):
        raise BadValueError(
            f"--model.arch {arch}: torchvision has no classification network of this name."
            f"{did_you_mean(arch, known)}\n"
            "https://docs.pytorch.org/vision/stable/models.html lists them. Others are timm/NAME and a function that "
            "returns one,\npackage.module.name."
        )


def choose_weights(arch: str, weights: str) -> Weights:
    """Read ``--model.weights`` for a named network: auto, DEFAULT, an entry's name, random, or a file.

    Raises:
        UserError: It is none of them.
    """
    if weights == "random":
        return Weights(f"random (seed {SEED})", random=True)
    published = _published(arch)
    if weights in published:
        return published[weights]
    names = [*(name for name in published if name != "DEFAULT"), "random"]
    if os.path.isfile(weights):
        return Weights(weights, file=weights)
    if os.path.isdir(weights):
        raise BadValueError(f"--model.weights {weights}: this is a folder. Expected a file of weights.")
    if weights in ("auto", "DEFAULT"):
        raise BadValueError(
            f"--model.weights {weights}: nobody publishes weights of {arch}.\n"
            "Expected a file of weights, or random for a trial."
        )
    raise MissingPathError(
        f"--model.weights {weights}: no such file, and no name of weights.{did_you_mean(weights, names)}\n"
        f"Expected a file, or one of {', '.join(names)}."
    )


def _published(arch: str) -> dict[str, Weights]:
    if is_function(arch):
        return {"auto": Weights(f"as {arch}() made them")}
    if arch.startswith(TIMM):
        cfg = _timm_cfg(arch)
        found = Weights(f"{TIMM}{cfg.architecture}.{cfg.tag}", entry=cfg) if cfg.has_weights else None
        return {"auto": found, "DEFAULT": found} if found else {}
    entries = models.get_model_weights(arch)
    named = {"auto": entries.DEFAULT, "DEFAULT": entries.DEFAULT, **entries.__members__}
    return {name: Weights(str(entry), entry=entry) for name, entry in named.items()}


def preset_of(arch: str, weights: Weights, state: dict[str, Tensor] | None = None) -> Preprocessing:
    """Return the preprocessing of the weights; for a file or random ones that of the arch's first recipe.

    Args:
        arch: Name of the network.
        weights: Its weights.
        state: What the weights' file holds: a ViT's position embedding tells its image size.
    """
    if is_function(arch):
        return Preprocessing.usual()
    if arch.startswith(TIMM):
        data = _timm().data.resolve_data_config(pretrained_cfg=_timm_cfg(arch).to_dict())
        return Preprocessing.of_timm(weights.name if weights.entry else arch, data)
    size = _image_size(state)
    recipe = _recipe(arch, weights, size)
    preset = Preprocessing.of_weights(recipe)
    if arch in TRANSFORM_INPUT:
        preset = replace(preset, source=f"{recipe}; behind it the network's own transform_input")
    if size in (None, preset.crop):
        return preset
    return replace(preset, resize=size, crop=size, source=f"{recipe}, at the {size} pixels of the weights")


def build_empty(arch: str) -> nn.Module:
    """Build a network without computing its values, to look at its modules and shapes."""
    if is_function(arch):
        return _call(arch)
    try:
        with _Thread(empty=True):
            return build(arch, Weights("none"))
    except RuntimeError:  # hybrids of timm's run a picture through their stem to see its shape, which takes values
        with _Thread():
            return build(arch, Weights("none"))


@contextmanager
def seeded(seed: int, arch: str | None) -> Iterator[None]:
    """Let a network that is built here have the same random numbers in every process and every run.

    The generator and the default dtype of the process are not what this depends on, nor what it uses up.

    Args:
        seed: Of the random numbers.
        arch: Name of the network; None where code of the user's builds it.
    """
    with ExitStack() as stack:
        stack.enter_context(FLOAT32)
        if arch is not None and not is_function(arch):
            stack.enter_context(_Thread(seed))
        else:  # which may well seed, or draw from, the process's generator itself
            stack.enter_context(LOCK)
            stack.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(seed)
        yield


@contextmanager
def _float32() -> Iterator[None]:
    before = torch.get_default_dtype()  # the process's own; with some Trainers that of --trainer.precision
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


FLOAT32 = Shared(_float32)


class _Thread(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What a network that one thread builds is made of; others build theirs as ever.

    https://docs.pytorch.org/docs/stable/notes/extending.html#extending-all-torch-api-with-modes

    Args:
        seed: Of the random numbers, which are those of torch's own generator after ``torch.manual_seed``.
        empty: Whether parameters have a shape and no values. All on the meta device would not do: RegNet and many of
            timm's networks compute their widths with tensors.
    """

    def __init__(self, seed: int = SEED, empty: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)
        self._empty = empty

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Leave ``__torch_dispatch__`` as it is: wrapped, its first call imports torch._dynamo, which takes 1.9 s."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one of torch's operations."""
        kwargs = kwargs or {}
        if self._empty and func is torch.ops.aten.empty.memory_format and 0 not in args[0]:  # as a new storage is
            return func(*args, **kwargs | {"device": "meta"})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]  # nothing to fill
        return func.overloadpacket(*args, **kwargs | {"generator": self._generator})  # the overload that takes one


def build(arch: str, weights: Weights, state: dict[str, Tensor] | None = None) -> nn.Module:
    """Build a network: with published weights, or as the weights' own builder makes it before they are loaded.

    Args:
        arch: Name of the network.
        weights: Its weights; those in a file are not loaded here.
        state: What the weights' file holds.

    Raises:
        UserError: The weights are neither in the cache nor can they be downloaded, or a function fails.
    """
    if is_function(arch):
        return _call(arch)
    if arch.startswith(TIMM):
        return _build_timm(arch, weights)
    if weights.entry is not None:
        fetch(weights.entry.url)
        network: nn.Module = models.get_model(arch, weights=weights.entry)
    else:
        network = models.get_model(arch, weights=None, **_options(arch, weights, state))
    return network


def _options(arch: str, weights: Weights, state: dict[str, Tensor] | None) -> dict[str, Any]:
    """Return what the weights' own builder passes to the network, which ``weights=None`` would leave out."""
    size = _image_size(state)
    if arch.startswith("vit_"):
        return {"image_size": size or _recipe(arch, weights, None).meta["min_size"][0]}
    if arch in TRANSFORM_INPUT:
        # GoogLeNet's builder drops its auxiliary heads behind loading, Inception's keeps its own.
        aux = arch == "inception_v3" and (state is None or any("AuxLogits." in name for name in state))
        return {"transform_input": True, "init_weights": False, "aux_logits": aux}
    return {}


def _recipe(arch: str, weights: Weights, size: int | None) -> Any:
    entries = models.get_model_weights(arch)
    first = entries.__members__.get("IMAGENET1K_V1", entries.DEFAULT)
    of_size = [entry for entry in (first, *entries) if entry.transforms().crop_size == [size]]
    return weights.entry or (of_size[0] if of_size else first)


def _image_size(state: dict[str, Tensor] | None) -> int | None:
    """Return the side of the images, in pixels, that a ViT's weights were trained for."""
    patches = [value for name, value in (state or {}).items() if name.endswith("encoder.pos_embedding")]
    convs = [value for name, value in (state or {}).items() if name.endswith("conv_proj.weight")]
    if not patches or not convs or patches[0].ndim != 3:
        return None
    return math.isqrt(patches[0].shape[1] - 1) * convs[0].shape[-1]  # (1, 1 + patches, D), (D, 3, side, side)


def packages(network: nn.Module, owner: type, arch: str) -> dict[str, str]:
    """Return the versions of the installed packages that a network's code comes from, by name.

    torch and torchvision, which every network needs, are left out, and so is code that no package installed.

    Args:
        network: The network.
        owner: The FeatureExtractor's class.
        arch: The network's name, where it was built by one.
    """
    code = {type(module).__module__.split(".")[0] for module in network.modules()}
    code |= {owner.__module__.split(".")[0], *([arch.split(".")[0]] if is_function(arch) else [])}
    if not (code := code - {"torch", "torchvision", "featx", "__main__"}):
        return {}
    installed = packages_distributions()
    return {name: version(name) for name in sorted({name for top in code for name in installed.get(top, ())})}


def _import(arch: str) -> Callable[[], Any]:
    path, *names = arch.split(".")
    found: Any = None
    try:
        found = import_module(path)
        for name in names:
            path = f"{path}.{name}"
            # An attribute goes before a module: antialiased_cnns.alexnet is both, and the function is meant.
            if not hasattr(found, name) and hasattr(found, "__path__"):
                import_module(path)
            if not hasattr(found, name):
                raise ModuleNotFoundError(name=path)
            found = getattr(found, name)
    except (Exception, SystemExit) as err:
        if isinstance(err, ModuleNotFoundError) and err.name == path:
            said = f"there is no {path}, neither in this folder nor installed.{did_you_mean(names[-1], dir(found))}"
        else:
            said = f"importing {path} failed: {type(err).__name__}: {first_line(err)}"
        raise BadValueError(
            f"--model.arch {arch}: {said}\nExpected package.module.name of a function that returns an nn.Module."
        ) from err
    if not callable(found):
        raise BadValueError(
            f"--model.arch {arch}: this is a {type(found).__name__}. Expected a function that returns an nn.Module."
        )
    return found  # type: ignore[no-any-return]


def _call(arch: str) -> nn.Module:
    function = _import(arch)
    try:
        network = function()
    except Exception as err:
        raise BadValueError(
            f"--model.arch {arch}: calling {arch}() failed: {type(err).__name__}: {first_line(err)}\n"
            "Expected a function that returns an nn.Module without arguments. One that needs some is called in "
            "build_network()\nof a subclass of featx.FeatureExtractor, which --model names."
        ) from err
    if not isinstance(network, nn.Module):
        raise BadValueError(
            f"--model.arch {arch}: {arch}() returned a {type(network).__name__}. Expected an nn.Module."
        )
    return network


def _timm() -> Any:
    try:
        return import_module("timm")
    except ImportError as err:
        raise UserError(
            f"--model.arch timm/NAME: timm cannot be imported ({first_line(err)}).\n"
            "Install it: pip install 'featx[timm]'"
        ) from err


def _timm_name(arch: str) -> str:
    timm = _timm()
    name = arch.removeprefix(TIMM)
    known = [*timm.list_models(), *timm.list_pretrained()]
    if name not in known:
        near = did_you_mean(arch, [TIMM + name for name in known])
        raise BadValueError(
            f"--model.arch {arch}: timm has no network of this name.{near}\n"
            "python -c \"import timm; print(*timm.list_models(), sep='\\n')\" lists them."
        )
    return name


def _timm_cfg(arch: str) -> Any:
    return _timm().get_pretrained_cfg(_timm_name(arch))


def _build_timm(arch: str, weights: Weights) -> nn.Module:
    timm, name = _timm(), _timm_name(arch)
    if weights.entry is None:
        made: nn.Module = timm.create_model(name)
        return made
    hub = import_module("huggingface_hub")
    cfg = weights.entry
    try:
        overlay = {}
        filename = cfg.hf_hub_filename or "model.safetensors"
        cached = hub.try_to_load_from_cache(cfg.hf_hub_id, filename) if cfg.hf_hub_id and not cfg.custom_load else None
        if isinstance(cached, str):
            overlay = {"file": cached}  # without asking the server, which the hub does for 20 s where none answers
        else:
            knock(hub.constants.ENDPOINT if cfg.hf_hub_id else cfg.url)
        made = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as err:
        raise UserError(
            f"weights of {weights.name} cannot be downloaded by timm\n({type(err).__name__}: {first_line(err)[:200]}). "
            "Give weights that are on this machine:\n--model.weights FILE (--model.weights random for a trial)"
        ) from err
    return made
