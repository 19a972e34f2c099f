"""Who holds which tokens and clusters when clustered attention is spread over ranks.

Every rank holds as many consecutive slots, and owns as many clusters: it merges what all ranks found for them.
"""

from dataclasses import dataclass

from torch import Tensor

from models.parallel.collectives import Communicator, check_agreement


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """Who holds which tokens and clusters.

    Attributes:
        ranks: G of them, in order of their tokens.
        length: tokens of the whole sequence.
        num_clusters: C, of all segments together.
        num_segments: 1 is global clusters.
    Raises: ValueError if segments do not fit clusters or ranks.
    """

    ranks: Communicator
    length: int
    num_clusters: int
    num_segments: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers that do not fit."""
        if self.length < 1 or self.num_clusters < 1 or self.num_segments < 1:
            raise ValueError(
                f"length={self.length}, num_clusters={self.num_clusters} and num_segments={self.num_segments} must be "
                f"at least 1"
            )
        if self.num_segments > 1 and (self.num_clusters % self.num_segments or self.num_segments % self.ranks.size):
            raise ValueError(
                f"num_segments={self.num_segments} must divide num_clusters={self.num_clusters} and be a multiple of "
                f"{self.ranks.size} ranks; choose other ranks, as segments belong to the model"
            )

    @property
    def is_global(self) -> bool:
        """Whether clusters draw queries from all ranks."""
        return self.num_segments == 1

    @property
    def num_slots(self) -> int:
        """Slots of one rank; those of tokens from the length on are padding."""
        parts = self.ranks.size if self.is_global else self.num_segments
        return -(-self.length // parts) * parts // self.ranks.size

    @property
    def num_owned(self) -> int:
        """Clusters of one rank; the last may own some that do not exist."""
        return -(-self.num_clusters // self.ranks.size)

    @property
    def first_token(self) -> int:
        """The token in this rank's first slot."""
        return self.ranks.rank * self.num_slots

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank."""
        return min(max(self.length - self.first_token, 0), self.num_slots)

    @property
    def num_asked(self) -> int:
        """Clusters that queries of this rank may have."""
        return self.num_owned * (self.ranks.size if self.is_global else 1)

    def check_agreement(self, q: Tensor, **facts: int) -> None:
        """See whether all ranks bring heads q (B, H, N, D) of one shape and type, this plan, and the same facts.

        Raises: ValueError, on all ranks; RankLost.
        """
        facts |= {"batch": q.shape[0], "heads": q.shape[1], "head_dim": q.shape[3], "item_bytes": q.element_size()}
        facts |= {"length": self.length, "num_clusters": self.num_clusters, "num_segments": self.num_segments}
        check_agreement(facts, (self.ranks,), device=q.device)
