"""What the bench runs, each job in a process of its own: the ways to get the rows, and what is measured within one."""

import csv
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH = 64
DISTINCT = 1000  # photographs that are made; what is asked for beyond them are hard links


def prepare(photos: str, pool: str, images: int, weights: str) -> dict[str, Any]:
    """Make the photographs, or copy the user's, and a file of random weights; return the text for the table's head."""
    import torch
    from torchvision import models

    from featx.process.cores import usable_cores

    Path(pool).mkdir()
    if photos:
        known = (".jpg", ".jpeg", ".png")
        found = sorted(path for path in Path(photos).rglob("*") if path.suffix.lower() in known)[:images]
        for i, path in enumerate(found):
            shutil.copy(path, f"{pool}/{i:06}{path.suffix.lower()}")
    else:
        make_photographs(Path(pool), min(images, DISTINCT))
    torch.manual_seed(0)
    torch.save(models.alexnet().state_dict(), weights)
    return {"cores": usable_cores(), "batch": BATCH}


def make_photographs(folder: Path, images: int) -> None:
    """Write seeded cuts of scikit-image's photographs; in the median 500x375 and 0.55 bytes per pixel, as ImageNet."""
    import numpy as np
    from PIL import Image
    from skimage import data

    names = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field", "camera", "grass", "brick")
    originals = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in names]
    originals += [Image.fromarray(view) for view in data.stereo_motorcycle()[:2]]
    for i in range(images):
        random = np.random.default_rng(i)
        whole = originals[random.integers(len(originals))]
        long = round(500 * random.choice([0.8, 1, 1, 1, 1.28]))
        size = (long, long * 3 // 4) if random.random() < 0.7 else (long * 3 // 4, long)
        scale = random.uniform(0.5, 1) * min(whole.width / size[0], whole.height / size[1])
        width, height = size[0] * scale, size[1] * scale
        left, top = random.uniform(0, whole.width - width), random.uniform(0, whole.height - height)
        cut = whole.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        pixels = np.asarray(cut, dtype=np.float32)[:, :: random.choice([-1, 1])]  # (H, W, 3)
        grain = random.normal(0, 10, (size[1], size[0], 1)).astype(np.float32)  # which enlarging takes away
        pixels = pixels * random.uniform(0.75, 1.2, 3) + random.uniform(-20, 20) + grain
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:06}.jpg", quality=94)


def featx(photos: str, weights: str, out: str, *options: str) -> None:
    """The command, as its users start it."""
    from featx.cli import main

    words = f"--data.batch_size {BATCH} --model.layer fc7 --trainer.accelerator cpu".split()
    folders = ["--data.dir", photos, "--model.weights", weights, "--writer.out_dir", out]
    status = main(["predict", *words, *folders, *options])
    if status:
        sys.exit(status)


def unsynced(photos: str, weights: str, out: str) -> None:
    """The command, but that it neither syncs nor writes its journal before the end: what the two cost."""
    from featx.writer import disk, stream

    disk.sync = lambda file, path: None
    stream.SYNC_SHARE, stream.MAX_UNSYNCED = 1e-12, float("inf")
    featx(photos, weights, out)


def original(photos: str, weights: str, out: str) -> None:
    """The script that featx replaces, with featx's crop, so that it can batch: all in turns, rows kept as floats."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    images = ImageFolder(photos, usual_transform())
    network, seen = hooked_alexnet(weights)
    rows: list[list[Any]] = []
    with torch.no_grad():
        for batch, _ in DataLoader(images, BATCH):
            network(batch)
            paths = [path for path, _ in images.samples[len(rows) : len(rows) + len(batch)]]
            rows += [[os.path.basename(path), *row] for path, row in zip(paths, seen.pop().tolist(), strict=True)]
    Path(out).mkdir()
    with open(f"{out}/fc7.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def dataloader(photos: str, weights: str, out: str) -> None:
    """A plain script: a DataLoader with one worker per core, and pandas."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    from featx.process.cores import usable_cores

    images = ImageFolder(photos, usual_transform())
    names = [os.path.basename(path) for path, _ in images.samples]
    run_with_pandas(DataLoader(images, BATCH, num_workers=usable_cores()), names, weights, out)


def timm(photos: str, weights: str, out: str) -> None:
    """timm's dataset and loader as its own inference script uses them, around the same network: it has no AlexNet."""
    import torch
    from timm.data import create_dataset, create_loader

    from featx.process.cores import usable_cores

    images = create_dataset("", root=photos)
    how = {"interpolation": "bilinear", "crop_pct": 224 / 256, "device": torch.device("cpu")}
    batches = create_loader(images, (3, 224, 224), BATCH, num_workers=usable_cores(), **how)
    run_with_pandas(batches, images.filenames(basename=True), weights, out)


def run_with_pandas(batches: Any, names: list[str], weights: str, out: str) -> None:
    import pandas
    import torch

    network, seen = hooked_alexnet(weights)
    with torch.no_grad():
        for batch, _ in batches:
            network(batch)
    Path(out).mkdir()
    pandas.DataFrame(torch.cat(seen).numpy(), index=names).to_csv(f"{out}/fc7.csv", header=False)


def usual_transform() -> Any:
    from torchvision import transforms

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(mean, std)]
    return transforms.Compose(steps)


def hooked_alexnet(weights: str) -> tuple[Any, list[Any]]:
    """AlexNet, and the list to which each pass appends a copy of fc7, ``(B, 4096) float32``."""
    import torch
    from torchvision import models

    network = models.alexnet().eval()
    network.load_state_dict(torch.load(weights))
    seen: list[Any] = []
    network.classifier[4].register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    return network, seen


def stages(photos: str, weights: str, images: int) -> dict[str, float]:
    """Core time of one thread for each stage, in ms per image, over the first images of the tree."""
    import torch
    from torch import nn

    from featx.data.decode import read_image
    from featx.data.preprocess import Preprocessing
    from featx.model.extractor import SLICE
    from featx.writer.formats import csv_row

    torch.set_num_threads(1)
    paths = sorted(map(str, Path(photos).rglob("*.*")))[:images]
    preprocessing = Preprocessing.usual()
    decoded, decode = timed(read_image, paths)
    tensors, resize = timed(preprocessing.to_tensor, decoded)
    alexnet, _ = hooked_alexnet(weights)
    network = nn.Sequential(alexnet.features, alexnet.avgpool, nn.Flatten(), alexnet.classifier[:5])  # ends at fc7
    slices = [preprocessing.normalize(torch.stack(tensors[i : i + SLICE])) for i in range(0, len(tensors), SLICE)]
    slices = [pixels for pixels in slices if len(pixels) == SLICE]  # (SLICE, 3, 224, 224) float32
    prices = {"decode": decode, "resize + crop": resize}
    with torch.inference_mode():
        for layout, memory_format in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
            network.to(memory_format=memory_format)
            slices = [pixels.contiguous(memory_format=memory_format) for pixels in slices]
            network(slices[0])
            rows, price = timed(network, slices)
            prices[f"network, slices of {SLICE}, {layout}"] = price / SLICE
    _, prices["text"] = timed(lambda row: csv_row(b"photo-000000.jpg", row), list(torch.cat(rows).numpy()))
    return prices


def timed(work: Callable[[Any], Any], items: list[Any]) -> tuple[list[Any], float]:
    """Return what ``work`` makes of the items, and this thread's CPU time for one of them in ms."""
    begin = time.thread_time()
    made = [work(item) for item in items]
    return made, (time.thread_time() - begin) * 1000 / len(items)


def memory(photos: str, weights: str, out: str) -> list[float]:
    """Run featx and return its main process's peak in MiB, of the whole run and of what follows the first batch.

    Reading the weights takes more than a batch does, and so the whole run's peak would hide what grows afterwards.
    """
    peaks: list[float] = []

    def forget_peak() -> None:
        peaks.append(peak_memory())
        if os.path.exists("/proc/self/clear_refs"):
            Path("/proc/self/clear_refs").write_text("5")

    at_first_batch(forget_peak)
    featx(photos, weights, out)
    since = peak_memory()
    return [max(*peaks, since), since]


def first_row(photos: str, weights: str, out: str, report: str) -> None:
    """Run featx until its writer has the first batch, and no further."""

    def end() -> None:
        leave_report(report, None)
        os._exit(0)

    at_first_batch(end)
    featx(photos, weights, out)


def at_first_batch(act: Callable[[], None]) -> None:
    """Do something as soon as featx's writer has had the first batch of a run."""
    from featx.writer.callback import FeatureWriter

    write = FeatureWriter.write_on_batch_end

    def write_and_act(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        FeatureWriter.write_on_batch_end = write
        act()

    FeatureWriter.write_on_batch_end = write_and_act


def peak_memory() -> float:
    """This process's peak memory, without that of its workers, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))


def leave_report(report: str, found: Any) -> None:
    Path(report).write_text(json.dumps({"peak": peak_memory(), "found": found}))


if __name__ == "__main__":
    name, report, *args = json.loads(sys.argv[1])
    leave_report(report, globals()[name](*args))
    if name in ("featx", "unsynced"):  # they end as the command does
        from featx.process.signals import leave_at_once

        leave_at_once(0)
