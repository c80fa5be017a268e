"""featx: a folder of images into CNN features, exactly."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featx.api import extract
    from featx.datamodule import ImageFolderDataModule
    from featx.extractor import FeatureExtractor
    from featx.messages import ImageError, UserError
    from featx.preprocess import Preprocessing
    from featx.reader import load, record
    from featx.writer import FeatureWriter

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
    "FeatureExtractor": "featx.extractor",
    "FeatureWriter": "featx.writer",
    "ImageError": "featx.messages",
    "ImageFolderDataModule": "featx.datamodule",
    "Preprocessing": "featx.preprocess",
    "UserError": "featx.messages",
    "extract": "featx.api",
    "load": "featx.reader",
    "record": "featx.reader",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that ``featx --help`` need not import torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'featx' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
