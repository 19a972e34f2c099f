from typing import Any

import pytest
import torch

from models.layers import map_to_tokens, tokens_to_map
from models.token_blocks import TokenAttention, biased_attention
from models.token_exchange import link_tokens
from tests.oracles import paca_attention as oracle


def test_on_a_grid_an_attention_with_ratio_1_is_plain_attention() -> None:
    torch.manual_seed(0)
    attention = TokenAttention(8, 2, ratio=1, reduction="conv").double()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    parameters = {name: parameter.detach().numpy() for name, parameter in attention.named_parameters()}
    for kind in ("weight", "bias"):
        parameters[f"k.{kind}"], parameters[f"v.{kind}"] = parameters.pop(f"kv.{kind}").reshape(2, 8, -1).squeeze()
    expected = oracle.patch_to_cluster_attention(x.numpy(), None, parameters, num_heads=2, eps=0.0)
    links = link_tokens(None, num_tokens=12, cell_grid=(3, 4), grid=(3, 4))
    torch.testing.assert_close(attention(x, x, links, None), torch.from_numpy(expected), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["conv", "pool"])
def test_a_reduced_map_is_what_the_keys_are_made_of(reduction: Any) -> None:
    torch.manual_seed(0)
    attention = TokenAttention(8, 2, ratio=2, reduction=reduction)
    whole = TokenAttention(8, 2, ratio=1, reduction=reduction)
    whole.load_state_dict({n: w for n, w in attention.state_dict().items() if not n.startswith(("reduce", "norm"))})
    x, links = torch.randn(2, 24, 8), link_tokens(None, num_tokens=24, cell_grid=(4, 6), grid=(4, 6))
    blocks = tokens_to_map(x, (4, 6)).unflatten(3, (3, 2)).unflatten(2, (2, 2))  # (B, E, Y, 2, X, 2)
    if reduction == "pool":
        keys = map_to_tokens(blocks.mean(dim=(3, 5)))
    else:
        fmap = torch.einsum("beyixj,feij->bfyx", blocks, attention.reduce.weight)
        keys = attention.norm(map_to_tokens(fmap) + attention.reduce.bias)
    torch.testing.assert_close(attention(x, x, links, None), whole(x, keys, links, None), atol=1e-6, rtol=1e-5)


def test_a_score_multiplies_the_weight_of_its_key() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    bias = torch.randn(2, 6, 1)
    factors = bias.exp().mT[:, None] * (q @ k.mT / 2).exp()
    expected = factors @ v / factors.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(biased_attention(q, k, v, bias), expected, atol=1e-5, rtol=1e-5)
