"""Exchange of heads for tokens: a rank gives away its tokens' other heads and gets the others' tokens of its own heads.

Source: Jacobs et al. 2023 (DeepSpeed-Ulysses), section 3.1; `SeqAllToAll4D` of the official USP code
(github.com/feifeibear/long-context-attention @56118e0).
"""

from collections.abc import Callable

from torch import Tensor

from models.parallel.collectives import Communicator


def scatter_heads(x: Tensor, ranks: Communicator) -> Callable[[], Tensor]:
    """Post the exchange of heads for tokens.

    Args:
        x: (B, H, N, D), H a multiple of G.
        ranks: G of them.
    Returns: a function that waits and gives (B, H / G, G · N, D): the g-th part of the heads on rank g, tokens in order
        of rank.
    """
    pending = ranks.exchange(x.unflatten(1, (ranks.size, -1)).transpose(0, 1))  # (G, B, H / G, N, D)
    return lambda: pending.wait().permute(1, 2, 0, 3, 4).flatten(2, 3)


def gather_heads(x: Tensor, ranks: Communicator) -> Callable[[], Tensor]:
    """Post what undoes `scatter_heads`: (B, H / G, G · N, D) → a function that waits and gives (B, H, N, D)."""
    pending = ranks.exchange(x.unflatten(2, (ranks.size, -1)).permute(2, 0, 1, 3, 4))  # (G, B, H / G, N, D)
    return lambda: pending.wait().transpose(0, 1).flatten(1, 2)
