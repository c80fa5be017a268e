"""README, docs and configs against the program: what they name exists, every option is in them, what they show runs."""

import multiprocessing
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
import torch
import yaml
from conftest import ENV, REPO, make_image, oracle, random_network, read_csv, relative_error
from products import fits_file, pds_files
from torchvision import models

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
README = PAGES[0].read_text()
TEXT = "\n".join(page.read_text() for page in PAGES)
CONFIGS = sorted(path.name for path in (REPO / "configs").iterdir())

# What no test can run, and why. A command that is neither run nor listed fails.
NOT_RUN = {
    r"pip install ": "it installs",
    r"make (demo|test)\b": "it installs; test_demo.py runs what make demo runs, and make test runs this",
    r"make bench\b": "it installs, and measures for minutes; test_bench.py runs its parts",
    r"featx predict --data.dir s3://": "it needs a bucket; data/sources/test_store.py reads one",
    r"srun ": "there is no SLURM here; test_cli.py starts two tasks with the variables that srun sets",
}
# What a test uses instead of what a reader has: machines, GPUs, and weights that only a server has.
INSTEAD = [
    (r"^torchrun ", f"{shlex.quote(sys.executable)} -m torch.distributed.run "),
    (r"--nnodes 2 (.*)--nproc_per_node 4", r"--nnodes 1 \1--nproc_per_node 2"),
    (r"--master_addr host0 --master_port \d+", "--master_addr 127.0.0.1 --master_port PORT"),
    (r"--trainer.devices 4 --trainer.num_nodes 2", "--trainer.devices 2 --trainer.num_nodes 1"),
    (r"/shared/", ""),
    (r"\$SLURM_ARRAY_TASK_ID/64", "1/1"),
    (r"ssh \$host \"(.*)\" &", r'sh -c "\1 --model.weights alexnet.pth" &'),
    (r"(--config configs/gpu.yaml.*)", r"\1 --trainer.accelerator cpu --trainer.devices 1"),
    (r"(.*--model.arch (timm/|vit_b_16).*)", r"\1 --model.weights random"),
    (r"hf/(facebook|openai)/[\w-]+", "hf/./clip"),
    (r"--model.weights laion2b_s34b_b79k", "--model.weights random"),
    (r"(.*--trainer.strategy ddp.*)", r"\1 --model.weights alexnet.pth"),  # its processes compare digests with names
]
SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
STATUS = {"fc9": 2, "--data.resize 300": 2}


class Block(NamedTuple):
    """What is between fences: its language, its text, and where that begins."""

    page: str
    line: int
    language: str
    text: str


def find_blocks():
    for page in PAGES:
        text = page.read_text()
        for found in re.finditer(r"^( *)```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
            yield Block(page.name, text.count("\n", 0, found.start()) + 2, found[2], found[3])


def commands_in(block):
    """Return each command as one line, with the lines that are shown as its output."""
    if block.language not in ("sh", "console"):
        return []
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "console" and not line.startswith("$ "):
            found[-1][1].append(line)
        elif line.strip() and not line.startswith("#"):
            found.append((re.sub(r" +", " ", line.removeprefix("$ ").strip()), []))
    return found


BLOCKS = list(find_blocks())
FOUND = [found for block in BLOCKS for found in commands_in(block)]
COMMANDS = dict(sorted(FOUND, key=lambda found: len(found[1])))  # of a command shown twice, with its output
RUN = [command for command in COMMANDS if not any(re.match(pattern, command) for pattern in NOT_RUN)]
OUTSIDE = re.sub(r"^ *```.*?^ *```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
FILES = {block.text.split()[1]: block.text for block in BLOCKS if block.text.startswith("# ") and ".py\n" in block.text}
SNIPPETS = {
    f"{block.page}:{block.line}": block.text
    for block in BLOCKS
    if block.language == "python" and block.text not in FILES.values()
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """What a reader has: photographs under the names that README shows, weights in files, classes in modules."""
    store = tmp_path_factory.mktemp("reader")
    birds = [f"birds/{name}.JPEG" for name in ("n01514668_cock", "n01530575_brambling", "n01534433_junco")]
    twice = [
        f"{kind}/{name}" for kind in ("birds", "newts") for name in ("n01632458_spotted_salamander.JPEG", "n2.jpg")
    ]
    for i, name in enumerate([*birds, *twice]):
        (store / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(i, (260, 240)).save(store / "photos" / name, "JPEG")
    (store / "dataset_dir").symlink_to("photos")
    (store / "configs").symlink_to(REPO / "configs")
    (store / "list.txt").write_text("birds/n2.jpg\nnewts/n2.jpg\n")
    (store / "b").mkdir()
    for name in ("6", "c"):  # which a shell puts in the place of [fc6,fc7]
        (store / name).touch()
    make_image(50, (260, 240)).save(store / "a.jpg")
    make_image(51, (260, 240)).save(store / "b" / "c.png")
    for name, text in FILES.items():
        (store / name).write_text(text)
    make_products(store)
    antialiased_cnns = pytest.importorskip("antialiased_cnns")
    cache = store / "hub" / "checkpoints"  # torch's
    cache.mkdir(parents=True)
    for arch in ("alexnet", "resnet50", "mobilenet_v3_small"):
        url = models.get_model_weights(arch).DEFAULT.url
        torch.save(random_network(arch).state_dict(), cache / os.path.basename(url))
        (store / f"{arch}.pth").symlink_to(cache / os.path.basename(url))
    ten = random_network("alexnet")
    ten.classifier[6] = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(4096, 10))
    finetuned = {
        "antialiased": antialiased_cnns.alexnet(),
        "smooth": antialiased_cnns.alexnet(filter_size=5, num_classes=10),
        "resnet50": random_network("resnet50", num_classes=10),
        "ten": ten,
    }
    for name, network in finetuned.items():
        state = {f"module.{key}": value for key, value in network.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 90}, store / f"{name}.pth.tar")
    transformers = pytest.importorskip("transformers")
    clip = transformers.CLIPConfig(projection_dim=4, vision_config=SMALL, text_config=SMALL)
    transformers.CLIPModel(clip).save_pretrained(store / "clip")
    transformers.CLIPImageProcessor().save_pretrained(store / "clip")
    (store / "bin").mkdir()
    (store / "bin" / "featx").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m featx "$@"\n')
    (store / "bin" / "featx").chmod(0o755)
    photos = sorted((store / "photos").glob("*/*"))
    columns = {"image": [path.read_bytes() for path in photos], "label": [path.parent.name for path in photos]}
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").table(columns), store / "photos.parquet")
    shutil.make_archive(store / "photos", "zip", store / "photos")
    (store / "shards").mkdir()
    for number in range(128):
        with tarfile.open(store / "shards" / f"{number:03}.tar", "w") as shard:
            for path in photos[number::128]:
                shard.add(path, path.relative_to(store / "photos"))
    yield store
    for path in [*store.glob("*.pth*"), *cache.iterdir()]:  # a gigabyte
        path.unlink()


def make_products(store):
    """What instruments write, in the folders that docs/images.md reads."""
    for name in ("scenes", "heights", "arrays", "sky", "mission"):
        (store / name).mkdir()
    bands = np.stack([np.array(make_image(i, (260, 240), "L")) for i in range(7)], axis=-1)
    tifffile.imwrite(store / "scenes/a.tif", bands.astype(np.uint16), photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(store / "heights/a.tif", bands[..., 0].astype(np.float32))
    np.save(store / "arrays/a.npy", bands / 255)
    fits_file(store / "sky/a.fits", np.moveaxis(bands.astype(np.int16), -1, 0))
    pds_files(store / "mission", bands[..., 0].astype(np.int16))


@pytest.fixture(scope="module")
def forkserver():
    """Starts processes in which featx is imported already, as a command's start costs more than its work here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["featx.commands.predict", "featx.commands.layers", "featx.api", "test_readme"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO), str(REPO / "tests"), *([before] if before else [])])
    yield context
    os.environ.update({"PYTHONPATH": before} if before else {})
    if not before:
        del os.environ["PYTHONPATH"]


def words(command, folder):
    """Return the arguments that a shell makes of a command line of featx in a folder."""
    script = f"featx() {{ printf '%s\\0' \"$@\"; }}; {command}"
    shell = subprocess.run(["bash", "-O", "failglob", "-c", script], cwd=folder, capture_output=True, text=True)
    assert shell.returncode == 0, shell.stderr
    return shell.stdout.split("\0")[:-1]


def act(command, folder):
    """Run featx with a list of arguments, or a block of Python, in this process."""
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(ENV | {"CUDA_VISIBLE_DEVICES": "", "TORCH_HOME": os.getcwd()})
    os.environ["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    sys.path.insert(0, os.getcwd())

    from featx.model.libraries import torchvision

    torchvision.fetch = lambda url: None  # the digests of the files in the cache are not those in their names
    if isinstance(command, list):
        from featx.cli import main

        sys.argv = ["featx", *command]
        sys.exit(main(command))
    import featx

    exec(compile(command, "README", "exec"), {"featx": featx})


@pytest.fixture(scope="module")
def do(store, forkserver, tmp_path_factory):
    """Runs a command, or a block of Python, in a folder like the reader's, and returns it, ended, with its output."""
    ready = {}

    def finished(options):
        """Return the folder features/ that a run has made before, once for all that read it."""
        if options not in ready:
            folder, done = run(f"featx predict --data.dir photos {options}")
            assert done.returncode == 0, done.stderr
            ready[options] = folder / "features"
        return ready[options]

    def run(command, given=None):
        folder = tmp_path_factory.mktemp("run")
        for path in store.iterdir():
            (folder / path.name).symlink_to(path)
        if given:
            shutil.copytree(given, folder / "features")
        if "\n" in command or (command.startswith("featx ") and not re.search(r"[|>]|--trainer.strategy", command)):
            what = command if "\n" in command else words(command, folder)
            process = forkserver.Process(target=act, args=(what, folder))
            process.start()
            process.join(120)
            process.kill()
            process.join()
            output = [(folder / name).read_text() for name in ("stdout", "stderr")]
            return folder, subprocess.CompletedProcess(command, process.exitcode, *output)
        with socket.create_server(("127.0.0.1", 0)) as free:
            command = command.replace("PORT", str(free.getsockname()[1]))
        env = ENV | {
            "PYTHONPATH": str(REPO),
            "PATH": f"{store / 'bin'}:{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
        }
        line = ["bash", "-O", "failglob", "-c", f"set -o pipefail; {command}"]
        return folder, subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=300)

    def do(command):
        of_files = "--model.layer fc7 --model.weights alexnet.pth --writer.format '[csv,npy,parquet]'"
        of_shards = f"{of_files} --data.batch_size 4 --writer.shard_rows 4"
        reads = {"features/pooled": "--model lite.Lite0", r"features/fc7(/|\s|$)": of_shards, "features/fc7": of_files}
        reads["--data.resize 300"] = reads["featx status"] = of_files
        options = next((made for pattern, made in reads.items() if re.search(pattern, command)), None)
        return run(command, finished(options) if options and "out_dir=" not in command else None)[1]

    return do


def in_short(line):
    """Return a line without what differs from run to run: numbers, units, folders of packages, the bottleneck."""
    line = re.sub(r"^bottleneck: .*", "bottleneck:", line)
    line = re.sub(r"/\S*/site-packages/", "…/", line)
    line = re.sub(r"-?\d[\d,.]*(e[-+]\d+)?", "#", line)
    return re.sub(r"# [kMG]?B\b", "# B", re.sub(r"\b(core|thread|worker|row)s\b", r"\1", " ".join(line.split())))


@pytest.mark.parametrize("command", RUN, ids=lambda command: command[:98])
def test_every_command_runs(command, do):
    instead = command
    for pattern, other in INSTEAD:
        instead = re.sub(pattern, other, instead)
    done = do(instead)
    expected = next((status for word, status in STATUS.items() if word in command), 0)
    assert done.returncode == expected, f"{instead}\n{done.stdout}{done.stderr}"
    if shown := COMMANDS[command]:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if not line.endswith(" left")]  # if slow
        if not command.startswith("featx"):  # rows of other images
            lines, shown = ([in_short(line.split(",")[0]) for line in part] for part in (lines, shown))
        assert [in_short(line) for line in lines] == [in_short(line) for line in shown]


@pytest.mark.parametrize("place", SNIPPETS)
def test_every_block_of_python_runs(place, do):
    if "polars" in SNIPPETS[place]:
        for module in ("pandas", "polars", "duckdb"):
            pytest.importorskip(module)
    if "import ray" in SNIPPETS[place]:
        pytest.importorskip("ray")
    done = do(f"{SNIPPETS[place]}\n")
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr


def test_what_is_not_run_is_listed_and_nothing_more():
    assert len(RUN) > 30 and len(SNIPPETS) > 6
    assert set(FILES) == {"fits_reader.py", "lite.py", "mine.py", "pds_reader.py", "smooth.py"}
    assert [pattern for pattern in NOT_RUN if not any(re.match(pattern, command) for command in COMMANDS)] == []
    assert {block.language for block in BLOCKS} <= {"sh", "console", "python", "text"}
    assert re.findall(r"^    +(?:\$ )?(?:featx|make|pip|torchrun|python) .*", OUTSIDE, re.MULTILINE) == []


def to_paste():
    """Return all that a reader can paste: the blocks of commands without their prompts, then those in the text."""
    for block in BLOCKS:
        if block.language == "sh" and not block.text.startswith("#!"):  # that is a file
            yield block.text
        elif block.language == "console":
            yield "".join(f"{line}\n" for line in re.findall(r"^\$ (.*)", block.text, re.MULTILINE))
    for command in re.findall(r"`((?:featx|make|pip|--\w)[^`]*)`", OUTSIDE):
        yield f"{'featx ' * command.startswith('--')}{' '.join(command.split())}\n"


@pytest.fixture(scope="module")
def paste(tmp_path_factory):
    """Pastes all commands into a shell; returns what each was given, and the files that are in the folder by then."""
    stubs = tmp_path_factory.mktemp("stubs")
    for name in ("featx", "make", "pip", "torchrun", "cut", "head"):
        stub = """#!/bin/sh\nline=$(printf '<%s>' "${0##*/}" "$@")\nprintf '%s\\n' "$line" >>"$GIVEN"\n"""
        (stubs / name).write_text(stub)
        (stubs / name).chmod(0o755)

    def paste(shell, *files):
        name, *options = shell.split()
        if not (path := shutil.which(name)):
            pytest.skip(f"{name} is not installed")
        folder = tmp_path_factory.mktemp("folder")
        for file in files:
            (folder / file).touch()
        given = tmp_path_factory.mktemp("given") / "given"
        env = {"PATH": str(stubs), "GIVEN": str(given), "HOME": str(given.parent)}
        how = {"cwd": folder, "env": env, "start_new_session": True, "timeout": 60}
        subprocess.run([path, *options], input="".join(to_paste()), capture_output=True, text=True, **how)
        return set(given.read_text().splitlines()), {path.name for path in folder.iterdir()} - {*files}

    return paste


# As they are for someone who types: without comments, as zsh is then, and with an error where a pattern fits nothing.
@pytest.mark.parametrize("shell", ["bash --norc --noprofile -i +O interactive_comments -O failglob", "zsh -f -i"])
def test_commands_mean_the_same_pasted_into_any_shell_next_to_any_files(shell, paste):
    given, made = paste("bash --norc --noprofile")
    assert len(given) > len(RUN) and made == {"night.yaml"}
    typed, made_then = paste(shell, "6", "c")
    assert typed ^ given == made_then ^ made == set()


def test_a_list_is_quoted_wherever_one_is_shown():
    sources = [path.read_text() for path in (REPO / "featx").rglob("*.py")]
    # In code there is a space after a comma; a list in a list is within the quotes of the outer one.
    unquoted = re.compile(r"(?<!['\w.\[,])\[[\w.]+(?:,[\w.]+)+\]")
    assert [shown for text in (TEXT, *sources) for shown in unquoted.findall(text)] == []


def anchors(text):
    """Return the names under which the headings can be linked."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_link_between_the_pages_leads_somewhere():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)]+)\)", page.read_text())]
    for page, link in links:
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target.read_text()), f"{page.name}: {link}"
    linked = {link.partition("#")[0] for page, link in links if page.name == "README.md"}
    from_speed = {"docs/bench.md"}  # a table that `make bench` writes
    assert {f"docs/{page.name}" for page in PAGES[1:]} - from_speed | {"docs/show.png"} <= linked


def test_readme_is_four_screens():
    assert len(README.split()) < 1200 and len(README.splitlines()) < 170
    assert (REPO / "docs" / "show.png").stat().st_size < 300 * 1024


@pytest.fixture(scope="module")
def options(do):
    shown = do("featx predict --help").stdout
    return set(re.findall(r"^  (--[a-z_.]+)", shown, re.MULTILINE))


def test_every_option_is_in_docs(options, do):
    assert {"--data.dir", "--model.layer", "--writer.out_dir"} < options
    table = (REPO / "docs" / "options.md").read_text()
    assert {option for option in options if f"| `{option}` |" not in table} == set()
    for command in ("verify", "show", "status", "layers", "images"):
        own = set(re.findall(r"^  (--[a-z]+)(?![\w.])", do(f"featx {command} --help").stdout, re.MULTILINE))
        assert own and {o for o in own - options if f"| `featx {command} {o}` |" not in table} == set()


def test_every_option_in_readme_or_docs_exists(options, do):
    everything = do("featx predict --help_all").stdout
    named = set(re.findall(r"--(?:data|model|writer|trainer)\.[a-z_]+", TEXT))
    assert named and {o for o in named if o not in options and o not in everything} == set()


def test_every_make_target_in_readme_or_docs_exists():
    targets = set(re.findall(r"(?:`|^)make ([a-z]+)", TEXT, re.MULTILINE))
    known = set(re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= targets <= known


def test_there_are_three_configs():
    assert CONFIGS == ["alexnet.yaml", "demud.yaml", "gpu.yaml"]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_runs(config, photos, tmp_path, alexnet, alexnet_file, do):
    where = f"--data.dir {photos} --writer.out_dir {tmp_path} --model.weights {alexnet_file}"
    cpu = "--trainer.accelerator cpu --trainer.devices 1"
    assert do(f"featx predict {where} {cpu} --config configs/{config}").returncode == 0
    options = {"resize": 224, "crop": None} if config == "demud.yaml" else {}
    names, (expected,) = oracle(photos, alexnet, ["classifier.4"], **options)
    found_names, found = read_csv(tmp_path / "fc7.csv")
    assert found_names == names and relative_error(found, expected) < 1e-5


def test_alexnet_yaml_spells_out_the_defaults(do):
    plain = yaml.safe_load(do("featx predict --data.dir x --print_config").stdout)
    printed = do("featx predict --data.dir x --config configs/alexnet.yaml --print_config").stdout
    assert yaml.safe_load(printed) == plain
    stated = yaml.safe_load((REPO / "configs" / "alexnet.yaml").read_text())
    assert stated["data"].keys() == plain["data"].keys() - {"dir"} and stated["writer"].keys() == plain["writer"].keys()
    assert stated["model"].keys() == plain["model"]["init_args"].keys()


def test_options_on_the_line_override_a_config_wherever_it_is(do):
    config = "--config configs/demud.yaml"
    for line in (f"--data.resize 301 {config}", f"{config} --data.resize 301"):
        printed = yaml.safe_load(do(f"featx predict --data.dir x {line} --print_config").stdout)
        assert printed["data"]["resize"] == 301 and printed["data"]["crop"] is None


def test_the_package_promises_types_and_its_public_names():
    import featx as package

    assert (REPO / "featx" / "py.typed").exists()
    assert {name for name in package.__all__ if getattr(package, name) is None} == set()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_nothing_named_in_git_is_an_image_or_a_weights_file():
    files = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True).stdout.split()
    kept = "tests/writer/kept/"  # rows of earlier versions
    found = [file for file in files if file.endswith((".jpg", ".JPEG", ".pth", ".csv"))]
    assert not [file for file in found if not file.startswith(kept)]
