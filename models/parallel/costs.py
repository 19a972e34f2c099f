"""Bytes that each way of spreading attention over ranks sends, worked out before anything is sent.

They are those of `Communicator.bytes_sent`, payload that leaves one rank; the few words by which ranks agree on shapes
stand apart, in `agreement_bytes`. No step depends on what the tensors hold but the fetching of keys in improved
clustered attention.

Source: Fang and Zhao 2024 (USP), table 2, counts whole tensors; here it is what one rank sends.
"""

from dataclasses import dataclass
from math import lcm

from models.parallel.layout import Layout, padded_length

WIDE_BYTES = 4  # sums, merges and clustered attention are in float32
DENSE_FACTS, CLUSTERED_FACTS = 12, 9  # words by which ranks agree on one call, of attention or of finding clusters


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One call of attention.

    Attributes:
        length: N of the whole sequence.
        num_heads: H.
        head_dim: D.
        num_key_heads: J, None is H.
        value_dim: E, None is D.
        batch: B.
        item_bytes: of the tensors' type.
    """

    length: int
    num_heads: int
    head_dim: int
    num_key_heads: int | None = None
    value_dim: int | None = None
    batch: int = 1
    item_bytes: int = 4

    @property
    def key_heads(self) -> int:
        """J."""
        return self.num_key_heads or self.num_heads

    @property
    def value_width(self) -> int:
        """E."""
        return self.value_dim or self.head_dim


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends, forward and backward."""

    forward: int
    backward: int


def usp_bytes(work: Workload, *, ulysses: int, ring: int, layout: Layout = "basic") -> Sent:
    """Ulysses with ring = 1, ring with ulysses = 1, or both.

    Forward, heads of queries, keys, values and outputs are exchanged and keys and values hop ring - 1 times. Backward
    exchanges as many gradients; keys and values hop again, and their gradients, in float32, once more to come home.
    """
    num_slots = work.batch * padded_length(work.length, layout, ulysses=ulysses, ring=ring) // (ulysses * ring)
    copies = lcm(work.key_heads, ulysses) // work.key_heads
    queries = work.num_heads * (work.head_dim + work.value_width) * num_slots
    keys = work.key_heads * copies * (work.head_dim + work.value_width) * num_slots
    exchanged = (queries + keys) * work.item_bytes * (ulysses - 1) // ulysses
    key_gradient_bytes = work.item_bytes if copies == 1 else WIDE_BYTES
    returned = (queries * work.item_bytes + keys * key_gradient_bytes) * (ulysses - 1) // ulysses
    hops = (ring - 1) * keys * work.item_bytes
    gradient_hops = ring * keys * WIDE_BYTES if ring > 1 else 0
    return Sent(exchanged + hops, returned + hops + gradient_hops)


def key_mask_bytes(work: Workload, *, ulysses: int, ring: int, layout: Layout = "basic") -> int:
    """Every rank gets the mask of all keys: a byte each, forward only."""
    num_slots = work.batch * padded_length(work.length, layout, ulysses=ulysses, ring=ring) // (ulysses * ring)
    return (ulysses * ring - 1) * num_slots


def agreement_bytes(num_facts: int, *, ulysses: int, ring: int) -> int:
    """Every rank tells the others what it is about to do: its ulysses ranks first, then the ring; forward only."""
    return 8 * num_facts * (ulysses - 1 + (ring - 1) * ulysses)


def clustered_bytes(work: Workload, *, num_ranks: int, num_clusters: int) -> Sent:
    """Plain clustered attention with global clusters, given the clusters: the same for every length."""
    owned = -(-num_clusters // num_ranks) * work.batch * work.num_heads
    sums = 2 * (work.head_dim + 1)  # added up, then spread
    seen = work.value_width + 1 + work.value_width  # to owners, and from them
    sent = (num_ranks - 1) * owned * (sums + seen) * WIDE_BYTES
    return Sent(sent, sent)


def segment_clustered_bytes(work: Workload, *, num_ranks: int, num_clusters: int) -> Sent:
    """Plain clustered attention with segment-local clusters: the same for every length."""
    owned = num_clusters // num_ranks * work.batch * work.num_heads
    sent = (num_ranks - 1) * owned * (work.head_dim + work.value_width + 1) * WIDE_BYTES
    return Sent(sent, sent)


def assignment_bytes(work: Workload, *, num_ranks: int, num_clusters: int, has_bits: bool = True) -> int:
    """Finding global clusters: 8 bytes a query and head with hash bits, else the query in float32; clusters back."""
    num_slots = -(-work.length // num_ranks)
    heads = work.batch * -(-work.num_heads // num_ranks) * num_ranks
    point_bytes = 8 if has_bits else WIDE_BYTES * work.head_dim
    id_bytes = 2 if num_clusters < 2**15 else 4
    return (num_ranks - 1) * heads * num_slots * (point_bytes + id_bytes) // num_ranks
