"""Attention as pure functions on heads (B, H, N, D); modules only hold the projections around them.

Source: Vaswani et al. 2017, section 3.2.1 (scaled dot-product attention).
"""

from torch import Tensor


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
