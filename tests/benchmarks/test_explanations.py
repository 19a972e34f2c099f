from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.explanations import (
    WAYS,
    Drops,
    ExplanationFinding,
    blank,
    draw_cells,
    find_region,
    measure_drops,
    render_explanations,
)
from service.sample import Arrays
from service.tasks.explanations import ClusteredStage, ExplanationSpec

STAGE = ClusteredStage(stage=1, grid=(4, 4))
EXPLANATION = ExplanationSpec(kind="patch_clusters", stages=(STAGE,))


class CornerRuntime:
    """A classifier that looks at the four pixels at the top left; its second cluster gathers there."""

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        corner = inputs["image"][:, :2, :2].astype(np.float32).mean((1, 2, 3)) / 32
        evidence = np.zeros((len(corner), 2, 4, 4), np.float32)
        evidence[:, 0, 0, 0] = corner
        clusters = np.full((len(corner), 2, 16), 1 / 16, np.float32)
        clusters[:, 1] = 0.01 / 15
        clusters[:, 1, 0] = 0.99
        found = {"logits": evidence.sum((2, 3)), "evidence": evidence, "clusters_stage1": clusters}
        return {name: found[name] for name in outputs}

    def close(self) -> None:
        """Nothing to close."""


def test_a_region_is_the_fewest_cells_with_half_of_the_heat() -> None:
    heat = np.array([[0.1, 0.3], [0.25, 0.35]])
    assert find_region(heat).tolist() == [[False, True], [False, True]]
    assert find_region(7 * heat).tolist() == find_region(heat).tolist()
    assert find_region(np.array([[0.6, 0.4]])).tolist() == [[True, False]]
    assert find_region(np.array([[0.25] * 4])).tolist() == [[True, True, False, False]]


def test_random_regions_have_as_many_cells() -> None:
    region = np.arange(24).reshape(4, 6) < 7
    drawn = [draw_cells(region, np.random.default_rng(seed)) for seed in range(5)]
    assert all(one.sum() == 7 and one.shape == (4, 6) for one in drawn)
    assert len({one.tobytes() for one in drawn}) == 5


def test_blanking_fills_the_pixels_of_the_region_s_cells_and_no_others() -> None:
    picture = np.random.default_rng(0).integers(0, 200, (8, 12, 3), np.uint8)
    region = np.zeros((4, 4), np.bool_)
    region[1, 2] = True
    blanked = blank(picture, region, np.array([250, 251, 252], np.uint8))
    assert (blanked[2:4, 6:9] == [250, 251, 252]).all()
    blanked[2:4, 6:9] = picture[2:4, 6:9]
    np.testing.assert_array_equal(blanked, picture)


def test_the_region_that_carries_the_answer_is_found_to_matter() -> None:
    pictures = np.full((3, 8, 8, 3), 200, np.uint8)
    black, rng = np.zeros(3, np.uint8), np.random.default_rng(1)
    drops = measure_drops(CornerRuntime(), pictures, EXPLANATION, STAGE, black, num_draws=16, rng=rng)  # type: ignore[arg-type]
    assert drops.cells == (1 / 16,) * 3
    expected = 1 / (1 + np.exp(-200 / 32)) - 0.5
    assert drops.top == pytest.approx([expected] * 3, rel=1e-6)
    assert all(0 <= one < 0.5 * expected for one in drops.random)  # one draw in sixteen hits the corner
    assert drops.share_won == 1


def test_the_table_tells_falls_their_ratio_and_the_cost() -> None:
    drops = Drops(stage=2, cells=(0.1, 0.2), top=(0.3, 0.1), random=(0.1, 0.1))
    seconds = dict(zip(WAYS, ([0.004, 0.006, 0.005], [0.05], [0.03]), strict=True))
    text = render_explanations(ExplanationFinding(num_draws=20, drops=[drops], cpu_seconds=seconds))
    assert "| 2 | 15.0% | 0.2000 | 0.1000 | 2.00 | 0.1000 | 0.1000 | 50.0% |" in text
    assert "2 pictures of test_dev, 20 random regions each." in text
    assert "| predictions only | 5.0 | 0.0 |" in text
    assert "| explained, JSON | 50.0 | 45.0 |" in text
