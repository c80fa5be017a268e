"""Read the state dict in a file of weights and copy all of it into a network, or say why not."""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featx.data.preprocess import Preprocessing
from featx.errors import BadValueError, count, did_you_mean, first_few, log
from featx.model import files
from featx.model.names import COUNTERS, PREFIXES, WRAPPERS, State, explained, fits, match_names, numbered, under, unwrap
from featx.model.unpickle import Unknown

PLAIN = ("state_dict", "model_state_dict", "model", "network", "net")  # usual keys of the weights; the first wins
MOST_MODULES = 100_000  # in a network that was saved whole; a few bytes can contain the same one without end


def read_checkpoint(file: str, key: str | None = None) -> State:
    """Read the state dict in a weights file, without running any code in it.

    Args:
        file: A file from ``torch.save``, old or new, a Lightning checkpoint, or safetensors.
        key: Dotted key of the state dict in it, or a prefix of the names to take.

    Returns:
        The tensors, on the CPU, by their names in the file.

    Raises:
        UserError: The file cannot be read, or is not a checkpoint.
    """
    content = files.load(file)
    if key is not None:
        return _state_at(key, _state_dicts(content), _state_dicts(content, few=True), file)
    found = _state_dicts(content)
    order = {tuple(PLAIN.index(word) for word in path.split(".")): path for path in found if _is_plain(path)}
    if not order and "" not in found and len(found) != 1:
        keys = first_few([*filter(_is_name, content)], 5) if isinstance(content, dict) else type(content).__name__
        known = f" State dicts: {first_few(list(found), 5)}; choose one with --model.checkpoint_key." if found else ""
        raise BadValueError(
            f"--model.weights {file}: no state dict at its top level or under {', '.join(PLAIN)}.\n"
            f"It contains {keys or 'nothing'}.{known}\n{explained(found)}"
            "Expected a dict of names and tensors, as torch.save(network.state_dict(), FILE) writes it."
        )
    chosen = order[min(order)] if order else "" if "" in found else next(iter(found))
    if not _is_plain(chosen) and chosen:
        log.info("weights: using %s of %s, the only state dict in it", chosen, file)
    if others := [path or "its top level" for path in found if path != chosen]:
        log.info("weights: using %s of %s, not %s; --model.checkpoint_key chooses another",
                 chosen or "the top level", file, first_few(others))  # fmt: skip
    return found[chosen]


def _state_dicts(content: Any, few: bool = False) -> dict[str, State]:
    """Return every state dict in a checkpoint by dotted key; "" is the top level.

    A state dict is a mapping of mostly tensors or, if ``few``, of any number of them.
    """
    found: dict[str, State] = {}
    seen: dict[int, State | None] = {}  # a few bytes of a file can contain the same dict in itself without end
    waiting = [("", content)]
    while waiting:
        path, value = waiting.pop()
        if id(value) not in seen and isinstance(value, dict | list):
            items: dict[Any, Any] = dict(enumerate(value)) if isinstance(value, list) else value
            if isinstance(value, Unknown):
                items = value | value.state
            state = {name: each for name, each in items.items() if _is_name(name) and isinstance(each, Tensor)}
            if _is_module(value):
                state = _module_state(value)
            else:
                inner = [(f"{path}.{name}" if path else str(name), each) for name, each in items.items()
                         if _is_name(name) or isinstance(value, list)]  # fmt: skip
                waiting += reversed(inner)
            enough = state if few else 2 * len(state) > len(items) or _is_module(value)
            seen[id(value)] = state if enough else None
        if (known := seen.get(id(value))) is not None:
            found[path] = known
    return found


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and len(name) < 1000 and name.isprintable()


def _is_module(value: Any) -> bool:
    return isinstance(value, Unknown) and all(
        isinstance(value.state.get(key), dict) for key in ("_parameters", "_buffers", "_modules")
    )


def _module_state(module: Any) -> State:
    """Return the state dict of a network that was saved whole, without its classes."""
    state: State = {}
    waiting = [("", module)]
    for number, (path, each) in enumerate(waiting):
        if number > MOST_MODULES:
            break
        left_out = each.state.get("_non_persistent_buffers_set", ())
        tensors = each.state["_parameters"] | each.state["_buffers"]
        state |= {f"{path}{name}": value for name, value in tensors.items()
                  if _is_name(name) and isinstance(value, Tensor) and name not in left_out}  # fmt: skip
        waiting += [(f"{path}{name}.", inner) for name, inner in each.state["_modules"].items() if _is_module(inner)]
    return state


def _is_plain(path: str) -> bool:
    return all(word in PLAIN for word in path.split("."))


def _state_at(key: str, found: dict[str, State], any_tensors: dict[str, State], file: str) -> State:
    """Return the state dict at a key, or the part of a state dict whose names begin with it."""
    below = [path for path in found if path == key or path.startswith(f"{key}.")]
    plain = [path for path in below if path == key or _is_plain(path[len(key) + 1 :])]
    if plain or len(below) == 1:
        return found[min(plain or below, key=len)]
    if key in any_tensors:
        return any_tensors[key]
    for path, state in found.items():
        prefix = (key.removeprefix(f"{path}.") if path else key) + "."
        for names in (state, {unwrap(name, WRAPPERS): value for name, value in state.items()}):
            if part := under(prefix, names):
                return part
    first = {unwrap(name, WRAPPERS).split(".")[0] for state in found.values() for name in state if "." in name}
    keys = [*filter(None, found), *sorted(first)]
    raise BadValueError(
        f"--model.checkpoint_key {key}: {file} has no state dict there.{did_you_mean(key, keys)}\n"
        f"Expected a key or a prefix of names: {first_few(keys, 16)}."
    )


def fit(
    network: nn.Module,
    state: State,
    file: str,
    title: str,
    strict: bool = True,
    guess_arch: Callable[[Mapping[str, torch.Size]], str | None] = lambda shapes: None,
    tensors_read: Callable[[nn.Module], set[str] | None] = lambda network: None,
) -> list[str]:
    """Copy a state dict into a network if it contains all that the layers need, else change nothing.

    Prefixes are removed, tensors outside the network are ignored, and a classifier with another number of classes is
    resized to that of the file. Each of these is logged.

    Args:
        network: The network, which keeps its dtypes.
        state: The tensors, of any float dtype, by their names in the file.
        file: The file, for messages.
        title: The network's name, for messages.
        strict: Whether all that the layers need must be there; otherwise what fits is loaded.
        guess_arch: Returns the arch that has tensors of these names and shapes, for the message.
        tensors_read: Returns the names of the tensors that the layers need, or None for all; only called if the file
            does not contain the whole network.

    Returns:
        Notes for the record: a resized classifier, tensors that were not loaded.

    Raises:
        BadValueError: The state dict does not fit.
    """
    state, outside = match_names(network, state, file)
    notes = _fit_classes(network, state, title)
    whole = network.state_dict()
    own = {name: value for name, value in whole.items() if isinstance(value, Tensor)}  # some modules add other values
    computed = {name for name, buffer in network.named_buffers() if not buffer.is_floating_point()}  # index tables
    needed = [name for name in own if name not in computed and not name.endswith(COUNTERS)]
    loaded = {name: state[name] for name in own if name in state and fits(state[name], own[name])}
    others = [name for name in state if name not in own and not name.endswith(COUNTERS)]
    misfits = [name for name in own if name in state and name not in loaded]
    used = set(own)
    if strict and (misfits or any(_belongs(name, own) for name in others) or not state.keys() >= set(needed)):
        used = tensors_read(network) or used
    problems = {
        "missing from the file": [name for name in needed if name not in state and name in used],
        "not in the network": [name for name in others if _belongs(name, used)],
        "of another shape or type": [f"{name} {_describe(state[name])}, expected {_describe(own[name])}"
                                     for name in misfits if name in used],
    }  # fmt: skip
    if (strict and any(problems.values())) or not any(name in loaded for name in needed):
        raise _mismatch(file, title, problems, strict, guess_arch(_shapes(state)), numbered(state))
    if others := outside + others:
        log.info("weights: ignored in %s, not part of the network: %s", file, first_few(others))
    if kept := [name for name in needed if name not in loaded]:
        why = "not needed for the layers" if strict else "not strict"
        notes.append(f"{why}: {len(kept)} of {count(len(needed), 'tensor')} stay random: {first_few(kept)}")
        log.log(logging.INFO if strict else logging.WARNING, "weights: %s", notes[-1])
    if bad := [name for name, value in loaded.items() if value.is_floating_point() and not value.isfinite().all()]:
        log.warning("weights: %s contains values that are not finite: %s", file, first_few(bad))
    whole.update(loaded)  # a new dict would lack the modules' versions, which some of torchvision's check
    network.load_state_dict(whole)
    return notes


class Normalizer(NamedTuple):
    """The mean and std by which images are normalized, on the scale 0..1, and all their names in a file."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    names: list[str]


def normalizer(own: Iterable[str], state: State, file: str) -> Normalizer | None:
    """Return the normalizer that a checkpoint contains beside the network, as those of robust models do, or None.

    That of https://github.com/MadryLab/robustness is ``normalizer.new_mean`` and ``normalizer.new_std``; others are
    buffers ``mean`` and ``std``.

    Raises:
        BadValueError: It contains several with different values.
    """
    found: dict[tuple[Any, Any], list[str]] = {}
    for name, mean in state.items():
        other = re.sub("mean$", "std", name)
        std = state.get(other)
        if not re.search(r"(^|\.)(new_)?mean$", name) or std is None or mean.numel() != 3 or std.numel() != 3:
            continue
        values = [tuple(each.flatten().tolist()) for each in (mean, std)]
        inside = any(name.endswith(known) for known in own)  # the network itself normalizes
        if not inside and all(0 <= a <= 1 and 0 < b <= 1 for a, b in zip(*values, strict=True)):
            found.setdefault((values[0], values[1]), []).extend([name, other])
    if len(found) > 1:
        several = first_few([names[0] for names in found.values()])
        raise BadValueError(
            f"--model.weights {file}: it contains several normalizers, {several}.\n"
            "Choose one with --model.mean and --model.std."
        )
    return next((Normalizer(mean, std, names) for (mean, std), names in found.items()), None)


def with_normalizer(preset: Preprocessing, own: Iterable[str], state: State, file: str) -> tuple[Preprocessing, State]:
    """Return a preprocessing with the mean and std of the file's normalizer, if it has one, and the other tensors."""
    if (found := normalizer(own, state, file)) is None:
        return preset, state
    names = " and ".join(found.names[:2])
    log.info("weights: using %s of %s to normalize the images", names, file)
    preset = replace(preset, mean=found.mean, std=found.std, source=f"{preset.source}, with the file's {names}")
    return preset, {name: value for name, value in state.items() if name not in found.names}


def _fit_classes(network: nn.Module, state: State, title: str) -> list[str]:
    """Give the last Linear (or else 1x1 Conv2d) and auxiliary classifiers as many outputs as the file has."""
    modules = dict(network.named_modules())
    ends: dict[str, Any] = {path: module for path, module in modules.items() if isinstance(module, nn.Linear)}
    ends = ends or {p: m for p, m in modules.items() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)}
    found = {path: state[f"{path}.weight"] for path in ends if f"{path}.weight" in state}
    shapes = {path: value.shape for path, value in found.items() if value.ndim}
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
    note = f"{path} has the {new} classes of the file, not the {old} of {title}"
    log.info("weights: %s", note)
    return [note]


def _belongs(name: str, own: Iterable[str]) -> bool:
    """Return whether an unknown name extends the network, as layer3.6 after layer3.5 or layer5 after layer4.

    Anything else, for example a projector or a second head, changes no activation of the network.
    """
    first = name.split(".")[0]
    return first.rstrip("0123456789") in {known.split(".")[0].rstrip("0123456789") for known in own}


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else f' {tensor.dtype}'.replace('torch.', '')}"


def _mismatch(
    file: str, title: str, problems: dict[str, list[str]], strict: bool, arch: str | None, numbered: str | None
) -> BadValueError:
    lines = [f"--model.weights {file}: does not fit {title}."]
    lines += [f"  {problem}: {first_few(names)}" for problem, names in problems.items() if names]
    if numbered and not arch:
        lines.append(f"The file numbers modules ({numbered}), and not in the order of {title}'s own.")
    lines.append(
        f"It fits {arch}: --model.arch {arch}"
        if arch not in (None, title)
        else "Expected the weights of this network. To build a modified one, write a subclass and give it as --model."
    )
    remedy = " --model.strict false loads what fits and leaves the rest random." if strict else ""
    return BadValueError("\n".join([*lines, f"Nothing was loaded.{remedy}"]))


def _shapes(state: State) -> dict[str, torch.Size]:
    """Return the shapes of tensors that affect an output, by their names without PREFIXES."""
    prefixes = re.compile(rf"^(({'|'.join(PREFIXES)})\.)+")
    return {prefixes.sub("", name): value.shape for name, value in state.items() if not name.endswith(COUNTERS)}


def digest(network: nn.Module) -> str:
    """Return the SHA-256 of the name, dtype, shape and bytes of each tensor of a network."""
    sha256 = hashlib.sha256()
    for name, value in network.state_dict().items():
        _add(sha256, name, value)
    return sha256.hexdigest()


def same(one: Any, other: Any) -> bool:
    """Return whether two values of state dicts are equal: tensors, a quantized module's, or any extra state."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    digests = [hashlib.sha256(), hashlib.sha256()]
    for sha256, value in zip(digests, (one, other), strict=True):
        _add(sha256, "", value)
    return digests[0].digest() == digests[1].digest()


def _add(sha256: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.is_quantized:
        _add(sha256, name, [str(value.qscheme()), value.int_repr(), value.dequantize()])
    elif isinstance(value, Tensor):
        sha256.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha256.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping | list | tuple):
        for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            _add(sha256, f"{name}.{key}", each)
    else:  # of other objects, the memory address in their repr would differ from run to run
        plain = isinstance(value, str | bytes | int | float | torch.dtype | None)
        sha256.update(f"{name} {value if plain else type(value).__name__}\n".encode())
