"""What only a GPU can show; without one all of it is skipped, and says so."""

import pytest
import torch
from conftest import make_image, oracle, predict, read_csv, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
ONE = ("--trainer.accelerator", "gpu", "--trainer.devices", "1")


def test_rows_are_those_of_plain_torch_however_many_are_on_their_way(tmp_path, alexnet, alexnet_file):
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for i in range(300):
        make_image(i, (260, 240)).save(tmp_path / "photos" / "a" / f"{i:03}.jpg")
    options = ("--model.weights", alexnet_file, "--model.layer", "[fc6,fc7]", "--data.batch_size", "4", *ONE)
    for out in ("one", "two"):
        predict(tmp_path / "photos", tmp_path / out, *options)
    names, expected = oracle(tmp_path / "photos", alexnet, ["classifier.1", "classifier.4"])
    for layer, values in zip(("fc6", "fc7"), expected, strict=True):
        found_names, found = read_csv(tmp_path / "one" / f"{layer}.csv")
        assert found_names == names and relative_error(found, values) < 1e-5
        files = [tmp_path / out / f"{layer}.csv" for out in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()
