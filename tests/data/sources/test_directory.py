"""Folder -> images: ImageFolder's order, what is left out, lists, and what they cost in memory."""

import errno
import os
import pickle
import re
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import make_image
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder

from featx.data.module import ImageFolderDataModule
from featx.data.selection import Selection
from featx.data.sources import ImageTree, Names, find
from featx.errors import BadValueError, MissingPathError, UserError


def test_rows_follow_imagefolder(photos):
    ours, theirs = ImageTree(str(photos)), ImageFolder(str(photos))
    assert [ours.path(i) for i in range(len(ours))] == [path for path, _ in theirs.samples]
    assert len(ours) == 37 and ours.classes == theirs.classes
    assert ours.names[0] == "ants/image-00.jpg" and "bees/wild/image-01.JPEG" in ours.names
    assert ours.left_out == ""


def test_a_trailing_slash_changes_no_name(photos):
    assert list(ImageTree(f"{photos}/").names) == list(ImageTree(str(photos)).names)


def test_a_flat_folder_is_taken_as_it_is(tmp_path):
    for name in ("b.png", "a.jpg", "C.png"):
        make_image(1, (8, 8)).save(tmp_path / name)
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "fc7.csv").touch()
    tree = ImageTree(str(tmp_path))
    assert list(tree.names) == ["C.png", "a.jpg", "b.png"] and tree.classes == [""]
    assert tree.left_out == "1 file with other suffixes (.csv)"


def test_what_imagefolder_leaves_out_is_counted(tmp_path):
    for folder in ("cats", "dogs", "empty"):
        (tmp_path / folder).mkdir()
    for name in ("cats/1.png", "cats/2.png", "loose.png"):
        make_image(1, (8, 8)).save(tmp_path / name)
    for name in ("cats/.DS_Store", "cats/x.gif", "dogs/y.gif", "dogs/notes"):
        (tmp_path / name).touch()
    tree = ImageTree(str(tmp_path))
    assert list(tree.names) == ["cats/1.png", "cats/2.png"]
    assert tree.left_out == (
        "1 image beside the class folders, "
        "3 files with other suffixes (.gif, none; --data.suffixes '[.gif]' reads images), "
        "2 class folders without images (dogs, empty), 1 hidden file (.DS_Store)"
    )


def put(root, *paths):
    """Make empty files; their names are all that is looked at."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


FOLDERS = {  # as they come from other systems: what is in them, which images are taken, and what is said of the rest
    "Jupyter": (
        ["1.jpg", "2.jpg", ".ipynb_checkpoints/1-checkpoint.jpg"],
        ["1.jpg", "2.jpg"],
        "1 hidden or system folder (.ipynb_checkpoints)",
    ),
    "Synology": (
        ["1.jpg", "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "@eaDir/1.jpg/SYNOPHOTO_THUMB_XL.jpg", "#recycle/notes.txt"],
        ["1.jpg"],
        "1 file with other suffixes (.txt), 1 hidden or system folder (@eaDir)",
    ),
    "macOS": (
        ["cats/a.jpg", "cats/._a.jpg", "cats/.DS_Store", "dogs/b.png", "dogs/._b.png", "dogs/.c.heic.icloud",
         ".DS_Store", "__MACOSX/cats/._a.jpg", ".Trashes/501/old.jpg", ".Spotlight-V100/store"],
        ["cats/a.jpg", "dogs/b.png"],
        "3 hidden or system folders (.Spotlight-V100, .Trashes, __MACOSX), "
        "5 hidden files (.DS_Store, ._*, .*.icloud)",
    ),
    "Windows": (
        ["Bilder/a.JPG", "Bilder/Thumbs.db", "Bilder/desktop.ini", "$Recycle.Bin/S-1-5-21/$R1.jpg",
         "System Volume Information/x.png", "lost+found/1.jpg"],
        ["Bilder/a.JPG"],
        "2 files with other suffixes (.db, .ini), "
        "3 hidden or system folders ($Recycle.Bin, System Volume Information, lost+found)",
    ),
    "Google Takeout": (
        ["Takeout/Google Photos/Photos from 2019/a.jpg", "Takeout/Google Photos/Photos from 2019/a.jpg.json",
         "Takeout/Google Photos/Photos from 2019/b.HEIC", "Takeout/Google Photos/Trip/c.jpg",
         "Takeout/Google Photos/Trip/metadata.json"],
        ["Takeout/Google Photos/Photos from 2019/a.jpg", "Takeout/Google Photos/Trip/c.jpg"],
        "3 files with other suffixes (.json, .HEIC; --data.suffixes '[.heic]' reads images)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("system", FOLDERS)
def test_what_systems_keep_beside_photographs_is_left_out_and_counted(tmp_path, system):
    paths, taken, left_out = FOLDERS[system]
    put(tmp_path, *paths)
    tree = ImageTree(str(tmp_path))
    assert (list(tree.names), tree.left_out) == (taken, left_out)


def test_a_list_takes_what_it_names_wherever_it_is(tmp_path):
    put(tmp_path, "a.jpg", ".hidden/b.jpg", "@eaDir/c.jpg")
    tree = ImageTree(str(tmp_path), write_list(tmp_path, b"@eaDir/c.jpg\n.hidden/b.jpg"))
    assert list(tree.names) == ["@eaDir/c.jpg", ".hidden/b.jpg"] and tree.sizes.tolist() == [0, 0]


def test_images_are_excluded_by_patterns_of_their_paths_and_counted(tmp_path):
    put(
        tmp_path,
        "cats/a.jpg",
        "cats/a_mask.png",
        "cats/deep/b_mask.png",
        "thumbs/a.jpg",
        "thumbs/deep/b.jpg",
        "cats/A.PNG",
    )
    tree = ImageTree(str(tmp_path), selection=Selection(exclude=["*_mask.png", "thumbs/*"]))
    assert (list(tree.names), tree.images_left_out) == (["cats/A.PNG", "cats/a.jpg"], 0)
    assert tree.left_out == "4 images by --data.exclude, 1 class folder without images (thumbs)"
    assert list(ImageTree(str(tmp_path), selection=Selection(exclude=["*/[!a]*.png"])).names)[1:2] == ["cats/a.jpg"]
    with pytest.raises(BadValueError, match=r"no image in it. Left out: 6 images by --data.exclude"):
        ImageTree(str(tmp_path), selection=Selection(exclude="*"))


def test_folders_of_excluded_images_alone_make_no_class_of_a_flat_folder(tmp_path):
    put(tmp_path, "a.jpg", "thumbs/a.jpg", "b.jpg/x_mask.png")
    tree = ImageTree(str(tmp_path), selection=Selection(exclude=["thumbs/*", "*_mask.png", "b.jpg"]))
    assert (list(tree.names), tree.classes) == (["a.jpg"], [""])


def test_patterns_exclude_images_of_a_list_too(photos, tmp_path):
    listed = write_list(tmp_path, b"cats/image-02.jpg\nants/image-00.jpg\nlost.tif")
    tree = ImageTree(str(photos), listed, Selection(exclude=["ants/*"]))
    assert (list(tree.names), tree.left_out) == (["cats/image-02.jpg", "lost.tif"], "1 image by --data.exclude")


def test_suffixes_are_taken_besides_torchvisions_and_named_where_they_are_not(tmp_path):
    put(tmp_path, "a.JFIF", "b.jpg", "c.heic", "d.HEIC", "notes.txt")
    tree = ImageTree(str(tmp_path), selection=Selection([".jfif"]))
    assert list(tree.names) == ["a.JFIF", "b.jpg"]
    assert tree.left_out == ("3 files with other suffixes (.HEIC, .heic, .txt; --data.suffixes '[.heic]' reads images)")
    assert list(ImageTree(str(tmp_path), selection=Selection([".Heic", ".txt"])).names) == [
        "b.jpg", "c.heic", "d.HEIC", "notes.txt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"exclude": "[*_mask.png]"},
            r"""exclude \[\*_mask.png\]: not a list: YAML .*\n.* '\["\*_mask.png","thumbs/\*"\]'""",
        ),
        ({"suffixes": "[!x]"}, r"suffixes \[!x\]: not a list: YAML gives a bare \*, @, !"),
        ({"suffixes": ["jfif"]}, r"suffixes jfif: expected suffixes with their dot, as '\[.jfif,.avif\]'"),
        ({"suffixes": "*.jfif"}, r"suffixes \*.jfif: expected suffixes with their dot"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(options, words):
    with pytest.raises(BadValueError, match=words):
        Selection(**options)


@pytest.mark.parametrize(
    ("left_out", "images"),
    [
        (["1.jpg", "2.jpg", "notes.txt"], 2),  # beside the class folders
        (["cats/1.HEIC", "cats/2.heic", "cats/clip.mov"], 2),
        (["cats/.thumbs/1.jpg", "cats/.thumbs/2.jpg"], 2),
        (["cats/.1.jpg.icloud", "cats/.2.heic.icloud"], 2),
        (["cats/._1.jpg", "cats/._2.jpg", "cats/@eaDir/1.jpg", "cats/@eaDir/2.jpg"], 0),  # which nobody misses
    ],
)
def test_more_images_left_out_than_taken_are_warned_of_loudly(tmp_path, caplog, left_out, images):
    put(tmp_path, "cats/a.jpg", left_out[0])
    ImageFolderDataModule(str(tmp_path)).setup()
    assert "MORE IMAGES" not in caplog.text
    put(tmp_path, *left_out)
    assert ImageTree(str(tmp_path)).images_left_out == images
    ImageFolderDataModule(str(tmp_path)).setup()
    assert ("MORE IMAGES ARE LEFT OUT (2) THAN READ (1)." in caplog.text) == bool(images)
    assert caplog.text.count("--data.files LIST reads") == bool(images)


def test_no_folder_a_file_and_no_image_are_reported(tmp_path):
    with pytest.raises(MissingPathError, match=r"--data.dir .*nowhere: no such folder"):
        ImageTree(str(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(BadValueError, match=r"this is a file. Expected a folder of images"):
        ImageTree(str(tmp_path / "file"))
    (tmp_path / "file").rename(tmp_path / "a.txt")
    with pytest.raises(BadValueError, match=r"no image in it. Left out: 1 file with other suffixes \(.txt\)"):
        ImageTree(str(tmp_path))


# Names that sort and encode awkwardly: case, what sorts before and behind "/", dots, not UTF-8, beyond the BMP.
PIECES = st.sampled_from(
    ["a", "A", "a-b", "a.b", "a!", "a0", "é", "e\u0301", "日本", "\U0001f431", "\udcff", ".hid", "x y", "z,"]
)
SUFFIXES = st.sampled_from([".jpg", ".JPG", ".png", ".txt", "", ".webp"])
TREES = st.lists(st.tuples(st.lists(PIECES, min_size=1, max_size=3), PIECES, SUFFIXES), max_size=12)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_any_tree_of_class_folders_comes_in_imagefolders_order(files):
    with tempfile.TemporaryDirectory() as root:
        for folders, name, suffix in files:
            folder = Path(root, *folders)
            with suppress(FileExistsError, NotADirectoryError):  # a file of an earlier turn is in the folder's place
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{name}{suffix}").touch()
        theirs = [path for path, _ in ImageFolder(root, allow_empty=True).samples] if files else []
        theirs = [path for path in theirs if "/." not in path.removeprefix(root)]
        if theirs:
            ours = ImageTree(root)
            assert [ours.path(i) for i in range(len(ours))] == theirs
            assert ours.sizes.tolist() == [0] * len(theirs)
        else:
            with pytest.raises(BadValueError, match="no image in it"):
                ImageTree(root)


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]) | st.just("\udcfe"))))
def test_names_are_a_sequence_that_pickles(names):
    blobs = [os.fsencode(name) for name in names]
    packed = Names(b"".join(blobs), np.cumsum([0, *map(len, blobs)]))
    assert list(packed) == list(pickle.loads(pickle.dumps(packed))) == names
    assert packed[::-1] == names[::-1] and packed[-2:] == names[-2:] and len(packed) == len(names)
    with pytest.raises(IndexError):
        packed[len(names)]


def test_sizes_and_times_are_beside_the_names(tmp_path):
    (tmp_path / "a.png").write_bytes(b"12345")
    os.utime(tmp_path / "a.png", ns=(1, 1_700_000_000_123_456_789))
    os.symlink("nowhere", tmp_path / "b.png")
    tree = ImageTree(str(tmp_path))
    assert (list(tree.names), tree.sizes.tolist()) == (["a.png", "b.png"], [5, -1])
    assert tree.stamps.tolist() == [1_700_000_000_123_456_789, -1]


def test_the_digest_notices_a_name_a_size_and_a_time(tmp_path):
    def touch(name, content=b"", ns=10**18):
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, ns=(ns, ns))
        return ImageTree(str(tmp_path)).digest()

    first = touch("a.png")
    assert touch("a.png") == first and len(first) == 64
    digests = [first, touch("a.png", b"1"), touch("a.png", ns=10**18 + 1), touch("b.png"), touch("a.pngb.png")]
    assert len(set(digests)) == 5


def test_a_folder_named_like_an_image_stands_in_the_place_of_that_image(tmp_path):
    for folder in ("cats/b.jpg", "cats/d.jpg/deep", "cats/e.jpg/inner.png", "dogs.jpg"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("cats/a.jpg", "cats/c.jpg", "cats/d.jpg/deep/x.jpg", "dogs.jpg/1.jpg"):
        (tmp_path / name).touch()
    tree = ImageTree(str(tmp_path))
    assert list(tree.names) == [
        "cats/a.jpg",
        "cats/b.jpg",
        "cats/c.jpg",
        "cats/d.jpg/deep/x.jpg",
        "cats/e.jpg/inner.png",
        "dogs.jpg/1.jpg",
    ]
    assert tree.classes == ["cats", "dogs.jpg"] and tree.sizes[1] == -1


def test_a_folder_named_like_an_image_in_a_flat_folder(tmp_path):
    (tmp_path / "b.jpg").mkdir()
    for name in ("a.jpg", "c.jpg"):
        (tmp_path / name).touch()
    tree = ImageTree(str(tmp_path))
    assert list(tree.names) == ["a.jpg", "b.jpg", "c.jpg"] and tree.classes == [""] and tree.left_out == ""


def test_links_to_folders_are_followed_but_not_in_a_circle(tmp_path):
    (tmp_path / "root" / "cats" / "old").mkdir(parents=True)
    (tmp_path / "root" / "cats" / "a.jpg").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jpg").touch()
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "cats" / "link")
    os.symlink("../..", tmp_path / "root" / "cats" / "old" / "up")
    os.symlink("..", tmp_path / "root" / "cats" / "old" / "around")
    os.symlink(tmp_path / "root" / "cats", tmp_path / "elsewhere" / "far")
    os.symlink("self.jpg", tmp_path / "root" / "cats" / "self.jpg")
    tree = ImageTree(str(tmp_path / "root"))
    assert list(tree.names) == ["cats/a.jpg", "cats/self.jpg", "cats/link/b.jpg"]
    assert tree.left_out == "3 links back to a folder around (cats/link/far, cats/old/around, cats/old/up)"


@pytest.mark.parametrize(("place", "fatal"), [("bees/wild", False), ("ants", False), ("", True)])
def test_a_folder_that_may_not_be_read_is_counted_and_the_data_folder_itself_is_refused(
    photos, monkeypatch, place, fatal
):
    scandir, closed = os.scandir, os.path.join(photos, place)

    def refuse(path):
        if path == closed:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    everything = list(ImageTree(str(photos)).names)
    monkeypatch.setattr("os.scandir", refuse)
    if fatal:
        with pytest.raises(UserError, match=r"--data.dir .*: Permission denied: "):
            ImageTree(str(photos))
    else:
        tree = ImageTree(str(photos))
        assert list(tree.names) == [name for name in everything if not name.startswith(place)]
        assert tree.left_out == f"1 folder that cannot be read ({place}: Permission denied)"


def test_a_disk_that_fails_in_a_folder_ends_the_run(photos, monkeypatch):
    scandir = os.scandir

    def fail(path):
        if str(path).endswith("wild"):
            raise OSError(errno.EIO, "Input/output error", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", fail)
    with pytest.raises(UserError, match=r"--data.dir .*: Input/output error: .*bees/wild"):
        ImageTree(str(photos))


def test_a_folder_whose_path_is_too_long_is_counted(tmp_path):
    put(tmp_path, "cats/a.jpg")
    folder = os.open(tmp_path / "cats", os.O_RDONLY)
    for _ in range(20):  # 20 x 251 bytes, more than a path may have
        os.mkdir("d" * 250, dir_fd=folder)
        folder, above = os.open("d" * 250, os.O_RDONLY, dir_fd=folder), folder
        os.close(above)
    os.close(folder)
    tree = ImageTree(str(tmp_path))
    assert list(tree.names) == ["cats/a.jpg"]
    assert re.fullmatch(r"1 folder that cannot be read \(cats/d+…d+: File name too long\)", tree.left_out)
    assert len(tree.left_out) < 150


def write_list(folder, content):
    (folder / "list.txt").write_bytes(content)
    return str(folder / "list.txt")


def test_a_list_says_which_images_and_in_which_order(photos, tmp_path):
    content = b"\xef\xbb\xbfcats/image-02.jpg\r\n\n./ants//image-00.jpg\n  \nlost/\xff.jpg\nants/image-03.JPEG"
    tree = ImageTree(str(photos), write_list(tmp_path, content))
    assert list(tree.names) == ["cats/image-02.jpg", "ants/image-00.jpg", "lost/\udcff.jpg", "ants/image-03.JPEG"]
    assert tree.sizes.tolist()[:2] == [os.path.getsize(tree.path(0)), os.path.getsize(tree.path(1))]
    assert (tree.sizes[2], tree.stamps[2]) == (-1, -1) and (tree.classes, tree.left_out) == ([""], "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n \r\n", r"list.txt: no path in it. Expected one path below --data.dir per line"),
        (b"a.jpg\n/b.jpg\n", r"list.txt, line 2: '/b.jpg' is not below --data.dir"),
        (b"a/../../b.jpg\n", r"line 1: 'a/../../b.jpg' is not below --data.dir.\nExpected .*cats/felix.jpg"),
        (b"a.jpg\0b.jpg\0", r"line 1: .* is not below"),
        (b"a.jpg\nb.jpg\n\n./a.jpg", r"line 4: './a.jpg' is already in line 1.\nExpected each image once"),
    ],
)
def test_a_list_that_cannot_be_used_is_reported_with_its_line(tmp_path, content, words):
    with pytest.raises(BadValueError, match=words):
        ImageTree(str(tmp_path), write_list(tmp_path, content))


def test_a_list_that_is_missing_or_a_folder_is_reported(tmp_path):
    with pytest.raises(MissingPathError, match=r"--data.files nowhere.txt: no such file. Expected a list of images"):
        ImageTree(str(tmp_path), "nowhere.txt")
    with pytest.raises(UserError, match=r"--data.files .*: Is a directory. Expected a list of images"):
        ImageTree(str(tmp_path), str(tmp_path))


def test_a_folder_is_lost_when_it_is_gone_or_empty(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.png").touch()
    tree = ImageTree(str(tmp_path / "root"))
    assert not tree.is_lost()
    (tmp_path / "root" / "a.png").unlink()
    assert tree.is_lost()  # an unmounted disk leaves its folder
    (tmp_path / "root").rmdir()
    assert tree.is_lost()


def test_a_name_is_found_among_all(photos):
    names = ImageTree(str(photos)).names
    assert [names.find(name) for name in names] == list(range(len(names)))
    assert names.find("ants/nowhere.jpg") is None and names.find("ants") is None


def test_a_folder_of_images_has_no_columns(photos):
    with pytest.raises(UserError, match=r"--data.column image: --data.dir .* is a folder of images"):
        find(str(photos), column="image")
