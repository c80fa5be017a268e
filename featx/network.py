"""A name -> nn.Module; a checkpoint -> its weights in it, whole or refused."""

import hashlib
import os
import re
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from filelock import FileLock
from torch import Tensor, nn
from torchvision import models

from featx.messages import BadValueError, MissingPathError, UserError, count, did_you_mean, log
from featx.preprocess import Preprocessing

SEED = 0
TIMEOUT = 20  # seconds without an answer


@dataclass(frozen=True)
class Weights:
    """Which weights a network is to get.

    Args:
        name: What it is called in messages and in the record.
        entry: torchvision's weights entry, for weights that torchvision publishes.
        file: A file of the user's.
        random: Whether they are random numbers.
    """

    name: str
    entry: Any = None
    file: str | None = None
    random: bool = False


def check_arch(arch: str) -> None:
    """Raise BadValueError unless torchvision has a classification network of this name."""
    known = models.list_models(module=models)
    if arch not in known:
        raise BadValueError(
            f"--model.arch {arch}: torchvision has no classification network of this name."
            f"{did_you_mean(arch, known)}\n"
            "https://docs.pytorch.org/vision/stable/models.html lists them."
        )


def choose_weights(arch: str, weights: str) -> Weights:
    """Read ``--model.weights`` for a named network: auto, DEFAULT, an entry's name, random, or a file.

    Raises:
        UserError: It is none of them.
    """
    if weights == "random":
        return Weights(f"random (seed {SEED})", random=True)
    entries = models.get_model_weights(arch)
    if weights in ("auto", "DEFAULT"):
        return Weights(str(entries.DEFAULT), entry=entries.DEFAULT)
    if weights in entries.__members__:
        return Weights(str(entries[weights]), entry=entries[weights])
    names = [*entries.__members__, "auto", "random"]
    if os.path.isfile(weights):
        return Weights(weights, file=weights)
    if os.path.isdir(weights):
        raise BadValueError(f"--model.weights {weights}: this is a folder. Expected a file of weights.")
    raise MissingPathError(
        f"--model.weights {weights}: no such file, and no name of weights.{did_you_mean(weights, names)}\n"
        f"Expected a file, or one of {', '.join(names)}."
    )


def preset_of(arch: str, weights: Weights) -> Preprocessing:
    """Return the preprocessing of the weights; for a file or random ones that of the arch's first recipe."""
    entries = models.get_model_weights(arch)
    return Preprocessing.of_weights(weights.entry or entries.__members__.get("IMAGENET1K_V1", entries.DEFAULT))


def build_empty(arch: str) -> nn.Module:
    """Build a network without computing its values, to look at its modules."""
    try:
        with torch.device("meta"):
            return build(arch, None)
    except NotImplementedError:  # RegNet computes its widths with tensors
        return build(arch, None)


def build(arch: str, entry: Any) -> nn.Module:
    """Build a torchvision network: with published weights, or with random ones where ``entry`` is None.

    Raises:
        UserError: The weights are neither in torch's cache nor can they be downloaded.
    """
    if entry is not None:
        fetch(entry.url)
    # These two warn unless told how to fill a network that gets its weights later.
    extra = {"init_weights": False} if arch in ("googlenet", "inception_v3") and entry is None else {}
    network: nn.Module = models.get_model(arch, weights=entry, **extra)
    return network


def fetch(url: str) -> Path:
    """Download weights into torch's cache, once for all processes, checked against the digest in their name.

    The file appears under its name only when it is whole, as ``torch.hub`` does it; what torch.hub lacks are a
    timeout, https://github.com/pytorch/pytorch/issues/34934, and the lock.

    Returns:
        Where the file is.

    Raises:
        UserError: It cannot be downloaded, or its digest is not the one in its name.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / os.path.basename(urlparse(url).path)
    if path.exists():
        return _check_digest(path)
    way_out = (
        f"Put the file into {folder}\nor give weights that are on this machine: --model.weights FILE"
        " (--model.weights random for a trial)"
    )
    digest = _digest_in(path.name)
    before = socket.getdefaulttimeout()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists():
                return _check_digest(path)
            _knock(url)
            log.info("downloading %s to %s", url, folder)
            socket.setdefaulttimeout(TIMEOUT)  # the one way to give torch.hub's urlopen a timeout
            torch.hub.download_url_to_file(url, str(path), digest, progress=True)
    except (OSError, RuntimeError) as err:  # RuntimeError: another digest
        raise UserError(f"weights cannot be downloaded from {url}\n({_first_line(err)}). {way_out}") from err
    finally:
        socket.setdefaulttimeout(before)
        Path(f"{path}.lock").unlink(missing_ok=True)
    return path


def _digest_in(name: str) -> str | None:
    found = torch.hub.HASH_REGEX.search(name)
    return found.group(1) if found else None


def _check_digest(path: Path) -> Path:
    expected = _digest_in(path.name)
    if expected:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(expected):
            raise UserError(
                f"{path} is damaged: its SHA-256 begins with {digest[:8]}, expected {expected}.\n"
                "Remove it, so that it is downloaded again, or put the right file there."
            )
    return path


def _knock(url: str) -> None:
    """Raise OSError unless the server answers in time, whatever resolver, proxy or number of addresses is between."""
    failure: list[BaseException] = [TimeoutError(f"no answer within {TIMEOUT} s")]

    def ask() -> None:
        try:
            with urlopen(Request(url, method="HEAD", headers={"User-Agent": "featx"}), timeout=TIMEOUT):
                failure.clear()
        except HTTPError:
            failure.clear()  # it answers; what it says to a real request is the message
        except BaseException as err:
            failure[:] = [getattr(err, "reason", err)]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if failure:
        raise OSError(_first_line(failure[0])) from failure[0]


def read_checkpoint(file: str) -> dict[str, Tensor]:
    """Read the state dict of a weights file, without running anything that is in it.

    A state dict as it is, or a checkpoint that holds one under ``state_dict``; a prefix ``module.``, which
    DataParallel leaves on every name, is taken off.

    Raises:
        UserError: The file cannot be read, is no checkpoint, or holds more than tensors and plain values.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as err:
        raise UserError(f"--model.weights {file}: {err.strerror or err}") from err
    except Exception as err:
        refused = "unsupported global" in str(err).lower() or "unsupported class" in str(err).lower()
        what = "holds objects that could run code, and was not loaded" if refused else "is no PyTorch checkpoint"
        raise BadValueError(
            f"--model.weights {file}: the file {what} ({_cause(err)}).\n"
            "Expected a state dict, as torch.save(network.state_dict(), FILE) writes it, or a checkpoint that "
            "holds one under state_dict."
        ) from err
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    tensors = isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())
    if not tensors:
        held = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise BadValueError(
            f"--model.weights {file}: no state dict in it, it holds {held or 'nothing'}.\n"
            "Expected names with their tensors, at the top or under state_dict."
        )
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def load_strictly(network: nn.Module, state: dict[str, Tensor], file: str, what: str) -> None:
    """Copy a state dict into a network if every name and shape fits, else change nothing.

    Args:
        network: The network.
        state: Names and tensors; of any float dtype, the network keeps its own.
        file: Where the state dict comes from, for the message.
        what: What the network is called, for the message.

    Raises:
        BadValueError: It does not fit; the first few names of each kind are told.
    """
    own = network.state_dict()
    kinds = {
        "missing in the file": [name for name in own if name not in state and not name.endswith("num_batches_tracked")],
        "not in the network": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own
            if name in state and own[name].shape != state[name].shape
        ],
    }
    if any(kinds.values()):
        lines = [f"--model.weights {file}: does not fit {what}."]
        for kind, names in kinds.items():
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                lines.append(f"  {kind}: {'; '.join(names[:3])}{more}")
        lines.append("Nothing was loaded. Expected the weights of this network: give its --model.arch or --model.")
        raise BadValueError("\n".join(lines))
    network.load_state_dict(own | state)
    log.info("weights: %s (%s)", file, count(len(state), "tensor"))


def _first_line(err: BaseException) -> str:
    return (str(err).strip() or type(err).__name__).split("\n")[0]


def _cause(err: Exception) -> str:
    if found := re.search(r"GLOBAL (\S+)", str(err)):
        return found.group(1)
    if found := re.search(r"WeightsUnpickler error:\s*(.+)", str(err)):
        return f"{type(err).__name__}: {found.group(1).strip()}"
    return f"{type(err).__name__}: {_first_line(err)}"[:100]
