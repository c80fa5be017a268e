"""Measure a network's layers in the order of execution: the size of a row, and the time of a pass."""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featx.errors import BadValueError, count, log
from featx.model.build import SEED
from featx.model.embedding import find_penultimate
from featx.model.extractor import SLICE, FeatureExtractor
from featx.model.layers import find_aliases, to_rows
from featx.model.trace import PENULTIMATE, Shape, Trace, named_tensors, watched

PASSES = 3
SECONDS_PER_PASS = 2.0


@dataclass(frozen=True)
class Row:
    """A layer in the table."""

    path: str
    alias: str  # or ""
    type: str  # the module's class, or "input of" a module
    shape: Shape  # per image, before pooling
    columns: int
    bytes: int  # of a random image's row
    time: float  # percent of a pass's time until the layer is computed


def measure(model: FeatureExtractor, size: int, bytes_of: Callable[[NDArray[np.float32]], int]) -> list[Row]:
    """Run a few passes with random images of ``size`` pixels and return the layers in the order of execution.

    ``bytes_of`` returns the number of bytes of a row, ``(D,) float32``.
    """
    seeded = torch.Generator().manual_seed(SEED)
    images = torch.randint(256, (SLICE, 3, size, size), dtype=torch.uint8, generator=seeded)
    start = time.perf_counter()
    trace = model.run(images[:2], lambda pixels: Trace(model.network, pixels))
    batch = max(1, min(SLICE, int(2 * SECONDS_PER_PASS / (time.perf_counter() - start))))
    passes = f"median of {PASSES} passes of {count(batch, 'image')} on one core"
    log.info("images: random, 3x%dx%d; time: %s", size, size, passes)
    last = _report_unlisted(model, trace)
    listed = trace.layers(model.pool)
    axes = {name: axis for name, (_, axis) in listed.items()}
    if last and model.pool != "cls":
        axes[PENULTIMATE] = None
    costs: dict[str, tuple[Shape, int, int]] = {}  # shape, columns and bytes, in the order of execution

    def add_costs(name: str, value: Tensor) -> None:
        if name in axes and len(value) == 1:
            row = to_rows(value, model.pool, axes[name])[0].numpy()  # (D,) float32
            costs[name] = (tuple(value.shape[1:]), len(row), bytes_of(row))

    _watch_pass(model, images[:1], trace, last, add_costs)
    times = [_watch_pass(model, images[:batch], trace, last, lambda name, value: None) for _ in range(PASSES)]
    aliases = {path: alias for alias, path in (find_aliases(model.network) | model.layer_aliases).items()}
    types = {name: type(trace.calls[path].module).__name__ for name, (path, _) in listed.items()}
    types[PENULTIMATE] = f"input of {last}"
    time_of = {name: round(statistics.median(each[name] for each in times), 1) for name in costs}
    return [Row(name, aliases.get(name, ""), types[name], *cost, time_of[name]) for name, cost in costs.items()]


def _watch_pass(
    model: FeatureExtractor, images: Tensor, trace: Trace, last: str | None, see: Callable[[str, Any], None]
) -> dict[str, float]:
    """Run a pass, call ``see(layer, value)`` after each layer, and return the percent of the pass's time by then."""
    network, ends, calls = model.network, dict[str, float](), Counter[str]()

    def note(name: str, value: Any) -> None:
        ends[name] = time.perf_counter()
        see(name, value)

    def note_output(path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[path] += 1
        for member, value in named_tensors(output).items():
            note(trace.name(path, calls[path], member), value)

    def run(pixels: Tensor) -> dict[str, float]:
        start = time.perf_counter()
        network(pixels)
        whole = time.perf_counter() - start
        return {name: 100 * (end - start) / whole for name, end in ends.items()}

    with ExitStack() as hooks:
        hooks.enter_context(watched(network, note_output))
        if last:
            hook = network.get_submodule(last).register_forward_pre_hook(
                lambda module, args, kwargs: note(PENULTIMATE, [*args, *kwargs.values()][0]), with_kwargs=True
            )
            hooks.callback(hook.remove)
        return model.run(images, run)


def _report_unlisted(model: FeatureExtractor, trace: Trace) -> str | None:
    """Log which modules are not in the table, and return the path of the Linear after ``penultimate``, or None."""
    uncalled = [path for path, _ in model.network.named_modules() if path and path not in trace.calls]
    listed = {path for path, _ in trace.layers(model.pool).values()}
    others = [path for path in trace.calls if path not in listed]
    kinds = {"never called": uncalled, "without one row per image": others}
    notes = [f"{len(paths)} {kind} ({paths[0]}{', …' if paths[1:] else ''})" for kind, paths in kinds.items() if paths]
    if notes:
        log.info("not listed: %s", "; ".join(notes))
    try:
        return find_penultimate(trace).path
    except BadValueError as err:
        log.info("no %s: %s", PENULTIMATE, err)
        return None
