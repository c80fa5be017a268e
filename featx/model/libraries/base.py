"""What a library of networks gives: published weights, their preprocessing, the network itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from featx.data.preprocess import Preprocessing
from featx.errors import BadValueError, UserError, first_line

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """The weights for a network: published, from a file, or random."""

    name: str  # in messages and in the record
    entry: Any = None  # of published weights: what the library knows them by
    file: str | None = None
    random: bool = False


class UnknownPresetError(BadValueError):
    """Nothing says how the images of a network are preprocessed."""


class Library:
    """A network that a library describes.

    Args:
        arch: Its name in ``--model.arch``.
        image_size: ``--model.image_size``; None: the size that the weights were trained at.

    Raises:
        UserError: There is no such network, or the library is not installed.
    """

    def __init__(self, arch: str, image_size: int | None = None) -> None:
        self.arch = arch
        self.image_size = image_size

    def published(self) -> dict[str, Weights]:
        """Return the published weights by their names in ``--model.weights``."""
        return {}

    def fetch(self, weights: Weights) -> Weights:
        """Return weights as a file, downloaded if necessary, if they are not loaded by ``build``."""
        return weights

    def preset(self, weights: Weights, state: State | None = None, network: nn.Module | None = None) -> Preprocessing:
        """Return the preprocessing of weights; for random ones and unknown files, that of the first recipe."""
        raise NotImplementedError

    def build(self, weights: Weights, state: State | None = None) -> nn.Module:
        """Return the network with published weights, or ready for a file's ``state``.

        Raises:
            UserError: Weights cannot be downloaded, or a function cannot be imported or fails.
        """
        raise NotImplementedError

    def rename(self, network: nn.Module, state: State, file: str) -> State:
        """Return a file's tensors by the names and in the shapes of a network that ``build`` made for them."""
        return state

    def resized(self, preset: Preprocessing) -> Preprocessing:
        """Return a preset at ``image_size``."""
        return preset if self.image_size is None else preset.at(self.image_size)


class Tower(nn.Module):
    """The part of a network that takes images, whose output is the vector that its makers call their features.

    Attributes:
        vector: What the makers call that output.
        config_digest: SHA-256 of what decides its values beside the weights.
    """

    vector: str
    config_digest: str


def import_library(name: str, arch: str, extra: str) -> Any:
    """Import a library, or raise UserError that names the extra to install."""
    try:
        return import_module(name)
    except ImportError as err:
        raise UserError(
            f"--model.arch {arch}: {name} cannot be imported ({first_line(err)}).\n"
            f"Install it: pip install 'featx[{extra}]'"
        ) from err
