"""A name -> nn.Module: a network of torchvision or timm, or what any importable function returns."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
TRANSFORM_INPUT = ("googlenet", "inception_v3")  # their weights want images of another mean, which they make themselves

State = Mapping[str, Tensor]


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


class _Torchvision:
    """``alexnet``: a classification network of torchvision."""

    def __init__(self, arch: str) -> None:
        if arch not in (known := models.list_models(module=models)):
            raise BadValueError(
                f"--model.arch {arch}: torchvision has no classification network of this name."
                f"{did_you_mean(arch, known)}\n"
                "https://docs.pytorch.org/vision/stable/models.html lists them. Others are timm/NAME and a function "
                "that returns one,\npackage.module.name."
            )
        self._arch = arch
        self._entries = models.get_model_weights(arch)

    def published(self) -> dict[str, Weights]:
        best = self._entries.DEFAULT
        named = {"auto": best, "DEFAULT": best, **self._entries.__members__}
        return {name: Weights(str(entry), entry=entry) for name, entry in named.items()}

    def preset(self, weights: Weights, state: State | None = None) -> Preprocessing:
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
            options["image_size"] = _image_size(state) or self._recipe(weights, None).meta["min_size"][0]
        elif self._arch in TRANSFORM_INPUT:
            # GoogLeNet's builder drops its auxiliary heads behind loading, Inception's keeps its own.
            aux = self._arch == "inception_v3" and (state is None or any("AuxLogits." in name for name in state))
            options |= {"transform_input": True, "init_weights": False, "aux_logits": aux}
        network: nn.Module = models.get_model(self._arch, **options)
        return network

    def _recipe(self, weights: Weights, size: int | None) -> Any:
        first = self._entries.__members__.get("IMAGENET1K_V1", self._entries.DEFAULT)
        of_size = (entry for entry in (first, *self._entries) if entry.transforms().crop_size == [size])
        return weights.entry or next(of_size, first)


def _image_size(state: State | None) -> int | None:
    """Return the side of the images, in pixels, that a ViT's weights were trained for."""
    patches = [value for name, value in (state or {}).items() if name.endswith("encoder.pos_embedding")]
    convs = [value for name, value in (state or {}).items() if name.endswith("conv_proj.weight")]
    if not patches or not convs or patches[0].ndim != 3:
        return None
    return math.isqrt(patches[0].shape[1] - 1) * convs[0].shape[-1]  # (1, 1 + patches, D), (D, 3, side, side)


class _Timm:
    """``timm/NAME``: a network of timm, with or without the tag of its weights."""

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
                f"--model.arch {arch}: timm has no network of this name.{near}\n"
                "python -c \"import timm; print(*timm.list_models(), sep='\\n')\" lists them."
            )
        self._cfg = self._timm.get_pretrained_cfg(self._name)

    def published(self) -> dict[str, Weights]:
        found = Weights(f"timm/{self._cfg.architecture}.{self._cfg.tag}", entry=self._cfg)
        return {"auto": found, "DEFAULT": found} if self._cfg.has_weights else {}

    def preset(self, weights: Weights, state: State | None = None) -> Preprocessing:
        data = self._timm.data.resolve_data_config(pretrained_cfg=self._cfg.to_dict())
        return Preprocessing.of_timm(weights.name if weights.entry else self._arch, data)

    def build(self, weights: Weights, state: State | None = None) -> nn.Module:
        if weights.entry is None:
            made: nn.Module = self._timm.create_model(self._name)
            return made
        hub = import_module("huggingface_hub")
        cfg = weights.entry
        try:
            overlay, cached = {}, None
            if cfg.hf_hub_id and not cfg.custom_load:
                cached = hub.try_to_load_from_cache(cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors")
            if isinstance(cached, str):
                overlay = {"file": cached}  # without asking the server, which the hub does for 20 s where none answers
            else:
                knock(hub.constants.ENDPOINT if cfg.hf_hub_id else cfg.url)
            made = self._timm.create_model(self._name, pretrained=True, pretrained_cfg_overlay=overlay)
        except Exception as err:
            raise UserError(
                f"weights of {weights.name} cannot be downloaded by timm\n({type(err).__name__}: "
                f"{first_line(err)[:200]}). Give weights that are on this machine:\n--model.weights FILE "
                "(--model.weights random for a trial)"
            ) from err
        return made


class _Function:
    """``package.module.name``: a function that returns a network."""

    def __init__(self, arch: str) -> None:
        self._arch = arch

    def published(self) -> dict[str, Weights]:
        return {"auto": Weights(f"as {self._arch}() made them")}

    def preset(self, weights: Weights, state: State | None = None) -> Preprocessing:
        return Preprocessing.usual()

    def build(self, weights: Weights, state: State | None = None) -> nn.Module:
        arch = self._arch
        function = import_function(arch)
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


def import_function(arch: str) -> Callable[[], Any]:
    """Return the function that ``--model.arch`` names; raise UserError where it cannot be imported."""
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


Named = _Torchvision | _Timm | _Function
PREFIXED = {"timm": _Timm}


def _kind(arch: str) -> type[Named]:
    prefix, slash, _ = arch.partition("/")
    return PREFIXED.get(prefix if slash else "", _Function if "." in arch else _Torchvision)


def named(arch: str) -> Named:
    """Return the network of a name; raise UserError where there is none, of a function when it is built.

    It has ``published()``, the weights that there are for it, by their names in ``--model.weights``;
    ``preset(weights, state)``, their preprocessing, for a file or random ones that of its first recipe; and
    ``build(weights, state)``, which returns it with published weights, or as the weights' own builder makes it before
    a file's, ``state``, are loaded, and raises UserError where the weights are not to be had or a function fails.
    """
    return _kind(arch)(arch)


def is_function(arch: str) -> bool:
    """Return whether ``--model.arch`` names a function, ``package.module.name``."""
    return _kind(arch) is _Function


def choose_weights(arch: str, weights: str) -> Weights:
    """Read ``--model.weights`` for a named network: auto, DEFAULT, an entry's name, random, or a file.

    Raises:
        UserError: It is none of them.
    """
    if weights == "random":
        return Weights(f"random (seed {SEED})", random=True)
    published = named(arch).published()
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


def build_empty(arch: str) -> nn.Module:
    """Build a network without computing its values, to look at its modules and shapes; a function's is a real one."""
    network = named(arch)
    if is_function(arch):
        return network.build(Weights("none"))
    try:
        with _Thread(empty=True):
            return network.build(Weights("none"))
    except RuntimeError:  # hybrids of timm's run a picture through their stem to see its shape, which takes values
        with _Thread():
            return network.build(Weights("none"))


def whose(shapes: Mapping[str, torch.Size]) -> str | None:
    """Return the torchvision arch that more than half of these tensors fit, by name and shape; of several the best.

    Building all 80 would take seconds. The ten with the nearest numbers of parameters are built; the right one is
    among them even without its classifier, unless that is most of it, as VGG's.
    """
    size = sum(shape.numel() for name, shape in shapes.items() if not name.startswith("aux"))  # GoogLeNet's, uncounted
    sizes = {arch: models.get_model_weights(arch).DEFAULT.meta["num_params"] for arch in models.list_models(models)}
    shares = {}
    for arch in sorted(sizes, key=lambda arch: abs(math.log(sizes[arch] / max(1, size))))[:10]:
        own = {name: value.shape for name, value in build_empty(arch).state_dict().items() if value.ndim}
        same = sum(own.get(name) == shape for name, shape in shapes.items())
        shares[arch] = same / max(len(own), len(shapes))
    best = max(shares, key=lambda arch: shares[arch])
    return best if shares[best] > 0.5 else None


@contextmanager
def seeded(seed: int, arch: str | None) -> Iterator[None]:
    """Let a network that is built here have the same random numbers in every process and every run.

    The generator and the default dtype of the process are not what this depends on, nor what it uses up.

    Args:
        seed: Of the random numbers.
        arch: Name of the network; None where code of the user's builds it.
    """
    if arch is not None and not is_function(arch):
        with FLOAT32, _Thread(seed):
            yield
    else:  # which may well seed, or draw from, the process's generator itself
        with FLOAT32, LOCK, torch.random.fork_rng(devices=[]):
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
