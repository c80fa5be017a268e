"""The order of options, and what is said of a wrong one."""

import pytest

from featx.options import configs_first, explain

KNOWN = ["--data.batch_size", "--data.dir", "--model.layer", "--writer.out_dir"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--data.resize 300 --config c.yaml", "--config c.yaml --data.resize 300"),
        ("--a 1 -c=c.yaml --b 2 --config d.yaml", "-c=c.yaml --config d.yaml --a 1 --b 2"),
        ("--model.weights w --model my.Own --config c", "--config c --model my.Own --model.weights w"),
        ("--data.dir x --config", "--config --data.dir x"),
        ("", ""),
    ],
)
def test_configs_and_the_models_class_come_first(line, expected):
    assert " ".join(configs_first(line.split())) == expected


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            "unrecognized arguments: --data.batchsize 3",
            "--data.batchsize: no such option. Did you mean --data.batch_size",
        ),
        ("unrecognized arguments: stray", "stray: a value without an option"),
        ("Group 'data' does not accept option 'batchsize'", "--data.batchsize: no such option"),
        ("the following arguments are required: data.dir", "--data.dir: missing"),
        ("argument --data.dir: expected one argument", "--data.dir: the value is missing"),
        (
            "Parser key \"data.batch_size\":\n  Expected a <class 'int'>. Got value: many",
            "--data.batch_size many: expected a whole number.",
        ),
        (
            "Parser key \"data.resize\":\n  Errors:\n    - Expected a typing.Literal['auto']\n    - Expected a "
            "<class 'int'>\n    - Expected a <class 'NoneType'>\n  Given value: big",
            "--data.resize big: expected auto, a whole number or null.",
        ),
        ("something new\nwith a second line", "something new\nwith a second line"),
    ],
)
def test_what_jsonargparse_refuses_is_said_in_our_words(message, words):
    assert explain(message, KNOWN).startswith(words)
