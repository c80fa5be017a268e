"""The command line: which command, and how a run ends; ``featx --help`` answers without importing torch."""

import io
import os
import shlex
import sys
import traceback
from typing import Any, NoReturn

from featx import __version__
from featx.process.signals import INTERRUPTED, Stopped, leave_at_once, listen
from featx.process.start import import_lean

MODULES = {name: name for name in ("predict", "layers", "verify", "completion")} | {"show": "show.page"}

HELP = """\
usage: featx COMMAND [options]

A folder of images into CNN features, exactly: one row an image, in order.

commands:
  predict     write the activations of a network's layers for every image
  layers      list the layers that a network has, with their columns and cost
  verify      hold a finished file against its record, and against its images
  show        write a page on which a finished file's images are seen

  featx predict --data.dir photos --model.layer fc7     writes features/fc7.csv
  featx predict --help                                  lists the options
  featx layers --model.arch resnet50                    lists its layers
  featx completion bash                                 completes its options
  featx --version
"""


def run() -> NoReturn:
    """Run the process's command line and end the process."""
    streams = open_streams()
    try:
        status = main()
    except SystemExit as end:  # of a parser that has said all
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    for stream in streams:
        getattr(sys, stream.title).flush()
        if stream.fault is not None:
            print(f"featx: error: {stream.title} cannot be written to: {stream.fault.strerror}", file=sys.stderr)
            status = status or 1
    leave_at_once(status)


class Stream(io.FileIO):
    """stdout or stderr, which what is printed never fails on.

    That a reader has gone, as ``| head`` does, is no fault: what else is printed goes nowhere.

    Attributes:
        title: stdout or stderr.
        fault: Why something could not be written.
    """

    def __init__(self, number: int, title: str) -> None:
        super().__init__(number, "w", closefd=False)
        self.title = title
        self.fault: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes and return how many were."""
        try:
            return super().write(data) or 0
        except BrokenPipeError:  # https://docs.python.org/3/library/signal.html#note-on-sigpipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        except OSError as err:
            self.fault = err
        return len(memoryview(data).cast("B"))


def open_streams() -> list[Stream]:
    """Put streams on which printing never fails in the place of ``sys.stdout`` and ``sys.stderr``, and return them.

    One that was closed, as ``>&-`` does, is opened on /dev/null, so that no other file is opened in its place.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
    streams = [Stream(1, "stdout"), Stream(2, "stderr")]
    for stream in streams:
        before: Any = getattr(sys, stream.title)
        how: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}  # where there was none
        if before is not None:
            how = {name: getattr(before, name) for name in ("encoding", "errors", "line_buffering", "write_through")}
        buffer: Any = stream if how.get("write_through") else io.BufferedWriter(stream)
        setattr(sys, stream.title, io.TextIOWrapper(buffer, **how))
    return streams


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit status.

    Returns:
        0: done. 1: a bug, or a failure of the machine. 2: a mistake in what was asked. 3: done, but for images that
        cannot be read. 4: the disk. 130: Ctrl-C. 143: SIGTERM.
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
            print(INTERRUPTED, file=sys.stderr)
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
        module = import_lean(f"featx.commands.{MODULES[command]}")
        return int(getattr(module, command)(rest))
    except UserError as err:
        log.error("%s", err)
        return err.exit_status
