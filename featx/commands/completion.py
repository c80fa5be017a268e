"""``featx completion SHELL``: prints a script that completes commands, options and values in a shell."""

import argparse
from typing import Any, get_type_hints

from featx.commands.options import TRAINER, expected
from featx.data.module import ImageFolderDataModule
from featx.errors import BadValueError, did_you_mean
from featx.model.extractor import FeatureExtractor
from featx.writer.callback import FeatureWriter

GROUPS: dict[str, Any] = {"data": ImageFolderDataModule, "model": FeatureExtractor, "writer": FeatureWriter}
SHELLS = ("bash", "zsh", "tcsh")
PATHS = {"data.dir", "data.files", "model.weights", "writer.out_dir", "config"}


def completion(argv: list[str]) -> int:
    """Print the completion script for bash, zsh or tcsh.

    Raises:
        BadValueError: Another shell, or shtab is not installed.
    """
    shell = argv[0] if argv else ""
    if shell not in SHELLS or argv[1:]:
        given = " ".join(argv) or "without a shell"
        raise BadValueError(f"completion {given}: expected {', '.join(SHELLS)}.{did_you_mean(shell, SHELLS)}")
    try:
        import shtab
    except ImportError as err:
        raise BadValueError("completion: shtab is not installed. pip install 'featx[completion]'") from err
    print(shtab.complete(_parser(shtab.FILE), shell))
    return 0


def _parser(file: Any) -> argparse.ArgumentParser:
    """Return a parser of the commands and their options, used for completion only."""
    parser = argparse.ArgumentParser("featx")
    commands = parser.add_subparsers()
    for command in ("predict", "images", "layers"):
        options = {
            f"{group}.{name}": _choices(hint)
            for group, owner in GROUPS.items()
            for name, hint in get_type_hints(owner.__init__).items()
            if name != "return"
        }
        options |= {f"trainer.{name}": [] for name in TRAINER} | {"config": [], "model": []}
        sub = commands.add_parser(command, help=command)  # shtab hides commands without help
        for name, choices in options.items():
            action: Any = sub.add_argument(f"--{name}", choices=choices or None)
            if name in PATHS:
                action.complete = file
        flags = {"predict": ("print_config", "help_all"), "images": ("json", "all"), "layers": ("json",)}
        for name in flags[command]:
            sub.add_argument(f"--{name}", action="store_true")
        if command == "images":
            folder: Any = sub.add_argument("dir", nargs="?")
            folder.complete = file
    for command, options_of in (("verify", ["--images", "--model", "--model.arch"]), ("show", ["--images", "--map"])):
        sub = commands.add_parser(command, help=command)
        for option in options_of:
            one: Any = sub.add_argument(option, choices=["pca", "tsne"] if option == "--map" else None)
            if option == "--images":
                one.complete = file
        several: Any = sub.add_argument("files", nargs="*")
        several.complete = file
    sub = commands.add_parser("status", help="status")
    sub.add_argument("--json", action="store_true")
    output: Any = sub.add_argument("out_dir")
    output.complete = file
    commands.add_parser("completion", help="completion").add_argument("shell", choices=SHELLS)
    return parser


def _choices(hint: Any) -> list[str]:
    """Return the words that a type allows: its literals, true and false, null."""
    words = [word for kind in expected(hint) for word in kind.split(" or ")]
    return [word for word in words if " " not in word and word not in ("text", "module.Class")]
