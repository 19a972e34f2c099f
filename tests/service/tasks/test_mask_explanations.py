import math
from typing import Any

import numpy as np
import pytest

from service.errors import ModelFailed
from service.tasks.explanations import ClusteredStage, ExplanationSpec, PatchClusters, TokenRegions
from service.tasks.mask_explanations import find_mask_clusters, measure_margins

RNG = np.random.default_rng(8)
WHOLE = (1.0, 1.0)
PATCHES = ExplanationSpec(
    kind="patch_clusters", stages=(ClusteredStage(stage=1, grid=(4, 6)), ClusteredStage(stage=2, grid=(2, 3)))
)
TOKENS = ExplanationSpec(kind="token_regions", stages=(ClusteredStage(stage=2, grid=(4, 6)),))


def make_outputs(**changes: Any) -> dict[str, Any]:
    clusters = RNG.dirichlet(np.ones(24), 5)
    coarse = clusters.reshape(5, 2, 2, 3, 2).sum((2, 4)).reshape(5, 6)
    logits = RNG.normal(size=(3, 4, 6)).astype(np.float32)
    return {"logits": logits, "clusters_stage1": clusters, "clusters_stage2": coarse} | changes


def test_margins_are_those_of_a_plain_loop() -> None:
    logits = RNG.normal(size=(4, 3, 5)) * 3
    winners, margins = measure_margins(logits, part=WHOLE)
    for y in range(3):
        for x in range(5):
            scores = logits[:, y, x].tolist()
            best = scores.index(max(scores))
            others = [score for index, score in enumerate(scores) if index != best]
            mean = sum(math.exp(one) * one for one in others) / sum(math.exp(one) for one in others)
            assert winners[y, x] == best
            assert margins[y, x] == pytest.approx(scores[best] - mean, rel=1e-12)


def test_margins_are_exact_where_exponentials_would_overflow_or_vanish() -> None:
    logits = np.array([[[3000.0, 0.0]], [[-3000.0, 0.0]], [[-3000.0, -4000.0]]])
    winners, margins = measure_margins(logits, part=WHOLE)
    assert winners.tolist() == [[0, 0]]  # of equal logits the lowest index
    assert margins.tolist() == [[6000.0, 0.0]]


def test_a_cell_counts_as_far_as_it_shows_the_picture() -> None:
    logits = np.zeros((2, 4, 5))
    logits[1] = 2
    _, margins = measure_margins(logits, part=(0.375, 0.5))  # 1.5 of 4 rows, 2.5 of 5 columns
    np.testing.assert_allclose(margins, 2 * np.outer([1, 0.5, 0, 0], [1, 1, 0.5, 0, 0]), atol=1e-12)


def test_a_class_s_cluster_is_the_one_that_gathers_most_of_its_margins() -> None:
    outputs = make_outputs()
    found = find_mask_clusters(outputs, PATCHES, part=WHOLE, targets={2: "tree", 0: "sky"})[0]
    winners, margins = measure_margins(outputs["logits"], part=WHOLE)
    assert isinstance(found, PatchClusters)
    assert [one.label for one in found.clusters] == ["tree", "sky"]
    for one, target in zip(found.clusters, (2, 0), strict=True):
        gathered = [
            sum(row[6 * y + x] * margins[y, x] for y in range(4) for x in range(6) if winners[y, x] == target)
            for row in outputs["clusters_stage1"]
        ]
        assert one.number == int(np.argmax(gathered))
        assert one.weight == pytest.approx(max(gathered) / sum(gathered), rel=1e-6)  # margins pass through float32
        assert one.heat[winners != target].max() == 0
        assert one.heat.sum() == pytest.approx(1)


def test_a_coarser_stage_sees_the_mean_of_its_patches() -> None:
    outputs = make_outputs()
    outputs["logits"][:] = 0
    outputs["logits"][1, :2, :2] = 8  # one patch of stage 2
    found = find_mask_clusters(outputs, PATCHES, part=WHOLE, targets={1: "car"})[1]
    assert isinstance(found, PatchClusters)
    assert found.grid == (2, 3)
    heat = found.clusters[0].heat
    assert heat[0, 0] == heat.max() > 0.5


def test_what_shows_no_picture_is_no_evidence() -> None:
    outputs = make_outputs()
    other = outputs["logits"].copy()
    other[:, 2:] = RNG.normal(size=(3, 2, 6))
    first, second = (
        find_mask_clusters(outputs | {"logits": logits}, PATCHES, part=(0.5, 1.0), targets={1: "car"})[0]
        for logits in (outputs["logits"], other)
    )
    assert isinstance(first, PatchClusters)
    assert isinstance(second, PatchClusters)
    assert first.clusters[0].weight == second.clusters[0].weight
    np.testing.assert_array_equal(first.clusters[0].heat, second.clusters[0].heat)


def test_tokens_count_where_they_show_the_picture() -> None:
    cells = np.arange(24, dtype=np.int32) // 6 * 10
    cells[1] = 99
    found = find_mask_clusters({"clusters_stage2": cells}, TOKENS, part=(0.4, 1.0), targets={})[0]  # 1.6 of 4 rows
    assert isinstance(found, TokenRegions)
    np.testing.assert_allclose(found.weights, [5 / 12, 6 / 12, 1 / 12])
    assert found.regions[:2].tolist() == [[0, 2, 0, 0, 0, 0], [1] * 6]
    assert found.regions.shape == found.grid == (4, 6)


@pytest.mark.parametrize("share", [1 / 3, 2 / 3, 0.7, 0.1])
def test_rounding_adds_no_row_to_the_part_that_shows_the_picture(share: float) -> None:
    stage = ClusteredStage(stage=2, grid=(30, 1))
    spec = ExplanationSpec(kind="token_regions", stages=(stage,))
    found = find_mask_clusters({"clusters_stage2": np.arange(30)}, spec, part=(share, 1.0), targets={})[0]
    assert isinstance(found, TokenRegions)
    assert len(found.weights) == round(30 * share)


def test_outputs_that_mean_nothing_are_the_model_s_failure() -> None:
    with pytest.raises(ModelFailed, match="2 x 3 patches in each cluster of stage 2"):
        find_mask_clusters(make_outputs(clusters_stage2=np.ones((5, 7))), PATCHES, part=WHOLE, targets={0: "sky"})
    with pytest.raises(ModelFailed, match="4 x 6 cells of stage 2"):
        find_mask_clusters({"clusters_stage2": np.zeros(23, np.int32)}, TOKENS, part=WHOLE, targets={})
