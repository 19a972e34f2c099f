"""What several architectures share: convolutional MLP, stochastic depth, fresh weights, token/map views.

Source: Wang et al. 2022 (PVTv2) for the convolutional MLP, Huang et al. 2016 for stochastic depth.
Normalisation is not here: maps are normalised as tokens, so `nn.LayerNorm` serves everywhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def tokens_to_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """View tokens (B, N, E) as a feature map (B, E, Y, X), N = Y·X in row-major order."""
    return x.transpose(1, 2).unflatten(2, grid)


def map_to_tokens(x: Tensor) -> Tensor:
    """View a feature map (B, E, Y, X) as tokens (B, N, E), row-major order."""
    return x.flatten(2).transpose(1, 2)


class DropPath(nn.Module):
    """Drop a whole residual branch per sample while training; the rest is scaled up to keep the mean.

    Args:
        rate: probability of dropping, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop path rate={rate} must lie in [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) → (B, …); the identity in evaluation mode."""
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device) >= self.rate
        return x * keep.to(x.dtype) / (1.0 - self.rate)


def drop_path_rates(depths: Sequence[int], last: float) -> list[list[float]]:
    """Rates of the blocks of each stage: 0 for the first block of all, rising evenly to `last` for the last one."""
    num_steps = max(sum(depths) - 1, 1)
    firsts = [sum(depths[:stage]) for stage in range(len(depths))]
    return [
        [last * (first + block) / num_steps for block in range(depth)]
        for first, depth in zip(firsts, depths, strict=True)
    ]


def initialise_linear(module: nn.Module) -> None:
    """Set fresh weights of a linear layer, and leave any other module as it is."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)  # Touvron et al. 2021 (DeiT), as the official codes
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ConvMlp(nn.Module):
    """MLP whose hidden layer gets its own depthwise 3x3 convolution added: it tells tokens where they are.

    Args:
        dim: E, model dim.
        hidden_dim: width of the hidden layer.
    Differs: from PVTv2, where the convolution replaces its input; PaCa-ViT adds the two.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, N, E) on the grid (Y, X), N = Y·X → (B, N, E)."""
        x = self.fc1(x)
        mixed = map_to_tokens(self.conv(tokens_to_map(x, grid)))
        return self.fc2(F.gelu(mixed + x))
