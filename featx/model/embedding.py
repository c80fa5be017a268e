"""Find the layers that a network does not name: penultimate, and the embedding, its makers' vector of an image."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import SqueezeNet

from featx.errors import BadValueError
from featx.model.libraries.base import Tower
from featx.model.trace import Pool, Shape, Trace, same

HEADS = {"head", "heads", "fc", "classifier"}  # replaced by an Identity, they make a network return its features
CLOSE = 1e-5


class Source(NamedTuple):
    """Where a layer's values are in a pass.

    Attributes:
        name: In records and messages.
        path: Of a module; "" is the whole network.
        of: Whether they are the module's output, its input, or in timm's ``forward_head`` what the classifier gets.
        shape: ``(B, ...)``.
        pool: How to reduce them.
        axis: Which dimension contains the channels, 1 or -1; None if it is unclear or there is nothing to reduce.
        call: Which of the module's calls, from 1.
        times: How often a pass calls the module.
        member: Of the module's output, as ``named_tensors`` names it.
    """

    name: str
    path: str
    of: Literal["output", "input", "pre_logits"]
    shape: Shape
    pool: Pool = "none"
    axis: int | None = None
    call: int = 1
    times: int = 1
    member: str = ""


def find_penultimate(trace: Trace) -> Source:
    """Return the input of the Linear that gives the network's output; raise BadValueError if that is not one Linear."""
    try:
        path = trace.head()
    except BadValueError as err:
        instead = "--model.layer embedding" if next(_embeddings(trace), None) else "the path of a layer"
        raise BadValueError(f"{err}.\nUse {instead}.") from err
    return Source(f"input of {path}", path, "input", trace.calls[path].received or ())


def find_embedding(trace: Trace) -> Source:
    """Return the vector that the network's makers call an image's features; raise BadValueError if it is unknown."""
    return next(_embeddings(trace), None) or find_penultimate(trace)


def _embeddings(trace: Trace) -> Iterator[Source]:
    """Yield the known embeddings that are not the input of a Linear, the best first."""
    if isinstance(trace.network, Tower) and isinstance(trace.output, Tensor):
        yield Source(trace.network.vector, "", "output", tuple(trace.output.shape))
    if isinstance(values := trace.pre_logits() if trace.pre_logits else None, Tensor):  # timm's with num_classes=0
        yield Source("forward_head with pre_logits=True", "", "pre_logits", tuple(values.shape))
    if isinstance(trace.network, SqueezeNet):
        yield Source("avg of features", "features", "output", trace.shape("features", "avg")[:2], "avg", 1)
    giving = [path for path, values in trace.vectors.items() if any(same(values, output) for output in trace.outputs)]
    identities = all(isinstance(trace.calls[path].module, nn.Identity) for path in giving)
    if giving and identities and _is_removed_head(giving[-1], trace.network):
        yield Source(giving[-1], giving[-1], "output", tuple(trace.vectors[giving[-1]].shape))
    if trace.norm:
        yield from _after_norm(*trace.norm, trace)


def _is_removed_head(path: str, network: nn.Module) -> bool:
    """Return whether a path is that of a head, or is in a head without convolutions, which could give class scores."""
    parts = path.split(".")
    heads = [network.get_submodule(".".join(parts[: i + 1])) for i, part in enumerate(parts) if part in HEADS]
    return bool(heads) and not any(isinstance(module, nn.Conv2d) for head in heads for module in head.modules())


def _after_norm(path: str, values: Tensor, trace: Trace) -> Iterator[Source]:
    """Yield the embedding of a transformer without a head, which ends with this norm and its own pooling."""
    vector = (len(values), values.shape[-1])
    if any(same(values, output) for output in trace.outputs):
        if values.ndim == 2:
            yield Source(path, path, "output", vector)
        elif values.ndim == 3 and any("cls_token" in name for name, _ in trace.network.named_parameters()):
            yield Source(f"cls of {path}", path, "output", vector, "cls", -1)
    elif values.ndim == 3 and isinstance(trace.output, Tensor) and trace.output.shape == vector:
        pooled = values[:, 0], values.mean(1), values[:, 1:].mean(1)
        if any(torch.allclose(each, trace.output, CLOSE, CLOSE, equal_nan=True) for each in pooled):
            yield Source("output", "", "output", vector)
