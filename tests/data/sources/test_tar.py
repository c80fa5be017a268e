"""The headers of a tar: the members that tarfile finds, and what no whole tar has is refused in bounded memory."""

import io
import os
import subprocess
import tarfile
import tempfile
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from featx.data.sources import tar
from featx.data.sources.base import LocalFile
from featx.data.sources.members import FOLDER, LINK, SPARSE, SPECIAL, clean
from featx.errors import BadValueError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
KINDS = {tarfile.REGTYPE: 0, tarfile.CONTTYPE: 0, tarfile.DIRTYPE: FOLDER, tarfile.LNKTYPE: LINK,
         tarfile.SYMTYPE: LINK, tarfile.FIFOTYPE: SPECIAL, tarfile.CHRTYPE: SPECIAL}  # fmt: skip
NAMES = st.lists(
    st.sampled_from(["a", "b.jpg", "é", "\udcff", "..", ".", "x" * 60, "y" * 99, "z" * 101, "\\", " "]),
    min_size=1,
    max_size=5,
).map("/".join)
MEMBERS = st.lists(
    st.tuples(NAMES, st.sampled_from(list(KINDS)), st.integers(0, 1500), st.integers(0, 2**40)), max_size=6
)


def index(path):
    return tar.index(str(path), LocalFile(str(path)))


def listed(path):
    """Name, kind, place and size of each member, without folders, as featx has them."""
    members = index(path)
    return [
        (members.name(i), kind, *((members.offsets[i], members.sizes[i]) if kind == tar.STORED else (0, 0)))
        for i, kind in enumerate(members.kinds)
        if kind != FOLDER
    ]


def expected(path):
    """The same, as tarfile has them."""
    found = []
    with tarfile.open(path) as file:
        for one in file:
            kind, name = tar.KINDS.get(one.type, tar.STORED), clean(os.fsencode(one.name))
            if name and kind != FOLDER and not one.isdir():
                place = (one.offset_data, one.size) if kind == tar.STORED else (0, 0)
                found.append((os.fsdecode(name), kind, *place))
    return found


def write(path, members, format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as file:
        for name, kind, size, time in members:
            info = tarfile.TarInfo(name)
            info.type, info.mtime, info.linkname = kind, time, "l" * (size % 200)
            info.size = size * info.isreg()
            try:
                file.addfile(info, io.BytesIO(bytes(size)))
            except ValueError:  # too long for ustar
                assert format == tarfile.USTAR_FORMAT
    return path


@settings(max_examples=100, deadline=None)
@given(MEMBERS, st.sampled_from(FORMATS))
@example([("x" * 99 + "/" + "y" * 99, tarfile.REGTYPE, 3, 5)], tarfile.USTAR_FORMAT)
def test_members_are_those_that_tarfile_finds(members, format):
    with tempfile.TemporaryDirectory() as folder:
        path = write(f"{folder}/a.tar", members, format)
        assert listed(path) == expected(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_tar_is_read_as_tarfile_reads_it_or_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        members = [
            ("a/1.jpg", tarfile.REGTYPE, 700, 1),
            ("x" * 130, tarfile.REGTYPE, 10, 2),
            ("é" * 60, b"0", 0, 2**35),
        ]
        path = write(f"{folder}/a.tar", members, data.draw(st.sampled_from(FORMATS)))
        whole = bytearray(Path(path).read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):  # so that the damage is not found at once
            for at in range(0, len(whole), 512):
                if whole[at + 257 : at + 262] == b"ustar":
                    total = sum(whole[at : at + 148]) + sum(whole[at + 156 : at + 512]) + 256
                    whole[at + 148 : at + 156] = b"%06o\0 " % total
        Path(path).write_bytes(whole)
        tracemalloc.start()
        try:
            found = listed(path)
        except BadValueError as err:
            assert "cut off" in str(err) and str(err).count("\n") <= 2
        else:
            with suppress(tarfile.TarError):
                theirs = expected(path)  # up to the first header with anything odd, after which it stops in silence
                assert found[: len(theirs)] == theirs
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < 2 << 20


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_members_of_gnu_tar_are_those_that_tarfile_finds(tmp_path, format):
    folder = tmp_path / "in" / ("d" * 40)
    folder.mkdir(parents=True)
    with open(folder / "sparse.tif", "wb") as file:
        for at in range(0, 1 << 22, 1 << 17):  # more parts than fit in one header
            file.seek(at)
            file.write(b"x")
    (folder / "a.jpg").write_bytes(bytes(range(256)) * 5)
    os.link(folder / "a.jpg", folder / "hard.jpg")
    (folder / "soft.jpg").symlink_to("a.jpg")
    if format != "v7":
        os.mkfifo(folder / "pipe.jpg")
    if format in ("oldgnu", "gnu", "posix"):
        (folder / ("n" * 200)).write_bytes(b"long")
    (folder / "z.jpg").write_bytes(b"last")
    path = tmp_path / "a.tar"
    more = ["--sparse"] if format in ("oldgnu", "gnu", "posix") else []
    done = subprocess.run(["tar", "-cf", path, f"--format={format}", *more, "-C", tmp_path / "in", "."], check=False)
    assert done.returncode == 0
    found = listed(path)
    assert {one[:2] + one[3:] for one in found} >= {(f"{'d' * 40}/z.jpg", 0, 4), (f"{'d' * 40}/soft.jpg", LINK, 0)}
    of_sparse = [kind for name, kind, *_ in found if name.endswith("sparse.tif")]
    assert of_sparse == [SPARSE if more else 0]
    images = {name: place for name, kind, *place in found if kind == 0}
    assert images == {name: place for name, kind, *place in expected(path) if kind == 0 and name in images}


@pytest.mark.parametrize("format", FORMATS)
def test_a_tar_that_is_cut_off_anywhere_is_refused_with_its_last_whole_member(tmp_path, format):
    members = [("a/1.jpg", tarfile.REGTYPE, 700, 1), ("b/" + "y" * 120 + "/2.jpg", tarfile.REGTYPE, 10, 2)]
    path = Path(write(tmp_path / "a.tar", members, format))
    whole = path.read_bytes()
    end = index(path).offsets[-1] + 512
    for cut in sorted({*range(512, end, 97), *range(512, end + 1, 512)}):
        path.write_bytes(whole[:cut])
        with pytest.raises(BadValueError, match=r"cut off") as caught:
            index(path)
        last = "2.jpg" if cut >= end - 512 + 10 else "a/1.jpg" if cut >= 512 + 700 else "no member of it is whole"
        assert last in str(caught.value)
        assert ("head -c 1024 /dev/zero" in str(caught.value)) == (cut in (512 + 1024, end))
    path.write_bytes(whole[: end + 512])  # one block of zeros is an end, too
    assert len(listed(path)) == 2


def header(name=b"a.jpg", size=b"0", type=b"0", mtime=b"0"):
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    block[:100], block[124:136], block[136:148] = name.ljust(100, b"\0"), size.rjust(12, b"0"), mtime.rjust(12, b"0")
    block[156:157], block[148:156] = type, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


HOSTILE = {
    "a size of 2**80": header(size=b"\x80" + (2**80).to_bytes(11, "big")),
    "a size below 0": header(size=b"\xff" * 12),
    "a size that is no number": header(size=b"12x"),
    "a name of 4 GB": header(size=b"%o" % 2**32, type=b"L") + bytes(512),
    "a name of 2 MB": header(size=b"%o" % 2**21, type=b"L") + bytes(2**21) + header(),
    "a pax header of 4 GB": header(size=b"%o" % 2**32, type=b"x") + b"30 path=" + bytes(504),
    "a record longer than its header": header(size=b"20", type=b"x") + b"99 path=a".ljust(512, b"\0") + header(),
    "a record of length 0": header(size=b"20", type=b"x") + b"0 path=a\n".ljust(512, b"\0") + header(),
    "a record of negative length": header(size=b"20", type=b"x") + b"-9 path=a\n".ljust(512, b"\0") + header(),
    "long digits": header(size=b"20000", type=b"x") + b"9" * 8192 + header(),
    "a size in pax above the file's": header(size=b"20", type=b"x") + b"16 size=9999999\n".ljust(512, b"\0") + header(),
    "headers of nothing": header(size=b"1", type=b"L") + b"a".ljust(512, b"\0"),
    "a sparse map without end": header(type=b"S")[:482] + b"\1" + header(type=b"S")[483:],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_no_whole_tar_has_is_refused_in_bounded_memory(tmp_path, what):
    path = tmp_path / "a.tar"
    block = HOSTILE[what]
    path.write_bytes(header(b"first.jpg") + block + bytes(1024))
    tracemalloc.start()
    try:
        with pytest.raises(
            BadValueError, match=r"cut off or damaged at byte [\d,]+ of [\d,]+; the last whole member is first.jpg"
        ):
            index(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_a_name_that_no_file_can_have_is_counted(tmp_path):
    path = tmp_path / "a.tar"
    record = b"15 path=a\0b.jpg\n"
    extended = header(size=b"%o" % len(record), type=b"x") + record.ljust(512, b"\0")
    path.write_bytes(extended.replace(b"15 ", b"%d " % len(record)) + header() + header(b"../b.jpg") + bytes(1024))
    assert index(path).outside == 2 and listed(path) == []
    path.write_bytes(
        b"".join(header(size=b"1", type=b"L") + b"b".ljust(512, b"\0") for _ in range(3000)) + header() + bytes(1024)
    )
    assert [name for name, *_ in listed(path)] == ["b"]


def test_bytes_after_the_end_are_not_members(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(header(b"a.jpg") + bytes(10240) + header(b"b.jpg") + bytes(100))
    members = index(path)
    assert [name for name, *_ in listed(path)] == ["a.jpg"] and members.after == 612


def test_a_stamp_is_of_the_time_and_both_ends_of_a_member_and_of_no_other(tmp_path):
    def stamps(*members):
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w") as file:
            for data, time in members:
                info = tarfile.TarInfo("x")
                info.size, info.mtime = len(data), time
                file.addfile(info, io.BytesIO(data))
        return list(index(path).stamps)

    one, two = bytes(30000), b"1" + bytes(29999)
    both = stamps((one, 5), (one, 5))
    assert both[0] == both[1] and stamps((two, 5), (one, 5))[1] == both[1]
    assert stamps((two, 5))[0] != both[0] and stamps((two[::-1], 5))[0] != both[0] and stamps((one, 6))[0] != both[0]
    assert stamps((bytes(4500), 5)) != stamps((bytes(4400) + b"1" * 100, 5))
