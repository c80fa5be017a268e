"""How options are ordered, shown and refused: jsonargparse's parser, in featx's words."""

import argparse
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from featx.messages import BadValueError, UserError, did_you_mean

TRAINER = {
    "accelerator": "cpu, gpu, mps or auto.",
    "devices": "How many of them, a list as '[0,1]', or -1 for all; several make one process each.",
    "num_nodes": "How many machines.",
    "strategy": "How several processes are started, as ddp.",
    "precision": "Precision of the network, as 32-true, bf16-mixed, 16-mixed.",
}


SEE = "featx predict --help lists the options."


def configs_first(argv: list[str]) -> list[str]:
    """Move ``--config FILE`` and then ``--model CLASS`` to the front, each in their own order.

    jsonargparse lets what stands later win, so that a config behind an option would win over it, and a class
    behind its options would reset them.

    Raises:
        BadValueError: An option without its value, which jsonargparse tells without the option's whole name.
    """
    for word, behind in zip(argv, [*argv, "--"][1:], strict=True):
        if re.fullmatch(r"--\w+\.[\w.]+", word) and behind.startswith("--"):
            raise BadValueError(f"{word}: the value is missing behind it.\n{SEE}")
    moved: dict[str, list[str]] = {"--config": [], "--model": []}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        name = "--config" if name == "-c" else name
        if name in moved:
            moved[name] += [word] if equals else [word, *[value for value in [next(words, None)] if value is not None]]
        else:
            rest.append(word)
    return moved["--config"] + moved["--model"] + rest


def set_default_class(parser: LightningArgumentParser, argv: list[str]) -> None:
    """Make the class that ``--model`` names the default, so that its own defaults stand, not FeatureExtractor's."""
    parser.set_defaults({"model": {"class_path": "featx.FeatureExtractor"}})
    for word, behind in zip(argv, [*argv, ""][1:], strict=True):
        if word == "--model" or word.startswith("--model="):
            with suppress(Exception):  # what is wrong with the class, parsing tells
                parser.set_defaults({"model": {"class_path": word.partition("=")[2] or behind}})


class Parser(LightningArgumentParser):
    """LightningCLI's parser, whose errors are UserErrors of few lines."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UserError with the option, the value received, what was expected and what to do."""
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        if "--data.dir" not in self._own():  # the parser of a class's own options, which stand behind --model.
            message = message.replace('Parser key "', 'Parser key "model.')
        raise BadValueError(explain(message, self._known())) from ex

    def _own(self) -> list[str]:
        words = [word for action in self._actions for word in action.option_strings]
        return [word for word in words if word.startswith("--") and not word.endswith("+")]

    def _known(self) -> list[str]:
        own = self._own()
        if "--data.dir" not in own:
            return [word.replace("--", "--model.", 1) for word in own if word != "--help"]
        from featx.extractor import FeatureExtractor

        return own + [f"--model.{name}" for name in inspect.signature(FeatureExtractor).parameters]


class PlainParser(argparse.ArgumentParser):
    """A parser of few options, whose errors are UserErrors."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's words."""
        raise UserError(f"{message}.\n{self.prog} --help lists the options.")


def explain(message: str, known: Iterable[str]) -> str:
    """Say in featx's words what jsonargparse refuses.

    Args:
        message: What jsonargparse says.
        known: The options that exist.
    """
    if found := re.search(r"unrecognized arguments: (.*)", message, re.IGNORECASE | re.DOTALL):
        word = found.group(1).split()[0].split("=")[0]
        if not word.startswith("-"):
            return f"{word}: a value without an option. Expected --option value.\n{SEE}"
        return f"{word}: no such option.{did_you_mean(word, known)}\n{SEE}"
    if found := re.search(r"Group '(\S+)' does not accept option '(\S+)'", message):
        word = f"--{found.group(1)}.{found.group(2)}"
        return f"{word}: no such option.{did_you_mean(word, known)}\n{SEE}"
    if found := re.search(r"Option '(\S+)' is not accepted", message):
        word = f"--model.{found.group(1)}"
        return f"{word}: no such option.{did_you_mean(word, known)}\n{SEE}"
    if found := re.search(r"required: (\S+)", message):
        return f"--{found.group(1)}: missing. Expected a value for it, as --{found.group(1)} photos\n{SEE}"
    if found := re.search(r"argument (\S+): expected", message):
        return f"{found.group(1)}: the value is missing behind it.\n{SEE}"
    if found := re.search(r'[Pp]arser key "([^"]*)"', message):
        option = "--" + found.group(1).replace(".init_args", "")
        received = re.search(r"(?:Got value: |Given value: )(.*)", message)
        expected = _expected(message)
        if nested := re.search(r"NestedArg\(key='([^']*)', val=(.*)\)", message):
            option, value = f"{option}.{nested.group(1)}", nested.group(2).strip("'\"")
        else:
            value = received.group(1) if received else ""
        problem = re.search(r"Problem with given class_path '([^']*)':\s*(.*)", message)
        if option == "--model" and problem:
            return (
                f"--model {problem.group(1)}: {problem.group(2)}\nExpected module.Class, a subclass of "
                "featx.FeatureExtractor in this folder or installed."
            )
        if option == "--model":
            value = re.sub(r"Namespace\(class_path='([^']*)'.*", r"\1", value)
            return f"--model {value}: expected module.Class, a subclass of featx.FeatureExtractor.\n{SEE}"
        if expected:
            literals = re.findall(r"'([^']*)'", " ".join(re.findall(r"Literal\[([^\]]*)\]", message)))
            return f"{option} {value}: expected {expected}.{did_you_mean(value, literals)}\n{SEE}"
        said = message.split("\n", 1)[0].split(": ", 1)[-1] if ": " in message.split("\n", 1)[0] else message
        return f"{option}: {_few_lines(said)}\n{SEE}"
    return f"{_few_lines(message)}\n{SEE}"


def _expected(message: str) -> str:
    words = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "text",
        "NoneType": "null",
    }
    kinds: list[str] = []
    for kind in re.findall(r"Expected a(?:n)? (<class '\w+'>|typing\.Literal\[[^\]]*\]|Literal\[[^\]]*\])", message):
        if found := re.match(r"<class '(\w+)'>", kind):
            kinds.append(words.get(found.group(1), found.group(1)))
        else:
            kinds += re.findall(r"'([^']*)'", kind)
    kinds = list(dict.fromkeys(kinds))
    return " or ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)


def _few_lines(text: str) -> str:
    lines = [line.strip() for line in text.strip().split("\n") if line.strip()]
    return "\n".join(line[:200] for line in lines[:6])


def print_help(model: type, data: type, writer: type) -> None:
    """Print the options that prediction uses, in groups, with their defaults."""
    print("usage: featx predict --data.dir FOLDER [options]\n")
    for title, group, owner in (("images", "data", data), ("network", "model", model), ("output", "writer", writer)):
        print_group(title, group, owner)
    print("machine (Lightning's Trainer):")
    for name, text in TRAINER.items():
        print_option(f"trainer.{name}", {"num_nodes": 1, "precision": "32-true"}.get(name, "auto"), text)
    print("also:")
    print_option("config", None, "A YAML file of options; those on the command line win over it.")
    print_option("model CLASS", None, "A subclass of featx.FeatureExtractor, as my_module.MyExtractor.")
    print_option("print_config", None, "Print all options with their values, as a config.")
    print_option("help_all", None, "Show everything that Lightning and jsonargparse understand.")


def print_group(title: str, group: str, owner: type, shown: Callable[[str], bool] = bool) -> None:
    """Print the options of a class, those whose name is to be shown."""
    parser = ArgumentParser(default_env=False)
    parser.add_class_arguments(owner, group)
    print(f"{title}:")
    for action in parser._actions:
        if action.dest.startswith(f"{group}.") and shown(action.dest.removeprefix(f"{group}.")):
            print_option(action.dest, action.default, str(action.help), required=action.dest == "data.dir")


def print_option(name: str, default: Any, text: str, required: bool = False) -> None:
    """Print an option with its default and its help, in 80 columns."""
    shown = {True: "true", False: "false"}.get(default, default) if isinstance(default, bool) else default
    tail = " (required)" if required else f" ({shown})" if shown is not None else ""
    left = f"  --{name}"
    lines = textwrap.wrap(" ".join(text.split()) + tail, 80 - 27, break_long_words=False)
    if len(left) > 25:
        print(left)
        left = ""
    for line in lines:
        print(f"{left:<26} {line}")
        left = ""
