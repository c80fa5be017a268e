"""README and configs against the program: what they say exists, and what exists is said."""

import re
import subprocess

import pytest
import yaml
from conftest import REPO, featx, oracle, predict, read_csv, relative_error

README = (REPO / "README.md").read_text()
CONFIGS = sorted(path.name for path in (REPO / "configs").iterdir())


@pytest.fixture(scope="module")
def options():
    shown = featx("predict", "--help").stdout
    return set(re.findall(r"^  (--[a-z_.]+)", shown, re.MULTILINE))


def test_every_option_is_in_readme(options):
    assert {"--data.dir", "--model.layer", "--writer.out_dir"} < options
    missing = {option for option in options if f"`{option}" not in README and f"{option} " not in README}
    assert not missing


def test_every_option_in_readme_exists(options):
    everything = featx("predict", "--help_all").stdout
    named = set(re.findall(r"--(?:data|model|writer|trainer)\.[a-z_]+", README))
    assert named and {o for o in named if o not in options and o not in everything} == set()


def test_every_make_target_in_readme_exists():
    targets = set(re.findall(r"`?make ([a-z]+)`?", README))
    known = set(re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= targets <= known


def test_there_are_three_configs():
    assert CONFIGS == ["alexnet.yaml", "demud.yaml", "gpu.yaml"]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_runs(config, photos, tmp_path, alexnet, alexnet_file):
    cpu = ("--trainer.accelerator", "cpu", "--trainer.devices", "1")
    predict(photos, tmp_path, "--model.weights", alexnet_file, *cpu, "--config", REPO / "configs" / config)
    options = {"resize": 224, "crop": None} if config == "demud.yaml" else {}
    names, (expected,) = oracle(photos, alexnet, ["classifier.4"], **options)
    found_names, found = read_csv(tmp_path / "fc7.csv")
    assert found_names == names and relative_error(found, expected) < 1e-5


def test_alexnet_yaml_spells_out_the_defaults():
    plain = yaml.safe_load(featx("predict", "--data.dir", "x", "--print_config").stdout)
    path = REPO / "configs" / "alexnet.yaml"
    assert yaml.safe_load(featx("predict", "--data.dir", "x", "--config", path, "--print_config").stdout) == plain
    stated = yaml.safe_load(path.read_text())
    assert stated["data"].keys() == plain["data"].keys() - {"dir"} and stated["writer"].keys() == plain["writer"].keys()
    assert stated["model"].keys() == plain["model"]["init_args"].keys()


def test_options_on_the_line_win_over_a_config_wherever_it_stands():
    config = ("--config", REPO / "configs" / "demud.yaml")
    for line in (("--data.resize", "300", *config), (*config, "--data.resize", "300")):
        printed = yaml.safe_load(featx("predict", "--data.dir", "x", *line, "--print_config").stdout)
        assert printed["data"]["resize"] == 300 and printed["data"]["crop"] is None


def test_the_package_promises_types_and_its_public_names():
    import featx as package

    assert (REPO / "featx" / "py.typed").exists()
    assert {name for name in package.__all__ if getattr(package, name) is None} == set()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_nothing_named_in_git_is_an_image_or_a_weights_file():
    files = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True).stdout.split()
    assert not [file for file in files if file.endswith((".jpg", ".JPEG", ".pth", ".csv"))]
