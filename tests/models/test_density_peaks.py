from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import density_peaks
from models.density_peaks import dpc_knn
from tests.models.test_token_merging import random_tokens
from tests.oracles import token_clustering as oracle


@pytest.mark.parametrize(
    ("num_tokens", "num_clusters", "num_neighbors"), [(20, 5, 5), (33, 33, 3), (7, 1, 1), (4, 2, 9)]
)
def test_clusters_equal_the_naive_loop(num_tokens: int, num_clusters: int, num_neighbors: int) -> None:
    x = random_tokens(2, num_tokens, 6)
    peaks = dpc_knn(x, num_clusters=num_clusters, num_neighbors=num_neighbors)
    for b in range(2):
        clusters, centers = oracle.dpc_knn(
            x[b].numpy(), num_clusters=num_clusters, num_neighbors=min(num_neighbors, num_tokens)
        )
        assert peaks.clusters[b].tolist() == clusters
        assert peaks.centers[b].tolist() == centers


@pytest.mark.parametrize("is_masked", [False, True])
def test_comparing_block_by_block_changes_nothing(is_masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_tokens(2, 50, 6)
    is_real = torch.arange(50) < torch.tensor([[50], [31]])
    settings: dict[str, Any] = {"is_neighbor": is_real, "is_real": is_real} if is_masked else {}
    whole = dpc_knn(x, num_clusters=12, **settings)
    monkeypatch.setattr(density_peaks, "MAX_PAIRS", 50 * 7)
    split = dpc_knn(x, num_clusters=12, **settings)
    torch.testing.assert_close(split.clusters, whole.clusters, atol=0, rtol=0)
    torch.testing.assert_close(split.centers, whole.centers, atol=0, rtol=0)
    torch.testing.assert_close(split.scores, whole.scores, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("num_clusters", [3, 30])
@pytest.mark.parametrize("is_masked", [False, True])
def test_tokens_that_are_settled_by_their_neighbours_would_get_the_same_from_all_tokens(
    is_masked: bool, num_clusters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With twins, triplets and equal distances: whole numbers around zero, so that nothing is rounded."""
    half = torch.randint(-3, 4, (2, 60, 3), generator=torch.Generator().manual_seed(5)).double()
    x = torch.cat([half, -half], dim=1)
    is_real = (torch.arange(120) < torch.tensor([[120], [95]])) if is_masked else None
    settings: dict[str, Any] = {"num_clusters": num_clusters, "is_neighbor": is_real, "is_real": is_real}
    found = dpc_knn(x, **settings)
    asked: list[float] = []

    def pick_all(is_wanted: Tensor, *, num_others: int) -> tuple[Tensor, ...]:
        asked.append(is_wanted.float().mean().item())
        is_wanted.fill_(True)
        return (torch.arange(120).expand(2, -1),)

    monkeypatch.setattr(density_peaks, "_pick", pick_all)
    expected = dpc_knn(x, **settings)
    assert asked[0] < 0.5, "most tokens have a denser neighbour"
    for name, tensor in expected._asdict().items():
        torch.testing.assert_close(getattr(found, name), tensor, atol=1e-12, rtol=1e-12, msg=name)


def test_few_tokens_are_compared_with_all_others_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    squares = density_peaks._Pairs.squares

    def counted(pairs: Any, rows: Tensor) -> Tensor:
        compared.append(rows.shape[1])
        return squares(pairs, rows)

    monkeypatch.setattr(density_peaks._Pairs, "squares", counted)
    dpc_knn(random_tokens(2, 600, 3), num_clusters=150)
    assert compared[:2] == [512, 88]
    assert 1 <= sum(compared[2:]) < 200


def test_padding_changes_nothing_for_the_real_tokens() -> None:
    x = random_tokens(1, 20, 4)
    padded = torch.cat([x, 0.1 * random_tokens(1, 6, 4, seed=2)], dim=1)  # in the middle of the others
    is_real = torch.arange(26)[None] < 20
    peaks = dpc_knn(padded, num_clusters=5, is_neighbor=is_real, is_real=is_real)
    alone = dpc_knn(x, num_clusters=5)
    torch.testing.assert_close(peaks.centers, alone.centers, atol=0, rtol=0)
    torch.testing.assert_close(peaks.clusters[:, :20], alone.clusters, atol=0, rtol=0)
    torch.testing.assert_close(peaks.density[:, :20], alone.density, atol=1e-12, rtol=1e-12)


def test_equal_tokens_become_centers_in_order_of_index() -> None:
    peaks = dpc_knn(torch.ones(1, 40, 3), num_clusters=10)
    assert peaks.centers[0].tolist() == list(range(10))
    assert peaks.clusters[0].tolist() == [*range(10), *[0] * 30]


def test_noise_decides_between_equal_tokens() -> None:
    noise = torch.arange(40, dtype=torch.float64)[None] / 40
    peaks = dpc_knn(torch.ones(1, 40, 3, dtype=torch.float64), num_clusters=1, noise=noise)
    torch.testing.assert_close(peaks.density - 1, noise * 1e-6, atol=1e-12, rtol=0)
    assert peaks.density[0].argmax() == 39


def test_a_batch_mate_far_away_changes_nothing() -> None:
    x = random_tokens(1, 30, 4)
    is_real = torch.arange(30)[None] < 25
    for mask in (None, is_real):
        alone = dpc_knn(x, num_clusters=6, is_neighbor=mask, is_real=mask)
        both = None if mask is None else mask.expand(2, -1)
        together = dpc_knn(torch.cat([x, 100 * x]), num_clusters=6, is_neighbor=both, is_real=both)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(b[:1], a, atol=1e-9, rtol=1e-9)


def test_half_precision_is_clustered_in_single() -> None:
    x = random_tokens(1, 30, 4).bfloat16()
    torch.testing.assert_close(dpc_knn(x, num_clusters=6), dpc_knn(x.float(), num_clusters=6), atol=0, rtol=0)


class LargestAllocation(TorchDispatchMode):
    """Records the bytes of the largest storage that any operation returns."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("side", [64, 128, 256])
def test_no_matrix_of_all_pairs_is_made_of_many_tokens(side: int) -> None:
    """64, 128 and 256 cells each way are pictures of 256, 512 and 1024 pixels."""
    with torch.device("meta"), LargestAllocation() as largest:
        dpc_knn(torch.empty(1, side**2, 64), num_clusters=side**2 // 4)
    assert largest.num_bytes <= max(4 * density_peaks.MAX_PAIRS, 4 * 66 * side**2)  # 34 MB; N² is 17 GB at 1024 pixels


@pytest.mark.parametrize("is_plain", [False, True])
def test_nor_is_one_made_of_real_tokens_all_of_which_are_alike(is_plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density_peaks, "MAX_PAIRS", 2000 * 50)
    x = torch.ones(1, 2000, 4) if is_plain else random_tokens(1, 2000, 4).float()
    with LargestAllocation() as largest:
        dpc_knn(x, num_clusters=500)
    assert largest.num_bytes <= 4 * 2000 * 50 * 1.1  # 0.4 MB, and rounding up; N² is 16 MB


def test_the_recorder_of_allocations_sees_a_matrix_of_all_pairs() -> None:
    with torch.device("meta"), LargestAllocation() as largest:
        torch.cdist(torch.empty(1, 4095, 8), torch.empty(1, 4095, 8))
    assert largest.num_bytes == 4 * 4095**2
