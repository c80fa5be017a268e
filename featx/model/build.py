"""Build a network by name: ``--model.arch`` says from which library."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import packages_distributions, version
from typing import Any

import torch
from torch import Tensor, nn

from featx.data.preprocess import Preprocessing
from featx.errors import BadValueError, MissingPathError, UserError, count, did_you_mean, first_few, first_line, log
from featx.model.checkpoint import same
from featx.model.libraries import torchvision
from featx.model.libraries.base import Library, State, UnknownPresetError, Weights
from featx.model.libraries.function import Function
from featx.model.libraries.hf import HuggingFace
from featx.model.libraries.open_clip import OpenClip
from featx.model.libraries.timm import Timm
from featx.process.lightning import DispatchMode
from featx.process.shared import LOCK, Shared

SEED = 0
LIBRARIES: dict[str, type[Library]] = {"timm": Timm, "hf": HuggingFace, "open_clip": OpenClip}  # by prefix of an arch


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


def named(arch: str, image_size: int | None = None) -> Library:
    """Return a network's description by its name; raise UserError if there is none with this name."""
    if library := LIBRARIES.get(arch.partition("/")[0] if "/" in arch else ""):
        return library(arch, image_size)
    return (Function if is_function(arch) else torchvision.Torchvision)(arch, image_size)


def is_function(arch: str) -> bool:
    """Return whether ``--model.arch`` names a function, ``package.module.name``."""
    return "." in arch and not ("/" in arch and arch.partition("/")[0] in LIBRARIES)


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
    if weights in ("auto", "DEFAULT") and published:
        raise BadValueError(
            f"--model.weights {weights}: {arch} has several published weights, and none of them is the usual one.\n"
            f"Expected one of {', '.join(published)}; a file; or random for a trial."
        )
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


def check_no_file(weights: str, **options: tuple[Any, Any]) -> None:
    """Raise BadValueError if an option of files is given, by its value and the usual one, without a file."""
    for name, (value, usual) in options.items():
        if value != usual:
            raise BadValueError(
                f"--model.{name} {str(value).lower()}: this option is for files of weights, and --model.weights "
                f"{weights} is not a file."
            )


def check_own_weights(weights: str, title: str) -> None:
    """Raise BadValueError if ``--model.weights`` is a name, of a network that the user's code builds."""
    if weights != "auto":
        raise BadValueError(
            f"--model.weights {weights}: {title} builds its own network, which has no weights with this "
            "name.\nExpected a file, or auto for the weights that build_network() returns."
        )


def choose_preset(
    library: Library, weights: Weights, state: State | None, network: nn.Module, knows_channels: bool
) -> Preprocessing:
    """Return the preprocessing of weights; raise UnknownPresetError if nothing says what it is.

    The user does if an image size is given and, as ``knows_channels`` says, their mean and std.
    """
    try:
        return library.preset(weights, state, network)
    except UnknownPresetError:
        if library.image_size is None or not knows_channels:
            raise
        return replace(Preprocessing.usual(), source="nothing with the network says more").at(library.image_size)


def build(library: Library, weights: Weights, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Build a network; raise BadValueError if it cannot have the image size asked for."""
    try:
        return library.build(weights, state)
    except UserError:
        raise
    except Exception as err:
        if library.image_size is None:
            raise
        raise _wrong_size(library.image_size, library.arch, err) from err


def check_image_size(network: nn.Module, size: int, title: str, dtype: torch.dtype) -> None:
    """Raise BadValueError if a network cannot take images of ``size`` pixels."""
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, 3, size, size, dtype=dtype))
    except Exception as err:  # of any type, from a network
        raise _wrong_size(size, title, err) from err


def _wrong_size(size: int, title: str, err: Exception) -> BadValueError:
    return BadValueError(
        f"--model.image_size {size}: {title} cannot take images of this size ({type(err).__name__}: "
        f"{first_line(err)[:200]}).\nExpected another number, often a multiple of the patch size, or null for the size "
        "that it was trained at."
    )


def build_empty(arch: str, image_size: int | None = None) -> nn.Module:
    """Build a network to look at its modules and shapes; only a function's network has values."""
    library = named(arch, image_size)
    if is_function(arch):
        return build(library, Weights("none"))
    try:
        with _BuildMode(empty=True):
            return library.build(Weights("none"))
    except RuntimeError:  # timm's hybrids find a shape by running an image through their stem, which needs values
        pass
    except Exception as err:
        if isinstance(err, UserError) or image_size is None:
            raise
        raise _wrong_size(image_size, arch, err) from err
    with _BuildMode():
        return build(library, Weights("none"))


def guess_arch(shapes: Mapping[str, torch.Size]) -> str | None:
    """Return the torchvision arch that best fits these tensors by name and shape, if more than half of them fit."""
    return torchvision.guess_arch(shapes, build_empty)


def checked(network: Any, title: str) -> nn.Module:
    """Return what ``build_network`` of a class returned; raise BadValueError if it is not a network."""
    if isinstance(network, nn.Module):
        return network
    kind = type(network).__name__ if network is not None else None
    raise BadValueError(f"--model {title}: build_network() returned {kind}. Expected an nn.Module.")


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


def random_tensors(network: nn.Module, again: nn.Module) -> list[str]:
    """Report the random tensors of a network: those that differ when it is built ``again`` with another seed."""
    others = again.state_dict()
    names = [name for name, value in network.state_dict().items() if not same(value, others[name])]
    if not names:
        return []
    note = f"{len(names)} of {count(len(others), 'tensor')} are random numbers (seed {SEED}): {first_few(names)}"
    log.warning("RANDOM WEIGHTS: %s. --model.weights FILE loads trained ones", note)
    return [note]


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
