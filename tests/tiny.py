"""A network of four columns, and a Trainer of one's own that writes them: files in a moment."""

import torch
from lightning.pytorch import Trainer

from featx import FeatureExtractor, FeatureWriter, ImageFolderDataModule


class Tiny(FeatureExtractor):
    """Four numbers an image, quickly: means over the quarters, as they are."""

    def build_network(self):
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), Scale())


class Scale(torch.nn.Module):
    def forward(self, rows):  # (B, 12) -> (B, 4)
        return rows[:, :4] * self.factor

    factor = 1.0


def run(photos, out, layer="2", model=Tiny, trainer_options=None, data=None, **options):
    writer = FeatureWriter(str(out), **options)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[writer],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **(trainer_options or {}),
    )
    data = ImageFolderDataModule(str(photos), **({"batch_size": 8, "num_workers": 0} | (data or {})))
    network = model(layer)
    trainer.predict(network, datamodule=data, return_predictions=False)
    while writer.again:
        trainer.predict(network, datamodule=data, return_predictions=False)
    return writer
