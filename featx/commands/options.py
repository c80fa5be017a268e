"""The command line's options: their order, help and error messages, on top of jsonargparse."""

import argparse
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from importlib import import_module
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from featx.errors import SEE, BadValueError, UserError, as_list, did_you_mean, either

TRAINER = {
    "accelerator": "cpu, gpu, mps or auto.",
    "devices": "Number of devices, a list such as '[0,1]', or -1 for all; one process for each.",
    "num_nodes": "Number of machines.",
    "strategy": "How processes are started, such as ddp.",
    "precision": "Precision of the network, such as 32-true, bf16-mixed, 16-mixed.",
}
ALSO = {
    "config": "A YAML file of options; the command line wins.",
    "model CLASS": "A subclass of featx.FeatureExtractor, such as my_module.MyExtractor.",
}
PROBLEM = re.compile(r"Problem with given class_path '([^']*)':\s*(.*)")
INNER = "\N{NULL}"  # encloses a message about a class's options, in which they lack the class's prefix

EXPECTED_CONFIG = """\
Expected options as YAML, such as
data:
  dir: photos
featx predict ... --print_config prints a command's options like this."""


def configs_first(argv: list[str]) -> list[str]:
    """Move ``--config FILE`` and then ``--model CLASS`` to the front, keeping the order within each.

    In jsonargparse the last word wins, so a config after an option would override it, and a class after its options
    would reset them.
    """
    order = {"-c": 0, "--config": 0, "--model": 1}
    stray, *groups = _grouped(argv)
    groups.sort(key=lambda words: order.get(words[0].partition("=")[0], 2))
    return [*stray, *chain.from_iterable(groups)]


def _grouped(words: Sequence[str]) -> list[list[str]]:
    """Return the words before the first option, then each option with the words after it."""
    groups: list[list[str]] = [[]]
    for word in words:
        if re.match("-[^0-9.]", word):
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups


def import_from_here() -> None:
    """Allow modules in the current folder, for ``--model my_module.MyExtractor``."""
    sys.path.append(os.getcwd())


class Parser(LightningArgumentParser):
    """LightningCLI's parser, with short UserErrors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"allow_abbrev": False})

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *more: Any, **how: Any
    ) -> Any:
        """Parse a command line, after a check of its words."""
        args, known = configs_first(list(args or [])), self.actions()
        check_words(args, known)
        if "--model" in known:  # make the named class the default, so that its own defaults apply
            named = [word.partition("=")[2] or after for word, after in pairwise([*args, ""])
                     if word.partition("=")[0] == "--model"]  # fmt: skip
            for name in ["featx.FeatureExtractor", *named]:
                with suppress(Exception):  # parsing reports what is wrong with the class
                    name_class(name)
                    self.set_defaults({"model": {"class_path": name}})
        return super().parse_args(args, *more, **how)

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **how: Any) -> Any:
        """Parse a config; its errors name the file."""
        try:
            check_config(Path(path), self.actions())
            return super().parse_path(path, *args, **how)
        except UserError as err:
            raise BadValueError(f"--config {os.fspath(path)}: {err}") from err

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UserError with the option, the value received, what was expected and what to do."""
        cause: BaseException | None = ex
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause
        words = explain(message, self.actions())
        if "--data.dir" not in self.actions():  # the inner parser of a class's options; its caller knows their prefix
            raise ValueError(f"{INNER}{words}{INNER}") from ex
        raise BadValueError(words) from ex

    def actions(self) -> dict[str, Any]:
        """Return the options with argparse's actions; None for options of ``--model`` that depend on its class."""
        words = {word: action for action in self._actions for word in action.option_strings}
        own = {word: action for word, action in words.items()
               if word.startswith("--") and not word.endswith(("+", ".help"))}  # fmt: skip
        if "--data.dir" not in own:
            return own
        from featx.model.extractor import FeatureExtractor

        model = [f"--model.{name}" for name in inspect.signature(FeatureExtractor).parameters]
        return own | {option: own.get(option) for option in model}


class PlainParser(argparse.ArgumentParser):
    """A parser for commands with few options, whose errors are UserErrors."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's words."""
        end = "" if message.endswith((".", "?")) else "."
        raise UserError(f"{message}{end}\n{self.prog} --help lists the options.")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse a command line; report an unknown option before the arguments that it hides."""
        known = [word for action in self._actions for word in action.option_strings]
        for word in (word.partition("=")[0] for word in args or []):
            if word.startswith("-") and word not in known:
                self.error(f"{word}: no such option.{did_you_mean(word, known)}")
        return super().parse_args(args, namespace)


def name_class(path: str) -> None:
    """Give a class that a function made the name that the user calls it by; jsonargparse imports it by its own."""
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name)
    if "<locals>" in found.__qualname__:
        found.__module__, found.__qualname__, found.__name__ = module, name, name


def check_words(words: Sequence[str], known: dict[str, Any]) -> None:
    """Refuse words that are not an option with one value, before anything is parsed."""
    stray, *groups = _grouped(words)
    if stray:
        near = f" Did you mean --data.dir {stray[0]}?" if os.path.isdir(stray[0]) else did_you_mean(stray[0], known)
        raise BadValueError(f"{stray[0]}: a value without an option.{near}\nExpected --option value.\n{SEE}")
    for option, *values in groups:
        name, equals, value = option.partition("=")
        name = "--config" if name == "-c" else name
        values = [value] * bool(equals) + values
        if name not in known or name in ("--help", "--json", "--all", "--print_config"):
            continue  # the parser handles these
        value = " ".join(values)
        kinds = expected(getattr(known[name], "_typehint", None), value)
        if not values:
            raise BadValueError(f"{name}: expected a value after it{': ' * bool(kinds)}{', '.join(kinds)}.\n{SEE}")
        if not value:
            raise BadValueError(f"{name} '': the value is empty. Expected a value, or no {name} at all.")
        if len(values) > 1:
            listed = not kinds or any("list" in kind for kind in kinds)  # types of a class's options are unknown here
            raise BadValueError(
                f"{name} {textwrap.shorten(value, 100, placeholder=' ...')}: {len(values)} values, expected one.\n"
                f"Quote a value with spaces.{f' Write a list as {as_list(value)}.' if listed else ''}"
            )
        if name == "--config" and not os.path.isfile(value) and not re.search(r":\s", value):
            what = "this is a folder" if os.path.isdir(value) else "no such file"
            raise BadValueError(f"--config {value}: {what}. Expected a YAML file of options.")
        if name in ("--data", "--writer", "--trainer") and not os.path.isfile(value):
            first = next(option for option in known if option.startswith(f"{name}."))
            raise BadValueError(f"{name} {value}: expected one of its options, such as {first}.\n{SEE}")


def check_config(path: Path, known: Collection[str]) -> None:
    """Refuse a config that is not YAML, or contains anything other than options."""
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except yaml.MarkedYAMLError as err:
        line = f"line {err.problem_mark.line + 1}: " if err.problem_mark else ""
        hint = ""
        if "\\t" in str(err.problem):
            hint = " Indent YAML with spaces."
        elif re.search(r"[\[,:-]\s*[*@!%&]", path.read_text("utf-8")):
            hint = ' Put text that begins with *, @, !, % or & in quotes, such as "*_mask.png".'
        raise BadValueError(f"{line}{err.problem}.{hint}") from err
    except (UnicodeDecodeError, yaml.YAMLError) as err:
        raise BadValueError(f"this is not text. {EXPECTED_CONFIG}") from err
    if not isinstance(config, dict):
        what = "the file is empty" if config is None else "no options in it"
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
        for name in value if key in groups and key != "model" else []:
            if (word := f"--{key}.{name}") not in known:
                raise BadValueError(_no_such(word, known))


def explain(message: str, known: dict[str, Any]) -> str:
    """Turn an error message of jsonargparse's into featx's; ``known`` has the options with argparse's actions."""
    if found := re.search(
        r"unrecognized arguments: ([^\s=]+)|(?:Group '(\S+)' does not accept option|Option) '([^\s']+)'", message
    ):
        word = found[1] or "--" + ".".join(filter(None, found.groups()))
        if not word.startswith("-"):
            return f"{word}: a value without an option. Expected --option value.\n{SEE}"
        return _no_such(word, known)
    if found := re.search(r"required: ([^\s,]+)", message):
        example = ", such as --data.dir photos" * (found[1] == "data.dir")
        return f"--{found[1]}: missing. Expected a value for it{example}.\n{SEE}"
    if not (found := re.search(r'Parser key "([^"]*)"', message)):
        return f"{_few_lines(message)}\n{SEE}"
    option = f"--{found[1]}"
    if inner := re.search(f"{INNER}(.*?){INNER}", message, re.DOTALL):
        return re.sub(r"(?<!\S)--(?!help)", f"{option}.", re.sub("\n +", "\n", inner[1]))
    received = re.search("(?:Got|Given) value: (.*)", message)
    value = re.sub(r"Namespace\(class_path='([^']*)'.*", r"\1", received[1] if received else "")
    kinds = expected(hint := getattr(known.get(option), "_typehint", None), value)
    what = "module.Class, a subclass of featx.FeatureExtractor" if option == "--model" else either(expected(hint))
    if problem := PROBLEM.search(message):
        return f"{option} {problem[1]}: {problem[2]}\nExpected {what}, in this folder or installed."
    if option == "--model":
        return f"--model {value}: expected {what}.\n{SEE}"
    if not what:
        return f"{option} {value}: {_few_lines(message)}\n{SEE}"
    near = "" if as_list(value) else did_you_mean(value, [kind for kind in kinds if " " not in kind])
    help = TRAINER.get(option.removeprefix("--trainer."), str(known[option].help or ""))
    about = textwrap.wrap(f"{option}: {textwrap.shorten(help, 200, placeholder=' ...')}", 80, break_long_words=False)
    if "text" in kinds and re.fullmatch("[0-9.]+", value):
        about = ["YAML reads some text as a number, 4:3 as 243: put it in double quotes, as in '[\"4:3\",fc]'."]
    return "\n".join([f"{option} {value}: expected {either(kinds)}.{near}", *about, SEE])


def expected(hint: Any, value: str = "") -> list[str]:
    """Return a description of each value that a type takes; a value meant as a list shows how to write one."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return [str(part) for part in parts]
    if origin in (list, tuple):
        literals = [str(part) for part in get_args(parts[0])] if get_origin(parts[0]) is Literal else []
        numbers = ["0.5"] * 3 if float in parts else ["1", "2", "3"]
        numbers = [str(number) for number in range(len(parts))] if origin is tuple else numbers
        if example := literals[:2] or (numbers if {int, float} & {*parts} else []):
            return [f"a list in quotes, {as_list(value) or as_list(','.join(example))}"]
    if parts:  # of a union
        return list(dict.fromkeys(word for part in parts for word in expected(part, value)))
    return [words.get(hint, "module.Class")] if hint is not None else []


def _no_such(word: str, known: Collection[str]) -> str:
    return f"{word}: no such option.{did_you_mean(word, known)}\n{SEE}"


def _few_lines(text: str) -> str:
    lines = [line.strip() for line in text.strip().split("\n") if line.strip()]
    return "\n".join(line[:200] for line in lines[:6])


def print_help(**classes: type) -> None:
    """Print the options that prediction uses, in groups with their defaults."""
    print("usage: featx predict --data.dir FOLDER [options]\n")
    for title, (group, owner) in zip(("images", "network", "output"), classes.items(), strict=True):
        print_group(title, group, owner)
    print("machine (Lightning's Trainer):")
    parameters = inspect.signature(Trainer).parameters
    for name, text in TRAINER.items():
        print_option(f"trainer.{name}", parameters[name].default or "32-true", text)
    print("also:")
    more = {
        "print_config": "Print all options with their values, as a config.",
        "help_all": "Show all options, including Lightning's.",
    }
    for name, text in (ALSO | more).items():
        print_option(name, None, text)


def print_group(title: str, group: str, owner: type, shown: Callable[[str], bool] = bool) -> None:
    """Print those options of a class whose names ``shown`` accepts."""
    parser = Parser(default_env=False)
    parser.add_class_arguments(owner, group)
    print(f"{title}:")
    for option, action in parser.actions().items():
        if option.startswith(f"--{group}.") and shown(action.dest.removeprefix(f"{group}.")):
            print_option(action.dest, action.default, action.help, required=option == "--data.dir")


def print_option(name: str, default: Any, text: str, required: bool = False) -> None:
    """Print an option with its default and help, in 80 columns."""
    shown = str(default).lower() if isinstance(default, bool) else default
    tail = " (required)" if required else f" ({shown})" if shown is not None else ""
    left = f"  --{name}"
    if len(left) > 25:
        print(left)
        left = ""
    words = " ".join(text.split()) + tail
    indent = " " * 27
    print(textwrap.fill(words, 80, initial_indent=f"{left:<27}", subsequent_indent=indent, break_long_words=False))
