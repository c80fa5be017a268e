"""One whole pass -> what is to be known of each module: called how often, in which order, with which shapes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from featx.errors import BadValueError

Pool = Literal["none", "avg", "max", "cls"]
Shape = tuple[int, ...]

PENULTIMATE = "penultimate"
SEE_LAYERS = "featx layers lists those that can be taken."

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
          nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)  # fmt: skip
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
          nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
          nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)  # fmt: skip
# Modules that take and give (B, C, ...), whatever the network around them does.
_CHANNELS_FIRST = (*_CONVS, *_NORMS, *_POOLS)


@dataclass
class Call:
    """What the pass showed of a module.

    Args:
        module: The module.
        times: How often it was called.
        received: Shape of the first tensor that it was given the last time, or None.
        returned: Shape of the tensor that it returned the last time, or the name of the type of something else.
    """

    module: nn.Module
    times: int
    received: Shape | None
    returned: Shape | str


class Trace:
    """Every module that a whole pass calls, and which of them give a row an image.

    Args:
        network: The network.
        images: What it takes, ``(B, 3, H, W)``; of one image, a first dimension of 1 would prove nothing, so two.

    Attributes:
        calls: The modules by path, in the order in which their last calls ended.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self.images = len(images)
        self.calls: dict[str, Call] = {}
        with watched(network, self._note):
            network(images)

    def _note(self, path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        times = self.calls.pop(path).times + 1 if path in self.calls else 1
        received = next((tuple(value.shape) for value in inputs if isinstance(value, Tensor)), None)
        returned = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        self.calls[path] = Call(module, times, received, returned)

    def path_of(self, module: nn.Module) -> str | None:
        """Return the path under which a module was called, the first of those that it has, or None."""
        return next((path for path, call in self.calls.items() if call.module is module), None)

    def shape(self, path: str, pool: Pool) -> Shape:
        """Return the shape of a module's output, ``(B, ...)``.

        Raises:
            BadValueError: There is no row for each image in it, in words that say why.
        """
        if path not in self.calls:
            raise BadValueError(f"the network never calls {path}. Take another of its modules.")
        call = self.calls[path]
        if call.times > 1:
            raise BadValueError(
                f"the network calls {path} more than once in a pass, {call.times} times. "
                "Expected a module that it calls once."
            )
        if isinstance(call.returned, str):
            raise BadValueError(f"{path} returns a {call.returned}. Expected a module that returns one tensor.")
        if call.returned[:1] != (self.images,):
            raise BadValueError(
                f"{path} returns the shape {call.returned} for {self.images} images. "
                "Expected a first dimension of one entry an image."
            )
        check_pool(path, call.returned, self.channel_axis(path), pool)
        return call.returned

    def channel_axis(self, path: str) -> int | None:
        """Return which dimension of a module's output holds the channels, 1 or -1, or None if that cannot be told.

        (B, C, H, W) and (B, N, D) are the rule; but Swin and ConvNeXt go through (B, H, W, C), and Conv1d gives
        (B, C, L). Some modules say by their type which it is: a Linear has the channels last, a Conv2d first. For
        the others, blocks and activations, it counts which kind of those receives or returns the same shape.
        """
        shape = self.calls[path].returned
        assert not isinstance(shape, str)
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
        """All shapes that go in or out of modules of which the type says where the channels are, by where."""
        shapes: dict[int, set[Shape]] = {1: set(), -1: set()}
        for call in self.calls.values():
            for shape in (call.received, call.returned):
                if isinstance(shape, tuple) and shape[:1] == (self.images,) and (axis := _own_axis(call.module, shape)):
                    shapes[axis].add(shape)
        return shapes

    def penultimate(self) -> str:
        """Return the path of the Linear that was called last, whose input is the penultimate layer.

        Raises:
            BadValueError: There is none, or it was given something else than a vector an image.
        """
        path = self._last(nn.Linear)
        if path is None:
            reason = "the network calls no Linear"
            path = self._last(*_CONVS)
        elif (times := self.calls[path].times) > 1:
            reason = f"the network calls its last Linear, {path}, {times} times in a pass"
        elif (received := self.calls[path].received) is None or len(received) != 2 or received[0] != self.images:
            reason = f"the network's last Linear, {path}, receives {received} for {self.images} images, and not (B, D)"
        else:
            return path
        take = self._pooled_before(path) if path else None
        way_out = f"Take what comes before it, as --model.layer {take} --model.pool avg" if take else "Take another"
        raise BadValueError(f"{reason}.\n{way_out}.")

    def _last(self, *kinds: type[nn.Module]) -> str | None:
        return next((path for path, call in reversed(self.calls.items()) if isinstance(call.module, kinds)), None)

    def _pooled_before(self, path: str) -> str | None:
        for before in reversed(list(self.calls)[: list(self.calls).index(path)]):
            if not isinstance(self.calls[before].module, (nn.Dropout, nn.Identity)) and self.gives_rows(before, "avg"):
                return before
        return None

    def gives_rows(self, path: str, pool: Pool) -> bool:
        """Return whether a module's output has a row for each image."""
        try:
            self.shape(path, pool)
        except BadValueError:
            return False
        return True


def check_pool(what: str, shape: Shape, axis: int | None, pool: Pool) -> None:
    """Raise BadValueError if an output of the shape ``(B, ...)`` cannot be pooled."""
    if pool == "cls" and (len(shape) != 3 or axis != -1):
        raise BadValueError(
            f"--model.pool cls takes the first of N tokens (N, D), and {what} gives {shape[1:]} for an image.\n"
            "Expected a layer of tokens, or --model.pool avg, max or none."
        )
    if pool in ("avg", "max") and len(shape) > 2 and axis is None:
        raise BadValueError(
            f"which dimension of {shape[1:]}, which {what} returns for an image, holds the channels cannot be told, so "
            f"that --model.pool {pool} would be a guess.\nTake a neighbour of it, or --model.pool none."
        )


@contextmanager
def watched(network: nn.Module, see: Callable[[str, nn.Module, tuple[Any, ...], Any], None]) -> Iterator[None]:
    """Call ``see(path, module, inputs, output)`` at the end of each call of each module, while this lasts."""

    def hook(path: str) -> Any:
        return lambda module, args, kwargs, output: see(path, module, (*args, *kwargs.values()), output)

    handles = [module.register_forward_hook(hook(path), with_kwargs=True)
               for path, module in network.named_modules() if path]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own_axis(module: nn.Module, shape: Shape) -> int | None:
    if isinstance(module, _CHANNELS_FIRST):
        return 1
    if isinstance(module, nn.Linear) or type(module) is nn.LayerNorm:
        return -1
    if isinstance(module, nn.LayerNorm) and len(shape) > 1:  # torchvision's and timm's LayerNorm2d permute
        fits = [axis for axis in (1, -1) if tuple(module.normalized_shape) == (shape[axis],)]
        return fits[0] if len(fits) == 1 else None
    return None
