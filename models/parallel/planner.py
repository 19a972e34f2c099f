"""Chooses the degrees and the layout of sequence-parallel attention for a machine, and shows what the others cost.

Every product of degrees that gives the number of ranks is tried. What heads forbid stays in the table, with the reason;
of the rest, the fastest by `models.parallel.prediction` is chosen, of equal ones that with the smaller ring.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from models.parallel.costs import Workload, assignment_bytes
from models.parallel.layout import LAYOUTS, Layout
from models.parallel.prediction import Device, Prediction, Spread, predict, predict_clustered
from models.parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be spread, and over what.

    Attributes:
        work: one call of attention.
        topology, device: the machine.
        is_causal: whether queries see no later keys.
        has_backward: whether gradients are computed, too.
        max_memory_bytes: of a rank, None is unlimited.
    """

    work: Workload
    topology: Topology
    device: Device
    is_causal: bool = False
    has_backward: bool = False
    max_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """One way of spreading attention.

    Attributes:
        spread: the way.
        prediction: None where it cannot be.
        refusal: why it cannot be, or must not.
    """

    spread: Spread
    prediction: Prediction | None
    refusal: str | None = None


def list_alternatives(question: Question) -> list[Alternative]:
    """Try all degrees and layouts.

    Raises: ValueError if the heads of queries are no multiple of those of keys, or no length or number is positive.
    """
    work, num_ranks = question.work, question.topology.num_ranks
    if min(work.length, work.num_heads, work.key_heads, work.head_dim, work.batch) < 1:
        raise ValueError(
            f"length={work.length}, heads={work.num_heads}, key heads={work.key_heads}, head dim={work.head_dim} and "
            f"batch={work.batch} must be at least 1"
        )
    if work.num_heads % work.key_heads:
        raise ValueError(f"{work.num_heads} heads of queries must be a multiple of {work.key_heads} heads of keys")
    degrees = [u for u in range(num_ranks, 0, -1) if num_ranks % u == 0]
    return [
        _judge(question, Spread(ulysses=ulysses, ring=num_ranks // ulysses, layout=layout))
        for ulysses in degrees
        for layout in layouts_for(num_ranks // ulysses, is_causal=question.is_causal)
    ]


def layouts_for(ring: int, *, is_causal: bool) -> Sequence[Layout]:
    """Layouts that differ: without a causal mask or a ring all have the same work, and "basic" keeps neighbours."""
    return LAYOUTS if is_causal and ring > 1 else LAYOUTS[:1]


def choose(alternatives: Sequence[Alternative]) -> Alternative:
    """Take the fastest; of equal ones the first, which has the smaller ring.

    Raises: ValueError with all reasons if none is possible.
    """
    allowed = [(one.prediction.seconds, one) for one in alternatives if one.prediction and not one.refusal]
    if not allowed:
        said = "; ".join(f"ulysses={one.spread.ulysses}: {one.refusal}" for one in alternatives)
        raise ValueError(f"no degrees fit: {said}; take other ranks, or more of them")
    return min(allowed, key=lambda pair: pair[0])[1]


def render_plan(question: Question, *, num_clusters: int | None = None) -> str:
    """Write the choice and the table of alternatives as Markdown.

    Args:
        question: what is asked.
        num_clusters: adds a line for clustered attention with so many clusters, which is another attention.
    Raises: ValueError if nothing fits.
    """
    alternatives = list_alternatives(question)
    best = choose(alternatives)
    what = "forward and backward" if question.has_backward else "forward"
    lines = [
        f"ulysses={best.spread.ulysses} ring={best.spread.ring} layout={best.spread.layout}",
        "",
        f"One call of attention, {what}, of each of {question.topology.num_ranks} ranks:",
        "",
        "| ulysses | ring | layout | compute ms | exchange ms | exposed hops ms | total ms | sent MB | memory MB | |",
        "|" + "---|" * 10,
    ]
    for one in alternatives:
        name = f"| {one.spread.ulysses} | {one.spread.ring} | {one.spread.layout} "
        remark = one.refusal or ("chosen" if one is best else "")
        lines.append(name + (_cells(question, one.prediction) if one.prediction else "| " * 6) + f"| {remark} |")
    if num_clusters is not None:
        lines += _clustered_lines(question, num_clusters)
    return "\n".join(lines)


def _judge(question: Question, spread: Spread) -> Alternative:
    heads = question.work.num_heads
    if heads % spread.ulysses:
        return Alternative(spread=spread, prediction=None, refusal=f"{heads} heads are no multiple of {spread.ulysses}")
    found = predict(
        question.work,
        spread,
        question.topology,
        question.device,
        is_causal=question.is_causal,
        has_backward=question.has_backward,
    )
    most = question.max_memory_bytes
    refusal = None
    if most is not None and found.memory_bytes > most:
        refusal = f"more than {most / 1e6:.0f} MB"
    return Alternative(spread=spread, prediction=found, refusal=refusal)


def _cells(question: Question, found: Prediction) -> str:
    times = (found.compute_seconds, found.exchange_seconds, found.exposed_seconds, found.seconds)
    sent = found.sent.forward + (found.sent.backward if question.has_backward else 0)
    return "".join(f"| {1e3 * s:.3f} " for s in times) + f"| {sent / 1e6:.2f} | {found.memory_bytes / 1e6:.0f} "


def _clustered_lines(question: Question, num_clusters: int) -> list[str]:
    found = predict_clustered(
        question.work,
        question.topology,
        question.device,
        num_clusters=num_clusters,
        has_backward=question.has_backward,
    )
    ids = assignment_bytes(question.work, num_ranks=question.topology.num_ranks, num_clusters=num_clusters)
    return [
        f"| clustered | | {num_clusters} clusters {_cells(question, found)}| another attention, its clusters given |",
        "",
        f"Finding the clusters sends {ids / 1e6:.2f} MB more.",
    ]
