"""Layers of PaCa-ViT: what scores clusters, attention from patches to clusters, and the block around it.

Source: Grainger et al. 2023, "PaCa-ViT: Learning Patch-to-Cluster Attention in Vision Transformers"; checked against
the official code (github.com/iVMCL/PaCaViT @4307018).
Deliberately absent: linear clustering, position embeddings of clusters, layer scale, MLPs without convolution.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import full_attention
from models.clustering import soft_assignment
from models.layers import ConvMlp, DropPath, initialise_linear, map_to_tokens, tokens_to_map


class ConvClustering(nn.Module):
    """Scores from a depthwise convolution and two pointwise layers.

    Args:
        dim: E.
        num_clusters: C.
        kernel_size: of the depthwise convolution, odd.
    """

    def __init__(self, dim: int, num_clusters: int, *, kernel_size: int) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"clustering kernel size={kernel_size} must be odd to keep the grid")
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.hidden = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, num_clusters, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, N, E) on the grid (Y, X) → scores (B, N, C)."""
        x = map_to_tokens(self.conv(tokens_to_map(x, grid)))
        return self.out(F.gelu(self.hidden(F.gelu(x))))


class MlpClustering(nn.Module):
    """Scores from a two-layer MLP on each token alone.

    Args:
        dim: E.
        num_clusters: C.
        hidden_dim: width of the hidden layer.
    """

    def __init__(self, dim: int, num_clusters: int, *, hidden_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, num_clusters)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # noqa: ARG002 - called as ConvClustering is
        """Tokens (B, N, E) on the grid (Y, X), which is not used → scores (B, N, C)."""
        return self.out(F.gelu(self.hidden(x)))


class PaCaAttention(nn.Module):
    """Attention from N patches to C clusters, or to all patches where there are no clusters.

    Args:
        dim: E.
        num_heads: H, divides E.
        clustering: module that makes the scores; None where the assignment comes from elsewhere, or there is none.
        cluster_norm_eps: of the norm on the clusters; None where patches attend to patches.
    """

    def __init__(
        self, dim: int, num_heads: int, *, clustering: nn.Module | None, cluster_norm_eps: float | None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.clustering = clustering
        self.cluster_norm = None if cluster_norm_eps is None else nn.LayerNorm(dim, eps=cluster_norm_eps)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int], clusters: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            x: (B, N, E) on the grid (Y, X).
            grid: (Y, X).
            clusters: (B, C, N) assignment that is used where the module makes none.
        Returns: (B, N, E) and the assignment used, None for full attention.
        """
        source = x
        if self.clustering is not None:
            clusters = soft_assignment(self.clustering(x, grid))  # (B, C, N)
        if self.cluster_norm is not None:
            assert clusters is not None, "an assignment is made here or comes from elsewhere"
            source = self.cluster_norm(clusters @ x)  # (B, C, E)
        q, k, v = (
            layer(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N | C, D)
            for layer, tokens in ((self.q, x), (self.k, source), (self.v, source))
        )
        return self.proj(full_attention(q, k, v).transpose(1, 2).flatten(2)), clusters


class PaCaBlock(nn.Module):
    """Pre-norm transformer block: patch-to-cluster attention, then the convolutional MLP.

    Args:
        dim, num_heads, clustering, cluster_norm_eps: as in `PaCaAttention`.
        hidden_dim: of the MLP.
        norm1_eps, norm2_eps: of the norms before attention and before the MLP.
        drop_path: share of the samples that skip a branch while training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        hidden_dim: int,
        clustering: nn.Module | None,
        norm1_eps: float,
        norm2_eps: float,
        cluster_norm_eps: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm1_eps)
        self.attention = PaCaAttention(dim, num_heads, clustering=clustering, cluster_norm_eps=cluster_norm_eps)
        self.norm2 = nn.LayerNorm(dim, eps=norm2_eps)
        self.mlp = ConvMlp(dim, hidden_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int], clusters: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Same shapes as `PaCaAttention.forward`."""
        attended, clusters = self.attention(self.norm1(x), grid, clusters)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x), grid)), clusters


def initialise(module: nn.Module) -> None:
    """Set fresh weights of a linear layer; of a block, those that end its residual branches."""
    initialise_linear(module)
    if isinstance(module, PaCaBlock):
        nn.init.zeros_(module.attention.proj.weight)
        nn.init.zeros_(module.mlp.fc2.weight)
