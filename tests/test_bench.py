"""The bench's own parts; its measurements are not tested."""

import bench
import pytest
from bench_jobs import make_photographs
from PIL import Image


def rounds(ways: dict[str, bench.Way], seconds: list[float]) -> bench.Rounds:
    names = [name for name, way in ways.items() if not isinstance(way, str)]
    prices = {"decode": 2.0, "network, slices of 16, NCHW": 10.0, "network, slices of 16, channels_last": 8.0}
    ended = {name: [bench.Ended(each, 12345.6, None) for each in seconds] for name in names}
    return bench.Rounds(ended, dict.fromkeys(names, 4e-7), [100.0, 150.0], [prices, prices])


def test_tables_fit_80_columns():
    options = bench.parse(["bench"])
    ways: dict[str, bench.Way] = {
        bench.ORIGINAL: ("original", []),
        "DataLoader, 64 workers, pandas": ("dataloader", []),
    }
    ways |= {"featx": ("featx", []), "thingsvision 2.7.3": "not run: it installs only with torchvision 0.15.2"}
    found = rounds(ways, [812.3, 799.9, 1021.5])
    lines = [*bench.whole_processes(options, ways, found), *bench.limit(options, found, 64)]
    assert max(len(part) for line in lines for part in line.splitlines()) <= 80


def test_limit_takes_the_cheaper_network():
    lines = list(bench.limit(bench.parse(["bench"]), rounds({}, []), cores=2))
    assert "10.00 (10.00-10.00) ms" in lines[-4]
    assert "200.0 (200.0-200.0) images/s" in lines[-3]
    assert "62.5 (50.0-75.0)%" in lines[-1]


def test_photographs_are_the_same_every_time(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make_photographs(tmp_path / name, 3)
    ones, twos = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.read_bytes() for path in ones] == [path.read_bytes() for path in twos]
    assert len(ones) == 3
    for path in ones:
        with Image.open(path) as image:
            assert sorted(image.size) in ([300, 400], [375, 500], [480, 640])


def test_trees_hold_as_many_files_as_asked_for(tmp_path):
    pool = [tmp_path / f"{i}.jpg" for i in range(3)]
    for path in pool:
        path.write_bytes(b"x")
    tree = bench.plant(tmp_path / "tree", pool, images=10, folders=5)
    assert [len(list(folder.iterdir())) for folder in sorted(tree.iterdir())] == [2] * 5


def test_missing_and_other_rows_end_the_bench(tmp_path):
    texts = {"a": "x,3,4\ny,1,0\n", "near": "y,1,0\nx,3,4.5\n", "short": "x,3,4\n", "other": "x,3,4\nz,1,0\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert bench.difference(tmp_path / "a", tmp_path / "near", 2) == pytest.approx(0.1)
    for name in ("short", "other"):
        with pytest.raises(SystemExit, match=name):
            bench.difference(tmp_path / "a", tmp_path / name, 2)


def test_a_folder_that_is_not_the_benchs_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(SystemExit, match="expected a folder to make and remove"):
        bench.main(bench.parse([str(tmp_path)]))
    assert (tmp_path / "mine.txt").exists()


def test_a_quick_runs_figures_are_not_kept():
    with pytest.raises(SystemExit):
        bench.parse(["bench", "--quick", "--keep", "docs/bench.md"])
