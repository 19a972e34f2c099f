"""Dense prediction with PaCa-ViT: the paper's own head, whose clusters are the classes, and a Semantic-FPN head.

Source: Grainger et al. 2023 (PaCa-ViT), PaCa segmentation head; official code (github.com/iVMCL/PaCaViT @4307018),
`PaCaSegHead`.
Differs: batch norms are not synchronised between processes.
Deliberately absent: UperNet and Mask R-CNN heads; the up-sampling to the picture's size.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.clustering import soft_assignment
from models.layers import map_to_tokens, tokens_to_map
from models.paca_blocks import initialise
from models.paca_vit import (
    PACA_VIT_BASE,
    PACA_VIT_SMALL,
    PACA_VIT_TINY,
    PaCaViT,
    PaCaViTConfig,
    StageOutput,
    assignments,
)
from models.semantic_fpn import ConvNormRelu, FeaturePyramid, SemanticFpnConfig, SemanticFpnHead

HEAD_DIM = 256  # every published configuration
DROPOUT = 0.1  # before the classifier, every published configuration


class ClusterProjection(nn.Module):
    """Linear layer on cluster tokens, batch norm over batch and clusters, ReLU.

    Args:
        dim_in, dim_out: E before and after.
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim_in, dim_out)
        self.norm = nn.BatchNorm1d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, E_in) → (B, C, E_out)."""
        return F.relu(self.norm(self.fc(x).mT).mT)


class PaCaSegHead(nn.Module):
    """One attention from all pixels to one cluster per class; the clusters are trained to be the classes.

    Args:
        dims: E of the backbone's maps, finest first.
        num_classes: L, and the number of clusters.
        dim: E of the head.
    """

    def __init__(self, dims: Sequence[int], *, num_classes: int, dim: int = HEAD_DIM) -> None:
        super().__init__()
        total = dim * len(dims)
        self.laterals = nn.ModuleList(ConvNormRelu(dim_in, dim, kernel_size=1) for dim_in in dims)
        self.q = ConvNormRelu(total, dim, kernel_size=1)
        self.cluster_hidden = ConvNormRelu(total, dim, kernel_size=1)
        self.cluster_scores = nn.Conv2d(dim, num_classes, 1)
        self.k = ClusterProjection(total, dim)
        self.v = ClusterProjection(total, dim)
        self.proj = ConvNormRelu(dim, dim, kernel_size=1)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(dim, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Segment.

        Args:
            maps: (B, E_i, Y_i, X_i), finest first.
        Returns: logits (B, L, Y_0, X_0), and the scores of the clusters in the same shape, which a loss of their own
            (officially cross-entropy with weight 0.4) makes class maps too.
        """
        size = maps[0].shape[2:]
        levels = [
            F.interpolate(lateral(fmap), size=size, mode="bilinear", align_corners=False)
            for lateral, fmap in zip(self.laterals, maps, strict=True)
        ]
        x = torch.cat(levels, dim=1)
        scores = self.cluster_scores(self.cluster_hidden(x))
        clusters = soft_assignment(map_to_tokens(scores)) @ map_to_tokens(x)  # (B, C, E)
        # No 1/√E here: the official head has none, and its weights expect none.
        weights = (map_to_tokens(self.q(x)) @ self.k(clusters).mT).softmax(dim=-1)
        attended = tokens_to_map(weights @ self.v(clusters), (size[0], size[1]))
        return self.classifier(self.dropout(self.proj(attended))), scores


class PaCaSegmenter(nn.Module):
    """PaCa-ViT with the paper's segmentation head.

    Args:
        config: of the backbone.
        num_classes: L.
        head_dim: E of the head.
    """

    def __init__(self, config: PaCaViTConfig, *, num_classes: int, head_dim: int = HEAD_DIM) -> None:
        super().__init__()
        self.backbone = PaCaViT(config)
        self.head = PaCaSegHead(config.dims, num_classes=num_classes, dim=head_dim)
        self.backbone.apply(initialise)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Segment.

        Args:
            image: (B, 3, Y, X), normalised.
        Returns: logits (B, L, ⌈Y / 4⌉, ⌈X / 4⌉); for each clustered stage, the assignment (B, C, N); the head's cluster
            scores, shaped as the logits.
        """
        stages = self.backbone(image)
        logits, scores = self.head(_maps(stages))
        return logits, assignments(stages), scores


class PaCaFpnSegmenter(nn.Module):
    """PaCa-ViT with a feature pyramid and a Semantic-FPN head.

    Args:
        config: of the backbone.
        num_classes: L.
        head: of pyramid and head.
    """

    def __init__(self, config: PaCaViTConfig, *, num_classes: int, head: SemanticFpnConfig | None = None) -> None:
        super().__init__()
        head = head or SemanticFpnConfig()
        self.backbone = PaCaViT(config)
        self.neck = FeaturePyramid(config.dims, head.pyramid_dim)
        self.head = SemanticFpnHead([head.pyramid_dim] * len(config.dims), head, num_classes=num_classes)
        self.backbone.apply(initialise)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Segment: normalised pictures (B, 3, Y, X) → logits and assignments as of `PaCaSegmenter`."""
        stages = self.backbone(image)
        return self.head(self.neck(_maps(stages))), assignments(stages)


def _maps(stages: Sequence[StageOutput]) -> list[Tensor]:
    return [tokens_to_map(stage.tokens, stage.grid) for stage in stages]


# The published segmentation backbones: as for classification, with twice the clusters.
_SEG_CLUSTERS = (200, 200, 200, 0)
PACA_SEG_TINY = replace(PACA_VIT_TINY, num_clusters=_SEG_CLUSTERS)
PACA_SEG_SMALL = replace(PACA_VIT_SMALL, num_clusters=_SEG_CLUSTERS)
PACA_SEG_BASE = replace(PACA_VIT_BASE, num_clusters=_SEG_CLUSTERS)

# Small enough to train from scratch on a few hundred pictures of 480x360 in about an hour of one core.
PACA_FPN_MICRO = PaCaViTConfig(
    dims=(32, 64, 128, 192),
    num_heads=(1, 2, 4, 6),
    depths=(2, 2, 4, 2),
    num_clusters=(64, 64, 64, 0),
    drop_path=0.05,
)
FPN_MICRO = SemanticFpnConfig(pyramid_dim=64, dim=64)
