import math

import numpy as np
import pytest
import torch
from torch import Tensor

from models.clustering import (
    Metric,
    cluster_members,
    cluster_queries,
    group_queries,
    hash_bits,
    lloyd,
    soft_assignment,
    spread_positions,
    spread_to_queries,
    take_rows,
)
from tests.oracles import clustered_attention as hard_oracle
from tests.oracles import paca_attention as oracle

B, H, N, E, P = 3, 2, 31, 5, 17
LENGTHS = torch.tensor([31, 20, 3])
METRICS: list[Metric] = ["lsh", "l2"]


def scores() -> Tensor:
    return torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_assignment_equals_the_naive_loop() -> None:
    expected = torch.from_numpy(oracle.soft_assignment(scores().numpy()))
    torch.testing.assert_close(soft_assignment(scores()), expected, atol=1e-14, rtol=1e-12)


def test_every_cluster_shares_out_one_over_the_tokens() -> None:
    total = soft_assignment(scores()).sum(dim=2)
    torch.testing.assert_close(total, torch.ones(2, 4, dtype=torch.float64), atol=1e-12, rtol=0)


def test_what_all_tokens_score_alike_does_not_count() -> None:
    shift = torch.tensor([5.0, -3.0, 0.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(soft_assignment(scores() + shift), soft_assignment(scores()), atol=1e-14, rtol=1e-12)


# Hard clustering


def queries(seed: int = 0) -> Tensor:
    return torch.randn(B, H, N, E, generator=torch.Generator().manual_seed(seed))


def planes(num_planes: int = P) -> Tensor:
    return torch.randn(num_planes, E + 1, generator=torch.Generator().manual_seed(1))


def cluster(
    q: Tensor, lengths: Tensor = LENGTHS, *, metric: Metric, num_clusters: int = 6, num_iterations: int = 4
) -> Tensor:
    return cluster_queries(
        q, planes(), lengths, num_clusters=num_clusters, num_iterations=num_iterations, metric=metric
    )


@pytest.mark.parametrize("num_iterations", [1, 2, 5])
@pytest.mark.parametrize("num_clusters", [1, 6, 40])
@pytest.mark.parametrize("metric", METRICS)
def test_clusters_equal_the_naive_loop(metric: Metric, num_clusters: int, num_iterations: int) -> None:
    q = queries()
    found = cluster(q, metric=metric, num_clusters=num_clusters, num_iterations=num_iterations)
    settings = {"num_clusters": num_clusters, "num_iterations": num_iterations}
    for b, h in np.ndindex(B, H):
        length = int(LENGTHS[b])
        vectors = q[b, h, :length].double().numpy()
        if metric == "lsh":
            expected = hard_oracle.cluster_bits(hard_oracle.sign_bits(vectors, planes().double().numpy()), **settings)
        else:
            expected = hard_oracle.cluster_vectors(vectors, **settings)
        assert found[b, h].tolist() == expected + [num_clusters] * (N - length)


def test_bits_are_signs_and_a_projection_on_the_plane_is_not_beyond_it() -> None:
    q = torch.tensor([[[[1.0, 0.0], [0.5, 7.0], [0.25, -7.0]]]])
    bits = hash_bits(q, torch.tensor([[1.0, 0.0, 0.5], [0.0, -1.0, 0.0]]))
    assert bits.tolist() == [[[[1.0, -1.0], [-1.0, -1.0], [-1.0, 1.0]]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_queries_of_any_type_give_the_bits_of_their_float32_values(dtype: torch.dtype) -> None:
    q = queries().to(dtype)
    torch.testing.assert_close(hash_bits(q, planes()), hash_bits(q.float(), planes()), atol=0, rtol=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_no_bit_and_no_cluster(dtype: torch.dtype, metric: Metric) -> None:
    q = queries() * 1000  # sums of these overflow float16
    bits, clusters = hash_bits(q, planes()), cluster(q, metric=metric)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(hash_bits(q, planes()), bits, atol=0, rtol=0)
        assert cluster(q, metric=metric).equal(clusters)


def test_initial_positions_are_spread_over_the_real_tokens() -> None:
    positions = spread_positions(torch.tensor([10, 4, 3, 1, 0]), 4)
    assert positions.tolist() == [[0, 2, 5, 7], [0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("metric", METRICS)
def test_a_point_between_two_centroids_goes_to_the_first(metric: Metric) -> None:
    points = torch.tensor([[[[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]]])
    centroids = torch.tensor([[[[-1.0, -1.0], [1.0, 1.0], [1.0, 1.0]]]])
    clusters, _ = lloyd(points, centroids, torch.ones(1, 3, dtype=torch.bool), num_iterations=1, metric=metric)
    assert clusters.tolist() == [[[1, 0, 0]]]


def test_a_tied_bit_becomes_zero_and_an_empty_cluster_stays() -> None:
    points = torch.tensor([[[[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]]]])
    centroids = torch.tensor([[[[1.0, 1.0], [1.0, 1.0], [-1.0, 1.0]]]])
    # All points lie nearest to the first centroid; of its second bit two members say 1 and two say 0.
    _, moved = lloyd(points, centroids, torch.ones(1, 4, dtype=torch.bool), num_iterations=2, metric="lsh")
    assert moved.tolist() == [[[[1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]]]


def test_centroids_move_once_less_than_points_are_assigned() -> None:
    points = torch.tensor([[[[0.0], [1.0], [9.0]]]])
    centroids = torch.tensor([[[[0.0], [1.0]]]])
    is_real = torch.ones(1, 3, dtype=torch.bool)
    expected = {1: ([0, 1, 1], [0.0, 1.0]), 2: ([0, 0, 1], [0.0, 5.0]), 3: ([0, 0, 1], [0.5, 9.0])}
    for num_iterations, (clusters, centres) in expected.items():
        found = lloyd(points, centroids, is_real, num_iterations=num_iterations, metric="l2")
        assert found[0].tolist() == [[clusters]]
        assert found[1].flatten().tolist() == centres


@pytest.mark.parametrize("filling", [0.0, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("metric", METRICS)
def test_what_padding_holds_does_not_count(metric: Metric, filling: float) -> None:
    q = queries()
    filled = q.masked_fill((torch.arange(N) >= LENGTHS[:, None])[:, None, :, None], filling)
    assert cluster(filled, metric=metric).equal(cluster(q, metric=metric))


@pytest.mark.parametrize("metric", METRICS)
def test_a_sample_has_the_same_clusters_alone_without_its_padding(metric: Metric) -> None:
    q = queries()
    together = cluster(q, metric=metric)
    for b, length in enumerate(LENGTHS.tolist()):
        alone = cluster(q[b : b + 1, :, :length], LENGTHS[b : b + 1], metric=metric)
        assert alone[0].equal(together[b, :, :length])


@pytest.mark.parametrize("metric", METRICS)
def test_a_sample_without_tokens_is_all_padding(metric: Metric) -> None:
    assert (cluster(queries(), torch.tensor([0, 5, 0]), metric=metric)[[0, 2]] == 6).all()


def test_queries_of_equal_bits_share_the_first_of_equal_centroids() -> None:
    q = queries()[:, :, :1].expand(-1, -1, N, -1)
    assert not cluster(q, torch.full((B,), N), metric="lsh").any()


@pytest.mark.parametrize("metric", METRICS)
def test_clustering_carries_no_gradient(metric: Metric) -> None:
    assert not cluster(queries().requires_grad_(), metric=metric).requires_grad
    assert not hash_bits(queries().requires_grad_(), planes()).requires_grad


@pytest.mark.parametrize("num_planes", [1, 64])
def test_any_number_of_planes_up_to_64_is_exact(num_planes: int) -> None:
    q = queries()
    lengths = torch.full((B,), N)
    found = cluster_queries(q, planes(num_planes), lengths, num_clusters=3, num_iterations=3, metric="lsh")
    bits = hard_oracle.sign_bits(q[0, 0].double().numpy(), planes(num_planes).double().numpy())
    assert found[0, 0].tolist() == hard_oracle.cluster_bits(bits, num_clusters=3, num_iterations=3)


def test_grouping_takes_the_mean_of_the_members() -> None:
    q, clusters = queries().double(), cluster(queries(), metric="lsh", num_clusters=40)
    grouped = group_queries(q, clusters, num_clusters=40)
    members = cluster_members(clusters, num_clusters=40)
    for b, h, c in np.ndindex(B, H, 40):
        of_cluster = q[b, h][clusters[b, h] == c]
        assert members[b, h, :, c].equal((clusters[b, h] == c).float())
        expected = of_cluster.mean(dim=0) if len(of_cluster) else torch.zeros(E, dtype=torch.float64)
        torch.testing.assert_close(grouped[b, h, c], expected, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("is_autocast", [False, True])
def test_the_mean_of_many_large_float16_queries_does_not_overflow(is_autocast: bool) -> None:
    q = torch.full((1, 1, 600, 2), 1000.0, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.float16, enabled=is_autocast):
        grouped = group_queries(q, torch.zeros(1, 1, 600, dtype=torch.int64), num_clusters=1)
    assert grouped.dtype == torch.float16
    torch.testing.assert_close(grouped, torch.full((1, 1, 1, 2), 1000.0, dtype=torch.float16), atol=0, rtol=0)


def test_every_query_gets_the_row_of_its_cluster_and_padding_zeros() -> None:
    x = torch.arange(1.0, 7.0).reshape(1, 2, 3, 1)
    clusters = torch.tensor([[[0, 3, 2], [2, 1, 3]]])
    assert spread_to_queries(x, clusters)[..., 0].tolist() == [[[1.0, 0.0, 3.0], [6.0, 5.0, 0.0]]]


def test_rows_are_taken_from_their_own_sample_and_head() -> None:
    x = torch.arange(24).reshape(2, 3, 4, 1)
    index = torch.randint(0, 4, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    assert take_rows(x, index).equal(x.gather(2, index[..., None]))
