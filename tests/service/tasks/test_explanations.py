from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from service.errors import ModelFailed
from service.tasks.explanations import (
    NUM_SHOWN,
    ClusteredStage,
    ExplanationSpec,
    PatchClusters,
    TokenRegions,
    contrast_evidence,
    find_clusters,
    spread,
    weigh_clusters,
)

RNG = np.random.default_rng(4)
PATCHES = ExplanationSpec(kind="patch_clusters", stages=(ClusteredStage(stage=2, grid=(4, 6)),))
TOKENS = ExplanationSpec(kind="token_regions", stages=(ClusteredStage(stage=3, grid=(2, 3)),))


def make_clusters(num_clusters: int = 5, num_patches: int = 24) -> Any:
    scores = np.exp(RNG.normal(size=(num_clusters, num_patches)))
    return (scores / scores.sum(1, keepdims=True)).astype(np.float32)


def make_outputs(**changes: Any) -> dict[str, Any]:
    evidence = RNG.normal(size=(3, 2, 3)).astype(np.float32)
    return {"logits": evidence.sum((1, 2)), "evidence": evidence, "clusters_stage2": make_clusters()} | changes


def test_the_spec_names_the_outputs_that_it_needs() -> None:
    assert PATCHES.outputs == ("evidence", "clusters_stage2")
    assert TOKENS.outputs == ("clusters_stage3",)


@pytest.mark.parametrize("fields", [{"kind": "patches"}, {"stages": ()}, {"stages": ({"stage": 0, "grid": (1, 1)},)}])
def test_a_spec_that_means_nothing_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ExplanationSpec.model_validate({"kind": "patch_clusters", "stages": ({"stage": 1, "grid": (1, 1)},)} | fields)


def test_evidence_is_taken_against_the_rivals_by_their_probability_among_themselves() -> None:
    evidence, logits = RNG.normal(size=(3, 2, 2)), np.array([4.0, np.log(3.0), 0.0])
    expected = evidence[0] - (0.75 * evidence[1] + 0.25 * evidence[2])
    np.testing.assert_allclose(contrast_evidence(evidence, logits, target=0), expected, rtol=1e-12)


def test_what_all_classes_share_is_no_evidence_for_one() -> None:
    evidence, logits = RNG.normal(size=(4, 3, 3)), RNG.normal(size=4)
    shared = RNG.normal(size=(3, 3))
    np.testing.assert_allclose(
        contrast_evidence(evidence + shared, logits, target=2),
        contrast_evidence(evidence, logits, target=2),
        atol=1e-12,
    )


def test_a_model_of_one_class_has_no_rivals() -> None:
    evidence = RNG.normal(size=(1, 2, 2))
    np.testing.assert_array_equal(contrast_evidence(evidence, np.zeros(1), target=0), evidence[0])


def test_evidence_is_brought_to_a_finer_grid_without_a_shift() -> None:
    field = np.array([[0.0, 0.0, 4.0, 0.0]])
    # Centres of the halves lie a quarter of a cell beside the cell's.
    np.testing.assert_allclose(spread(field, (1, 8)), [[0, 0, 0, 1, 3, 3, 1, 0]], atol=1e-6)
    np.testing.assert_allclose(spread(field.T, (8, 1)).ravel(), [0, 0, 0, 1, 3, 3, 1, 0], atol=1e-6)


def test_weights_and_heat_are_those_of_a_plain_loop() -> None:
    clusters, contrast = make_clusters().astype(np.float64), RNG.normal(size=(4, 6))
    weights, heat = weigh_clusters(clusters, contrast)
    gathered = [[clusters[c, n] * max(contrast[n // 6, n % 6], 0.0) for n in range(24)] for c in range(len(clusters))]
    total = sum(map(sum, gathered))
    for c, row in enumerate(gathered):
        assert weights[c] == pytest.approx(sum(row) / total, rel=1e-12)
        np.testing.assert_allclose(heat[c], np.array(row) / sum(row), rtol=1e-12)


def test_a_cluster_that_gathers_only_what_speaks_against_the_answer_weighs_nothing() -> None:
    weights, heat = weigh_clusters(np.eye(2), np.array([[3.0, -5.0]]))
    assert weights.tolist() == [1.0, 0.0]
    assert heat.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_where_no_patch_speaks_for_the_answer_all_count_alike() -> None:
    weights, heat = weigh_clusters(np.full((4, 2), 0.5), np.array([[-1.0, 0.0]]))
    assert weights.tolist() == [0.25] * 4
    assert heat.tolist() == [[0.5, 0.5]] * 4


def test_the_heaviest_clusters_come_first() -> None:
    outputs = make_outputs()
    found = find_clusters(outputs, PATCHES, target=1)[0]
    assert isinstance(found, PatchClusters)
    contrast = contrast_evidence(outputs["evidence"].astype(np.float64), outputs["logits"].astype(np.float64), target=1)
    weights, heat = weigh_clusters(outputs["clusters_stage2"].astype(np.float64), spread(contrast, (4, 6)))
    assert (found.stage, found.grid, len(found.clusters)) == (2, (4, 6), NUM_SHOWN)
    assert [one.number for one in found.clusters] == np.argsort(-weights)[:NUM_SHOWN].tolist()
    for one in found.clusters:
        assert one.weight == weights[one.number]
        np.testing.assert_array_equal(one.heat, heat[one.number].reshape(4, 6))


def test_another_class_has_other_heat() -> None:
    outputs = make_outputs()
    first, second = (find_clusters(outputs, PATCHES, target=target)[0].clusters for target in (0, 1))
    assert not np.allclose(first[0].heat, second[0].heat)


def test_a_stage_with_fewer_clusters_shows_them_all() -> None:
    found = find_clusters(make_outputs(clusters_stage2=make_clusters(2)), PATCHES, target=0)[0]
    assert len(found.clusters) == 2
    assert sum(one.weight for one in found.clusters) == pytest.approx(1)


def test_tokens_weigh_as_much_as_the_cells_they_cover() -> None:
    cells = np.array([7, 7, 2, 7, 9, 2], np.int32)  # numbers need not be dense
    found = find_clusters({"logits": np.zeros(2), "clusters_stage3": cells}, TOKENS, target=0)[0]
    assert isinstance(found, TokenRegions)
    assert found.regions.tolist() == [[1, 1, 0], [1, 2, 0]]
    np.testing.assert_allclose(found.weights, [2 / 6, 3 / 6, 1 / 6])


@pytest.mark.parametrize(
    "changes",
    [
        {"evidence": np.zeros((2, 2, 3))},
        {"evidence": np.zeros((3, 6))},
        {"evidence": np.full((3, 2, 3), np.nan)},
        {"clusters_stage2": make_clusters(5, 23)},
        {"clusters_stage2": np.full((5, 24), np.inf)},
        {"clusters_stage2": np.zeros((5, 24))},
    ],
)
def test_outputs_that_mean_nothing_are_the_model_s_failure(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelFailed, match="tell whoever runs this service"):
        find_clusters(make_outputs(**changes), PATCHES, target=0)


def test_a_wrong_number_of_cells_is_the_model_s_failure() -> None:
    with pytest.raises(ModelFailed, match="2 x 3 cells of stage 3"):
        find_clusters({"logits": np.zeros(2), "clusters_stage3": np.zeros(7, np.int32)}, TOKENS, target=0)
