"""Unpickle tensors and plain values without importing or calling anything that a file names.

Python's ``pickle`` imports and calls what a file says, and so does ``torch.load`` in files that contain more than
tensors: https://docs.python.org/3/library/pickle.html. Here the operations that make plain values are Python's, and
each that could call something has its own method, which makes a tensor from checked numbers or an ``Unknown``.
"""

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
from torch import Tensor

PLAIN = (  # operations that make strings, numbers, tuples and lists, or move them
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP, pickle.GET,
    pickle.BINGET, pickle.LONG_BINGET, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.NONE,
    pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG,
    pickle.LONG1, pickle.LONG4, pickle.FLOAT, pickle.BINFLOAT, pickle.STRING, pickle.BINSTRING,
    pickle.SHORT_BINSTRING, pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8,
    pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1,
    pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.LIST, pickle.EMPTY_DICT,
)  # fmt: skip
DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64, "UntypedStorage": torch.uint8,
}  # fmt: skip
MOST_REPEATED = 1 << 24  # values in a tensor that repeats those of its storage by a stride of 0
NAMED_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


@dataclass(frozen=True)
class Global:
    """The name of a class or function in a file, which is never imported."""

    name: str


class Unknown(dict[Any, Any]):
    """An object of a class that is not imported, with its items if it is a mapping.

    Attributes:
        type: The name of the class.
        state: What the file would set as the object's attributes.
    """

    def __init__(self, type: str) -> None:
        super().__init__()
        self.type = type
        self.state: dict[Any, Any] = {}


@dataclass(frozen=True)
class Storage:
    """The bytes of one or more tensors, ``(N,) uint8``."""

    bytes: Tensor
    dtype: torch.dtype


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise UnpicklingError(f"expected a size, got {type(value).__name__}")
    return value


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *options: Any) -> Tensor:
    """Return a tensor on a storage's bytes, as ``torch._utils._rebuild_tensor``, but never beyond their end.

    ``Tensor.set_`` enlarges a storage that is too small, by memory that nobody wrote.
    """
    if type(storage) is not Storage or type(size) is not tuple or type(stride) is not tuple:
        raise UnpicklingError("a tensor without a storage or shape")
    offset, size, stride = _count(offset), tuple(map(_count, size)), tuple(map(_count, stride))
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    values = storage.bytes.view(storage.dtype)
    if 0 in size:
        return values.new_empty(size)
    if last >= len(values) or math.prod(size) > max(len(values), MOST_REPEATED):
        raise UnpicklingError(f"a tensor of {size} is larger than its storage of {len(values)} values")
    return values.as_strided(size, stride, offset)


def _tensor_v2(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, meta: Any = None) -> Any:
    # meta: bits that say that all values are to be negated or conjugated
    return Unknown("torch.Tensor") if meta else _tensor(storage, offset, size, stride)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, meta: Any = None
) -> Any:
    if type(storage) is not Storage or type(dtype) is not Global or dtype.name not in NAMED_DTYPES:
        raise UnpicklingError("a tensor without a storage or dtype")
    return _tensor_v2(Storage(storage.bytes, NAMED_DTYPES[dtype.name]), offset, size, stride, grad, hooks, meta)


def _same(tensor: Any, *options: Any) -> Any:
    return tensor


def _from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    return _make(function, args)


def _set(items: Any = ()) -> list[Any]:
    return list(items)


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    return _plain_keys([value for pair in pairs for value in pair])


def _make(function: Any, args: Any) -> Any:
    """Return what calling a function or class of the file would give if it is a tensor or a dict, else an Unknown."""
    if type(args) is not tuple:
        raise UnpicklingError(f"arguments of type {type(args).__name__}")
    if type(function) is not Global:
        return Unknown(type(function).__name__)
    return MADE[function.name](*args) if function.name in MADE else Unknown(function.name)


MADE: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _same,
    "torch.nn.parameter.Parameter": _same,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _set,
    "__builtin__.set": _set,
}


def _plain_keys(items: list[Any]) -> dict[Any, Any]:
    """Return a dict of alternating keys and values, without those whose keys are not plain.

    Hashing a deeply nested tuple ends the process.
    """
    pairs = zip(items[::2], items[1::2], strict=True)
    return {key: value for key, value in pairs if type(key) in (str, int, float, bool, bytes, type(None))}


class Unpickler(pickle._Unpickler):
    """Python's own, with only those of its operations that make plain values; nothing in a file is called.

    Args:
        file: Has ``read`` and ``readline``.
        storage: Returns the bytes of a storage, ``(N,) uint8``, by its key and the size that the file claims.
    """

    stack: list[Any]
    readline: Callable[[], bytes]

    def __init__(self, file: Any, storage: Callable[[str, int], Tensor] | None = None) -> None:
        super().__init__(file, encoding="latin1")  # of Python 2's strings, which need not be ASCII
        self._storage = storage

    def _pop_mark(self) -> list[Any]:
        return self.pop_mark()  # type: ignore[attr-defined, no-any-return]

    def _global(self) -> None:
        module, name = (self.readline()[:-1].decode() for _ in range(2))
        self.stack.append(Global(f"{module}.{name}"))

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise UnpicklingError("a name that is no string")
        self.stack.append(Global(f"{module}.{name}"))

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = _make(self.stack[-1], args)

    def _new_with_keywords(self) -> None:
        self.stack.pop()
        self._reduce()

    def _instance(self) -> None:
        args = self._pop_mark()
        self._global()
        self.stack[-1] = _make(self.stack[-1], tuple(args))

    def _object(self) -> None:
        kind, *args = self._pop_mark()
        self.stack.append(_make(kind, tuple(args)))

    def _build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is Unknown:
            for part in state if type(state) is tuple else (state,):  # attributes, and those with slots
                if type(part) is dict:
                    self.stack[-1].state |= part

    def _list(self) -> None:
        self.stack.append([])

    def _frozenset(self) -> None:
        values = self._pop_mark()  # which puts another list in self.stack
        self.stack.append(values)

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(values)

    def _dict(self) -> None:
        items = self._pop_mark()
        self.stack.append(_plain_keys(items))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _set_items(self) -> None:
        self._update(self._pop_mark())

    def _update(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(_plain_keys(items))

    def _persistent(self) -> None:
        what = self.stack.pop()
        if type(what) is not tuple or len(what) < 2:
            raise UnpicklingError("an unknown persistent id")
        if what[0] == "module":  # before the zip format: a class with its source
            self.stack.append(what[1])
            return
        word, kind, key, _, number, *view = what
        if self._storage is None or word != "storage" or type(kind) is not Global or type(key) not in (str, int):
            raise UnpicklingError("an unknown persistent id")
        self.stack.append(self._find_storage(kind.name, str(key), _count(number), *view))

    def _find_storage(self, kind: str, key: str, number: int, view: Any = None) -> Any:
        assert self._storage is not None
        name = kind.split(".")[-1]
        if name not in DTYPES:
            return Unknown(kind)
        dtype = DTYPES[name]
        size = number * dtype.itemsize
        found = self._storage(key, size)
        if view is not None:
            _, start, number = view
            start, number = _count(start) * dtype.itemsize, _count(number) * dtype.itemsize
            found, size = found[start:], number
        if size > len(found):
            raise UnpicklingError(f"storage {key} has {len(found)} bytes, expected {size}")
        return Storage(found[:size], dtype)

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in PLAIN},
        pickle.GLOBAL[0]: _global,
        pickle.STACK_GLOBAL[0]: _stack_global,
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _reduce,
        pickle.NEWOBJ_EX[0]: _new_with_keywords,
        pickle.INST[0]: _instance,
        pickle.OBJ[0]: _object,
        pickle.BUILD[0]: _build,
        pickle.EMPTY_SET[0]: _list,
        pickle.FROZENSET[0]: _frozenset,
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _appends,
        pickle.ADDITEMS[0]: _appends,
        pickle.DICT[0]: _dict,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.BINPERSID[0]: _persistent,
    }
