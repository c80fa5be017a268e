"""Find out which of a network's tensors a pass reads until its layers are computed, and which attributes it sets."""

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from featx.model.layers import Taps
from featx.model.trace import Pool
from featx.process.lightning import DispatchMode
from featx.process.shared import Shared

_thread = threading.local()


class _Reads(DispatchMode):  # type: ignore[no-untyped-call]
    """Notes each tensor that torch's operations receive; a module's call alone does not show which it reads.

    nn.MultiheadAttention, for example, reads the weight of its out_proj without calling it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one of torch's operations."""
        self.seen |= {id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        return func(*args, **(kwargs or {}))


def tensors_read(network: nn.Module, layers: Mapping[str, str], pool: Pool, images: Tensor) -> set[str] | None:
    """Return the names of the tensors in a state dict that a pass reads until its layers are computed.

    Names that are neither parameters nor buffers are among them. The network itself is not run, but a copy.

    Args:
        network: The network.
        layers: Each layer with the path of its module.
        pool: How to reduce the layers.
        images: The network's input, ``(2, 3, H, W)``.

    Returns:
        The names, or None if the network or a layer fails, which the first pass of a run reports.
    """
    try:
        network = copy.deepcopy(network).eval()
        taps, reads = Taps(network, layers, pool), _Reads()
        with torch.inference_mode():
            taps.find(images)
            with reads:
                taps.take(images)
    except Exception:  # of any type
        return None
    tensors: dict[str, Tensor] = dict(network.named_buffers(remove_duplicate=False))
    tensors |= network.named_parameters(remove_duplicate=False)
    return {name for name in network.state_dict() if name not in tensors or id(tensors[name]) in reads.seen}


@contextmanager
def _watch_attributes() -> Iterator[None]:
    set_attribute: Any = nn.Module.__setattr__

    def watch(module: nn.Module, name: str, value: Any) -> None:
        if path := getattr(_thread, "paths", {}).get(module):
            _thread.found.setdefault(f"{path}.{name}")
        set_attribute(module, name, value)

    nn.Module.__setattr__ = watch  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.__setattr__ = set_attribute  # type: ignore[method-assign]


WATCH_ATTRIBUTES = Shared(_watch_attributes)


@contextmanager
def attributes_set(network: nn.Module) -> Iterator[dict[str, None]]:
    """Within this context, collect which attributes of its modules a network sets in this thread, as ``conv.stride``.

    Two threads must not run such a network at once: CORnet-S, for example, sets the stride of a convolution before each
    time step, https://github.com/dicarlolab/CORnet/blob/master/cornet/cornet_s.py.
    """
    _thread.paths = {module: path or "network" for path, module in network.named_modules()}
    _thread.found = found = dict[str, None]()
    try:
        with WATCH_ATTRIBUTES:
            yield found
    finally:
        _thread.paths = {}
