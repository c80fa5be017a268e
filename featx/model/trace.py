"""Trace one whole pass: how often, in which order and with which shapes each module is called."""

import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featx.errors import BadValueError, count, either

Pool = Literal["none", "avg", "max", "cls"]
Shape = tuple[int, ...]

PENULTIMATE, EMBEDDING = "penultimate", "embedding"  # layers that only a pass can find
SEE_LAYERS = "featx layers lists the layers of a network."

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
          nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)  # fmt: skip
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
          nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
          nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)  # fmt: skip
_CHANNELS_FIRST = (*_CONVS, *_NORMS, *_POOLS)  # their inputs and outputs are (B, C, ...) in any network
_MOST_LEVELS = 8  # of containers in an output, which could contain itself


@dataclass
class Call:
    """The calls of a module in a pass, with the shapes of the last call."""

    module: nn.Module
    received: Shape | None  # of the first tensor in the input
    returned: Shape | str  # the name of its type, if it is not a tensor
    members: list[dict[str, Shape]]  # of each call, as ``named_tensors`` names them

    @property
    def times(self) -> int:
        """How often the pass calls the module."""
        return len(self.members)


class Trace:
    """All modules that a whole pass calls, and which of them return one row per image.

    Args:
        network: The network.
        images: Its input, ``(B, 3, H, W)``; at least two images, since a first dimension of 1 proves nothing.

    Attributes:
        calls: Each module's calls by its path, in the order in which its last call ended.
        output: What the network returns.
        outputs: The tensors in it.
        vectors: The values ``(B, D)`` that each Linear and each Identity returned, before any change in place.
        norm: The path and the values of the LayerNorm that was called last, or None.
        pre_logits: Computes the input of the classifier, if the network has timm's ``forward_head``; else None.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self.images = len(images)
        self.network = network
        self.calls: dict[str, Call] = {}
        self.vectors: dict[str, Tensor] = {}
        self.norm: tuple[str, Tensor] | None = None
        self.pre_logits: Callable[[], Any] | None = None
        unwatch = watch_head(network, partial(setattr, self, "pre_logits"))
        try:
            with watched(network, self._note):
                self.output = network(images)
        finally:
            unwatch()
        self.outputs = list(named_tensors(self.output).values())

    def _note(self, path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        members = self.calls.pop(path).members if path in self.calls else []
        members.append({name: tuple(tensor.shape) for name, tensor in named_tensors(output).items()})
        received = next((tuple(value.shape) for value in inputs if isinstance(value, Tensor)), None)
        returned = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        self.calls[path] = Call(module, received, returned, members)
        if isinstance(module, nn.Linear | nn.Identity) and isinstance(output, Tensor) and output.ndim == 2:
            self.vectors[path] = output.clone()
        if isinstance(module, nn.LayerNorm) and isinstance(output, Tensor):
            self.norm = path, output

    def path_of(self, module: nn.Module) -> str | None:
        """Return the first path of a module that was called, or None."""
        return next((path for path, call in self.calls.items() if call.module is module), None)

    def shape(self, path: str, pool: Pool, number: int | None = None, member: str = "") -> Shape:
        """Return the shape of a module's output, ``(B, ...)``.

        Args:
            path: The module.
            pool: How to reduce the output.
            number: Which of its calls, from 1; None if it must be the only one.
            member: Of the output, as ``named_tensors`` names it.

        Raises:
            BadValueError: There is no such output, or it does not have one row per image.
        """
        if path not in self.calls:
            raise BadValueError(f"the network never calls {path}. Choose another module.")
        call = self.calls[path]
        if call.times > 1 if number is None else not 1 <= number <= call.times:
            every = f"{path}:1{member} to {path}:{call.times}{member}, or {path}:all{member} for all of them"
            times, expected = (f"{call.times} times", every) if call.times > 1 else ("once", f"{path}{member}")
            raise BadValueError(f"{path} is called {times}: expected {expected}.")
        name = f"{path}:{number}" if number else path
        shapes = call.members[(number or 1) - 1]
        if member not in shapes:
            kind = "tensor" if "" in shapes else call.returned
            rows = [f"{name}{other}" for other, shape in shapes.items() if shape[:1] == (self.images,)]
            expected = either(rows) if rows else "a module that returns one tensor"
            raise BadValueError(f"{name} returns a {kind}. Expected {expected}.")
        check_rows(f"{name}{member}", shape := shapes[member], self.images)
        check_pool(f"{name}{member}", shape, self.channel_axis(path, number, member), pool)
        return shape

    def channel_axis(self, path: str, number: int | None = None, member: str = "") -> int | None:
        """Return which dimension of a module's output contains the channels, 1 or -1, or None if it is unclear.

        (B, C, H, W) and (B, N, D) are usual, but Swin and ConvNeXt use (B, H, W, C) inside, and Conv1d (B, C, L). The
        type of some modules decides: a Linear has the channels last, a Conv2d first. Others, such as blocks and
        activations, follow the modules that receive or return the same shape.
        """
        shape = self.calls[path].members[(number or 0) - 1][member]
        if own := _own_axis(self.calls[path].module, shape):
            return own
        usual, other = (-1, 1) if len(shape) == 3 else (1, -1)
        if shape in self._shapes[usual]:
            return None if shape in self._shapes[other] else usual
        if shape in self._shapes[other]:
            return other
        return None if any(len(each) > 2 for each in self._shapes[other]) else usual

    @cached_property
    def _shapes(self) -> dict[int, set[Shape]]:
        """The input and output shapes of modules whose type decides the channel axis, by that axis."""
        shapes: dict[int, set[Shape]] = {1: set(), -1: set()}
        for call in self.calls.values():
            for shape in (call.received, call.returned):
                if isinstance(shape, tuple) and shape[:1] == (self.images,) and (axis := _own_axis(call.module, shape)):
                    shapes[axis].add(shape)
        return shapes

    def head(self) -> str:
        """Return the path of the one Linear that gives the network's output; raise BadValueError if there is none."""
        linears = {path: values for path, values in self.vectors.items()
                   if isinstance(self.calls[path].module, nn.Linear)}  # fmt: skip
        fitting, heads = dict[str, None](), dict[str, None]()
        for output in self.outputs:
            of_shape = [path for path, values in linears.items() if values.shape == output.shape]
            heads |= dict.fromkeys(giving := [path for path in of_shape if same(linears[path], output)])
            fitting |= dict.fromkeys(giving if len(giving) == 1 else of_shape)
        if len(fitting) > 1:
            raise BadValueError(f"{len(fitting)} Linears have the shape of the network's output: {', '.join(fitting)}")
        if not heads:
            raise BadValueError("the network's output is not that of a Linear")
        call = self.calls[path := next(iter(heads))]
        if call.times > 1:
            raise BadValueError(f"the network calls the Linear {path} {call.times} times per pass")
        if (call.received or ())[:1] != (self.images,):
            raise BadValueError(f"the Linear {path} receives the shape {call.received} for {self.images} images")
        return path

    def name(self, path: str, number: int, member: str = "") -> str:
        """Return the name of a module's output as a layer; with the number of its call if there are several."""
        return f"{path}:{number}{member}" if self.calls[path].times > 1 else f"{path}{member}"

    def layers(self, pool: Pool) -> dict[str, tuple[str, int | None]]:
        """Return all outputs that have one row per image by their names, each with its module and its channel axis."""
        found = {}
        for path, call in self.calls.items():
            for number, members in enumerate(call.members, 1):
                for member in members:
                    with suppress(BadValueError):
                        self.shape(path, pool, number, member)
                        found[self.name(path, number, member)] = path, self.channel_axis(path, number, member)
        return found


def check_rows(what: str, shape: Shape, images: int) -> None:
    """Raise BadValueError if an output does not have one entry per image in its first dimension."""
    if shape[:1] != (images,):
        raise BadValueError(
            f"{what} returns the shape {shape} for {count(images, 'image')}. "
            "Expected one entry per image in the first dimension."
        )


def check_pool(what: str, shape: Shape, axis: int | None, pool: Pool) -> None:
    """Raise BadValueError if an output of the shape ``(B, ...)`` cannot be pooled."""
    if pool == "cls" and (len(shape) != 3 or axis != -1):
        raise BadValueError(
            f"--model.pool cls takes the first of N tokens (N, D), but {what} returns {shape[1:]} per image.\n"
            "Expected a layer of tokens, or --model.pool avg, max or none."
        )
    if pool in ("avg", "max") and len(shape) > 2 and axis is None:
        raise BadValueError(
            f"{what} returns {shape[1:]} per image, and it is unclear which dimension contains the channels for "
            f"--model.pool {pool}.\nUse the layer before or after it, or --model.pool none."
        )


@contextmanager
def watched(network: nn.Module, see: Callable[[str, nn.Module, tuple[Any, ...], Any], None]) -> Iterator[None]:
    """Within this context, call ``see(path, module, inputs, output)`` after each call of each module."""

    def hook(path: str) -> Any:
        return lambda module, args, kwargs, output: see(path, module, (*args, *kwargs.values()), output)

    handles = [module.register_forward_hook(hook(path), with_kwargs=True)
               for path, module in network.named_modules() if path]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_difference(network: nn.Module, run: Callable[[Callable[[Tensor], Any]], Any]) -> str:
    """Return which module is the first whose output differs between two passes, as a sentence, or nothing.

    Args:
        network: The network.
        run: Calls a function in place of the network, with the network's input.
    """

    def digests(images: Tensor) -> list[tuple[str, list[int]]]:
        found = []

        def see(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
            found.append((path, [_checksum(tensor) for tensor in named_tensors(output).values()]))

        with watched(network, see):
            network(images)
        return found

    pairs = zip(run(digests), run(digests), strict=False)
    return next((f"The first output that differs is that of {one[0]}." for one, other in pairs if one != other), "")


def watch_head(network: nn.Module, see: Callable[[Callable[[], Any]], Any]) -> Callable[[], None]:
    """Call ``see(pre_logits)`` before each call of ``network.forward_head`` as timm's networks have it.

    ``pre_logits()`` computes what the classifier gets in that call. Return what ends the watch.

    https://huggingface.co/docs/timm/feature_extraction
    """
    head: Any = getattr(network, "forward_head", None)
    if not callable(head) or "pre_logits" not in inspect.signature(head).parameters:
        return lambda: None
    own = vars(network).get("forward_head")

    def watched_head(*args: Any, **kwargs: Any) -> Any:
        see(lambda: head(*args, **kwargs | {"pre_logits": True}))
        return head(*args, **kwargs)

    vars(network)["forward_head"] = watched_head
    return lambda: vars(network).update(forward_head=own) if own else vars(network).pop("forward_head")


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same shape and values; NaN counts as one."""
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=0, atol=0, equal_nan=True)


def named_tensors(value: Any) -> dict[str, Tensor]:
    """Return the tensors in a module's output by their names.

    A tensor's own is "". In a tuple or list they are numbers, in a dict keys, in a dataclass attributes.

    Example:
        >>> named_tensors((torch.zeros(2), {"hidden": torch.ones(2)})).keys()
        dict_keys(['#0', '#1#hidden'])
    """
    found: dict[str, Tensor] = {}
    _add_tensors("", value, found, _MOST_LEVELS)
    return found


def _add_tensors(name: str, value: Any, found: dict[str, Tensor], levels: int) -> None:
    if isinstance(value, Tensor):
        found[name] = value
    elif levels:
        for key, member in _members(value):
            _add_tensors(f"{name}#{key}", member, found, levels - 1)


def _members(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):  # transformers' ModelOutput, too
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name, None)) for field in fields(value)]
    return []


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _own_axis(module: nn.Module, shape: Shape) -> int | None:
    if isinstance(module, _CHANNELS_FIRST):
        return 1
    if isinstance(module, nn.Linear | nn.RNNBase) or type(module) is nn.LayerNorm:
        return -1
    if isinstance(module, nn.LayerNorm) and len(shape) > 1:  # torchvision's and timm's LayerNorm2d permute
        fits = [axis for axis in (1, -1) if tuple(module.normalized_shape) == (shape[axis],)]
        return fits[0] if len(fits) == 1 else None
    return None
