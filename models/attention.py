"""Attention as pure functions on heads (B, H, N, D); modules only hold the projections around them.

Source: Vaswani et al. 2017, section 3.2.1 (scaled dot-product attention).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Softmax of the scaled dot products.

    Args:
        q: (B, H, N, D).
        k: (B, H, S, D).
    Returns: (B, H, N, S), rows sum to 1.
    """
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from every query to every key.

    Args:
        q: (B, H, N, D).
        k, v: (B, H, S, D).
    Returns: (B, H, N, D).
    """
    # Not torch's fused kernel: for few keys its backward on the CPU is slower than these two products (torch 2.13).
    return attention_weights(q, k) @ v


def padded_full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_lengths: Tensor,
    key_lengths: Tensor,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend from every real query to every real key; nothing depends on what padding holds.

    Args:
        q: (B, H, N, E).
        k: (B, H, S, E).
        v: (B, H, S, D).
        query_lengths, key_lengths: (B,) int64, how many are real; a sample without keys gets zeros.
        scale: of the dot products; None is 1/√E.
        dropout: share of the weights that are dropped, in training.
    Returns: (B, H, N, D), zeros for padded queries.
    """
    is_key = torch.arange(k.shape[2], device=k.device) < key_lengths[:, None]  # (B, S)
    is_query = torch.arange(q.shape[2], device=q.device) < query_lengths[:, None]
    has_answer = is_query & (key_lengths > 0)[:, None]
    # A row without any key would be a softmax over nothing: let it see the blanked padding, then drop it.
    mask = (is_key | (key_lengths == 0)[:, None])[:, None, None]  # (B, 1, 1, S)
    q, k, v = (x.masked_fill(~is_real[:, None, :, None], 0) for x, is_real in ((q, is_query), (k, is_key), (v, is_key)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.masked_fill(~has_answer[:, None, :, None], 0)


class FullAttention(nn.Module):
    """Full attention with the call of `ClusteredAttention`, so that layers can swap the two.

    Args:
        scale: of the dot products; None is 1/√E.
        dropout: of the weights while training.
    """

    def __init__(self, *, scale: float | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, query_lengths: Tensor | None, key_lengths: Tensor | None
    ) -> tuple[Tensor, None]:
        """Attend; shapes as in `padded_full_attention`, lengths None where all is real. There are no clusters."""
        dropout = self.dropout if self.training else 0.0
        if query_lengths is None and key_lengths is None:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale), None
        query_lengths, key_lengths = known_lengths(q, query_lengths), known_lengths(k, key_lengths)
        return padded_full_attention(q, k, v, query_lengths, key_lengths, scale=self.scale, dropout=dropout), None


def known_lengths(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Lengths (B,) int64 of x (B, H, N, E), N for every sample where they are not given."""
    return x.new_full(x.shape[:1], x.shape[2], dtype=torch.int64) if lengths is None else lengths
