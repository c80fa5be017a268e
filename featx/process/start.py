"""A faster start: skips imports of torchvision, Lightning and torchmetrics that prediction never uses.

User CPU seconds, medians of 3, with torch 2.14 and lightning 2.6: ``featx layers`` 2.4 instead of 3.8, ``featx predict
--writer.dry_run true`` 2.9 instead of 4.0. FEATX_PLAIN_START=1 in the environment switches it off. Most of the gain is
lost if torch._dynamo is imported later; tests/process/test_start.py checks that featx does not.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class OptimizedModule:
    """The class of compiled LightningModules, of which featx has none: it compiles a function."""


def disable(function: Any = None, *_: Any, **__: Any) -> Any:
    """Return the function unchanged: Lightning marks its logging, which is never compiled here."""
    return function or disable


def is_compile_supported(device: str) -> bool:
    """Ask the real function."""
    return bool(import_module("torch._dynamo.utils").is_compile_supported(device))


# Importing torch._dynamo takes as long as torch itself, only for these three names; scipy.signal takes half as long, to
# look for an old name: https://github.com/Lightning-AI/torchmetrics/blob/master/src/torchmetrics/__init__.py
# torchmetrics imports transformers wherever it is installed, for metrics of text.
STAND_INS: dict[str, dict[str, Any]] = {
    "torch._dynamo": {"OptimizedModule": OptimizedModule, "disable": disable, "__path__": []},
    "torch._dynamo.utils": {"is_compile_supported": is_compile_supported},
    "scipy.signal": {"hamming": None},
    "transformers": dict.fromkeys(
        (
            "AutoModel",
            "AutoModelForMaskedLM",
            "AutoTokenizer",
            "PreTrainedModel",
            "PreTrainedTokenizerBase",
            "CLIPModel",
            "CLIPProcessor",
        )
    ),
}


class _StandIn(ModuleType):
    """A module with the few names that its importers use; any other name comes from the real module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _remove()
        return getattr(import_module(self.__name__), name)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Import modules with stand-ins, in a process of featx's own; afterwards the real ones can be imported."""
    for name, known in STAND_INS.items():
        if name not in sys.modules and (spec := find_spec(name.split(".")[0])):
            sys.modules[name] = module = _StandIn(name)
            vars(module).update(known, __spec__=spec)  # find_spec returns it, so it counts as installed
    try:
        yield
    finally:
        _remove()


def import_fast(name: str) -> ModuleType:
    """Import a module with stand-ins, or without them if its imports need more, as in other versions."""
    if os.environ.get("FEATX_PLAIN_START") != "1":
        # A failure is a submodule that has no stand-in; a module that is really missing fails again below.
        with suppress(ImportError), stand_ins():
            return import_module(name)
    return import_module(name)


def _remove() -> None:
    for name in STAND_INS:
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]
