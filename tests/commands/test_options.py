"""The order of options, and what is said of a wrong one."""

import pytest
from jsonargparse import ActionConfigFile
from lightning.pytorch import Trainer

from featx.commands.options import Parser, PlainParser, configs_first
from featx.data.module import ImageFolderDataModule
from featx.errors import BadValueError, UserError
from featx.model.extractor import FeatureExtractor
from featx.writer.callback import FeatureWriter


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


def parser():
    made = Parser(default_env=False)
    made.add_argument("-c", "--config", action=ActionConfigFile)
    made.add_lightning_class_args(FeatureExtractor, "model", subclass_mode=True)
    made.set_defaults({"model": {"class_path": "featx.FeatureExtractor"}})
    made.add_class_arguments(ImageFolderDataModule, "data")
    made.add_class_arguments(FeatureWriter, "writer", instantiate=False)
    made.add_class_arguments(Trainer, "trainer", instantiate=False)
    return made


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["photos"], "photos: a value without an option. Did you mean --data.dir photos?"),
        (["--data.dir"], "--data.dir: expected a value after it: text."),
        (["--writer.header", "--data.dir", "p"], "--writer.header: expected a value after it: true or false."),
        (["--data.dir", ""], "--data.dir '': the value is empty."),
        (["--data.dir=p", "q"], "--data.dir p q: 2 values, expected one.\nQuote a value with spaces."),
        (["--model.layer", "[fc6", "fc7]"], "Write a list as '[fc6,fc7]'"),
        (
            ["--model.layer", "[4:3,fc]", "--data.dir", "p"],
            "layer 243: expected text.\nYAML reads some text",
        ),
        (["--data.batchsize", "3"], "--data.batchsize: no such option. Did you mean --data.batch_size"),
        (["--data.batch", "3"], "--data.batch: no such option. Did you mean --data.batch_size"),
        (["--data.dir", "p", "--model.lyer", "fc7"], "--model.lyer: no such option. Did you mean --model.layer?"),
        (["--data", "photos"], "--data photos: expected one of its options, such as --data.dir."),
        (["--model.layer", "fc7"], "--data.dir: missing. Expected a value for it, such as --data.dir photos."),
        (["--data.batch_size", "many"], "--data.batch_size many: expected a whole number."),
        (["--data.resize", "big"], "--data.resize big: expected auto, a whole number or null."),
        (["--data.strict", "maybe"], "--data.strict maybe: expected true or false."),
        (["--data.value_range", "0,4095"], "--data.value_range 0,4095: expected a list in quotes, '[0,4095]' or null."),
        (["--data.bands", "4,3,2"], "--data.bands 4,3,2: expected a list in quotes, '[4,3,2]' or null."),
        (["--data.background", "white"], "--data.background white: expected a list in quotes, '[0,1,2]' or null."),
        (["--writer.format", "npz"], "expected csv, npy, parquet or a list in quotes, '[csv,npy]'. Did you mean npy?"),
        (["--writer.format", "csv,npy"], "csv,npy: expected csv, npy, parquet or a list in quotes, '[csv,npy]'.\n"),
        (["--model.mean", "0.5"], "--model.mean 0.5: expected auto or a list in quotes, '[0.5,0.5,0.5]'.\n"),
        (["--model.mean", "0.5"], "\n--model.mean: Mean of the three channels"),
        (["--trainer.precision", "fp16"], "--trainer.precision fp16: expected 64, 32, 16, transformer-engine, "),
        (["--trainer.callbacks", "no_such.Thing"], "--trainer.callbacks no_such.Thing: No module named 'no_such'"),
        (["--trainer.callbacks", "EarlyStopping", "--data.dir", "p"], "--trainer.callbacks.monitor: missing."),
        (["--config", "photos"], "--config photos: this is a folder. Expected a YAML file"),
        (["--config", "missing.yaml"], "--config missing.yaml: no such file. Expected a YAML file"),
    ],
)
def test_a_mistyped_option_is_refused_with_what_was_expected(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(BadValueError) as caught:
        parser().parse_args(words)
    assert said in str(caught.value) and len(str(caught.value).splitlines()) <= 6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "the file is empty"),
        (b"# nothing\n", "the file is empty"),
        (b"data:\n", "'data:' has no options in it"),
        (b"data: photos\n", "'data: photos' has no options in it"),
        (b"- data\n", "no options in it"),
        (b"dta:\n  dir: photos\n", "dta: no such option. Did you mean data?"),
        (b"dir: photos\n", "dir: no such option. Did you mean --data.dir?"),
        (b"data:\n  dri: photos\n", "--data.dri: no such option. Did you mean --data.dir"),
        (b"data:\n  batch_size: many\n", "--data.batch_size many: expected a whole number."),
        (b"model:\n  layer: 4:3\n", "--model.layer 243: expected text.\nYAML reads some text as a number, 4:3 as 243"),
        (b"model:\n  lyer: fc7\n", "--model.lyer: no such option. Did you mean --model.layer?"),
        (b"data:\n\tdir: photos\n", "line 2: found character '\\t' that cannot start any token. Indent YAML with"),
        (b"data:\n  dir: [\n", "line 3: "),
        (
            b"data:\n  exclude: [*]\n",
            "line 2: expected alphabetic or numeric character, but found ']'. Put text that begins",
        ),
        (
            b"data:\n  exclude: [*masks]\n",
            "line 2: found undefined alias 'masks'. Put text that begins with *, @, !, % or &",
        ),
        (
            b"data:\n  exclude:\n  - @eaDir/x\n",
            "line 3: found character '@' that cannot start any token. Put text that",
        ),
        (b"data:\n  exclude: [!x]\n", "line 3: expected ',' or ']', but got '<stream end>'. Put text that begins with"),
        (b"\xff\xd8\xff\xe0", "this is not text"),
        (b'{"identity": {}, "files": {}, "rows": 3}', "this is the record of a finished file"),
    ],
)
def test_what_is_wrong_with_a_config_is_said_with_its_name(text, said, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(text)
    with pytest.raises(BadValueError) as caught:
        parser().parse_args(["--config", str(path)])
    assert str(caught.value).startswith(f"--config {path}: {said}")


def test_a_config_in_one_word_is_taken():
    assert parser().parse_args(["--config", "data: {dir: photos}"]).data.dir == "photos"


def test_an_option_that_a_plain_command_lacks_is_told_before_the_file_that_it_hides():
    plain = PlainParser("featx show", "Show.")
    plain.add_argument("file")
    plain.add_argument("--images")
    with pytest.raises(UserError, match=r"^--image: no such option. Did you mean --images\?"):
        plain.parse_args(["--image", "photos"])


def test_a_class_that_a_function_made_is_named_as_in_its_module(tmp_path, monkeypatch):
    (tmp_path / "factory.py").write_text(
        "from featx import FeatureExtractor\n"
        "def make():\n    class Inner(FeatureExtractor):\n        pass\n    return Inner\n"
        "Made = make()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    parser = Parser(default_env=False)
    parser.add_subclass_arguments(FeatureExtractor, "model")
    made = parser.instantiate_classes(parser.parse_args(["--model", "factory.Made", "--model.layer", "fc"])).model
    assert (made.layer, type(made).__name__, type(made).__module__) == ("fc", "Made", "factory")
