"""Communities of brain regions: which node belongs to which, softly, and the losses that shape it.

Two ways to decide: a learned map of each node's attention ("learnable"), or the distance of a node's features from
learned centres ("ocread").

Source: Dai et al. 2023 (THC) and its official code (github.com/DDVD233/THC @9af3a57); Kan et al. 2022 (BNT) and its
code (github.com/Wayfear/BrainNetworkTransformer @8a588aa) for squared projections; Xie et al. 2016 (DEC) for the
sharpening loss; Newman 2006 and Reichardt and Bornholdt 2006 for modularity.
Deliberately absent: hard assignments, a number of communities that is found in the data.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Scope = Literal["subject", "batch", "stored"]
Similarity = Literal["projection", "squared-projection", "student-t"]

ENTROPY_WEIGHT = 0.2  # official code, learnable_assignment.py
MODULARITY_WEIGHT = 20.0  # ours: beside cross-entropy, enough to move the centres in a hundred steps
TINY = 1e-30  # shares and sums below count as this much: their logarithms and quotients stay finite


class BrainOutput(NamedTuple):
    """What every model of brain networks gives.

    Attributes:
        logits: (B, L).
        assignments: of each level that pools, (B, N, C): the share of each community in each node. A subject's nodes
            sum to 1, or to less under a top-k mask.
        losses: name → scalar, to be added to the cross-entropy in training; those of all levels are summed.
    """

    logits: Tensor
    assignments: list[Tensor]
    losses: dict[str, Tensor]


def orthogonal_start(rows: Tensor) -> Tensor:
    """Make rows orthogonal, in the directions that Gram-Schmidt gives.

    Args:
        rows: (C, D), C ≤ D, of full rank.
    Returns: (C, D): the first row as it was, the others of length 1, as in the official code.
    """
    q, r = torch.linalg.qr(rows.T)  # (D, C), (C, C); a negative diagonal means a flipped direction
    directions = (q * r.diagonal().sign()).T
    return torch.cat([rows[:1], directions[1:]])


def count_kept(num_communities: int, *, min_kept: int) -> int:
    """How many communities of a node the top-k mask keeps.

    A tenth of more than 50 communities, else half of them, rounded down, but no fewer than `min_kept`.
    Source: official code. Differs: there `min_kept` is 0, so that a single community keeps nobody and the level forgets
    its input.
    """
    return max(int(num_communities * (0.1 if num_communities > 50 else 0.5)), min_kept)


def keep_strongest(assignment: Tensor, num_kept: int) -> Tensor:
    """Set all but the largest shares of each node to 0; the rest is not rescaled.

    Args:
        assignment: (…, C).
        num_kept: of each row, in [0, C].
    Differs: shares that tie with the last one kept stay too; officially it is open which of them does.
    """
    if num_kept == 0:
        return torch.zeros_like(assignment)
    least = assignment.topk(num_kept, dim=-1).values[..., -1:]
    return assignment.masked_fill(assignment < least, 0)


def similarity_shares(nodes: Tensor, centres: Tensor, similarity: Similarity) -> Tensor:
    """Share of each centre in each node.

    Args:
        nodes: (B, N, E).
        centres: (C, E).
        similarity: "projection" on the centre's direction (THC), "squared-projection" (BNT: the product is squared, the
            length is not), both through a softmax; or "student-t", with one degree of freedom (DEC).
    Returns: (B, N, C), rows sum to 1.
    """
    products = nodes @ centres.T
    if similarity == "student-t":
        distances = nodes.square().sum(dim=-1, keepdim=True) - 2 * products + centres.square().sum(dim=-1)
        closeness = 1 / (1 + distances.clamp(min=0))  # rounding can make a distance of 0 negative
        return closeness / closeness.sum(dim=-1, keepdim=True)
    if similarity == "squared-projection":
        products = products.square()
    return (products / centres.norm(dim=-1)).softmax(dim=-1)


def parameter_entropy(weight: Tensor) -> Tensor:
    """Mean binary entropy of the sigmoid of a parameter, times 0.2: pushes each of its numbers away from 0.

    Source: official code, loss of the learnable assignment. It looks at no input.
    """
    # -m log m - (1 - m) log(1 - m) with m = sigmoid(w), where no logarithm can overflow.
    return ENTROPY_WEIGHT * (F.softplus(weight) - weight * weight.sigmoid()).mean()


def sharpening_loss(assignment: Tensor) -> Tensor:
    """Divergence of the shares from a sharper version of themselves, mean over nodes and subjects.

    Args:
        assignment: (B, N, C), rows sum to 1.
    Source: Xie et al. 2016, equations 2 and 3. Differs: finite where a share or a whole community has vanished.
    """
    shares = assignment.flatten(0, 1)
    target = shares.square() / shares.sum(dim=0).clamp(min=TINY)
    target = target / target.sum(dim=1, keepdim=True).clamp(min=TINY)
    return F.kl_div(shares.clamp(min=TINY).log(), target.detach(), reduction="sum") / shares.shape[0]


def modularity_loss(shares: Tensor, connectivity: Tensor, resolution: float) -> Tensor:
    """Minus the modularity: falls as regions of one community are connected more than their strengths let expect.

    Args:
        shares: (B, R, C), of the communities in each region.
        connectivity: (B, R, R), symmetric; negative connections do not count.
        resolution: weight of what is expected; more than 1 makes more and smaller communities.
    Returns: a scalar, mean over subjects, times 20.
    Source: Newman 2006, equation 4, with shares for memberships (Tsitsulin et al. 2023) and a resolution (Reichardt and
        Bornholdt 2006). No part of THC.
    """
    weights = connectivity.clamp(min=0)
    strengths = weights.sum(dim=2)
    total = strengths.sum(dim=1, keepdim=True).clamp(min=TINY)
    within = (weights @ shares * shares).sum(dim=(1, 2)) / total[:, 0]
    expected = (strengths / total)[:, None] @ shares  # (B, 1, C), strength of each community
    return MODULARITY_WEIGHT * (resolution * expected.square().sum(dim=(1, 2)) - within).mean()


class SharedMean(nn.Module):
    """What an assignment is made from: a subject's own array, or one mean for all subjects.

    Args:
        shape: of the array of one subject.
        scope: "subject": its own. "batch": the mean over the batch, as published; an answer then depends on who else is
            asked about. "stored": in training the mean over the batch, in evaluation the running mean of these.
        momentum: weight of a new batch in the running mean; the first ones weigh alike.
        start: the running mean until there was a batch.
    """

    mean: Tensor
    num_batches: Tensor

    def __init__(self, *shape: int, scope: Scope, momentum: float, start: float = 0.0) -> None:
        super().__init__()
        self.scope = scope
        self.momentum = momentum
        if scope == "stored":
            self.register_buffer("mean", torch.full(shape, start))
            self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) → (B, …), or (1, …) where all subjects share."""
        if self.scope == "subject":
            return x
        if self.scope == "stored" and not self.training:
            return self.mean[None]
        mean = x.mean(dim=0, keepdim=True)
        if self.scope == "stored":
            self.num_batches += 1
            rate = (1 / self.num_batches).clamp(min=self.momentum)
            self.mean.lerp_(mean[0].detach().to(self.mean.dtype), rate)
        return mean


@torch.no_grad()
def store_means(model: nn.Module, connectivity: Tensor) -> None:
    """Replace the running means of a model by those over a whole training set, without dropout and noise.

    Needed for official weights, which hold no mean, and for averaged weights, whose attention is not that of any step.

    Args:
        model: with scope "stored".
        connectivity: (B, R, R), all subjects; they pass as one batch.
    Raises: ValueError if the model stores no mean.
    """
    shared = [module for module in model.modules() if isinstance(module, SharedMean) and module.scope == "stored"]
    if not shared:
        raise ValueError(f'{type(model).__name__} stores no mean; build it with scope="stored"')
    was_training = model.training
    model.eval()
    for module in shared:
        module.train()
        module.num_batches.zero_()
    model(connectivity)
    model.train(was_training)


class LearnedCommunities(nn.Module):
    """Communities from attention: nodes that attend alike belong together.

    Args:
        num_nodes: N.
        num_communities: C, at most N with an orthogonal start.
        scope, momentum: of the attention scores, as in `SharedMean`.
        has_orthogonal_start: whether the communities' columns start orthogonal.
        num_kept: as in `keep_strongest`; None is no mask.
    """

    def __init__(
        self,
        num_nodes: int,
        num_communities: int,
        *,
        scope: Scope,
        momentum: float,
        has_orthogonal_start: bool,
        num_kept: int | None,
    ) -> None:
        super().__init__()
        weight = nn.init.xavier_uniform_(torch.empty(num_nodes, num_communities))
        self.weight = nn.Parameter(orthogonal_start(weight.T).T.contiguous() if has_orthogonal_start else weight)
        self.shared = SharedMean(num_nodes, num_nodes, scope=scope, momentum=momentum)
        self.num_kept = num_kept

    def forward(self, nodes: Tensor, scores: Tensor) -> Tensor:
        """Assign.

        Args:
            nodes: (B, N, E), not looked at.
            scores: (B, N, N), attention before the softmax, mean over heads.
        Returns: (B, N, C).
        """
        assignment = (self.shared(scores) @ self.weight).softmax(dim=-1)
        if self.num_kept is not None:
            assignment = keep_strongest(assignment, self.num_kept)
        return assignment.expand(nodes.shape[0], -1, -1)

    def loss(self, assignment: Tensor) -> Tensor:  # noqa: ARG002 - called as CentreCommunities is
        """Entropy of the learned map; a scalar."""
        return parameter_entropy(self.weight)


class CentreCommunities(nn.Module):
    """Communities around centres in feature space ("OCRead": orthonormal clustering readout).

    Args:
        num_nodes, num_communities: N and C; C is at most E with an orthogonal start.
        dim: E.
        scope, momentum: of the assignment, as in `SharedMean`.
        similarity: as in `similarity_shares`.
        has_orthogonal_start: whether the centres start orthogonal.
        are_centres_frozen: whether training leaves them there.
    """

    def __init__(
        self,
        num_nodes: int,
        num_communities: int,
        dim: int,
        *,
        scope: Scope,
        momentum: float,
        similarity: Similarity,
        has_orthogonal_start: bool,
        are_centres_frozen: bool,
    ) -> None:
        super().__init__()
        centres = nn.init.xavier_uniform_(torch.empty(num_communities, dim))
        centres = orthogonal_start(centres) if has_orthogonal_start else centres
        self.centres = nn.Parameter(centres, requires_grad=not are_centres_frozen)
        self.shared = SharedMean(num_nodes, num_communities, scope=scope, momentum=momentum)
        self.similarity = similarity

    def forward(self, nodes: Tensor, scores: Tensor | None) -> Tensor:  # noqa: ARG002 - called as LearnedCommunities is
        """Assign: nodes (B, N, E) and attention scores, which are not looked at → (B, N, C)."""
        assignment = self.shared(similarity_shares(nodes, self.centres, self.similarity))
        return assignment.expand(nodes.shape[0], -1, -1)

    def loss(self, assignment: Tensor) -> Tensor:
        """`sharpening_loss` of what `forward` gave."""
        return sharpening_loss(assignment)
