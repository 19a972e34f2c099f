"""How long one call of attention takes on many ranks, and the memory of one of them, before anything is run.

A block of attention takes a fixed time, one for its arithmetic, and in a ring one for adding it to what is known; the
ring's next keys travel meanwhile, so that a step takes the longer of both; exchanges of heads are not hidden.

Source: Fang and Zhao 2024 (USP), sections 3 and 4; the formulas of bytes are those of `models.parallel.costs`, which
are tested against what is sent.
Deliberately absent: tensor cores' love of large blocks beyond the fixed time, dropout, masks of keys.
"""

from dataclasses import dataclass
from math import lcm

from models.parallel.costs import WIDE_BYTES, Sent, Workload, clustered_bytes, usp_bytes
from models.parallel.layout import Layout, padded_length
from models.parallel.tiles import TILE_ROWS, TILE_SCORES
from models.parallel.topology import Topology, exchange_pairs, hop_pairs

BACKWARD_TO_FORWARD = 2.5  # five products of matrices instead of two: Dao 2023 (FlashAttention-2), section 4.1


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one rank computes.

    Attributes:
        flops_per_second: of attention, multiplications and additions.
        block_seconds: fixed time of one block of attention, whatever its size.
        memory_bytes_per_second: of reading and writing sums.
    """

    flops_per_second: float
    block_seconds: float
    memory_bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One way of spreading attention.

    Attributes:
        ulysses, ring: degrees.
        layout: see `models.parallel.layout`.
        tensor: ranks that share each token, each with its own heads; neighbours of each other.
    """

    ulysses: int
    ring: int
    layout: Layout = "basic"
    tensor: int = 1

    def ulysses_groups(self, num_ranks: int) -> list[list[int]]:
        """Ranks that exchange heads: tensor ranks lie within each of them, as the mesh has them."""
        t, u = self.tensor, self.ulysses
        return [[(g * u + i) * t + j for i in range(u)] for g in range(num_ranks // (t * u)) for j in range(t)]

    def ring_groups(self, num_ranks: int) -> list[list[int]]:
        """Ranks of each ring, in order."""
        inner = self.tensor * self.ulysses
        outer = num_ranks // (inner * self.ring)
        return [[(g * self.ring + i) * inner + j for i in range(self.ring)] for g in range(outer) for j in range(inner)]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One call of attention on one rank.

    Attributes:
        compute_seconds: of the rank that computes most at each step of the ring.
        exchange_seconds: exchanging heads for tokens and back.
        exposed_seconds: what hops of keys take beyond the computing that hides them.
        sent: bytes that leave the rank.
        memory_bytes: the most that the rank holds, its inputs and output included.
    """

    compute_seconds: float
    exchange_seconds: float
    exposed_seconds: float
    sent: Sent
    memory_bytes: int

    @property
    def seconds(self) -> float:
        """From start to end."""
        return self.compute_seconds + self.exchange_seconds + self.exposed_seconds


def predict(
    work: Workload, spread: Spread, topology: Topology, device: Device, *, is_causal: bool, has_backward: bool
) -> Prediction:
    """Predict one call; heads of `work` are those of one tensor rank.

    Args:
        work: of all ranks that hold one sequence; every such group of ranks has its own.
        spread: tensor · ulysses · ring must divide the topology's ranks.
        topology, device: the machine.
        is_causal: whether queries see no later keys.
        has_backward: whether gradients are computed, too.
    """
    size = _Sizes.of(work, spread)
    exchanges = exchange_pairs(spread.ulysses_groups(topology.num_ranks))
    hops = hop_pairs(spread.ring_groups(topology.num_ranks))

    def exchange(num_items: int, item_bytes: int) -> float:
        return topology.seconds(exchanges, num_items * item_bytes / spread.ulysses)

    flops = 2 * size.slots * (size.queries + size.outputs)  # scores, and sums of values
    shares = _block_shares(spread, is_causal=is_causal)

    def block_seconds(flops: float, num_merged: int) -> list[float]:
        fixed = device.block_seconds
        if spread.ring > 1:  # sums in float32 are read and written, what is added is read
            fixed += num_merged * (work.item_bytes + 2 * WIDE_BYTES) / device.memory_bytes_per_second
        return [fixed + share * flops / device.flops_per_second for share in shares]

    blocks = block_seconds(flops, size.outputs)
    hop = topology.seconds(hops, size.keys * work.item_bytes)
    compute, exposed = sum(blocks), _exposed(blocks, [hop] * (spread.ring - 1) + [0.0])
    exchanged = exchange(size.queries + size.keys, work.item_bytes) + exchange(size.outputs, work.item_bytes)
    if has_backward:
        blocks = block_seconds(BACKWARD_TO_FORWARD * flops, size.queries + size.keys)
        hop_home = topology.seconds(hops, size.keys * WIDE_BYTES)
        # Gradients of keys travel one step behind the keys; nothing hides their last hop.
        hopping = [hop * (i < spread.ring - 1) + hop_home * (i > 0) for i in range(spread.ring)]
        compute += sum(blocks)
        exposed += _exposed(blocks, hopping) + hop_home
        exchanged += exchange(size.outputs, work.item_bytes) + exchange(size.queries, work.item_bytes)
        exchanged += exchange(size.keys, work.item_bytes if size.copies == 1 else WIDE_BYTES)
    return Prediction(
        compute_seconds=compute,
        exchange_seconds=exchanged,
        exposed_seconds=exposed,
        sent=usp_bytes(work, ulysses=spread.ulysses, ring=spread.ring, layout=spread.layout),
        memory_bytes=_memory_bytes(work, spread, size, has_backward=has_backward),
    )


def predict_clustered(
    work: Workload, topology: Topology, device: Device, *, num_clusters: int, has_backward: bool
) -> Prediction:
    """Predict plain clustered attention with global clusters, given the clusters; it is no exact attention."""
    G, size = topology.num_ranks, _Sizes.of(work, Spread(ulysses=1, ring=topology.num_ranks))
    flops = 2 * num_clusters * (size.queries + size.outputs)  # each token is a key of every cluster
    sent = clustered_bytes(work, num_ranks=G, num_clusters=num_clusters)
    pairs = exchange_pairs([range(G)])
    passes = 1 + BACKWARD_TO_FORWARD * has_backward
    moved = sent.forward + sent.backward * has_backward
    scores = (
        3 * num_clusters * size.queries // work.head_dim * WIDE_BYTES
    )  # scores, weights, and one of them on the way
    inputs = (size.queries + size.keys + size.outputs) * (work.item_bytes + WIDE_BYTES)
    return Prediction(
        compute_seconds=device.block_seconds * (1 + has_backward) + passes * flops / device.flops_per_second,
        exchange_seconds=topology.seconds(pairs, moved / max(1, G - 1)),
        exposed_seconds=0.0,
        sent=sent,
        memory_bytes=inputs + scores,
    )


@dataclass(frozen=True)
class _Sizes:
    """Numbers of one rank, with its share of slots.

    Attributes:
        slots: of its ring rank, all ulysses ranks together.
        queries, keys, outputs: numbers in its q, in its k and v after copies, in its output.
        copies: of each head of keys.
    """

    slots: int
    queries: int
    keys: int
    outputs: int
    copies: int

    @classmethod
    def of(cls, work: Workload, spread: Spread) -> "_Sizes":
        slots = padded_length(work.length, spread.layout, ulysses=spread.ulysses, ring=spread.ring) // spread.ring
        own = work.batch * slots // spread.ulysses
        copies = lcm(work.key_heads, spread.ulysses) // work.key_heads
        return cls(
            slots,
            own * work.num_heads * work.head_dim,
            own * work.key_heads * copies * (work.head_dim + work.value_width),
            own * work.num_heads * work.value_width,
            copies,
        )


def _block_shares(spread: Spread, *, is_causal: bool) -> list[float]:
    """What of its keys the busiest rank computes at each step of the ring: half, where causal work is balanced."""
    if not is_causal:
        return [1.0] * spread.ring
    return [0.5] + [1.0 if spread.layout == "basic" else 0.5] * (spread.ring - 1)


def _exposed(blocks: list[float], hops: list[float]) -> float:
    return sum(max(0.0, hop - block) for block, hop in zip(blocks, hops, strict=True))


def _memory_bytes(work: Workload, spread: Spread, size: _Sizes, *, has_backward: bool) -> int:
    """Inputs and output; what arrived by exchange; keys at hand and on their way; float32 sums; one tile of scores."""
    w = work.item_bytes
    heads = size.queries + size.keys
    held = size.keys * w * (2 if spread.ring > 1 else 1)
    rows = work.batch * (work.num_heads // spread.ulysses) * size.slots  # of scores
    answer = size.outputs * WIDE_BYTES + rows * WIDE_BYTES
    tile = WIDE_BYTES * min(TILE_SCORES, rows * min(TILE_ROWS, size.slots)) * (2 if has_backward else 1)
    total = heads * w * (2 if spread.ulysses > 1 else 1) + size.outputs * w + held + answer + tile
    if has_backward:
        total += size.outputs * w + (size.queries + size.keys * (2 if spread.ring > 1 else 1)) * WIDE_BYTES
    return total
