"""The command line: picks the command and ends the process; ``featx --help`` answers without importing torch."""

import io
import os
import shlex
import sys
import traceback
from importlib.metadata import version
from types import ModuleType
from typing import Any, NoReturn

from featx import __version__
from featx.process.signals import INTERRUPTED, Stopped, leave_at_once, listen
from featx.process.start import import_fast

SAME_NAME = ("predict", "images", "layers", "verify", "status", "completion")
MODULES = {name: name for name in SAME_NAME} | {"show": "show.page"}

HELP = """\
usage: featx COMMAND [options]

Turn a folder of images into CNN features: one exact row per image, in order.

commands:
  predict     write a network's activations for every image
  images      describe a folder of images: formats, sizes, what cannot be read
  layers      list a network's layers, with their columns and cost
  status      show how far the run in an output folder is
  verify      check a finished file against its record and its images
  show        make a web page that maps a finished file's images
  completion  print a completion script for bash, zsh or tcsh

examples:
  featx predict --data.dir photos --model.layer fc7     write features/fc7.csv
  featx predict --help                                  list its options
  featx images photos                                   look before you compute
  featx layers --model.arch resnet50                    list ResNet-50's layers
  featx --version                                       print the version
"""


def run() -> NoReturn:
    """Run this process's command line, then end the process."""
    streams = open_streams()
    try:
        status = main()
    except SystemExit as end:  # a parser has printed its message
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    for stream in streams:
        getattr(sys, stream.title).flush()
        if stream.fault is not None:
            print(f"featx: error: {stream.title} cannot be written to: {stream.fault.strerror}", file=sys.stderr)
            status = status or 1
    leave_at_once(status)


class Stream(io.FileIO):
    """stdout or stderr; printing to it never raises.

    A reader that closes its pipe, such as ``| head``, is no error: further output is dropped.

    Attributes:
        title: stdout or stderr.
        fault: Why a write failed, or None.
    """

    def __init__(self, number: int, title: str) -> None:
        super().__init__(number, "w", closefd=False)
        self.title = title
        self.fault: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes and return their number."""
        try:
            return super().write(data) or 0
        except BrokenPipeError:  # https://docs.python.org/3/library/signal.html#note-on-sigpipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        except OSError as err:
            self.fault = err
        return len(memoryview(data).cast("B"))


def open_streams() -> list[Stream]:
    """Replace ``sys.stdout`` and ``sys.stderr`` by streams that never raise, and return them.

    A stream that was closed (``>&-``) is opened on /dev/null; otherwise the next file opened would take its number.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number
    streams = [Stream(1, "stdout"), Stream(2, "stderr")]
    for stream in streams:
        before: Any = getattr(sys, stream.title)
        how: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}  # if there was none
        if before is not None:
            how = {name: getattr(before, name) for name in ("encoding", "errors", "line_buffering", "write_through")}
        buffer: Any = stream if how.get("write_through") else io.BufferedWriter(stream)
        setattr(sys, stream.title, io.TextIOWrapper(buffer, **how))
    return streams


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit status.

    Returns:
        0: done. 1: a bug or a failure of the machine. 2: a mistake in the command. 3: done, except for images that
        cannot be read. 4: a disk error. 130: Ctrl-C. 143: SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    listen()
    try:
        return _run(argv)
    except Exception:
        traceback.print_exc()
        return 1
    except Stopped as stop:
        if stop.by_signal and os.environ.get("LOCAL_RANK", "0") == "0":
            from featx.errors import in_job

            print(in_job(INTERRUPTED), file=sys.stderr)
        leave_at_once(stop.exit_status)


def _run(argv: list[str]) -> int:
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if command == "--version":
        print(f"featx {__version__}")
        return 0
    from featx.errors import UserError, did_you_mean, log, log_to_stderr

    UserError.on_command_line = True
    log_to_stderr()
    try:
        if command.startswith("-"):
            near = did_you_mean(command, ["--help", "--version"])
            line = f"\nfeatx predict {shlex.join(argv)}" if "." in command or command == "--config" else ""
            raise UserError(f"{command}: expected a command before it{':' if line else '.'}{line or near}")
        if command not in MODULES:
            raise UserError(f"{command}: no such command.{did_you_mean(command, MODULES)} featx --help lists them.")
        module = _import(MODULES[command])
        return int(getattr(module, command)(rest))
    except UserError as err:
        log.error("%s", err)
        return err.exit_status


def _import(command: str) -> ModuleType:
    """Import a command; a torchvision that was built for another torch is a mistake in the installation."""
    from featx.errors import UserError

    try:
        return import_fast(f"featx.commands.{command}")
    except RuntimeError as err:  # https://github.com/pytorch/vision/issues/9174
        if "torchvision::" not in str(err):
            raise
        raise UserError(
            f"torch {version('torch')} and torchvision {version('torchvision')} do not fit together: {err}\n"
            "Install both from the same place: pip install --force-reinstall torch torchvision"
        ) from err
