"""Semantic FPN: a feature pyramid and a light head that give every pixel a class.

Source: Kirillov et al. 2019, "Panoptic Feature Pyramid Networks", section 3; Lin et al. 2017 for the pyramid. The head
is laid out as OpenMMLab's `FPNHead`, so that the cost of published models can be compared.
Differs: every up-sampling goes to the size of the next finer map, so that odd sizes need no second one.
Deliberately absent: the last up-sampling to the picture's size, which belongs to whoever knows that size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class SemanticFpnConfig:
    """Numbers of the head, and of the pyramid where a backbone has no neck of its own.

    Attributes:
        pyramid_dim: E of the pyramid's maps.
        dim: E of the head.
        dropout: share of the channels dropped before the classifier while training.
    """

    pyramid_dim: int = 256
    dim: int = 128
    dropout: float = 0.1


class ConvNormRelu(nn.Sequential):
    """Convolution without bias that keeps the size, batch norm, ReLU.

    Args:
        dim_in, dim_out: E.
        kernel_size: odd.
    """

    def __init__(self, dim_in: int, dim_out: int, *, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim_out, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(dim_out)
        self.activation = nn.ReLU()


class FeaturePyramid(nn.Module):
    """Maps of one width from maps of several: each gets the coarser ones added.

    Args:
        dims: E of the maps, finest first.
        dim: E of the results.
    """

    def __init__(self, dims: Sequence[int], dim: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(dim_in, dim, 1) for dim_in in dims)
        self.outs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in dims)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, E_i, Y_i, X_i), finest first → (B, E, Y_i, X_i)."""
        merged = [lateral(fmap) for lateral, fmap in zip(self.laterals, maps, strict=True)]
        for i in reversed(range(len(merged) - 1)):
            merged[i] = merged[i] + F.interpolate(merged[i + 1], size=merged[i].shape[2:], mode="nearest")
        return [out(fmap) for out, fmap in zip(self.outs, merged, strict=True)]


class RisingConvs(nn.Module):
    """Convolutions that take a map to the size of the finest one, with an up-sampling behind each.

    Args:
        dim_in, dim_out: E before and after.
        num_convs: how many.
    """

    def __init__(self, dim_in: int, dim_out: int, *, num_convs: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            ConvNormRelu(dim_out if i else dim_in, dim_out, kernel_size=3) for i in range(num_convs)
        )

    def forward(self, fmap: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Map (B, E_in, Y, X) and the sizes to reach behind each convolution → (B, E_out, *last size)."""
        for conv, size in zip(self.convs, sizes, strict=True):
            fmap = conv(fmap)
            if fmap.shape[2:] != size:
                fmap = F.interpolate(fmap, size=size, mode="bilinear", align_corners=False)
        return fmap


class SemanticFpnHead(nn.Module):
    """Sum of all maps at the size of the finest, then a classifier.

    Args:
        dims: E of the maps, finest first, each coarser one half as fine.
        config: of the head.
        num_classes: L.
    """

    def __init__(self, dims: Sequence[int], config: SemanticFpnConfig, *, num_classes: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            RisingConvs(dim, config.dim, num_convs=max(level, 1)) for level, dim in enumerate(dims)
        )
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.Conv2d(config.dim, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, E_i, Y_i, X_i), finest first → logits (B, L, Y_0, X_0)."""
        sizes = [(fmap.shape[2], fmap.shape[3]) for fmap in maps]
        risen = [
            level(fmap, sizes[: max(i, 1)][::-1]) for i, (level, fmap) in enumerate(zip(self.levels, maps, strict=True))
        ]
        return self.classifier(self.dropout(sum(risen[1:], risen[0])))
