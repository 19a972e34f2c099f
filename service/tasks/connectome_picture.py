"""A picture of a connectome: its regions ordered by the communities that a model put them in, and these beside it.

From left to right: the hierarchy, coarsest level first, each block as high as its regions; the names of the regions;
the matrix, with a frame around each community. Blocks, names and frames share the colour of the coarsest community.
"""

import colorsys
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

MAX_SIDE_PIXELS = 2_048

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Pixels = npt.NDArray[np.uint8]

_MAX_CELL_PIXELS = 12
_MIN_NAMED_PIXELS = 7  # names in smaller cells cannot be read
_MARGIN, _HEADER, _FOOTER = 28, 92, 74
_BLOCK_PIXELS, _LABELLED_BLOCK_PIXELS = 38, 104  # width of a finer and of the coarsest level
_MAX_NAME_PIXELS, _MAX_NAME_CHARACTERS = 240, 60

_INK, _FAINT, _PAPER = (38, 38, 46), (120, 122, 132), (255, 255, 255)
_BETWEEN = (176, 180, 188)  # an edge between communities
_POSITIVE, _NEGATIVE = (178, 24, 43), (33, 102, 172)  # ends of ColorBrewer's RdBu
# Okabe and Ito's colours that can be told apart by everyone, without yellow, which is too light for text.
_COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0))


class Drawing(NamedTuple):
    """What is drawn.

    Attributes:
        title, subtitle, notice: lines above and below.
        matrix: (R, R).
        is_graph: whether the matrix has edges, 0 or 1, rather than strengths.
        regions: R names.
        levels: of each level, finest first, the community of each region.
    """

    title: str
    subtitle: str
    notice: str
    matrix: npt.NDArray[np.float32]
    is_graph: bool
    regions: Sequence[str]
    levels: Sequence[Sequence[int]]


class _Layout(NamedTuple):
    """Where things are, in pixels: a cell's side, the left edges of names and matrix, the sides of the whole."""

    cell: int
    names: int
    matrix: int
    width: int
    height: int


class _Block(NamedTuple):
    """Regions of one community, in the order of the picture: rows `start` to `end`, `parent` its coarsest community."""

    start: int
    end: int
    community: int
    parent: int


def draw_connectome(drawing: Drawing) -> bytes:
    """Draw a PNG, no side longer than `MAX_SIDE_PIXELS` for up to 900 regions.

    Args:
        drawing: with at least one level.
    """
    levels = np.array(drawing.levels[::-1])  # coarsest first
    order = np.lexsort(levels[::-1])  # by the coarsest, then the finer ones; equals keep the atlas's order
    blocks = [_find_blocks(level[order], levels[0][order]) for level in levels]
    colours = {block.community: _colour(number) for number, block in enumerate(blocks[0])}
    layout = _lay_out(drawing, len(levels))
    picture = Image.new("RGB", (layout.width, layout.height), _PAPER)
    canvas = ImageDraw.Draw(picture)
    _draw_hierarchy(canvas, blocks, colours, layout)
    if layout.cell >= _MIN_NAMED_PIXELS:
        _draw_names(canvas, [drawing.regions[index] for index in order], levels[0][order], colours, layout)
    cells = _paint(drawing, order, levels[0][order], colours)
    picture.paste(
        Image.fromarray(cells.repeat(layout.cell, axis=0).repeat(layout.cell, axis=1)), (layout.matrix, _HEADER)
    )
    _draw_frames(canvas, blocks, colours, layout)
    _draw_texts(canvas, drawing, layout)
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=2)
    return file.getvalue()


def _lay_out(drawing: Drawing, num_levels: int) -> _Layout:
    num_regions = len(drawing.regions)
    hierarchy = _LABELLED_BLOCK_PIXELS + _BLOCK_PIXELS * (num_levels - 1)
    room = MAX_SIDE_PIXELS - max(2 * _MARGIN + hierarchy + _MAX_NAME_PIXELS, _HEADER + _FOOTER)
    cell = min(max(room // num_regions, 1), _MAX_CELL_PIXELS)
    names = 0
    if cell >= _MIN_NAMED_PIXELS:
        font = _font(cell)
        names = min(max(int(font.getlength(_one_line(name))) for name in drawing.regions) + 14, _MAX_NAME_PIXELS)
    left = _MARGIN + hierarchy
    side = num_regions * cell
    width = max(left + names + 8 + side + _MARGIN, 640)  # the texts of a small matrix need some room, too
    return _Layout(cell, left, left + names + 8, width, _HEADER + side + _FOOTER)


def _find_blocks(level: npt.NDArray[np.int64], parents: npt.NDArray[np.int64]) -> list[_Block]:
    starts = np.flatnonzero(np.diff(level, prepend=-1) | np.diff(parents, prepend=-1))
    ends = [*starts[1:], len(level)]
    return [_Block(int(a), int(b), int(level[a]), int(parents[a])) for a, b in zip(starts, ends, strict=True)]


def _draw_hierarchy(
    canvas: ImageDraw.ImageDraw, blocks: list[list[_Block]], colours: dict[int, Colour], layout: _Layout
) -> None:
    left = _MARGIN
    for depth, level in enumerate(blocks):
        width = _LABELLED_BLOCK_PIXELS if depth == 0 else _BLOCK_PIXELS
        for number, block in enumerate(level):
            top, bottom = (_HEADER + row * layout.cell for row in (block.start, block.end))
            # Neighbours in a finer level alternate between two tints of their community's colour.
            colour = _mix(colours[block.parent], _PAPER, 0.28 + 0.27 * (number % 2) if depth else 0)
            canvas.rounded_rectangle((left, top + 1, left + width - 4, bottom - 2), 4, fill=colour)
            if depth == 0 and bottom - top >= 40:
                text = f"community {block.community}\n{block.end - block.start} regions"
                middle = (left + (width - 4) / 2, (top + bottom) / 2)
                canvas.multiline_text(middle, text, _PAPER, _font(14), anchor="mm", align="center", spacing=5)
            elif depth == 0 and bottom - top >= 14:
                middle = (left + (width - 4) / 2, (top + bottom) / 2)
                canvas.text(middle, f"{block.community}", _PAPER, _font(12), anchor="mm")
        left += width


def _draw_names(
    canvas: ImageDraw.ImageDraw,
    names: list[str],
    communities: npt.NDArray[np.int64],
    colours: dict[int, Colour],
    layout: _Layout,
) -> None:
    font = _font(layout.cell)
    for row, (name, community) in enumerate(zip(names, communities.tolist(), strict=True)):
        shown = _one_line(name)
        while font.getlength(shown) > _MAX_NAME_PIXELS - 14:
            shown = shown[:-2] + "…"
        middle = (layout.matrix - 8, _HEADER + (row + 0.5) * layout.cell)
        canvas.text(middle, shown, _mix(colours[community], _INK, 0.45), font, anchor="rm")


def _paint(
    drawing: Drawing, order: npt.NDArray[np.int64], communities: npt.NDArray[np.int64], colours: dict[int, Colour]
) -> Pixels:
    """Colour the cells of the ordered matrix: (R, R, 3)."""
    matrix = drawing.matrix[order][:, order]
    own = np.array([colours[community] for community in communities.tolist()], np.float64)
    is_inside = (communities[:, None] == communities)[..., None]
    if drawing.is_graph:
        paper = np.where(is_inside, own[:, None] + 0.9 * (255 - own[:, None]), 255.0)
        return np.where(matrix[..., None] > 0, np.where(is_inside, own[:, None], _BETWEEN), paper).astype(np.uint8)
    share = np.abs(matrix / _scale(matrix)).clip(max=1)[..., None]
    ends = np.where(matrix[..., None] > 0, _POSITIVE, _NEGATIVE)
    painted: Pixels = (255 + share * (ends - 255)).astype(np.uint8)
    return painted


def _scale(matrix: npt.NDArray[np.float32]) -> float:
    """Strength that is drawn in full colour: few are stronger, and the diagonal does not count."""
    pairs = np.abs(matrix[np.triu_indices(len(matrix), 1)])
    return max(float(np.quantile(pairs, 0.98)), 1e-6)


def _draw_frames(
    canvas: ImageDraw.ImageDraw, blocks: list[list[_Block]], colours: dict[int, Colour], layout: _Layout
) -> None:
    def frame(block: _Block, colour: Colour, width: int) -> None:
        start, end = block.start * layout.cell, block.end * layout.cell
        corners = (layout.matrix + start, _HEADER + start, layout.matrix + end - 1, _HEADER + end - 1)
        canvas.rectangle(corners, outline=colour, width=width)

    for level in blocks[:0:-1]:
        for block in level:
            if block.end - block.start > 1:
                frame(block, _mix(colours[block.parent], _INK, 0.5), 1)
    for block in blocks[0]:
        frame(block, _mix(colours[block.parent], _INK, 0.25), 3)
    side = blocks[0][-1].end * layout.cell
    canvas.rectangle((layout.matrix - 1, _HEADER - 1, layout.matrix + side, _HEADER + side), outline=_FAINT)


def _draw_texts(canvas: ImageDraw.ImageDraw, drawing: Drawing, layout: _Layout) -> None:
    title, subtitle, notice = (" ".join(text.split()) for text in (drawing.title, drawing.subtitle, drawing.notice))
    canvas.text((_MARGIN, 22), title, _INK, _font(24), anchor="lt")
    canvas.text((_MARGIN, 56), subtitle, _FAINT, _font(15), anchor="lt")
    bottom = layout.height - _FOOTER
    left, middle = layout.matrix, bottom + 22
    if drawing.is_graph:
        legend = [(_COLOURS[0], "edge inside a community, in its colour"), (_BETWEEN, "edge between communities")]
    else:
        scale = _scale(drawing.matrix)
        legend = [(_NEGATIVE, f"-{scale:.2f} and below"), (_POSITIVE, f"{scale:.2f} and above")]
    for colour, text in legend:
        canvas.rectangle((left, middle - 6, left + 12, middle + 6), fill=colour)
        canvas.text((left + 20, middle), text, _FAINT, _font(13), anchor="lm")
        left += 50 + int(_font(13).getlength(text))
    canvas.text((_MARGIN, bottom + 50), notice, _FAINT, _font(13), anchor="lm")


def _one_line(name: str) -> str:
    """What can be shown of a name; Pillow refuses to measure more than one line."""
    return " ".join(name.split())[:_MAX_NAME_CHARACTERS]


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _colour(number: int) -> Colour:
    """The colour of the n-th coarsest community; beyond those chosen by hand, hues as far apart as can be."""
    if number < len(_COLOURS):
        return _COLOURS[number]
    red, green, blue = colorsys.hls_to_rgb(number * 0.618034 % 1, 0.42, 0.55)  # steps of the golden ratio
    return int(red * 255), int(green * 255), int(blue * 255)


def _mix(colour: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (int(one + (two - one) * share) for one, two in zip(colour, other, strict=True))
    return red, green, blue
