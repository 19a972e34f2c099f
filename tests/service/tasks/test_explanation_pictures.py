import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.tasks.explanation_pictures import (
    PANEL_PIXELS,
    SIDE_PIXELS,
    Canvas,
    draw_heat,
    draw_regions,
    draw_sheet,
    read_canvas,
    read_scene,
    shorten,
)
from service.tasks.explanations import Cluster, PatchClusters, TokenRegions
from service.tasks.letterbox import LetterboxSpec, decode_letter
from service.tasks.pictures import PictureSpec, decode_picture

SPEC = PictureSpec(height=16, width=24, resize_shorter_side=32, interpolation="bilinear", max_pixels=4_000_000)
GREY = Canvas(np.full((100, 200, 3), 128, np.uint8), (50, 20, 150, 80))
HALVES = TokenRegions(2, (2, 2), np.array([[0, 1], [0, 1]]), np.array([0.5, 0.5]))


def write(pixels: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def read(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def make_ramp(height: int, width: int) -> Any:
    """A picture whose red is the row and whose green is the column."""
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, height)[:, None]
    ramp[..., 1] = np.linspace(0, 255, width)
    return ramp


@pytest.mark.parametrize("size", [(60, 90), (300, 200), (150, 400)])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_box_shows_what_the_model_saw(size: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = write(make_ramp(*size), exif=exif)
    canvas = read_canvas(body, SPEC, side=SIDE_PIXELS)
    left, top, right, bottom = canvas.box
    seen = Image.fromarray(canvas.pixels[top:bottom, left:right]).resize((24, 16), Image.Resampling.BOX)
    # Both come of the same pixels by two resizes; a box beside its place by a twentieth would show.
    np.testing.assert_allclose(np.asarray(seen).astype(int), decode_picture(body, SPEC), atol=14)
    height, width = canvas.pixels.shape[:2]
    assert max(height, width) == SIDE_PIXELS
    upright = size if orientation < 5 else size[::-1]
    assert height / width == pytest.approx(upright[0] / upright[1], rel=0.05)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 5)])
def test_pictures_of_any_shape_are_drawn(size: tuple[int, int]) -> None:
    canvas = read_canvas(write(make_ramp(*size)), SPEC, side=PANEL_PIXELS["patch_clusters"])
    left, top, right, bottom = canvas.box
    assert 0 <= left < right <= canvas.pixels.shape[1]
    assert 0 <= top < bottom <= canvas.pixels.shape[0]
    assert read(draw_heat(canvas, np.eye(4))).shape == canvas.pixels.shape
    assert read(draw_regions(canvas, HALVES)).shape == canvas.pixels.shape
    assert read(draw_sheet(canvas, [HALVES], title="a")).size


def test_heat_is_where_the_cluster_gathers_and_nowhere_else() -> None:
    heat = np.zeros((6, 10))
    heat[1, 7] = 0.5  # cells of the box have 10 x 10 pixels
    drawn = read(draw_heat(GREY, heat))
    covered = np.abs(drawn[20:80, 50:150] - 128).max(axis=2) > 25
    middle = covered.reshape(6, 10, 10, 10).mean((1, 3))
    assert middle[1, 7] == 1
    middle[0:3, 6:9] = 0  # a smooth map reaches into the neighbours
    assert not middle.any()
    red, green, blue = drawn[35, 125]
    assert red > green > blue


def test_a_cluster_without_heat_leaves_the_picture_uncovered() -> None:
    assert (read(draw_heat(GREY, np.zeros((6, 10))))[20:80, 50:150] == 128).all()


def test_what_the_model_did_not_see_is_dark() -> None:
    for png in (draw_heat(GREY, np.ones((6, 10))), draw_regions(GREY, HALVES)):
        drawn = read(png)
        drawn[20:80, 50:150] = 44
        assert (drawn == 44).all()  # 0.35 of 128


def test_regions_have_borders_between_them_and_none_within() -> None:
    seen = read(draw_regions(GREY, HALVES))[20:80, 50:150]
    is_border = (seen.min(axis=2) > 130).all(axis=0)
    assert np.flatnonzero(is_border).tolist() == [50]
    assert (seen[:, :50] == seen[0, 0]).all()


def test_small_regions_are_yellow_and_large_ones_violet() -> None:
    regions = np.zeros((6, 10), np.int64)
    regions[0, 0] = 1
    seen = read(draw_regions(GREY, TokenRegions(2, (6, 10), regions, np.array([59, 1]) / 60)))[20:80, 50:150]
    assert seen[4, 4, 0] > seen[4, 4, 2] + 60
    assert seen[40, 60, 2] > seen[40, 60, 1] + 15


def test_regions_are_nearest_cells_where_the_box_is_no_multiple_of_the_grid() -> None:
    canvas = Canvas(np.zeros((5, 7, 3), np.uint8), (0, 0, 7, 5))
    regions = np.arange(6).reshape(2, 3)
    drawn = read(draw_regions(canvas, TokenRegions(2, (2, 3), regions, np.full(6, 1 / 6))))
    assert (drawn[3] > 130).all()  # the border below rows 0 to 2
    assert (drawn[:, 3] > 130).all()
    assert (drawn[:, 5] > 130).all()
    assert not (drawn[0, [0, 1, 2, 4, 6]] > 130).all()


def test_a_sheet_shows_each_cluster_beside_the_picture() -> None:
    clusters = [Cluster(index, 0.2, np.eye(4)) for index in (3, 1, 2)]
    one = draw_sheet(GREY, [PatchClusters(1, (4, 4), clusters)], title="cat")
    two = draw_sheet(GREY, [PatchClusters(1, (4, 4), clusters), PatchClusters(2, (4, 4), clusters)], title="cat")
    assert read(two).shape[1] == read(one).shape[1] > 4 * 200  # the picture and three clusters
    assert read(two).shape[0] > read(one).shape[0] + 100
    other = draw_sheet(GREY, [PatchClusters(1, (4, 4), clusters)], title="dog")
    assert one != other


def test_a_sheet_of_regions_has_one_row() -> None:
    short = read(draw_sheet(GREY, [HALVES], title="cat"))
    long = read(draw_sheet(GREY, [HALVES] * 3, title="cat"))
    assert long.shape[0] == short.shape[0]
    assert long.shape[1] > short.shape[1]


# Scenes, which the model saw as a whole and beside a fill

LETTERBOX = LetterboxSpec(height=48, width=64, fill=(0, 0, 0), max_pixels=4_000_000)


@pytest.mark.parametrize("size", [(60, 90), (300, 100), (50, 400), (1, 1), (1, 3000), (3000, 1)], ids=str)
def test_the_box_of_a_scene_is_the_whole_input_of_the_model(size: tuple[int, int]) -> None:
    body = write(make_ramp(*size))
    letter = decode_letter(body, LETTERBOX)
    canvas = read_scene(body, LETTERBOX, letter.box, side=200)
    height, width = canvas.pixels.shape[:2]
    left, top, right, bottom = canvas.box
    assert max(height, width) == 200
    assert (left, top) == (0, 0)
    assert bottom == pytest.approx(height * 48 / letter.box[0], abs=0.5)
    assert right == pytest.approx(width * 64 / letter.box[1], abs=0.5)


def test_what_lies_beyond_the_picture_is_cut_off() -> None:
    scene = Canvas(np.full((60, 100, 3), 128, np.uint8), (0, 0, 200, 60))  # the left half of the input
    whole = Canvas(np.full((60, 200, 3), 128, np.uint8), (0, 0, 200, 60))
    heat = np.zeros((6, 20))
    heat[2, 4] = heat[3, 15] = 0.5
    np.testing.assert_array_equal(read(draw_heat(scene, heat)), read(draw_heat(whole, heat))[:, :100])
    found = TokenRegions(2, (6, 20), np.arange(120).reshape(6, 20) // 7, np.full(18, 1 / 18))
    np.testing.assert_array_equal(read(draw_regions(scene, found)), read(draw_regions(whole, found))[:, :100])


def test_an_answer_stands_before_the_picture() -> None:
    answer = np.full((100, 200, 3), (10, 200, 30), np.uint8)
    stages = [PatchClusters(stage, (4, 4), [Cluster(0, 0.2, np.eye(4), "road")]) for stage in (1, 2, 3)]
    for findings in (stages, [HALVES]):
        sheet = read(draw_sheet(GREY, findings, title="road 20%", answer=answer))  # type: ignore[arg-type]
        green = (sheet == (10, 200, 30)).all(axis=2)
        assert green.sum() == 100 * 200, "it is there once"
        assert green[84:184, 24:224].all()
        without = read(draw_sheet(GREY, findings, title="road 20%"))  # type: ignore[arg-type]
        assert not (without == (10, 200, 30)).all(axis=2).any()


def test_a_label_of_any_length_fits() -> None:
    assert shorten("road") == "road"
    assert len(shorten("x" * 200)) < 30
    assert shorten("x" * 200).endswith("…")
