"""A finished file and what stands beside it: its record, the images of its rows, and those that have none."""

import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from featx import manifest, reader
from featx.batch import Fault
from featx.manifest import Json
from featx.messages import MissingPathError, did_you_mean
from featx.state import HIDDEN, file_name, read_errors


@dataclass(frozen=True)
class Finished:
    """A finished file, a folder of shards, or one shard.

    Attributes:
        path: The file, or the folder.
        record_path: Where its record is, or would be.
        record: What LAYER.json says, of one shard with its own ``rows``; empty where it is missing.
    """

    path: Path
    record_path: Path
    record: Json

    @property
    def is_known(self) -> bool:
        """Whether there is a record, and it knows the file."""
        return self.path.name in {part for name in self.record.get("files", ()) for part in Path(name).parts}

    @property
    def is_shard(self) -> bool:
        """Whether this is one file of several."""
        return self.path.absolute().parent != self.record_path.absolute().parent

    @property
    def own(self) -> range:
        """Which of all images are the file's: a shard has those of its number."""
        total = self.record["inputs"]["images"]
        size = self.record["identity"]["shard_rows"] if self.is_shard else total
        start = int(self.path.stem) * size if self.is_shard else 0
        return range(start, min(start + size, total))

    @cached_property
    def images(self) -> list[str] | None:
        """The images' paths below the data folder, or None where the list of them is no longer there, or damaged."""
        kept = self.record_path.parent / HIDDEN / file_name(self.record["layer"]) / "images.gz"
        try:
            names = [name for name, _, _ in manifest.read_inputs(kept, slice(self.own.start, self.own.stop))]
        except (OSError, EOFError, ValueError, zlib.error):
            return None
        return names if len(names) == len(self.own) else None

    @cached_property
    def faults(self) -> list[Fault]:
        """What is wrong with images of the file's, of all images where the list of them is no longer there."""
        faults = read_errors(self.record_path.with_name(file_name(self.record["layer"], "errors.csv")))
        if self.images is None:
            return faults
        own = set(self.images)
        return [fault for fault in faults if fault.path in own]

    @cached_property
    def rows(self) -> list[str] | None:
        """The path of each row's image, or None where the list of images is no longer there."""
        lost = {fault.path for fault in self.faults if not fault.used}
        return self.images and [name for name in self.images if name not in lost]


def find(path: Path) -> Finished:
    """Return a finished file, a folder of shards or one of them.

    Raises:
        MissingPathError: It is not there.
        BadValueError: Its record is none of featx's, or one of a newer featx.
    """
    if not path.exists():
        beside = path.parent.glob("[!.]*")
        near = did_you_mean(path.name, [other.name for other in beside if other.suffix not in (".json", ".html")])
        raise MissingPathError(f"{path}: no such file.{near} Expected what featx predict wrote, as features/fc7.csv")
    path = reader.named(path)
    place = reader.record_path(path)
    record = manifest.read_record(place) or {}
    said = {Path(name).name: said for name, said in record.get("files", {}).items()}.get(path.name, {})
    return Finished(path, place, record | {"rows": said["rows"]} if "rows" in said else record)
