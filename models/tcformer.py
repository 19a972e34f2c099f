"""TCFormer, first version: a pyramid vision transformer whose tokens follow the picture instead of a grid.

Source: Zeng et al. 2022, "Not All Tokens Are Equal: Human-centric Visual Analysis via Token Clustering Transformer";
checked against the official code (github.com/zengwang430521/TCFormer @1ea72a8).
Differs: clustering draws no noise, so that equal pictures give equal answers; residual branches end in zero weights at
initialisation, so that training from scratch starts at the identity; convolutions start as torch makes them; the last
width is free in the classifier (official: 512).
Deliberately absent: position embeddings, which no stage has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from models.layers import drop_path_rates, map_to_tokens
from models.mta import Mta, MtaConfig
from models.semantic_fpn import SemanticFpnConfig, SemanticFpnHead
from models.token_blocks import (
    REDUCTION_EPS,
    Clustering,
    Ctm,
    GlobalClustering,
    Source,
    TokenBlock,
    Tokens,
    initialise,
)
from models.token_exchange import link_tokens

NORM_EPS = 1e-6  # official code: norms of blocks and stages of the backbone


@dataclass(frozen=True, kw_only=True)
class TCFormerConfig:
    """Numbers that differ between variants; each tuple has one entry per stage, those of merging one less.

    Attributes:
        dims: E.
        num_heads: H, divides E.
        depths: blocks.
        mlp_ratios: hidden width over E.
        reduction_ratios: rows and columns of the map that become one key; 1 attends to tokens.
        sample_ratios: tokens after merging over tokens before.
        num_neighbors: K of DPC-KNN.
        stem_stride: rows and columns of pixels that become one token of the first stage.
        drop_path: stochastic depth of the last block; rises linearly from 0.
    """

    dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    reduction_ratios: tuple[int, ...] = (8, 4, 2, 1)
    sample_ratios: tuple[float, ...] = (0.25, 0.25, 0.25)
    num_neighbors: int = 5
    stem_stride: int = 4
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        """Refuse settings that do not fit together.

        Raises: ValueError naming the setting.
        """
        for name, value in vars(self).items():
            expected = len(self.dims) - int(name == "sample_ratios")
            if isinstance(value, tuple) and len(value) != expected:
                raise ValueError(f"{name} has {len(value)} entries; dims with {len(self.dims)} needs {expected}")
        for ratio in self.sample_ratios:
            if not 0 < ratio <= 1:
                raise ValueError(f"sample ratio={ratio} must lie in (0, 1]")

    @property
    def smallest_side(self) -> int:
        """Pixels that a picture needs each way, so that every map has a key for attention."""
        return max((ratio - 1) * self.stem_stride * 2**stage for stage, ratio in enumerate(self.reduction_ratios)) + 1


class TCFormerStage(nn.Module):
    """Merging, blocks, norm.

    Args:
        config: a variant.
        stage: which stage, from 0.
        clustering: groups the tokens before the blocks; None in the first stage.
        drop_paths: rate of each block.
    """

    def __init__(
        self, config: TCFormerConfig, stage: int, *, clustering: Clustering | None, drop_paths: Sequence[float]
    ) -> None:
        super().__init__()
        dim = config.dims[stage]
        self.ctm = Ctm(config.dims[stage - 1], dim, clustering) if clustering is not None else None
        self.blocks = nn.ModuleList(
            TokenBlock(
                dim,
                config.num_heads[stage],
                hidden_dim=int(dim * config.mlp_ratios[stage]),
                ratio=config.reduction_ratios[stage],
                norm_eps=NORM_EPS,
                has_skip=stage > 0,
                drop_path=drop_path,
            )
            for drop_path in drop_paths
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens of the stage before → tokens of this one, normalised."""
        source: Source | None = None
        if self.ctm is not None:
            tokens, source = self.ctm(tokens)
        x = tokens.x
        for block in self.blocks:
            x = block(x, tokens.links, source)
            source = None  # only the first block sees the tokens before merging
        return tokens._replace(x=self.norm(x))


class TCFormer(nn.Module):
    """The backbone: normalised pictures in, the tokens of every stage out.

    Args:
        config: a variant.
        clusterings: one for each stage but the first; None is DPC-KNN over the whole picture.
    """

    def __init__(self, config: TCFormerConfig, clusterings: Sequence[Clustering] | None = None) -> None:
        super().__init__()
        self.config = config
        if clusterings is None:
            clusterings = [
                GlobalClustering(sample_ratio=ratio, num_neighbors=config.num_neighbors)
                for ratio in config.sample_ratios
            ]
        self.embed = nn.Conv2d(3, config.dims[0], 7, stride=config.stem_stride, padding=3)
        self.embed_norm = nn.LayerNorm(config.dims[0], eps=REDUCTION_EPS)
        rates = drop_path_rates(config.depths, config.drop_path)
        self.stages = nn.ModuleList(
            TCFormerStage(config, stage, clustering=clustering, drop_paths=drop_paths)
            for stage, (drop_paths, clustering) in enumerate(zip(rates, [None, *clusterings], strict=True))
        )
        self.apply(initialise)

    def forward(self, image: Tensor) -> list[Tokens]:
        """See a picture.

        Args:
            image: (B, 3, Y, X), normalised.
        Returns: tokens of each stage, finest first.
        Raises: ValueError if the picture has too few pixels for a single key.
        """
        if min(image.shape[2:]) < self.config.smallest_side:
            raise ValueError(
                f"picture has {image.shape[2]}x{image.shape[3]} pixels; this model needs "
                f"{self.config.smallest_side} each way; scale it up"
            )
        fmap = self.embed(image)
        x = self.embed_norm(map_to_tokens(fmap))
        grid = (fmap.shape[2], fmap.shape[3])
        outputs = [Tokens(x, link_tokens(None, num_tokens=x.shape[1], cell_grid=grid, grid=grid))]
        for stage in self.stages:
            outputs.append(stage(outputs[-1]))
        return outputs[1:]


class TCFormerClassifier(nn.Module):
    """TCFormer with mean pooling and a linear head.

    Args:
        config: a variant.
        num_classes: L.
    """

    def __init__(self, config: TCFormerConfig, *, num_classes: int) -> None:
        super().__init__()
        self.backbone = TCFormer(config)
        self.head = nn.Linear(config.dims[-1], num_classes)
        initialise(self.head)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Classify.

        Args:
            image: (B, 3, Y, X), normalised.
        Returns: logits (B, L) and the regions of `regions`.
        """
        levels = self.backbone(image)
        return self.head(levels[-1].x.mean(dim=1)), regions(levels)


class TCFormerSegmenter(nn.Module):
    """TCFormer with its neck and a Semantic-FPN head.

    Args:
        config: a variant.
        neck: of the neck.
        head: of the head.
        num_classes: L.
    """

    def __init__(
        self,
        config: TCFormerConfig,
        *,
        num_classes: int,
        neck: MtaConfig | None = None,
        head: SemanticFpnConfig | None = None,
    ) -> None:
        super().__init__()
        neck = neck or MtaConfig()
        self.backbone = TCFormer(config)
        self.neck = Mta(config.dims, neck)
        self.head = SemanticFpnHead([neck.dim] * neck.num_outputs, head or SemanticFpnConfig(), num_classes=num_classes)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Segment.

        Args:
            image: (B, 3, Y, X), normalised.
        Returns: logits (B, L, ⌈Y / 4⌉, ⌈X / 4⌉) and the regions of `regions`.
        """
        levels = self.backbone(image)
        return self.head(self.neck(levels)), regions(levels)


class TCFormerKeypoints(nn.Module):
    """TCFormer with its neck and heat maps of keypoints, the published whole-body pose models.

    Args:
        config: a variant.
        neck: of the neck.
        num_keypoints: heat maps.
    """

    def __init__(self, config: TCFormerConfig, *, num_keypoints: int, neck: MtaConfig | None = None) -> None:
        super().__init__()
        neck = neck or MtaConfig()
        self.backbone = TCFormer(config)
        self.neck = Mta(config.dims, neck)
        self.head = nn.Conv2d(neck.dim, num_keypoints, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Normalised pictures (B, 3, Y, X) → heat maps (B, keypoints, ⌈Y / 4⌉, ⌈X / 4⌉) and the `regions`."""
        levels = self.backbone(image)
        return self.head(self.neck(levels)[0]), regions(levels)


def regions(levels: Sequence[Tokens]) -> list[Tensor]:
    """Tell the token of each cell, for every stage with dynamic tokens: (B, M) int64, M = ⌈Y / 4⌉ · ⌈X / 4⌉."""
    return [level.links.token_of_cell for level in levels if level.links.token_of_cell is not None]


TCFORMER_BASE = TCFormerConfig(dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8), depths=(3, 4, 6, 3))
TCFORMER_LIGHT = replace(TCFORMER_BASE, depths=(2, 2, 2, 2))
TCFORMER_LARGE = replace(TCFORMER_BASE, depths=(3, 8, 27, 3))

# Small enough to train from scratch on a few hundred pictures of 480x360; where tokens are many, blocks are few.
TCFORMER_FPN_MICRO = TCFormerConfig(
    dims=(32, 64, 128, 160), num_heads=(1, 2, 4, 5), depths=(1, 2, 2, 2), mlp_ratios=(4, 4, 3, 3), drop_path=0.05
)

# For pictures of 32x32: half the stride of the stem and three stages, as PaCa-ViT's micro variant.
TCFORMER_MICRO = TCFormerConfig(
    dims=(48, 96, 192),
    num_heads=(2, 4, 6),
    depths=(2, 4, 1),
    mlp_ratios=(3, 3, 3),
    reduction_ratios=(4, 2, 1),
    sample_ratios=(0.25, 0.25),
    stem_stride=2,
    drop_path=0.05,
)
