"""Multi-stage token aggregation (MTA): the neck that makes feature maps of the tokens of a TCFormer's stages.

Source: Zeng et al. 2022 (TCFormer), section 3.4; checked against the official code (github.com/zengwang430521/TCFormer
@1ea72a8).
Deliberately absent: further levels that are convolved from its outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from models.token_blocks import REDUCTION_EPS, Reduction, TokenBlock, Tokens, initialise
from models.token_exchange import token2map
from models.token_merging import take_tokens


@dataclass(frozen=True, kw_only=True)
class MtaConfig:
    """Numbers of the neck; the tuples have one entry per level but the coarsest.

    Attributes:
        dim: E of all maps.
        num_heads: H, divides E.
        mlp_ratios: hidden width over E.
        reduction_ratios: rows and columns of the map that become one key.
        reduction: how maps become keys.
        num_outputs: maps; those beyond the backbone's levels are ever coarser.
        extra: how these are made: from the finer one by leaving out rows and columns, or from the backbone's last
            level by a convolution and further ones from that.
    """

    dim: int = 256
    num_heads: tuple[int, ...] = (4, 4, 4)
    mlp_ratios: tuple[float, ...] = (4, 4, 4)
    reduction_ratios: tuple[int, ...] = (8, 4, 2)
    reduction: Reduction = "pool"
    num_outputs: int = 4
    extra: Literal["pool", "conv"] = "pool"


class Mta(nn.Module):
    """Multi-stage token aggregation, the neck: every stage's tokens get the coarser ones added and become a map.

    Args:
        dims: E of the stages, finest first.
        config: of the neck.
    Source: Zeng et al. 2022, section 3.4; official code, `MTA`. Differs: a coarse token's features are copied to the
        tokens that were merged into it, which is what the official weighted mean comes to.
    """

    def __init__(self, dims: Sequence[int], config: MtaConfig) -> None:
        super().__init__()
        self.config = config
        self.laterals = nn.ModuleList(nn.Linear(dim, config.dim) for dim in dims)
        self.blocks = nn.ModuleList(
            TokenBlock(
                config.dim,
                num_heads,
                hidden_dim=int(config.dim * mlp_ratio),
                ratio=ratio,
                norm_eps=REDUCTION_EPS,
                reduction=config.reduction,
            )
            for num_heads, mlp_ratio, ratio in zip(
                config.num_heads, config.mlp_ratios, config.reduction_ratios, strict=True
            )
        )
        num_extra = config.num_outputs - len(dims) if config.extra == "conv" else 0
        self.extra = nn.ModuleList(
            nn.Conv2d(config.dim if i else dims[-1], config.dim, 3, stride=2, padding=1) for i in range(num_extra)
        )
        self.apply(initialise)

    def forward(self, levels: Sequence[Tokens]) -> list[Tensor]:
        """Tokens of each stage, finest first → maps (B, E, Y, X), finest first."""
        merged = [lateral(level.x) for lateral, level in zip(self.laterals, levels, strict=True)]
        for i in reversed(range(len(self.blocks))):
            merged[i] = self.blocks[i](merged[i] + read_parents(merged[i + 1], levels[i + 1]), levels[i].links)
        maps = [token2map(x, level.links) for x, level in zip(merged, levels, strict=True)]
        coarsest = token2map(levels[-1].x, levels[-1].links) if self.extra else maps[-1]
        for conv in self.extra:
            coarsest = conv(coarsest)
            maps.append(coarsest)
        while len(maps) < self.config.num_outputs:
            maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        return maps


def read_parents(x: Tensor, tokens: Tokens) -> Tensor:
    """Give each token of the finer stage what stands at the token that it was merged into.

    Args:
        x: (B, N, E), something for each of these tokens.
        tokens: of the coarser stage.
    Returns: (B, N', E).
    """
    assert tokens.clusters is not None, "the first stage has no finer one"
    return take_tokens(x, tokens.clusters)


# With `tcformer.TCFORMER_FPN_MICRO`.
MTA_MICRO = MtaConfig(dim=64, num_heads=(2, 2, 2), mlp_ratios=(1, 1, 1))
