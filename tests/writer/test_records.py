"""LAYER.json is data: what is no record of featx is refused in words, and nothing in one is run."""

import json
import os
import shlex
import shutil
import sys
from functools import partial

import pytest
import torch
from conftest import make_image
from tiny import run

import featx
from featx import FeatureExtractor
from featx.cli import main
from featx.commands import verify
from featx.errors import BadValueError
from featx.writer.records import is_result_name, read_record

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "photos").mkdir()
    for i in range(11):
        make_image(i, (30, 30)).save(folder / "photos" / f"{i}.png")
    run(folder / "photos", folder / "one")
    run(folder / "photos", folder / "many", shard_rows=8, format=["csv", "npy"])
    return folder


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made / "one", tmp_path / "one")
    return tmp_path / "one" / "2.csv"


def put(record, key, value):
    """Return a record with another value at a dotted key, or without the key."""
    record = json.loads(json.dumps(record))
    *above, last = key.split(".")
    inner = record
    for word in above:
        inner = inner[word]
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    return record


GONE = object()
SAID = {"sha256": "0" * 64, "bytes": 1}
STRANGE = {
    "it has no layer": {"hello": 1},
    "it has no layer ": [1, 2],
    "it has no layer  ": "a string",
    "it has no layer   ": None,
    'rows is "many", expected a number': ("rows", "many"),
    "rows is true, expected a number": ("rows", True),
    "rows is -1, expected a number": ("rows", -1),
    "it has no errors_used": ("errors_used", GONE),
    "it has no identity.weights": ("identity", 7),
    "it has no run.options.data.dir": ("run.options.data", []),
    "run.options.data.dir is 7, expected text": ("run.options.data.dir", 7),
    'run.options.data.dir is "", expected text': ("run.options.data.dir", ""),
    'identity.shard_rows is "8", expected a number or null': ("identity.shard_rows", "8"),
    "identity.value_range is [0], expected two numbers, the lower first": ("identity.value_range", [0]),
    'identity.value_range is [0, "x"], expected two numbers': ("identity.value_range", [0, "x"]),
    "identity.value_range is [9, 9], expected two numbers, the lower first": ("identity.value_range", [9, 9]),
    "files is [], expected an object": ("files", []),
    "files is empty": ("files", {}),
    'files has "../victim/thesis.txt", which is not a file of layer "2"': ("files", {"../victim/thesis.txt": SAID}),
    'files has "2/notes.csv", which is not a file of layer "2"': ("files", {"2/notes.csv": SAID}),
    'files has "2.csv", which is not a file of layer "fc7"': ("layer", "fc7"),
    'files has "2.csv", which is not a file of layer "2"': ("identity.shard_rows", 8),
    'files has "2/00000.csv", which is not a file of layer "2"': ("files", {"2/00000.csv": SAID}),
    "files has 7 for 2.csv": ("files", {"2.csv": 7}),
    'files has {"bytes": 7} for 2.csv': ("files", {"2.csv": {"bytes": 7}}),
    'files has {"sha256": "0", "bytes": "7"} for 2.csv': ("files", {"2.csv": {"sha256": "0", "bytes": "7"}}),
}


@pytest.mark.parametrize("words", STRANGE)
def test_an_invalid_record_is_refused_with_a_message_everywhere(made, copy, words, capsys):
    beside, strange = copy.with_suffix(".json"), STRANGE[words]
    beside.write_text(json.dumps(put(read_record(beside), *strange) if isinstance(strange, tuple) else strange))
    told = f"{beside}: not a record of featx: {words.strip()}"
    for reads in (read_record, featx.record):
        with pytest.raises(BadValueError) as caught:
            reads(beside)
        assert str(caught.value).startswith(told)
    for argv in (["verify", str(copy)], ["show", str(copy)]):
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"featx: error: {told}") and said.count("\n") == 2
    assert len(featx.load(copy)[0]) == 11  # which needs no record


@pytest.mark.parametrize("data", [b"", b"\xff", b"{", b"[" * 100_000, b"1" * 5000], ids=len)
def test_invalid_json_is_not_a_record(copy, data):
    copy.with_suffix(".json").write_bytes(data)
    with pytest.raises(BadValueError, match=r"2.json: not a record of featx: it "):
        featx.record(copy)


def test_an_unreadable_record_is_not_a_missing_record(copy):
    beside = copy.with_suffix(".json")
    beside.unlink()
    assert read_record(beside) is None and read_record(beside / "2.json") is None
    beside.mkdir()
    with pytest.raises(BadValueError, match=r"2.json: not a record of featx: Is a directory"):
        read_record(beside)


def test_a_record_has_a_format_and_a_newer_one_is_refused(copy):
    beside = copy.with_suffix(".json")
    record = read_record(beside)
    for format in (1, 2):
        beside.write_text(json.dumps({"format": format} | record))
        assert read_record(beside)["rows"] == 11
    beside.write_text(json.dumps({"format": 3}))
    with pytest.raises(BadValueError, match=r"2.json: format 3 is from a newer featx; this version .* to 2\."):
        read_record(beside)


def test_a_record_of_another_layer_is_refused_before_files_are_replaced(copy):
    beside = copy.with_name("fc7.json")
    copy.with_suffix(".json").rename(beside)
    assert featx.record(beside)["layer"] == "2"  # renamed by its user
    with pytest.raises(BadValueError, match=r'fc7.json: not a record of featx: layer is "2", expected "fc7"\.'):
        read_record(beside, "fc7")


@pytest.mark.parametrize(("layer", "name", "is_one"), [
    ("fc7", "fc7.csv", True),
    ("fc7", "fc7.names.txt", True),
    ("fc7", "fc7/00000.parquet", True),
    ("fc7", "fc7/123456.names.txt", True),
    ("blocks/0", "blocks%2F0.npy", True),
    ("blocks/0", "blocks/0.npy", False),
    ("relu:3#0", "relu%3A3%230.csv", True),
    ("relu:3#0", "relu:3#0.csv", False),
    ("fc7", "fc7.json", False),
    ("fc7", "fc7.errors.csv", False),
    ("fc7", "fc6.csv", False),
    ("a.b", "aXb.csv", False),
    ("fc7", "fc7.csv\n", False),
    ("fc7", "fc7/007.csv", False),
    ("fc7", "fc7/2024-notes.txt", False),
    ("fc7", "fc7/../fc6.csv", False),
    ("fc7", "../fc7.csv", False),
    ("fc7", "/fc7.csv", False),
    ("..", "../00000.csv", False),
    (".", "./00000.csv", False),
    ("", "/00000.csv", False),
])  # fmt: skip
def test_only_these_names_are_results(layer, name, is_one):
    assert is_result_name(layer, name) == is_one


def test_the_folder_of_shards_is_found_from_inside_it(made, tmp_path, monkeypatch, capsys):
    pytest.importorskip("bokeh")
    shutil.copytree(made / "many", tmp_path / "out")
    shards = tmp_path / "out" / "2"
    for inside, dots in ((shards, "."), (shards.parent, "2/"), (shards, "../2/.")):
        monkeypatch.chdir(inside)
        assert main(["verify", dots]) == 0
        assert capsys.readouterr().out.count("as recorded") == 4
        assert featx.record(dots) == read_record(tmp_path / "out" / "2.json")
    monkeypatch.chdir(shards)
    assert main(["show", "."]) == 0
    assert capsys.readouterr().out == "../2.html\n" and (shards.parent / "2.html").exists()
    for shard in shards.glob("*.npy"):
        shard.unlink()
    assert len(featx.load(".")[0]) == 11
    (shards / "below").mkdir()
    monkeypatch.chdir(shards / "below")
    assert featx.record("..")["layer"] == "2"


# -- rows computed again, from what a record says --------------------------------------------------------------------

BUILD = """
open("was_run", "w").close()
def build():
    import torch
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 4))
"""


@pytest.fixture
def network_made(tmp_path, monkeypatch):
    """A file of FeatureExtractor's own, with the network that a function of the user's makes and weights in a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_build", raising=False)
    (tmp_path / "photos").mkdir()
    make_image(0, (30, 30)).save(tmp_path / "photos" / "0.png")
    (tmp_path / "own_build.py").write_text(BUILD)
    import own_build

    torch.save(own_build.build().state_dict(), "first.pth")
    torch.save(own_build.build().state_dict(), "second.pth")
    run("photos", "out", model=partial(FeatureExtractor, arch="own_build.build", weights="first.pth"))
    sys.modules.pop("own_build")
    (tmp_path / "was_run").unlink()
    return tmp_path / "out" / "2.csv"


def told_by(capsys, status, *argv):
    assert main(["verify", *map(str, argv)]) == status
    told = "".join(capsys.readouterr())
    assert "Traceback" not in told and told.count("\n") <= 5
    return told


def change(path, key, value):
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(put(json.loads(beside.read_text()), key, value)))


def test_a_records_class_is_used_only_if_the_user_names_it(made, copy, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = (copy, "--images", made / "photos")
    told = told_by(capsys, 2, *again)
    assert "2.json: code that is not part of featx made these rows, and a record alone does not run it.\n" in told
    command = told.split("If you trust that code: featx verify ")[1]
    assert "11 rows recomputed" in told_by(capsys, 0, *shlex.split(command))
    told = told_by(capsys, 2, *again, "--model", "other.Class")
    assert "--model other.Class: " in told and "2.json says tiny.Tiny." in told
    change(copy, "run.options.model_class", "os.system")
    change(copy, "run.options.model", {"command": "touch was_run"})
    assert "--model os.system" in told_by(capsys, 2, *again)
    assert "--model tiny.Tiny: " in told_by(capsys, 2, *again, "--model", "tiny.Tiny")
    assert "expected module.Class, a subclass of featx.FeatureExtractor" in told_by(
        capsys, 2, *again, "--model", "os.system"
    )
    assert not (tmp_path / "was_run").exists()
    assert "os.system: only used to recompute rows. Expected --images" in told_by(
        capsys, 2, copy, "--model", "os.system"
    )


def test_a_records_function_is_called_only_if_the_user_names_it(network_made, capsys):
    again = (network_made, "--images", "photos")
    for model_class in ("featx.model.extractor.FeatureExtractor", "featx.FeatureExtractor"):
        change(network_made, "run.options.model_class", model_class)
        told = told_by(capsys, 2, *again)
        assert (
            f"If you trust that code: featx verify {network_made} --images photos --model.arch own_build.build" in told
        )
        told = told_by(capsys, 2, *again, "--model.arch", "own_build.other")
        assert "--model.arch own_build.other: " in told and "2.json says own_build.build." in told
        assert not os.path.exists("was_run") and "own_build" not in sys.modules
    assert "1 row recomputed" in told_by(capsys, 0, *again, "--model.arch", "own_build.build")


def test_weights_are_checked_against_the_record_before_rows(network_made, capsys):
    shutil.copy("second.pth", "first.pth")
    told = told_by(capsys, 1, network_made, "--images", "photos", "--model.arch", "own_build.build")
    digest = featx.record(network_made)["identity"]["weights"]
    assert f"the weights, first.pth, are not the recorded ones: SHA-256 {digest[:8]}… -> " in told


UNUSABLE = {
    "--data.batch_size x: expected a whole number.": ("data.batch_size", "x"),
    "--data.batch_size 0: expected a whole number of at least 1.": ("data.batch_size", 0),
    "--data.batch_size null: expected a value.": ("data.batch_size", None),
    "--data.files 7: expected text": ("data.files", 7),
    "--data.gone: no such option.": ("data.gone", 1),
    "--model.gone: no such option.": ("model.gone", 1),
    "--model.layer 7: expected text": ("model.layer", 7),
    "--model.arch {'class_path': 'os.system'}: expected text.": ("model.arch", {"class_path": "os.system"}),
    "its layer is 2, but --model.layer 1": ("model.layer", "1"),
}


@pytest.mark.parametrize("words", UNUSABLE)
def test_options_of_a_record_are_checked_like_those_of_the_command_line(made, copy, words, capsys):
    key, value = UNUSABLE[words]
    change(copy, f"run.options.{key}", value)
    told = told_by(capsys, 2, copy, "--images", made / "photos", "--model", "tiny.Tiny")
    assert f"2.json: not a record that featx can use: {words}" in told


def test_a_removed_option_is_ignored_if_it_changes_nothing(made, copy, capsys, monkeypatch):
    again = (copy, "--images", made / "photos", "--model", "tiny.Tiny")
    monkeypatch.setitem(verify.LEFT_OUT, "gone", 5)
    change(copy, "run.options.model.gone", 5)
    told_by(capsys, 0, *again)
    change(copy, "run.options.model.gone", 6)
    assert "2.json: --model.gone 6 is not taken from a record." in told_by(capsys, 2, *again)


def test_whether_weights_may_run_code_is_never_taken_from_a_record(network_made, capsys):
    again = (network_made, "--images", "photos", "--model.arch", "own_build.build")
    change(network_made, "run.options.model.unsafe_pickle", True)
    assert "2.json: --model.unsafe_pickle true is not taken from a record." in told_by(capsys, 2, *again)


def test_a_damaged_list_of_images_counts_as_missing(copy, capsys):
    kept = copy.parent / ".featx" / "2" / "images.gz"
    for data in (b"", b"stray", kept.read_bytes()[:-9], kept.read_bytes()[:12] + b"\0" * 30):
        kept.write_bytes(data)
        assert "11 rows of 4 values as recorded" in told_by(capsys, 0, copy)


@pytest.mark.parametrize("text", ["", "hello\n", "path,reason,exception\na\n"])
def test_a_list_of_errors_that_featx_did_not_write_is_refused(copy, text, capsys):
    copy.with_suffix(".errors.csv").write_text(text)
    assert main(["verify", str(copy)]) == 2
    assert "2.errors.csv: not a list of errors that featx wrote" in capsys.readouterr().err
