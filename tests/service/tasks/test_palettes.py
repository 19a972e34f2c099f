import numpy as np
import pytest

from service.tasks.palettes import MAX_COLOURS, make_palette, to_oklab


def test_white_and_red_lie_where_the_source_puts_them() -> None:
    found = to_oklab(np.array([(255, 255, 255), (255, 0, 0), (0, 0, 0)], np.float64))
    expected = [(1, 0, 0), (0.627955, 0.224863, 0.125846), (0, 0, 0)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


# 0.02 is about what can just be seen side by side.
@pytest.mark.parametrize(("num_colours", "least"), [(12, 0.13), (20, 0.1), (150, 0.035), (MAX_COLOURS, 0.025)])
def test_colours_can_be_told_apart(num_colours: int, least: float) -> None:
    palette = make_palette(num_colours)
    assert len(set(palette)) == num_colours
    places = to_oklab(np.array([*palette, (0, 0, 0), (255, 255, 255)], np.float64))
    distances = np.linalg.norm(places[:, None] - places, axis=2)
    assert distances[np.triu_indices(len(places), 1)].min() > least


def test_a_shorter_palette_is_the_start_of_a_longer_one() -> None:
    assert make_palette(3) == make_palette(30)[:3]
