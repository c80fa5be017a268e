"""A file -> an RGB image: decode one to PIL's very values, but strictly, and say what is wrong with one."""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError, features

from featx.data.batch import Fault
from featx.errors import BadValueError, ImageError
from featx.process.shared import Shared, ignored

# By Pillow's name of a kind of file, the number of its reader, which goes up whenever that gives other values than
# before. A run takes no rows from one whose files of this kind a reader of another number read.
READERS = {"BMP": 1, "GIF": 1, "JPEG": 1, "PNG": 1, "PPM": 1, "TIFF": 1, "WEBP": 1}  # others: 1

# What Pillow may look for: other formats start programs (EPS starts Ghostscript) or take nearly any bytes as theirs.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF")

ValueRange = tuple[float, float]
Pixels = NDArray[np.uint8]

SIXTEEN_BITS: ValueRange = (0, 65535)
DARK = 4095  # the brightest value of a 12-bit camera, which is nearly black among 65,536
# PIL refuses an image of more as a decompression bomb: twice its MAX_IMAGE_PIXELS, at which it only warns. It reads
# the header of every image, so that this holds whatever decodes it.
MOST_PIXELS = 178_956_970

# Whether PIL's values of a JPEG are libjpeg-turbo's, as everywhere but in odd builds: there PIL decodes once more.
PIL_HAS_TURBO = features.check_feature("libjpeg_turbo")

REASONS = (
    (PermissionError, "no permission to read it"),
    (Image.DecompressionBombError, f"more than {MOST_PIXELS:,} pixels"),
    (MemoryError, "not enough memory to decode it"),
    (UnidentifiedImageError, "not an image that PIL can read"),
)

# What the strict decoder says of a JPEG that is not damaged but beyond it, or odd in a header that changes no pixel.
# PIL alone judges these.
_BEYOND = (
    "tjDecompressHeader3(): Could not determine subsampling level",  # such as 4:1:0, or Cb and Cr sampled apart
    "Unknown Adobe color transform code",
    "Warning: unknown JFIF revision number",
)


@contextmanager
def _strict_pil() -> Iterator[None]:
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, MOST_PIXELS // 2
    try:
        with ignored(r"PIL\.|featx\.", Warning):  # remarks on palettes and broken EXIF change no pixel
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


STRICT_PIL = Shared(_strict_pil)  # whatever else the process sets


class Decoded(NamedTuple):
    """What an image file holds.

    Attributes:
        pixels: The image, ``(H, W, 3) uint8``, or None.
        fault: What is wrong with it, or None.
        kind: Pillow's name of the kind of file, of which there is an image.
        dark: Whether it is 16-bit grey, read without a ``value_range``, of which no value is above 4095.
    """

    pixels: Pixels | None
    fault: Fault | None
    kind: str
    dark: bool = False


def read_or_fault(root: str, name: str, value_range: ValueRange | None = None, strict: bool = True) -> Decoded:
    """Decode the image ``name`` below ``root``, whatever the file does: what is wrong with it is returned, not raised.

    Args:
        root: The data folder.
        name: Path of the image below it.
        value_range: The values of images above 8 bits that become black and white.
        strict: Give no image for a file whose data is damaged; else give what PIL makes of it, and the fault beside.
    """
    path = os.path.join(root, name)
    try:
        return _read(path, value_range, strict=True)
    except Exception as err:  # PIL raises OSError, SyntaxError, struct.error, MemoryError ... for broken files
        fault = describe(err, path, name)
    if not strict:
        with suppress(Exception):  # the fault says it already
            return _read(path, value_range, strict=False)._replace(fault=fault._replace(used=True))
    return Decoded(None, fault, "")


def read_image(path: str, value_range: ValueRange | None = None, strict: bool = True) -> Pixels:
    """Decode an image to 8-bit RGB, as ``Image.open(path).convert("RGB")`` does, but without its clipping above 8 bits.

    EXIF rotation is not applied; of an animation the first frame is taken. Grey values of 16 bits are scaled to
    0..255 from 0..65535, those of 32 bits (integer or float) from ``value_range``, and rounded; what lies outside
    of the range becomes black or white.

    PIL fills up some damaged JPEGs in silence. Strictly, a JPEG is decoded by libjpeg-turbo with its warnings as
    errors, to the same values as by PIL, and a PNG's checksums are looked at. What no decoder can see is damage that
    leaves a valid file: a JPEG has no checksum, and of zeros in its midst a few hundred bytes can go unseen.

    Args:
        path: The file.
        value_range: The values of images above 8 bits that become black and white.
        strict: Whether damaged data that PIL passes is an error.

    Returns:
        ``(H, W, 3) uint8``.

    Raises:
        BadValueError: The values need a ``value_range``, or one that was given cannot be applied.
        ImageError: What PIL has no error for.
        Exception: Whatever PIL raises.
    """
    pixels = _read(path, value_range, strict).pixels
    assert pixels is not None
    return pixels


def _read(path: str, value_range: ValueRange | None, strict: bool) -> Decoded:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, and /dev/zero has no end
        raise ImageError("a folder, not a file" if stat.S_ISDIR(found.st_mode) else "a pipe or a device, not a file")
    if found.st_size == 0:
        raise ImageError("empty")
    with open(path, "rb") as file:
        return decode(file, value_range, strict)


def decode(file: BinaryIO, value_range: ValueRange | None = None, strict: bool = True) -> Decoded:
    """Decode an open file that can be sought, as ``read_image`` does; raise what it raises."""
    with STRICT_PIL, Image.open(file, formats=FORMATS) as image:
        _check_depth(image, value_range)
        kind = "JPEG" if image.format == "MPO" else str(image.format)  # several JPEGs, of which the first is taken
        if strict and kind == "PNG":
            file.seek(0)
            with Image.open(io.BytesIO(file.read()), formats=FORMATS) as twin:  # which cannot be decoded after it
                twin.verify()
        if strict and kind == "JPEG":
            file.seek(0)
            pixels = _decode_jpeg(file.read(), image)
            if pixels is not None and PIL_HAS_TURBO:
                return Decoded(pixels, None, kind)
        pixels, dark = _convert(image, value_range)
        return Decoded(pixels, None, kind, dark)


def to_rgb(image: Image.Image, value_range: ValueRange | None = None) -> Pixels:
    """Return one of PIL's images as 8-bit RGB, ``(H, W, 3) uint8``, as ``read_image`` does a file's."""
    _check_depth(image, value_range)
    return _convert(image, value_range)[0]


def check_image(path: str, value_range: ValueRange | None = None) -> None:
    """Raise BadValueError if the file's header says that it needs a ``value_range``, and for no other fault."""
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            with STRICT_PIL, Image.open(path, formats=FORMATS) as image:
                _check_depth(image, value_range)
    except BadValueError as err:
        raise BadValueError(f"{path}: {err}") from err
    except Exception:
        return  # read_image will say it, in its place


def _decode_jpeg(data: bytes, image: Image.Image) -> Pixels | None:
    """Return PIL's values of a whole JPEG, raise for a damaged one, and return None for one that only PIL can do."""
    try:
        if image.mode != "CMYK":
            pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB")
            return pixels
        inks = simplejpeg.decode_jpeg(data, "CMYK")  # whose conversion to RGB is not PIL's
    except ValueError as err:
        if str(err).startswith(_BEYOND):
            return None
        raise
    return np.array(Image.frombytes("CMYK", image.size, inks.tobytes(), "raw", "CMYK;I").convert("RGB"))


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _check_depth(image: Image.Image, value_range: ValueRange | None) -> None:
    # PIL gives 16-bit PGM as mode I, already scaled to 0..65535.
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if _is_deep(image) and not sixteen and value_range is None:
        kind = "float" if image.mode == "F" else "integer"
        raise BadValueError(
            f"32-bit {kind} values (mode {image.mode}) have no black and white of their own.\n"
            "--data.value_range says which values those are, for instance --data.value_range '[0,1]'"
        )
    packed = any(";16" in str(tile[3]) for tile in getattr(image, "tile", []))
    if value_range is not None and not _is_deep(image) and packed:
        raise BadValueError(
            "PIL reads only the upper 8 of the 16 bits of a colour image, so that --data.value_range "
            "cannot be applied to it. Convert it to 16-bit grey or 8-bit colour."
        )


def _convert(image: Image.Image, value_range: ValueRange | None) -> tuple[Pixels, bool]:
    if not _is_deep(image):
        return np.array(image.convert("RGB")), False
    values = np.asarray(image).astype(np.float64)  # (H, W)
    if not np.isfinite(values).all():
        raise ImageError("holds values that are nan or infinite")
    low, high = value_range or SIXTEEN_BITS
    grey = np.rint(np.clip((values - low) * 255 / (high - low), 0, 255)).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2), value_range is None and bool(values.max() <= DARK)


def describe(err: Exception, path: str, name: str) -> Fault:
    """Return an exception as the fault of the image ``name``, without ``path``: it differs from machine to machine."""
    words = err.strerror if isinstance(err, OSError) and err.strerror else str(err)
    if isinstance(err, UnidentifiedImageError):
        words = "cannot identify image file"
    words = " ".join(words.replace(path, name).split())
    return Fault(name, " ".join(_reason(err, words, path).split()), f"{type(err).__name__}: {words}"[:300])


def _reason(err: Exception, words: str, path: str) -> str:
    if isinstance(err, BadValueError | ImageError):
        return str(err.args[0])
    if isinstance(err, FileNotFoundError):
        return "a link to nothing" if os.path.islink(path) else "no such file"
    for kind, reason in REASONS:
        if isinstance(err, kind):
            return reason
    if isinstance(err, OSError) and err.errno is not None:
        return f"cannot be read: {words}"
    if "truncated" in words.lower() or "premature end of jpeg" in words.lower():
        return "truncated"
    return "damaged"
