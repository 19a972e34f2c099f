import pytest
import torch
from torch import Tensor

from models.token_merging import merge_tokens, take_tokens, token_downup, weighted_means
from tests.oracles import token_clustering as oracle


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_cells(num_cells: int, num_tokens: int, *, batch: int = 2) -> Tensor:
    """Tokens of cells, every token with one at least."""
    generator = torch.Generator().manual_seed(1)
    some = torch.randint(num_tokens, (batch, num_cells - num_tokens), generator=generator)
    cells = torch.cat([torch.arange(num_tokens).expand(batch, -1), some], dim=1)
    return cells[:, torch.randperm(num_cells, generator=generator)]


@pytest.mark.parametrize("has_cells", [False, True])
def test_merging_equals_the_naive_loop(has_cells: bool) -> None:
    x, weights = random_tokens(2, 14, 3), random_tokens(2, 14).exp()
    clusters = random_cells(14, 4)
    cells, cell_weights = random_cells(30, 14), random_tokens(2, 30).exp()
    merged, token_of_cell, merged_weights = merge_tokens(
        x, weights, clusters, *((cells, cell_weights) if has_cells else (None, None)), num_clusters=4
    )
    for b in range(2):
        expected, shares = oracle.merge(x[b].numpy(), weights[b].numpy(), clusters[b].numpy(), num_clusters=4)
        torch.testing.assert_close(merged[b], torch.from_numpy(expected), atol=1e-12, rtol=1e-12)
        if has_cells:
            assert token_of_cell[b].tolist() == [clusters[b, token].item() for token in cells[b]]
            shares = shares[cells[b].numpy()] * cell_weights[b].numpy()
        else:
            torch.testing.assert_close(token_of_cell, clusters, atol=0, rtol=0)
        torch.testing.assert_close(merged_weights[b], torch.from_numpy(shares), atol=1e-12, rtol=1e-12)


def test_tokens_are_carried_over_as_in_the_naive_loop() -> None:
    x, weights = random_tokens(2, 9, 3), random_tokens(2, 30).exp()
    source, target = random_cells(30, 9), random_cells(30, 5)
    for cells, tokens in ((source, x), (None, random_tokens(2, 30, 3))):
        found = token_downup(tokens, cells, target, weights, num_targets=5)
        for b in range(2):
            places = list(range(30)) if cells is None else cells[b].tolist()
            expected = oracle.carry(tokens[b].numpy(), places, target[b].tolist(), weights[b].numpy(), num=5)
            torch.testing.assert_close(found[b], torch.from_numpy(expected), atol=1e-12, rtol=1e-12)


def test_carrying_over_to_the_tokens_before_merging_copies() -> None:
    x, clusters = random_tokens(2, 5, 3), random_cells(14, 5)
    cells, weights = random_cells(30, 14), random_tokens(2, 30).exp()
    found = token_downup(x, clusters.gather(1, cells), cells, weights, num_targets=14)
    torch.testing.assert_close(found, take_tokens(x, clusters), atol=1e-4, rtol=1e-5)  # weights + 1e-6


def test_long_sums_of_half_precision_are_made_in_single() -> None:
    x = torch.ones(1, 5000, 2, dtype=torch.bfloat16)
    means, totals = weighted_means(x, x[..., 0], torch.zeros(1, 5000, dtype=torch.int64), num_groups=1)
    torch.testing.assert_close(totals, torch.tensor([[5000.0]]), atol=1e-3, rtol=0)  # in bfloat16 sums stop at 256
    torch.testing.assert_close(means, torch.ones(1, 1, 2, dtype=torch.bfloat16), atol=0, rtol=0)


def test_an_empty_group_has_zeros() -> None:
    means, totals = weighted_means(torch.ones(1, 3, 2), torch.ones(1, 3), torch.tensor([[0, 2, 2]]), num_groups=4)
    torch.testing.assert_close(means[0, :, 0], torch.tensor([1.0, 0, 1, 0]), atol=2e-6, rtol=0)
    torch.testing.assert_close(totals, torch.tensor([[1.0, 0, 2, 0]]), atol=2e-6, rtol=0)
