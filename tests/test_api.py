"""From Python: rows in memory and from files, names, errors, mistakes in the command line's words, a notebook."""

import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENV, REPO, make_image, oracle, random_network, relative_error
from PIL import Image, ImageFile
from tiny import Tiny, run
from torchvision.datasets import ImageFolder

import featx
from featx.cli import main
from featx.errors import LostFolderError
from featx.writer.disk import BusyError, DiskError
from featx.writer.formats import FORMATS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def extract(source, layer="2", **options):
    return featx.extract(source, layer, **{"model": Tiny, "num_workers": 0, "batch_size": 8} | options)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """20 images, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("broken")
    for i in range(20):
        path = folder / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        make_image(i, (30, 30)).save(path)
    (folder / "b" / "05.png").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def expected(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected")
    run(photos, out, layer=["1", "2"])
    return {layer: featx.load(out / f"{layer}.csv") for layer in ("1", "2")}


def test_rows_in_memory_are_those_of_plain_torch(photos, alexnet, alexnet_file):
    names, features = featx.extract(photos, ["fc6", "fc7"], weights=alexnet_file, num_workers=0)
    expected_names, expected = oracle(photos, alexnet, ["classifier.1", "classifier.4"])
    assert names == expected_names and list(features) == ["fc6", "fc7"]
    for rows, values in zip(features.values(), expected, strict=True):
        assert rows.dtype == np.float32 and relative_error(rows, values) < 1e-5


def test_a_layer_gives_an_array_and_a_list_a_dict_in_the_files_bits(photos, expected):
    names, values = extract(photos)
    assert names == expected["2"][0] and np.array_equal(values, expected["2"][1])
    names, features = extract(str(photos), ["1", "2"], names="relative")
    assert names[0] == "ants/image-00.jpg" and {k: v.shape for k, v in features.items()} == {
        "1": (37, 12),
        "2": (37, 4),
    }
    assert np.array_equal(features["1"], expected["1"][1])


def test_paths_of_images_keep_their_order(photos, expected):
    paths = sorted(path for path in photos.rglob("*") if path.is_file())
    names, values = extract(reversed(paths))
    by_name = dict(zip(*expected["2"], strict=True))
    assert names == [path.name for path in reversed(paths)]
    assert np.array_equal(values, [by_name[name] for name in names])
    names, _, errors = extract([paths[0], "nowhere/x.jpg"], errors="return")
    assert len(names) == 1 and [fault.reason for fault in errors] == ["no such file"]


def test_pil_images_are_taken_as_they_come(photos, expected):
    paths = [next(photos.rglob(name)) for name in expected["2"][0]]
    taken = []

    def pictures():
        for path in paths:
            taken.append(path)
            yield Image.open(path)

    names, values = extract(pictures())
    assert names == [str(i) for i in range(37)] and np.array_equal(values, expected["2"][1]) and taken == paths


class Exact(torch.nn.Module):
    def forward(self, x):  # of which a memory layout changes the last bits, wherever this runs
        return x * (1 + 2**-20) if x.is_contiguous(memory_format=torch.channels_last) else x


class Convs(featx.FeatureExtractor):
    """A network whose rows differ in their last bits from one memory layout to the other."""

    def build_network(self):
        steps = torch.nn.Conv2d(3, 8, 5), Exact(), torch.nn.Conv2d(8, 16, 3), torch.nn.AdaptiveAvgPool2d(2)
        return torch.nn.Sequential(*steps, torch.nn.Flatten())


def test_memory_files_and_the_command_line_give_the_same_bits(photos, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPO / "tests")
    options = {"--data.dir": photos, "--model": "test_api.Convs", "--model.layer": "4", "--data.batch_size": "8"}
    options |= {"--data.num_workers": "0", "--trainer.devices": "1", "--writer.out_dir": tmp_path / "command"}
    assert main(["predict", *map(str, chain.from_iterable(options.items()))]) == 0
    names, expected = featx.load(tmp_path / "command" / "4.csv")
    paths = [next(photos.rglob(name)) for name in names]
    pictures = (Image.open(path) for path in paths)
    for source, out in ((photos, tmp_path / "out"), (photos, None), (paths, None), (pictures, None)):
        _, values = extract(source, "4", model=Convs, **({"out_dir": out} if out else {}))
        assert np.array_equal(values, expected)
    _, others = extract(photos, "4", model=Convs, channels_last=False)
    assert relative_error(others, expected) < 1e-5 and not np.array_equal(others, expected)


def test_all_calls_of_a_module_are_a_dict(photos, tmp_path):
    _, one = extract(photos, "2:1")
    for out in ({}, {"out_dir": tmp_path}):
        _, features = extract(photos, "2:all", **out)
        assert list(features) == ["2:1"] and np.array_equal(features["2:1"], one)
    assert np.array_equal(featx.load(tmp_path / "2%3A1.csv")[1], one) and featx.record(tmp_path / "2%3A1.csv")


def test_compile_is_not_ignored_in_memory(photos, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda take, **how: asked.append(how) or take)
    extract(photos, compile=True)
    extract([make_image(0, (9, 9))], compile=True)
    assert len(asked) == 2


def test_pil_images_of_16_bits_are_scaled_and_broken_ones_are_listed(tmp_path):
    deep = Image.fromarray(np.full((30, 30), 32896, np.uint16))
    deep.save(tmp_path / "deep.png")
    Image.effect_noise((300, 300), 90).save(tmp_path / "broken.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "broken.png").read_bytes()[:20000])
    grey = Image.new("RGB", (30, 30), (128, 128, 128))
    names, values, errors = extract([deep, Image.open(tmp_path / "broken.png"), grey], errors="return")
    assert names == ["0", "2"] and np.array_equal(values[0], values[1])
    assert [(fault.path, fault.reason) for fault in errors] == [("1", "truncated")]


class Deck(torch.utils.data.Dataset):
    """A map-style dataset, which has no end for ``iter``: its items are made from its numbers."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return self.make(index)


CARDS = [make_image(seed, (60, 40)) for seed in range(5)]


@pytest.mark.parametrize(
    "make",
    [CARDS.__getitem__, lambda i: (CARDS[i], i), lambda i: {"id": i, "photo": CARDS[i]}],
    ids=["images", "tuples", "dicts"],
)
def test_a_dataset_gives_the_rows_of_its_images(make):
    names, values = extract(Deck(make), batch_size=2)
    expected = extract(CARDS, batch_size=2)
    assert names == expected[0] == ["0", "1", "2", "3", "4"] and np.array_equal(values, expected[1])


def test_torchvisions_imagefolder_is_a_dataset(photos):
    found, expected = extract(ImageFolder(str(photos)), batch_size=8), extract(photos, batch_size=8)
    assert found[0] == list(map(str, range(37))) and np.array_equal(found[1], expected[1])


def test_what_a_dataset_raises_is_the_fault_of_that_image():
    def make(index):
        if index in (0, 3):
            raise KeyError(f"no card {index}")
        return CARDS[index], index

    names, values, errors = extract(Deck(make), errors="return")
    assert names == ["1", "2", "4"] and [fault.path for fault in errors] == ["0", "3"]
    assert np.array_equal(values, extract([CARDS[i] for i in (1, 2, 4)])[1])
    with pytest.raises(featx.ImageError, match=r"0: .*no card 0"):
        extract(Deck(make))


@pytest.mark.parametrize(
    ("make", "column", "words"),
    [
        (lambda i: (torch.zeros(3, 8, 8), i), None, "item 0 is a Tensor.*\n.*no transform"),
        (lambda i: CARDS[i] if i < 2 else np.zeros((8, 8, 3)), None, "item 2 is a ndarray"),
        (
            lambda i: {"left": CARDS[i], "right": CARDS[i]},
            None,
            r"column=None: expected one column of PIL images. Item 0 has left, right",
        ),
        (lambda i: {"left": CARDS[i]}, "right", r"column right: expected one column of PIL images. Item 0 has left"),
        (lambda i: CARDS[i], "right", "column right: item 0 is a Image, without columns"),
    ],
)
def test_a_dataset_without_pil_images_is_refused(make, column, words):
    with pytest.raises(featx.UserError, match=words):
        extract(Deck(make), column=column)


def test_a_dataset_of_hugging_face_gives_its_images_in_memory():
    datasets = pytest.importorskip("datasets")
    images = [*CARDS[:3], None]
    dataset = datasets.Dataset.from_dict(
        {"photo": images, "mask": images[::-1], "label": [1, 0, 1, 0]},
        datasets.Features({"photo": datasets.Image(), "mask": datasets.Image(), "label": datasets.Value("int64")}),
    )
    expected = extract(CARDS[:3])
    names, values, errors = extract(dataset, column="photo", errors="return")
    assert names == expected[0] and np.array_equal(values, expected[1])
    assert [(fault.path, fault.reason) for fault in errors] == [("3", "no image: the value is null")]
    one = dataset.remove_columns("mask")
    assert np.array_equal(extract(one.select(range(3)))[1], values)
    assert np.array_equal(extract(one.select(range(3)).to_iterable_dataset())[1], values)
    with pytest.raises(
        featx.UserError, match=r"column=None: expected one column of type Image. The dataset has photo \(Image\)"
    ):
        extract(dataset)
    with pytest.raises(featx.UserError, match=r"column label: expected one column of type Image"):
        extract(dataset, column="label")
    with pytest.raises(featx.UserError, match=r"item 0 is a Tensor.*\n.*no format"):
        extract(one.with_format("torch"))
    with pytest.raises(featx.UserError, match=r"source: a DatasetDict of train, test. Expected one of them"):
        extract(datasets.DatasetDict(train=one, test=one))


def test_images_of_one_colour_are_reported_at_the_end(caplog):
    blank = [Image.new("RGB", (60, 60), "white")] * 2
    extract([make_image(1, (60, 60)), *blank, make_image(2, (60, 60))], batch_size=2)
    assert caplog.messages[-1].startswith("2 images of one single colour") and caplog.messages[-1].endswith("(1, …)")


@pytest.mark.parametrize("as_paths", [False, True])
def test_images_that_all_need_an_option_are_refused_at_once_and_one_of_several_is_listed(tmp_path, as_paths):
    deep = Image.fromarray(np.zeros((60, 60), np.float32))
    deep.save(tmp_path / "0.tif")
    make_image(1, (60, 60)).save(tmp_path / "1.png")
    sources = [tmp_path / "0.tif", tmp_path / "1.png"] if as_paths else [deep, make_image(1, (60, 60))]
    with pytest.raises(ValueError, match=r"32-bit float values .*--data.value_range"):
        extract(sources[:1], errors="return")
    names, values, faults = extract(sources, errors="return")
    assert (names, values.shape) == ([["1"], ["1.png"]][as_paths], (1, 4))
    assert "--data.value_range" in faults[0].reason


def test_images_that_cannot_be_read_are_raised_or_returned(broken, tmp_path):
    with pytest.raises(featx.ImageError, match=r"b/05.png: text named .png .*\n.*errors='return'"):
        extract(broken)
    names, values, errors = extract(broken, errors="return")
    assert len(names) == len(values) == 19 and [fault.path for fault in errors] == ["b/05.png"]
    with pytest.raises(featx.ImageError, match=r"1 of 20 images cannot be read, the first is b/05.png: text named"):
        extract(broken, out_dir=tmp_path)
    found_names, found, listed = extract(broken, out_dir=tmp_path, errors="return")
    assert found_names == names and np.array_equal(found, values) and listed == errors


def test_files_are_written_and_gone_on_with(photos, expected, tmp_path):
    names, features = extract(photos, ["1", "2"], out_dir=tmp_path, format=["npy", "csv"])
    assert isinstance(features["1"], np.memmap) and np.array_equal(features["1"], expected["1"][1])
    assert names == expected["1"][0] and {"1.npy", "1.csv", "2.npy", "2.json"} < set(os.listdir(tmp_path))
    before = (tmp_path / "2.csv").stat().st_mtime_ns
    again, values = extract(photos, "2", out_dir=tmp_path)
    assert again == names and np.array_equal(values, expected["2"][1])
    assert (tmp_path / "2.csv").stat().st_mtime_ns == before
    record = featx.record(tmp_path / "2.csv")
    assert record == featx.record(tmp_path / "2.json") == json.loads((tmp_path / "2.json").read_text())
    assert record["rows"] == 37 and record["run"]["stages"]["wait"] > 0


MISTAKES = [
    ({"batch_sise": 3}, r"batch_sise=3: no such option. Did you mean batch_size\?"),
    ({"batch_size": "many"}, "--data.batch_size many: expected a whole number"),
    ({"batch_size": 0}, "--data.batch_size 0: expected a whole number of at least 1"),
    ({"pool": "agv"}, r"--model.pool agv: expected none, avg, max or cls. Did you mean avg\?"),
    ({"strict": False}, r"strict=False: no such option. Did you mean model_strict or data_strict\?"),
    ({"format": "npy"}, "format='npy': no such option. It applies to files: add out_dir"),
    ({"errors": "ignore"}, "errors='ignore': expected 'raise' or 'return'"),
    ({"layer": "22"}, r"--model.layer 22: Tiny has no such layer. Did you mean 2\?"),
    ({"devices": 2}, "devices=2: each process would return only its share"),
    ({"precision": "31"}, "--trainer.precision 31: "),
    ({"source": []}, "source: nothing in it. Expected a folder, paths of images, or PIL images"),
    ({"source": [1]}, "source: item 0 is a int. Expected only PIL images"),
    ({"source": ["a.jpg"], "out_dir": "x"}, "out_dir='x': expected a folder, an archive or a table as source"),
]


@pytest.mark.parametrize("options, words", MISTAKES, ids=lambda value: None if isinstance(value, str) else str(value))
def test_a_mistake_is_a_value_error_in_words(photos, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        extract(**{"source": photos} | options)
    assert isinstance(caught.value, featx.UserError)


def test_what_is_not_there_is_a_file_not_found_error(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data.dir nowhere: no such folder"):
        extract("nowhere")
    with pytest.raises(FileNotFoundError, match=r"--model.weights .*nothing.pth"):
        featx.extract(photos, weights=tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError, match=r"fc7.csv: no such file"):
        featx.load(tmp_path / "fc7.csv")
    with pytest.raises(FileNotFoundError, match=r"fc7.json: no record"):
        featx.record(tmp_path / "fc7.csv")
    assert issubclass(DiskError, OSError) and issubclass(BusyError, OSError) and issubclass(LostFolderError, OSError)


def state_of_the_process():
    """What belongs to the whole process and a call may not leave changed."""
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return {
        "pil": (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS),
        "cudnn": (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark),
        "default dtype": torch.get_default_dtype(),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "logging": {
            name: logging.getLogger(name).level for name in ("", "lightning.pytorch", "lightning.fabric", "featx")
        },
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
        "threads": (torch.get_num_threads(), later),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "sys": (list(sys.path), sys.excepthook, threading.excepthook),
        "timeout": socket.getdefaulttimeout(),
        "environment": (dict(os.environ), os.getcwd()),
        "torch": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision()),
    }


def test_nothing_of_the_process_is_left_changed(photos, broken, expected, alexnet_file, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    calls = [
        lambda: extract(photos),
        lambda: extract(photos, num_workers=2),
        lambda: extract(photos, precision="bf16-true"),
        lambda: extract(photos, out_dir=tmp_path),
        lambda: extract([Image.new("RGB", (300, 300))]),
        lambda: extract(broken),
        lambda: extract(photos, layer="22"),
        lambda: extract(photos, precision="31"),
        lambda: extract(iter([Image.new("RGB", (300, 300)), 1])),
        lambda: featx.extract(photos, "fc8", weights=alexnet_file, num_workers=0),
        lambda: featx.extract(photos, "avgpool", arch="torchvision.models.squeezenet1_1", num_workers=0),
    ]
    torch.set_default_dtype(torch.float64)
    try:
        for call in calls:
            before = state_of_the_process()
            with suppress(featx.UserError):
                call()
            after = state_of_the_process()
            assert [name for name in before if before[name] != after[name]] == []
        assert np.array_equal(extract(photos)[1], expected["2"][1])
    finally:
        torch.set_default_dtype(torch.float32)


class Scaled(Tiny):
    """Has a parameter of its own, and passes the others on."""

    def __init__(self, layer="2", factor: float = 2.0, **options):
        super().__init__(layer, **options)
        self.factor = factor

    def build_network(self):
        network = super().build_network()
        network[2].factor = self.factor
        return network


def test_a_subclass_takes_its_own_parameters_and_those_that_it_passes_on(photos):
    one, other = (extract(photos, model=Scaled, factor=factor, pool="avg")[1] for factor in (1.0, 3.0))
    assert np.allclose(other, one * 3, rtol=1e-6)
    with pytest.raises(ValueError, match=r"factr=1: no such option. Did you mean factor"):
        extract(photos, model=Scaled, factr=1)
    with pytest.raises(ValueError, match="factor"):
        extract(photos, model=Scaled, factor="much")


def test_eight_threads_get_the_rows_of_one_and_a_strangers_network_is_built_as_ever(photos, tmp_path):
    torch.save(random_network("squeezenet1_1").state_dict(), tmp_path / "w.pth")
    options = {"arch": "squeezenet1_1", "weights": tmp_path / "w.pth"}
    names, values = featx.extract(photos, "features.12", pool="avg", num_workers=0, **options)
    torch.manual_seed(7)
    expected = [torch.nn.Linear(3, 3).weight for _ in range(2000)]
    torch.manual_seed(7)
    found = []
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(featx.extract, photos, "features.12", pool="avg", **options) for _ in range(8)]
        while not all(future.done() for future in futures) and len(found) < len(expected):
            found.append(torch.nn.Linear(3, 3).weight)
            time.sleep(0.001)
    assert len(found) > 10 and all(map(torch.equal, found, expected))
    for future in futures:
        assert future.result()[0] == names and np.array_equal(future.result()[1], values)


def test_python_hears_nothing_but_its_result(photos, capfd):
    extract(photos)
    assert capfd.readouterr() == ("", "")


ANYWHERE = """\
import multiprocessing, sys
multiprocessing.set_start_method("spawn")
sys.path.insert(0, {tests!r})
import featx
from tiny import Tiny

def rows(number_of_workers):
    try:
        return len(featx.extract({photos!r}, "2", model=Tiny, batch_size=8, num_workers=number_of_workers)[0])
    except ValueError as err:
        return str(err)

print(rows(2))
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(*pool.map(rows, ["auto", 1]), sep="\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process is forked")
def test_a_script_without_a_guard_and_a_pool_get_their_rows(photos, tmp_path):
    """Where processes import the script unless they are forked; and in one that was forked after featx has computed."""
    code = ANYWHERE.format(tests=str(Path(__file__).parent), photos=str(photos))
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env={**ENV, "PYTHONPATH": str(REPO)},
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.stdout.splitlines()[:2] == ["37", "37"] and done.stderr == ""
    assert "num_workers=1: this is a daemonic process" in done.stdout


def test_a_worker_that_imports_the_script_again_says_what_to_do(photos, monkeypatch):
    """As with spawn, where the script has no guard."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(SystemExit, match="Call it below if __name__ == '__main__', or with num_workers=0"):
        extract(photos)


def test_public_names_are_there_and_none_costs_torch_before_it_is_used():
    assert featx.__all__ == sorted(featx.__all__)
    assert set(featx.__all__) - {"__version__"} == set(featx._HOME)
    for name in featx.__all__:
        value = getattr(featx, name)
        assert name == "__version__" or len(value.__doc__) > 40
    code = "import sys, featx; featx.load, featx.record, featx.UserError; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True).stdout == "False\n"
    assert (REPO / "featx" / "py.typed").exists()


SCRIPT = """\
import sys, featx
sys.path.insert(0, {tests!r})
from tiny import Tiny
names, values = featx.extract({photos!r}, "2", model=Tiny, out_dir="out", format="npy", devices=2, strategy="ddp",
                              accelerator="cpu", batch_size=8, num_workers=0)
sys.stdout.write(f"{{len(names)}} {{values.shape}}\\n")
"""


def test_each_of_two_processes_returns_all_rows(photos, expected, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(tests=str(Path(__file__).parent), photos=str(photos)))
    environment = {**ENV, "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "37 (37, 4)\n" * 2
    assert np.array_equal(featx.load(tmp_path / "out" / "2.npy")[1], expected["2"][1])


def test_a_notebook_shows_a_bar_and_nothing_else(photos, tmp_path):
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = [f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); sys.path.insert(0, {str(REPO)!r})\n"
             "import warnings; warnings.filterwarnings('ignore', 'IProgress')\n"  # Lightning's import of transformers
             "import featx; from tiny import Tiny",
             f"names, values = featx.extract({str(photos)!r}, '2', model=Tiny)"]  # fmt: skip
    book = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    client.NotebookClient(book, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert book.cells[0].outputs == []
    shown = [output.get("text") or json.dumps(output["data"]) for output in book.cells[1].outputs]
    assert "37/37" in "".join(shown)
    assert [text for text in shown if text.strip() and "images/s]" not in text] == []


# load


@pytest.fixture(scope="module")
def bits():
    """Every kind of float32: 60 rows of random bits, nan and infinities among them."""
    values = np.random.default_rng(0).integers(0, 2**32, (60, 500), dtype=np.uint32).view(np.float32)
    values[3, 4], values[20] = np.nan, 1
    return values


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("parser", ["simdjson", "orjson"])
def test_csv_reads_back_bit_by_bit(bits, tmp_path, header, parser, monkeypatch):
    pytest.importorskip(parser)
    if parser == "orjson":
        monkeypatch.setitem(sys.modules, "simdjson", None)
    names = ['a,"b\n.png', "image", "猫.png", *(f"{i}.png" for i in range(57))]
    path = tmp_path / "2.csv"
    csv = FORMATS["csv"]("2", 500, {"header": header})
    path.write_bytes(csv.head(0) + csv.encode(list(map(str.encode, names)), bits)[0])
    found, values = featx.load(path)
    assert found == names and values.dtype == np.float32
    assert np.array_equal(values, bits, equal_nan=True)


def test_no_row_is_no_row(tmp_path):
    (tmp_path / "x.csv").touch()
    names, values = featx.load(tmp_path / "x.csv")
    assert names == [] and values.shape == (0, 0)


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("x.csv", b"a,1.0,2.0\nb,1.0\n", "x.csv: row 2: 1 value, expected 2"),
        ("x.csv", b"a,1.0\n" * 16 + b"b,1.0,2.0\n", "x.csv: row 17: 2 values, expected 1"),
        ("x.csv", b"a,1.0\nb,one\n", "x.csv: row 2: .*Expected numbers after the name"),
        ("x.txt", b"", "x.txt: no such format. Expected a file that ends with .csv, .npy, .parquet"),
        ("x.npy", b"", "x.npy: No data left in file. Expected an array written by featx"),
    ],
)
def test_a_file_that_is_not_featxs_is_refused_in_words(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "x.names.txt").touch()
    with pytest.raises(ValueError, match=words):
        featx.load(tmp_path / name)


def test_npy_without_its_names_or_with_others_is_refused(photos, tmp_path):
    run(photos, tmp_path, format="npy")
    (tmp_path / "2.names.txt").write_text("a.png\n")
    with pytest.raises(ValueError, match=r"2.npy: 37 rows, but 1 name in 2.names.txt"):
        featx.load(tmp_path / "2.npy")
    (tmp_path / "2.names.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"2.names.txt: no such file. Expected the row names of 2.npy"):
        featx.load(tmp_path / "2.npy")
