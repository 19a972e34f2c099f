import io

import numpy as np
import pytest
from PIL import Image

from service.tasks.letterbox import fit
from service.tasks.palettes import make_palette
from service.tasks.segmentation_picture import MAX_SIDE_PIXELS, Entry, draw_segmentation, lay_out

SIZES = [(1, 1), (15, 20), (360, 480), (480, 360), (200, 1600), (1, 65_535), (65_535, 1), (5480, 7300), (7300, 5480)]


def make_entries(number: int, label: str = "class") -> list[Entry]:
    palette = make_palette(number)
    return [Entry(f"{label} {index}", palette[index], 1 / number) for index in range(number)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("number", "label"), [(1, "a"), (11, "road"), (150, "a name of many words"), (256, "x" * 200)])
def test_a_drawing_of_any_shape_keeps_to_its_longest_side(size: tuple[int, int], number: int, label: str) -> None:
    layout = lay_out(size, make_entries(number, label))
    assert 0 < max(layout.size) <= MAX_SIDE_PIXELS
    picture = fit(size, layout.limit)
    assert picture[0] <= layout.size[0]
    assert picture[1] <= layout.size[1]
    assert max(picture) >= 250  # it can be looked at
    top, left = layout.legend
    assert top >= picture[0] or left >= picture[1]


def test_the_picture_is_blended_with_the_colours_of_its_classes() -> None:
    pixels = np.full((480, 640, 3), (100, 120, 140), np.uint8)
    mask = np.zeros((24, 32), np.uint8)
    mask[:, 16:] = 1
    palette = [(200, 0, 0), (0, 0, 250)]
    entries = [Entry("left", palette[0], 0.5), Entry("right", palette[1], 0.5)]
    layout = lay_out((24, 32), entries)
    assert fit((24, 32), layout.limit) == (480, 640)
    drawing = np.asarray(Image.open(io.BytesIO(draw_segmentation(pixels, mask, palette, entries, layout))))
    np.testing.assert_allclose(drawing[100, 100], (150, 60, 70), rtol=0, atol=1)
    np.testing.assert_allclose(drawing[470, 630], (50, 60, 195), rtol=0, atol=1)
    assert (drawing[:480, 320] < 80).all(), "a dark line runs between the classes"
    legend = drawing[:, 650:].reshape(-1, 3)
    for colour in palette:
        assert (legend == colour).all(axis=1).sum() > 100, "the legend shows each colour"


def test_the_legend_says_how_many_it_leaves_out() -> None:
    entries = make_entries(200)
    layout = lay_out((360, 480), entries)
    room = layout.num_rows * layout.num_columns
    assert room < 200
    pixels = np.zeros((*fit((360, 480), layout.limit), 3), np.uint8)
    mask = np.zeros((4, 4), np.uint8)
    palette = [entry.colour for entry in entries]
    drawing = np.asarray(Image.open(io.BytesIO(draw_segmentation(pixels, mask, palette, entries, layout))))
    legend = drawing[layout.legend[0] :].reshape(-1, 3)
    codes, counts = np.unique(legend @ np.array([1 << 16, 1 << 8, 1]), return_counts=True)
    seen = set(codes[counts > 100].tolist())
    shown = [(red << 16 | green << 8 | blue) in seen for red, green, blue in palette]
    assert shown == [index < room - 1 for index in range(200)]
