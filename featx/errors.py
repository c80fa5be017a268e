"""Messages: the user's mistakes, suggestions for mistyped names, notes on stderr."""

import difflib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence

log = logging.getLogger("featx")
SEE = "featx predict --help lists the options."


class UserError(Exception):
    """A mistake that the user can correct: one short message, no traceback, exit status 2.

    The message names the option, the value received, what was expected and what to do. It is written in the command
    line's words; from Python it reads ``batch_size=0: expected ...`` instead of ``--data.batch_size 0: expected ...``.

    Attributes:
        on_command_line: Whether this process runs a command.
    """

    exit_status = 2
    on_command_line = False

    def __str__(self) -> str:
        """Return the message in the words of the command line or of Python."""
        words = super().__str__()
        return words if self.on_command_line else as_parameters(words)


class BadValueError(UserError, ValueError):
    """An option's value that cannot be used."""


class MissingPathError(UserError, FileNotFoundError):
    """An option names a file or folder that does not exist."""


class ImageError(UserError, ValueError):
    """An image that cannot be read: exit status 3."""

    exit_status = 3


class LostFolderError(UserError, FileNotFoundError):
    """The folder of images has disappeared during the run: exit status 4."""

    exit_status = 4


class StoreError(UserError):
    """The object store with the images failed: exit status 4.

    It is no OSError, which could be a single image's.
    """

    exit_status = 4


class BrokenSourceError(UserError, OSError):
    """A part of a file with many images cannot be read: exit status 4."""

    exit_status = 4
    advice = (
        "Other images are lost with it, so the run ends here. "
        "If a disk or a network failed, run the same command again."
    )


def as_parameters(message: str) -> str:
    """Return a message about options as one about the parameters that they are.

    Example:
        >>> as_parameters("--model.pool cls: no tokens. Expected --model.pool avg.")
        'pool=cls: no tokens. Expected pool avg.'
    """
    option = r"--(?:data|model|writer|trainer)\.(\w+)"
    return re.sub(option, r"\1", re.sub(rf"^{option} (?=[^\n]*: )", r"\1=", message))


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """Return " Did you mean a, b or c?" for the known names nearest to a mistyped one, or nothing.

    Example:
        >>> did_you_mean("fc9", ["fc6", "fc7", "features.0"])
        ' Did you mean fc7 or fc6?'
    """
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=most, cutoff=0.6)
    return f" Did you mean {either(near)}?" if near else ""


def either(words: Sequence[str]) -> str:
    """Return words as ``a, b or c``."""
    return " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def as_list(value: str) -> str:
    """Return several words or numbers as a quoted list for the command line, or "" for a single one.

    Example:
        >>> as_list("fc6, fc7")
        "'[fc6,fc7]'"
    """
    words = re.split(r"[\s,;'\"]+", value.strip("[]() \t,;'\""))
    return f"'[{','.join(words)}]'" if words[1:] else ""


def first_few(names: list[str], most: int = 3) -> str:
    """Return names as ``a; b; c and 4 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more


def count(number: int, noun: str) -> str:
    """Return a number with its noun, as ``1 image`` or ``1,200 images``."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + ("es" if noun.endswith(("ss", "ch")) else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def size_in_words(number: float) -> str:
    """Return bytes as ``9.3 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"


def first_line(err: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has no message."""
    return (str(err).strip() or type(err).__name__).split("\n")[0]


def rank() -> int:
    """Return this process's rank as its launcher set it, 0 for a single process.

    Lightning's own launcher sets no rank in the first process of each machine; there it is the machine's, NODE_RANK.
    """
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK")
    known = {name: int(value) for name in names if (value := os.environ.get(name, "")).isdigit()}
    if known.get("LOCAL_RANK") == 0 and "RANK" not in known:
        del known["LOCAL_RANK"]
    return next(iter(known.values()), 0)


def note(label: str, text: str) -> None:
    """Log a line of a run's summary; the texts of several align."""
    log.info("%-15s%s", f"{label}:", text)


_job = ""  # what each line begins with


def name_job(name: str) -> None:
    """Begin each line on stderr with a job's name, and those of ``in_job``; several jobs may have one log."""
    global _job
    _job = f"[{name}] " if name else ""


def in_job(line: object) -> str:
    """Return a line of output with the job's name, if there are several jobs."""
    return f"{_job}{line}"


def log_to_stderr() -> None:
    """Send notes and warnings to stderr, one line each; ranks other than 0 report errors only."""
    log.handlers = [_Stderr()]
    log.propagate = False
    log.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    for category in (DeprecationWarning, FutureWarning):  # from one library to another
        warnings.filterwarnings("ignore", category=category)
    warnings.showwarning = lambda message, *_, **__: log.warning("%s", str(message).strip().split("\n")[0])


class _Stderr(logging.Handler):
    """Looks up sys.stderr at each write, since a program may have replaced and closed the earlier one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a note as it is, and a warning or an error after its level."""
        where = f" [rank {rank()}]" if rank() else ""
        level = f"featx: {record.levelname.lower()}{where}: " if record.levelno >= logging.WARNING else ""
        sys.stderr.write("".join(f"{_job}{line}\n" for line in f"{level}{record.getMessage()}".split("\n")))
        sys.stderr.flush()
