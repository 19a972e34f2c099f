"""TCFormerV2, a reconstruction: token clustering inside nested parts, and a neck whose keys are clusters.

No code, names or weights of TCFormerV2 (Zeng et al. 2024, arXiv 2407.11321) are public, and its text was not at hand.
What is here follows two things: unreleased code of its first author, whose outputs the clustering in parts and the
attention to clusters reproduce, and the published cost of TCFormerV2-Small with a Semantic-FPN head, 44.4 GMAC at
512x512 against 92.4 of the first version.

Source: github.com/zengwang430521/mmpose, branch mywhole @c9ede5f, `AggregateAttention`, `AggregateBlock`.
Differs: stages, blocks and merging are those of the first version; no noise is drawn.
Deliberately absent: anything said to be equal to the published TCFormerV2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import full_attention
from models.mta import read_parents
from models.semantic_fpn import SemanticFpnConfig, SemanticFpnHead
from models.tcformer import TCFORMER_BASE, TCFORMER_FPN_MICRO, TCFormer, TCFormerConfig, regions
from models.token_blocks import REDUCTION_EPS, Clustering, TokenMlp, Tokens, initialise
from models.token_exchange import Grid, token2map
from models.token_merging import token_downup
from models.token_parts import LocalClustering


@dataclass(frozen=True, kw_only=True)
class TCFormerV2ReconstructionConfig:
    """Numbers of the reconstruction.

    The defaults are where what is known meets. The author's code has two sets of parts: 16, 4, 1 and 64, 16, 4. The
    neck of the published pose models is 256 wide with 4 heads. With the finer parts, that neck, and MLPs in it that do
    not widen, a Semantic-FPN model costs 44.2 GMAC at 512x512, where 44.4 are published. With the coarser parts it
    costs 47.2; with MLPs that double 47.1, and with those of the first version, 4 times as wide, 52.9. A neck of 128,
    the default of the official class `MTA`, gives 40.2 with the coarser parts and the wide MLPs, further away.

    Attributes:
        backbone: the first version's numbers.
        parts: rows and columns of parts at each merge; each divides the one before.
        neck_dim: E of the neck's maps.
        neck_num_heads, neck_mlp_ratios: H, and hidden width over E, one per level but the coarsest.
    """

    backbone: TCFormerConfig
    parts: tuple[Grid, ...] = ((8, 8), (4, 4), (2, 2))
    neck_dim: int = 256
    neck_num_heads: tuple[int, ...] = (4, 4, 4)
    neck_mlp_ratios: tuple[float, ...] = (1, 1, 1)

    def __post_init__(self) -> None:
        """Refuse settings that do not fit together.

        Raises: ValueError naming the setting.
        """
        if len(self.parts) != len(self.backbone.sample_ratios):
            raise ValueError(
                f"parts has {len(self.parts)} entries; {len(self.backbone.sample_ratios)} merges need one each"
            )
        for fine, coarse in pairwise(self.parts):
            if fine[0] % coarse[0] or fine[1] % coarse[1]:
                raise ValueError(f"parts {coarse} do not nest: each number must divide its own in {fine}")


class ClusterAttention(nn.Module):
    """Attention from tokens to the means of tokens in the clusters of the last stage (clustering reduction).

    Args:
        dim: E.
        num_heads: H, divides E.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide model_dim={dim}")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=REDUCTION_EPS)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Tokens (B, N, E) and the means of the clusters (B, S, E) → (B, N, E)."""
        keys = F.gelu(self.norm(source))
        q, k, v = (
            tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N | S, D)
            for tokens in (self.q(x), *self.kv(keys).chunk(2, dim=-1))
        )
        return self.proj(full_attention(q, k, v).transpose(1, 2).flatten(2))


class ClusterBlock(nn.Module):
    """Pre-norm block of `ClusterAttention` and the convolutional MLP.

    Args:
        dim, num_heads: as in `ClusterAttention`.
        hidden_dim: of the MLP.
    """

    def __init__(self, dim: int, num_heads: int, *, hidden_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=REDUCTION_EPS)
        self.attention = ClusterAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=REDUCTION_EPS)
        self.mlp = TokenMlp(dim, hidden_dim, has_skip=True)

    def forward(self, x: Tensor, tokens: Tokens, last: Tokens) -> Tensor:
        """Features (B, N, E) of a level's tokens, these tokens and those of the last stage → (B, N, E)."""
        normed = self.norm1(x)
        x = x + self.attention(normed, average_in_clusters(normed, tokens, last))
        return x + self.mlp(self.norm2(x), tokens.links)


def average_in_clusters(x: Tensor, tokens: Tokens, last: Tokens) -> Tensor:
    """Average features (B, N, E) of a level's tokens inside each token of the last stage: (B, S, E)."""
    assert last.links.token_of_cell is not None, "the last stage has dynamic tokens"
    assert last.cell_weights is not None, "the last stage has dynamic tokens"
    return token_downup(
        x,
        tokens.links.token_of_cell,
        last.links.token_of_cell,
        last.cell_weights,
        num_targets=last.links.num_tokens,
    )


class ClusterReductionMta(nn.Module):
    """The neck: as `mta.Mta`, with keys that are clusters of the last stage instead of cells of a reduced map.

    Args:
        config: of the reconstruction.
    """

    def __init__(self, config: TCFormerV2ReconstructionConfig) -> None:
        super().__init__()
        dim = config.neck_dim
        self.laterals = nn.ModuleList(nn.Linear(dim_in, dim) for dim_in in config.backbone.dims)
        self.blocks = nn.ModuleList(
            ClusterBlock(dim, num_heads, hidden_dim=int(dim * mlp_ratio))
            for num_heads, mlp_ratio in zip(config.neck_num_heads, config.neck_mlp_ratios, strict=True)
        )
        self.apply(_initialise)

    def forward(self, levels: Sequence[Tokens]) -> list[Tensor]:
        """Tokens of each stage, finest first → maps (B, E, Y, X), finest first."""
        merged = [lateral(level.x) for lateral, level in zip(self.laterals, levels, strict=True)]
        for i in reversed(range(len(self.blocks))):
            x = merged[i] + read_parents(merged[i + 1], levels[i + 1])
            merged[i] = self.blocks[i](x, levels[i], levels[-1])
        return [token2map(x, level.links) for x, level in zip(merged, levels, strict=True)]


def _initialise(module: nn.Module) -> None:
    initialise(module)
    if isinstance(module, ClusterBlock):
        nn.init.zeros_(module.attention.proj.weight)
        nn.init.zeros_(module.mlp.fc2.weight)


def make_backbone(config: TCFormerV2ReconstructionConfig) -> TCFormer:
    """Make the first version's backbone with clustering inside parts."""
    clusterings: list[Clustering] = [
        LocalClustering(parts=config.parts, merge=i, sample_ratio=ratio, num_neighbors=config.backbone.num_neighbors)
        for i, ratio in enumerate(config.backbone.sample_ratios)
    ]
    return TCFormer(config.backbone, clusterings)


class TCFormerV2ReconstructionClassifier(nn.Module):
    """The reconstruction with mean pooling and a linear head.

    Args:
        config: a variant.
        num_classes: L.
    """

    def __init__(self, config: TCFormerV2ReconstructionConfig, *, num_classes: int) -> None:
        super().__init__()
        self.backbone = make_backbone(config)
        self.head = nn.Linear(config.backbone.dims[-1], num_classes)
        initialise(self.head)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Classify: as `tcformer.TCFormerClassifier.forward`."""
        levels = self.backbone(image)
        return self.head(levels[-1].x.mean(dim=1)), regions(levels)


class TCFormerV2ReconstructionSegmenter(nn.Module):
    """The reconstruction with its neck and a Semantic-FPN head.

    Args:
        config: a variant.
        num_classes: L.
        head: of the head.
    """

    def __init__(
        self, config: TCFormerV2ReconstructionConfig, *, num_classes: int, head: SemanticFpnConfig | None = None
    ) -> None:
        super().__init__()
        dims = [config.neck_dim] * len(config.backbone.dims)
        self.backbone = make_backbone(config)
        self.neck = ClusterReductionMta(config)
        self.head = SemanticFpnHead(dims, head or SemanticFpnConfig(), num_classes=num_classes)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Segment: as `tcformer.TCFormerSegmenter.forward`."""
        levels = self.backbone(image)
        return self.head(self.neck(levels)), regions(levels)


TCFORMER_V2_RECONSTRUCTION_BASE = TCFormerV2ReconstructionConfig(backbone=TCFORMER_BASE)

TCFORMER_V2_RECONSTRUCTION_FPN_MICRO = TCFormerV2ReconstructionConfig(
    backbone=TCFORMER_FPN_MICRO, neck_dim=64, neck_num_heads=(2, 2, 2)
)
