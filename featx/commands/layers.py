"""``featx layers``: which layers a network has, in the order of execution, and what a row and a pass of each cost."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch import Trainer
from torch import Tensor, nn

from featx.commands import options
from featx.data.module import ImageFolderDataModule
from featx.data.preprocess import Preprocessing
from featx.errors import SEE, BadValueError, count, log
from featx.model.build import SEED, is_function
from featx.model.extractor import SLICE, FeatureExtractor
from featx.model.layers import find_aliases, to_rows
from featx.model.trace import PENULTIMATE, Pool, Shape, Trace, watched
from featx.process.shared import one_core
from featx.writer import formats
from featx.writer.callback import FeatureWriter

PASSES = 3
SECONDS_A_PASS = 2.0


@dataclass(frozen=True)
class Row:
    """One layer that can be taken.

    Args:
        path: What ``--model.layer`` takes.
        alias: Another name of it, or ``""``.
        type: The module's class, or whose input it is.
        shape: Shape for one image, before pooling.
        columns: Values in a row.
        bytes: Bytes of its CSV row for a random image, without the name.
        time: Percent of a pass's time until it is there.
    """

    path: str
    alias: str
    type: str
    shape: Shape
    columns: int
    bytes: int
    time: float


def layers(argv: list[str]) -> int:
    """Run ``featx layers`` with these options and return the exit status, 0.

    Raises:
        UserError: A mistake in them.
    """
    options.import_from_here()
    if "-h" in argv or "--help" in argv:
        _print_help()
        return 0
    try:
        parser = _parser()
        config = parser.parse_args(argv)
    except BadValueError as err:
        raise BadValueError(str(err).replace(SEE, "featx layers --help lists the options.")) from err
    made = parser.instantiate_classes(config)
    model: FeatureExtractor = made.model
    size = _prepare(model, made.data)
    with ThreadPoolExecutor(1, initializer=one_core) as core:  # as predict's slices have it
        rows = core.submit(measure, model, size).result()
    print(json.dumps([asdict(row) for row in rows], indent=1) if config.json else as_table(rows))
    return 0


def _print_help() -> None:
    print("usage: featx layers [--model.arch NAME] [options]\n")
    options.print_group("network", "model", FeatureExtractor, lambda name: name != "layer")
    options.print_group("size of the images", "data", ImageFolderDataModule, ("resize", "crop").__contains__)
    print("also:")
    options.print_option("json", None, "Print a JSON list of objects, of the same fields, in place of the table.")
    for name, text in options.ALSO.items():
        options.print_option(name, None, text)
    print("""
The images are random, and where --model.weights is auto, the weights too. All
other options of featx predict are taken and change nothing, so that a line or a
config of it can be used as it is.""")


def _parser() -> options.Parser:
    """Return a parser of all that ``featx predict`` takes, so that a line or a config of it serves here too."""
    parser = options.Parser(prog="featx layers", default_env=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile)
    parser.add_lightning_class_args(FeatureExtractor, "model", subclass_mode=True)
    parser.add_class_arguments(ImageFolderDataModule, "data", skip={"dir"})
    parser.add_argument("--data.dir", type=str, default="")
    parser.add_class_arguments(FeatureWriter, "writer", instantiate=False)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    parser.add_argument("--json", action="store_true")
    return parser


def _prepare(model: FeatureExtractor, data: ImageFolderDataModule) -> int:
    """Build the network and return the side of the images that it is to be given."""
    model.layer = PENULTIMATE  # a name that any network knows; whether this one has it, the pass shows
    if model.weights == "auto" and not (model.own_network or is_function(model.arch)):
        model.weights = "random"  # no download for a table in which they matter little
    level = log.level
    if model.weights == "random":
        log.setLevel("ERROR")  # that its features would say nothing is no concern here
    try:
        model.configure_model()
    finally:
        log.setLevel(level)
    if model.weights == "random":
        log.info("network: %s, weights: %s", model.title, model.weights_used)
    preset = data.preprocessing(model.preprocessing)
    size = preset.crop or preset.resize or Preprocessing.usual().crop
    assert size is not None
    return size


def measure(model: FeatureExtractor, size: int) -> list[Row]:
    """Run a few passes of random images and return the layers in the order in which they are there.

    Args:
        model: With its network.
        size: Side of the images, in pixels.
    """
    seeded = torch.Generator().manual_seed(SEED)
    images = torch.randint(256, (SLICE, 3, size, size), dtype=torch.uint8, generator=seeded)
    start = time.perf_counter()
    trace = model.run(images[:2], lambda pixels: Trace(model.network, pixels))
    batch = max(1, min(SLICE, int(2 * SECONDS_A_PASS / (time.perf_counter() - start))))
    passes = f"median of {PASSES} passes of {count(batch, 'image')} on one core"
    log.info("images: random, 3x%dx%d; time: %s", size, size, passes)
    last = _tell_left_out(model, trace)
    axes = {path: trace.channel_axis(path) for path in trace.calls if trace.gives_rows(path, model.pool)}
    if last and model.pool != "cls":
        axes[PENULTIMATE] = None
    costs = model.run(images[:1], lambda pixels: _costs(model.network, last, pixels, model.pool, axes))
    times = [model.run(images[:batch], lambda pixels: _times(model.network, last, pixels)) for _ in range(PASSES)]
    aliases = {path: alias for alias, path in (find_aliases(model.network) | model.layer_aliases).items()}
    return [
        Row(
            path=name,
            alias=aliases.get(name, ""),
            type=f"input of {last}" if name == PENULTIMATE else type(trace.calls[name].module).__name__,
            shape=shape,
            columns=columns,
            bytes=size,
            time=round(100 * statistics.median(each[name] for each in times), 1),
        )
        for name, (shape, columns, size) in costs.items()
    ]


def _costs(
    network: nn.Module, last: str | None, pixels: Tensor, pool: Pool, axes: dict[str, int | None]
) -> dict[str, tuple[Shape, int, int]]:
    """Return each layer's shape, columns and bytes of CSV for one image, in the order of execution."""
    costs = {}

    def see(name: str, value: Any) -> None:
        if name in axes:
            row = to_rows(value, pool, axes[name])[0].numpy()  # (D,) float32
            costs[name] = (tuple(value.shape[1:]), len(row), len(formats.csv_row(b"", row)))

    with _seen(network, last, see):
        network(pixels)
    return costs


def _times(network: nn.Module, last: str | None, pixels: Tensor) -> dict[str, float]:
    """Return at which share of a pass, 0..1, each layer is there."""
    ends: dict[str, float] = {}
    with _seen(network, last, lambda name, value: ends.update({name: time.perf_counter()})):
        start = time.perf_counter()
        network(pixels)
        whole = time.perf_counter() - start
    return {name: (end - start) / whole for name, end in ends.items()}


@contextmanager
def _seen(network: nn.Module, last: str | None, see: Callable[[str, Any], Any]) -> Iterator[None]:
    """Call ``see(layer, value)`` as each layer is there: a module's output, or the input of the last Linear."""
    with ExitStack() as hooks:
        hooks.enter_context(watched(network, lambda path, module, inputs, output: see(path, output)))
        if last:
            hook = network.get_submodule(last).register_forward_pre_hook(
                lambda module, args, kwargs: see(PENULTIMATE, [*args, *kwargs.values()][0]), with_kwargs=True
            )
            hooks.callback(hook.remove)
        yield


def _tell_left_out(model: FeatureExtractor, trace: Trace) -> str | None:
    """Say which modules are not in the table, and return the path of the Linear behind ``penultimate``, or None."""
    paths = [path for path, _ in model.network.named_modules() if path]
    idle = [path for path in paths if path not in trace.calls]
    often = [path for path, call in trace.calls.items() if call.times > 1]
    odd = [path for path in trace.calls if path not in often and not trace.gives_rows(path, model.pool)]
    kinds = {"never called": idle, "called more than once": often, "without a row an image": odd}
    told = [f"{len(found)} {kind} ({found[0]}{', …' if found[1:] else ''})" for kind, found in kinds.items() if found]
    if told:
        log.info("not listed: %s", "; ".join(told))
    try:
        return trace.penultimate()
    except BadValueError as err:
        log.info("no %s: %s", PENULTIMATE, err)
        return None


def as_table(rows: list[Row]) -> str:
    """Return the rows as text, paths whole and numbers plain, in 80 columns where the paths allow it."""
    alias = " alias" if any(row.alias for row in rows) else ""
    cells = [(f"path{alias}", "type", "shape", "columns", "bytes", "time%")]
    for row in rows:
        name = f"{row.path} {row.alias}".rstrip()
        shape = "x".join(map(str, row.shape))
        cells.append((name, row.type, shape, str(row.columns), str(row.bytes), f"{row.time:.1f}"))
    widths = [max(map(len, column)) for column in list(zip(*cells, strict=True))[2:]]
    wide, narrow = (max(len(name) + len(gap) + len(kind) for name, kind, *_ in cells) for gap in ("  ", " "))
    gap, first = ("  ", wide) if wide + sum(widths) + 2 * len(widths) <= 80 else (" ", narrow)
    lines = []
    for name, kind, *rest in cells:
        # The type is set to the right of the path, so that a long one of either costs nothing where the other is short.
        padded = [name + kind.rjust(first - len(name)), *(cell.rjust(w) for cell, w in zip(rest, widths, strict=True))]
        lines.append(gap.join(padded))
    return "\n".join(lines)
