"""The command line: which command, and how a run ends; ``featx --help`` answers without importing torch."""

import sys

from featx import __version__

HELP = """\
usage: featx COMMAND [options]

A folder of images into CNN features, exactly: one row an image, in order.

commands:
  predict     write the activations of a network's layers for every image
  layers      list the layers that a network has, with their columns and cost

  featx predict --data.dir photos --model.layer fc7     writes features/fc7.csv
  featx predict --help                                  lists the options
  featx layers --model.arch resnet50                    lists its layers
  featx --version
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit status.

    Returns:
        0: done. 1: a bug or a failure that featx has no word for. 2: a mistake in what was asked. 3: an image that
        cannot be read. 130: Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print("featx: interrupted", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if command == "--version":
        print(f"featx {__version__}")
        return 0
    from featx.messages import UserError, did_you_mean, log, log_to_stderr

    log_to_stderr()
    try:
        if command == "predict":
            from featx.predict import predict

            predict(rest)
            return 0
        if command == "layers":
            from featx.survey import survey

            survey(rest)
            return 0
        raise UserError(
            f"{command}: no such command.{did_you_mean(command, ['predict', 'layers'])} featx --help lists them."
        )
    except UserError as err:
        log.error("%s", err)
        return err.exit_status
