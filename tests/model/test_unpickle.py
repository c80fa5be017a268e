"""Hostile files: whatever a pickle says, nothing is imported, called or changed, and no memory is claimed for it."""

import argparse
import codecs
import io
import os
import pickle
import random
import struct
import sys
import tarfile
import zipfile
from contextlib import contextmanager, suppress
from pickle import UnpicklingError

import numpy as np
import pytest
import torch
from torch import nn

from featx.errors import BadValueError
from featx.model import files
from featx.model.checkpoint import read_checkpoint
from featx.model.unpickle import Global, Storage, Unknown, Unpickler

EVENTS: list[str] = []
watching = False
PLAIN = {dict, list, tuple, str, bytes, int, float, bool, type(None), torch.Tensor, Unknown, Global, Storage}


def watch(event, args):
    if watching:
        EVENTS.append(f"{event} {args}")


sys.addaudithook(watch)  # it cannot be removed: https://docs.python.org/3/library/sys.html#sys.addaudithook


@contextmanager
def nothing_happens():
    """Expect that no module is imported, no code made or run, no file or process touched within this context."""
    global watching
    EVENTS.clear()
    watching = True
    try:
        yield
    finally:
        watching = False
    assert EVENTS == []


def storage(key, size):
    return torch.arange(16, dtype=torch.uint8)


def unpickle(content):
    with nothing_happens():
        return Unpickler(io.BytesIO(content), storage).load()


def name(module, name):
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


RUN = text("open('/tmp/ran', 'w')")
REBUILD, SYSTEM, EXEC = name("torch._utils", "_rebuild_tensor_v2"), name("os", "system"), name("builtins", "exec")
HOSTILE = {
    "a call": SYSTEM + RUN + b"\x85R.",
    "a call in the classes of an instance": b"(" + RUN + b"ios\nsystem\n.",
    "a call as an object": b"(" + SYSTEM + RUN + b"o.",
    "a new object": name("subprocess", "Popen") + RUN + b"\x85\x81.",
    "a new object with keywords": b"\x80\x04" + name("subprocess", "Popen") + b")}\x92.",
    "a dotted name": b"\x80\x04" + text("torch") + text("os.system") + b"\x93" + RUN + b"\x85R.",
    "a dotted name of an allowed class": text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93.",
    "a registered extension": b"\x82\x01.",
    "copyreg": name("copyreg", "_reconstructor") + SYSTEM + name("builtins", "object") + b"N\x87R.",
    "a call of the result of a call": name("builtins", "getattr") + SYSTEM + text("__call__") + b"\x86R"
        + RUN + b"\x85R.",
    "a partial": name("functools", "partial") + EXEC + RUN + b"\x86R)R.",
    "a state with __setstate__": name("m", "A") + b")R}" + text("__setstate__") + EXEC + b"sb" + RUN + b"b.",
    "a state with slots": name("m", "A") + b")RN}" + text("__class__") + EXEC + b"s\x86b.",
    "a function's state": REBUILD + b"N}" + text("__defaults__") + b")s\x86b.",
    "a class's state": name("torch.nn.parameter", "Parameter") + b"N}" + text("__torch_function__") + EXEC + b"s\x86b.",
    "a dict's state": name("collections", "OrderedDict") + b")RN}" + text("update") + EXEC + b"s\x86b.",
    "a name as a list": SYSTEM + RUN + b"a(" + RUN + b"e.",
    "a name as a dict": SYSTEM + RUN + RUN + b"s(" + RUN + RUN + b"u.",
    "a key with a hash of its own": b"}" + name("m", "A") + b")R" + RUN + b"s.",
    "a name in place of a wrapped function": name("torch._tensor", "_rebuild_from_type_v2") + b"(" + SYSTEM + SYSTEM
        + RUN + b"\x85}tR.",
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_pickle_runs_nothing(what):
    before = torch._utils._rebuild_tensor_v2.__defaults__, nn.Parameter.__torch_function__
    with_extensions = what == "a registered extension"
    try:
        check_plain(unpickle(HOSTILE[what]))
        assert not with_extensions
    except KeyError:
        assert with_extensions
    assert not os.path.exists("/tmp/ran")
    assert (torch._utils._rebuild_tensor_v2.__defaults__, nn.Parameter.__torch_function__) == before


def check_plain(value):
    """Expect only plain types, down to the innermost."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        assert type(value) in PLAIN
        if id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                waiting += [*value.keys(), *value.values()]
            if isinstance(value, list | tuple):
                waiting += value
            if isinstance(value, Unknown):
                waiting += [value.type, value.state]


def persistent(*what):
    return b"(" + b"".join(text(each) if isinstance(each, str) else each for each in what) + b"tQ"


FLOATS = persistent("storage", name("torch", "FloatStorage"), "0", "cpu", b"K\x04")  # of 16 bytes


@pytest.mark.parametrize(
    "content",
    [
        persistent(SYSTEM, RUN),
        persistent("module", SYSTEM, "/etc/passwd", "source"),
        persistent("storage", SYSTEM, "0", "cpu", b"K\x04"),
        persistent("storage", name("torch", "FloatStorage"), SYSTEM, "cpu", b"K\x04"),
        persistent("storage", name("torch", "FloatStorage"), "0", "cpu", b"K\x05"),
        persistent("storage", name("torch", "FloatStorage"), "0", "cpu", b"J\xff\xff\xff\xff"),
        persistent("storage", name("torch", "FloatStorage"), "0", "cpu", b"K\x04", b"(K\x00K\x02K\x04t"),
        b"P0\n",
        REBUILD + b"(" + FLOATS + b"K\x00K\x05\x85K\x01\x85\x89}tR",  # five of four values
        REBUILD + b"(" + FLOATS + b"K\x01K\x04\x85K\x01\x85\x89}tR",
        REBUILD + b"(" + FLOATS + b"J\xff\xff\xff\xffK\x04\x85K\x01\x85\x89}tR",
        REBUILD + b"(" + FLOATS + b"K\x00K\x04\x85J\xff\xff\xff\xff\x85\x89}tR",
        REBUILD + b"(" + FLOATS + b"K\x00K\x04\x85)\x89}tR",
        REBUILD + b"(" + FLOATS + b"K\x00J\x00\x00\x00\x10\x85K\x00\x85\x89}tR",  # one value, 268 million times
        REBUILD + b"(" + SYSTEM + b"K\x00K\x04\x85K\x01\x85\x89}tR",
        REBUILD + b"(" + FLOATS + b"K\x00" + RUN + b"K\x01\x85\x89}tR",
        REBUILD + b"]R",
        b"\x80\x04\x96" + struct.pack("<Q", 1 << 40),  # a bytearray of a terabyte
    ],
)
def test_a_storage_that_is_none_and_a_tensor_beyond_its_end_are_refused_or_left_out(content):
    with pytest.raises((UnpicklingError, ValueError, TypeError, KeyError)) as caught:
        check_plain(unpickle(content + b"."))
        raise KeyError("left out")
    assert not isinstance(caught.value, MemoryError)


def test_tensors_are_what_their_numbers_say():
    found = unpickle(REBUILD + b"(" + FLOATS + b"K\x01K\x03\x85K\x01\x85\x89}tR.")
    assert torch.equal(found, torch.arange(16, dtype=torch.uint8).view(torch.float32)[1:])
    assert unpickle(REBUILD + b"(" + FLOATS + b"K\x00K\x00\x85K\x01\x85\x89}tR.").shape == (0,)
    flipped = unpickle(REBUILD + b"(" + FLOATS + b"K\x00K\x04\x85K\x01\x85\x89}}" + text("neg") + b"\x88stR.")
    assert flipped.type == "torch.Tensor"  # all values are to be negated, which no published file needs


def test_random_operations_run_nothing():
    fuzz(seed=0, programs=1500)


def fuzz(seed, programs):
    """Run programs of random operations that are mostly valid, and expect plain values or an exception."""
    chance = random.Random(seed)
    words = [RUN, text("__setstate__"), text("__class__"), text("__dict__"), text("storage"), b"K\x03", b"N", b")",
             b"}", b"]", b"(", b"\x8f", b"G" + bytes(8), b"\x8a\x01\x05", b"0", b"2", b"1"]  # fmt: skip
    things = [SYSTEM, EXEC, REBUILD, FLOATS, name("collections", "OrderedDict"), name("builtins", "set"),
              name("torch._tensor", "_rebuild_from_type_v2"), name("torch._utils", "_rebuild_tensor_v3"),
              name("torch", "float32"), name("torch.nn.parameter", "Parameter")]  # fmt: skip
    acts = [b"R", b"\x81", b"\x92", b"b", b"o", b"ios\nsystem\n", b"t", b"\x85", b"\x86", b"\x87", b"s", b"u", b"a",
            b"e", b"d", b"l", b"\x90", b"\x91", b"\x93", b"Q", b"q\x01", b"h\x01", b"\x94", b"\x82\x01"]  # fmt: skip
    finished = 0
    for _ in range(programs):
        program = b"".join(chance.choice(chance.choice((words, things, acts))) for _ in range(chance.randrange(2, 40)))
        if chance.random() < 0.1:
            program += bytes(chance.randrange(256) for _ in range(5))
        try:
            check_plain(unpickle(program + b"."))
            finished += 1
        except AssertionError:
            raise
        except Exception:  # of any type
            continue
    assert finished > programs / 50


def save(path, content, form):
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_hostile_file_gives_its_tensors_and_runs_nothing(tmp_path, form):
    evil = Hostile(str(tmp_path / "ran"))
    content = {"state_dict": {"weight": torch.ones(3), "bias": torch.ones(3)}, "deep": [{"in": (evil,)}], "top": evil}
    save(tmp_path / "w.pth", content, form)
    assert read_checkpoint(str(tmp_path / "w.pth")).keys() == {"weight", "bias"}
    assert files.load(str(tmp_path / "w.pth"))["top"].type == f"{os.mkdir.__module__}.mkdir"
    assert not (tmp_path / "ran").exists()
    assert torch.load(tmp_path / "w.pth", weights_only=False) and (tmp_path / "ran").exists()  # it would have


def test_a_tar_of_old_is_refused_and_nothing_extracted(tmp_path):
    with tarfile.open(tmp_path / "w.pth", "w") as archive:
        link = tarfile.TarInfo("storages")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
    with pytest.raises(BadValueError, match=r"this is a tar archive. PyTorch wrote such files before 0.1.10"):
        files.load(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_tensors_of_every_dtype_and_shape_come_to_the_bit(tmp_path, form):
    base = torch.arange(24.0)
    dtypes = ["float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "complex64"]
    content = {dtype: base.view(2, 3, 4).to(getattr(torch, dtype)) for dtype in dtypes}
    content |= {"bool": base > 3, "view": base[3:9], "again": base, "strided": base.view(4, 6).t()[1:],
                "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "parameter": nn.Parameter(base),
                "expanded": torch.ones(1).expand(7), "half of it": base.half()[4:]}  # fmt: skip
    if form == "zip":
        content["small"] = base.to(torch.float8_e4m3fn)
        content["unsigned"] = base.to(torch.uint16)
    save(tmp_path / "w.pth", content, form)
    found = files.load(str(tmp_path / "w.pth"))
    for key, value in content.items():
        assert type(found[key]) is torch.Tensor and found[key].dtype == value.dtype and found[key].shape == value.shape
        assert found[key].stride() == value.stride()
        assert torch.equal(found[key].to(torch.complex128), value.detach().to(torch.complex128))
    assert found["view"].untyped_storage().data_ptr() == found["again"].untyped_storage().data_ptr()


def test_what_is_no_tensor_is_named_and_keeps_its_values(tmp_path):
    content = {"args": argparse.Namespace(lr=0.1), "best": np.float64(3), "device": torch.device("cpu"), "set": {1, 2}}
    torch.save(content, tmp_path / "w.pth")
    found = files.load(str(tmp_path / "w.pth"))
    assert (found["args"].type, found["args"].state) == ("argparse.Namespace", {"lr": 0.1})
    assert "scalar" in found["best"].type and found["device"].type == "torch.device" and found["set"] == [1, 2]


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_file_that_claims_more_than_it_has_is_refused_without_the_memory(tmp_path, form):
    save(tmp_path / "w.pth", {"w": torch.ones(1000)}, form)
    content = (tmp_path / "w.pth").read_bytes()
    number = b"M" + struct.pack("<H", 1000)  # in the storage's id
    assert content.count(number) > 0
    changed = content.replace(number, b"J" + struct.pack("<i", 2_000_000_000))
    if form == "zip":
        with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(tmp_path / "w.pth", "w") as target:
            for info in source.infolist():
                data = source.read(info).replace(number, b"J" + struct.pack("<i", 2_000_000_000))
                target.writestr(info.filename, data)
    else:
        (tmp_path / "w.pth").write_bytes(changed)
    with pytest.raises(BadValueError, match=r"damaged \(UnpicklingError: .* bytes"):
        files.load(str(tmp_path / "w.pth"))


def test_a_compressed_bomb_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", bytes(1 << 20))
    with pytest.raises(BadValueError, match=r"data\.pkl is compressed"):
        files.load(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("pickled", [b"(" * 200_000 + b"t" * 200_000, b"N" + b"\x85" * 200_000])
def test_deep_nesting_and_dicts_within_themselves_end(tmp_path, pickled):
    with suppress(UnpicklingError):
        check_plain(unpickle(b"}" + pickled + b"Ns."))
    path = tmp_path / "w.pth"
    loop: dict = {"a": {}, "tensors": {"w": torch.ones(1)}}
    for key in "bcd":
        loop["a"][key] = [loop] * 50
    torch.save(loop, path)
    assert read_checkpoint(str(path)).keys() == {"w"}


def test_names_that_cannot_be_printed_are_left_out(tmp_path):
    torch.save({"\x1b[2Jw": torch.ones(1), "w": torch.ones(1), "v": torch.ones(1)}, tmp_path / "w.pth")
    assert read_checkpoint(str(tmp_path / "w.pth")).keys() == {"w", "v"}


def test_python_2s_bytes_and_every_protocol_are_read():
    codecs.lookup("raw_unicode_escape")  # of protocol 0; Python imports it when it is first used
    assert unpickle(b"\x80\x02U\x02\xe9\x61.") == "éa"
    for protocol in range(6):
        assert unpickle(pickle.dumps({"a": [1, 2.5, ("b", None, True, 1 << 70)]}, protocol)) == {
            "a": [1, 2.5, ("b", None, True, 1 << 70)]
        }
