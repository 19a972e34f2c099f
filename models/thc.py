"""THC: a transformer over brain regions that merges them, level by level, into fewer and fewer communities.

Each level lets its nodes attend to each other, decides from that attention who belongs to which community, and hands
the communities on as the nodes of the next level. Every level may vote on the class.

Source: Dai et al. 2023, "Transformer-Based Hierarchical Clustering for Brain Network Analysis", checked against the
official code (github.com/DDVD233/THC @9af3a57).
Differs: an assignment is made from the subject's own attention unless `scope` says otherwise (officially from the mean
over the batch, so that answers depend on the other subjects); the encoder is small unless it is "flat"; a community is
kept where the top-k mask would leave none; a variational encoder, which the paper's summary names and the code lacks; a
skip around the encoder, a limit of the spectrum, a standard of the connections, a modularity loss, a linear readout and
a linear path from connections to logits, the last six ours.
Deliberately absent: mixup and the cross-entropy (they belong to training), time series (connectivity is made before).
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.communities import (
    BrainOutput,
    CentreCommunities,
    LearnedCommunities,
    count_kept,
    modularity_loss,
)
from models.encoder import EncoderConfig, EncoderLayer
from models.node_mlps import Connections, Mlp, Readout, VariationalEncoder, make_node_mlp
from models.spectra import Standard, limit_spectrum
from models.thc_config import ThcConfig

COMBINING_DIMS = (256, 32)  # hidden layers of the MLP over all votes, in the official code


class ScoredAttention(nn.Module):
    """Full attention that also gives its scores, with the call of `FullAttention`.

    Args:
        dropout: of the weights while training.
        has_noise: whether scores get logistic noise while training.
    """

    def __init__(self, *, dropout: float, has_noise: bool) -> None:
        super().__init__()
        self.dropout = dropout
        self.has_noise = has_noise

    def forward(self, q: Tensor, k: Tensor, v: Tensor, query_lengths: None, key_lengths: None) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            q, k, v: (B, H, N, D).
            query_lengths, key_lengths: None; every region is real.
        Returns: (B, H, N, D) and the scaled scores before the softmax, mean over heads, (B, N, N).
        """
        assert query_lengths is None
        assert key_lengths is None
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        if self.has_noise and self.training:
            uniform = torch.rand_like(scores)
            scores = scores + uniform.logit(eps=torch.finfo(scores.dtype).eps)
        weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        return weights @ v, scores.mean(dim=1)


class LevelOutput(NamedTuple):
    """What a level hands on.

    Attributes:
        nodes: (B, C, E), or (B, N, E) where it does not pool.
        assignment: (B, N, C); None where it does not pool.
        scores: (B, N, N), attention before the softmax, mean over heads.
        losses: name → scalar.
    """

    nodes: Tensor
    assignment: Tensor | None
    scores: Tensor
    losses: dict[str, Tensor]


class ThcLevel(nn.Module):
    """A transformer layer over nodes that merges them into communities, or leaves them as they are.

    Args:
        config: a variant.
        level: which level, from 0.
    """

    def __init__(self, config: ThcConfig, level: int) -> None:
        super().__init__()
        layer = EncoderConfig(
            num_layers=1,
            dim=config.dim,
            num_heads=config.num_heads,
            hidden_dim=config.hidden_dim,
            dropout=config.dropout,
        )
        self.layer = EncoderLayer(layer, ScoredAttention(dropout=config.dropout, has_noise=config.has_attention_noise))
        self.is_pooled = config.pooling[level]
        if self.is_pooled:
            self.encoder, self.has_skip = _make_encoder(config, level), config.has_skip
            self.communities = _make_communities(config, level)
            self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor) -> LevelOutput:
        """Nodes (B, N, E) → what the level hands on."""
        x, scores = self.layer(x, None)
        if not self.is_pooled:
            return LevelOutput(x, None, scores, {})
        losses: dict[str, Tensor] = {}
        if isinstance(self.encoder, VariationalEncoder):
            code, losses = self.encoder(x)
        else:
            code = self.encoder(x)
        x = x + code if self.has_skip else code
        assignment = self.communities(x, scores)
        losses = {"cluster": self.communities.loss(assignment)} | losses
        return LevelOutput(self.norm(assignment.transpose(1, 2) @ x), assignment, scores, losses)


class Thc(nn.Module):
    """Connectivity → class and communities.

    Args:
        config: a variant.
        num_classes: L.
    """

    def __init__(self, config: ThcConfig, *, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.identity: nn.Parameter | None = None
        if config.identity_dim:
            identity = torch.empty(config.num_regions, config.identity_dim)
            self.identity = nn.Parameter(nn.init.kaiming_normal_(identity))
        self.levels = nn.ModuleList(ThcLevel(config, level) for level in range(len(config.sizes)))
        read_sizes = {"global": (sum(config.sizes),), "last": config.sizes[-1:], "linear": ()}.get(
            config.readout, config.sizes
        )
        self.readouts = nn.ModuleList(
            Readout(
                size,
                config.dim,
                reduced_dim=config.readout_dim,
                hidden_dim=config.readout_hidden_dim,
                num_classes=num_classes,
            )
            for size in read_sizes
        )
        if config.readout == "concat":
            self.combine = Mlp(len(config.sizes) * num_classes, COMBINING_DIMS, num_classes)
        self.standard = Standard(config.num_regions, momentum=config.momentum) if config.is_standardised else None
        num_features = sum(config.sizes) * config.dim if config.readout == "linear" else 0
        if config.has_linear_path:
            self.connections = Connections(config.num_regions)
            num_features += self.connections.number
        if num_features:
            self.head = nn.Linear(num_features, num_classes)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, connectivity: Tensor) -> BrainOutput:
        """Classify.

        Args:
            connectivity: (B, R, R), one row per region, of the kind that the weights were trained with.
        Returns: logits (B, L), the assignment of each level that pools, and the losses `cluster`, with a variational
            encoder also `reconstruction` and `divergence`, with resolutions also `modularity`.
        """
        x = connectivity
        if self.config.spectrum_limit:
            x = limit_spectrum(x, self.config.spectrum_limit)
        x, difference = (x, x) if self.standard is None else self.standard(x)
        if self.identity is not None:
            x = torch.cat([x, self.identity.expand(x.shape[0], -1, -1)], dim=-1)
        nodes: list[Tensor] = []
        assignments: list[Tensor] = []
        losses: dict[str, Tensor] = {}
        for level in self.levels:
            x, assignment, _, added = level(x)
            nodes.append(x)
            assignments += [assignment] if assignment is not None else []
            losses |= {name: losses[name] + loss if name in losses else loss for name, loss in added.items()}
        if self.config.resolutions:
            losses["modularity"] = self._modularity_loss(assignments, connectivity)
        return BrainOutput(self._vote(nodes, difference), assignments, losses)

    def _modularity_loss(self, assignments: list[Tensor], connectivity: Tensor) -> Tensor:
        shares: Tensor | None = None
        losses = []
        for assignment, resolution in zip(assignments, self.config.resolutions, strict=True):
            shares = assignment if shares is None else shares @ assignment  # of a region, through the levels
            losses.append(modularity_loss(shares, connectivity, resolution))
        return torch.stack(losses).sum()

    def _vote(self, nodes: list[Tensor], connectivity: Tensor) -> Tensor:
        """Nodes (B, C, E) of each level and the connectivity (B, R, R) of the linear path → logits (B, L)."""
        features = [x.flatten(1) for x in nodes] if self.config.readout == "linear" else []
        if self.config.has_linear_path:
            features.append(self.connections(connectivity))
        if self.config.readout == "linear":
            return self.head(torch.cat(features, dim=1))
        logits = self._read(nodes)
        return logits + self.head(features[0]) if features else logits

    def _read(self, nodes: list[Tensor]) -> Tensor:
        """Nodes (B, C, E) of each level → logits (B, L), as published."""
        readout = self.config.readout
        if readout == "global":
            return self.readouts[0](torch.cat(nodes, dim=1))
        if readout == "last":
            return self.readouts[0](nodes[-1])
        votes = torch.stack([read(x) for read, x in zip(self.readouts, nodes, strict=True)], dim=1)  # (B, levels, L)
        if readout == "concat":
            return self.combine(votes.flatten(1))
        if readout == "max":
            return votes.amax(dim=1)
        return votes.sum(dim=1) if readout == "sum" else votes.mean(dim=1)


def _make_encoder(config: ThcConfig, level: int) -> nn.Module:
    if config.encoder == "none":
        return nn.Identity()
    make = partial(
        make_node_mlp,
        config.encoder,
        config.num_nodes[level],
        hidden_dim=config.encoder_dim,
        starts_at_zero=config.has_skip,
    )
    return VariationalEncoder(make, config.dim) if config.is_variational else make(config.dim, config.dim)


def _make_communities(config: ThcConfig, level: int) -> LearnedCommunities | CentreCommunities:
    num_nodes, size = config.num_nodes[level], config.sizes[level]
    if config.assignment == "learnable":
        return LearnedCommunities(
            num_nodes,
            size,
            scope=config.scope,
            momentum=config.momentum,
            has_orthogonal_start=config.has_orthogonal_start,
            num_kept=count_kept(size, min_kept=config.min_kept) if config.has_top_k_mask else None,
        )
    return CentreCommunities(
        num_nodes,
        size,
        config.dim,
        scope=config.scope,
        momentum=config.momentum,
        similarity=config.similarity,
        has_orthogonal_start=config.has_orthogonal_start,
        are_centres_frozen=config.are_centres_frozen,
    )
