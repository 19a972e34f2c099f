"""Post-norm transformer encoder whose attention the caller chooses, layer by layer: full or clustered.

Source: Vaswani et al. 2017, section 3.1; the layout of github.com/idiap/fast-transformers @2ad36b9, whose weights load
with `checkpoints.FAST_TRANSFORMERS_ENCODER`, as do those of torch's own encoder and of BERT.
Deliberately absent: positions (they belong to what makes the tokens), decoder layers, cross-attention, pre-norm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Numbers that differ between variants.

    Attributes:
        num_layers: depth.
        dim: E, model dim.
        num_heads: H.
        hidden_dim: width of the MLP's hidden layer.
        head_dim: D of queries and keys; None is E / H.
        value_dim: D of values; None is E / H.
        activation: of the MLP; "gelu" is the exact one.
        dropout: of the attention's output and inside the MLP, while training.
        norm_eps: of every LayerNorm; BERT has 1e-12.
        has_final_norm: whether a LayerNorm follows the last layer.
    """

    num_layers: int
    dim: int
    num_heads: int
    hidden_dim: int
    head_dim: int | None = None
    value_dim: int | None = None
    activation: Literal["relu", "gelu"] = "relu"
    dropout: float = 0.1
    norm_eps: float = 1e-5
    has_final_norm: bool = True

    def __post_init__(self) -> None:
        """Refuse settings that do not fit together.

        Raises: ValueError naming the setting.
        """
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation={self.activation} must be one of {', '.join(_ACTIVATIONS)}")
        if (self.head_dim is None or self.value_dim is None) and self.dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide model_dim={self.dim}")


class AttentionLayer(nn.Module):
    """Projections around an attention on heads.

    Args:
        config: a variant.
        core: module called as `FullAttention` and `ClusteredAttention` are.
    """

    def __init__(self, config: EncoderConfig, core: nn.Module) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        head_dim = config.head_dim or config.dim // config.num_heads
        value_dim = config.value_dim or config.dim // config.num_heads
        self.q = nn.Linear(config.dim, config.num_heads * head_dim)
        self.k = nn.Linear(config.dim, config.num_heads * head_dim)
        self.v = nn.Linear(config.dim, config.num_heads * value_dim)
        self.core = core
        self.out = nn.Linear(config.num_heads * value_dim, config.dim)

    def forward(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Attend among tokens.

        Args:
            x: (B, N, E).
            lengths: (B,) int64, how many tokens are real; None means all.
        Returns: (B, N, E) and the clusters (B, H, N) int64, None with full attention.
        """
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended, clusters = self.core(q, k, v, lengths, lengths)  # (B, H, N, D)
        return self.out(attended.transpose(1, 2).flatten(2)), clusters


class EncoderLayer(nn.Module):
    """Attention and MLP, each followed by its residual sum and LayerNorm.

    Args:
        config: a variant.
        core: as in `AttentionLayer`.
    """

    def __init__(self, config: EncoderConfig, core: nn.Module) -> None:
        super().__init__()
        self.attention = AttentionLayer(config, core)
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.fc1 = nn.Linear(config.dim, config.hidden_dim)
        self.fc2 = nn.Linear(config.hidden_dim, config.dim)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Same shapes as `AttentionLayer.forward`."""
        attended, clusters = self.attention(x, lengths)
        x = self.norm1(x + self.dropout(attended))
        hidden = self.dropout(self.activation(self.fc1(x)))
        return self.norm2(x + self.dropout(self.fc2(hidden))), clusters


class TransformerEncoder(nn.Module):
    """Encoder layers in a row.

    Args:
        config: a variant.
        make_core: called with the number of each layer, from 0; gives its attention on heads.
    """

    def __init__(self, config: EncoderConfig, make_core: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EncoderLayer(config, make_core(i)) for i in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps) if config.has_final_norm else nn.Identity()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode: tokens (B, N, E) and lengths (B,) int64 → (B, N, E); what stands at padding means nothing."""
        return self.encode_with_clusters(x, lengths)[0]

    def encode_with_clusters(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Encode, and give the clusters (B, H, N) int64 of each layer that makes them."""
        clusters: list[Tensor] = []
        for layer in self.layers:
            x, made = layer(x, lengths)
            clusters += [made] if made is not None else []
        return self.norm(x), clusters


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
