"""A module that takes its discrete decisions from what a program found.

Where near ties fall differently, whole clusters do, and numbers cannot be compared any more. With the same decisions
they can: a program's clusters are among its outputs, and the module computes the rest from these.

Deliberately absent: the keys that clustered attention finds strongest and the communities that a top-k mask leaves,
which are no outputs; next to the limit of either, one is worth as much as the next.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from export.plan import Plan
from models.attention_by_clusters import clustered_attention, improved_clustered_attention
from models.clustered_attention import ClusteredAttention, are_short, attend_short
from models.token_blocks import Clustering, Ctm
from models.token_exchange import Grid
from service.sample import Arrays


def run_with_decisions(plan: Plan, inputs: Arrays, found: Arrays) -> Arrays:
    """Compute a plan's outputs with the decisions that a program made on the same inputs.

    Args:
        plan: with the module.
        inputs: by name.
        found: all outputs of the program, by name.
    """
    layers: Sequence[Tensor] = ()
    if "clusters" in found:
        layers = torch.from_numpy(found["clusters"]).long().unbind(1)  # (B, H, N) of each layer
    maps = [torch.from_numpy(found[name]).long() for name in plan.output_names if name.startswith("clusters_stage")]
    with _deciding(plan.program, layers, maps):
        return plan.run(inputs)


@contextmanager
def _deciding(program: nn.Module, layers: Sequence[Tensor], maps: Sequence[Tensor]) -> Iterator[None]:
    """Put given clusters in the place of clustering.

    Args:
        program: with clustered attention, with clustering token merges, or with neither.
        layers: clusters (B, H, N) of each clustered attention.
        maps: `token_of_cell` (B, M) after each merge.
    """
    attentions = [module for module in program.modules() if isinstance(module, ClusteredAttention)]
    merges = [module for module in program.modules() if isinstance(module, Ctm)]
    own = [module.operator for module in attentions], [module.clustering for module in merges]
    try:
        for attention, clusters in zip(attentions, layers, strict=True):
            attention.operator = partial(_attend, clusters)
        before: Tensor | None = None
        for merge, after in zip(merges, maps if merges else (), strict=True):
            merge.clustering = _Given(merge.clustering, before, after)
            before = after
        yield
    finally:
        for attention, operator in zip(attentions, own[0], strict=True):
            attention.operator = operator
        for merge, clustering in zip(merges, own[1], strict=True):
            merge.clustering = clustering


class _Given:
    """Clusters that are known; see `Clustering`.

    Args:
        own: tells how many there are.
        before, after: token of each cell (B, M) before and after the merge; None where a cell is a token.
    """

    def __init__(self, own: Clustering, before: Tensor | None, after: Tensor) -> None:
        self._own, self._before, self._after = own, before, after
        self.num_parts = own.num_parts

    def __call__(self, x: Tensor, cell_grid: Grid) -> tuple[Tensor, int]:
        """As in `Clustering`."""
        num_clusters = self._own(x, cell_grid)[1]
        if self._before is None:
            return self._after, num_clusters
        return x.new_zeros(x.shape[:2], dtype=torch.int64).scatter(1, self._before, self._after), num_clusters


def _attend(  # noqa: PLR0917 - the inputs of `attend`, behind the clusters
    clusters: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,  # noqa: ARG001 - nothing is hashed
    query_lengths: Tensor,
    key_lengths: Tensor,
    *,
    num_clusters: int,
    top_k: int,
    scale: float,
    full_below: int,
    dropout: float,
    **others: Any,  # noqa: ARG001 - of clustering
) -> tuple[Tensor, Tensor]:
    """Attend by given clusters (B, H, N), where short samples have none; else as `attend`."""
    assert dropout == 0.0, "a program is compared in evaluation mode"
    known = clusters.clamp(min=0)
    if top_k:
        out = improved_clustered_attention(
            q, k, v, known, key_lengths, num_clusters=num_clusters, top_k=top_k, scale=scale
        )
    else:
        out = clustered_attention(q, k, v, known, key_lengths, num_clusters=num_clusters, scale=scale)
    if not full_below:
        return out, clusters.int()
    full, _ = attend_short(
        q, k, v, query_lengths, key_lengths, num_clusters=num_clusters, scale=scale, full_below=full_below
    )
    is_short = are_short(query_lengths, key_lengths, full_below)[:, None, None, None]
    return torch.where(is_short, full, out), clusters.int()
