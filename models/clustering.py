"""Clustering of tokens as pure functions: from scores to the share that each token has in each cluster.

Source: Grainger et al. 2023 (PaCa-ViT), patch-to-cluster assignment.
Deliberately soft: every token takes part in every cluster, so that the assignment is differentiable.
"""

from torch import Tensor


def soft_assignment(scores: Tensor) -> Tensor:
    """Turn clustering scores into one spatial distribution per cluster.

    Args:
        scores: (B, N, C).
    Returns: (B, C, N); each row sums to 1 over the tokens, so a token's shares need not.
    Source: Grainger et al. 2023, patch-to-cluster assignment, as in the official code (github.com/iVMCL/PaCaViT).
    """
    return scores.transpose(1, 2).softmax(dim=-1)
