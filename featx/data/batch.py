"""What goes from the data through the network to the files: batches of images, with their names and faults."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict

from featx.errors import BadValueError, BrokenSourceError, count, log

if TYPE_CHECKING:  # reading a record needs no torch
    from torch import Tensor

Seconds = tuple[float, float]  # of a core, for decoding and for resizing


class Images(Protocol):
    """The images of a run, in the order of the rows.

    Attributes:
        names: Their paths below the data folder.
        sizes: In bytes, ``(N,) int64``.
        stamps: What changes with their content, ``(N,) int64``: a file's time in ns, or a checksum.
    """

    sizes: Any
    stamps: Any

    @property
    def names(self) -> Sequence[str]: ...  # noqa: D102, in the class's docstring

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """Return a digest of all names, sizes and stamps."""

    def digest_of_names(self) -> str:
        """Return a digest of all names, in order."""


class Fault(NamedTuple):
    """What is wrong with one image.

    Attributes:
        path: The image, below the data folder.
        reason: What is wrong, in plain words, in one line.
        exception: The decoder's own message, in one line.
        used: Whether the image has a row nevertheless, of what could be decoded.
    """

    path: str
    reason: str
    exception: str
    used: bool = False

    @property
    def needs_option(self) -> bool:
        """Whether an option would make the image readable, as its reason says."""
        return self.exception.startswith(BadValueError.__name__)

    @property
    def ends_the_run(self) -> bool:
        """Whether other images are lost with it, as their common file cannot be read."""
        return self.exception.startswith(BrokenSourceError.__name__)


class Sample(NamedTuple):
    """One image of a run, read.

    Attributes:
        place: In the order of the rows, from 0.
        name: Its path below the data folder.
        image: As the network takes it, ``(3, H, W) uint8``, or None.
        fault: What is wrong with it, or None.
        seconds: What a core took to decode it, and to resize it.
        kind: Of the file that was decoded.
        remarks: What is remarkable about it, as ``REMARKS`` has it.
    """

    place: int
    name: str
    image: "Tensor | None"
    fault: Fault | None
    seconds: Seconds = (0.0, 0.0)
    kind: str = ""
    remarks: tuple[str, ...] = ()


class Remark(TypedDict):
    """How many images that have a row something is remarkable about, and the first one's path."""

    images: int
    first: str


Remarks = dict[str, Remark]  # by kind
REMARKS = {
    "one_colour": "{} of one single colour",
    "dark": "{} of 16-bit grey, nearly black without --data.value_range",
    "nodata": "nodata in {}",
    "zero_row": "{} with a row of zeros, which cannot have length 1",
}


class Batch(NamedTuple):
    """Some images in the order of the rows, with their names.

    Attributes:
        number: Which batch of the whole run this is, from 0, whichever process has it.
        names: Paths below the data folder of the images that could be read, one per row.
        groups: Images of equal shape, ``(G, 3, H, W) uint8``, each with the numbers of their G rows in the batch.
        faults: What is wrong with images, in their order; those that were not used have no row.
        size: How many images there are, readable or not.
        seconds: What a core took to decode them, and to resize them.
        readers: The kinds of files that were decoded, each with the number of its reader.
        remarks: What is remarkable about images that have a row.
    """

    number: int
    names: list[str]
    groups: "list[tuple[list[int], Tensor]]"
    faults: list[Fault]
    size: int
    seconds: Seconds = (0.0, 0.0)
    readers: dict[str, int] = {}  # noqa: RUF012, nobody changes it
    remarks: Remarks = {}  # noqa: RUF012, likewise


def add_up(several: Iterable[Remarks]) -> Remarks:
    """Return the remarks on batches in the order of the rows as those on all of their images."""
    total: Remarks = {}
    for remarks in several:
        for kind, more in remarks.items():
            before = total.get(kind, Remark(images=0, first=more["first"]))
            total[kind] = Remark(images=before["images"] + more["images"], first=before["first"])
    return dict(sorted(total.items()))


def zero_rows(names: Iterable[str], values: Any) -> Remarks:
    """Return the remark on images whose row, of ``(B, D)``, is zeros, if there are any."""
    found = [name for name, row in zip(names, values, strict=True) if not row.any()]
    return {"zero_row": Remark(images=len(found), first=found[0])} if found else {}


def report(remarks: Remarks, layer: str = "") -> None:
    """Warn of each kind of remark, in a line: of those on a layer's rows, or without a layer of those on images."""
    for kind, one in remarks.items():
        if (kind == "zero_row") == bool(layer):
            more = ", …" if one["images"] > 1 else ""
            found = REMARKS.get(kind, f"{{}} {kind}").format(count(one["images"], "image"))
            log.warning("%s%s (%s%s)", f"{layer}: " if layer else "", found, one["first"], more)
