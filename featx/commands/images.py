"""``featx images DIR``: describes a folder of images, and how a run would see them, before anything is computed."""

import json
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from featx.commands import options
from featx.commands.layers import parse_run
from featx.data.batch import REMARKS, Remark, Remarks
from featx.data.module import FIRST, ImageFolderDataModule
from featx.data.overview import Overview
from featx.errors import MissingPathError, count

MAIN = ("format", "color", "depth")
CATEGORIES = (*MAIN, "orientation", "profile", "transparency", "pages", "frames")
MOST = 5  # values of one category that are printed
FLAGS = ("--json", "--all")
NOT_READING = ("dir", "batch_size", "num_workers", "on_error")  # options that change nothing here


def images(argv: list[str]) -> int:
    """Run ``featx images DIR`` and return the exit status: 0, or 3 if some images cannot be read.

    Raises:
        UserError: A mistake in the options, or there is no image in the folder.
    """
    options.import_from_here()
    if "-h" in argv or "--help" in argv:
        _print_help()
        return 0
    flags, words = [word for word in argv if word in FLAGS], [word for word in argv if word not in FLAGS]
    if words and not words[0].startswith("-"):
        words.insert(0, "--data.dir")
    config, made = parse_run("images", [*flags, *words], "all")
    if not config.data.dir:
        raise MissingPathError("images: the folder is missing. Expected featx images DIR.")
    overview = Overview(made.data, config.all)
    overview.look()
    print(json.dumps(as_json(overview), indent=1) if config.json else as_text(overview))
    return 3 if overview.found["unreadable"] else 0


def _print_help() -> None:
    print("usage: featx images DIR [options]\n")
    options.print_option("json", None, "Print all counts as a JSON object.")
    options.print_option("all", None, f"Decode all images; else {FIRST} from all over DIR, and the first of each kind.")
    print()
    options.print_group("how images are read", "data", ImageFolderDataModule, lambda name: name not in NOT_READING)
    print("""
The headers of all images are read. The other options of featx predict are
accepted and ignored, so you can reuse its command lines and configs.""")


def as_json(overview: Overview) -> dict[str, Any]:
    """Return all counts as plain values, with how a run sees what is unusual."""
    found = {
        category: {
            value: {**remark, **({"seen": seen} if (seen := how_seen(overview.data, category, value)) else {})}
            for value, remark in _most_first(overview.found[category])
        }
        for category in (*CATEGORIES, "remarks", "unreadable")
    }
    return {
        "dir": overview.images.where,
        "images": len(overview.images),
        "classes": [name for name in overview.images.classes if name],
        "left_out": overview.images.left_out,
        "decoded": overview.decoded,
        **found,
        "size": {_size(size): int(number) for size, number in zip(*overview.distinct_sizes(), strict=True)},
    }


def as_text(overview: Overview) -> str:
    """Return some 20 lines for people, most frequent first, with an example of what is unusual."""
    table = list(_table(overview))
    width = max(len(label) for label, _ in table) + 3
    lines = (f"{f'{label}:' if label else '':{width}}{text}" for label, text in table)
    # A name may have line feeds, escape sequences, and bytes that are not UTF-8.
    return "\n".join(line if line.isprintable() else repr(line)[1:-1] for line in lines)


def _table(overview: Overview) -> Iterator[tuple[str, str]]:
    """Yield lines, each as its label and its text."""
    data, tree = overview.data, overview.images
    kind = "class" if tree.column else "class folder"
    classes = f" in {count(len(tree.classes), kind)}" if tree.classes != [""] else ""
    yield "images", f"{len(tree):,}{classes} of {tree.where}"
    if tree.left_out:
        yield "left out", tree.left_out
    if overview.sizes.any():
        yield "size", _describe_sizes(overview)
    for category in CATEGORIES:
        label, unusual = category, defaultdict[str, Remarks](dict)
        for value, remark in overview.found[category].items():
            unusual[how_seen(data, category, value)][value] = remark
        usual = unusual.pop("", {})
        if category in MAIN and (usual or unusual):
            most = max(usual.values(), key=lambda remark: remark["images"], default=None)
            yield label, _listed(overview.found[category], [v for v, remark in usual.items() if remark is not most])
            label = ""
        for seen, remarks in unusual.items():
            yield label, f"{_listed(remarks, remarks)}: {seen}"
            label = ""
    hint = "; --all decodes all" if overview.decoded < len(tree) else ""
    yield "decoded", f"{overview.decoded:,} of {count(len(tree), 'image')}{hint}"
    for kind, remark in _most_first(overview.found["remarks"]):
        yield "", f"{REMARKS[kind].format(count(remark['images'], 'image'))} ({_short(remark['first'])})"
    if reasons := _most_first(overview.found["unreadable"]):
        yield "unreadable", count(sum(remark["images"] for _, remark in reasons), "image")
        for reason, remark in reasons[:MOST]:
            yield "", f"{remark['images']:,} ({_short(remark['first'])}): {reason}"
        if reasons[MOST:]:
            yield "", f"{count(len(reasons) - MOST, 'other reason')}; --json lists them"


def _describe_sizes(overview: Overview) -> str:
    sizes, times = overview.distinct_sizes()
    most = ", ".join(f"{number:,} of {_size(size)}" for size, number in zip(sizes[:2], times[:2], strict=True))
    if len(sizes) <= 2:
        return most
    areas = overview.sizes.prod(axis=1, dtype=np.int64)
    ends = int(np.where(areas > 0, areas, areas.max()).argmin()), int(areas.argmax())
    smallest, largest = (f"{_size(overview.sizes[i])} ({_short(overview.images.names[i])})" for i in ends)
    return f"{most}; {count(len(sizes), 'size')}, from {smallest} to {largest}"


def how_seen(data: ImageFolderDataModule, category: str, value: str) -> str:
    """Return how a run with these options sees something unusual, and the option that changes it; "" for the usual."""
    given = vars(data.view)

    def choose(option: str, example: str, without: str, changed: str) -> str:
        if given.get(option):
            return changed.format(json.dumps(given[option]))
        return f"{without}; --data.{option} {example}"

    if category == "depth" and not value.endswith("-bit"):
        if "float" in value or "signed" in value or int(value.split("-")[0]) > 16:
            return choose("value_range", "'[LOW,HIGH]' is needed", "cannot be read", "black and white are {}")
        without = "0 is black, the highest value white" if "grey" in value else "the upper 8 bits are taken"
        return choose("value_range", "'[LOW,HIGH]' takes other values", without, "black and white are {}")
    if category == "color" and value.endswith("-band"):
        return choose("bands", "'[3,2,1]' is needed", "cannot be read", "bands {} are taken")
    if category == "color" and value.endswith(" more"):
        return choose("bands", "'[3,2,1]' takes others", "more bands are ignored", "bands {} are taken")
    if category == "orientation":
        return choose("exif_rotate", "true rotates them", "not rotated", "rotated")
    if category == "profile" and "sRGB" not in value:
        return choose("srgb", "true converts colors to sRGB", "ignored", "converted to sRGB")
    if category == "transparency":
        return choose("background", "'[255,255,255]' puts them on white", "ignored", "put on the color {}")
    if category == "pages":
        return choose("page", "N takes another", "the first is taken", "page {} is taken")
    return "the first is taken" if category == "frames" else ""


def _most_first(remarks: Remarks) -> list[tuple[str, Remark]]:
    return sorted(remarks.items(), key=lambda item: -item[1]["images"])


def _listed(remarks: Remarks, with_example: Collection[str]) -> str:
    """Return values with their counts, most frequent first, some with an example."""
    words = []
    for value, remark in _most_first(remarks):
        shown = f"of value {value}" if value.isdigit() else value
        example = f" ({_short(remark['first'])})" if value in with_example else ""
        words.append(f"{remark['images']:,} {shown}{example}")
    return ", ".join(words[:MOST]) + (f", {count(len(words) - MOST, 'other')}" if words[MOST:] else "")


def _size(size: Any) -> str:
    return f"{size[0]}x{size[1]}"


def _short(name: str) -> str:
    return name if len(name) <= 50 else f"{name[:25]}…{name[-24:]}"
