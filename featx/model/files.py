"""Read what is in a file of weights, whatever its form; nothing in it is run."""

import io
import json
import mmap
import os
import re
import struct
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from featx.errors import BadValueError, MissingPathError, UserError, first_line
from featx.model.unpickle import Unpickler

ZIP = b"PK\x03\x04"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before the zip format of 1.6


def load(file: str) -> Any:
    """Return the content of a weights file: dicts, lists, plain values, tensors on the CPU, and ``Unknown``.

    Raises:
        UserError: The file cannot be read, is damaged, or is not a checkpoint.
    """
    try:
        if file.endswith(".index.json"):
            return _read_shards(Path(file))
        with open(file, "rb") as opened:
            head = opened.read(512)
        if form := _other_form(file, head):
            raise BadValueError(f"--model.weights {file}: this is {form}")
        return _read(file, head)
    except UserError:
        raise
    except OSError as err:
        raise UserError(f"--model.weights {file}: {err.strerror or err}") from err
    except Exception as err:  # of any type, from damaged bytes
        raise BadValueError(
            f"--model.weights {file}: not a PyTorch checkpoint, or damaged "
            f"({type(err).__name__}: {first_line(err)[:100]}).\nExpected a file from "
            "torch.save(network.state_dict(), FILE), a checkpoint with that inside, or safetensors."
        ) from err


def _read(file: str, head: bytes) -> Any:
    if file.endswith(".safetensors") or head[8:9] == b"{":  # a length, then JSON
        return safetensors.torch.load_file(file)
    return _read_zip(file) if head[:4] == ZIP else _read_legacy(file)


def _other_form(file: str, head: bytes) -> str:
    """Return what a file is and what to do, if its form is known and is not a checkpoint's, else nothing."""
    names = []
    if head[:4] == ZIP:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    ends = {name.partition("/")[2] for name in names}
    if "constants.pkl" in ends:
        return (
            "a TorchScript program, and loading it runs its code.\nIf you trust it, write a state dict: "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
        )
    if {"archive_format", "models/model.json"} & ends or "serialized_exported_program.json" in names:
        return (
            "a program of torch.export.\nExpected the weights of a network: "
            "torch.save(torch.export.load(FILE).state_dict, NEW_FILE)"
        )
    if names and all(name.endswith(".npy") for name in names):
        return (
            "a file of numpy arrays.\nExpected tensors: "
            "torch.save({name: torch.from_numpy(array) for name, array in numpy.load(FILE).items()}, NEW_FILE)"
        )
    if file.endswith(".onnx") or re.match(rb"\x08[\x03-\x1f]\x12.?(pytorch|onnx)", head, re.DOTALL):
        return "an ONNX model.\nExpected the PyTorch checkpoint that it was exported from."
    if head[257:262] == b"ustar":
        return (
            "a tar archive. PyTorch wrote such files before 0.1.10.\nIf you trust it, write a new file: "
            "torch.save(torch.load(FILE, weights_only=False), NEW_FILE)"
        )
    if shard := re.fullmatch(r"(.+)-\d{5}-of-\d{5}(\.\w+)", os.path.basename(file)):
        index = f"{''.join(shard.groups())}.index.json"
        return f"one of several files with the weights.\nExpected the index next to them, {index}."
    return ""


def _read_shards(index: Path) -> Any:
    """Read weights in several files by the index that says which has what."""
    homes = json.loads(index.read_bytes())["weight_map"]
    shards: dict[str, Any] = {}
    for home in sorted(set(homes.values())):
        if os.path.basename(home) != home:
            raise UnpicklingError(f"{home!r} is not a file's name")
        if not (shard := index.parent / home).is_file():
            raise MissingPathError(
                f"--model.weights {index}: {home} is not next to it. Expected all files that it lists."
            )
        with shard.open("rb") as opened:
            shards[home] = _read(str(shard), opened.read(9))
    if lost := [name for name, home in homes.items() if name not in shards[home]]:
        raise UnpicklingError(f"{homes[lost[0]]} does not contain {lost[0]}")
    return {name: shards[home][name] for name, home in homes.items()}


class Budget:
    """Keeps a small file from claiming much memory: all that is read from it is at most its size."""

    def __init__(self, path: str) -> None:
        self._left = os.path.getsize(path)

    def take(self, size: int) -> None:
        """Count bytes that are about to be read; raise UnpicklingError if the file cannot contain them."""
        self._left -= size
        if self._left < 0:
            raise UnpicklingError(f"it claims {size:,} bytes that it does not contain")


def _read_zip(path: str) -> Any:
    budget = Budget(path)
    known: dict[str, Tensor] = {}
    with zipfile.ZipFile(path) as archive:

        def content(name: str) -> bytes:
            info = archive.getinfo(name)
            if info.compress_type != zipfile.ZIP_STORED:
                raise UnpicklingError(f"{name} is compressed")
            budget.take(info.file_size)
            return archive.read(info)

        def storage(key: str, size: int) -> Tensor:
            if key not in known:
                known[key] = torch.empty(0, dtype=torch.uint8)
                if found := content(f"{root}data/{key}"):
                    known[key] = torch.frombuffer(bytearray(found), dtype=torch.uint8)
            return known[key]

        roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.split("/")[-1] == "data.pkl"]
        if len(roots) != 1:
            raise UnpicklingError("a zip file without one data.pkl")
        root = roots[0]
        if f"{root}byteorder" in archive.namelist() and content(f"{root}byteorder") != b"little":
            raise UnpicklingError("written on a big-endian machine")
        return Unpickler(io.BytesIO(content(f"{root}data.pkl")), storage).load()


def _read_legacy(path: str) -> Any:
    budget = Budget(path)
    known: dict[str, Tensor] = {}

    def storage(key: str, size: int) -> Tensor:
        if key not in known:
            budget.take(size)
            known[key] = torch.empty(size, dtype=torch.uint8)  # its bytes come after the pickle
        return known[key]

    with open(path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        # unlike a file's, the read() of a mmap makes no room for more bytes than there are
        if Unpickler(file).load() != MAGIC or Unpickler(file).load() != PROTOCOL:
            raise UnpicklingError("no magic number of torch.save")
        system = Unpickler(file).load()
        if not system["little_endian"]:
            raise UnpicklingError("written on a big-endian machine")
        result = Unpickler(file, storage).load()
        keys = Unpickler(file).load()
        if set(keys) != set(known):
            raise UnpicklingError("it does not contain all of its storages")
        for key in keys:
            values = known[key]
            (number,) = struct.unpack("<q", file.read(8))
            if number < 0 or number > values.numel() or (number and values.numel() % number):
                raise UnpicklingError(f"storage {key} has {number} values, expected {values.numel()} bytes")
            values.numpy()[:] = np.frombuffer(file.read(values.numel()), dtype=np.uint8)
        return result
