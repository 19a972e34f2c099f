"""Settings of THC, and its variants; see `models.thc`."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from models.communities import Scope, Similarity
from models.node_mlps import NodeMlpKind

Assignment = Literal["learnable", "ocread"]
Encoder = NodeMlpKind | Literal["none"]
Combination = Literal["sum", "mean", "max", "concat", "global", "last", "linear"]


@dataclass(frozen=True, kw_only=True)
class ThcConfig:
    """Settings that differ between variants; the official name follows where it is another one.

    Attributes:
        num_regions: R, also the features of a region: its row of the connectivity (node_num).
        sizes: C, communities of each level; N, the nodes of a level, is R or the size before.
        pooling: whether each level merges its nodes; one that does not keeps the size before.
        identity_dim: learned features added to each region, 0 for none (pos_encoding "identity", pos_embed_dim). E, the
            model dim, is R + identity_dim.
        num_heads: H, divides E.
        hidden_dim: of the transformer's MLP (transformer_hidden_size).
        assignment: "learnable", from attention, or "ocread", from centres (clustering_type).
        scope: what an assignment is made from, see `SharedMean`; "batch" is official for "learnable", and for "ocread"
            with average_assignment.
        momentum: of the running means: with scope "stored", and of the mean connectivity.
        has_orthogonal_start: of the learned map or the centres (orthogonal).
        has_top_k_mask: of "learnable" (mask_top_k).
        min_kept: the mask keeps at least as many communities of a node; officially 0.
        similarity: of "ocread" (project_assignment; false is "student-t").
        are_centres_frozen: of "ocread" (freeze_center).
        encoder: "flat" (official), "shared" or "factorised", see `make_node_mlp`; "none" (no_encoder).
        encoder_dim: width of its hidden layers; officially hidden_dim.
        is_variational: whether the encoder is a `VariationalEncoder`.
        has_skip: whether the encoder's output is added to what it was given: zeros at first, or where it is
            variational, in training, noise around zeros. Ours; without it an encoder makes nodes alike, and communities
            no longer gather what is connected.
        readout: how the levels' votes become one: "sum", "mean", "max" or an MLP over them, "concat"; or one readout of
            the nodes of all levels, "global", or of the last level, "last" (readout, hierarchical, global_pooling).
            "linear", ours, is one linear layer over the features of all levels' nodes, which starts at zero: from few
            subjects an MLP learns the subjects.
        readout_dim: features of a node that a readout keeps (feature_reduction_dim; officially 8 where there is one
            readout).
        readout_hidden_dim: width of a readout's first hidden layer (readout_hidden_size; officially 256 where there is
            one readout).
        dropout: as in `EncoderConfig`, and of the attention weights.
        has_attention_noise: whether logistic noise is added to attention scores in training (att_noise).
        spectrum_limit: above which eigenvalues of the connectivity are held back, see `limit_spectrum`; 0 is no limit.
            Ours.
        is_standardised: whether connections are brought to unit spread, and the linear path sees only the difference
            from the mean of the training subjects, see `Standard`. Ours.
        resolutions: of a `modularity_loss` of each level that pools; none by default. Ours: what serves the class alone
            need not be a community of regions that are connected.
        has_linear_path: whether one linear layer over the connections, which starts at zero, votes beside the readouts.
            Ours; from few subjects it learns what a ridge classifier does, and the levels add to it.
    """

    num_regions: int
    sizes: tuple[int, ...] = (90, 4)
    pooling: tuple[bool, ...] = (True, True)
    identity_dim: int = 0
    num_heads: int = 4
    hidden_dim: int = 1024
    assignment: Assignment = "learnable"
    scope: Scope = "subject"
    momentum: float = 0.1
    has_orthogonal_start: bool = True
    has_top_k_mask: bool = True
    min_kept: int = 1
    similarity: Similarity = "projection"
    are_centres_frozen: bool = False
    encoder: Encoder = "shared"
    encoder_dim: int = 256
    is_variational: bool = False
    has_skip: bool = False
    readout: Combination = "sum"
    readout_dim: int = 128
    readout_hidden_dim: int = 256
    dropout: float = 0.1
    has_attention_noise: bool = False
    spectrum_limit: float = 0.0
    is_standardised: bool = False
    resolutions: tuple[float, ...] = ()
    has_linear_path: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that do not fit together.

        Raises: ValueError naming the setting.
        """
        for name, options in _OPTIONS.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name}={getattr(self, name)} must be one of {', '.join(options)}")
        if len(self.sizes) != len(self.pooling):
            raise ValueError(f"pooling has {len(self.pooling)} entries; sizes has {len(self.sizes)} levels")
        if len(self.resolutions) not in {0, sum(self.pooling)}:
            raise ValueError(f"resolutions has {len(self.resolutions)} entries; {sum(self.pooling)} levels pool")
        if self.is_variational and self.encoder == "none":
            raise ValueError('is_variational needs an encoder; encoder is "none"')
        if self.has_skip and self.encoder == "none":
            raise ValueError('has_skip needs an encoder; encoder is "none"')
        for num_nodes, size, is_pooled in zip(self.num_nodes, self.sizes, self.pooling, strict=True):
            most = num_nodes if self.assignment == "learnable" else self.dim
            if not is_pooled and size != num_nodes:
                raise ValueError(f"size={size} of a level that does not pool must be its number of nodes, {num_nodes}")
            if is_pooled and self.has_orthogonal_start and size > most:
                raise ValueError(f"size={size} exceeds {most}: no more communities can start orthogonal")

    @property
    def dim(self) -> int:
        """E."""
        return self.num_regions + self.identity_dim

    @property
    def num_nodes(self) -> tuple[int, ...]:
        """N of each level."""
        return (self.num_regions, *self.sizes[:-1])


_OPTIONS: dict[str, tuple[str, ...]] = {
    "assignment": get_args(Assignment),
    "scope": get_args(Scope),
    "similarity": get_args(Similarity),
    "encoder": ("none", *get_args(NodeMlpKind)),
    "readout": get_args(Combination),
}

# Ours, for hundreds of subjects: what trains best on them in a minute of one core.
THC_AAL116 = ThcConfig(
    num_regions=116,
    sizes=(24, 6),
    num_heads=2,
    hidden_dim=116,
    assignment="ocread",
    encoder="factorised",
    encoder_dim=64,
    is_variational=True,
    has_skip=True,
    readout="linear",
    dropout=0.0,
    spectrum_limit=2.0,
    is_standardised=True,
    resolutions=(4.0, 2.0),
    has_linear_path=True,
)
THC_CC200 = ThcConfig(num_regions=200)
# The layout of the paper, 125 M parameters; answers depend on the batch.
THC_CC200_OFFICIAL = replace(THC_CC200, scope="batch", min_kept=0, encoder="flat", encoder_dim=1024)
THC_CC200_FLAT = replace(THC_CC200_OFFICIAL, scope="subject")  # the same weights, for serving: answers depend on nobody
