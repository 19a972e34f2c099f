import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention import attention_weights, full_attention
from tests.oracles import paca_attention as oracle


def heads(num_keys: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 7, 4, generator=rng, dtype=dtype)
    k, v = torch.randn(2, 2, 3, num_keys, 4, generator=rng, dtype=dtype)
    return q, k, v


def test_attention_equals_the_naive_loop() -> None:
    q, k, v = heads()
    out, weights = oracle.attention(q.numpy(), k.numpy(), v.numpy())
    torch.testing.assert_close(full_attention(q, k, v), torch.from_numpy(out), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(attention_weights(q, k), torch.from_numpy(weights), atol=1e-12, rtol=1e-12)


def test_attention_equals_the_one_of_torch() -> None:
    q, k, v = heads(dtype=torch.float32)
    torch.testing.assert_close(full_attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-6, rtol=1e-5)


def test_permuting_keys_with_values_changes_nothing() -> None:
    q, k, v = heads()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(
        full_attention(q, k[:, :, order], v[:, :, order]), full_attention(q, k, v), atol=1e-12, rtol=1e-12
    )


def test_with_a_single_key_every_query_gets_its_value() -> None:
    q, k, v = heads(num_keys=1)
    torch.testing.assert_close(full_attention(q, k, v), v.expand_as(q), atol=0, rtol=0)


def test_large_products_do_not_overflow() -> None:
    q, k, v = heads(dtype=torch.float32)
    assert full_attention(q * 1e4, k * 1e4, v).isfinite().all()
