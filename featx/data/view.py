"""How an image is seen: the options that decide which 8-bit RGB a file becomes."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from PIL import features

from featx.data import reader
from featx.data.depth import ValueRange
from featx.errors import BadValueError


@dataclass(frozen=True)
class View:
    """The options of reading, by their names on the command line.

    Args:
        value_range: The values of images above 8 bits that become black and white; a list has those of each band.
        strict: Give no image for a file whose data is damaged; else what PIL makes of it, beside the fault.
        exif_rotate: Turn an image as its Orientation says.
        srgb: Convert colors from an embedded ICC profile to sRGB.
        background: The color behind transparent pixels, 0 to 255; None: transparency is ignored.
        bands: The channels to see as red, green and blue, or one as grey, from 1; None: grey and RGB as they are.
        page: Which page of a file, from 1; None: the first that is not a thumbnail.
        reader: A function that reads the files, by its name.

    Raises:
        BadValueError: A value that cannot be used.
    """

    value_range: ValueRange | None = None
    strict: bool = True
    exif_rotate: bool = False
    srgb: bool = False
    background: tuple[int, int, int] | None = None
    bands: list[int] | None = None
    page: int | None = None
    reader: str | None = None

    def __post_init__(self) -> None:
        bounds = self.value_range
        several = isinstance(bounds, list)
        ranges: Any = bounds if several else [bounds] if bounds is not None else []
        if not all(-math.inf < low < high < math.inf for low, high in ranges) or (
            several and len(ranges) not in (1, 3)
        ):
            shown = json.dumps(bounds)
            raise BadValueError(
                f"--data.value_range {shown}: expected '[low,high]' with low below high, or one such range per band."
            )
        if self.bands is not None and not (len(self.bands) in (1, 3) and all(band >= 1 for band in self.bands)):
            raise BadValueError(f"--data.bands {self.bands}: expected three bands or one, from 1, as '[4,3,2]'.")
        if self.bands is not None and several and len(ranges) != len(self.bands):
            raise BadValueError(
                f"--data.value_range {json.dumps(bounds)}: expected one range per band of --data.bands {self.bands}."
            )
        if self.bands is not None and self.srgb:
            raise BadValueError(
                "--data.srgb true: expected false with --data.bands, which are not colors of a profile."
            )
        if self.page is not None and self.page < 1:
            raise BadValueError(f"--data.page {self.page}: expected a whole number of at least 1.")
        useless = [name for name in ("exif_rotate", "srgb", "background", "page") if getattr(self, name)]
        if self.reader is not None and useless:
            raise BadValueError(
                f"--data.{useless[0]}: not for --data.reader {self.reader}, which reads the files itself."
            )
        if self.srgb and not features.check("littlecms2"):
            raise BadValueError(
                "--data.srgb true: Pillow lacks LittleCMS here. Expected a Pillow that was built with it."
            )
        if self.background is not None and not all(0 <= value <= 255 for value in self.background):
            raise BadValueError(
                f"--data.background {list(self.background)}: expected red, green and blue from 0 to 255, "
                "as '[255,255,255]'."
            )

    def check(self) -> None:
        """Raise BadValueError if the reader cannot be imported."""
        if self.reader is not None:
            reader.find(self.reader)

    @classmethod
    def of(cls, identity: dict[str, Any]) -> Self:
        """Return the view that a record's identity states."""
        try:
            given = {field.name: identity[field.name] for field in fields(cls) if field.name in identity}
            bounds = given.get("value_range")
            if bounds is not None:  # JSON has no tuples
                given["value_range"] = [*map(tuple, bounds)] if isinstance(bounds[0], list) else tuple(bounds)
            return cls(**given)
        except (TypeError, ValueError) as err:
            raise BadValueError(f"not a record that featx can use: {err}") from err

    @property
    def is_plain(self) -> bool:
        """Whether the channels are seen as they are, and orientation, color profiles and transparency are ignored."""
        return not self.exif_rotate and not self.srgb and self.background is None and self.bands is None

    def identity(self) -> dict[str, Any]:
        """Return what decides a value, as plain values for JSON: options added later are there only if they are set."""
        given = {name: value for name, value in asdict(self).items() if value != getattr(View, name)}
        if self.reader is not None:
            given["reader_source"] = reader.digest(self.reader)
        return {"value_range": None, "strict": True} | given


PLAIN = View()
