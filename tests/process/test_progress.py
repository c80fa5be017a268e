"""Progress, and where the time went."""

import pytest
import torch
from conftest import make_image
from lightning.pytorch import Trainer
from torch import nn

from featx import FeatureExtractor, FeatureWriter, ImageFolderDataModule
from featx.process.progress import Progress, bottleneck, stages


class Tiny(FeatureExtractor):
    def build_network(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 9, stride=9), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))


def advice(seconds=10.0, cores=2, workers=2, on_gpu=False, saves=0.0, **spent):
    spent = dict.fromkeys(("decode", "resize", "network", "text", "wait", "disk"), 0.0) | spent
    return bottleneck(spent, seconds, cores, workers, on_gpu, lambda: saves)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"decode": 4, "network": 12, "text": 0.2}, "the network (60% of 2 cores); more cores would help"),
        ({"decode": 8, "resize": 8, "network": 2, "saves": 0.0012}, "decoding (80% of 2 cores); --data.decoder turbo "
         "would save 1.2 ms per image"),
        ({"decode": 8, "resize": 8, "network": 2}, "decoding (80% of 2 cores); more cores would help"),
        ({"text": 15}, "text (75% of 2 cores); more cores would help"),
        ({"decode": 2, "network": 3}, "none; 2 cores 25% busy: a short run, or other programs on this machine"),
        ({"decode": 4, "wait": 9, "workers": 1}, "decoding, while cores are idle; more --data.num_workers than 1 "
         "would help"),
        ({"decode": 4, "wait": 9}, "reading the images; --data.dir on a faster disk or more --data.num_workers would "
         "help"),
        ({"decode": 4, "disk": 9}, "the disk; --writer.out_dir on a faster one would help"),
        ({"decode": 4, "network": 9, "on_gpu": True}, "the network; a lower --trainer.precision or more "
         "--trainer.devices would help"),
        ({"decode": 19, "wait": 9, "on_gpu": True, "saves": 0.001}, "decoding (95% of 2 cores); --data.decoder turbo "
         "would save 1.0 ms per image"),
    ],
)  # fmt: skip
def test_the_bottleneck_is_named_with_advice(case, words):
    assert advice(**case) == words


def test_a_run_records_every_stage(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(5):
        make_image(i, (300, 280)).save(tmp_path / "photos" / f"{i}.png")
    data = ImageFolderDataModule(str(tmp_path / "photos"), batch_size=2, num_workers=0)
    model, writer = Tiny("3"), FeatureWriter(str(tmp_path / "out"))
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", devices=1, callbacks=[Progress(), writer], enable_progress_bar=False, **options
    )
    rows = trainer.predict(model, datamodule=data)
    assert [len(batch["3"]) for batch in rows] == [2, 2, 1]
    assert all(isinstance(batch["3"], torch.Tensor) for batch in rows)
    found = stages(trainer)
    assert found.keys() == writer.records["3"]["run"]["stages"].keys() == {
        "decode", "resize", "network", "text", "wait", "disk"
    }  # fmt: skip
    assert all(model.stages[name] > 0 for name in ["network"]) and all(
        writer.stages[name] > 0 for name in ("text", "disk")
    )
    assert writer.records["3"]["identity"]["memory_layout"] == "channels_last"


def test_what_turbo_would_save_is_measured_on_the_images(tmp_path):
    for i in range(3):
        make_image(i, (900, 800)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "0.jpg").write_text("broken")
    data = ImageFolderDataModule(str(tmp_path))
    data.setup()
    model = Tiny("3")
    model.configure_model()
    assert -1 < data.turbo_saves(model.preprocessing) < 1
