"""A function that an option names, ``package.module.name`` -> the function."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from featx.errors import BadValueError, did_you_mean, first_line


def import_function(name: str, option: str, expected: str) -> Callable[..., Any]:
    """Import a function.

    Args:
        name: Where it is.
        option: The option that names it, for messages.
        expected: What it must be, as in ``a function that returns an nn.Module``.

    Raises:
        BadValueError: It cannot be imported.
    """
    path, *names = name.split(".")
    found: Any = None
    try:
        found = import_module(path)
        for part in names:
            path = f"{path}.{part}"
            # Attributes win over modules: antialiased_cnns.alexnet is both, and the function is the network.
            if not hasattr(found, part) and hasattr(found, "__path__"):
                import_module(path)
            if not hasattr(found, part):
                raise ModuleNotFoundError(name=path)
            found = getattr(found, part)
    except (Exception, SystemExit) as err:
        if isinstance(err, ModuleNotFoundError) and err.name == path:
            near = did_you_mean(names[-1], dir(found)) if names else ""
            reason = f"{path} is neither in this folder nor installed.{near}"
        else:
            reason = f"importing {path} failed: {type(err).__name__}: {first_line(err)}"
        raise BadValueError(f"{option} {name}: {reason}\nExpected package.module.name of {expected}.") from err
    if not callable(found):
        raise BadValueError(f"{option} {name}: its type is {type(found).__name__}. Expected {expected}.")
    return found  # type: ignore[no-any-return]
