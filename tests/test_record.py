"""LAYER.json is data: what is no record of featx is refused in words, and nothing in one is run."""

import json
import shutil

import pytest
from conftest import make_image
from test_writer import run

import featx
from featx.cli import main
from featx.messages import BadValueError
from featx.reader import is_result_name, read_record

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
    'identity.shard_rows is "8", expected a number or null': ("identity.shard_rows", "8"),
    "identity.value_range is [0], expected two numbers": ("identity.value_range", [0]),
    'identity.value_range is [0, "x"], expected two numbers': ("identity.value_range", [0, "x"]),
    "files is [], expected an object": ("files", []),
    "files names none": ("files", {}),
    'files names "../victim/thesis.txt", which is no file of layer "2"': ("files", {"../victim/thesis.txt": SAID}),
    'files names "2/notes.csv", which is no file of layer "2"': ("files", {"2/notes.csv": SAID}),
    'files names "2.csv", which is no file of layer "fc7"': ("layer", "fc7"),
    "files says 7 of 2.csv": ("files", {"2.csv": 7}),
    'files says {"bytes": 7} of 2.csv': ("files", {"2.csv": {"bytes": 7}}),
    'files says {"sha256": "0", "bytes": "7"} of 2.csv': ("files", {"2.csv": {"sha256": "0", "bytes": "7"}}),
}


@pytest.mark.parametrize("words", STRANGE)
def test_what_is_no_record_is_refused_in_words_everywhere(made, copy, words, capsys):
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
def test_what_is_no_json_is_no_record(copy, data):
    copy.with_suffix(".json").write_bytes(data)
    with pytest.raises(BadValueError, match=r"2.json: not a record of featx: it "):
        featx.record(copy)


def test_a_record_that_cannot_be_opened_is_told_from_one_that_is_not_there(copy):
    beside = copy.with_suffix(".json")
    beside.unlink()
    assert read_record(beside) is None and read_record(beside / "2.json") is None
    beside.mkdir()
    with pytest.raises(BadValueError, match=r"2.json: not a record of featx: Is a directory"):
        read_record(beside)


def test_a_record_says_its_format_and_a_newer_one_is_refused_as_such(copy):
    beside = copy.with_suffix(".json")
    record = read_record(beside)
    for format in (1, 2):
        beside.write_text(json.dumps({"format": format} | record))
        assert read_record(beside)["rows"] == 11
    beside.write_text(json.dumps({"format": 3}))
    with pytest.raises(BadValueError, match=r"2.json: made by a newer featx \(format 3\); this one reads up to 2\."):
        read_record(beside)


def test_whoever_replaces_files_asks_for_the_record_of_one_layer(copy):
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
def test_names_of_results_are_exactly_those(layer, name, is_one):
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
