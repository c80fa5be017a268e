"""Archives -> images: the rows of the folder that they would be unpacked to, whatever is in them."""

import io
import random
import tarfile
import tempfile
import zipfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from featx.data.selection import Selection
from featx.data.sources import find
from featx.errors import BadValueError

WORDS = [
    "a",
    "b",
    "c.d",
    "A",
    "é",
    ".h",
    "@eaDir",
    "__MACOSX",
    "x.jpg",
    "y.PNG",
    "z.txt",
    "._a.jpg",
    "w.heic",
    "v\udcff",
]
PATHS = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map("/".join), max_size=12, unique=True)


def make_zip(path, members, kind=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, data in members:
            file.writestr(name, data)
    return str(path)


def make_tar(path, members, **how):
    with tarfile.open(path, "w", **how) as file:
        for name, data in members:
            add_to(file, name, data)
    return str(path)


def add_to(file, name, data, type=tarfile.REGTYPE, **more):
    info = tarfile.TarInfo(name.rstrip("/"))
    info.size, info.type = len(data), tarfile.DIRTYPE if name.endswith("/") else type
    for key, value in more.items():
        setattr(info, key, value)
    file.addfile(info, io.BytesIO(data))


def contents(source):
    """Names and bytes of all images; what is wrong with those that cannot be read."""
    read = {}
    for name, file in zip(source.names, source.read(range(len(source))), strict=True):
        if isinstance(file, Exception):
            read[name] = str(file)
        else:
            with file:
                read[name] = file.read()
    return read


def described(source):
    return list(source.names), source.classes, source.left_out, source.images_left_out


def found(where, **options):
    """What is found, or the message that says why nothing is, in the words that folders and archives share."""
    try:
        source = find(str(where), **options)
    except BadValueError as err:
        return str(err).partition("no image in it.")[2].partition("\n")[0]
    return described(source), contents(source), source.sizes.tolist()


@settings(max_examples=60, deadline=None)
@given(PATHS, st.randoms(use_true_random=False))
@example(["x.jpg/z.txt", "a/y.PNG/x.jpg/z.txt"], random.Random(1))
@example(["x.jpg/z.txt", "y.PNG"], random.Random(1))
def test_an_archive_is_read_as_the_folder_it_would_be_unpacked_to(paths, order):
    selection = Selection([".jpeg"], ["*/b/*", "A/x*"])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        root.mkdir()
        members = []
        for number, path in enumerate(paths):
            if any(other.startswith(f"{path}/") for other in paths) or path.endswith(
                (".h", "Dir", "_MACOSX", "a", "A")
            ):
                (root / path).mkdir(parents=True, exist_ok=True)
                members.append((f"{path}/", b""))
            else:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_bytes(data := b"%d" % number * number)
                members.append((path, data))
        order.shuffle(members)
        expected = found(root, selection=selection)
        tar = make_tar(f"{folder}/t.tar", members, errors="surrogateescape")
        assert found(tar, selection=selection) == expected
        prefixed = [(f"./{name}", data) for name, data in reversed([("", b""), *members])]
        gnu = make_tar(f"{folder}/g.tar", prefixed[:-1], format=tarfile.GNU_FORMAT, errors="surrogateescape")
        assert found(gnu, selection=selection) == expected
        if not any("\udcff" in path for path in paths):  # which zipfile cannot write
            for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                assert found(make_zip(f"{folder}/z.zip", members, kind), selection=selection) == expected
