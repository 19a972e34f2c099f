"""The CTC transformer over a recording that is spread over ranks: one call turns a model's copy into a rank's part.

Every rank holds the whole weights and consecutive frames, and gives the probabilities of its own tokens. Attention and
convolutions talk to other ranks; everything else is about one token at a time.

Source: ours.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from models.attention import FullAttention
from models.clustered_attention import ClusteredAttention
from models.ctc_transformer import SUBSAMPLING, CtcTransformer, CtcTransformerLayer, count_tokens
from models.parallel.collectives import Communicator
from models.parallel.cores import ParallelClusteredAttention, ParallelFullAttention
from models.parallel.differentiable import gather
from models.parallel.halo import spread_convolution
from models.parallel.usp import SequenceParallel


class ParallelCtcTransformer(nn.Module):
    """One rank's part of a CTC transformer.

    Args:
        model: with attention and convolutions that talk to the other ranks, see `parallelize`.
        ranks: all ranks of the sequence, in order.
        num_segments: see `parallelize`.
    """

    def __init__(self, model: CtcTransformer, ranks: Communicator, *, num_segments: int) -> None:
        super().__init__()
        self.model = model
        self._ranks = ranks
        self._num_segments = num_segments

    def num_slots(self, num_frames: int) -> int:
        """Tokens on each rank, padding included, for the frames of the longest sample of a batch."""
        parts = max(self._ranks.size, self._num_segments)
        num_tokens = -(-num_frames // SUBSAMPLING)
        return -(-num_tokens // parts) * parts // self._ranks.size

    def shard(self, features: Tensor) -> Tensor:
        """Take this rank's frames of features (B, T, F): (B, frames, F), zeros beyond the last frame."""
        size = self.num_slots(features.shape[1]) * SUBSAMPLING
        own = features[:, self._ranks.rank * size : (self._ranks.rank + 1) * size]
        return nn.functional.pad(own, (0, 0, 0, size - own.shape[1]))

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Recognise; every rank has to call it.

        Args:
            features: (B, frames, F), this rank's as `shard` cuts them.
            lengths: (B,) int64, how many frames of the whole recording are real.
        Returns: log-probabilities (B, slots, V) of this rank's tokens, and their clusters of each layer.
        Raises: ValueError if a rank has fewer tokens than a convolution borrows; RankLost.
        """
        first = self._ranks.rank * features.shape[1]
        return self.model(features, (lengths - first).clamp(0, features.shape[1]))

    def gather(self, log_probs: Tensor, lengths: Tensor) -> Tensor:
        """Bring the tokens of all ranks together, on every rank: (B, slots, V) → (B, N, V), N of the longest sample.

        Every rank that computes the same loss of it adds its gradient: divide the loss by the number of ranks.
        """
        everyone = gather(log_probs, self._ranks).transpose(0, 1).flatten(1, 2)
        return everyone[:, : int(count_tokens(lengths).max())]

    def sum_gradients(self) -> None:
        """Add up what all ranks' tokens contribute to the gradients of the weights; call it before the optimiser."""
        gradients = [weight.grad for weight in self.parameters() if weight.grad is not None]
        total = self._ranks.sum(torch.cat([gradient.flatten() for gradient in gradients])).wait()
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def parallelize(
    model: CtcTransformer, ranks: Communicator, dense: SequenceParallel, *, num_segments: int = 1
) -> ParallelCtcTransformer:
    """Spread a model over ranks; the model itself stays as it is.

    Args:
        model: the same on all ranks.
        ranks: all ranks of the sequence, in order, such as those of `dist.new_subgroups(ulysses * ring)`.
        dense: how full attention is spread over the same ranks; layout "basic", as convolutions need neighbours.
        num_segments: of clustered attention, see `models.parallel.clustered`; 1 is what the model computes on one rank.
    Returns: this rank's part, with copies of the weights under the same names.
    Raises: ValueError if `dense` has another layout or other ranks, or the attention cannot be spread.
    """
    if dense.layout != "basic" or (dense.rank, dense.num_ranks) != (ranks.rank, ranks.size):
        raise ValueError(
            f"layout={dense.layout}, rank {dense.rank} of {dense.num_ranks}, must be basic, rank {ranks.rank} of "
            f"{ranks.size}"
        )
    model = deepcopy(model)
    spread_convolution(model.stem.conv1, ranks)
    spread_convolution(model.stem.conv2, ranks)
    for layer in _layers(model):
        spread_convolution(layer.convolution.conv, ranks)
        core = layer.attention.core
        if isinstance(core, ClusteredAttention):
            layer.attention.core = ParallelClusteredAttention(core, ranks, dense, num_segments=num_segments)
        elif isinstance(core, FullAttention) and not core.dropout:
            layer.attention.core = ParallelFullAttention(dense, scale=core.scale)
        else:
            raise ValueError(f"{type(core).__name__} cannot be spread over ranks, nor can dropout of attention weights")
    return ParallelCtcTransformer(model, ranks, num_segments=num_segments)


def _layers(model: CtcTransformer) -> list[CtcTransformerLayer]:
    return [layer for layer in model.layers if isinstance(layer, CtcTransformerLayer)]
