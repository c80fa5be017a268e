"""What made this file: the identity of a run, its record LAYER.json, and what two of them differ in."""

import gzip
import hashlib
import inspect
import json
import platform
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision

from featx import disk, extractor, formats, journal, preprocess
from featx.datamodule import ImageFolderDataModule
from featx.extractor import SLICE, FeatureExtractor
from featx.images import ImageTree
from featx.messages import BadValueError, count
from featx.reader import is_result_name as is_result_name
from featx.reader import read_record as read_record

Json = dict[str, Any]

# Keys of an identity that were added to it, each with the value that decided before. Nothing is ever taken out.
SINCE: Json = {"revisions": {"preprocessing": 1, "pass": 1, "text": 1}}


def identity(trainer: Any, model: FeatureExtractor, data: ImageFolderDataModule, layer: str) -> Json:
    """Return everything that decides a value of one layer's rows, as plain values for JSON."""
    preprocessing = asdict(data.preprocessing(model.preprocessing))
    del preprocessing["source"]  # where the values come from decides nothing
    return {
        "network": model.title,
        "weights": model.weights_digest,
        "layer": layer,
        "module": model.layers[layer],
        "pool": model.pool,
        "preprocessing": json.loads(json.dumps(preprocessing)),
        "value_range": list(data.value_range) if data.value_range else None,
        "decoder": data.decoder,
        "strict": data.strict,
        "batch_size": data.batch_size,
        "precision": str(trainer.precision),
        "memory_layout": model.memory_layout,
        "compiled": model.compile,
        "images_a_slice": SLICE,
        "threads_a_slice": 1,
        "revisions": {
            "preprocessing": preprocess.REVISION,
            "pass": extractor.REVISION,
            "text": formats.REVISION,
        },
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
            "simplejpeg": version("simplejpeg"),
            **model.packages,
        },
    }


def complete(identity: Json) -> Json:
    """Return an identity with the keys that are newer than it, at the values that decided then."""
    found = dict(identity)
    for key, then in SINCE.items():
        found[key] = {**then, **identity.get(key, {})} if isinstance(then, dict) else identity.get(key, then)
    found["versions"] = {name: value for name, value in identity["versions"].items() if name != "featx"}  # in format 1
    return found


def digest(identity: Json, images: ImageTree) -> str:
    """Return the SHA-256 of an identity and the images' names, which stays the same when later versions add keys."""
    known = complete(identity)
    for key, then in SINCE.items():
        if isinstance(then, dict):
            known[key] = {name: value for name, value in known[key].items() if value != then.get(name)}
        if known[key] in (then, {}):
            del known[key]
    found = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    found.update(images.names.blob)
    found.update(images.names.ends.data)
    return found.hexdigest()


def public_name(owner: type) -> str:
    """Return what a class is called in ``--model`` and in records: featx's own stays the same wherever it moves."""
    return "featx.FeatureExtractor" if owner is FeatureExtractor else f"{owner.__module__}.{owner.__qualname__}"


def options(owner: object) -> Json:
    """Return the options that an object was made with, where it keeps them under their names."""
    names = inspect.signature(type(owner)).parameters
    return {name: getattr(owner, name) for name in names if hasattr(owner, name)}


def inputs(images: ImageTree) -> Json:
    """Return how many images there are, and a digest of their names, sizes and times."""
    return {"images": len(images), "digest": images.digest()}


def differences(old: Json, new: Json) -> list[str]:
    """Return a line for each value of two identities that differs, as ``weights: 3f2a51c0… -> 9c1b77de…``."""
    old_known, new_known = complete(old), complete(new)
    if "revisions" not in old:  # format 1 did not have the packages of the network's code
        new_known["versions"] = {name: new_known["versions"].get(name) for name in old_known["versions"]}
    return differing(old_known, new_known)


def differing(old: Json, new: Json, path: str = "") -> list[str]:
    """Return a line for each value that differs, as ``preprocessing.crop: 224 -> 200``."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differing(before, after, f"{path}{key}.")
        elif before != after:
            lines.append(f"{path}{key}: {_short(before)} -> {_short(after)}")
    return lines


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"{text[:8]}…" if len(text) == 64 and text.isalnum() else text if len(text) <= 60 else f"{text[:57]}…"


def device_name(device: torch.device) -> str:
    """Return what computes, as ``AMD EPYC 9R14`` or ``NVIDIA H100``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        return next(line for line in file if line.startswith("model name")).split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or device.type


def as_json(record: Json) -> bytes:
    """Return a record as indented JSON, names and paths readable."""
    return json.dumps(record, indent=2, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n"


def read_json(path: Path) -> Json | None:
    """Return a record, or None where there is none that can be read."""
    with suppress(OSError, ValueError):
        record = json.loads(path.read_bytes().decode("utf-8", "surrogateescape"))
        return record if isinstance(record, dict) else None
    return None


def read_run(path: Path) -> Json | None:
    """Return what ``run.json`` says of an unfinished run, or None where there is none that can be read.

    Raises:
        BadValueError: It is none of featx's, or of a newer featx.
    """
    if (run := read_json(path)) is None:
        return None
    journal.check_format(path, run)
    if not all(isinstance(run.get(key), dict) for key in ("identity", "inputs")):
        raise BadValueError(f"{path}: not as featx writes it. Remove it, or give another --writer.out_dir.")
    return run


def save_inputs(path: Path, images: ImageTree) -> None:
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


def changed_inputs(path: Path, images: ImageTree, excused: Sequence[str]) -> str:
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
    free = set(excused)
    added = changed = 0
    for name, size, mtime in zip(images.names, np.asarray(images.sizes), np.asarray(images.mtimes), strict=True):
        found = before.pop(name, None)
        added += found is None
        changed += found is not None and found != (size, mtime) and name not in free
    told = {"added": added, "removed": len(before), "changed": changed}
    if not (added or before or same_order):
        return "the order of the images changed"
    return ", ".join(f"{count(number, 'image')} {word}" for word, number in told.items() if number)
