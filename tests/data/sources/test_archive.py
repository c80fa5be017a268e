"""Archives -> images: the rows of the folder that they would be unpacked to, whatever is in them."""

import io
import json
import os
import pickle
import random
import re
import struct
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st

from featx import ImageFolderDataModule
from featx.data.preprocess import Preprocessing
from featx.data.selection import Selection
from featx.data.sources import find, tar
from featx.errors import BadValueError, LostFolderError, UserError

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


@pytest.fixture
def two(tmp_path):
    """Two archives, a tar and a zip, of class folders with one loose image each."""
    make_zip(tmp_path / "b.zip", [("dogs/r.jpg", b"r"), ("cats/f.jpg", b"f"), ("loose.jpg", b"l")])
    make_tar(tmp_path / "a.tar", [("dogs/x.jpg", b"x"), ("z.png", b"z"), ("empty/", b"")])
    return tmp_path


def test_several_archives_are_read_one_after_the_other_and_judged_together(two):
    source = find(str(two))
    assert list(source.names) == ["a.tar/dogs/x.jpg", "b.zip/cats/f.jpg", "b.zip/dogs/r.jpg"]
    assert list(contents(source).values()) == [b"x", b"f", b"r"]
    assert source.classes == ["cats", "dogs", "empty"]
    assert source.left_out == "2 images beside the class folders, 1 class folder without images (empty)"
    assert source.path(1) == f"{two}/b.zip/cats/f.jpg"
    assert described(find(f"{two}/*.*")) == described(find(f"{two}/{{b.zip,a.tar}}")) == described(source)
    assert list(find(f"{two}/?.zip").names) == ["cats/f.jpg", "dogs/r.jpg"]
    os.makedirs(two / "more" / "x")
    os.rename(two / "a.tar", two / "more" / "x" / "b.zip")  # told apart by what is in them, and by their folders
    assert list(find(f"{two}/{{.,more/x}}/b.zip").names)[-1] == "more/x/b.zip/dogs/x.jpg"


def test_a_folder_with_archives_beside_images_is_a_folder(two):
    (two / "shards.json").touch()
    assert len(find(str(two))) == 3
    (two / "a.jpg").touch()
    assert list(find(str(two)).names) == ["a.jpg"]
    assert find(str(two)).left_out == (
        "3 files with other suffixes (.json, .tar, .zip; --data.dir 'FOLDER/*.tar' reads the images in archives)"
    )


def test_what_exists_is_no_pattern(two):
    (two / "photos [2024] {a,b} *").mkdir()
    (two / "photos [2024] {a,b} *" / "1.jpg").touch()
    assert list(find(f"{two}/photos [2024] {{a,b}} *").names) == ["1.jpg"]
    assert list(find(f"{two}/ph*").names) == ["1.jpg"]
    make_tar(two / "s [1].tar", [("1.jpg", b"")])
    assert list(find(f"{two}/s [1].t*").names) == ["1.jpg"]


def test_ranges_are_expanded_as_a_shell_does(tmp_path):
    for number in range(8, 12):
        make_tar(tmp_path / f"{number:03}.tar", [("1.jpg", b"")])
    source = find(f"{tmp_path}/{{008..011}}.tar")
    assert list(source.names) == [f"{number:03}.tar/1.jpg" for number in range(8, 12)]
    with pytest.raises(FileNotFoundError, match=r"nothing at .*/012.tar"):
        find(f"{tmp_path}/{{008..012}}.tar")
    with pytest.raises(FileNotFoundError, match=r"x\*.tar: nothing matches this pattern"):
        find(f"{tmp_path}/x*.tar")
    with pytest.raises(BadValueError, match=r"more than 1,000,000 paths"):
        find(f"{tmp_path}/{{1..9999999999}}.tar")


def test_of_duplicates_the_last_is_read(tmp_path):
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("./a.jpg", b"3")]
    source = find(make_tar(tmp_path / "a.tar", members))
    assert contents(source) == {"a.jpg": b"3", "b.jpg": b"2"}
    assert source.left_out == "1 member with the name of a later one (a.jpg)"


def test_names_are_as_unpacked(tmp_path):
    members = [("/a/1.jpg", b""), ("a/../2.jpg", b""), ("a//./3.jpg", b""), ("a/b\\4.jpg", b""), ("./", b"")]
    source = find(make_tar(tmp_path / "a.tar", members))
    assert list(source.names) == ["a/1.jpg", "a/3.jpg", "a/b\\4.jpg"]
    assert source.left_out == "1 member whose path leads out of the archive"


def test_links_and_special_files_are_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        add_to(file, "a.jpg", b"1")
        add_to(file, "b.jpg", b"", tarfile.SYMTYPE, linkname="a.jpg")
        add_to(file, "c.jpg", b"", tarfile.LNKTYPE, linkname="a.jpg")
        add_to(file, "d.jpg", b"", tarfile.FIFOTYPE)
    source = find(f"{tmp_path}/a.tar")
    assert list(source.names) == ["a.jpg"] and source.images_left_out == 3
    assert source.left_out == "2 links in archives, 1 special file in archives"


def zip_of_one(path, name=b"a.jpg", host=3, flags=0, extra=b""):
    """A zip of one member with the name as it is, by another system."""
    make_zip(path, [("x" * len(name), b"12")])
    data = bytearray(Path(path).read_bytes().replace(b"x" * len(name), name))
    entry = data.rindex(b"PK\1\2")
    data[entry + 5] = host
    for at in (6, entry + 8):
        data[at : at + 2] = struct.pack("<H", flags)
    data[entry + 30 : entry + 32] = struct.pack("<H", len(extra))
    end = entry + 46 + len(name)
    data[end:end] = extra
    size = data.rindex(b"PK\5\6") + 12
    data[size : size + 4] = struct.pack("<L", 46 + len(name) + len(extra))
    Path(path).write_bytes(data)
    return str(path)


def unicode_name(stored, name):
    """Return Info-ZIP's extra field of a name."""
    content = b"\1" + struct.pack("<L", zlib.crc32(stored)) + name.encode()
    return struct.pack("<2H", 0x7075, len(content)) + content


@pytest.mark.parametrize(
    ("name", "how", "unpacked"),
    [
        ("é.jpg".encode("cp437"), {"host": 0}, "é.jpg"),
        ("é.jpg".encode(), {"host": 0, "flags": 0x800}, "é.jpg"),
        ("é.jpg".encode(), {"host": 3}, "é.jpg"),  # macOS
        (b"a\xff.jpg", {"host": 3}, "a\udcff.jpg"),
        (b"a\\b.jpg", {"host": 0}, "a/b.jpg"),
        (b"a\\b.jpg", {"host": 3}, "a\\b.jpg"),
        (b"c/a\\b.jpg", {"host": 0}, "c/a\\b.jpg"),
        ("à.jpg".encode("cp437"), {"host": 0, "extra": unicode_name("à.jpg".encode("cp437"), "é.jpg")}, "é.jpg"),
        ("à.jpg".encode("cp437"), {"host": 0, "extra": unicode_name(b"another", "é.jpg")}, "à.jpg"),
        (b"a.jpg", {"extra": b"\1\0\xff\xff\0"}, "a.jpg"),
    ],
)  # fmt: skip
def test_names_in_a_zip_are_as_unzip_unpacks_them(tmp_path, name, how, unpacked):
    source = find(zip_of_one(tmp_path / "a.zip", name, **how))
    assert contents(source) == {unpacked: b"12"}


def test_a_zip_with_a_program_before_it_and_a_comment_after_it_is_read(tmp_path):
    make_zip(tmp_path / "a.zip", [("a.jpg", b"1"), ("b.jpg", b"2" * 70000)], zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as file:
        file.comment = b"PK\5\6 " * 1000
    path = tmp_path / "a.exe"
    path.write_bytes(b"MZ" * 10_000 + (tmp_path / "a.zip").read_bytes())
    assert contents(find(str(path))) == {"a.jpg": b"1", "b.jpg": b"2" * 70000}


def test_a_zip64_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        with file.open("0.jpg", "w", force_zip64=True) as member:
            member.write(b"0")
        for number in range(1, 66_000):  # more than 16 bits count
            file.writestr(f"{number}.jpg", b"")
    source = find(str(tmp_path / "a.zip"))
    assert len(source) == 66_000 and next(source.read([0])).read() == b"0"


def test_members_of_a_zip_that_cannot_be_read_are_faults(tmp_path):
    path = tmp_path / "a.zip"
    make_zip(path, [(f"{number}.jpg", bytes(range(100))) for number in range(6)], zipfile.ZIP_STORED)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("6.jpg", b"6" * 50, zipfile.ZIP_BZIP2)
        file.writestr("7.jpg", bytes(1 << 20), zipfile.ZIP_DEFLATED)
        places = {info.filename: info.header_offset for info in file.infolist()}
    data = bytearray(path.read_bytes())
    entries = [match.start() for match in re.finditer(re.escape(b"PK\1\2"), data)]
    data[entries[0] + 8] |= 1  # encrypted
    data[places["1.jpg"] + 80] ^= 1
    data[places["2.jpg"]] = 0
    data[entries[3] + 20 : entries[3] + 28] = struct.pack("<2L", 10**6, 10**6)
    data[entries[4] + 20 : entries[4] + 28] = struct.pack("<2L", 3 * 10**9, 3 * 10**9)
    data[entries[7] + 24 : entries[7] + 28] = struct.pack("<L", 1000)  # unpacks to more than it says
    path.write_bytes(data)
    found = contents(find(str(path)))
    assert found.pop("5.jpg") == bytes(range(100))
    assert found == {
        "0.jpg": "encrypted in its archive",
        "1.jpg": "damaged in its archive: other bytes than its checksum says",
        "2.jpg": "damaged: its archive has no such member",
        "3.jpg": "truncated: the archive ends in it",
        "4.jpg": "3,000,000,000 bytes; from an archive featx reads at most 2,146,435,072 per image",
        "6.jpg": "packed by method 12 (bzip2), of which featx reads only deflate; zip packs it so",
        "7.jpg": "damaged in its archive: other bytes than its checksum says",
    }


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_zip_is_refused_or_its_images_are_right(data):
    with tempfile.TemporaryDirectory() as folder:
        members = {"a.jpg": b"a" * 100, "b/c.jpg": bytes(range(200))}
        path = Path(make_zip(f"{folder}/a.zip", members.items(), data.draw(st.sampled_from([0, 8]))))
        whole = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(whole)
        try:
            found = contents(find(str(path)))
        except BadValueError as err:
            assert str(err).count("\n") <= 2
        else:
            assert all(type(data) is str or data in members.values() for data in found.values())


def test_mistakes_are_reported_before_the_first_batch(tmp_path):
    def message(path):
        with pytest.raises(UserError) as caught:
            find(str(path))
        return str(caught.value)

    photo = tmp_path / "a.jpg"
    photo.write_bytes(b"\xff\xd8" * 1000)
    assert "this is a file, and not a tar, zip or Parquet file. Expected a folder of images" in message(photo)
    for name, magic, tool in (("a b.tgz", b"\x1f\x8b", "gzip"), ("a b.tar.zst", b"\x28\xb5\x2f\xfd", "zstd")):
        (tmp_path / name).write_bytes(magic + bytes(1000))
        assert message(tmp_path / name).endswith(f"{tool} -dc '{tmp_path}/{name}' > '{tmp_path}/a b.tar'")
    cut = tmp_path / "cut.zip"
    make_zip(cut, [("a.jpg", bytes(9000))])
    cut.write_bytes(cut.read_bytes()[:5000])
    assert "cut off: the end of the zip is missing" in message(cut)
    (tmp_path / "empty").touch()
    assert "this is a file, and not a tar, zip or Parquet file" in message(tmp_path / "empty")
    assert "no image in it. Left out: 1 file with other suffixes (.txt)" in message(
        make_tar(tmp_path / "t.tar", [("a.txt", b"")])
    )
    assert "no image in it." in message(make_zip(tmp_path / "t.zip", []))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub.jpg").mkdir()
    assert f"{tmp_path}/sub: this is a folder. Expected one folder, or a pattern" in message(f"{tmp_path}/s*")


def test_a_list_reads_what_it_names_in_an_archive(tmp_path):
    make_tar(tmp_path / "a.tar", [(".h/1.dat", b"1"), ("a/2.jpg", b"2"), ("b/", b"")])
    (tmp_path / "list").write_text("a/2.jpg\nb\nnowhere.jpg\n.h/1.dat\n")
    source = find(f"{tmp_path}/a.tar", f"{tmp_path}/list")
    assert list(contents(source).items()) == [
        ("a/2.jpg", b"2"), ("b", "a folder, not a file"),
        ("nowhere.jpg", f"[Errno 2] No such file or directory: '{tmp_path}/a.tar/nowhere.jpg'"), (".h/1.dat", b"1"),
    ]  # fmt: skip
    assert source.sizes.tolist() == [1, -1, -1, 1]


def test_a_column_is_one_file_of_each_sample(tmp_path):
    members = [(f"{n}.{kind}", kind.encode()) for n in "01" for kind in ("left.JPG", "right.jpg", "json", "cls")]
    path = make_tar(tmp_path / "a.tar", members)
    source = find(path, column="left.jpg")
    assert contents(source) == {"0.left.JPG": b"left.JPG", "1.left.JPG": b"left.JPG"}
    assert source.left_out == "6 files of other columns" and source.images_left_out == 2
    with pytest.raises(BadValueError, match=r"jpg: no such images in .*a.tar. Expected one of: left.jpg, r"):
        find(path, column="jpg")


def test_an_archive_that_changes_during_a_run_is_noticed(tmp_path):
    path = make_tar(tmp_path / "a.tar", [("1.jpg", b"1"), ("2.jpg", b"2")])
    source, others = find(path), find(path)
    assert next(source.read([0])).read() == b"1" and not source.is_lost()
    make_tar(tmp_path / "b.tar", [("2.jpg", b"2"), ("1.jpg", b"1")])
    os.replace(tmp_path / "b.tar", path)
    assert [type(file) for file in source.read([1])] == [io.BytesIO]  # of the file that is open
    assert source.is_lost() and "changed" in str(next(others.read([0])))
    os.remove(path)
    assert source.is_lost()


def test_processes_open_archives_themselves_and_only_some_at_once(tmp_path):
    for number in range(100):
        make_tar(tmp_path / f"{number:03}.tar", [("1.jpg", b"%d" % number)])
    source = find(str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    assert [file.read() for file in source.read(range(100))] == [b"%d" % number for number in range(100)]
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    copy = pickle.loads(pickle.dumps(source))
    assert contents(copy) == contents(source)


def test_the_list_of_a_tar_is_kept_and_used_while_the_tar_is_the_same(tmp_path, monkeypatch):
    cache, path = tmp_path / ".featx" / "members.idx", str(tmp_path / "a.tar")
    make_tar(path, [("b/1.jpg", b"1"), ("a/2.jpg", b"2"), ("../3.jpg", b"")])
    first = find(path, cache=cache)
    listing = tar.index
    monkeypatch.setattr(tar, "index", None)
    again = find(path, cache=cache)
    assert (described(again), contents(again), again.digest()) == (described(first), contents(first), first.digest())
    monkeypatch.setattr(tar, "index", listing)
    whole = cache.read_bytes()
    for at in range(0, len(whole), 7):  # damage of any kind is no list
        cache.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert find(path, cache=cache).digest() == first.digest()
        cache.write_bytes(whole[:at])
        assert find(path, cache=cache).digest() == first.digest()
    make_tar(path, [("b/1.jpg", b"1"), ("a/4.jpg", b"2")])
    assert list(find(path, cache=cache).names) == ["a/4.jpg", "b/1.jpg"]
    assert [one.name for one in cache.parent.iterdir()] == ["members.idx"]


def csv_of(where, out, **data):
    tiny.run(where, out, names="relative", data=data)
    return (out / "2.csv").read_bytes()


def members_of(root):
    return [(str(path.relative_to(root)), path.read_bytes()) for path in sorted(root.rglob("*")) if path.is_file()]


def test_rows_of_a_folder_and_of_archives_of_it_are_the_same_bytes(photos, tmp_path):
    members = members_of(photos)
    random.Random(2).shuffle(members)
    folder = csv_of(photos, tmp_path / "folder")
    assert csv_of(make_tar(tmp_path / "a.tar", members), tmp_path / "tar") == folder
    assert csv_of(make_zip(tmp_path / "a.zip", members), tmp_path / "zip") == folder
    assert csv_of(make_zip(tmp_path / "b.zip", members, zipfile.ZIP_DEFLATED), tmp_path / "deflated") == folder
    record = json.loads((tmp_path / "tar" / "2.json").read_text())
    assert record["run"]["options"]["data"]["dir"] == f"{tmp_path}/a.tar"
    assert "a.tar" not in json.dumps(record["identity"])
    with pytest.raises(BadValueError, match="37 images changed"):  # a time cannot be compared with a checksum
        csv_of(tmp_path / "a.zip", tmp_path / "folder")


def test_rows_of_webdatasets_shards_are_those_of_the_folder_in_the_order_of_the_samples(photos, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    flat = tmp_path / "flat"
    flat.mkdir()
    with webdataset.ShardWriter(f"{tmp_path}/%03d.tar", maxcount=5, verbose=0) as shards:
        for number, (name, data) in enumerate(members_of(photos)):
            suffix = name.rpartition(".")[2]
            shards.write({"__key__": f"{number:06}", suffix: data, "json": {"name": name}, "cls": number % 3})
            (flat / f"{number:06}.{suffix}").write_bytes(data)
    rows = csv_of(f"{tmp_path}/{{000..007}}.tar", tmp_path / "shards").splitlines()
    expected = csv_of(flat, tmp_path / "one").splitlines()
    assert [re.sub(rb"^\d+.tar/", b"", row) for row in rows] == expected and rows[5].startswith(b"001.tar/000005")


def test_a_damaged_member_is_listed_and_a_repaired_archive_continues(photos, tmp_path):
    members = dict(members_of(photos))
    clean = csv_of(make_tar(tmp_path / "clean.tar", members.items()), tmp_path / "clean")
    name = "bees/wild/image-01.JPEG"
    path, out = tmp_path / "a.zip", tmp_path / "out"
    make_zip(path, members.items())
    place = path.read_bytes().index(members[name])
    damaged = bytearray(path.read_bytes())
    damaged[place + 300] ^= 255
    path.write_bytes(damaged)
    assert csv_of(path, out).count(b"\n") == 36
    assert (out / "2.errors.csv").read_text().splitlines()[1].startswith(f"{name},damaged in its archive")
    make_zip(path, members.items(), zipfile.ZIP_DEFLATED)
    assert csv_of(path, out) == clean
    half = {**members, name: members[name][: len(members[name]) // 2]}
    out = tmp_path / "tars"
    assert csv_of(make_tar(tmp_path / "a.tar", half.items()), out).count(b"\n") == 36
    make_tar(tmp_path / "a.tar", reversed(members.items()))
    assert csv_of(tmp_path / "a.tar", out) == clean
    other = {**members, "ants/image-00.jpg": members["cats/image-02.jpg"]}
    with pytest.raises(UserError, match="1 image changed"):
        csv_of(make_tar(tmp_path / "a.tar", other.items()), out)


def test_an_archive_that_changes_ends_the_run(photos, tmp_path):
    path = make_tar(tmp_path / "a.tar", members_of(photos))

    class Harm(tiny.Tiny):
        def predict_step(self, batch):
            os.utime(path)
            return super().predict_step(batch)

    with pytest.raises(LostFolderError, match=r"a.tar: the archive is gone, or has changed. It held ants/"):
        tiny.run(path, tmp_path / "out", model=Harm)


def test_a_reader_of_the_users_gets_a_copy_of_what_is_in_an_archive(tmp_path, monkeypatch):
    (tmp_path / "copies.py").write_text(
        "import numpy as np\n\ndef read(path):\n    assert path.endswith('.raw')\n"
        "    return np.fromfile(path, np.uint8).reshape(8, 8)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = make_zip(tmp_path / "a.zip", [("a.raw", bytes(range(64))), ("b.raw", bytes(10))])
    data = ImageFolderDataModule(path, suffixes=[".raw"], reader="copies.read", batch_size=2)
    data.setup()
    batch = data.read_batch(0, Preprocessing(None, None, "bilinear", (0, 0, 0), (1, 1, 1), ""))
    assert batch.groups[0][1].flatten().tolist() == list(range(64)) * 3
    assert [fault.path for fault in batch.faults] == ["b.raw"]
