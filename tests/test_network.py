import gc
import hashlib
import http.server
import os
import socket
import threading
import warnings
from functools import partial

import pytest
import torch
from conftest import random_network
from torch import nn
from torchvision import models

from featx import network
from featx.messages import BadValueError, MissingPathError, UserError
from featx.network import build_empty, check_arch, choose_weights, fetch, load_strictly, preset_of, read_checkpoint


def small(seed=0, outputs=2):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, outputs))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_state_dict_is_read_bare_or_in_a_checkpoint(tmp_path, wrap, prefix):
    state = {prefix + name: value for name, value in small().state_dict().items()}
    torch.save(wrap(state), tmp_path / "weights.pth.tar")
    found = read_checkpoint(str(tmp_path / "weights.pth.tar"))
    load_strictly(target := small(1), found, "weights.pth.tar", "small")
    assert all(torch.equal(a, b) for a, b in zip(target.state_dict().values(), state.values(), strict=True))


def test_half_precision_goes_into_float32_and_old_files_lack_num_batches_tracked():
    state = {k: v.half() if v.is_floating_point() else v for k, v in small().state_dict().items()}
    del state["1.num_batches_tracked"]
    load_strictly(target := small(1), state, "f", "small")
    assert target[0].weight.dtype == torch.float32
    assert torch.equal(target[0].weight, state["0.weight"].float())


def test_what_does_not_fit_is_told_and_nothing_is_loaded():
    state = small(outputs=5).state_dict() | {"extra": torch.zeros(1)}
    del state["0.bias"]
    target = small(1)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(BadValueError) as caught:
        load_strictly(target, state, "my.pth", "small")
    text = str(caught.value)
    assert text.startswith("--model.weights my.pth: does not fit small.")
    assert "missing in the file: 0.bias" in text and "not in the network: extra" in text
    assert "of another shape: 2.weight (5, 3), expected (2, 3); 2.bias (5,), expected (2,)" in text
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_hostile_pickle_runs_nothing(tmp_path):
    torch.save({"state_dict": Hostile(str(tmp_path / "ran"))}, tmp_path / "evil.pth")
    with pytest.raises(BadValueError, match=r"evil.pth: the file holds objects that could run code.*mkdir"):
        read_checkpoint(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not a checkpoint", "is no PyTorch checkpoint"),
        (b"", "is no PyTorch checkpoint"),
        ([1, 2], "no state dict in it, it holds list"),
        ({"epoch": 3}, "no state dict in it, it holds epoch"),
        ({}, "no state dict in it"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content, words):
    path = tmp_path / "x.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(BadValueError, match=rf"--model.weights .*x.pth: .*{words}"):
        read_checkpoint(str(path))


def test_a_truncated_checkpoint_is_refused(tmp_path):
    torch.save(small().state_dict(), tmp_path / "whole.pth")
    (tmp_path / "x.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:900])
    with pytest.raises(BadValueError, match="is no PyTorch checkpoint"):
        read_checkpoint(str(tmp_path / "x.pth"))


def test_weights_are_an_entry_a_file_or_random(tmp_path):
    default = models.AlexNet_Weights.DEFAULT
    assert [choose_weights("alexnet", name).entry for name in ("auto", "DEFAULT", "IMAGENET1K_V1")] == [default] * 3
    assert choose_weights("resnet50", "auto").entry is models.ResNet50_Weights.IMAGENET1K_V2
    assert choose_weights("alexnet", "random").random
    (tmp_path / "w.pth").touch()
    assert choose_weights("alexnet", str(tmp_path / "w.pth")).file == str(tmp_path / "w.pth")
    with pytest.raises(MissingPathError, match=r"IMAGENET1K_V9: no such file.*Did you mean IMAGENET1K_V1"):
        choose_weights("alexnet", "IMAGENET1K_V9")
    with pytest.raises(BadValueError, match="this is a folder"):
        choose_weights("alexnet", str(tmp_path))


def test_preprocessing_of_a_file_is_the_first_recipes(tmp_path):
    assert preset_of("resnet50", choose_weights("resnet50", "random")).resize == 256
    assert preset_of("resnet50", choose_weights("resnet50", "DEFAULT")).resize == 232


def test_an_unknown_arch_is_told_with_the_nearest():
    check_arch("vit_b_16")
    with pytest.raises(BadValueError, match=r"--model.arch alexnt: .* Did you mean alexnet"):
        check_arch("alexnt")
    with pytest.raises(BadValueError, match="no classification network"):
        check_arch("fasterrcnn_resnet50_fpn")


@pytest.mark.parametrize("arch", ["alexnet", "googlenet", "regnet_y_400mf", "vit_b_16"])
def test_the_empty_network_has_the_modules_of_the_real_one(arch):
    empty = [name for name, _ in build_empty(arch).named_modules()]
    if arch == "alexnet":
        assert empty == [name for name, _ in random_network(arch).named_modules()]
    assert len(empty) > 10


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on loopback with one weights file, whose name holds its digest, and an empty cache."""
    content = b"weights" * 1000
    folder = tmp_path / "www"
    folder.mkdir()
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content)
    (folder / "net-00000000.pth").write_bytes(content)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            requests.append(self.command)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", name, requests
        httpd.shutdown()
        thread.join()


def test_a_download_lands_in_torchs_cache_once(server, tmp_path):
    url, name, requests = server
    threads = [threading.Thread(target=fetch, args=(f"{url}/{name}",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = tmp_path / "hub" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == [name]
    assert requests.count("GET") == 1
    assert fetch(f"{url}/{name}") == folder / name and requests.count("GET") == 1


def test_a_download_with_another_digest_is_refused_and_not_kept(server, tmp_path):
    url, _, _ = server
    with pytest.raises(UserError, match=r"(?s)cannot be downloaded from .*net-00000000.pth.*invalid hash"):
        fetch(f"{url}/net-00000000.pth")
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []


def test_a_damaged_file_in_the_cache_is_refused(server, tmp_path):
    url, name, _ = server
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / name).write_bytes(b"half")
    with pytest.raises(UserError, match="is damaged: its SHA-256 begins with"):
        fetch(f"{url}/{name}")


def test_no_network_names_the_url_the_cache_and_the_way_out(server, tmp_path):
    url, _, _ = server
    with pytest.raises(UserError) as caught:
        fetch(f"{url}/missing-12345678.pth")
    for words in (f"{url}/missing-12345678.pth", str(tmp_path / "hub" / "checkpoints"), "--model.weights FILE", "404"):
        assert words in str(caught.value)


def test_a_server_that_never_answers_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(network, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(UserError, match=r"no answer within|timed out"):
            fetch(f"http://127.0.0.1:{port}/net-12345678.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # http.client leaves the socket to the collector
        gc.collect()
