"""Resolve layers to modules, and copy their outputs as one row per image."""

import re
import threading
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featx.errors import BadValueError, UserError, as_list, count, did_you_mean
from featx.model.embedding import Source, find_embedding, find_penultimate
from featx.model.trace import (
    EMBEDDING,
    PENULTIMATE,
    SEE_LAYERS,
    Pool,
    Shape,
    Trace,
    check_pool,
    check_rows,
    named_tensors,
    watch_head,
)

DEFAULT = "auto"  # instead of a layer
FINDERS = {PENULTIMATE: find_penultimate, EMBEDDING: find_embedding}
_CALL_AND_MEMBER = re.compile("(?::(0|[1-9][0-9]*|all))?((?:#[^#]*)*)")


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


def split(layer: str, modules: Container[str]) -> tuple[str, str]:
    """Return the module that a layer names, and which of its calls and members: ``relu`` and ``:3#0`` of ``relu:3#0``.

    Names of modules may contain ``:`` and ``#`` too, so the longest module wins. Without a module, all is its name.
    """
    for end in (len(layer), *(mark.start() for mark in reversed([*re.finditer("[:#]", layer)]))):
        if layer[:end] in modules and _CALL_AND_MEMBER.fullmatch(layer[end:]):
            return layer[:end], layer[end:]
    return layer, ""


def resolve_layers(
    network: nn.Module, layers: list[str], title: str, aliases: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the module path of each layer, with its call and member; ``penultimate`` and ``embedding`` as they are.

    A pass finds those two. ``aliases`` win over those of ``find_aliases``; ``title`` is the network's name in messages.

    Raises:
        BadValueError: The network has no such layer, or one is named twice.
    """
    known = find_aliases(network) | dict(aliases or {})
    paths = [path for path, _ in network.named_modules(remove_duplicate=False) if path]
    modules, found = set(paths), {}
    for layer in layers:
        if layer in found:
            raise BadValueError(f"--model.layer: {layer} is named twice. Expected each layer once.")
        name, rest = split(layer, {*known, *modules})
        path = known.get(name, name) + rest
        if split(path, modules)[0] not in modules and path not in FINDERS:
            if many := as_list(re.sub(r"\s+#", "#", layer)):  # a comment, for YAML
                raise BadValueError(f"--model.layer {layer}: expected a layer, or a list in quotes, {many}.")
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
        layers: Each layer with what ``resolve_layers`` returns for it.
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
        self._sources: dict[str, Source] = {}
        self._pass = threading.local()
        self._first = threading.Lock()

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Run one pass with the network's input ``(B, 3, H, W)`` and return each layer's rows, ``(B, D) float32``.

        Raises:
            UserError: A module was not called as in the first pass, or its output does not have B rows or cannot be
                pooled.
        """
        self.find(images)
        return self.take(images)

    def find(self, images: Tensor) -> dict[str, Found]:
        """Return what the first pass finds about each layer; raise UserError as a call does."""
        with self._first:
            if not self._sources:
                self._sources = self._hook(torch.cat([images[:1], images[:1]]))
        return {layer: Found(source.name, source.shape[1:]) for layer, source in self._sources.items()}

    def take(self, images: Tensor) -> dict[str, Tensor]:
        """Run one pass after the first, in a form that ``torch.compile`` can trace."""
        rows: dict[str, Tensor] = {}
        calls = dict.fromkeys(self._sources, 0)
        self._pass.rows, self._pass.calls, self._pass.images = rows, calls, len(images)
        try:
            with suppress(_Reached):
                self.network(images)
        finally:
            self._pass.rows = None  # the hooks ignore other calls of the network
        for layer, source in self._sources.items():
            if layer not in rows:
                raise _other_calls(layer, source, count(calls[layer], "time"))
        return {layer: rows[layer] for layer in self._sources}

    def _hook(self, images: Tensor) -> dict[str, Source]:
        trace = Trace(self.network, images)
        sources: dict[str, Source] = {}
        for layer, path in self.layers.items():
            try:
                found = self._find(layer, path, trace)
            except BadValueError as err:
                raise BadValueError(f"--model.layer {layer}: {err}\n{SEE_LAYERS}") from err
            if both := sources.keys() & found.keys():
                raise BadValueError(f"--model.layer: {min(both)} is named twice. Expected each layer once.")
            sources |= found
        for layer, source in sources.items():
            module = self.network.get_submodule(source.path)
            if source.of == "output":
                module.register_forward_hook(partial(self._take, layer, source))
            elif source.of == "input":
                module.register_forward_pre_hook(partial(self._take_input, layer, source), with_kwargs=True)
            else:
                watch_head(module, partial(self._take_pre_logits, layer, source))
        return sources

    def _find(self, layer: str, target: str, trace: Trace) -> dict[str, Source]:
        """Return where a layer is in the pass, or with ``:all`` where each of its calls is, by their names."""
        modules = dict(self.network.named_modules(remove_duplicate=False))
        path, rest = split(target, modules)
        if path in FINDERS and path not in modules:
            source = FINDERS[path](trace)
            check_pool(layer, source.shape, source.axis, self.pool)
            return {layer: source}
        call, member = _CALL_AND_MEMBER.fullmatch(rest).groups()  # type: ignore[union-attr]  # split() matched it
        traced = trace.path_of(modules[path]) or path
        times = trace.calls[traced].times if traced in trace.calls else 1
        numbers: Iterable[int | None] = range(1, times + 1) if call == "all" else [int(call) if call else None]
        found = {}
        for each in numbers:
            one = f":{each}{member}" if call else member
            shape = trace.shape(traced, self.pool, each, member)
            axis = trace.channel_axis(traced, each, member)
            name = layer.removesuffix(rest) + one if call == "all" else layer
            found[name] = Source(f"{path}{one}", path, "output", shape, self.pool, axis, each or 1, times, member)
        return found

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
        calls: dict[str, int] = self._pass.calls
        calls[layer] += 1
        if calls[layer] > source.times:
            raise _other_calls(layer, source, f"at least {count(calls[layer], 'time')}")
        if calls[layer] != source.call:
            return
        values = named_tensors(output).get(source.member) if source.member else output
        if not isinstance(values, Tensor):
            raise UserError(f"--model.layer {layer}: {source.name} returns another type than for the first image.")
        try:
            check_rows(source.name, tuple(values.shape), self._pass.images)
        except BadValueError as err:
            raise BadValueError(f"--model.layer {layer}: {err}") from err
        rows[layer] = to_rows(values, source.pool, source.axis)
        if len(rows) == len(self._sources):
            raise _Reached


def _other_calls(layer: str, source: Source, times: str) -> UserError:
    return UserError(
        f"--model.layer {layer}: the network calls {source.path or source.name} {times} for these images, but "
        f"{count(source.times, 'time')} for the first one.\nExpected a module that it calls as often for all images."
    )
