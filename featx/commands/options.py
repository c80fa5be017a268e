"""How options are ordered, shown and refused: jsonargparse's parser, in featx's words."""

import argparse
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from featx.errors import SEE, BadValueError, UserError, as_list, did_you_mean

TRAINER = {
    "accelerator": "cpu, gpu, mps or auto.",
    "devices": "How many of them, a list as '[0,1]', or -1 for all; several make one process each.",
    "num_nodes": "How many machines.",
    "strategy": "How several processes are started, as ddp.",
    "precision": "Precision of the network, as 32-true, bf16-mixed, 16-mixed.",
}


EXPECTED_CONFIG = """\
Expected options as YAML, such as
data:
  dir: photos
featx predict ... --print_config prints all options of a command so."""


def configs_first(argv: list[str]) -> list[str]:
    """Move ``--config FILE`` and then ``--model CLASS`` to the front, each in their own order.

    jsonargparse lets what stands later win, so that a config behind an option would win over it, and a class
    behind its options would reset them.
    """
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"allow_abbrev": False})

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *more: Any, **how: Any
    ) -> Any:
        """Parse a command line; what can be seen from its words alone is refused first."""
        check_words(args or [], self)
        return super().parse_args(args, *more, **how)

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **how: Any) -> Any:
        """Parse a config; what is wrong with it is reported with its name."""
        try:
            check_config(Path(path), self._known())
            return super().parse_path(path, *args, **how)
        except UserError as err:
            raise BadValueError(f"--config {os.fspath(path)}: {err}") from err

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UserError with the option, the value received, what was expected and what to do."""
        cause: BaseException | None = ex
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        key = re.search(r'Parser key "([^"]*)"', message)
        last, _InClassError.last = _InClassError.last, ""
        if cause is None and last and last.split("\n")[0] in message:  # of a union's types only the first is a cause
            cause = _InClassError(last)
        if isinstance(cause, _InClassError) and key:
            raise BadValueError(re.sub(r"(?<!\S)--(?!help)", f"--{key.group(1)}.", str(cause))) from ex
        if cause is not None:
            raise cause
        if "--data.dir" not in self._own():  # the parser of the options of a class, whose prefix only the caller knows
            _InClassError.last = explain(message, self)
            raise _InClassError(_InClassError.last) from ex
        raise BadValueError(explain(message, self)) from ex

    def hint(self, key: str) -> Any:
        """Return the type of an option, and its help."""
        found = next((action for action in self._actions if action.dest == key), None)
        return getattr(found, "_typehint", None), str(getattr(found, "help", "") or "")

    def _own(self) -> list[str]:
        words = [word for action in self._actions for word in action.option_strings]
        return [word for word in words if word.startswith("--") and not word.endswith(("+", ".help"))]

    def _known(self) -> list[str]:
        own = self._own()
        if "--data.dir" not in own:
            return own
        from featx.model.extractor import FeatureExtractor

        return own + [f"--model.{name}" for name in inspect.signature(FeatureExtractor).parameters]


class _InClassError(BadValueError):
    """An error in the options of a class, whose message names them without the class's own.

    Attributes:
        last: The last message.
    """

    last = ""


class PlainParser(argparse.ArgumentParser):
    """A parser of few options, whose errors are UserErrors."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's words."""
        raise UserError(f"{message}.\n{self.prog} --help lists the options.")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse a command line; an option that does not exist is refused before arguments that it hides."""
        known = [word for action in self._actions for word in action.option_strings]
        for word in (word.partition("=")[0] for word in args or []):
            if word.startswith("-") and word not in known:
                raise UserError(
                    f"{word}: no such option.{did_you_mean(word, known)}\n{self.prog} --help lists the options."
                )
        return super().parse_args(args, namespace)


def check_words(words: Sequence[str], parser: Parser) -> None:
    """Refuse what is no option with one value: so much is seen before anything is parsed.

    Args:
        words: The command line.
        parser: Which knows the options and their types.

    Raises:
        BadValueError: A value without an option, or an option without a value, or with several.
    """
    known = parser._known()
    given: list[list[str]] = []
    for word in words:
        if re.match("-[^0-9.]", word):
            name, equals, value = word.partition("=")
            given.append([name, value] if equals else [name])
        elif given:
            given[-1].append(word)
        else:
            near = f" Did you mean --data.dir {word}?" if os.path.isdir(word) else did_you_mean(word, known)
            raise BadValueError(f"{word}: a value without an option.{near}\nExpected --option value.\n{SEE}")
    for name, *values in given:
        name = "--config" if name == "-c" else name
        if name not in known or name in ("--help", "--json", "--print_config"):
            continue  # the parser knows more of it
        if not values:
            what = ", ".join(expected(parser.hint(name[2:])[0]))
            raise BadValueError(f"{name}: expected a value after it{f': {what}' if what else ''}.\n{SEE}")
        value = " ".join(values)
        if not value:
            raise BadValueError(f"{name} '': the value is empty. Expected one, or no {name} at all.")
        if len(values) > 1:
            kinds = expected(parser.hint(name[2:])[0], value) or ["a list"]  # of the model's the parser does not know
            listed = f" A list is written {as_list(value)}." if any("list" in kind for kind in kinds) else ""
            raise BadValueError(
                f"{name} {textwrap.shorten(value, 100, placeholder=' ...')}: {len(values)} values, expected one.\n"
                f"One with spaces goes in quotes.{listed}"
            )
        if name == "--config" and not os.path.isfile(value) and not re.search(r":\s", value):
            what = "this is a folder" if os.path.isdir(value) else "no such file"
            raise BadValueError(f"--config {value}: {what}. Expected a YAML file of options.")
        if name in ("--data", "--writer", "--trainer") and not os.path.isfile(value):
            first = next(option for option in known if option.startswith(f"{name}."))
            raise BadValueError(f"{name} {value}: expected one of its options, such as {first}.\n{SEE}")


def check_config(path: Path, known: Sequence[str]) -> None:
    """Refuse a config that is none.

    Args:
        path: The file.
        known: The options that exist.

    Raises:
        BadValueError: It is no YAML, or there is something other than options in it.
    """
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except yaml.MarkedYAMLError as err:
        line = f"line {err.problem_mark.line + 1}: " if err.problem_mark else ""
        tabs = " YAML is indented with spaces." if "\\t" in str(err.problem) else ""
        raise BadValueError(f"{line}{err.problem}.{tabs}") from err
    except (UnicodeDecodeError, yaml.YAMLError) as err:
        raise BadValueError(f"this is no text. {EXPECTED_CONFIG}") from err
    if not isinstance(config, dict):
        what = "this is empty" if config is None else "no options in it"
        raise BadValueError(f"{what}. {EXPECTED_CONFIG}")
    if {"identity", "files"} <= config.keys():
        raise BadValueError(f"this is the record of a finished file. {EXPECTED_CONFIG}")
    groups = list(dict.fromkeys(option[2:].partition(".")[0] for option in known if "." in option))
    for key, value in config.items():
        if key not in groups and f"--{key}" not in known:
            near = did_you_mean(str(key), groups) or did_you_mean(f"--{key}", known)
            raise BadValueError(f"{key}: no such option.{near}\nExpected groups of options: {', '.join(groups)}.")
        if key in groups and not isinstance(value, dict) and not (key == "model" and isinstance(value, str)):
            shown = f" {textwrap.shorten(str(value), 40, placeholder=' ...')}" if value is not None else ""
            raise BadValueError(f"'{key}:{shown}' has no options in it. {EXPECTED_CONFIG}")
        for name in value if key in groups and key != "model" and isinstance(value, dict) else []:
            if (word := f"--{key}.{name}") not in known:
                raise BadValueError(f"{word}: no such option.{did_you_mean(word, known)}\n{SEE}")


def explain(message: str, parser: Parser) -> str:
    """Say in featx's words what jsonargparse refuses.

    Args:
        message: What jsonargparse says.
        parser: Which knows the options and their types.
    """
    known = parser._known()
    if found := re.search(r"(?:unrecognized arguments: |Option '|does not accept option ')([^\s'=]+)", message):
        word = found.group(1)
        if "unrecognized" not in message:
            group = re.search(r"Group '(\S+)'", message)
            word = f"--{group.group(1)}.{word}" if group else f"--{word}"
        elif not word.startswith("-"):
            return f"{word}: a value without an option. Expected --option value.\n{SEE}"
        return f"{word}: no such option.{did_you_mean(word, known)}\n{SEE}"
    if found := re.search(r"required: (\S+)", message):
        option = f"--{found.group(1).rstrip(',')}"
        return (
            f"{option}: missing. Expected a value for it{', as --data.dir photos' * (option == '--data.dir')}.\n{SEE}"
        )
    if not (found := re.search(r'Parser key "([^"]*)"', message)):
        return f"{_few_lines(message)}\n{SEE}"
    hint, help = parser.hint(found.group(1))
    option = "--" + found.group(1)
    received = re.search(r"(?:Got value: |Given value: )(.*)", message)
    value = re.sub(r"Namespace\(class_path='([^']*)'.*", r"\1", received.group(1) if received else "")
    problem = re.search(r"Problem with given class_path '([^']*)':\s*(.*)", message)
    what = "module.Class, a subclass of featx.FeatureExtractor" if option == "--model" else _either(expected(hint))
    if problem:
        return f"{option} {problem.group(1)}: {problem.group(2)}\nExpected {what}, in this folder or installed."
    if option == "--model":
        return f"--model {value}: expected {what}.\n{SEE}"
    if not what:
        return f"{option} {value}: {_few_lines(message)}\n{SEE}"
    kinds = expected(hint, value)
    near = "" if as_list(value) else did_you_mean(value, [kind for kind in kinds if " " not in kind])
    help = TRAINER.get(found.group(1).removeprefix("trainer."), help)
    about = textwrap.wrap(f"{option}: {textwrap.shorten(help, 200, placeholder=' ...')}", 80, break_long_words=False)
    return "\n".join([f"{option} {value}: expected {_either(kinds)}.{near}", *about, SEE])


def expected(hint: Any, value: str = "") -> list[str]:
    """Return in words what a type takes, each once.

    Args:
        hint: The type.
        value: What was given: if that was meant as a list, this shows how it is written.
    """
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return [str(part) for part in parts]
    if origin in (list, tuple):
        literals = [str(part) for part in get_args(parts[0])] if get_origin(parts[0]) is Literal else []
        numbers = [str(number) for number in range(len(parts))] if origin is tuple else ["0.5"] * 3
        if example := literals[:2] or (numbers if float in parts else []):
            return [f"a list in quotes, {as_list(value) or as_list(','.join(example))}"]
    if parts:  # of a union
        return list(dict.fromkeys(word for part in parts for word in expected(part, value)))
    return [words.get(hint, "module.Class")] if hint is not None else []


def _either(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


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
