"""How ranks are wired: levels of links, the innermost first, and how long messages take over them.

A rank's messages leave by its own port of each level. Latencies count once for messages that start together.

Source: the alpha-beta model of Hockney 1994, level by level; ours otherwise.
Deliberately absent: routing, what levels take from each other.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Link:
    """One level of links.

    Attributes:
        bytes_per_second: that one rank can send to one other.
        latency_seconds: of a message.
        contention: how many receivers at once slow a sender down: it sends bytes_per_second / receivers ** contention
            in all. 0 is a switch, at 1 every further receiver costs as much again, as the paper measured on PCIe.
    """

    bytes_per_second: float
    latency_seconds: float
    contention: float = 0.0


# One rank's share, one direction. "nvlink" and "ib" are those of the paper's A800 machines: 400 GB/s both ways, and 1.6
# Tbit/s for a node of eight (Fang and Zhao 2024, section 5). "pcie" is what `benchmarks.parallel_fit` finds for its L20
# machine, "ethernet" 10 Gbit/s. The latencies are usual ones.
LINKS = {
    "nvlink": Link(bytes_per_second=200e9, latency_seconds=5e-6),
    "ib": Link(bytes_per_second=25e9, latency_seconds=1e-5),
    "pcie": Link(bytes_per_second=12e9, latency_seconds=1e-5, contention=1.2),
    "ethernet": Link(bytes_per_second=1.25e9, latency_seconds=5e-5),
}
_NUMBERS = re.compile(r"(\d+(?:\.\d+)?)(?:@(\d+(?:\.\d+)?))?(?:\^(\d+(?:\.\d+)?))?")


@dataclass(frozen=True)
class Topology:
    """Ranks in nested groups; rank 0 and 1 are in the same innermost one.

    Attributes:
        sizes: of the groups, the outermost first: (2, 4) is two nodes of four ranks.
        links: the innermost first: within a node, then between nodes.
    Raises: ValueError if there are not as many links as sizes, or a size below 1.
    """

    sizes: tuple[int, ...]
    links: tuple[Link, ...]

    def __post_init__(self) -> None:
        """Refuse what does not fit."""
        if len(self.sizes) != len(self.links) or min(self.sizes, default=0) < 1:
            raise ValueError(
                f"sizes {self.sizes} must be at least 1 and have one link each; got {len(self.links)} links; write "
                f"2x4:nvlink/ib for two nodes of four ranks"
            )

    @property
    def num_ranks(self) -> int:
        """Ranks in all groups."""
        return prod(self.sizes)

    def seconds(self, pairs: Pairs, num_bytes: float) -> float:
        """How long messages take that start together.

        Args:
            pairs: sender and receiver of each.
            num_bytes: of each.
        """
        if not pairs or not num_bytes:
            return 0.0
        used = [(link, count) for link, count in zip(self.links, _busiest(self.sizes, pairs), strict=True) if count]
        sending = max(count ** (1 + link.contention) / link.bytes_per_second for link, count in used) * num_bytes
        return sending + max(link.latency_seconds for link, _ in used)

    def collective_seconds(self, group: Sequence[int], num_bytes: float) -> float:
        """How long it takes until every rank of a group has what all of them have together, or its share of their sum.

        Level by level, as NCCL's rings over several ports do: outer links carry each byte once, over all ports of a
        group.

        Args:
            group: ranks, evenly spread over the levels.
            num_bytes: of the whole.
        """
        seconds, below, together = 0.0, 1, 1
        for size, link in zip(reversed(self.sizes), self.links, strict=True):
            below *= size
            met = sum(rank // below == group[0] // below for rank in group)  # ranks of the group within this level
            parts = met // together
            if parts > 1:
                share = num_bytes * (parts - 1) / parts / together
                seconds += share / link.bytes_per_second + (parts - 1) * link.latency_seconds
            together = met
        return seconds


def parse_topology(text: str) -> Topology:
    """Read a topology such as `8:nvlink`, `2x4:nvlink/ib` or `2x4:10@20^1/1.25@50`.

    Args:
        text: sizes, the outermost first; links, the innermost first: a name of `LINKS`, or GB/s of one rank, the
            latency in microseconds behind an @ (5 if it is left out), the contention behind a ^ (0).
    Raises: ValueError.
    """
    sizes, _, links = text.partition(":")
    if not re.fullmatch(r"\d+(x\d+)*", sizes):
        raise ValueError(f"topology {text} must start with sizes such as 2x4; write 2x4:nvlink/ib")
    return Topology(
        tuple(int(size) for size in sizes.split("x")), tuple(_parse_link(link, text) for link in links.split("/"))
    )


def exchange_pairs(groups: Sequence[Sequence[int]]) -> Pairs:
    """Every rank to every other one of its group."""
    return tuple((a, b) for group in groups for a in group for b in group if a != b)


def hop_pairs(groups: Sequence[Sequence[int]]) -> Pairs:
    """Every rank to the next one of its ring."""
    return tuple((a, b) for ring in groups for a, b in zip(ring, (*ring[1:], ring[0]), strict=True) if a != b)


def _parse_link(text: str, whole: str) -> Link:
    if text in LINKS:
        return LINKS[text]
    found = _NUMBERS.fullmatch(text)
    if not found or not float(found[1]):
        raise ValueError(
            f"link {text or '(none)'} of topology {whole} must be one of {', '.join(LINKS)}, or GB/s, microseconds and "
            f"contention such as 25@10 or 10@20^1"
        )
    return Link(
        bytes_per_second=float(found[1]) * 1e9,
        latency_seconds=float(found[2] or 5) * 1e-6,
        contention=float(found[3] or 0),
    )


@lru_cache(maxsize=4096)
def _busiest(sizes: tuple[int, ...], pairs: Pairs) -> list[int]:
    """For each level, the most messages that one rank sends over it."""
    spans = [prod(sizes[i:]) for i in reversed(range(len(sizes)))]  # ranks of a group, the innermost level first
    sent: list[Counter[int]] = [Counter() for _ in sizes]
    for sender, receiver in pairs:
        level = next(i for i, span in enumerate(spans) if sender // span == receiver // span)
        sent[level][sender] += 1
    return [max(by_rank.values(), default=0) for by_rank in sent]
