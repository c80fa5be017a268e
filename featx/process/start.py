"""A start without ballast: what torchvision, Lightning and torchmetrics import at once and no prediction uses.

User CPU seconds, medians of 3, with torch 2.14 and lightning 2.6: ``featx layers`` 2.4 instead of 3.8, ``featx predict
--writer.dry_run true`` 2.9 instead of 4.0. FEATX_PLAIN_START=1 in the environment switches it off. A later import of
torch._dynamo, as by the network's code, costs most of it: tests/process/test_start.py finds that.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import ModuleType
from typing import Any


class OptimizedModule:
    """What ``torch.compile`` would make of a LightningModule; featx compiles a function."""


def disable(function: Any = None, *_: Any, **__: Any) -> Any:
    """Leave a function as it is, one of Lightning's logging that no graph holds."""
    return function or disable


def is_compile_supported(device: str) -> bool:
    """Ask the real function."""
    return bool(import_module("torch._dynamo.utils").is_compile_supported(device))


# torch._dynamo takes as long as torch itself, for these three names; scipy.signal half of that, to see whether it has
# an old name: https://github.com/Lightning-AI/torchmetrics/blob/master/src/torchmetrics/__init__.py
STAND_INS: dict[str, dict[str, Any]] = {
    "torch._dynamo": {"OptimizedModule": OptimizedModule, "disable": disable, "__path__": []},
    "torch._dynamo.utils": {"is_compile_supported": is_compile_supported},
    "scipy.signal": {"hamming": None},
}


class _StandIn(ModuleType):
    """A module that has the few names its importers want; one that wants another gets the real module's."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _remove()
        return getattr(import_module(self.__name__), name)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Let modules be imported with stand-ins, in a process of featx's own; after it the real ones can be imported."""
    for name, known in STAND_INS.items():
        if name not in sys.modules:
            sys.modules[name] = module = _StandIn(name)
            vars(module).update(known)
    try:
        yield
    finally:
        _remove()


def import_lean(name: str) -> ModuleType:
    """Import a module, with stand-ins where they serve its own imports, else, as in another version, without them."""
    if os.environ.get("FEATX_PLAIN_START") != "1":
        # What fails is a part of torch._dynamo's that has none; what is really missing is missing again.
        with suppress(ImportError), stand_ins():
            return import_module(name)
    return import_module(name)


def _remove() -> None:
    for name in STAND_INS:
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]
