"""What the tests share: made-up photographs, random weights in a file, the command line as a process, the oracle."""

import csv
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from start import Process
from store import Server
from torch import nn
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

from featx.data.module import ImageFolderDataModule
from featx.data.preprocess import Preprocessing
from featx.errors import UserError, log, name_job

REPO = Path(__file__).parent.parent
ENV = {**os.environ, "PYTHONWARNINGS": "", "TORCH_HOME": "/nonexistent/torch", "COLUMNS": "80"}


def make_image(seed: int, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Coarse coloured noise, enlarged: like a photograph, it has edges and areas, and differs from seed to seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 images of several shapes, modes and suffixes in three class folders, one of them nested."""
    root = tmp_path_factory.mktemp("photos")
    shapes = [(320, 240), (240, 320), (300, 300), (256, 256), (400, 230)]
    modes = ["RGB", "L", "RGB", "CMYK", "RGB", "P", "1"]
    for i in range(37):
        folder = root / ["ants", "bees/wild", "cats"][i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        mode = modes[i % len(modes)]
        suffix = ".png" if mode in ("P", "1") else [".jpg", ".JPEG"][i % 2]
        make_image(i, shapes[i % len(shapes)], mode).save(folder / f"image-{i:02}{suffix}")
    return root


@pytest.fixture(scope="session")
def three_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("three")
    for i in range(3):
        make_image(100 + i, (260, 240)).save(root / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def messages_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages name options, as nearly all tests expect them, until a test says otherwise."""
    monkeypatch.setattr(UserError, "on_command_line", True)


@pytest.fixture(autouse=True)
def log_of_its_own() -> None:
    """Begin with the log as Python has it: a command, run in this process before, set it up as for its own."""
    log.handlers, log.propagate = [], True
    log.setLevel("NOTSET")
    name_job("")


@pytest.fixture(scope="session")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An S3 server with a bucket, ``bucket``."""
    server = Server(tmp_path_factory.mktemp("store"))
    try:
        server.make_bucket("bucket")
        yield server
    finally:
        server.close()


def random_network(name: str, seed: int = 1, **options: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.get_model(name, weights=None, **options).eval()


@pytest.fixture(scope="session")
def alexnet() -> nn.Module:
    return random_network("alexnet")


@pytest.fixture(scope="session")
def alexnet_file(alexnet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(alexnet.state_dict(), path)
    return path


Run = Callable[..., subprocess.CompletedProcess[str]]


def launch(*args: object, cwd: Path | None = None, env: dict[str, str] | None = None, **how: object) -> Process:
    """Start ``featx ARGS`` as a process that is forked where featx is imported already."""
    return Process(args, cwd or Path.cwd(), {**ENV, "PYTHONPATH": str(REPO), **(env or {})}, **how)


def featx(*args: object, python: tuple[str, ...] = (), **how: object) -> subprocess.CompletedProcess[str]:
    """Run ``featx ARGS`` as a process and return it, ended, with its stdout and stderr as text.

    Args:
        args: The command line.
        python: What starts a Python for it, ``(sys.executable,)``; otherwise it is forked.
        how: Its folder, ``cwd``, and what its environment has in addition, ``env``.
    """
    if python:
        env = {**ENV, "PYTHONPATH": str(REPO), **how.pop("env", {})}
        command = [*python, "-m", "featx", *map(str, args)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, **how)
    process = launch(*args, **how)
    out, err = process.communicate()
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def on_two_machines(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``featx ARGS`` as a process on each of two machines, with what torchrun sets, and return the first one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "TORCHELASTIC_RUN_ID": "none"}
    env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    line = (*args, "--trainer.num_nodes", "2", "--trainer.accelerator", "cpu")
    both = [launch(*line, cwd=cwd, env=env | {"RANK": str(node), "GROUP_RANK": str(node)}) for node in range(2)]
    (out, err), (_, err_of_second) = (process.communicate(120) for process in both)
    assert both[1].returncode == 0, err_of_second
    return subprocess.CompletedProcess(args, both[0].returncode, out, err)


def predict(photos: Path, out: Path, *args: object, **how: object) -> subprocess.CompletedProcess[str]:
    """Run ``featx predict`` and expect that it works."""
    done = featx("predict", "--data.dir", photos, "--writer.out_dir", out, *args, **how)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def read_csv(path: Path) -> tuple[list[str], np.ndarray]:
    """Read a CSV as any reader does: names and ``(N, D) float32``."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    return [row[0] for row in rows], np.array([row[1:] for row in rows], dtype=np.float32)


def loader(photos: Path, processes: int = 1, rank: int = 0, **options: object):
    """A data module and the loader it gives to one rank of a run on CPUs, without a Trainer."""
    data = ImageFolderDataModule(str(photos), **options)
    data.setup("predict")
    data.batches = np.array_split(np.arange(-(-len(data.images) // data.batch_size)), processes)[rank]
    data.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        num_devices=processes,
        lightning_module=SimpleNamespace(preprocessing=Preprocessing.usual()),
    )
    return data, data.predict_dataloader()


ALEXNET_LAYERS = {"fc6": "classifier.1", "fc7": "classifier.4", "fc8": "classifier.6"}


def oracle(
    root: Path, network: nn.Module, paths: list[str], resize: int | None = 256, crop: int | None = 224
) -> tuple[list[str], list[np.ndarray]]:
    """Names and each path's activations ``(N, D)``, by plain torch: hook, copy, one image at a time."""
    steps = [
        *([transforms.Resize(resize)] if resize else []),
        *([transforms.CenterCrop(crop)] if crop else []),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    images = ImageFolder(str(root), transforms.Compose(steps))
    seen: dict[str, list[np.ndarray]] = {path: [] for path in paths}

    def keep(path: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen[path].append(output.detach().clone().flatten(1).numpy())

    handles = [network.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    with torch.no_grad():
        for image, _ in images:
            network(image[None])
    for handle in handles:
        handle.remove()
    names = [os.path.basename(path) for path, _ in images.samples]
    return names, [np.concatenate(seen[path]) for path in paths]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """L2 norm of the difference over the norm of what was expected, of the worst row."""
    assert found.shape == expected.shape
    return float((np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())
