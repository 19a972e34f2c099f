from typing import Any

import pytest
import torch

from models.clustering import Metric
from models.parallel.assignment import assign_clusters
from models.parallel.cluster_plan import ClusterPlan
from models.parallel.clustered import clustered_attention
from models.parallel.collectives import Communicator
from models.parallel.improved import improved_clustered_attention, strongest_keys
from tests.models.parallel import laws
from tests.models.parallel.conftest import Run

TOLERANCE = 1e-5  # of the largest expected number, of 1 at least


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(("num_segments", "num_clusters"), [(1, 11), (8, 24)])
def test_any_number_of_ranks_gives_the_answer_of_one(
    num_ranks: int, num_segments: int, num_clusters: int, run_ranks: Run
) -> None:
    for errors in run_ranks(num_ranks, laws.clustered_errors, num_segments, num_clusters):
        assert len(errors) == 5 * 4
        assert {name: e for name, e in errors.items() if not e <= TOLERANCE} == {}


@pytest.mark.parametrize(("num_ranks", "heads", "length", "num_clusters"), [(4, 6, 70, 9), (8, 8, 5, 3), (2, 1, 64, 8)])
@pytest.mark.parametrize("metric", ["lsh", "l2"])
def test_ranks_assign_queries_as_one_process_does(
    metric: Metric, num_ranks: int, heads: int, length: int, num_clusters: int, run_ranks: Run
) -> None:
    assert all(run_ranks(num_ranks, laws.is_assigned_alike, metric, heads, length, num_clusters))


def plan(**settings: Any) -> ClusterPlan:
    return ClusterPlan(ranks=Communicator(None), **{"length": 6, "num_clusters": 3} | settings)


def test_of_equal_scores_the_earliest_keys_are_kept_and_empty_clusters_keep_none() -> None:
    scores = torch.tensor([2.0, -1.0, 3.0, -1.0, -0.5, -1.0])[None, None, None].expand(1, 1, 3, 6)
    is_key = torch.tensor([[True, True, True, True, False, True]])
    for top_k, kept in ((1, {2}), (3, {0, 1, 2}), (4, {0, 1, 2, 3}), (6, {0, 1, 2, 3, 5, -1})):
        is_empty = torch.tensor([[[False, True, False]]])
        found = strongest_keys(scores, is_key, is_empty, plan(), top_k=top_k)
        assert set(found[0, 0, 0].tolist()) == kept
        assert (found[0, 0, 1] == -1).all()


def test_numbers_that_do_not_fit_are_refused() -> None:
    q, clusters = torch.zeros(1, 2, 6, 4), torch.zeros(1, 2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="num_segments=2 must divide num_clusters=3"):
        plan(num_segments=2)
    with pytest.raises(ValueError, match="length=0"):
        plan(length=0)
    with pytest.raises(ValueError, match="6 tokens"):
        clustered_attention(q[:, :, :5], q, q, clusters, plan())
    with pytest.raises(ValueError, match=r"\[0, 3\).* got 0 to 7"):
        clustered_attention(q, q, q, clusters.index_fill(2, torch.tensor([4]), 7), plan())
    with pytest.raises(ValueError, match="65 hash planes"):
        assign_clusters(q, torch.zeros(65, 5), torch.tensor([6]), plan(), num_iterations=1, metric="lsh")
    with pytest.raises(ValueError, match="hold the 7 tokens"):
        assign_clusters(q, torch.zeros(9, 5), torch.tensor([6]), plan(length=7), num_iterations=1, metric="lsh")
    with pytest.raises(ValueError, match="top_k=0"):
        improved_clustered_attention(q, q, q, clusters, plan(), top_k=0)


def test_what_padding_holds_does_not_count() -> None:
    lengths, clusters = torch.tensor([4]), torch.tensor([0, 1, 2, 1, 3, 3]).expand(1, 2, -1)
    x = laws.draw(1, 2, 6, 4, seed=0)
    filled = x.clone()
    filled[:, :, 4:] = torch.nan
    for run, options in ((clustered_attention, {}), (improved_clustered_attention, {"top_k": 2})):
        expected = run(x, x, x, clusters, plan(), key_lengths=lengths, **options)
        found = run(filled, filled, filled, clusters, plan(), key_lengths=lengths, **options)
        assert found.equal(expected)
        assert not found[:, :, 4:].any()
        assert found[:, :, :4].any(dim=-1).all()
