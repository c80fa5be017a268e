"""Give the tensors of a file the names of a network's own: without prefixes and wrappers, new names for old."""

import re
from collections.abc import Iterable

from torch import Tensor, nn

from featx.errors import BadValueError, either, first_few, log

State = dict[str, Tensor]

PREFIXES = {"network", "model", "backbone"}  # attributes that contain the network, in Lightning modules and others
WRAPPERS = {"module", "_orig_mod"}  # added to names by DataParallel, DDP, AveragedModel and torch.compile
COUNTERS = ("num_batches_tracked", "total_ops", "total_params")  # BatchNorm's and thop's; no output depends on them
TWINS = {  # usual names of two networks in one file
    "encoder_q": "the encoder that MoCo trains and evaluates",
    "encoder_k": "its moving average, which MoCo does not evaluate",
    "base_encoder": "the encoder that MoCo v3 trains and evaluates",
    "momentum_encoder": "its moving average, which MoCo v3 does not evaluate",
    "student": "the network that is trained",
    "teacher": "its moving average, which DINO and iBOT evaluate; in a distillation, the network that it learns from",
    "online_encoder": "the encoder that BYOL trains and evaluates",
    "target_encoder": "its moving average, which BYOL does not evaluate; I-JEPA evaluates it",
}
RENAMED = (
    # https://github.com/pytorch/vision/blob/main/torchvision/models/densenet.py: names before 2017
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)"), r"\1\2"),
    # https://github.com/pytorch/vision/blob/main/torchvision/models/vision_transformer.py: MLPBlock, version 1
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)


def match_names(network: nn.Module, state: State, file: str) -> tuple[State, list[str]]:
    """Give the tensors the network's names: without wrappers, new for old, and without the prefix that fits best.

    Returns:
        The tensors with the prefix, and the names without it.
    """
    own = network.state_dict()
    wrappers = WRAPPERS - {word for name in own for word in name.split(".")}
    names = {name: unwrap(name, wrappers) for name in state}
    for pattern, new in RENAMED:
        names = {name: pattern.sub(new, short) for name, short in names.items()}
    if len(set(names.values())) == len(names):
        state = {names[name]: value for name, value in state.items()}
    by_prefix = _fits_by_prefix(own, state)
    found = {prefix: names for prefix, names in by_prefix.items() if 2 * len(names) >= len(own)}
    by_number = {} if found else _fits_by_number(network, state)
    # Names that many modules have, such as conv1.weight, fit after any prefix: most of the file must have it.
    found = found or by_number or {prefix: names for prefix, names in by_prefix.items() if 2 * len(names) >= len(state)}
    if not found:
        return state, []
    rank = {prefix: (set(prefix.split(".")) <= PREFIXES | {""}, len(names)) for prefix, names in found.items()}
    best = sorted((prefix for prefix in found if rank[prefix] == max(rank.values())), key=len)
    if len(best) > 1 and 2 * len(found[best[0]]) >= len(own):
        shorts = [prefix.rstrip(".") or "none" for prefix in best]
        raise BadValueError(
            f"--model.weights {file}: {len(best)} networks in it fit, with the prefixes {first_few(shorts)}.\n"
            f"{explained(shorts)}Choose one: {either([f'--model.checkpoint_key {short}' for short in shorts[:3]])}"
        )
    prefix = best[0]
    if by_number:
        log.info("weights: %s numbers the modules of %s in their order; using names that begin with %s",
                 file, type(network).__name__, prefix or "a number")  # fmt: skip
        renamed = {new: state[name] for name, new in by_number[prefix].items()}
        return renamed, [name for name in state if name not in by_number[prefix]]
    if prefix:
        log.info("weights: using names that begin with %s", prefix)
    return under(prefix, state), [name for name in state if not name.startswith(prefix)]


def _fits_by_prefix(own: Iterable[str], state: State) -> dict[str, dict[str, str]]:
    """Return each prefix of names in the file that are the network's without it, as ``_fits_by_number`` does."""
    found: dict[str, dict[str, str]] = {}
    for name in state:
        for dot in re.finditer(r"^|\.", name):
            if name[dot.end() :] in own:
                found.setdefault(name[: dot.end()], {})[name] = name[dot.end() :]
    return found


def _fits_by_number(network: nn.Module, state: State) -> dict[str, dict[str, str]]:
    """Return each prefix after which names number the network's modules, as ``nn.Sequential(*network.children())``.

    All names that continue with a number must be those of tensors in the module with that number and have their shapes,
    and they must be most of the network: numbers alone say little.

    Returns:
        By prefix, the names in the file with those of the network.
    """
    own = network.state_dict()
    modules = [name for name, _ in network.named_children()]
    found: dict[str, dict[str, str]] = {}
    for name in state:
        for number in re.finditer(r"(?:^|(?<=\.))(\d+)\.", name):
            module = modules[int(number[1])] if len(number[1]) < 4 and int(number[1]) < len(modules) else ""
            found.setdefault(name[: number.start()], {})[name] = f"{module}.{name[number.end() :]}"
    return {
        prefix: names for prefix, names in found.items()
        if 2 * len(names) >= len(own) and all(isinstance(own.get(new), Tensor) and fits(state[name], own[new])
                                              for name, new in names.items() if not name.endswith(COUNTERS))
    }  # fmt: skip


def under(prefix: str, state: State) -> State:
    """Return the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def unwrap(name: str, wrappers: set[str]) -> str:
    """Return a name without the words that wrappers of a network add."""
    return ".".join(word for word in name.split(".") if word not in wrappers)


def explained(names: Iterable[str]) -> str:
    """Return a line for each of several networks in a file that says what it is, as far as its name tells."""
    words = {name: next((TWINS[word] for word in name.split(".") if word in TWINS), "") for name in names}
    return "".join(f"  {name}: {text}\n" for name, text in words.items() if text)


def fits(value: Tensor, own: Tensor) -> bool:
    """Return whether a tensor of a file can be copied into a network's own."""
    return value.shape == own.shape and value.is_floating_point() == own.is_floating_point()


def numbered(state: State) -> str | None:
    """Return a name with a number where a module's name is expected, if most names in a file are such."""
    found = [name for name in state if re.match(r"([a-z_]+\.){0,2}\d+\.", name)]
    return found[0] if 2 * len(found) > len(state) else None
