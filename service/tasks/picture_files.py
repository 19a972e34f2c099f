"""Picture files: their bytes → upright pixels of any size, within limits that are checked before a pixel is decoded.

Reads JPEG, PNG, WebP, BMP and GIF (first frame) in every mode these formats have. Transparency is put on white, EXIF
orientation is honoured, 16 bits become 8. Colour profiles are not applied.

Pillow decodes. Its format classes are called directly: `Image.open` would import every format, look for further
pictures in a JPEG, and warn, through process-wide state, of sizes that are limited here.
"""

import io
import re
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from service.errors import InvalidInput

PICTURE_MEDIA_TYPES = frozenset(
    f"image/{name}" for name in ("jpeg", "jpg", "png", "webp", "bmp", "x-bmp", "x-ms-bmp", "gif")
)
PILLOW_MAX_PIXELS = 89_478_485  # beyond it Pillow itself warns or refuses (Image.MAX_IMAGE_PIXELS)

Pixels = npt.NDArray[np.uint8]


class _Source(io.BytesIO):
    """A file that may be read from only so often.

    Pillow takes a file apart in Python, part by part, and meanwhile holds other threads up. A photo has a few dozen
    parts; 20 MB can be made of five million, and would take seconds.
    """

    num_reads = 0

    def read(self, size: int | None = -1) -> bytes:
        """Read, unless it was read too often already.

        Raises: InvalidInput.
        """
        self.num_reads += 1
        if self.num_reads > _MAX_READS:
            raise InvalidInput(
                "the picture is made of very many small parts; an ordinary file was expected, which has some dozen; "
                "save it anew, without metadata"
            )
        return super().read(size)


class _Jpeg(JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Do nothing: the resolution is of no use here, and reading it warns of damaged EXIF data."""


# Name → what a file starts with, what reads it.
_FORMATS: dict[str, tuple[bytes, Callable[[io.BytesIO], ImageFile.ImageFile]]] = {
    "JPEG": (rb"\xff\xd8\xff", _Jpeg),
    "PNG": (rb"\x89PNG\r\n\x1a\n", PngImageFile),
    "WebP": (rb"(?s)RIFF....WEBP", WebPImageFile),
    "BMP": (rb"BM", BmpImageFile),
    "GIF": (rb"GIF8[79]a", GifImageFile),
}

# What Pillow raises for damaged files: its readers index, unpack and convert whatever the file says.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    ArithmeticError,
    struct.error,
    UserWarning,  # of a damaged APNG, in a process that turns warnings into errors
)

# Metadata whose copies Pillow joins or unpacks one by one: 4 MB of them took 5 s and more.
_METADATA = {"JPEG": b"Exif\0\0", "PNG": b"iCCP"}
_MAX_METADATA = 16
_MAX_READS = 100_000  # some 0.2 s; a PNG of 50 MB in chunks of 8 kB, as libpng writes them, needs a quarter
_MAX_PASSES = 50  # times `max_pixels`; a progressive JPEG usually has 10 scans
_MAX_PASSED_PIXELS = 1_000_000_000  # where `max_pixels` is large: 25 scans of 40 megapixels take some seconds
_MAX_RLE_PIXELS = 1_000_000  # at 0.1 µs a pixel
_MAX_RLE_BYTES = 2_200_000  # a run of one pixel has two; of runs without a pixel there could be any number
_MAX_SIDE_PIXELS = 65_535  # what JPEG and GIF can store; rows cost memory however short they are

# EXIF orientation (Exif 3.0, tag 0x0112) → what makes the picture upright.
_UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}


class RawPicture(NamedTuple):
    """A decoded file whose pixels lie as they do in the file.

    Attributes:
        image: in mode L, RGB or RGBa (multiplied by its opacity), not turned upright and perhaps scaled down.
        frame: width and height of the part of it that shows the picture: a scaled-down one may end within its last
            pixel.
        size: width and height in the file.
        orientation: of EXIF; what `turn_upright` wants to know.
    """

    image: Image.Image
    frame: tuple[float, float]
    size: tuple[int, int]
    orientation: int

    @property
    def is_sideways(self) -> bool:
        """Whether its rows become columns."""
        return self.orientation >= 5


def read_picture(body: bytes, *, max_pixels: int, choose_size: Callable[[int, int], tuple[int, int]]) -> RawPicture:
    """Decode a file.

    Args:
        body: the file; its first bytes tell the format.
        max_pixels: of a picture that is decoded.
        choose_size: from width and height in the file to those that are wanted at least; a JPEG that has twice as much
            is decoded at 1/2, 1/4 or 1/8 of its size.
    Raises: InvalidInput.
    """
    name, open_file = _find_format(body)
    try:
        # The runs of a BMP are read one by one, and have limits of their own.
        picture = open_file(io.BytesIO(body) if name == "BMP" else _Source(body))
        _check_limits(picture, body, max_pixels)
        size = picture.size
        scaled = picture.draft(None, choose_size(*size))
        frame = size if scaled is None else scaled[1][2:]
        picture.load()
        return RawPicture(_flatten(picture), frame, size, _orientation(picture.info.get("exif")))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidInput(
            f"the picture has more than {PILLOW_MAX_PIXELS} pixels; "
            f"this model takes at most {max_pixels}; scale it down"
        ) from error
    except _DAMAGE as error:
        raise InvalidInput(
            f"the body starts as a {name} file but is damaged, cut off or of a rare kind; "
            "a complete picture was expected; send it again, or save it anew as JPEG or PNG"
        ) from error


def turn_upright(image: Image.Image, orientation: int) -> Pixels:
    """Make pixels, (Y, X, 3), of a picture in mode L, RGB or RGBa, the last put on white."""
    return np.ascontiguousarray(_UPRIGHT[orientation](_to_pixels(image)))


def _find_format(body: bytes) -> tuple[str, Callable[[io.BytesIO], ImageFile.ImageFile]]:
    if not body:
        raise InvalidInput(
            "the body is empty; a JPEG, PNG, WebP, BMP or GIF picture was expected; send the file as the body"
        )
    for name, (start, open_file) in _FORMATS.items():
        if re.match(start, body):
            if name in _METADATA and body.count(_METADATA[name]) > _MAX_METADATA:
                raise InvalidInput(
                    f"the {name} file repeats its metadata more than {_MAX_METADATA} times; "
                    "it should have them once; save the picture without metadata"
                )
            return name, open_file
    raise InvalidInput(
        "the body does not start as a picture does; a JPEG, PNG, WebP, BMP or GIF picture was expected; "
        "send the file itself, neither encoded nor wrapped"
    )


def _check_limits(picture: ImageFile.ImageFile, body: bytes, max_pixels: int) -> None:
    """Refuse what would take too much memory or time, from the header alone."""
    width, height = picture.size
    num_pixels = width * height
    if num_pixels > max_pixels:
        raise InvalidInput(
            f"the picture has {width} x {height} = {num_pixels} pixels; "
            f"this model takes at most {max_pixels}; scale it down"
        )
    if max(width, height) > _MAX_SIDE_PIXELS:
        raise InvalidInput(
            f"the picture has {width} x {height} pixels; a side may have at most {_MAX_SIDE_PIXELS}; cut it into parts"
        )
    # Each scan of a JPEG passes over all its pixels, however few bytes it has.
    num_passes = body.count(b"\xff\xda") if picture.format == "JPEG" else 1
    is_unrolled_in_python = any(tile.codec_name == "bmp_rle" for tile in picture.tile)
    if num_pixels * num_passes > min(_MAX_PASSES * max_pixels, _MAX_PASSED_PIXELS) or (
        is_unrolled_in_python and (num_pixels > _MAX_RLE_PIXELS or len(body) > _MAX_RLE_BYTES)
    ):
        raise InvalidInput(
            f"the {picture.format} file would take far longer to decode than others of its {width} x {height} pixels; "
            "an ordinary file was expected; save it anew as baseline JPEG or PNG"
        )


def _orientation(exif: object) -> int:
    """Read the EXIF orientation, 1 to 8; 1 is upright, and stands for absent and damaged data.

    Pillow's reader is not used: it parses every tag, warns of damage, and decodes a PNG to look for it.
    """
    if not isinstance(exif, bytes):
        return 1
    tiff = exif.removeprefix(b"Exif\0\0")
    order = ">" if tiff.startswith(b"MM") else "<"
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (num_entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(num_entries):
            tag, _kind, _count, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == 0x0112:  # Exif 3.0, 4.6.5.1: Orientation, a SHORT
                return value if value in _UPRIGHT else 1
    except struct.error:
        return 1
    return 1


def _flatten(picture: Image.Image) -> Image.Image:
    """Bring a picture into a mode whose pixels may be averaged: L, RGB, or RGBa if it is transparent."""
    if picture.mode == "I;16":
        return _from_16_bits(picture)
    if picture.has_transparency_data:
        return picture.convert("RGBA").convert("RGBa")
    if picture.mode in ("L", "RGB"):
        return picture
    return picture.convert("L" if picture.mode == "1" else "RGB")


def _from_16_bits(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture).astype(np.uint32)
    pixels = ((values * 255 + 32895) >> 16).astype(np.uint8)  # values / 257, rounded to nearest: libpng 1.6, pngrtran.c
    if "transparency" in picture.info:
        pixels[values == picture.info["transparency"]] = 255
    return Image.fromarray(pixels)


def _to_pixels(picture: Image.Image) -> Pixels:
    """Make (Y, X, 3) of mode L, RGB or RGBa, the last put on white."""
    if picture.mode == "RGBa":
        pixels = np.asarray(picture).astype(np.uint16)
        on_white: Pixels = (pixels[..., :3] + (255 - pixels[..., 3:])).clip(max=255).astype(np.uint8)
        return on_white  # clipped as a bicubic filter overshoots
    return np.asarray(picture.convert("RGB"))
