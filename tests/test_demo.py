"""The demo, run as ``make demo`` runs it, on a machine that reaches no server."""

import os
import subprocess
import sys

import demo
from conftest import REPO, read_csv

CLOSED = "http://127.0.0.1:9"  # nobody listens there


def test_demo_takes_a_trained_network_from_a_package_where_nothing_can_be_downloaded(tmp_path):
    env = {**os.environ, "TORCH_HOME": str(tmp_path), "https_proxy": CLOSED, "http_proxy": CLOSED, "no_proxy": ""}
    command = [sys.executable, REPO / "tests" / "demo.py", "demo"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be downloaded") == 1 and "featx: error" not in done.stderr
    assert "--data.dir demo/photos" in done.stdout and "RANDOM" not in done.stderr
    names, rows = read_csv(tmp_path / "demo" / "features" / "pooled.csv")
    assert len(names) == 15 and rows.shape == (15, 1280)
    table = done.stdout.partition("most similar image")[2].splitlines()[2:17]
    assert done.stdout.splitlines()[-1] == "Open demo/features/pooled.html in a browser."
    assert (tmp_path / "demo" / "features" / "pooled.html").stat().st_size > 100_000
    assert [line.split()[0] for line in table] == names
    assert all(line.split()[1] in set(names) - {line.split()[0]} for line in table)
    assert demo.LITE in (REPO / "docs" / "networks.md").read_text()
    again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "already finished, nothing to do: 15 rows" in again.stdout
    assert "motorcycle-left.png" in next(line for line in table if line.split()[0] == "motorcycle-right.png")
