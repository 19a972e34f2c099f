from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.communities import (
    CentreCommunities,
    LearnedCommunities,
    Scope,
    SharedMean,
    count_kept,
    keep_strongest,
    modularity_loss,
    orthogonal_start,
    parameter_entropy,
    sharpening_loss,
    similarity_shares,
)
from tests.oracles import communities as oracle

SCOPES: tuple[Scope, Scope] = ("subject", "batch")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(4, 9), (7, 7), (1, 3)])
def test_an_orthogonal_start_is_the_one_of_gram_schmidt(shape: tuple[int, int]) -> None:
    rows = normal(*shape)
    found = orthogonal_start(rows)
    torch.testing.assert_close(found, torch.from_numpy(oracle.gram_schmidt(rows.numpy())), atol=1e-12, rtol=0)
    assert found[0].equal(rows[0])
    products = found @ found.T
    expected = torch.eye(len(rows), dtype=rows.dtype)
    expected[0, 0] = rows[0].square().sum()
    torch.testing.assert_close(products, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("num_communities", "min_kept", "expected"),
    [(1, 0, 0), (1, 1, 1), (2, 0, 1), (5, 0, 2), (50, 0, 25), (51, 0, 5), (90, 0, 9), (90, 12, 12)],
)
def test_a_tenth_of_many_communities_is_kept_and_half_of_few(
    num_communities: int, min_kept: int, expected: int
) -> None:
    assert count_kept(num_communities, min_kept=min_kept) == expected


@pytest.mark.parametrize("num_kept", [0, 1, 3, 7])
def test_only_the_strongest_communities_are_kept(num_kept: int) -> None:
    assignment = normal(5, 7).softmax(dim=-1)
    found = keep_strongest(assignment[None], num_kept)[0]
    expected = oracle.keep_strongest(assignment.numpy(), num_kept)
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=0, rtol=0)


def test_communities_that_tie_are_all_kept() -> None:
    assignment = torch.tensor([[0.1, 0.4, 0.1, 0.4]])
    torch.testing.assert_close(keep_strongest(assignment, 1), torch.tensor([[0, 0.4, 0, 0.4]]), atol=0, rtol=0)


@pytest.mark.parametrize("similarity", ["projection", "squared-projection", "student-t"])
def test_shares_of_centres_equal_the_naive_loop(similarity: Any) -> None:
    nodes, centres = normal(2, 6, 5), normal(3, 5, seed=1)
    found = similarity_shares(nodes, centres, similarity)
    for b in range(2):
        expected = oracle.similarity_shares(nodes[b].numpy(), centres.numpy(), similarity)
        torch.testing.assert_close(found[b], torch.from_numpy(expected), atol=1e-12, rtol=0)


def test_a_node_on_a_centre_has_no_negative_distance() -> None:
    centres = 30 * normal(4, 50, dtype=torch.float32)
    shares = similarity_shares(centres[None], centres, "student-t")[0]
    torch.testing.assert_close(shares, torch.eye(4), atol=1e-4, rtol=0)
    assert (shares <= 1).all()


def test_the_entropy_of_parameters_equals_the_naive_loop() -> None:
    weight = 3 * normal(6, 4)
    expected = oracle.parameter_entropy(weight.numpy())
    torch.testing.assert_close(parameter_entropy(weight).item(), expected, atol=1e-12, rtol=0)


def test_the_entropy_of_large_parameters_is_finite_with_its_gradient() -> None:
    weight = torch.tensor([-1e3, -90.0, 90.0, 1e3]).requires_grad_()
    entropy = parameter_entropy(weight)
    entropy.backward()
    assert 0 <= entropy.item() < 1e-6
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_the_sharpening_loss_equals_the_naive_loop() -> None:
    shares = normal(3, 4, 5).softmax(dim=-1)
    expected = oracle.sharpening_loss(shares.flatten(0, 1).numpy())
    torch.testing.assert_close(sharpening_loss(shares).item(), expected, atol=1e-12, rtol=0)


def test_the_sharpening_loss_is_finite_where_shares_and_communities_vanished() -> None:
    scores = torch.tensor([[[0.0, -1e4, -1e4], [1.0, 0.0, -1e4]]]).requires_grad_()
    loss = sharpening_loss(scores.softmax(dim=-1))
    loss.backward()
    assert loss.isfinite()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_a_stored_mean_weighs_first_batches_alike_and_later_ones_by_momentum() -> None:
    shared = SharedMean(2, scope="stored", momentum=0.25)
    batches = normal(6, 3, 2, dtype=torch.float32)
    means = batches.mean(dim=1)
    expected = torch.zeros(2)
    for i, batch in enumerate(batches):
        torch.testing.assert_close(shared(batch), means[i : i + 1], atol=1e-6, rtol=0)
        rate = max(1 / (i + 1), 0.25)
        expected = (1 - rate) * expected + rate * means[i]
        if i < 4:
            torch.testing.assert_close(expected, means[: i + 1].mean(dim=0), atol=1e-6, rtol=0)
        torch.testing.assert_close(shared.mean, expected, atol=1e-6, rtol=0)


def test_a_stored_mean_answers_in_evaluation_and_does_not_change() -> None:
    shared = SharedMean(2, scope="stored", momentum=0.25)
    shared(normal(3, 2, dtype=torch.float32))
    before = shared.mean.clone()
    shared.eval()
    assert shared(normal(5, 2, seed=1, dtype=torch.float32)).equal(before[None])
    assert shared.mean.equal(before)
    assert shared.num_batches == 1


def test_no_gradient_is_kept_in_a_stored_mean() -> None:
    shared = SharedMean(2, scope="stored", momentum=0.25)
    x = normal(3, 2, dtype=torch.float32).requires_grad_()
    shared(x).sum().backward()
    assert not shared.mean.requires_grad
    torch.testing.assert_close(x.grad, torch.full((3, 2), 1 / 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("scope", "is_shared"), [("subject", False), ("batch", True), ("stored", True)])
def test_the_scope_says_whether_subjects_share_their_communities(scope: Any, *, is_shared: bool) -> None:
    settings: dict[str, Any] = {"scope": scope, "momentum": 0.1, "has_orthogonal_start": True}
    learned = LearnedCommunities(6, 3, num_kept=2, **settings)
    centred = CentreCommunities(6, 3, 5, similarity="projection", are_centres_frozen=True, **settings)
    nodes, scores = normal(4, 6, 5, dtype=torch.float32), normal(4, 6, 6, seed=1, dtype=torch.float32)
    for communities in (learned, centred):
        assignment = communities(nodes, scores)
        assert assignment.shape == (4, 6, 3)
        assert assignment[0].equal(assignment[1]) == is_shared


def test_learned_communities_are_the_softmax_of_attention_times_a_map() -> None:
    learned = LearnedCommunities(6, 3, scope="batch", momentum=0.1, has_orthogonal_start=False, num_kept=None)
    scores = normal(4, 6, 6, dtype=torch.float32)
    expected = (scores.mean(dim=0) @ learned.weight).softmax(dim=1)
    found = learned(normal(4, 6, 5, dtype=torch.float32), scores)
    torch.testing.assert_close(found, expected.expand(4, 6, 3), atol=1e-6, rtol=0)


def test_averaged_centre_communities_are_the_mean_of_everybodys_own() -> None:
    settings: dict[str, Any] = {"momentum": 0.1, "has_orthogonal_start": False, "are_centres_frozen": False}
    own, averaged = (CentreCommunities(6, 3, 5, scope=s, similarity="student-t", **settings) for s in SCOPES)
    averaged.load_state_dict(own.state_dict())
    nodes = normal(4, 6, 5, dtype=torch.float32)
    expected = own(nodes, None).mean(dim=0)
    torch.testing.assert_close(averaged(nodes, None), expected.expand(4, 6, 3), atol=1e-6, rtol=0)


def test_starts_are_orthogonal_where_asked() -> None:
    settings: dict[str, Any] = {"scope": "subject", "momentum": 0.1, "has_orthogonal_start": True}
    learned = LearnedCommunities(6, 3, num_kept=None, **settings).weight.T
    centres = CentreCommunities(6, 3, 5, similarity="projection", are_centres_frozen=False, **settings).centres
    for rows in (learned, centres):
        products = rows @ rows.T
        torch.testing.assert_close(products, products.diagonal().diag(), atol=1e-6, rtol=0)
        torch.testing.assert_close(products.diagonal()[1:], torch.ones(2), atol=1e-6, rtol=0)


def test_modularity_is_that_of_a_loop_over_pairs_of_regions() -> None:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, 6, generator=rng, dtype=torch.float64)
    x = x + x.transpose(1, 2)
    shares = torch.rand(2, 6, 3, generator=rng, dtype=torch.float64).softmax(dim=2)
    total = 0.0
    for subject in range(2):
        weights = x[subject].clamp(min=0)
        strengths = [weights[i].sum().item() for i in range(6)]
        for i in range(6):
            for j in range(6):
                together = (shares[subject, i] * shares[subject, j]).sum().item()
                total += (
                    (weights[i, j].item() - 1.5 * strengths[i] * strengths[j] / sum(strengths))
                    * together
                    / (2 * sum(strengths))
                )
    found = modularity_loss(shares, x, 1.5)
    torch.testing.assert_close(found.item(), -20 * total, atol=1e-9, rtol=0)


def test_communities_that_are_connected_within_have_the_least_modularity_loss() -> None:
    parts = torch.arange(8) // 4
    x = (parts[:, None] == parts).float()[None] - torch.eye(8)
    right, wrong = (F.one_hot(found, 2).float()[None] for found in (parts, torch.arange(8) % 2))
    assert modularity_loss(right, x, 1.0).item() == pytest.approx(-20 * 0.5)
    assert modularity_loss(wrong, x, 1.0) > 0
    assert modularity_loss(right, -x, 1.0) == 0  # negative connections do not count
