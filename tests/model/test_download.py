"""Weights are downloaded once, whole, checked and in time, or the message says what to do."""

import gc
import hashlib
import http.server
import socket
import threading
import warnings
from functools import partial

import pytest
import torch

from featx.errors import UserError
from featx.model import download
from featx.model.download import fetch


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on loopback with one weights file, whose name contains its digest, and an empty cache."""
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


def test_a_failed_download_names_the_url_the_cache_and_what_to_do(server, tmp_path):
    url, _, _ = server
    with pytest.raises(UserError) as caught:
        fetch(f"{url}/missing-12345678.pth")
    for words in (f"{url}/missing-12345678.pth", str(tmp_path / "hub" / "checkpoints"), "--model.weights FILE", "404"):
        assert words in str(caught.value)


def test_a_server_that_never_answers_times_out(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(UserError, match=r"no answer within|timed out"):
            fetch(f"http://127.0.0.1:{port}/net-12345678.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # http.client leaves the socket to the collector
        gc.collect()
