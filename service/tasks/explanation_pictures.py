"""Clusters drawn over the picture as sent: one by one for an answer in JSON, and all on one sheet to be looked at.

A heat map goes from the picture's own grey (nothing) over red to yellow (the cluster's strongest patch). Regions of
tokens have borders and a colour by their size, yellow where they are small, violet where large. What the model did not
see, since it was cut off, is dimmed.
"""

import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from service.tasks.explanations import Cluster, Finding, Numbers, PatchClusters, Regions, TokenRegions
from service.tasks.letterbox import LetterboxSpec, Size, decode_letter, decode_to_fit
from service.tasks.pictures import PictureSpec

SIDE_PIXELS = 384  # of the longer side of a picture that is drawn on by itself
PANEL_PIXELS = {"patch_clusters": 216, "token_regions": SIDE_PIXELS}  # and of one on a sheet; small regions need more
MAX_SCENE_PIXELS = 1_024  # most of the longer side of a scene, which has a size of its own where that is less
SCENE_PANEL_PIXELS = 320  # of a scene on a sheet

Colour = tuple[int, int, int]
Pixels = npt.NDArray[np.uint8]

_MARGIN, _GAP, _HEADER, _CAPTION, _MIN_WIDTH, _MIN_HEIGHT = 24, 14, 84, 26, 150, 24
_MAX_LETTERS = 24  # of a label
_INK, _FAINT, _PAPER = (38, 38, 46), (110, 112, 122), (255, 255, 255)
_HEAT = np.array([(120, 10, 20), (235, 60, 20), (255, 235, 90)], np.float64)  # weak, middle, strong
_SIZES = np.array([(253, 231, 37), (33, 145, 140), (68, 1, 84)], np.float64)  # small, middle, large: viridis, reversed
_DIMMED = 0.35  # of its brightness is what the model did not see


class Canvas(NamedTuple):
    """A picture to draw on.

    Attributes:
        pixels: (Y, X, 3), the whole picture as sent, upright.
        box: left, top, right, bottom of what the model saw, in these pixels; it may reach beyond them on the right and
            at the bottom, where a fill was put.
    """

    pixels: Pixels
    box: tuple[int, int, int, int]


def read_canvas(body: bytes, spec: PictureSpec, *, side: int) -> Canvas:
    """Decode a picture as sent.

    Args:
        body: the file.
        spec: how the model saw it.
        side: pixels that its longer side becomes.
    Raises: InvalidInput.
    """
    square = LetterboxSpec(height=side, width=side, fill=_PAPER, max_pixels=spec.max_pixels)
    letter = decode_letter(body, square)
    height, width = letter.box
    pixels = letter.pixels[:height, :width]
    scale = min(height, width) / spec.resize_shorter_side
    rows, columns = (max(1, round(side * scale)) for side in (spec.height, spec.width))
    left, top = (width - columns) // 2, (height - rows) // 2
    return Canvas(pixels, (left, top, left + columns, top + rows))


def read_scene(body: bytes, spec: LetterboxSpec, box: Size, *, side: int) -> Canvas:
    """Decode a picture as sent, which the model saw as a whole.

    Args:
        body: the file.
        spec: how the model saw it.
        box: rows and columns of the model's input that show it.
        side: pixels that its longer side becomes.
    Raises: InvalidInput.
    """
    pixels = decode_to_fit(body, (side, side), max_pixels=spec.max_pixels)
    height, width = pixels.shape[:2]
    return Canvas(pixels, (0, 0, round(width * spec.width / box[1]), round(height * spec.height / box[0])))


def draw_heat(canvas: Canvas, heat: Numbers) -> bytes:
    """Draw where a cluster gathers: heat (Y, X), not negative, over what the model saw; a PNG."""
    return _encode(Image.fromarray(_paint_heat(canvas, heat)))


def draw_regions(canvas: Canvas, found: TokenRegions) -> bytes:
    """Draw the regions of a stage's tokens over what the model saw; a PNG."""
    return _encode(Image.fromarray(_paint_regions(canvas, found)))


def draw_sheet(canvas: Canvas, findings: list[Finding], *, title: str, answer: Pixels | None = None) -> bytes:
    """Draw the picture and, stage by stage, its heaviest clusters or its regions, with their weights; a PNG.

    Args:
        canvas: of the picture, with `PANEL_PIXELS` for what is drawn.
        findings: at least one.
        title: the answer in words.
        answer: (Y, X, 3) as the canvas, the answer as a picture, where it is one.
    """
    rows = _lay_out(canvas, findings, answer)
    height, width = canvas.pixels.shape[:2]
    step_x, step_y = max(width, _MIN_WIDTH) + _GAP, max(height, _MIN_HEIGHT) + _CAPTION + _GAP
    num_columns = max(len(row) for row in rows)
    size = (max(2 * _MARGIN + num_columns * step_x - _GAP, 560), _HEADER + len(rows) * step_y + _MARGIN)
    sheet = Image.new("RGB", size, _PAPER)
    ink = ImageDraw.Draw(sheet)
    ink.text((_MARGIN, 20), title, _INK, _font(22), anchor="lt")
    ink.text((_MARGIN, 52), _explain(findings), _FAINT, _font(13), anchor="lt")
    for y, row in enumerate(rows):
        for x, (caption, pixels) in enumerate(row):
            left, top = _MARGIN + x * step_x, _HEADER + y * step_y
            sheet.paste(Image.fromarray(pixels), (left, top))
            ink.text((left, top + height + 6), caption, _INK, _font(13), anchor="lt")
    return _encode(sheet)


def _lay_out(canvas: Canvas, findings: list[Finding], answer: Pixels | None) -> list[list[tuple[str, Pixels]]]:
    """Captions and panels: clusters take one row for each stage, regions one row for all; the answer comes first."""
    picture = ("the picture", _dim(canvas))
    heads = [picture] if answer is None else [("the answer", answer), picture]
    regions = [found for found in findings if isinstance(found, TokenRegions)]
    rows = [
        [heads.pop(0) if heads else (f"stage {found.stage}", _dim(canvas))]
        + [(_caption(found, one), _paint_heat(canvas, one.heat)) for one in found.clusters]
        for found in findings
        if isinstance(found, PatchClusters)
    ]
    panels = [(f"stage {found.stage}: {len(found.weights)} tokens", _paint_regions(canvas, found)) for found in regions]
    return [*rows, [*heads, *panels]] if panels else rows


def _caption(found: PatchClusters, one: Cluster) -> str:
    aim = "" if one.label is None else f" for {shorten(one.label)}"
    return f"stage {found.stage}, cluster {one.number}{aim}: {one.weight:.1%}"


def shorten(label: str) -> str:
    """Cut a label that would not fit onto a panel."""
    return label if len(label) <= _MAX_LETTERS else label[: _MAX_LETTERS - 1] + "…"


def _explain(findings: list[Finding]) -> str:
    if isinstance(findings[0], TokenRegions):
        return "each region is one token: small where the model looks closely"
    if any(one.label is not None for one in findings[0].clusters):
        return "for each of the largest classes the cluster that gathers most evidence for it, and where it lies"
    return "the clusters that gather most evidence for this answer, and where it lies"


def _paint_heat(canvas: Canvas, heat: Numbers) -> Pixels:
    """(Y, X, 3): the picture in grey, the hotter the more covered."""
    left, top, right, bottom = canvas.box
    relative = (heat / max(float(heat.max()), 1e-12) * 255).round().astype(np.uint8)  # no heat stays none
    enlarged = Image.fromarray(relative).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    painted = _dim(canvas)
    seen = painted[top:bottom, left:right].astype(np.float32)
    strength = np.asarray(enlarged)[: len(seen), : seen.shape[1]]
    grey = seen.mean(axis=2, keepdims=True) * 0.7 + seen * 0.3
    levels = np.linspace(0, 1, 256)
    cover = 0.85 * levels**0.6  # so that weak heat is seen, too
    added = (_mix(_HEAT, levels) * cover[:, None]).astype(np.float32)
    painted[top:bottom, left:right] = grey * (1 - cover).astype(np.float32)[strength][..., None] + added[strength]
    return painted


def _paint_regions(canvas: Canvas, found: TokenRegions) -> Pixels:
    """(Y, X, 3): the picture with borders between regions, coloured by their size on a logarithmic scale."""
    left, top, right, bottom = canvas.box
    painted = _dim(canvas)
    regions = _place_regions(found.regions, canvas.box, (len(painted) - top, painted.shape[1] - left))
    sizes = np.log(found.weights * found.regions.size)
    span = max(float(sizes.max()), 1e-9)  # of a region of one cell the logarithm is 0
    colours = (0.45 * _mix(_SIZES, sizes / span)).astype(np.float32)
    blended = np.float32(0.55) * painted[top:bottom, left:right] + colours[regions]
    is_border = np.zeros(regions.shape, bool)
    is_border[1:] |= regions[1:] != regions[:-1]
    is_border[:, 1:] |= regions[:, 1:] != regions[:, :-1]
    blended[is_border] = 0.5 * blended[is_border] + 0.5 * 255
    painted[top:bottom, left:right] = blended
    return painted


def _place_regions(regions: Regions, box: tuple[int, int, int, int], size: Size) -> Regions:
    """The region of each pixel of a picture in the box."""
    left, top, right, bottom = box
    rows, columns = (
        (np.arange(min(pixels, limit)) * cells) // pixels
        for pixels, limit, cells in zip((bottom - top, right - left), size, regions.shape, strict=True)
    )
    placed: Regions = regions[rows[:, None], columns]
    return placed


def _mix(stops: Numbers, share: Numbers) -> Numbers:
    """Colours between three stops: share in [0, 1] → one more axis."""
    place = np.asarray(share, np.float64)[..., None] * 2
    low = place < 1
    start, end = np.where(low, stops[0], stops[1]), np.where(low, stops[1], stops[2])
    mixed: Numbers = start + (end - start) * np.where(low, place, place - 1)
    return mixed


def _dim(canvas: Canvas) -> Pixels:
    """A copy of the picture, dark where the model did not see it."""
    left, top, right, bottom = canvas.box
    painted = (np.arange(256) * _DIMMED).astype(np.uint8)[canvas.pixels]
    painted[top:bottom, left:right] = canvas.pixels[top:bottom, left:right]
    return painted


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _encode(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=2)  # half the time of the default, a tenth more bytes
    return file.getvalue()
