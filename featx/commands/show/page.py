"""``featx show``: a finished file as a map of its images, in one HTML page that opens from disk."""

import base64
import gzip
import html
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.resources import files
from itertools import chain, compress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from featx import results
from featx.commands.options import PlainParser, import_from_here
from featx.commands.show.points import NEAREST, Floats, choose, find_twins, flatten, nearest, usual_distance
from featx.data import sources
from featx.data.decode import decode_or_fault, read_or_fault
from featx.data.depth import Pixels
from featx.data.selection import Selection
from featx.data.sources import Source
from featx.data.view import View
from featx.errors import BadValueError, MissingPathError, UserError, count, log, size_in_words
from featx.results import Finished, find
from featx.writer import disk
from featx.writer.folder import error_row
from featx.writer.formats import class_name
from featx.writer.records import Json

PAGE_BYTES = 12 * 2**20  # opens at once, and fits in a mail
SIDES = (256, 192, 128, 96)  # of a thumbnail, in pixels: the largest that leaves room for all
MOST_POINTS = 100_000
TWINS = 0.1  # images closer than this fraction of the usual distance are near-duplicates


def show(argv: list[str]) -> int:
    """Run ``featx show FILE [--images DIR] [--map pca|tsne]`` and print the page's path."""
    parser = PlainParser("featx show", description="Write a page that shows a file's images.")
    parser.add_argument("file", metavar="FILE", help="features/fc7.csv or a folder of shards; writes features/fc7.html")
    parser.add_argument("--images", metavar="DIR", help="folder, archive or table of the images, if they have moved")
    parser.add_argument(
        "--map", choices=("pca", "tsne"), default="pca", help="pca: fast (default); tsne: slower, separates groups"
    )
    parser.add_argument("--data.reader", dest="reader", metavar="NAME", help="your function that read the images")
    options = parser.parse_args(argv)
    file = find(Path(options.file))
    if not file.is_known:
        raise BadValueError(
            f"{file.path}: no record {file.record_path.name} next to it that lists it.\n"
            "Expected what featx predict wrote, with its record."
        )
    script = _bokeh()
    if options.images is not None and not sources.exists(options.images):
        raise MissingPathError(f"--images {options.images}: no such folder. Expected the one that featx predict read.")
    shard = f"-{file.path.stem}" if file.is_shard else ""  # next to the folder: inside, it would be read as one
    page = file.record_path.with_name(f"{file.record_path.stem}{shard}.html")
    folder = options.images or file.record["run"]["options"]["data"]["dir"]
    disk.replace(page, make_page(file, folder, options.map, script, options.reader))
    log.info("%s", size_in_words(page.stat().st_size))
    print(page)
    return 0


def _bokeh() -> str:
    """Return the script of Bokeh, which draws the map."""
    try:
        import sklearn  # noqa: F401  here, so that it is not found missing after minutes of work
        from bokeh.resources import Resources
    except ImportError as err:
        raise UserError(
            f"featx show needs bokeh and scikit-learn, {err.name} is missing: pip install 'featx[show]'"
        ) from err
    *parts, _ = Resources(mode="inline", components=["bokeh", "bokeh-api"]).js_raw  # _: its log level
    return "\n".join(parts).replace("</script", r"<\/script")


def make_page(file: Finished, folder: str, kind: str, script: str, reader: str | None = None) -> bytes:
    """Return the page of a finished file, below ``PAGE_BYTES``.

    Args:
        file: The file, or a folder of shards.
        folder: The folder of its images; missing ones have no thumbnail.
        kind: How rows become points: ``pca`` or ``tsne``.
        script: Bokeh's.
        reader: The function that read the images, if the user trusts it.
    """
    names, values = _some_rows(file)
    notes = []
    if len(names) < file.record["rows"]:
        notes.append(f"The page shows {MOST_POINTS:,} of {file.record['rows']:,} rows, evenly chosen.")
    finite: Any = np.isfinite(values).all(axis=1)
    if lost := list(compress(names, ~finite)):
        few = ", ".join(lost[:5]) + ", …" * (len(lost) > 5)
        notes.append(f"Without {count(len(lost), 'row')} with nan or infinity: {few}")
        names, values = list(compress(names, finite)), values[finite]
    if not names:
        raise BadValueError(f"{file.path}: no row of finite values. Expected at least one image to show.")

    near, distances = nearest(values)
    points, parts, method = flatten(values, kind)
    usual = usual_distance(values)
    alone = np.argsort(-distances[:, 0], kind="stable")[:NEAREST] if near.size else np.arange(0)
    twins = find_twins(near, distances, TWINS * usual)
    classes, labels = np.unique(list(map(class_name, names)), return_inverse=True)
    is_folder = sources.is_folder(folder)
    page: Json = {
        "names": names,
        "classes": classes.tolist(),
        "colours": _colours(len(classes)),
        "labels": _packed(labels, "<u4"),
        "points": _packed(points, "<f4"),
        "near": _packed(near, "<i4"),
        # 12 bits of the 23, which take half the room: the page shows three digits
        "distances": _packed((distances.view(np.uint32) + 0x400) & 0xFFFFF800, "<u4"),
        "columns": near.shape[1],
        "map": method,
        "usual": usual,
        "alone": alone.tolist(),
        "twins": list(twins)[:100],
        "apart": list(twins.values())[:100],
        "twins_all": len(twins),
        "nearer": TWINS,
        "faults": list(map(error_row, file.faults)),
        "notes": notes,
        "record": file.record,
        # images in an archive or a table have no link
        "folder": quote(os.fsencode(os.path.relpath(folder, file.record_path.parent))) + "/" if is_folder else "",
        "thumbnails": {},
    }
    wanted = {*page["alone"], *chain.from_iterable(page["twins"])}
    title = f"{file.record['layer']}{'/' + file.path.stem if file.is_shard else ''}: {count(len(names), 'image')}"
    room = (PAGE_BYTES - len(_html(title, page, script))) * 72 // 100  # base64 takes the rest
    view = replace(View.of(file.record["identity"]), strict=False)
    if view.reader == reader:
        import_from_here()
        read = partial(_read, None if is_folder else _open(folder, file.record, notes), folder, view)
        page["thumbnails"], more = _thumbnails(folder, names, read, wanted, parts, room)
        notes += more
    else:
        notes.append(
            f"No thumbnails: {view.reader} read these images, and a record alone runs no code that is not part of "
            f"featx. If you trust that code: --data.reader {view.reader}"
            if view.reader
            else f"No thumbnails: --data.reader {reader} did not read these images."
        )
    for line in notes:
        log.info("%s", line)
    return _html(title, page, script)


def _some_rows(file: Finished) -> tuple[list[str], Floats]:
    """Return paths (names where paths are not known) and values, ``(N, D)``, of at most ``MOST_POINTS`` rows."""
    total, path, at = file.record["rows"], file.path, 0
    if path.is_dir():  # of several formats the one that is read first
        kinds = {Path(name).suffix for name in file.record["files"]}
        path /= next(f"*{kind}" for kind in (".npy", ".parquet", ".csv") if kind in kinds)
    wanted = np.zeros(total, bool)
    wanted[np.linspace(0, total - 1, min(total, MOST_POINTS)).astype(int)] = True
    names, chunks = list[str](), list[Floats]()
    for some, values in results.read(path):
        rows = np.flatnonzero(wanted[at : at + len(some)])
        at += len(some)
        if rows.size:  # CSV comes row by row, and a million empty arrays are large
            names += [some[row] for row in rows]
            chunks.append(values[rows].astype(np.float32))
    if at != total:
        raise BadValueError(f"{file.path}: {count(at, 'row')}, expected {total:,}. It was changed.")
    if file.rows is not None and len(file.rows) == total:
        names = [file.rows[row] for row in np.flatnonzero(wanted)]
    return names, results.stack(chunks)


def _open(where: str, record: Json, notes: list[str]) -> Source | None:
    """Return the images in an archive or a table, or None if they cannot be listed, which is noted."""
    recorded = record["run"]["options"]["data"]
    try:
        selection = Selection(recorded.get("suffixes"), recorded.get("exclude"))
        return sources.find(where, None, selection, recorded.get("column"))
    except UserError as err:
        notes.append(str(err))
        return None


def _read(images: Source | None, folder: str, view: View, name: str) -> Pixels | None:
    """Return an image by its name, ``(H, W, 3) uint8``, or None if it cannot be read."""
    if images is None:
        return read_or_fault(folder, name, view).pixels
    if (place := images.names.find(name)) is None:
        return None
    (found,) = images.read([place])
    return decode_or_fault(found, images.path(place), name, view).pixels


def _thumbnails(
    folder: str, names: Sequence[str], read: Callable[[str], Pixels | None], wanted: set[int], parts: Floats, room: int
) -> tuple[dict[int, str], list[str]]:
    """Return thumbnails in base64 by row, of all images or of those chosen, and notes about them."""

    def make(side: int, index: int) -> bytes:
        pixels = read(names[index])
        if pixels is None:
            return b""
        image, data = Image.fromarray(pixels), io.BytesIO()
        image.thumbnail((side, side))
        image.save(data, "WEBP", quality=75)
        return data.getvalue()

    made, missing, notes = dict[int, str](), 0, list[str]()
    with ThreadPoolExecutor() as pool:
        some = range(0, len(names), -(-len(names) // 50))
        for side in SIDES:
            sizes = [len(data) for data in pool.map(partial(make, side), some) if data]
            fit = int(room / (1.1 * float(np.mean(sizes or [1]))))
            if fit >= len(names):
                break
        chosen = range(len(names)) if fit >= len(names) else choose(parts, wanted, fit)
        bar = tqdm(chosen, "thumbnails", leave=False, disable=None if len(chosen) > 500 else True)
        for index, data in zip(bar, pool.map(partial(make, side), chosen), strict=True):
            missing += not data
            if data and len(data) <= room:
                room -= len(data)
                made[index] = base64.b64encode(data).decode()
    if len(chosen) < len(names):
        notes.append(
            f"Thumbnails of {len(made):,} of {len(names):,} images: the rows were put into clusters (k-means), and "
            "each cluster shows the image nearest to its centre."
        )
    if missing:
        lost = count(missing, "image")
        notes.append(f"No thumbnail of {lost} that cannot be read in {folder} now (--images gives another folder).")
    return made, notes


def _colours(classes: int) -> Sequence[str]:
    from bokeh.palettes import Category10_10, Category20_20, Turbo256

    palette: Sequence[str] = Category10_10 if classes <= 10 else Category20_20 if classes <= 20 else Turbo256
    return palette if classes <= 20 else palette[:: max(1, len(palette) // classes)]


def _packed(values: NDArray[Any], kind: str) -> str:
    return base64.b64encode(values.astype(kind).tobytes()).decode()


def _html(title: str, page: Json, script: str) -> bytes:
    """Return the page: names that users chose are only in its data, where no browser takes them for HTML."""
    own = files("featx.commands.show")
    parts = {
        "title": html.escape(title),
        "data": base64.b64encode(gzip.compress(json.dumps(page).encode(), 9, mtime=0)).decode(),
        "bokeh": script,
        "show": (own / "page.js").read_text("utf-8"),
    }
    template = (own / "page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], template).encode("utf-8", "xmlcharrefreplace")
