"""What made this file: the identity of a run, its record LAYER.json, and what two of them differ in."""

import gzip
import hashlib
import inspect
import json
import re
import zlib
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from featx.data.batch import Images
from featx.errors import BadValueError, count
from featx.writer import disk, journal
from featx.writer.formats import SUFFIXES

Json = dict[str, Any]

NOTHING = type(None)
SHAPE: dict[tuple[type, ...], str] = {  # what a record is read for; whatever else it says is left as it is
    (str,): "layer inputs.digest identity.weights identity.decoder identity.precision identity.names "
    "run.options.model_class run.options.data.dir",
    (int,): "rows columns errors errors_used inputs.images",
    (dict,): "files run.options.model",
    (bool,): "identity.header",
    (list, NOTHING): "identity.value_range",
    (int, NOTHING): "identity.shard_rows",
}
IN_WORDS = {str: "text", int: "a number", dict: "an object", list: "a list", bool: "true or false", NOTHING: "null"}
# Keys of an identity that were added to it, dotted, each with the value that decided before. Nothing is ever taken out.
SINCE: Json = {"revisions.preprocessing": 1, "revisions.pass": 1, "revisions.text": 1, "preprocessing.pad": True}


def merge(*parts: Json) -> Json:
    """Return one identity of several, each of which may have ``versions`` and ``revisions``."""
    found: Json = {}
    for part in parts:
        for key, value in part.items():
            found[key] = {**found.get(key, {}), **value} if isinstance(value, dict) else value
    return found


def flat(record: Json, path: str = "") -> Json:
    """Return all values at dotted keys, as ``preprocessing.crop``."""
    found: Json = {}
    for key, value in record.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def digest(identity: Json, images: Images) -> str:
    """Return the SHA-256 of an identity and the images' names, which stays the same when later versions add keys."""
    known = {key: value for key, value in flat(identity).items() if key not in SINCE or value != SINCE[key]}
    return hashlib.sha256((json.dumps(known, sort_keys=True) + images.digest_of_names()).encode()).hexdigest()


def public_name(owner: type) -> str:
    """Return what a class is called in ``--model`` and in records: featx's own stay the same wherever they move."""
    package = owner.__module__.split(".")[0]
    return f"{package if package == 'featx' else owner.__module__}.{owner.__qualname__}"


def options(owner: object) -> Json:
    """Return the options that an object was made with, where it keeps them under their names."""
    names = inspect.signature(type(owner)).parameters
    return {name: getattr(owner, name) for name in names if hasattr(owner, name)}


def differences(old: Json, new: Json) -> list[str]:
    """Return a line for each value of two identities that differs, as ``preprocessing.crop: 224 -> 200``."""
    before, after = flat(old), flat(new)
    before.pop("versions.featx", None)  # in format 1
    if "revisions" not in old:  # format 1 did not have the packages of the network's code
        after = {key: value for key, value in after.items() if not key.startswith("versions.") or key in before}
    pairs = [(key, before.get(key, SINCE.get(key)), after.get(key, SINCE.get(key))) for key in {**before, **after}]
    return [f"{key}: {_short(then)} -> {_short(now)}" for key, then, now in pairs if then != now]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else _as_text(value)
    return f"{text[:8]}…" if len(text) == 64 and text.isalnum() else _cut(text)


def _as_text(value: Any) -> str:
    return _cut(json.dumps(value, ensure_ascii=False))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}…"


def as_json(record: Json) -> bytes:
    """Return a record as indented JSON, names and paths readable."""
    return json.dumps(record, indent=2, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n"


def read_record(path: Path, layer: str | None = None) -> dict[str, Any] | None:
    """Return what LAYER.json says, or None where there is no such file.

    Args:
        path: LAYER.json.
        layer: The layer that it must be of, where its files are to be replaced; without it, it may have been renamed.

    Raises:
        BadValueError: It is no record of featx, or one of a newer featx.
    """
    try:
        found = _load(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as err:
        wrong = getattr(err, "strerror", None) or f"it is not JSON ({type(err).__name__}: {err})"
    else:
        if isinstance(found, dict):
            journal.check_format(path, found)
        if not (wrong := _wrong(found, layer)):
            return dict(found)
    raise BadValueError(f"{path}: not a record of featx: {wrong}.\nExpected what featx predict wrote with its files.")


def _load(path: Path) -> Any:
    return json.loads(path.read_bytes().decode("utf-8", "surrogateescape"))


def is_result_name(layer: str, name: str) -> bool:
    """Return whether a layer's file may have this name in its record, as ``fc7.csv`` or ``fc7/00000.csv``."""
    stem, kinds = layer.replace("/", "%2F"), "|".join(map(re.escape, SUFFIXES))
    allowed = rf"{re.escape(stem)}(/[0-9]{{5,}})?\.({kinds})"
    return stem not in ("", ".", "..") and re.fullmatch(allowed, name) is not None


def _wrong(record: Any, layer: str | None) -> str:
    """Say what of a record is not as featx writes it, or return nothing."""
    for kinds, key in ((kinds, key) for kinds, keys in SHAPE.items() for key in keys.split()):
        value = record
        for word in key.split("."):
            if not isinstance(value, dict) or word not in value:
                return f"it has no {key}"
            value = value[word]
        if type(value) not in kinds or value == "" or (type(value) is int and value < 0):
            return f"{key} is {_as_text(value)}, expected {' or '.join(IN_WORDS[kind] for kind in kinds)}"
    if layer is not None and record["layer"] != layer:
        return f"layer is {_as_text(record['layer'])}, expected {_as_text(layer)}"
    bounds, size = record["identity"]["value_range"] or [0, 1], record["identity"]["shard_rows"]
    if len(bounds) != 2 or not all(type(bound) in (int, float) for bound in bounds) or not bounds[0] < bounds[1]:
        return f"identity.value_range is {_as_text(bounds)}, expected two numbers, the lower first"
    for name, said in record["files"].items():
        of_shards = name.partition("/")[2].partition(".")[0]
        right = is_result_name(record["layer"], name) and bool(of_shards) == (size is not None)
        if not right or (size is not None and int(of_shards) * size >= record["inputs"]["images"]):
            return f"files names {_as_text(name)}, which is no file of layer {_as_text(record['layer'])}"
        known = said if isinstance(said, dict) else {}
        counts = [known.get("bytes"), known.get("rows", 0)]
        sha256 = known.get("sha256")
        if not all(type(number) is int and number >= 0 for number in counts) or not isinstance(sha256, str):
            return f"files says {_as_text(said)} of {name}, expected sha256 and bytes"
    return "" if record["files"] else "files names none"


def read_run(path: Path) -> Json | None:
    """Return what ``run.json`` says of an unfinished run, or None where there is none that can be read.

    Raises:
        BadValueError: It is none of featx's, or of a newer featx.
    """
    run = None
    with suppress(OSError, ValueError):
        run = _load(path)
    if not isinstance(run, dict):
        return None
    journal.check_format(path, run)
    if not all(isinstance(run.get(key), dict) for key in ("identity", "inputs")):
        raise BadValueError(f"{path}: not as featx writes it. Remove it, or give another --writer.out_dir.")
    return run


def save_inputs(path: Path, images: Images) -> None:
    """Keep the list of images, with sizes and times, to tell later what changed."""
    lines = (f"{size} {mtime} {json.dumps(name)}\n".encode()
             for name, size, mtime in zip(images.names, images.sizes, images.mtimes, strict=True))  # fmt: skip
    disk.replace(path, gzip.compress(b"".join(lines), 1))


def read_inputs(path: Path, some: slice = slice(None)) -> list[tuple[str, int, int]]:
    """Return names, sizes and times of some of the images that ``save_inputs`` kept.

    Raises:
        OSError: There is no such list; or EOFError, ValueError or zlib.error: it is damaged.
    """
    lines = (line.split(b" ", 2) for line in gzip.decompress(path.read_bytes()).splitlines()[some])
    return [(json.loads(name), int(size), int(mtime)) for size, mtime, name in lines]


def changed_inputs(path: Path, images: Images, excused: Collection[str]) -> str:
    """Say how many images were added, removed or changed since ``save_inputs``, or return nothing.

    Args:
        path: The list kept then.
        images: The images now.
        excused: Images that could not be read then: they may have changed.
    """
    try:
        before = {name: (size, mtime) for name, size, mtime in read_inputs(path)}
    except (OSError, EOFError, ValueError, zlib.error):
        return "the list of images is another"
    same_order = list(before) == list(images.names)
    found = {"added": 0, "removed": 0, "changed": 0}
    for name, size, mtime in zip(images.names, images.sizes, images.mtimes, strict=True):
        if (then := before.pop(name, None)) is None:
            found["added"] += 1
        elif then != (size, mtime) and name not in excused:
            found["changed"] += 1
    found["removed"] = len(before)
    if not (found["added"] or before or same_order):
        return "the order of the images changed"
    return ", ".join(f"{count(number, 'image')} {word}" for word, number in found.items() if number)
