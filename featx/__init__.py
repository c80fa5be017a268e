"""featx: exact CNN features of a folder of images."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featx.api import extract
    from featx.data.module import ImageFolderDataModule
    from featx.data.preprocess import Preprocessing
    from featx.errors import ImageError, UserError
    from featx.model.extractor import FeatureExtractor
    from featx.results import load, record
    from featx.writer.callback import FeatureWriter

__version__ = "0.1.0"
__all__ = [
    "FeatureExtractor",
    "FeatureWriter",
    "ImageError",
    "ImageFolderDataModule",
    "Preprocessing",
    "UserError",
    "__version__",
    "extract",
    "load",
    "record",
]

_HOME = {
    "FeatureExtractor": "featx.model.extractor",
    "FeatureWriter": "featx.writer.callback",
    "ImageError": "featx.errors",
    "ImageFolderDataModule": "featx.data.module",
    "Preprocessing": "featx.data.preprocess",
    "UserError": "featx.errors",
    "extract": "featx.api",
    "load": "featx.results",
    "record": "featx.results",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``featx --help`` does not import torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'featx' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
