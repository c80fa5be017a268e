"""Parts and journals: what counts as done, whatever was torn, and what the file is made of."""

import hashlib
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featx.data.batch import Fault
from featx.errors import BadValueError
from featx.writer import journal
from featx.writer.disk import DiskError
from featx.writer.journal import Entry, Head, Part

HEAD = b"image,x.0\n"
RUN = "3f" * 32
FAULT = Fault("b/\udce9,\n.jpg", "empty", "UnidentifiedImageError: cannot identify image file")


def text(batch: int) -> bytes:
    return f"{batch}.jpg,{batch / 7}\n".encode() * (batch % 5)


def entry(batch: int, device: str = "cpu") -> Entry:
    remarks = {"dark": {"images": 2, "first": "a\udce9.png"}} if batch == 5 else {}
    return Entry(batch, batch % 5, 1, (0, 0, 0), {}, device, [FAULT] if batch % 5 == 0 else [], {"PNG": 1}, remarks)


def write(folder: Path, stem: str, batches, sync_to: int | None = None, run: str = RUN) -> Part:
    part = Part(folder, stem, run, {"csv": HEAD})
    for number, batch in enumerate(batches):
        part.add(entry(batch), {"csv": text(batch)})
        if sync_to is None or number < sync_to:
            part.sync()
    part.close()
    return part


def read_parts(folder: Path, run: str = RUN):
    return journal.read_parts(folder, ["csv"], run, ["final.csv"])


def whole(folder: Path, batches) -> bytes:
    done = read_parts(folder)
    placed = [done[batch] for batch in sorted(done)]
    assert [one.entry.batch for one in placed] == list(batches)
    path = journal.join(journal.pieces("csv", placed), HEAD, folder / "joined.csv", folder / "final.csv")
    return path.read_bytes()


def expected(batches) -> bytes:
    return HEAD + b"".join(text(batch) for batch in batches)


def test_entries_read_back_the_same(tmp_path):
    write(tmp_path, "000001-00000", range(6))
    head, entries = journal.read(tmp_path / "000001-00000.journal")
    assert head == Head(["000001-00000.csv"], RUN) and [e.batch for e in entries] == list(range(6))
    assert entries[5].faults == [FAULT] and isinstance(entries[5].faults[0], Fault) and entries[1].device == "cpu"
    assert (entries[5].remarks, entries[1].remarks) == ({"dark": {"images": 2, "first": "a\udce9.png"}}, {})
    assert entries[1].spans["csv"][:2] == (len(HEAD), len(HEAD) + len(text(1)))


def test_a_journal_torn_at_any_byte_gives_the_entries_before(tmp_path):
    write(tmp_path, "000001-00000", range(4))
    path = tmp_path / "000001-00000.journal"
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data) + 1):
        _, entries = journal.decode(data[:cut], path)
        assert [e.batch for e in entries] == list(range(max(0, sum(end <= cut for end in ends) - 1)))


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_is_never_trusted(position, change):
    lines = journal.encode(Head(["a.csv"], RUN), [entry(i)._replace(spans={"csv": (i, i + 1, 7)}) for i in range(4)])
    position %= len(lines)
    damaged = bytearray(lines)
    damaged[position] ^= change
    _, good = journal.decode(lines, Path())
    _, found = journal.decode(bytes(damaged), Path())
    assert found == good[: len(found)] and len(found) < len(good)


def test_rows_that_do_not_match_the_journal_do_not_count(tmp_path):
    write(tmp_path, "000001-00000", range(6))
    rows = tmp_path / "000001-00000.csv"
    data = bytearray(rows.read_bytes())
    data[len(HEAD) + 2] ^= 1  # in batch 1, the first with a row
    rows.write_bytes(data[:-1])  # and the last row of batch 4 is cut
    assert sorted(read_parts(tmp_path)) == [0, 2, 3, 5]
    rows.unlink()
    assert read_parts(tmp_path) == {}


def test_rows_of_another_run_are_never_used(tmp_path):
    write(tmp_path, "000001-00000", range(3))
    write(tmp_path, "000002-00000", range(6), run="9c" * 32)
    assert sorted(read_parts(tmp_path)) == [0, 1, 2]
    assert sorted(read_parts(tmp_path, "9c" * 32)) == [0, 1, 2, 3, 4, 5]


def test_a_journal_of_a_newer_featx_is_refused(tmp_path):
    path = tmp_path / "000001-00000.journal"
    path.write_bytes(journal.encode_line({"format": 3, "what": "ever"}))
    with pytest.raises(BadValueError, match=r"00000.journal: format 3 is from a newer featx; .* up to 2"):
        read_parts(tmp_path)


@pytest.mark.parametrize("name", ["../victim.csv", "/etc/passwd.csv", "a.csv", "..csv"])
def test_a_journal_that_names_a_foreign_file_does_not_count(tmp_path, name):
    folder = tmp_path / "layer"
    folder.mkdir()
    write(folder, "000001-00000", range(3))
    path = folder / "000001-00000.journal"
    (tmp_path / "victim.csv").write_bytes((folder / "000001-00000.csv").read_bytes())
    path.write_bytes(journal.encode(Head([name], RUN), journal.read(path)[1]))
    assert read_parts(folder) == {}


def test_unknown_files_among_the_parts_are_left_alone(tmp_path):
    (tmp_path / "x.journal").write_text("hello\n")
    (tmp_path / "0000001.journal").write_text("hello\n")
    write(tmp_path, "000001-00000", range(3))
    assert sorted(read_parts(tmp_path)) == [0, 1, 2] and journal.next_session(tmp_path) == 2


def test_a_link_instead_of_a_part_is_neither_read_nor_written(tmp_path):
    write(tmp_path, "000001-00000", range(3))
    (tmp_path / "000001-00000.csv").rename(tmp_path / "victim")
    before = (tmp_path / "victim").read_bytes()
    (tmp_path / "000001-00000.csv").symlink_to("victim")
    assert read_parts(tmp_path) == {}
    with pytest.raises(DiskError, match=r"00000.csv: is a link"):
        write(tmp_path, "000001-00000", range(3))
    assert (tmp_path / "victim").read_bytes() == before


def test_what_was_not_synced_is_not_done(tmp_path):
    write(tmp_path, "000001-00000", range(6), sync_to=3)
    assert sorted(read_parts(tmp_path)) == [0, 1, 2]


def test_a_later_session_wins(tmp_path):
    write(tmp_path, "000001-00000", range(3))
    write(tmp_path, f"{journal.next_session(tmp_path):06}-00000", [1])
    done = read_parts(tmp_path)
    assert done[1].files["csv"].name == "000002-00000.csv" and done[0].files["csv"].name == "000001-00000.csv"
    assert journal.next_session(tmp_path) == 3


def test_a_part_that_is_the_whole_file_becomes_it_and_its_digest_is_known(tmp_path):
    part = write(tmp_path, "000001-00000", range(9))
    assert whole(tmp_path, range(9)) == expected(range(9))
    assert not (tmp_path / "joined.csv").exists()
    assert part.sha256["csv"].hexdigest() == hashlib.sha256(expected(range(9))).hexdigest()


def test_several_parts_are_joined_in_order_and_again_after_a_kill(tmp_path):
    write(tmp_path, "000001-00000", range(5))
    write(tmp_path, "000001-00001", range(5, 9))
    for _ in range(2):  # the journals stay true whatever the first try had done
        assert whole(tmp_path, range(9)) == expected(range(9))


def test_a_finished_file_is_read_and_never_written(tmp_path):
    write(tmp_path, "000001-00000", range(5))
    (tmp_path / "000001-00000.csv").rename(tmp_path / "final.csv")
    path = tmp_path / "000001-00000.journal"
    path.write_bytes(journal.encode(Head(["final.csv"], RUN), journal.read(path)[1]))
    write(tmp_path, "000002-00000", [3])
    assert whole(tmp_path, range(5)) == expected(range(5)) == (tmp_path / "final.csv").read_bytes()
    assert (tmp_path / "joined.csv").exists()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30), st.integers(1, 4), st.integers(0, 2**32))
def test_any_history_of_sessions_gives_the_same_bytes(batches, processes, seed):
    """Each session deals what is left to some processes, and each of them gets to an end of its own."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while left := sorted(set(range(batches)) - read_parts(folder).keys()):
            session = journal.next_session(folder)
            size = -(-len(left) // chance.randint(1, processes))
            for rank, first in enumerate(range(0, len(left), size)):
                share = left[first : first + size]
                stem = f"{session:06}-{rank:05}"
                write(folder, stem, share, sync_to=chance.randint(0 if rank else 1, len(share)))
                if chance.random() < 0.3:  # a torn journal
                    path = folder / f"{stem}.journal"
                    path.write_bytes(path.read_bytes()[: -chance.randint(1, 30)])
        assert whole(folder, range(batches)) == expected(range(batches))


def test_a_gap_in_a_part_that_comes_first_loses_no_later_batch(tmp_path):
    write(tmp_path, "000001-00000", [0, 1, 5, 6])
    write(tmp_path, "000002-00000", [2, 3, 4])
    for _ in range(2):
        assert whole(tmp_path, range(7)) == expected(range(7))


@pytest.mark.parametrize("missing", ["csv", "journal"])
def test_a_part_or_a_journal_alone_does_not_count(tmp_path, missing):
    write(tmp_path, "000001-00000", range(3))
    (tmp_path / f"000001-00000.{missing}").unlink()
    assert read_parts(tmp_path) == {}
