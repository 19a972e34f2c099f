"""PaCa-ViT: a pyramid vision transformer whose patches attend to a few learned clusters.

Source: Grainger et al. 2023, "PaCa-ViT: Learning Patch-to-Cluster Attention in Vision Transformers"; checked against
the official code (github.com/iVMCL/PaCaViT @4307018).
Differs: the strides of the stem are settings, so that small pictures have a variant; residual branches end in zero
weights at initialisation, so that training from scratch starts at the identity; convolutions start as torch makes them.
Deliberately absent: position embeddings of tokens. Its blocks are in `paca_blocks.py`, clusters made by a teacher in
`paca_teacher.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor, nn

from models.layers import drop_path_rates, map_to_tokens, tokens_to_map
from models.paca_blocks import ConvClustering, MlpClustering, PaCaBlock, initialise

NORM_EPS = 1e-6  # the official code's default for every LayerNorm; all shipped configs keep it


@dataclass(frozen=True, kw_only=True)
class PaCaViTConfig:
    """Numbers that differ between variants; each tuple has one entry per stage.

    Attributes:
        dims: E.
        num_heads: H, divides E.
        depths: blocks.
        mlp_ratios: hidden width over E, of the MLP and of the MLP clustering.
        num_clusters: C; 0 means full attention between patches.
        clustering: how scores are made, by a convolution or an MLP; "teacher": assignments come from outside.
        clustering_kernel_sizes: of the convolutional clustering, odd.
        onsite_clustering: i > 0: every i-th block of the stage, the first included, makes its own assignment and the
            blocks between reuse the latest; 0: only the first block does.
        stem_strides: of the two convolutions before stage 1.
        norm1_eps, norm2_eps, cluster_norm_eps: of the norms before attention, before the MLP and on the clusters.
        drop_path: stochastic depth of the last block; rises linearly from 0.
    """

    dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    depths: tuple[int, ...]
    num_clusters: tuple[int, ...]
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4)
    clustering: Literal["conv", "mlp", "teacher"] = "conv"
    clustering_kernel_sizes: tuple[int, ...] = (7, 7, 7, 7)
    onsite_clustering: tuple[int, ...] = (0, 0, 0, 0)
    stem_strides: tuple[int, int] = (2, 2)
    norm1_eps: float = NORM_EPS
    norm2_eps: float = NORM_EPS
    cluster_norm_eps: float = NORM_EPS
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        """Refuse settings that do not fit together.

        Raises: ValueError naming the setting.
        """
        for name, value in vars(self).items():
            if isinstance(value, tuple) and name != "stem_strides" and len(value) != len(self.dims):
                raise ValueError(f"{name} has {len(value)} entries; dims has {len(self.dims)} stages")
        for dim, heads in zip(self.dims, self.num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"num_heads={heads} must divide model_dim={dim}")


class Downsample(nn.Module):
    """One or two 3x3 convolutions, then LayerNorm over channels: the stem and the transitions between stages."""

    def __init__(self, dims: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(
                nn.Conv2d(dim_in, dim_out, 3, stride=stride, padding=1)
                for dim_in, dim_out, stride in zip(dims[:-1], dims[1:], strides, strict=True)
            )
        )
        self.norm = nn.LayerNorm(dims[-1], eps=NORM_EPS)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Map (B, E_in, Y, X) → tokens (B, N, E) and their smaller grid (Y, X)."""
        x = self.convs(x)
        return self.norm(map_to_tokens(x)), (x.shape[2], x.shape[3])


class StageOutput(NamedTuple):
    """What a stage hands on.

    Attributes:
        tokens: (B, N, E), normalised.
        grid: (Y, X) with N = Y·X.
        clusters: (B, C, N) assignment of the stage's last block, None for full attention.
    """

    tokens: Tensor
    grid: tuple[int, int]
    clusters: Tensor | None


class PaCaStage(nn.Module):
    """Downsampling, blocks, norm.

    Args:
        config: a variant.
        stage: which stage, from 0.
        drop_paths: rate of each block.
    """

    def __init__(self, config: PaCaViTConfig, stage: int, *, drop_paths: Sequence[float]) -> None:
        super().__init__()
        dim = config.dims[stage]
        self.downsample = (
            Downsample((config.dims[stage - 1], dim), (2,))
            if stage
            else Downsample((3, dim // 2, dim), config.stem_strides)
        )
        self.blocks = nn.ModuleList(
            PaCaBlock(
                dim,
                config.num_heads[stage],
                hidden_dim=int(dim * config.mlp_ratios[stage]),
                clustering=_clustering(config, stage, block),
                norm1_eps=config.norm1_eps,
                norm2_eps=config.norm2_eps,
                cluster_norm_eps=config.cluster_norm_eps if config.num_clusters[stage] else None,
                drop_path=drop_path,
            )
            for block, drop_path in enumerate(drop_paths)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> StageOutput:
        """Map (B, E_in, Y, X) → the stage's output on its own, smaller grid."""
        return self.attend(*self.downsample(x))

    def attend(
        self, x: Tensor, grid: tuple[int, int], *, clusters: Tensor | None = None, features: Tensor | None = None
    ) -> StageOutput:
        """Run the stage behind its downsampling.

        Args:
            x: (B, N, E) on the grid (Y, X).
            grid: (Y, X).
            clusters: (B, C, N) assignment for the blocks that make none.
            features: (B, N, E), added before the norm.
        """
        for block in self.blocks:
            x, clusters = block(x, grid, clusters)
        return StageOutput(self.norm(x if features is None else x + features), grid, clusters)


class PaCaViT(nn.Module):
    """The backbone: normalised pictures in, one `StageOutput` per stage out.

    Args:
        config: a variant.
    """

    def __init__(self, config: PaCaViTConfig) -> None:
        super().__init__()
        self.config = config
        rates = drop_path_rates(config.depths, config.drop_path)
        self.stages = nn.ModuleList(
            PaCaStage(config, stage, drop_paths=drop_paths) for stage, drop_paths in enumerate(rates)
        )

    def forward(self, image: Tensor) -> list[StageOutput]:
        """Normalised pictures (B, 3, Y, X) → outputs of the stages, coarsest last."""
        outputs: list[StageOutput] = []
        for stage in self.stages:
            image = tokens_to_map(outputs[-1].tokens, outputs[-1].grid) if outputs else image
            outputs.append(stage(image))
        return outputs


class PaCaViTClassifier(nn.Module):
    """PaCa-ViT with mean pooling and a linear head.

    Args:
        config: a variant.
        num_classes: L.
    """

    def __init__(self, config: PaCaViTConfig, *, num_classes: int) -> None:
        super().__init__()
        self.backbone = PaCaViT(config)
        self.head = nn.Linear(config.dims[-1], num_classes)
        self.apply(initialise)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Classify.

        Args:
            image: (B, 3, Y, X), normalised.
        Returns: logits (B, L) and, for each clustered stage, the assignment (B, C, N).
        """
        return self._answer(self.backbone(image))

    def explain(self, image: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Classify, and tell what each patch of the last stage adds to each logit.

        Args:
            image: (B, 3, Y, X), normalised.
        Returns: as `forward`, then the evidence (B, L, Y, X) on the grid of the last stage. Its sum over the grid is
            the logits, as the norm comes before the mean and the head is linear; the bias is spread evenly.
        """
        stages = self.backbone(image)
        return *self._answer(stages), share_logits(self.head, stages[-1])

    def _answer(self, stages: Sequence[StageOutput]) -> tuple[Tensor, list[Tensor]]:
        return self.head(stages[-1].tokens.mean(dim=1)), assignments(stages)


def assignments(stages: Sequence[StageOutput]) -> list[Tensor]:
    """Tell the assignment (B, C, N) of each stage with clusters."""
    return [stage.clusters for stage in stages if stage.clusters is not None]


def share_logits(head: nn.Module, last: StageOutput) -> Tensor:
    """Share out the logits that a linear head gives for the mean of a stage's tokens: (B, L, Y, X), each patch's part.

    Args:
        head: (B, N, E) → (B, N, L).
        last: the stage.
    """
    return tokens_to_map(head(last.tokens) / last.tokens.shape[1], last.grid)


def _clustering(config: PaCaViTConfig, stage: int, block: int) -> nn.Module | None:
    """Make what a block scores clusters with; None if it reuses an assignment or its stage has no clusters."""
    dim, num_clusters, every = config.dims[stage], config.num_clusters[stage], config.onsite_clustering[stage]
    is_onsite = block % every == 0 if every else block == 0
    if not num_clusters or not is_onsite or config.clustering == "teacher":
        return None
    if config.clustering == "conv":
        return ConvClustering(dim, num_clusters, kernel_size=config.clustering_kernel_sizes[stage])
    return MlpClustering(dim, num_clusters, hidden_dim=int(dim * config.mlp_ratios[stage]))


PACA_VIT_TINY = PaCaViTConfig(
    dims=(96, 192, 320, 384), num_heads=(2, 4, 8, 16), depths=(2, 2, 4, 2), num_clusters=(100, 100, 100, 0)
)
PACA_VIT_SMALL = replace(PACA_VIT_TINY, depths=(3, 3, 10, 3))
PACA_VIT_SMALL_MLP = replace(PACA_VIT_SMALL, clustering="mlp")
PACA_VIT_SMALL_BLOCKWISE = replace(PACA_VIT_SMALL, num_clusters=(100, 100, 100, 100), onsite_clustering=(1, 1, 1, 1))
# The published ablation of the number of clusters: first stage, last stage.
PACA_VIT_SMALL_100_100 = replace(PACA_VIT_SMALL, num_clusters=(100, 100, 100, 100))
PACA_VIT_SMALL_100_49 = replace(PACA_VIT_SMALL, num_clusters=(100, 81, 64, 49))
PACA_VIT_SMALL_49_100 = replace(PACA_VIT_SMALL, num_clusters=(49, 64, 81, 100))
PACA_VIT_SMALL_49_0 = replace(PACA_VIT_SMALL, num_clusters=(49, 49, 49, 0))
PACA_VIT_SMALL_2_0 = replace(PACA_VIT_SMALL, num_clusters=(2, 2, 2, 0))
PACA_VIT_BASE = replace(PACA_VIT_SMALL, dims=(96, 192, 384, 512), depths=(3, 3, 18, 3), drop_path=0.5)

# For pictures of 32x32: half the stem stride and three stages, so that the last one still sees a 4x4 grid. Most blocks
# stand where the grid is 16x16 and 8x8: chosen after one short trial, not shown to be best.
PACA_VIT_MICRO = PaCaViTConfig(
    dims=(64, 128, 256),
    num_heads=(2, 4, 8),
    depths=(2, 4, 1),
    mlp_ratios=(3, 3, 3),
    num_clusters=(32, 32, 0),
    clustering_kernel_sizes=(3, 3, 3),
    onsite_clustering=(0, 0, 0),
    stem_strides=(1, 2),
    drop_path=0.05,
)
