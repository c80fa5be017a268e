"""What made this file: the record of a run, LAYER.json beside its output."""

import json
from dataclasses import asdict
from typing import Any

import PIL
import torch
import torchvision

import featx
from featx.datamodule import ImageFolderDataModule
from featx.extractor import SLICE, FeatureExtractor


def describe_run(trainer: Any, model: FeatureExtractor, data: ImageFolderDataModule, layer: str) -> dict[str, Any]:
    """Return everything that decides a value of one layer's rows, as plain values for JSON."""
    return {
        "network": model.title,
        "weights": model.weights_used,
        "weights_digest": model.weights_digest,
        "weights_told": model.weights_told,
        "layer": layer,
        "module": model.layers[layer],
        "pool": model.pool,
        "preprocessing": asdict(data.preprocessing(model.preprocessing)),
        "value_range": data.value_range,
        "batch_size": data.batch_size,
        "precision": str(trainer.precision),
        "images_a_slice": SLICE if model.device.type == "cpu" else None,
        "device": model.device.type,
        "versions": {
            "featx": featx.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
        },
    }


def as_json(record: dict[str, Any]) -> bytes:
    """Return a record as indented JSON, names and paths readable."""
    return json.dumps(record, indent=2, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n"
