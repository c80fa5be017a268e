"""Files of weights in several parts, and forms of files that are no checkpoint."""

import json
import zipfile

import pytest
import safetensors.torch
import torch
from conftest import random_network

from featx.errors import BadValueError, MissingPathError
from featx.model import files
from featx.model.build import choose_weights
from featx.model.checkpoint import read_checkpoint


@pytest.fixture
def index(tmp_path):
    """The index of two shards with the weights of a network."""
    state = random_network("squeezenet1_1").state_dict()
    names = list(state)
    homes = {name: f"model-0000{1 + (i > 20)}-of-00002.safetensors" for i, name in enumerate(names)}
    for home in set(homes.values()):
        part = {name: state[name] for name in names if homes[name] == home}
        safetensors.torch.save_file(part, tmp_path / home)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 5}, "weight_map": homes}))
    return index


def test_weights_in_several_files_are_read_by_their_index(index):
    state = random_network("squeezenet1_1").state_dict()
    found = read_checkpoint(str(index))
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    assert choose_weights("squeezenet1_1", str(index)).file == str(index)


def test_torchs_own_shards_are_read_too(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "m-00001-of-00001.bin")
    (tmp_path / "m.bin.index.json").write_text('{"weight_map": {"a": "m-00001-of-00001.bin"}}')
    assert read_checkpoint(str(tmp_path / "m.bin.index.json"))["a"] == 1


def test_an_index_without_its_files_or_of_something_else_is_refused(index):
    first, second = sorted(index.parent.glob("*.safetensors"))
    with pytest.raises(BadValueError, match=r"one of several files .*\n.*next to them, model.safetensors.index.json"):
        files.load(str(first))
    homes = json.loads(index.read_text())["weight_map"]
    for changed, words in (
        (homes | {"more": first.name}, "does not contain more"),
        (homes | {"more": "../secret.safetensors"}, "not a file's name"),
        (None, "not a PyTorch checkpoint, or damaged"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(BadValueError, match=words):
            files.load(str(index))
    index.write_text(json.dumps({"weight_map": homes}))
    second.unlink()
    with pytest.raises(MissingPathError, match=r"model-00002-of-00002.safetensors is not next to it"):
        files.load(str(index))


def zipped(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"{}")


FORMS = {
    "a program of torch.export": lambda path: zipped(path, "w/archive_format", "w/models/model.json", "w/byteorder"),
    "a program of torch.export.": lambda path: zipped(path, "version", "serialized_exported_program.json"),
    "a TorchScript program": lambda path: zipped(path, "w/data.pkl", "w/constants.pkl", "w/code/__torch__.py"),
    "a file of numpy arrays": lambda path: zipped(path, "a.npy", "b.npy"),
    "an ONNX model": lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xff"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_another_form_is_refused_by_what_it_is(tmp_path, form):
    FORMS[form](tmp_path / "w.bin")
    with pytest.raises(BadValueError, match=rf"w.bin: this is {form}.*\n") as caught:
        files.load(str(tmp_path / "w.bin"))
    assert len(str(caught.value).splitlines()) == 2 and "damaged" not in str(caught.value)
