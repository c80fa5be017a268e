"""What made a file: the identity of a run, its record LAYER.json, and the differences between two of them."""

import gzip
import hashlib
import inspect
import json
import os
import re
import zlib
from collections.abc import Mapping, Set
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any

from featx.data.batch import Images
from featx.errors import BadValueError, count
from featx.writer import disk, journal
from featx.writer.formats import SUFFIXES

Json = dict[str, Any]

SCHEMA: dict[tuple[type, ...], str] = {  # the keys of a record that featx reads
    (str,): "layer inputs.digest identity.weights identity.decoder identity.precision identity.names "
    "run.options.model_class run.options.data.dir",
    (int,): "rows columns errors errors_used inputs.images",
    (dict,): "files run.options.model",
    (bool,): "identity.header",
    (list, NoneType): "identity.value_range",
    (int, NoneType): "identity.shard_rows",
}
TYPES = {str: "text", int: "a number", dict: "an object", list: "a list", bool: "true or false", NoneType: "null"}
# Dotted keys that were added to the identity later, each with the value that applied before. Keys are never removed.
ADDED: Json = {
    "revisions.preprocessing": 1,
    "revisions.pass": 1,
    "revisions.text": 1,
    "preprocessing.pad": True,
    "exclude": None,
    "suffixes": None,
    "column": None,
    "stochastic": False,
    "normalize": False,
}


def merge(*parts: Json) -> Json:
    """Merge parts of an identity, including the dicts in them: several have ``versions`` and ``revisions``."""
    found: Json = {}
    for part in parts:
        for key, value in part.items():
            found[key] = {**found.get(key, {}), **value} if isinstance(value, dict) else value
    return found


def flat(record: Json, path: str = "") -> Json:
    """Return all values by dotted key, for example ``preprocessing.crop``."""
    found: Json = {}
    for key, value in record.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def digest(identity: Json, images: Images) -> str:
    """Return the SHA-256 of an identity and the images' names; it does not change when later versions add keys."""
    known = {key: value for key, value in flat(identity).items() if key not in ADDED or value != ADDED[key]}
    return hashlib.sha256((json.dumps(known, sort_keys=True) + images.digest_of_names()).encode()).hexdigest()


def public_name(owner: type) -> str:
    """Return a class's name in ``--model`` and in records; it does not change when a class of featx moves."""
    package = owner.__module__.split(".")[0]
    return f"{package if package == 'featx' else owner.__module__}.{owner.__qualname__}"


def place(where: str) -> str:
    """Return where the images are, as a record has it: a URL, or a folder's absolute path."""
    return where if "://" in where else os.path.abspath(where)


def options(owner: object) -> Json:
    """Return the options that an object was constructed with, if it has attributes of the same names."""
    names = inspect.signature(type(owner)).parameters
    return {name: getattr(owner, name) for name in names if hasattr(owner, name)}


def differences(old: Json, new: Json) -> list[str]:
    """Return one line per difference between two identities, for example ``preprocessing.crop: 224 -> 200``."""
    before, after = flat(old), flat(new)
    before.pop("versions.featx", None)  # only in format 1
    if "revisions" not in old:  # format 1 lacks the versions of the packages with the network's code
        after = {key: value for key, value in after.items() if not key.startswith("versions.") or key in before}
    pairs = [(key, before.get(key, ADDED.get(key)), after.get(key, ADDED.get(key))) for key in {**before, **after}]
    return [f"{key}: {_short(then, False)} -> {_short(now, False)}" for key, then, now in pairs if then != now]


def _short(value: Any, quote: bool = True) -> str:
    """Return a value as JSON, cut to 60 characters; without quotes if asked for, and then a digest cut to 8."""
    text = value if isinstance(value, str) and not quote else json.dumps(value, ensure_ascii=False)
    if len(text) == 64 and text.isalnum():
        return f"{text[:8]}…"
    return text if len(text) <= 60 else f"{text[:57]}…"


def as_json(record: Json) -> bytes:
    """Return a record as indented, readable JSON."""
    return json.dumps(record, indent=2, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n"


def read_record(path: Path, layer: str | None = None) -> dict[str, Any] | None:
    """Return the record in LAYER.json, or None if the file does not exist.

    Args:
        path: LAYER.json.
        layer: The layer that it must belong to; needed before its files are replaced, as users may rename records.

    Raises:
        BadValueError: It is not a record of featx, or it is from a newer featx.
    """
    try:
        found = _load(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as err:
        problem = getattr(err, "strerror", None) or f"it is not JSON ({type(err).__name__}: {err})"
    else:
        if isinstance(found, dict):
            journal.check_format(path, found)
        if not (problem := _problem(found, layer)):
            return dict(found)
    raise BadValueError(f"{path}: not a record of featx: {problem}.\nExpected one that featx predict wrote.")


def _load(path: Path) -> Any:
    return json.loads(path.read_bytes().decode("utf-8", "surrogateescape"))


def file_stem(layer: str) -> str:
    """Return a layer's name as it is in the names of its files, with ``%2F``, ``%3A`` and ``%23`` for /, : and #."""
    return layer.replace("/", "%2F").replace(":", "%3A").replace("#", "%23")


def layer_of(stem: str) -> str:
    """Return the layer whose files have this name, as ``file_stem`` writes it."""
    return stem.replace("%2F", "/").replace("%3A", ":").replace("%23", "#")


def is_result_name(layer: str, name: str) -> bool:
    """Return whether a record of the layer may list this file, for example ``fc7.csv`` or ``fc7/00000.csv``."""
    stem, kinds = file_stem(layer), "|".join(map(re.escape, SUFFIXES))
    allowed = rf"{re.escape(stem)}(/[0-9]{{5,}})?\.({kinds})"
    return stem not in ("", ".", "..") and re.fullmatch(allowed, name) is not None


def _problem(record: Any, layer: str | None) -> str:
    """Return the first way in which a record is not as featx writes it, or ""."""
    for kinds, key in ((kinds, key) for kinds, keys in SCHEMA.items() for key in keys.split()):
        value = record
        for word in key.split("."):
            if not isinstance(value, dict) or word not in value:
                return f"it has no {key}"
            value = value[word]
        if type(value) not in kinds or value == "" or (type(value) is int and value < 0):
            return f"{key} is {_short(value)}, expected {' or '.join(TYPES[kind] for kind in kinds)}"
    if layer is not None and record["layer"] != layer:
        return f"layer is {_short(record['layer'])}, expected {_short(layer)}"
    generations = record.get("generations", [])
    if type(generations) is not list:
        return f"generations is {_short(generations)}, expected a list"
    bounds, size = record["identity"]["value_range"] or [0, 1], record["identity"]["shard_rows"]
    for pair in bounds if type(bounds[0]) is list else [bounds]:
        numbers = type(pair) is list and all(type(bound) in (int, float) for bound in pair)
        if not numbers or len(pair) != 2 or not pair[0] < pair[1]:
            return f"identity.value_range is {_short(bounds)}, expected two numbers, the lower first"
    for name, about in record["files"].items():
        shard = name.partition("/")[2].partition(".")[0]
        valid = is_result_name(record["layer"], name) and bool(shard) == (size is not None)
        if not valid or (size is not None and int(shard) * size >= record["inputs"]["images"]):
            return f"files has {_short(name)}, which is not a file of layer {_short(record['layer'])}"
        known = about if isinstance(about, dict) else {}
        counts = [known.get("bytes"), known.get("rows", 0)]
        if not all(type(number) is int and number >= 0 for number in counts) or type(known.get("sha256")) is not str:
            return f"files has {_short(about)} for {name}, expected sha256 and bytes"
    return "" if record["files"] else "files is empty"


def read_run(path: Path) -> Json | None:
    """Return the content of ``run.json``, or None if it is missing or damaged.

    Raises:
        BadValueError: featx did not write it, or a newer featx did.
    """
    run = None
    with suppress(OSError, ValueError):
        run = _load(path)
    if not isinstance(run, dict):
        return None
    journal.check_format(path, run)
    if not all(isinstance(run.get(key), dict) for key in ("identity", "inputs")):
        raise BadValueError(f"{path}: featx did not write this. Remove it, or use another --writer.out_dir.")
    return run


def encode_inputs(images: Images, noted: Mapping[str, journal.Noted] | None = None) -> bytes:
    """Return the list of images, with sizes and stamps, and what is noted of some, as ``read_inputs`` reads it."""
    more = {name: f" {json.dumps(values, separators=(',', ':'))}" for name, values in (noted or {}).items()}
    lines = (f"{size} {stamp} {json.dumps(name)}{more.get(name, '')}\n".encode()
             for name, size, stamp in zip(images.names, images.sizes, images.stamps, strict=True))  # fmt: skip
    return gzip.compress(b"".join(lines), 1)


def save_inputs(
    path: Path, images: Images, noted: Mapping[str, journal.Noted] | None = None, fresh: Path | None = None
) -> None:
    """Save the list of images, so that changes can be found later, by way of ``fresh`` as ``disk.replace`` does."""
    disk.replace(path, encode_inputs(images, noted), fresh)


def read_inputs(path: Path, some: slice = slice(None)) -> list[tuple[str, int, int]]:
    """Return names, sizes and stamps of some of the images that ``save_inputs`` saved.

    Raises:
        OSError: The list is missing; EOFError, ValueError or zlib.error if it is damaged.
    """
    lines = (line.split(b" ", 2) for line in gzip.decompress(path.read_bytes()).splitlines()[some])
    # What is noted of an image follows its name, as a list without spaces.
    return [(json.loads(name if name.endswith(b'"') else name.rpartition(b" ")[0]), int(size), int(stamp))
            for size, stamp, name in lines]  # fmt: skip


def read_noted(path: Path) -> dict[str, journal.Noted]:
    """Return what ``save_inputs`` saved besides, by image; raise what ``read_inputs`` raises."""
    found = {}
    for line in gzip.decompress(path.read_bytes()).splitlines():
        if line.endswith(b"]"):
            name, _, values = line.split(b" ", 2)[2].rpartition(b" ")
            found[json.loads(name)] = json.loads(values)
    return found


def changed_inputs(path: Path, images: Images, excused: Set[str]) -> str:
    """Return how many images were added, removed or changed since ``save_inputs``, or "" if none.

    Args:
        path: The saved list.
        images: The images now.
        excused: Images that may have changed, because they could not be read.
    """
    try:
        before = {name: (size, mtime) for name, size, mtime in read_inputs(path)}
    except (OSError, EOFError, ValueError, zlib.error):
        return "the list of images changed"
    now = dict(zip(images.names, zip(images.sizes, images.stamps, strict=True), strict=True))
    found = {
        "added": len(now.keys() - before.keys()),
        "removed": len(before.keys() - now.keys()),
        "changed": sum(now[name] != before[name] for name in now.keys() & before.keys() - excused),
    }
    if not found["added"] and not found["removed"] and list(now) != list(before):
        return "the order of the images changed"
    return ", ".join(f"{count(number, 'image')} {word}" for word, number in found.items() if number)
