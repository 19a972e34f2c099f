import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.tasks.connectome_picture import MAX_SIDE_PIXELS, Drawing, draw_connectome

ORANGE, BLUE, GREY, WHITE = (213, 94, 0), (0, 114, 178), (176, 180, 188), (255, 255, 255)
CELL = 12


def make_drawing(**facts: Any) -> Drawing:
    """Two communities, of every second region each; edges within both but for one pair, and one between them."""
    matrix = np.zeros((8, 8), np.float32)
    matrix[::2, ::2] = matrix[1::2, 1::2] = 1
    matrix[0, 2] = matrix[2, 0] = 0
    matrix[0, 7] = matrix[7, 0] = 1
    np.fill_diagonal(matrix, 0)
    usual = {
        "title": "control",
        "subtitle": "an atlas",
        "notice": "no use",
        "matrix": matrix,
        "is_graph": True,
        "regions": [f"region {number}" for number in range(8)],
        "levels": [[0, 1, 0, 1, 2, 3, 2, 3], [0, 1, 0, 1, 0, 1, 0, 1]],
    }
    return Drawing(**usual | facts)


def draw(drawing: Drawing) -> Image.Image:
    picture = Image.open(io.BytesIO(draw_connectome(drawing)))
    picture.load()
    assert (picture.format, picture.mode) == ("PNG", "RGB")
    assert max(picture.size) <= MAX_SIDE_PIXELS
    return picture


def find_matrix(picture: Image.Image) -> tuple[int, int]:
    """The upper left corner of the matrix: where its frame, as thick as three pixels in a darker blue, begins."""
    pixels = np.asarray(picture).astype(int)
    is_frame = (np.abs(pixels - np.array([9, 95, 145])) <= 1).all(axis=2)
    rows, columns = np.nonzero(is_frame)
    return int(rows.min()), int(columns.min())


def read_cells(picture: Image.Image, num_regions: int) -> list[list[tuple[int, ...]]]:
    """The colour of each cell, off its middle, where no frame is."""
    top, left = find_matrix(picture)
    middle = CELL // 2
    return [
        [picture.getpixel((left + column * CELL + middle, top + row * CELL + middle)) for column in range(num_regions)]
        for row in range(num_regions)
    ]


def test_cells_are_ordered_by_the_coarsest_then_the_finer_communities() -> None:
    drawing = make_drawing()
    cells = read_cells(draw(drawing), 8)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    for row, one in enumerate(order):
        for column, two in enumerate(order):
            is_inside = (row < 4) == (column < 4)
            if drawing.matrix[one, two]:
                expected = (BLUE if row < 4 else ORANGE) if is_inside else GREY
                assert cells[row][column] == expected
            else:
                assert cells[row][column] not in (BLUE, ORANGE, GREY)
                assert (cells[row][column] == WHITE) is not is_inside


def test_the_order_within_a_community_is_that_of_its_finer_ones() -> None:
    picture = draw(make_drawing(levels=[[1, 3, 0, 3, 0, 2, 1, 2], [0, 1, 0, 1, 0, 1, 0, 1]]))
    is_edge = [[cell == BLUE for cell in row[:4]] for row in read_cells(picture, 8)[:4]]
    order = [2, 4, 0, 6]  # regions of community 0, then of 1
    assert is_edge == [[one != two and {one, two} != {0, 2} for two in order] for one in order]


def test_the_hierarchy_beside_the_matrix_has_a_block_for_each_community() -> None:
    picture = draw(make_drawing())
    top, _ = find_matrix(picture)
    pixels = np.asarray(picture)
    for colour, rows in ((BLUE, range(4)), (ORANGE, range(4, 8))):
        is_block = (pixels[:, 30:130] == colour).all(axis=2).any(axis=1)
        for row in range(8):
            assert is_block[top + row * CELL + CELL // 2] == (row in rows)
    finer = pixels[top : top + 8 * CELL, 28 + 104 + 17]  # the middle of the second column of blocks
    runs = [tuple(colour) for number, colour in enumerate(finer.tolist()) if number % (2 * CELL) == CELL]
    assert len(set(runs)) == 4
    assert WHITE not in runs


def test_names_are_shown_beside_the_matrix_where_they_can_be_read() -> None:
    def ink(picture: Image.Image) -> int:
        top, left = find_matrix(picture)
        return int((np.asarray(picture)[top : top + 8 * CELL, left - 24 : left - 6] != 255).sum())

    names = ink(draw(make_drawing()))
    assert names > 100
    assert ink(draw(make_drawing(regions=[""] * 8))) == 0
    assert names != ink(draw(make_drawing(regions=["x"] * 8)))


def test_strengths_are_red_and_blue_on_white() -> None:
    matrix = np.zeros((8, 8), np.float32)
    matrix[0, 2] = matrix[2, 0] = 0.8
    matrix[0, 4] = matrix[4, 0] = -0.8
    matrix[0, 6] = matrix[6, 0] = 0.2
    cells = read_cells(draw(make_drawing(matrix=matrix, is_graph=False)), 8)
    strong, negative, weak, none = cells[0][1], cells[0][2], cells[0][3], cells[0][5]
    assert strong == (178, 24, 43)
    assert negative == (33, 102, 172)
    assert strong[2] < weak[2] < 255
    assert none == WHITE


@pytest.mark.parametrize("num_regions", [2, 3, 90, 116, 190, 360, 1000])
@pytest.mark.parametrize("is_graph", [True, False])
def test_every_number_of_regions_fits(num_regions: int, is_graph: bool) -> None:
    rng = np.random.default_rng(num_regions)
    coarse = rng.integers(0, 4, 60)
    fine = rng.integers(0, 60, num_regions)
    picture = draw(
        Drawing(
            title="x" * 300,
            subtitle="",
            notice="two\nlines " * 40,
            matrix=rng.integers(0, 2, (num_regions, num_regions)).astype(np.float32),
            is_graph=is_graph,
            regions=["a very long name of a region that nobody could read\nin full " * 9] * num_regions,
            levels=[fine.tolist(), coarse[fine].tolist()],
        )
    )
    assert min(picture.size) > num_regions


def test_each_of_many_communities_has_its_own_colour() -> None:
    numbers = list(range(40))
    picture = draw(make_drawing(matrix=np.zeros((40, 40), np.float32), regions=[""] * 40, levels=[numbers, numbers]))
    column = np.asarray(picture)[:, 40]  # left of the labels of the coarsest level
    assert len({tuple(colour) for colour in column[92 + 6 : 92 + 40 * CELL : CELL].tolist()}) == 40


def test_one_level_and_one_community_can_be_drawn() -> None:
    assert draw(make_drawing(levels=[[3] * 8])).width > 600
    assert draw(make_drawing(levels=[[0] * 8] * 5)).width > 600


def test_the_same_connectome_gives_the_same_file() -> None:
    assert draw_connectome(make_drawing()) == draw_connectome(make_drawing())
