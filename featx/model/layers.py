"""Resolve layers to modules, and copy their outputs as one row per image."""

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featx.errors import BadValueError, UserError, as_list, did_you_mean
from featx.model.embedding import Source, find_embedding, find_penultimate
from featx.model.trace import EMBEDDING, PENULTIMATE, SEE_LAYERS, Pool, Shape, Trace, check_pool, watch_head

DEFAULT = "auto"  # instead of a layer
FINDERS = {PENULTIMATE: find_penultimate, EMBEDDING: find_embedding}


def find_aliases(network: nn.Module) -> dict[str, str]:
    """Return ``fc6``, ``fc7`` and ``fc8`` with their module paths for networks built like AlexNet, else nothing.

    Such a network has exactly one Sequential called ``classifier`` with three Linears, one of them at its end. The
    names are those of the AlexNet paper's Caffe model, https://github.com/BVLC/caffe/tree/master/models/bvlc_alexnet.
    """
    found = []
    for path, module in network.named_modules():
        if path.split(".")[-1] == "classifier" and isinstance(module, nn.Sequential):
            names = [name for name, _ in module.named_children()]
            linears = [name for name, child in module.named_children() if isinstance(child, nn.Linear)]
            if len(linears) == 3 and linears[-1] == names[-1]:
                found.append([f"{path}.{name}" for name in linears])
    return dict(zip(("fc6", "fc7", "fc8"), found[0], strict=True)) if len(found) == 1 else {}


def default_layer(network: nn.Module, aliases: Mapping[str, str]) -> str:
    """Return the layer of a run that names none: ``fc7``, or ``embedding`` of a network without it."""
    return "fc7" if "fc7" in find_aliases(network) | dict(aliases) else EMBEDDING


def resolve_layers(
    network: nn.Module, layers: list[str], title: str, aliases: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the module path of each layer; for ``penultimate`` and ``embedding``, which a pass finds, their names.

    ``aliases`` win over those of ``find_aliases``; ``title`` is the network's name in messages.

    Raises:
        BadValueError: The network has no such layer, or one is named twice.
    """
    known = find_aliases(network) | dict(aliases or {})
    paths = [path for path, _ in network.named_modules(remove_duplicate=False) if path]
    found = {}
    for layer in layers:
        if layer in found:
            raise BadValueError(f"--model.layer: {layer} is named twice. Expected each layer once.")
        path = known.get(layer, layer)
        if path not in paths and path not in FINDERS:
            if as_list(layer):
                raise BadValueError(f"--model.layer {layer}: expected a layer, or a list in quotes, {as_list(layer)}.")
            alias = f", an alias of {path}" if path != layer else ""
            names = [*known, *FINDERS]
            last = f", such as {paths[-1]}" if paths else ""
            raise BadValueError(
                f"--model.layer {layer}{alias}: {title} has no such layer.{did_you_mean(path, [*names, *paths])}\n"
                f"Expected {', '.join(names)}, or the path of one of its modules{last}.\n{SEE_LAYERS}"
            )
        found[layer] = path
    return found


def to_rows(output: Tensor, pool: Pool, axis: int | None) -> Tensor:
    """Copy a module's output ``(B, ...)`` as rows, ``(B, D) float32``, pooled over all but the channel ``axis``."""
    values = output.detach()
    if values.ndim <= 2 or pool == "none":
        copied = values.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return copied.reshape(len(copied), -1)  # row-major: C, H, W
    if pool == "cls":
        return values[:, 0].to(torch.float32, copy=True)  # (B, N, D) -> (B, D)
    assert axis is not None
    places = [dim for dim in range(1, values.ndim) if dim != axis % values.ndim]
    return values.float().mean(places) if pool == "avg" else values.float().amax(places)


class _Reached(BaseException):
    """Ends a pass after the deepest layer; a BaseException, so that no network catches it."""


class Found(NamedTuple):
    """A layer's module, or where else it is found, and its shape per image before pooling."""

    module: str
    shape: Shape


class Taps:
    """Forward hooks that copy the outputs of some modules, in any number of threads.

    Each output is copied before a later module can change it in place, as AlexNet's ReLUs do:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.ReLU.html. The first pass runs the whole network and checks
    the layers; later ones end at the deepest layer.

    Args:
        network: The network.
        layers: Each layer with the path of its module, or ``penultimate`` or ``embedding``.
        pool: How to reduce outputs with more dimensions than (B, D). none: flatten them, row-major; avg or max: one
            value per channel, over all positions or tokens; cls: the first token.

    Example:
        >>> Taps(alexnet, {"fc7": "classifier.4"})(images)["fc7"].shape
        torch.Size([64, 4096])
    """

    def __init__(self, network: nn.Module, layers: Mapping[str, str], pool: Pool = "none") -> None:
        self.network = network
        self.layers = layers
        self.pool = pool
        self._found: dict[str, Found] = {}
        self._pass = threading.local()
        self._first = threading.Lock()

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Run one pass with the network's input ``(B, 3, H, W)`` and return each layer's rows, ``(B, D) float32``.

        Raises:
            UserError: A module was not called exactly once, did not return one tensor of B rows, or cannot be pooled.
        """
        self.find(images)
        return self.take(images)

    def find(self, images: Tensor) -> dict[str, Found]:
        """Return what the first pass finds about each layer; raise UserError as a call does."""
        with self._first:
            if not self._found:
                self._found = self._hook(torch.cat([images[:1], images[:1]]))
        return self._found

    def take(self, images: Tensor) -> dict[str, Tensor]:
        """Run one pass after the first, in a form that ``torch.compile`` can trace."""
        rows: dict[str, Tensor] = {}
        self._pass.rows, self._pass.images = rows, len(images)
        try:
            with suppress(_Reached):
                self.network(images)
        finally:
            self._pass.rows = None  # the hooks ignore other calls of the network
        for layer, (module, _) in self._found.items():
            if layer not in rows:
                raise UserError(f"--model.layer {layer}: the network did not call {module} for these images.")
        return {layer: rows[layer] for layer in self.layers}

    def _hook(self, images: Tensor) -> dict[str, Found]:
        trace = Trace(self.network, images)
        sources: dict[str, Source] = {}
        for layer, path in self.layers.items():
            try:
                sources[layer] = self._find(layer, path, trace)
            except BadValueError as err:
                raise BadValueError(f"--model.layer {layer}: {err}\n{SEE_LAYERS}") from err
        for layer, source in sources.items():
            module = self.network.get_submodule(source.path)
            if source.of == "output":
                module.register_forward_hook(partial(self._take, layer, source))
            elif source.of == "input":
                module.register_forward_pre_hook(partial(self._take_input, layer, source), with_kwargs=True)
            else:
                watch_head(module, partial(self._take_pre_logits, layer, source))
        return {layer: Found(source.name, source.shape[1:]) for layer, source in sources.items()}

    def _find(self, layer: str, path: str, trace: Trace) -> Source:
        modules = dict(self.network.named_modules(remove_duplicate=False))
        if path in FINDERS and path not in modules:
            source = FINDERS[path](trace)
            check_pool(layer, source.shape, source.axis, self.pool)
            return source
        traced = trace.path_of(modules[path]) or path
        return Source(path, path, "output", trace.shape(traced, self.pool), self.pool, trace.channel_axis(traced))

    def _take_input(
        self, layer: str, source: Source, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._take(layer, source, module, args, next(iter((*args, *kwargs.values()))))

    def _take_pre_logits(self, layer: str, source: Source, pre_logits: Callable[[], Tensor]) -> None:
        rows = getattr(self._pass, "rows", None)
        if rows is not None:
            self._pass.rows = None  # the network calls these modules again afterwards
            values = pre_logits()
            self._pass.rows = rows
            self._take(layer, source, self.network, (), values)

    def _take(self, layer: str, source: Source, module: nn.Module, inputs: Any, output: Tensor) -> None:
        rows: dict[str, Tensor] | None = getattr(self._pass, "rows", None)
        if rows is None:
            return
        if layer in rows or len(output) != self._pass.images:
            raise UserError(
                f"--model.layer {layer}: the network calls {source.name} differently for these images than for the "
                "first one. Expected a module that it calls once, for all images."
            )
        rows[layer] = to_rows(output, source.pool, source.axis)
        if len(rows) == len(self.layers):
            raise _Reached
