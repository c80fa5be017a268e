"""Measure a network's layers in the order of execution: the size of a row, and the time of a pass."""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featx.errors import BadValueError, count, log
from featx.model.build import SEED
from featx.model.embedding import find_penultimate
from featx.model.extractor import SLICE, FeatureExtractor
from featx.model.layers import find_aliases, to_rows
from featx.model.trace import PENULTIMATE, Shape, Trace, watched

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
    axes = {path: trace.channel_axis(path) for path in trace.calls if trace.gives_rows(path, model.pool)}
    if last and model.pool != "cls":
        axes[PENULTIMATE] = None
    costs: dict[str, tuple[Shape, int, int]] = {}  # shape, columns and bytes, in the order of execution

    def add_costs(name: str, value: Tensor) -> None:
        if name in axes:
            row = to_rows(value, model.pool, axes[name])[0].numpy()  # (D,) float32
            costs[name] = (tuple(value.shape[1:]), len(row), bytes_of(row))

    _watch_pass(model, images[:1], last, add_costs)
    times = [_watch_pass(model, images[:batch], last, lambda name, value: None) for _ in range(PASSES)]
    aliases = {path: alias for alias, path in (find_aliases(model.network) | model.layer_aliases).items()}
    types = {path: type(call.module).__name__ for path, call in trace.calls.items()} | {PENULTIMATE: f"input of {last}"}
    time_of = {name: round(statistics.median(each[name] for each in times), 1) for name in costs}
    return [Row(name, aliases.get(name, ""), types[name], *cost, time_of[name]) for name, cost in costs.items()]


def _watch_pass(
    model: FeatureExtractor, images: Tensor, last: str | None, see: Callable[[str, Any], None]
) -> dict[str, float]:
    """Run a pass, call ``see(layer, value)`` after each layer, and return the percent of the pass's time by then."""
    network, ends = model.network, dict[str, float]()

    def note(name: str, value: Any) -> None:
        ends[name] = time.perf_counter()
        see(name, value)

    def run(pixels: Tensor) -> dict[str, float]:
        start = time.perf_counter()
        network(pixels)
        whole = time.perf_counter() - start
        return {name: 100 * (end - start) / whole for name, end in ends.items()}

    with ExitStack() as hooks:
        hooks.enter_context(watched(network, lambda path, module, inputs, output: note(path, output)))
        if last:
            hook = network.get_submodule(last).register_forward_pre_hook(
                lambda module, args, kwargs: note(PENULTIMATE, [*args, *kwargs.values()][0]), with_kwargs=True
            )
            hooks.callback(hook.remove)
        return model.run(images, run)


def _report_unlisted(model: FeatureExtractor, trace: Trace) -> str | None:
    """Log which modules are not in the table, and return the path of the Linear after ``penultimate``, or None."""
    uncalled = [path for path, _ in model.network.named_modules() if path and path not in trace.calls]
    repeated = [path for path, call in trace.calls.items() if call.times > 1]
    others = [path for path in trace.calls if path not in repeated and not trace.gives_rows(path, model.pool)]
    kinds = {"never called": uncalled, "called more than once": repeated, "without one row per image": others}
    notes = [f"{len(paths)} {kind} ({paths[0]}{', …' if paths[1:] else ''})" for kind, paths in kinds.items() if paths]
    if notes:
        log.info("not listed: %s", "; ".join(notes))
    try:
        return find_penultimate(trace).path
    except BadValueError as err:
        log.info("no %s: %s", PENULTIMATE, err)
        return None
