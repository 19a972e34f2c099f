"""Layers of transformers on dynamic tokens: attention, convolutional MLP, and the clustering token merge (CTM).

On tokens that are still the cells of a grid they are the layers of PVTv2, so TCFormer's first stage uses them too.

Source: Zeng et al. 2022 (TCFormer), sections 3.2 and 3.3, and the official code (github.com/zengwang430521/TCFormer
@1ea72a8); Wang et al. 2022 (PVTv2) for attention to a reduced map.
Differs: the depthwise skip of the MLP is a vector that starts at 1 instead of a convolution that starts at random.
Deliberately absent: dropout inside attention and MLP, which no published configuration uses.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import full_attention
from models.density_peaks import dpc_knn
from models.layers import DropPath, initialise_linear, map_to_tokens
from models.token_exchange import Grid, Links, link_tokens, map2token, token2map
from models.token_merging import merge_tokens

REDUCTION_EPS = 1e-5  # official code: norms that are built without an eps, after the patch embedding and in CTM too

Reduction = Literal["conv", "pool"]


class Tokens(NamedTuple):
    """Dynamic tokens of a batch of pictures, on the map on which convolutions see them.

    Attributes:
        x: (B, N, E).
        links: of the tokens and their map; they hold the cells that each token is made of.
        cell_weights: (B, M), how much a cell weighs in its token; None is 1.
        clusters: (B, N') int64, where each token of the stage before went; None in the first stage.
    """

    x: Tensor
    links: Links
    cell_weights: Tensor | None = None
    clusters: Tensor | None = None


class Source(NamedTuple):
    """Tokens that others attend to: those before merging.

    Attributes:
        x: (B, S, E).
        score: (B, S, 1), added to the logits of attention.
        links: of these tokens and the map of those who attend.
    """

    x: Tensor
    score: Tensor
    links: Links


class TokenMlp(nn.Module):
    """MLP whose hidden layer passes a depthwise 3x3 convolution on the tokens' map.

    Args:
        dim: E.
        hidden_dim: width of the hidden layer.
        has_skip: whether the hidden layer, scaled by channel, is added to the convolved one.
    """

    def __init__(self, dim: int, hidden_dim: int, *, has_skip: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.skip = nn.Parameter(torch.ones(hidden_dim)) if has_skip else None
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, links: Links) -> Tensor:
        """Tokens (B, N, E) and their links → (B, N, E)."""
        x = self.fc1(x)
        mixed = map2token(self.conv(token2map(x, links)), links)
        return self.fc2(F.gelu(mixed if self.skip is None else mixed + x * self.skip))


class TokenAttention(nn.Module):
    """Attention to a reduced map of tokens, or to the tokens themselves where the ratio is 1.

    Args:
        dim: E.
        num_heads: H, divides E.
        ratio: rows and columns of the map that become one key.
        reduction: how: a convolution and a norm, or the mean.
    """

    def __init__(self, dim: int, num_heads: int, *, ratio: int, reduction: Reduction) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide model_dim={dim}")
        self.num_heads = num_heads
        self.ratio = ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        has_conv = ratio > 1 and reduction == "conv"
        self.reduce = nn.Conv2d(dim, dim, ratio, stride=ratio) if has_conv else None
        self.norm = nn.LayerNorm(dim, eps=REDUCTION_EPS) if has_conv else None

    def forward(self, x: Tensor, source: Tensor, links: Links, score: Tensor | None) -> Tensor:
        """Attend.

        Args:
            x: (B, N, E), who attends.
            source: (B, S, E), who is attended to.
            links: of the source and the map of those who attend.
            score: (B, S, 1) of the source, or None.
        Returns: (B, N, E).
        """
        if self.ratio > 1:
            source = self._reduce(token2map(source, links))
            score = None if score is None else map_to_tokens(F.avg_pool2d(token2map(score, links), self.ratio))
        q, k, v = (
            tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N | S, D)
            for tokens in (self.q(x), *self.kv(source).chunk(2, dim=-1))
        )
        attended = full_attention(q, k, v) if score is None else biased_attention(q, k, v, score)
        return self.proj(attended.transpose(1, 2).flatten(2))

    def _reduce(self, fmap: Tensor) -> Tensor:
        if self.reduce is None or self.norm is None:
            return map_to_tokens(F.avg_pool2d(fmap, self.ratio))
        return self.norm(map_to_tokens(self.reduce(fmap)))


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attend with something added to the logits of each key.

    Args:
        q: (B, H, N, D).
        k, v: (B, H, S, D).
        bias: (B, S, 1).
    Returns: (B, H, N, D).
    """
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias.mT[:, None]
    return logits.softmax(dim=-1) @ v


class TokenBlock(nn.Module):
    """Pre-norm transformer block: attention, then the convolutional MLP.

    Args:
        dim, num_heads, ratio, reduction: as in `TokenAttention`.
        hidden_dim, has_skip: as in `TokenMlp`.
        norm_eps: of both norms.
        drop_path: share of the samples that skip a branch while training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        hidden_dim: int,
        ratio: int,
        norm_eps: float,
        reduction: Reduction = "conv",
        has_skip: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attention = TokenAttention(dim, num_heads, ratio=ratio, reduction=reduction)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = TokenMlp(dim, hidden_dim, has_skip=has_skip)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, links: Links, source: Source | None = None) -> Tensor:
        """Tokens (B, N, E) with their links; they attend to the source, to themselves where it is None → (B, N, E)."""
        normed = self.norm1(x)
        if source is None:
            attended = self.attention(normed, normed, links, None)
        else:
            attended = self.attention(normed, self.norm1(source.x), source.links, source.score)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x), links))


def initialise(module: nn.Module) -> None:
    """Set fresh weights of a linear layer; of a block, those that end its residual branches."""
    initialise_linear(module)
    if isinstance(module, TokenBlock):
        nn.init.zeros_(module.attention.proj.weight)
        nn.init.zeros_(module.mlp.fc2.weight)


class Clustering(Protocol):
    """How a CTM groups its tokens."""

    @property
    def num_parts(self) -> int:
        """Parts of the picture whose tokens never meet; only pairs inside a part are compared."""

    def __call__(self, x: Tensor, cell_grid: Grid) -> tuple[Tensor, int]:
        """Tokens (B, N, E) of cells on the grid → clusters (B, N) int64 in [0, C), and C."""


@dataclass(frozen=True, kw_only=True)
class GlobalClustering:
    """DPC-KNN over the whole picture.

    Attributes:
        sample_ratio: C over N.
        num_neighbors: K.
    """

    sample_ratio: float
    num_neighbors: int
    num_parts: int = 1

    def __call__(self, x: Tensor, cell_grid: Grid) -> tuple[Tensor, int]:  # noqa: ARG002 - called as every Clustering
        """As in `Clustering`."""
        C = max(math.ceil(x.shape[1] * self.sample_ratio), 1)
        return dpc_knn(x, num_clusters=C, num_neighbors=self.num_neighbors).clusters, C


class Ctm(nn.Module):
    """Clustering token merge: a convolution with stride 2, scores, clusters, and their weighted means.

    Args:
        dim_in, dim_out: E before and after.
        clustering: groups the tokens.
    """

    def __init__(self, dim_in: int, dim_out: int, clustering: Clustering) -> None:
        super().__init__()
        self.clustering = clustering
        self.conv = nn.Conv2d(dim_in, dim_out, 3, stride=2, padding=1)
        self.skip = nn.Linear(dim_in, dim_out, bias=False)
        self.norm = nn.LayerNorm(dim_out, eps=REDUCTION_EPS)
        self.score = nn.Linear(dim_out, 1)

    def forward(self, tokens: Tokens) -> tuple[Tokens, Source]:
        """Merge tokens: fewer on a coarser map, and those before merging, which their first block attends to."""
        links = tokens.links
        fmap = self.conv(token2map(tokens.x, links))
        grid = (fmap.shape[2], fmap.shape[3])
        shares = torch.promote_types(fmap.dtype, torch.float32)  # under autocast too
        coarse_links = link_tokens(
            links.token_of_cell, num_tokens=links.num_tokens, cell_grid=links.cell_grid, grid=grid, dtype=shares
        )
        x = self.norm(self.skip(tokens.x) + map2token(fmap, coarse_links))
        score = self.score(x)
        clusters, num_clusters = self.clustering(x, links.cell_grid)
        merged, token_of_cell, cell_weights = merge_tokens(
            x, score.exp().squeeze(-1), clusters, links.token_of_cell, tokens.cell_weights, num_clusters=num_clusters
        )
        merged_links = link_tokens(
            token_of_cell, num_tokens=num_clusters, cell_grid=links.cell_grid, grid=grid, dtype=shares
        )
        return Tokens(merged, merged_links, cell_weights, clusters), Source(x, score, coarse_links)
