"""``featx layers``: lists a network's layers in the order of execution, with the size and cost of each."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch import Trainer

from featx.commands import options
from featx.data.module import ImageFolderDataModule
from featx.data.preprocess import Preprocessing
from featx.errors import SEE, BadValueError, log, note
from featx.model.build import is_function
from featx.model.costs import Row, measure
from featx.model.extractor import FeatureExtractor
from featx.model.trace import PENULTIMATE
from featx.process.shared import one_core
from featx.writer import formats
from featx.writer.callback import FeatureWriter


def layers(argv: list[str]) -> int:
    """Run ``featx layers`` and return the exit status, 0.

    Raises:
        UserError: A mistake in the options.
    """
    options.import_from_here()
    if "-h" in argv or "--help" in argv:
        _print_help()
        return 0
    config, made = parse_run("layers", argv)
    model: FeatureExtractor = made.model
    size = _prepare(model, made.data)
    with ThreadPoolExecutor(1, initializer=one_core) as core:  # like predict's slices
        rows = core.submit(measure, model, size, lambda row: len(formats.csv_row(b"", row))).result()
    print(json.dumps([asdict(row) for row in rows], indent=1) if config.json else as_table(rows))
    return 0


def _print_help() -> None:
    print("usage: featx layers [--model.arch NAME] [options]\n")
    options.print_group("network", "model", FeatureExtractor, lambda name: name != "layer")
    options.print_group("size of the images", "data", ImageFolderDataModule, ("resize", "crop").__contains__)
    print("also:")
    options.print_option("json", None, "Print a JSON list with the same fields instead of the table.")
    for name, text in options.ALSO.items():
        options.print_option(name, None, text)
    print("""
The images are random, and so are the weights if --model.weights is auto. The
other options of featx predict are accepted and ignored, so you can reuse its
command lines and configs.""")


def parse_run(command: str, argv: list[str], *flags: str) -> tuple[Any, Any]:
    """Parse all options of ``featx predict`` for another command, so that command lines and configs work there too.

    Args:
        command: The command.
        argv: Its options.
        flags: Names of its own options without a value, other than json.

    Returns:
        The options, and what they make: ``model`` and ``data``.

    Raises:
        BadValueError: A mistake in the options.
    """
    parser = options.Parser(prog=f"featx {command}", default_env=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile)
    parser.add_lightning_class_args(FeatureExtractor, "model", subclass_mode=True)
    parser.add_class_arguments(ImageFolderDataModule, "data", skip={"dir"})
    parser.add_argument("--data.dir", type=str, default="")
    parser.add_class_arguments(FeatureWriter, "writer", instantiate=False)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    for flag in ("json", *flags):
        parser.add_argument(f"--{flag}", action="store_true")
    try:
        config = parser.parse_args(argv)
    except BadValueError as err:
        raise BadValueError(str(err).replace(SEE, f"featx {command} --help lists the options.")) from err
    return config, parser.instantiate_classes(config)


def _prepare(model: FeatureExtractor, data: ImageFolderDataModule) -> int:
    """Build the network and return the side of its images, in pixels."""
    model.layer = PENULTIMATE  # a name that is valid for any network; the pass shows whether this one has it
    if model.weights == "auto" and not (model.own_network or is_function(model.arch)):
        model.weights = "random"  # no download: they hardly matter for the table
    level = log.level
    if model.weights == "random":
        log.setLevel("ERROR")  # no warning of random features
    try:
        model.configure_model()
    finally:
        log.setLevel(level)
    if model.weights == "random":
        note("network", f"{model.title}, weights: {model.weights_used}")
    preset = data.preprocessing(model.preprocessing)
    size = preset.crop or preset.resize or Preprocessing.usual().crop
    assert size is not None
    return size


def as_table(rows: list[Row]) -> str:
    """Return the table as text, in 80 columns unless paths are too long."""
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
        # The type is right-aligned after the path, so a long type fits beside a short path and the reverse.
        padded = [name + kind.rjust(first - len(name)), *(cell.rjust(w) for cell, w in zip(rest, widths, strict=True))]
        lines.append(gap.join(padded))
    return "\n".join(lines)
