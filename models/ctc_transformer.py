"""CTC transformer for speech: log-mel frames → tokens at half their rate → probabilities of characters.

Positions come from depthwise convolutions alone, so that a recording of any length looks like those of training; what
links distant tokens is attention, full or clustered by configuration, with the same weights.

Source: Graves et al. 2006 (CTC); Gulati et al. 2020 (Conformer) for the convolution module; Vyas et al. 2020 for the
attention. The arrangement is ours: one MLP per layer, LayerNorm in place of BatchNorm, no relative positions.
Deliberately absent: decoding (`service/tasks/ctc.py`, `prefix_beam_search.py` beside it), an autoregressive decoder,
streaming.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import FullAttention
from models.clustered_attention import ClusteredAttention, ClusteredAttentionConfig
from models.encoder import AttentionLayer, EncoderConfig

SUBSAMPLING = 2  # frames a token


@dataclass(frozen=True, kw_only=True)
class CtcTransformerConfig:
    """Numbers that differ between variants.

    Attributes:
        num_layers: depth.
        dim: E, model dim.
        num_heads: H.
        hidden_dim: width of the MLP's hidden layer.
        num_mels: F, bands of the features.
        stem_channels: of the convolutions that make tokens.
        kernel_size: of the depthwise convolutions over tokens, odd.
        dropout: of what every branch adds, while training. Attention weights keep theirs: to draw so many numbers would
            take longer than to attend, and torch has no fused kernel for it on the CPU.
        attention: None is full attention.
        seed: of the first layer's hash planes; the others follow.
    """

    num_layers: int
    dim: int
    num_heads: int
    hidden_dim: int
    num_mels: int = 80
    stem_channels: int = 32
    kernel_size: int = 15
    dropout: float = 0.1
    attention: ClusteredAttentionConfig | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        """Refuse settings that do not fit together.

        Raises: ValueError naming the setting.
        """
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd, so that a token is in the middle")
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide dim={self.dim}")


class Stem(nn.Module):
    """Two convolutions over time and frequency that halve the number of frames.

    Args:
        config: a variant.
    """

    def __init__(self, config: CtcTransformerConfig) -> None:
        super().__init__()
        channels = config.stem_channels
        self.conv1 = nn.Conv2d(1, channels, 3, stride=(SUBSAMPLING, 2), padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=(1, 2), padding=1)
        num_bands = -(-config.num_mels // 4)
        self.out = nn.Linear(channels * num_bands, config.dim)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Make tokens.

        Args:
            features: (B, T, F).
            lengths: (B,) int64, how many frames are real.
        Returns: tokens (B, N, E), N = ⌈T / 2⌉, zeros in place of padding, and their lengths (B,).
        """
        # A convolution sees zeros beyond the end of a recording, whether padding follows there or not.
        x = features * is_real(features, lengths)
        lengths = count_tokens(lengths)
        x = F.gelu(self.conv1(x[:, None]))  # (B, channels, N, F / 2)
        mask = is_real(x[:, 0], lengths)  # (B, N, 1)
        x = F.gelu(self.conv2(x * mask[:, None]))
        return self.out(x.transpose(1, 2).flatten(2)) * mask, lengths


class Convolution(nn.Module):
    """Gated depthwise convolution over tokens: where a token stands among its neighbours.

    Args:
        config: a variant.
    """

    def __init__(self, config: CtcTransformerConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, 2 * config.dim)
        self.conv = nn.Conv1d(
            config.dim, config.dim, config.kernel_size, padding=config.kernel_size // 2, groups=config.dim
        )
        self.norm = nn.LayerNorm(config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, N, E), mask (B, N, 1) → (B, N, E)."""
        x = F.glu(self.gate(x), dim=-1) * mask
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.out(F.silu(self.norm(x)))


class CtcTransformerLayer(nn.Module):
    """Convolution, attention and MLP, each normalised before and added after.

    Args:
        config: a variant.
        index: of the layer, from 0.
    """

    def __init__(self, config: CtcTransformerConfig, index: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim)
        self.convolution = Convolution(config)
        self.norm2 = nn.LayerNorm(config.dim)
        self.attention = AttentionLayer(_encoder_config(config), _make_core(config, index))
        self.norm3 = nn.LayerNorm(config.dim)
        self.fc1 = nn.Linear(config.dim, config.hidden_dim)
        self.fc2 = nn.Linear(config.hidden_dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, lengths: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N, E), lengths (B,), mask (B, N, 1) → tokens, and clusters (B, H, N) unless attention is full."""
        x = x + self.dropout(self.convolution(self.norm1(x), mask))
        attended, clusters = self.attention(self.norm2(x), lengths)
        x = x + self.dropout(attended)
        hidden = F.gelu(self.fc1(self.norm3(x)))
        return x + self.dropout(self.fc2(hidden)), clusters


class CtcTransformer(nn.Module):
    """Log-mel features → log-probabilities of characters, token by token.

    Args:
        config: a variant.
        num_classes: V, characters and the blank.
    """

    def __init__(self, config: CtcTransformerConfig, *, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.stem = Stem(config)
        self.layers = nn.ModuleList(CtcTransformerLayer(config, i) for i in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, num_classes)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Recognise.

        Args:
            features: (B, T, F), normalised.
            lengths: (B,) int64, how many frames are real.
        Returns: log-probabilities (B, N, V), N = ⌈T / 2⌉; what stands at padding means nothing. Clusters (B, H, N) of
            each layer, none with full attention.
        """
        x, lengths = self.stem(features, lengths)
        mask = is_real(x, lengths)
        clusters: list[Tensor] = []
        for layer in self.layers:
            x, made = layer(x, lengths, mask)
            clusters += [made] if made is not None else []
        return self.head(self.norm(x)).float().log_softmax(dim=-1), clusters


def count_tokens(num_frames: Tensor) -> Tensor:
    """Tokens that so many frames become."""
    return (num_frames + SUBSAMPLING - 1) // SUBSAMPLING


def is_real(x: Tensor, lengths: Tensor) -> Tensor:
    """Mask (B, N, 1) of the dtype of x (B, N, E): 1 where n < lengths (B,)."""
    return (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None].to(x.dtype)


def _encoder_config(config: CtcTransformerConfig) -> EncoderConfig:
    return EncoderConfig(
        num_layers=1, dim=config.dim, num_heads=config.num_heads, hidden_dim=config.hidden_dim, dropout=config.dropout
    )


def _make_core(config: CtcTransformerConfig, index: int) -> nn.Module:
    if config.attention is None:
        return FullAttention()
    head_dim = config.dim // config.num_heads
    return ClusteredAttention(config.attention, head_dim=head_dim, seed=config.seed + index)


# C ≤ N / 8 from 800 tokens on, 16 s of speech; below 512 tokens full attention is cheaper than clustering.
_IMPROVED = ClusteredAttentionConfig(num_clusters=100, top_k=32, full_below=512)

CTC_TRANSFORMER_SMALL = CtcTransformerConfig(num_layers=6, dim=160, num_heads=4, hidden_dim=640, attention=_IMPROVED)
CTC_TRANSFORMER_SMALL_FULL = replace(CTC_TRANSFORMER_SMALL, attention=None)

# Learns spoken digits in minutes; what it clusters are digit strings of more than two or three seconds.
CTC_TRANSFORMER_MICRO = CtcTransformerConfig(
    num_layers=2,
    dim=64,
    num_heads=4,
    hidden_dim=192,
    num_mels=40,
    stem_channels=16,
    attention=ClusteredAttentionConfig(num_clusters=16, top_k=16, full_below=128),
)
