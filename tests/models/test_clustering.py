import torch
from torch import Tensor

from models.clustering import soft_assignment
from tests.oracles import paca_attention as oracle


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
