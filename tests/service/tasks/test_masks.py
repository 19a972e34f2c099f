import io
import tracemalloc
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from service.tasks import masks
from service.tasks.masks import Mask, count_pixels, count_runs, encode_mask, encode_painted_mask, find_mask

Logits = npt.NDArray[np.float32]


def make_logits(L: int, Y: int, X: int, *, seed: int = 0) -> Logits:
    return np.random.default_rng(seed).normal(size=(L, Y, X)).astype(np.float32)


def make_mask(height: int, width: int, *, num_classes: int = 5, seed: int = 0) -> Mask:
    return np.random.default_rng(seed).integers(0, num_classes, (height, width), np.uint8)


def interpolate_slowly(logits: Logits, extent: tuple[float, float], size: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Scores of each pixel, (L, rows, columns), pixel by pixel in float64."""
    scores = np.empty((len(logits), *size))
    last_row, last_column = int(np.ceil(extent[0])) - 1, int(np.ceil(extent[1])) - 1
    for row in range(size[0]):
        for column in range(size[1]):
            y = min(max((row + 0.5) * extent[0] / size[0] - 0.5, 0), last_row)
            x = min(max((column + 0.5) * extent[1] / size[1] - 0.5, 0), last_column)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, last_row), min(left + 1, last_column)
            v, u = y - top, x - left
            scores[:, row, column] = (
                (1 - v) * (1 - u) * logits[:, top, left].astype(np.float64)
                + (1 - v) * u * logits[:, top, right]
                + v * (1 - u) * logits[:, bottom, left]
                + v * u * logits[:, bottom, right]
            )
    return scores


@pytest.mark.parametrize(
    ("extent", "size"),
    [
        ((6.0, 8.0), (24, 32)),
        ((6.0, 8.0), (37, 51)),
        ((6.0, 8.0), (5, 7)),
        ((6.0, 8.0), (1, 1)),
        ((4.25, 8.0), (33, 64)),
        ((6.0, 0.25), (60, 1)),
        ((0.25, 8.0), (1, 90)),
        ((0.25, 0.25), (3, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("L", [2, 5])
def test_each_pixel_has_the_class_whose_interpolated_score_is_highest(
    extent: tuple[float, float], size: tuple[int, int], L: int
) -> None:
    logits = make_logits(L, 6, 8)
    scores = interpolate_slowly(logits, extent, size)
    mask = find_mask(logits, extent, size)
    assert mask.shape == size
    assert mask.dtype == np.uint8
    # float32 may choose another class where two scores agree to 1e-5.
    chosen = np.take_along_axis(scores, mask[None].astype(np.intp), axis=0)[0]
    assert (scores.max(axis=0) - chosen).max() < 1e-5
    assert len(np.unique(mask)) == len(np.unique(scores.argmax(axis=0)))


@pytest.mark.parametrize("size", [(24, 32), (100, 130), (9, 8)])
def test_it_is_what_pytorch_interpolates(size: tuple[int, int]) -> None:
    logits = make_logits(4, 6, 8, seed=1)
    resized = torch.nn.functional.interpolate(torch.from_numpy(logits)[None], size=size, mode="bilinear")[0]
    top = resized.topk(2, dim=0).values
    is_clear = (top[0] - top[1] > 1e-5).numpy()
    assert is_clear.mean() > 0.99
    expected = resized.argmax(dim=0).numpy()
    np.testing.assert_array_equal(find_mask(logits, (6, 8), size)[is_clear], expected[is_clear])


def test_of_equal_scores_the_lowest_class_wins() -> None:
    logits = make_logits(3, 4, 4)
    np.testing.assert_array_equal(
        find_mask(logits[[0, 1, 2, 1, 0]], (4, 4), (20, 20)), find_mask(logits, (4, 4), (20, 20))
    )


def test_a_class_that_wins_only_between_cells_is_found() -> None:
    logits = np.array([[[4, 0]], [[0, 4]], [[3, 3]]], np.float32)
    np.testing.assert_array_equal(find_mask(logits, (1, 2), (1, 12)), [[0, 0, 0, 0, 0, 2, 2, 1, 1, 1, 1, 1]])


def test_what_lies_beyond_the_picture_decides_nothing() -> None:
    logits = make_logits(3, 6, 8)
    other = logits.copy()
    other[:, 4:] = 100
    other[:, :, 5:] = -100
    size = (50, 60)
    np.testing.assert_array_equal(find_mask(other, (3.5, 4.75), size), find_mask(logits, (3.5, 4.75), size))


@pytest.mark.parametrize("num_numbers", [1, 7, 100, 1000])
def test_strips_of_any_size_join_to_the_whole(monkeypatch: pytest.MonkeyPatch, num_numbers: int) -> None:
    logits = make_logits(4, 6, 8)
    whole = find_mask(logits, (5.5, 8), (61, 83))
    monkeypatch.setattr(masks, "_MAX_NUMBERS", num_numbers)
    np.testing.assert_array_equal(find_mask(logits, (5.5, 8), (61, 83)), whole)


@pytest.mark.parametrize("size", [(2000, 2000), (60, 65_535), (65_535, 60)])
def test_memory_is_bounded_by_the_mask_whatever_the_number_of_classes(size: tuple[int, int]) -> None:
    logits = make_logits(64, 2, 2)
    tracemalloc.start()
    try:
        mask = find_mask(logits, (2, 2), size)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(np.unique(mask)) > 2
    assert peak < mask.nbytes + 40e6  # all scores would be 64 x 4 bytes a pixel, 1 GB


def test_pixels_are_counted() -> None:
    mask = make_mask(1200, 1000)
    np.testing.assert_array_equal(count_pixels(mask, 7), [*np.unique(mask, return_counts=True)[1], 0, 0])


# Encodings


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (37, 41)])
def test_a_mask_is_read_back_from_its_png(size: tuple[int, int]) -> None:
    mask = make_mask(*size, num_classes=256)
    image = Image.open(io.BytesIO(encode_mask(mask)))
    assert (image.format, image.mode) == ("PNG", "L")
    np.testing.assert_array_equal(np.asarray(image), mask, strict=True)


def test_a_painted_mask_holds_classes_and_shows_their_colours() -> None:
    mask = make_mask(20, 30, num_classes=3)
    palette = [(255, 0, 0), (1, 2, 3), (0, 128, 255)]
    image = Image.open(io.BytesIO(encode_painted_mask(mask, palette)))
    assert (image.format, image.mode) == ("PNG", "P")
    np.testing.assert_array_equal(np.asarray(image), mask, strict=True)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.array(palette)[mask])


def read_runs(counts: list[int], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """As COCO's API reads them."""
    pixels = np.zeros(size[0] * size[1], bool)
    ends = np.cumsum([0, *counts])
    for number, (start, end) in enumerate(pairwise(ends)):
        pixels[start:end] = number % 2
    assert ends[-1] == len(pixels)
    return pixels.reshape(size[::-1]).T


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (17, 23)])
@pytest.mark.parametrize("num_classes", [1, 2, 6])
def test_a_mask_is_read_back_from_its_runs(size: tuple[int, int], num_classes: int) -> None:
    mask = make_mask(*size, num_classes=num_classes)
    classes = np.unique(mask).tolist()
    for index, counts in zip(classes, count_runs(mask, classes), strict=True):
        assert all(count > 0 for count in counts[1:])
        np.testing.assert_array_equal(read_runs(counts, size), mask == index)


def test_runs_go_down_the_columns_and_start_with_what_is_not_of_the_class() -> None:
    mask = np.array([[0, 3, 3], [0, 3, 0]], np.uint8)
    assert count_runs(mask, [0, 3]) == [[0, 2, 3, 1], [2, 3, 1]]
