"""Letterbox: a whole picture of any shape → uint8 pixels of the size that a program takes.

The picture is scaled to fit, keeping its aspect ratio, and lies at the top left; the rest has the fill colour. There,
its edges are those of the program's grid of outputs, whatever the stride.
"""

import math
from typing import Annotated, NamedTuple

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from service.tasks.picture_files import PILLOW_MAX_PIXELS, Pixels, RawPicture, read_picture, turn_upright

Size = tuple[int, int]  # rows, columns
_Level = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[_Level, _Level, _Level]


class LetterboxSpec(BaseModel):
    """How a whole picture becomes a program's input: scale it to fit, fill the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: int = Field(ge=1, description="Rows of the picture that the program takes.")
    width: int = Field(ge=1, description="Columns of the picture that the program takes.")
    fill: Colour = Field(
        description="Colour right of and below a picture of another shape; the mean that the program takes off."
    )
    max_pixels: int = Field(
        ge=1, le=PILLOW_MAX_PIXELS, description="Most pixels of a picture that is still decoded and answered in full."
    )


class Letter(NamedTuple):
    """A picture in its box.

    Attributes:
        pixels: (Y, X, 3), what the program takes.
        size: of the picture as sent, upright.
        box: rows and columns at the top left of `pixels` that show it.
    """

    pixels: Pixels
    size: Size
    box: Size


def decode_letter(body: bytes, spec: LetterboxSpec) -> Letter:
    """Decode a picture and put it into the box.

    Args:
        body: the file; its first bytes tell the format.
        spec: the size to deliver and the limits to keep; they are checked before a pixel is decoded.
    Raises: InvalidInput.
    Differs: from scaling the decoded whole: a JPEG that is at least twice too large is decoded at 1/2, 1/4 or 1/8 of
        its size.
    """
    raw = _read_to_fit(body, (spec.height, spec.width), max_pixels=spec.max_pixels)
    size = _upright_size(raw)
    box = fit(size, (spec.height, spec.width))
    pixels = np.empty((spec.height, spec.width, 3), np.uint8)
    pixels[:] = spec.fill
    pixels[: box[0], : box[1]] = _resize(raw, box)
    return Letter(pixels, size, box)


def decode_to_fit(body: bytes, limit: Size, *, max_pixels: int) -> Pixels:
    """Decode a picture and scale it, up or down, to `fit` into the limit.

    Returns: (Y, X, 3).
    Raises: InvalidInput.
    """
    raw = _read_to_fit(body, limit, max_pixels=max_pixels)
    return _resize(raw, fit(_upright_size(raw), limit))


def fit(size: Size, limit: Size) -> Size:
    """The largest size of this aspect ratio within the limit, at least one pixel."""
    scale = min(limit[0] / size[0], limit[1] / size[1])
    return max(1, min(round(size[0] * scale), limit[0])), max(1, min(round(size[1] * scale), limit[1]))


def _read_to_fit(body: bytes, limit: Size, *, max_pixels: int) -> RawPicture:
    def choose_size(width: int, height: int) -> Size:
        # It is not known yet whether the picture lies on its side: enough for both cases.
        scale = max(min(limit[0] / height, limit[1] / width), min(limit[0] / width, limit[1] / height))
        return math.ceil(width * scale), math.ceil(height * scale)

    return read_picture(body, max_pixels=max_pixels, choose_size=choose_size)


def _upright_size(raw: RawPicture) -> Size:
    width, height = raw.size
    return (width, height) if raw.is_sideways else (height, width)


def _resize(raw: RawPicture, size: Size) -> Pixels:
    """Scale a picture to an upright size; made smaller, it is averaged over all its pixels."""
    height, width = reversed(size) if raw.is_sideways else size
    image = raw.image
    if raw.frame != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=(0, 0, *raw.frame))
    return turn_upright(image, raw.orientation)
