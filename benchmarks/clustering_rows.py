"""The attentions that are compared in one speech recogniser: their settings, their weights at the start, their cost.

All rows start from the same trained weights. A row with fewer layers takes some of the trained layers, evenly spread;
hash planes are drawn anew, with the same seeds in every row.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from models.checkpoints import HASH_PLANES, SAME_NAMES, load_official
from models.clustered_attention import ClusteredAttentionConfig
from models.ctc_transformer import CtcTransformer, CtcTransformerConfig

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: of the attention.
        num_layers: depth of the model.
        attention: None is full attention.
        weights_of: row whose trained weights it runs with, untrained itself; None is trained.
    """

    name: str
    num_layers: int
    attention: ClusteredAttentionConfig | None = None
    weights_of: "Row | None" = None

    @property
    def key(self) -> str:
        """The name with the depth, fit for a file."""
        return "-".join(re.findall(r"[a-z0-9]+", f"{self.name} {self.num_layers} layers".lower()))


class AttentionCost(NamedTuple):
    """What attention computes for one recording, in all layers; projections to and from heads are left out.

    Attributes:
        multiply_adds: of hashing, of scores and of weighted sums of values.
        distances: Hamming distances of P bits between a query and a centroid.
    """

    multiply_adds: int
    distances: int


def count_attention(config: CtcTransformerConfig, num_tokens: int) -> AttentionCost:
    """Count what a recording of N tokens needs.

    In each layer: full attention 2·N²·E. Clustered N·E·P for the hashes and 2·C·N·E for the clusters' scores and
    values; improved 2·N·K·E more, for each query's own. Distances: N·C for each iteration and head.

    Args:
        config: a variant.
        num_tokens: N.
    """
    N, E = num_tokens, config.dim
    attention = config.attention
    if attention is None:
        return AttentionCost(config.num_layers * 2 * N * N * E, 0)
    C, K = attention.num_clusters, min(attention.top_k, N)
    products = N * E * (attention.bits + 2 * C + 2 * K)
    distances = attention.iterations * config.num_heads * N * C
    return AttentionCost(config.num_layers * products, config.num_layers * distances)


def make_model(row: Row, config: CtcTransformerConfig, state: Mapping[str, Tensor]) -> CtcTransformer:
    """Make a row's model with the trained weights in it.

    Args:
        row: depth and attention.
        config: everything else.
        state: weights of a model of at least that depth.
    Raises: ValueError if they do not fit.
    """
    config = replace(config, num_layers=row.num_layers, attention=row.attention)
    model = CtcTransformer(config, num_classes=len(state["head.weight"]))
    load_official(model, spread_layers(state, row.num_layers), SAME_NAMES, kept=HASH_PLANES)
    return model


def spread_layers(state: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Take so many of a model's layers, the first and the last among them, the others evenly between.

    Args:
        state: weights of a `CtcTransformer`.
        num_layers: at least 2, or all.
    Returns: their names in a model of that depth → float32 tensors, without hash planes.
    Raises: ValueError if there are fewer layers.
    """
    depth = 1 + max(int(found[1]) for name in state if (found := _LAYER.fullmatch(name)))
    if depth < num_layers:
        raise ValueError(f"the weights have {depth} layers; a row needs {num_layers}; start from a deeper model")
    kept = torch.linspace(0, depth - 1, num_layers).round().int().tolist()
    place = {layer: position for position, layer in enumerate(kept)}
    taken: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = _LAYER.fullmatch(name)
        if re.fullmatch(HASH_PLANES, name) or (found and int(found[1]) not in place):
            continue
        taken[f"layers.{place[int(found[1])]}.{found[2]}" if found else name] = tensor.float()
    return taken


def _improved(num_clusters: int, top_k: int) -> ClusteredAttentionConfig:
    return ClusteredAttentionConfig(num_clusters=num_clusters, top_k=top_k, full_below=0)


_FULL_6 = Row(name="full", num_layers=6)
_FULL_4 = Row(name="full", num_layers=4)
_SETTINGS = ((50, 32), (100, 16), (100, 32), (100, 64))  # C, K

ROWS = (
    _FULL_6,
    _FULL_4,
    Row(name="clustered, C = 100", num_layers=4, attention=_improved(100, 0)),
    *(Row(name=f"improved, C = {C}, K = {K}", num_layers=4, attention=_improved(C, K)) for C, K in _SETTINGS),
    *(
        Row(
            name="improved, C = 100, K = 32, in place of full",
            num_layers=full.num_layers,
            attention=_improved(100, 32),
            weights_of=full,
        )
        for full in (_FULL_6, _FULL_4)
    ),
)
