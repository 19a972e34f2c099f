"""Models that THC is compared with, called as THC is: a Brain Network Transformer and an MLP over connections.

Source: Kan et al. 2022, "Brain Network Transformer", and its code (github.com/Wayfear/BrainNetworkTransformer
@8a588aa), whose weights load with `checkpoints.BNT`. The MLP is ours.
Deliberately absent: more than two layers, identity positions, an encoder that is not flat; the time series, which the
official call takes and ignores.
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import FullAttention
from models.communities import BrainOutput, CentreCommunities, Similarity
from models.encoder import EncoderConfig, EncoderLayer
from models.node_mlps import Connections, FlatMlp, Readout


@dataclass(frozen=True, kw_only=True)
class BntConfig:
    """Settings that differ between variants; the rest of the defaults is official.

    Attributes:
        num_regions: R, also the model dim: a region's features are its row of the connectivity.
        num_communities: C, at most R with an orthogonal start.
        num_heads: H, divides R.
        hidden_dim: of the transformer's MLP.
        similarity, has_orthogonal_start, are_centres_frozen: as in `CentreCommunities`.
        encoder_dim: width of the encoder's hidden layers.
        readout_dim, readout_hidden_dim: of the `Readout`.
        dropout: as in `EncoderConfig`, and of the attention weights.
    """

    num_regions: int
    num_communities: int = 100
    num_heads: int = 4
    hidden_dim: int = 1024
    similarity: Similarity = "squared-projection"
    has_orthogonal_start: bool = True
    are_centres_frozen: bool = True
    encoder_dim: int = 32
    readout_dim: int = 8
    readout_hidden_dim: int = 256
    dropout: float = 0.1


class BrainNetworkTransformer(nn.Module):
    """Two transformer layers, then communities around fixed orthonormal centres, whose features are read out.

    Args:
        config: a variant.
        num_classes: L.
    """

    def __init__(self, config: BntConfig, *, num_classes: int) -> None:
        super().__init__()
        R, C = config.num_regions, config.num_communities
        if config.has_orthogonal_start and C > R:
            raise ValueError(f"num_communities={C} exceeds {R}: no more centres can start orthogonal")
        layer = EncoderConfig(
            num_layers=2, dim=R, num_heads=config.num_heads, hidden_dim=config.hidden_dim, dropout=config.dropout
        )
        self.layers = nn.ModuleList(EncoderLayer(layer, FullAttention(dropout=config.dropout)) for _ in range(2))
        self.encoder = FlatMlp(R, R, R, config.encoder_dim)
        self.communities = CentreCommunities(
            R,
            C,
            R,
            scope="subject",
            momentum=0.0,
            similarity=config.similarity,
            has_orthogonal_start=config.has_orthogonal_start,
            are_centres_frozen=config.are_centres_frozen,
        )
        self.readout = Readout(
            C, R, reduced_dim=config.readout_dim, hidden_dim=config.readout_hidden_dim, num_classes=num_classes
        )

    def forward(self, connectivity: Tensor) -> BrainOutput:
        """Classify: connectivity (B, R, R) → logits, one assignment (B, R, C), and the loss `cluster`.

        The official training does not use that loss.
        """
        x = connectivity
        for layer in self.layers:
            x, _ = layer(x, None)
        x = self.encoder(x)
        assignment = self.communities(x, None)
        losses = {"cluster": self.communities.loss(assignment)}
        return BrainOutput(self.readout(assignment.transpose(1, 2) @ x), [assignment], losses)


@dataclass(frozen=True, kw_only=True)
class BrainMlpConfig:
    """Settings that differ between variants.

    Attributes:
        num_regions: R.
        hidden_dims: widths of the hidden layers.
        input_dropout: share of the connections that are dropped in training.
        dropout: of the hidden layers.
    """

    num_regions: int
    hidden_dims: tuple[int, ...] = (256, 64)
    input_dropout: float = 0.5
    dropout: float = 0.5


class BrainMlp(nn.Module):
    """An MLP over the connections above the diagonal, which knows nothing of regions.

    Args:
        config: a variant.
        num_classes: L.
    """

    def __init__(self, config: BrainMlpConfig, *, num_classes: int) -> None:
        super().__init__()
        self.connections = Connections(config.num_regions)
        dims = (self.connections.number, *config.hidden_dims)
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.hidden = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(dims))
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, connectivity: Tensor) -> BrainOutput:
        """Classify: connectivity (B, R, R), of which the diagonal and what is below are not looked at → logits only."""
        x = self.input_dropout(self.connections(connectivity))
        for layer in self.hidden:
            x = self.dropout(F.leaky_relu(layer(x)))
        return BrainOutput(self.head(x), [], {})


BNT_AAL116 = BntConfig(num_regions=116)
BRAIN_MLP_AAL116 = BrainMlpConfig(num_regions=116)
