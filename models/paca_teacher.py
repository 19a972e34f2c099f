"""PaCa-ViT whose clusters come from a teacher: a small convolutional pyramid that runs beside the transformer.

Source: Grainger et al. 2023 (PaCa-ViT), external clustering teacher; official code (github.com/iVMCL/PaCaViT @4307018),
`PaCaTeacher_ConvMixer`. The blocks are those of Trockman and Kolter 2022 (ConvMixer), the blur before each stride is
that of Zhang 2019.
Deliberately absent: a stem of the teacher's own and stochastic depth in it, which no published configuration has.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.clustering import soft_assignment
from models.layers import map_to_tokens, tokens_to_map
from models.paca_blocks import initialise
from models.paca_vit import (
    PACA_VIT_BASE,
    PACA_VIT_TINY,
    PaCaStage,
    PaCaViT,
    PaCaViTConfig,
    StageOutput,
    assignments,
    share_logits,
)


@dataclass(frozen=True, kw_only=True)
class PaCaTeacherConfig:
    """Numbers that differ between variants.

    Attributes:
        vit: the transformer; its clustering is "teacher".
        dims, depths: E and blocks of the teacher's stages; the first E is the transformer's, whose stem they share.
        kernel_size: of the teacher's depthwise convolutions, odd.
        adds_features: whether the teacher's maps are added to the stages; only where both have the same dims.
    """

    vit: PaCaViTConfig
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    kernel_size: int = 7
    adds_features: bool = True

    def __post_init__(self) -> None:
        """Refuse settings that do not fit together.

        Raises: ValueError naming the setting.
        """
        if self.vit.clustering != "teacher":
            raise ValueError(f"clustering={self.vit.clustering} of the transformer must be teacher")
        if not len(self.vit.dims) == len(self.dims) == len(self.depths):
            raise ValueError(f"teacher has dims={self.dims}, depths={self.depths}; both need {len(self.vit.dims)}")
        if self.dims[0] != self.vit.dims[0]:
            raise ValueError(f"the teacher's dims={self.dims} must begin with {self.vit.dims[0]}: the stem is shared")
        if self.adds_features and self.dims != self.vit.dims:
            raise ValueError(f"adds_features needs the transformer's dims {self.vit.dims}; the teacher has {self.dims}")


class Lesson(NamedTuple):
    """What the teacher tells one stage.

    Attributes:
        clusters: (B, C, N) assignment; None for a stage without clusters.
        features: (B, N, E), the teacher's own.
    """

    clusters: Tensor | None
    features: Tensor


class MixerBlock(nn.Module):
    """Depthwise convolution with a residual, then a pointwise one; each followed by GELU and batch norm.

    Args:
        dim: E.
        kernel_size: of the depthwise convolution, odd.
    """

    def __init__(self, dim: int, *, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.point = nn.Conv2d(dim, dim, 1)
        self.norm2 = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, E, Y, X) → the same shape."""
        x = x + self.norm1(F.gelu(self.conv(x)))
        return self.norm2(F.gelu(self.point(x)))


class BlurDownsample(nn.Module):
    """A fixed binomial blur, then a 3x3 convolution with stride 2, GELU and batch norm.

    Args:
        dim_in, dim_out: E before and after.
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("blur", (row[:, None] * row / 16).expand(dim_in, 1, 3, 3).clone())
        self.conv = nn.Conv2d(dim_in, dim_out, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, E_in, Y, X) → (B, E_out, ⌈Y / 2⌉, ⌈X / 2⌉)."""
        x = F.conv2d(x, self.get_buffer("blur"), padding=1, groups=x.shape[1])
        return self.norm(F.gelu(self.conv(x)))


class Lateral(nn.Module):
    """Pointwise convolution, GELU, batch norm.

    Args:
        dim_in, dim_out: E before and after.
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim_out, 1)
        self.norm = nn.BatchNorm2d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, E_in, Y, X) → (B, E_out, Y, X)."""
        return self.norm(F.gelu(self.conv(x)))


class PaCaTeacher(nn.Module):
    """ConvMixer stages with a top-down path; each stage's map becomes a cluster assignment.

    Args:
        config: a variant.
    """

    def __init__(self, config: PaCaTeacherConfig) -> None:
        super().__init__()
        size = config.kernel_size
        self.blocks = nn.ModuleList(
            nn.Sequential(*(MixerBlock(dim, kernel_size=size) for _ in range(depth)))
            for dim, depth in zip(config.dims, config.depths, strict=True)
        )
        self.transitions = nn.ModuleList(BlurDownsample(fine, coarse) for fine, coarse in pairwise(config.dims))
        self.laterals = nn.ModuleList(Lateral(coarse, fine) for fine, coarse in pairwise(config.dims))
        self.fuses = nn.ModuleList(MixerBlock(dim, kernel_size=size) for dim in config.dims[:-1])
        self.to_clusters = nn.ModuleList(
            nn.Conv2d(dim, num_clusters, 1) if num_clusters else nn.Identity()
            for dim, num_clusters in zip(config.dims, config.vit.num_clusters, strict=True)
        )

    def forward(self, x: Tensor) -> list[Lesson]:
        """Feature map (B, E, Y, X) behind the stem → a lesson for each stage, each half as fine as the one before."""
        maps: list[Tensor] = []
        for stage, blocks in enumerate(self.blocks):
            x = blocks(self.transitions[stage - 1](x) if stage else x)
            maps.append(x)
        fused = maps.copy()
        for i in reversed(range(len(self.laterals))):
            # The lateral convolution comes behind the up-sampling, as officially: its batch norm saw such maps.
            risen = F.interpolate(fused[i + 1], size=maps[i].shape[2:], mode="bilinear", align_corners=False)
            fused[i] = self.fuses[i](maps[i] + self.laterals[i](risen))
        return [
            Lesson(_assign(layer, fmap), map_to_tokens(own))
            for layer, fmap, own in zip(self.to_clusters, fused, maps, strict=True)
        ]


def _assign(layer: nn.Module, fmap: Tensor) -> Tensor | None:
    return None if isinstance(layer, nn.Identity) else soft_assignment(map_to_tokens(layer(fmap)))


class PaCaTeacherViTClassifier(nn.Module):
    """PaCa-ViT led by a teacher, with mean pooling and a linear head.

    Args:
        config: a variant.
        num_classes: L.
    """

    def __init__(self, config: PaCaTeacherConfig, *, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.backbone = PaCaViT(config.vit)
        self.teacher = PaCaTeacher(config)
        self.head = nn.Linear(config.vit.dims[-1], num_classes)
        self.apply(initialise)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Classify.

        Args:
            image: (B, 3, Y, X), normalised.
        Returns: logits (B, L) and, for each clustered stage, the assignment (B, C, N).
        """
        return self._answer(self.see(image))

    def explain(self, image: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Classify, and tell what each patch of the last stage adds to each logit.

        Args:
            image: (B, 3, Y, X), normalised.
        Returns: as of `PaCaViTClassifier.explain`; the teacher's features are part of what a patch adds.
        """
        outputs = self.see(image)
        return *self._answer(outputs), share_logits(self.head, outputs[-1])

    def see(self, image: Tensor) -> list[StageOutput]:
        """Normalised pictures (B, 3, Y, X) → outputs of the led stages, coarsest last."""
        outputs: list[StageOutput] = []
        lessons: list[Lesson] = []
        for i, stage in enumerate(self.backbone.stages):
            assert isinstance(stage, PaCaStage)
            x, grid = stage.downsample(tokens_to_map(outputs[-1].tokens, outputs[-1].grid) if outputs else image)
            lessons = lessons or self.teacher(tokens_to_map(x, grid))
            features = lessons[i].features if self.config.adds_features else None
            outputs.append(stage.attend(x, grid, clusters=lessons[i].clusters, features=features))
        return outputs

    def _answer(self, outputs: list[StageOutput]) -> tuple[Tensor, list[Tensor]]:
        return self.head(outputs[-1].tokens.mean(dim=1)), assignments(outputs)


def _published(vit: PaCaViTConfig, *, depths: tuple[int, ...], teacher_depths: tuple[int, ...]) -> PaCaTeacherConfig:
    led = replace(vit, depths=depths, num_clusters=(100, 100, 100, 100), clustering="teacher", drop_path=0.1)
    return PaCaTeacherConfig(vit=led, dims=vit.dims, depths=teacher_depths)


PACA_TEACHER_TINY = _published(PACA_VIT_TINY, depths=(2, 2, 2, 2), teacher_depths=(2, 2, 2, 2))
PACA_TEACHER_SMALL = _published(PACA_VIT_TINY, depths=(3, 3, 7, 3), teacher_depths=(2, 2, 2, 2))
PACA_TEACHER_BASE = _published(PACA_VIT_BASE, depths=(3, 3, 16, 3), teacher_depths=(2, 2, 4, 2))
