"""A picture blended with the colours of its classes, and a legend that names them; made to be looked at.

The legend stands on the right of the picture, or below one that is too low for it.
"""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from service.tasks.letterbox import Colour, Size, fit
from service.tasks.masks import Mask
from service.tasks.picture_files import Pixels

MAX_SIDE_PIXELS = 2_048

_MIN_SIDE_PIXELS = 640  # a smaller picture is enlarged: on most screens it could not be read
_MARGIN, _ROW_PIXELS, _SWATCH_PIXELS, _FONT_PIXELS = 16, 26, 16, 15
_MAX_LABEL_PIXELS = 240
_SHARE_PIXELS = 76  # width of "100.0 %" and the space before it
_MAX_LEGEND_PIXELS = 512  # height, below a picture
_STRENGTH = 0.5  # of the colours over the picture
_OUTLINE = 0.35  # brightness left between two classes
_INK, _FAINT, _PAPER = (38, 38, 46), (120, 122, 132), (255, 255, 255)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Entry(NamedTuple):
    """A class that the picture has, and the share of its pixels."""

    label: str
    colour: Colour
    share: float


class Layout(NamedTuple):
    """Where things are.

    Attributes:
        size: rows and columns of the whole.
        limit: what the picture fits into, at the top left.
        legend: top and left of the first entry.
        entry_pixels: width of an entry.
        num_columns, num_rows: of entries.
        font: of the legend; each drawing has its own, as fonts must not be shared by threads.
    """

    size: Size
    limit: Size
    legend: tuple[int, int]
    entry_pixels: int
    num_columns: int
    num_rows: int
    font: Font


def lay_out(size: Size, entries: Sequence[Entry]) -> Layout:
    """Choose where things are, no side longer than `MAX_SIDE_PIXELS`.

    Args:
        size: of the picture as sent.
        entries: of the legend.
    """
    font = ImageFont.load_default(_FONT_PIXELS)
    label_pixels = min(max(int(font.getlength(entry.label)) for entry in entries) + 1, _MAX_LABEL_PIXELS)
    entry_pixels = _SWATCH_PIXELS + 10 + label_pixels + _SHARE_PIXELS + _MARGIN
    side = min(max(*size, _MIN_SIDE_PIXELS), MAX_SIDE_PIXELS)
    limit = (side, min(side, MAX_SIDE_PIXELS - entry_pixels - _MARGIN))
    height, width = fit(size, limit)
    num_rows = len(entries)
    if 2 * _MARGIN + num_rows * _ROW_PIXELS <= height:
        whole = (height, width + _MARGIN + entry_pixels)
        return Layout(whole, limit, (_MARGIN, width + _MARGIN), entry_pixels, 1, num_rows, font)
    num_columns = max(1, (max(fit(size, (side, side))[1], _MIN_SIDE_PIXELS) - _MARGIN) // entry_pixels)
    num_rows = min(-(-len(entries) // num_columns), (_MAX_LEGEND_PIXELS - 2 * _MARGIN) // _ROW_PIXELS)
    legend_pixels = 2 * _MARGIN + num_rows * _ROW_PIXELS
    limit = (min(side, MAX_SIDE_PIXELS - legend_pixels), side)
    height, width = fit(size, limit)
    whole = (height + legend_pixels, max(width, _MARGIN + num_columns * entry_pixels))
    return Layout(whole, limit, (height + _MARGIN, _MARGIN), entry_pixels, num_columns, num_rows, font)


def draw_segmentation(
    pixels: Pixels, mask: Mask, palette: Sequence[Colour], entries: Sequence[Entry], layout: Layout
) -> bytes:
    """Draw a PNG.

    Args:
        pixels: (Y, X, 3), the picture fitted into the layout's limit.
        mask: of the picture at any size.
        palette: colour of each class.
        entries, layout: what `lay_out` was given and gave.
    """
    height, width = layout.size
    picture = Image.new("RGB", (width, height), _PAPER)
    picture.paste(Image.fromarray(blend(pixels, mask, palette)), (0, 0))
    canvas = ImageDraw.Draw(picture)
    room = layout.num_rows * layout.num_columns
    shown = entries if len(entries) <= room else entries[: room - 1]
    for number, entry in enumerate(shown):
        _draw_entry(canvas, entry, _place(number, layout), layout)
    if len(shown) < len(entries):
        top, left = _place(len(shown), layout)
        text = f"and {len(entries) - len(shown)} more"
        canvas.text((left, top + _ROW_PIXELS / 2), text, _FAINT, layout.font, anchor="lm")
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def blend(pixels: Pixels, mask: Mask, palette: Sequence[Colour]) -> Pixels:
    """Put the colours of classes over a picture, and dark lines between them.

    Args:
        pixels: (Y, X, 3), the picture.
        mask: of the picture at any size.
        palette: colour of each class.
    """
    scaled = _scale(mask, pixels.shape[:2])
    faded = (np.arange(256) * (1 - _STRENGTH)).round().astype(np.uint8)
    added = (np.array(palette) * _STRENGTH).round().astype(np.uint8)
    blended: Pixels = faded[pixels] + added[scaled]
    is_edge = np.zeros(scaled.shape, np.bool_)
    is_edge[:, 1:] |= scaled[:, 1:] != scaled[:, :-1]
    is_edge[1:] |= scaled[1:] != scaled[:-1]
    blended[is_edge] = (blended[is_edge] * _OUTLINE).astype(np.uint8)
    return blended


def _scale(mask: Mask, size: Size) -> Mask:
    rows, columns = (
        ((np.arange(target) + 0.5) * (length / target)).astype(np.intp)
        for target, length in zip(size, mask.shape, strict=True)
    )
    scaled: Mask = mask[rows[:, None], columns]
    return scaled


def _place(number: int, layout: Layout) -> tuple[int, int]:
    column, row = divmod(number, layout.num_rows)
    top, left = layout.legend
    return top + row * _ROW_PIXELS, left + column * layout.entry_pixels


def _draw_entry(canvas: ImageDraw.ImageDraw, entry: Entry, place: tuple[int, int], layout: Layout) -> None:
    top, left = place
    middle = top + _ROW_PIXELS / 2
    half = _SWATCH_PIXELS // 2
    canvas.rectangle((left, middle - half, left + _SWATCH_PIXELS, middle + half), fill=entry.colour, outline=_FAINT)
    label = entry.label
    while layout.font.getlength(label) > _MAX_LABEL_PIXELS:
        label = label[:-2] + "…"
    canvas.text((left + _SWATCH_PIXELS + 10, middle), label, _INK, layout.font, anchor="lm")
    share = f"{100 * entry.share:.1f} %" if entry.share >= 0.001 else "< 0.1 %"
    canvas.text((left + layout.entry_pixels - _MARGIN, middle), share, _FAINT, layout.font, anchor="rm")
