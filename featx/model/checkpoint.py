"""A file of weights -> its state dict -> a network that has all of it, or a reason why not."""

import hashlib
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.serialization import SourceChangeWarning

from featx.errors import BadValueError, UserError, count, did_you_mean, first_line, log
from featx.process.shared import ignored

State = dict[str, Tensor]

PLAIN = ("state_dict", "model_state_dict", "model", "network", "net")  # where checkpoints keep the network, first wins
PREFIXES = {"network", "model", "backbone"}  # the attribute that held the network, in Lightning modules and others
WRAPPERS = {"module", "_orig_mod"}  # what DataParallel, DDP, AveragedModel and torch.compile put into names
COUNTERS = ("num_batches_tracked", "total_ops", "total_params")  # BatchNorm's and thop's; no output depends on them
RENAMED = (
    # https://github.com/pytorch/vision/blob/main/torchvision/models/densenet.py: names of before 2017
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)"), r"\1\2"),
    # https://github.com/pytorch/vision/blob/main/torchvision/models/vision_transformer.py: MLPBlock, version 1
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)


def read_checkpoint(file: str, key: str | None = None, unsafe_pickle: bool = False) -> State:
    """Read the state dict of a weights file, without running anything that is in it unless that is allowed.

    Args:
        file: A file of ``torch.save``, with or without zip, a checkpoint of Lightning, or safetensors.
        key: Where the state dict is in it, dotted; also the first words of the names that are wanted.
        unsafe_pickle: Whether a file that needs it may run code.

    Returns:
        Names, as they are in the file, and tensors on the CPU.

    Raises:
        UserError: The file cannot be read, is no checkpoint, or holds more than tensors and plain values.
    """
    content = _load(file, unsafe_pickle)
    found = _state_dicts(content)
    if key is not None:
        return _below(found, key, file)
    order = {tuple(PLAIN.index(word) for word in path.split(".")): path for path in found if _is_plain(path)}
    if not order and "" not in found:
        held = _few(list(map(str, content)), 5) if isinstance(content, Mapping) else type(content).__name__
        others = f" State dicts: {_few(list(found), 5)}; --model.checkpoint_key says which to take." if found else ""
        raise BadValueError(
            f"--model.weights {file}: no state dict at the top of it or under {', '.join(PLAIN)}.\n"
            f"It holds {held or 'nothing'}.{others}\n"
            "Expected names with their tensors, as torch.save(network.state_dict(), FILE) writes them."
        )
    chosen = order[min(order)] if order else ""
    if beside := [path or "the top" for path in found if path != chosen]:
        log.info("weights: %s of %s is taken, not %s; --model.checkpoint_key decides", chosen, file, _few(beside))
    return found[chosen]


def _load(file: str, unsafe_pickle: bool) -> Any:
    try:
        with open(file, "rb") as opened:
            head = opened.read(9)
        if file.endswith(".safetensors") or head[8:] == b"{":  # a length, then JSON
            return safetensors.torch.load_file(file)
        if _is_torchscript(file):
            raise BadValueError(
                f"--model.weights {file}: this is a TorchScript program, whose code would run.\nExpected a state "
                "dict: torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE) writes it, if you trust the file."
            )
        return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as err:
        raise UserError(f"--model.weights {file}: {err.strerror or err}") from err
    except Exception as err:
        if not re.search(r"unsupported (global|class)", str(err), re.IGNORECASE):
            raise BadValueError(
                f"--model.weights {file}: the file is no PyTorch checkpoint, or damaged ({_cause(err)}).\n"
                "Expected what torch.save(network.state_dict(), FILE) writes, a checkpoint that holds that, or "
                "safetensors."
            ) from err
        if not unsafe_pickle:
            raise BadValueError(
                f"--model.weights {file}: the file holds objects that could run code, and was not loaded "
                f"({_cause(err)}).\nExpected tensors and plain values. If you trust whoever made the file: "
                "--model.unsafe_pickle true"
            ) from err
        return _load_unsafely(file, _cause(err))


def _load_unsafely(file: str, refused: str) -> Any:
    log.warning("--model.unsafe_pickle true: %s holds %s; loading it runs whatever code its maker put into it",
                file, refused)  # fmt: skip
    try:
        with ignored("", SourceChangeWarning):
            return torch.load(file, map_location="cpu", weights_only=False)
    except Exception as err:
        raise BadValueError(
            f"--model.weights {file}: unpickling it failed: {type(err).__name__}: {first_line(err)}\n"
            "Expected that its classes can be imported here, as where it was made."
        ) from err


def _is_torchscript(file: str) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _cause(err: Exception) -> str:
    if found := re.search(r"GLOBAL (\S+)|unsupported class (\S+)", str(err), re.IGNORECASE):
        return found.group(1) or found.group(2)
    if found := re.search(r"WeightsUnpickler error:\s*(.+)", str(err)):
        return f"{type(err).__name__}: {found.group(1).strip()}"[:100]
    return f"{type(err).__name__}: {first_line(err)}"[:100]


def _state_dicts(content: Any, path: str = "", depth: int = 3) -> dict[str, State]:
    """Return every state dict in a checkpoint, a mapping of mostly tensors, by its dotted key; "" is the top."""
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping) or not depth:
        return {}
    state = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    found = {path: state} if 2 * len(state) > len(content) else {}
    for name, value in content.items():
        if isinstance(name, str):
            found |= _state_dicts(value, f"{path}.{name}" if path else name, depth - 1)
    return found


def _is_plain(path: str) -> bool:
    return all(word in PLAIN for word in path.split("."))


def _below(found: dict[str, State], key: str, file: str) -> State:
    """Return the state dict at a key; where the key goes on inside a state dict, the names that begin so."""
    below = [path for path in found if path == key or (path.startswith(key + ".") and _is_plain(path[len(key) + 1 :]))]
    if below:
        return found[min(below, key=len)]
    for path, state in found.items():
        prefix = (key.removeprefix(f"{path}.") if path else key) + "."
        short = {_unwrap(name, WRAPPERS): value for name, value in state.items()}
        if inside := _under(prefix, short):
            return inside
    first = {_unwrap(name, WRAPPERS).split(".")[0] for state in found.values() for name in state if "." in name}
    raise BadValueError(
        f"--model.checkpoint_key {key}: {file} has no state dict there.{did_you_mean(key, [*found, *first])}\n"
        f"Expected one of {_few([path for path in found if path], 8) or 'none'}, or the first words of names in one: "
        f"{_few(sorted(first), 8)}."
    )


def fit(
    network: nn.Module,
    state: State,
    file: str,
    title: str,
    strict: bool = True,
    whose: Callable[[Mapping[str, torch.Size]], str | None] = lambda shapes: None,
) -> list[str]:
    """Copy a state dict into a network if all of the network is in it, else change nothing.

    Prefixes are taken off, what lies beside the network is left, and a classifier with another number of classes
    is made as large as the file's; each is told.

    Args:
        network: The network.
        state: Names, as they are in the file, and tensors, of any float dtype; the network keeps its own.
        file: Where they come from, for the messages.
        title: What the network is called, for the messages.
        strict: Whether all of the network must be there; else what fits is loaded.
        whose: Says which arch's tensors of these names and shapes are, for the message.

    Returns:
        What is not plainly the file's, in words: a fitted classifier, tensors that were not loaded.

    Raises:
        BadValueError: It does not fit; the first few names of each kind are told.
    """
    state, left = _named_like(network.state_dict(), state, file)
    told = _fit_classes(network, state, title)
    own = network.state_dict()
    computed = {name for name, buffer in network.named_buffers() if not buffer.is_floating_point()}  # index tables
    needed = [name for name in own if name not in computed and not name.endswith(COUNTERS)]
    loaded = {name: state[name] for name in own if name in state and _fits(state[name], own[name])}
    kinds = {
        "missing in the file": [name for name in needed if name not in state],
        "not in the network": [n for n in state if n not in own and _is_inside(n, own) and not n.endswith(COUNTERS)],
        "of another shape or kind": [f"{name} {_kind(state[name])}, expected {_kind(own[name])}"
                                     for name in own if name in state and name not in loaded],
    }  # fmt: skip
    if (strict and any(kinds.values())) or not any(name in loaded for name in needed):
        raise _misfit(file, title, kinds, strict, whose(_shapes(state)))
    if left := left + [name for name in state if name not in own and not name.endswith(COUNTERS)]:
        log.info("weights: left in %s, not of the network: %s", file, _few(left))
    if kept := [name for name in needed if name not in loaded]:
        told.append(f"not strict: {len(kept)} of {count(len(needed), 'tensor')} stay as built, random: {_few(kept)}")
        log.warning("weights: %s", told[-1])
    if bad := [name for name, value in loaded.items() if value.is_floating_point() and not value.isfinite().all()]:
        log.warning("weights: %s holds values that are not finite: %s", file, _few(bad))
    own.update(loaded)  # it keeps the versions of the modules, which some of torchvision's ask for
    network.load_state_dict(own)
    return told


def _named_like(own: Mapping[str, Tensor], state: State, file: str) -> tuple[State, list[str]]:
    """Give the tensors the network's names: wrappers' words out, old names new, and the prefix off that fits best.

    Returns:
        The tensors under the prefix, and the names that are not.
    """
    wrappers = WRAPPERS - {word for name in own for word in name.split(".")}
    names = {name: _unwrap(name, wrappers) for name in state}
    for pattern, new in RENAMED:
        names = {name: pattern.sub(new, short) for name, short in names.items()}
    if len(set(names.values())) == len(names):
        state = {names[name]: value for name, value in state.items()}
    found = Counter(
        name[: dot.end()] for name in state for dot in re.finditer(r"^|\.", name) if name[dot.end() :] in own
    )
    rank = {prefix: (2 * number >= len(own), set(prefix.split(".")) <= PREFIXES | {""}, number)
            for prefix, number in found.items()}  # fmt: skip
    best = sorted((prefix for prefix in found if rank[prefix] == max(rank.values())), key=len)
    if not best:
        return state, []
    if len(best) > 1 and rank[best[0]][0]:
        raise BadValueError(
            f"--model.weights {file}: {len(best)} networks in it that would fit: names that begin with "
            f"{_few([prefix.rstrip('.') or 'nothing' for prefix in best])}.\n"
            "Expected to be told which: --model.checkpoint_key " + best[-1].rstrip(".")
        )
    if prefix := best[0]:
        log.info("weights: names that begin with %s are taken", prefix)
    return _under(prefix, state), [name for name in state if not name.startswith(prefix)]


def _under(prefix: str, state: State) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _unwrap(name: str, wrappers: set[str]) -> str:
    return ".".join(word for word in name.split(".") if word not in wrappers)


def _fit_classes(network: nn.Module, state: State, title: str) -> list[str]:
    """Give the last Linear, else the last 1x1 Conv2d, as many outputs as the file has; auxiliary ones beside it too."""
    named = list(network.named_modules())
    ends: dict[str, Any] = {path: module for path, module in named if isinstance(module, nn.Linear)}
    ends = ends or {p: m for p, m in named if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)}
    shapes = {path: state[f"{path}.weight"].shape for path in ends if f"{path}.weight" in state}
    path = list(ends)[-1] if ends else ""
    if path not in shapes or (new := shapes[path][0]) == (old := len(ends[path].weight)):
        return []
    for name, shape in shapes.items():
        weight = ends[name].weight
        if len(weight) == old and shape == (new, *weight.shape[1:]):
            ends[name].weight = nn.Parameter(weight.new_empty(shape))
            if ends[name].bias is not None:
                ends[name].bias = nn.Parameter(weight.new_empty(new))
            setattr(ends[name], "out_features" if isinstance(ends[name], nn.Linear) else "out_channels", new)
    if len(ends[path].weight) == old:
        return []
    told = f"{path} is fitted to the {new} classes of the file, {title} has {old}"
    log.info("weights: %s", told)
    return [told]


def _is_inside(name: str, own: Iterable[str]) -> bool:
    """Whether a name that the network lacks belongs to one of its parts: layer3.6 beside layer3.5, layer5 to layer4.

    Anything else, as a projector or a second head, stands beside the network and changes no activation of it.
    """
    first = name.split(".")[0]
    return first.rstrip("0123456789") in {known.split(".")[0].rstrip("0123456789") for known in own}


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else f' {tensor.dtype}'.replace('torch.', '')}"


def _fits(value: Tensor, own: Tensor) -> bool:
    return value.shape == own.shape and value.is_floating_point() == own.is_floating_point()


def _misfit(file: str, title: str, kinds: dict[str, list[str]], strict: bool, arch: str | None) -> BadValueError:
    lines = [f"--model.weights {file}: does not fit {title}."]
    lines += [f"  {kind}: {_few(names)}" for kind, names in kinds.items() if names]
    lines.append(
        f"It fits {arch}: --model.arch {arch}"
        if arch not in (None, title)
        else "Expected the weights of this network. One that was changed is built by a subclass, which --model names."
    )
    way_out = " --model.strict false loads what fits and leaves the rest random." if strict else ""
    return BadValueError("\n".join([*lines, f"Nothing was loaded.{way_out}"]))


def _shapes(state: State) -> dict[str, torch.Size]:
    """Return the shapes of what decides an output, without the attributes that held the network before the names."""
    prefixes = re.compile(rf"^(({'|'.join(PREFIXES)})\.)+")
    return {prefixes.sub("", name): value.shape for name, value in state.items() if not name.endswith(COUNTERS)}


def _few(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more


def digest(network: nn.Module) -> str:
    """Return the SHA-256 of a network's weights as they are loaded: name, dtype, shape and bytes of each tensor."""
    found = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
