"""featx: a folder of images into CNN features, exactly."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["FeatureExtractor", "FeatureWriter", "ImageFolderDataModule", "Preprocessing", "__version__"]

_HOME = {
    "FeatureExtractor": "featx.extractor",
    "FeatureWriter": "featx.writer",
    "ImageFolderDataModule": "featx.datamodule",
    "Preprocessing": "featx.preprocess",
}


def __getattr__(name: str) -> Any:
    """Import a public class when it is first asked for, so that ``featx --help`` need not import torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'featx' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
