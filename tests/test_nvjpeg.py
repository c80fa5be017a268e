"""--data.decoder cuda, as far as it goes without a GPU: torchvision's decoder for one stands on the CPU, too."""

import io

import numpy as np
import pytest
import torch
from conftest import featx, loader, make_image
from PIL import Image

from featx import nvjpeg
from featx.messages import BadValueError

CPU = torch.device("cpu")


def jpeg(seed, size=(300, 240), mode="RGB", **how):
    file = io.BytesIO()
    make_image(seed, size, mode).save(file, "JPEG", **how)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """JPEGs for the GPU, and what is not for it; of these two cannot be read."""
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    (tmp_path / "1-grey.jpg").write_bytes(jpeg(1, mode="L"))
    (tmp_path / "2-progressive.jpg").write_bytes(jpeg(2, progressive=True))
    (tmp_path / "3-cmyk.jpg").write_bytes(jpeg(3, mode="CMYK"))
    (tmp_path / "4-rgb.jpg").write_bytes(jpeg(4, keep_rgb=True))
    (tmp_path / "5-half.jpg").write_bytes(jpeg(5)[:3000])
    (tmp_path / "6-trailing.jpg").write_bytes(jpeg(6) + b"a camera's own")
    make_image(7, (240, 300)).save(tmp_path / "7.png")
    (tmp_path / "8-empty.jpg").write_bytes(b"")
    (tmp_path / "9.jpg").write_bytes(jpeg(9, (240, 320)))
    return tmp_path


def batches(folder, decoder, monkeypatch=None):
    if monkeypatch:
        monkeypatch.setattr(nvjpeg, "check", lambda device: None)  # there is no GPU
    data, batches = loader(folder, decoder=decoder, batch_size=4, num_workers=0)
    return data, [data.transfer_batch_to_device(batch, CPU, 0) for batch in batches]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.number, one.names, one.faults, one.size) == (other.number, other.names, other.faults, other.size)
        assert [rows for rows, _ in one.groups] == [rows for rows, _ in other.groups]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one.groups, other.groups, strict=True))


def test_what_is_not_for_the_gpu_is_the_cpus_and_counted(folder, monkeypatch):
    _, found = batches(folder, "cuda", monkeypatch)
    _, expected = batches(folder, "turbo")
    assert_same(found, expected)
    assert [fault.path for batch in found for fault in batch.faults] == ["5-half.jpg", "8-empty.jpg"]
    assert [batch.on_cpu for batch in found] == [1, 3, 0]


def test_the_gpu_gets_grey_and_ycbcr_that_end_as_jpegs_do(folder):
    coded = [path.name for path in sorted(folder.iterdir()) if nvjpeg.read_encoded(str(path))]
    assert coded == ["0.jpg", "1-grey.jpg", "2-progressive.jpg", "9.jpg"]
    assert nvjpeg.read_encoded(str(folder)) is None and nvjpeg.read_encoded("/dev/zero") is None
    assert nvjpeg.read_encoded(str(folder / "0.jpg")) == (folder / "0.jpg").read_bytes()


def test_components_without_a_marker_are_ycbcr_by_their_numbers(tmp_path):
    plain = jpeg(0)
    start = plain.index(b"\xff\xe0")
    length = int.from_bytes(plain[start + 2 : start + 4])
    bare = plain[:start] + plain[start + 2 + length :]  # without JFIF
    frame = bare.index(b"\xff\xc0")
    named = bytearray(bare)
    for component, letter in enumerate(b"RGB"):
        named[frame + 10 + 3 * component] = letter
    scan = bare.index(b"\xff\xda")
    for component, letter in enumerate(b"RGB"):
        named[scan + 5 + 2 * component] = letter
    (tmp_path / "bare.jpg").write_bytes(bare)
    (tmp_path / "rgb.jpg").write_bytes(named)
    assert Image.open(tmp_path / "rgb.jpg").getpixel((0, 0)) != Image.open(tmp_path / "bare.jpg").getpixel((0, 0))
    assert nvjpeg.read_encoded(str(tmp_path / "bare.jpg")) and not nvjpeg.read_encoded(str(tmp_path / "rgb.jpg"))


def test_what_the_gpu_refuses_the_cpu_decodes(folder, monkeypatch):
    real = nvjpeg.decode_jpeg

    def refuse_the_first(tensors, mode, device):
        if any(len(tensor) == (folder / "0.jpg").stat().st_size for tensor in tensors):
            raise RuntimeError("Error while decoding JPEG images: 1")
        return real(tensors, mode, device)

    monkeypatch.setattr(nvjpeg, "decode_jpeg", refuse_the_first)
    _, found = batches(folder, "cuda", monkeypatch)
    _, expected = batches(folder, "turbo")
    assert_same(found, expected)
    assert found[0].on_cpu == 2


def test_out_of_memory_is_no_images_fault(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nvjpeg, "decode_jpeg", fail)
    with pytest.raises(torch.OutOfMemoryError):
        nvjpeg.decode([jpeg(0), jpeg(1)], CPU)


def test_an_image_of_the_gpus_too_long_for_the_resize_is_a_fault(tmp_path, monkeypatch):
    (tmp_path / "long.jpg").write_bytes(jpeg(0, (8000, 2)))
    _, (batch,) = batches(tmp_path, "cuda", monkeypatch)
    assert not batch.names and "more than" in batch.faults[0].reason


def test_the_values_are_those_of_the_decoder(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    (pixels,) = nvjpeg.decode([(tmp_path / "0.jpg").read_bytes()], CPU)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.array(Image.open(tmp_path / "0.jpg")))


def test_it_is_refused_without_a_gpu(three_photos, tmp_path, alexnet_file):
    done = featx("predict", "--data.dir", three_photos, "--model.weights", alexnet_file, "--data.decoder", "cuda",
                 "--trainer.accelerator", "cpu", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2 and "--data.decoder cuda: this run is on cpu. Expected an NVIDIA GPU" in done.stderr
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BadValueError, match="this run is on cpu"):
        loader(three_photos, decoder="cuda")
