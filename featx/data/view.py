"""How an image is seen: the options that decide which 8-bit RGB a file becomes."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from PIL import features

from featx.data.depth import ValueRange
from featx.errors import BadValueError


@dataclass(frozen=True)
class View:
    """The options of reading, by their names on the command line.

    Args:
        value_range: The values of images above 8 bits that become black and white.
        strict: Whether a file with damaged data gives no image; else what Pillow makes of it is given with the fault.
        exif_rotate: Whether to rotate an image as its Orientation says.
        srgb: Whether to convert colors from an embedded ICC profile to sRGB.
        background: The color behind transparent pixels, 0 to 255; None: transparency is ignored.

    Raises:
        BadValueError: A value that cannot be used.
    """

    value_range: ValueRange | None = None
    strict: bool = True
    exif_rotate: bool = False
    srgb: bool = False
    background: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        bounds = self.value_range
        if bounds is not None and not -math.inf < bounds[0] < bounds[1] < math.inf:
            raise BadValueError(f"--data.value_range {list(bounds)}: expected '[low,high]' with low below high.")
        if self.srgb and not features.check("littlecms2"):
            raise BadValueError(
                "--data.srgb true: Pillow lacks LittleCMS here. Expected a Pillow that was built with it."
            )
        if self.background is not None and not all(0 <= value <= 255 for value in self.background):
            raise BadValueError(
                f"--data.background {list(self.background)}: expected red, green and blue from 0 to 255, "
                "as '[255,255,255]'."
            )

    @classmethod
    def of(cls, identity: dict[str, Any]) -> Self:
        """Return the view that a record's identity states."""
        try:
            return cls(**{field.name: identity[field.name] for field in fields(cls) if field.name in identity})
        except (TypeError, ValueError) as err:
            raise BadValueError(f"not a record that featx can use: {err}") from err

    @property
    def is_plain(self) -> bool:
        """Whether orientation, color profiles and transparency are ignored."""
        return not self.exif_rotate and not self.srgb and self.background is None

    def identity(self) -> dict[str, Any]:
        """Return what decides a value, as plain values for JSON: options added later are there only if they are set."""
        given = {name: value for name, value in asdict(self).items() if value != getattr(View, name)}
        return {"value_range": None, "strict": True} | given


PLAIN = View()  # no option is set
