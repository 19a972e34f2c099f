"""Measurements of the USP paper, to hold the planner against: rows as printed, and who was measured on what.

Source: Fang and Zhao 2024, "USP: A Unified Sequence Parallelism Approach for Long Context Generative AI", technical
report of 16 May 2024, tables 3 to 7 and figure 5. Its later versions print other numbers for some rows.
"""

from dataclasses import dataclass
from typing import NamedTuple

from models.parallel.costs import Workload
from models.parallel.prediction import Spread
from models.parallel.transformer_costs import Degrees, Step

KIBI = 1024


class Calls(NamedTuple):
    """Calls of attention a second on eight ranks, causal, layouts "basic" and "zigzag".

    Attributes:
        length: tokens.
        ulysses: degree; ring is the rest of eight.
        basic, zigzag: calls a second.
    """

    length: int
    ulysses: int
    basic: float
    zigzag: float


class Trained(NamedTuple):
    """A training step.

    Attributes:
        table: of the paper.
        model: name in `TRANSFORMERS`.
        nodes: of eight A800.
        step: what was trained.
        degrees: how.
        teraflops: of a rank, as the paper counts: no key hidden.
    """

    table: str
    model: str
    nodes: int
    step: Step
    degrees: Degrees
    teraflops: float


# Table 3: eight A100 with NVLink. Rows at 128K are 3.1 times as slow as those at 32K tell if both are forward only, as
# the table's caption says; they fit forward and backward, which is what is assumed here.
NVLINK_CALLS = [
    Calls(32 * KIBI, 8, 135.569, 136.375),
    Calls(32 * KIBI, 4, 103.525, 132.979),
    Calls(32 * KIBI, 2, 91.365, 132.979),
    Calls(32 * KIBI, 1, 81.985, 113.79),
    Calls(128 * KIBI, 8, 2.782, 2.785),
    Calls(128 * KIBI, 4, 2.024, 2.771),
    Calls(128 * KIBI, 2, 1.73, 2.89),
    Calls(128 * KIBI, 1, 1.628, 2.91),
]
# Table 4: eight L20 on PCIe.
PCIE_CALLS = [
    Calls(8 * KIBI, 8, 57.3, 57.1),
    Calls(8 * KIBI, 4, 153.1, 152.2),
    Calls(8 * KIBI, 2, 415.5, 454.9),
    Calls(8 * KIBI, 1, 358.6, 362.0),
    Calls(32 * KIBI, 8, 15.2, 14.3),
    Calls(32 * KIBI, 4, 28.6, 32.8),
    Calls(32 * KIBI, 2, 44.3, 62.8),
    Calls(32 * KIBI, 1, 40.5, 58.4),
    Calls(128 * KIBI, 8, 2.563, 2.586),
    Calls(128 * KIBI, 4, 3.217, 4.235),
    Calls(128 * KIBI, 2, 3.399, 5.476),
    Calls(128 * KIBI, 1, 3.131, 5.186),
]


def call_of(calls: Calls) -> Workload:
    """The attention of tables 3 and 4: 32 heads of queries, 8 of keys ("group 4"), of 128 numbers."""
    return Workload(length=calls.length, num_heads=32, num_key_heads=8, head_dim=128, item_bytes=2)


def spreads_of(calls: Calls) -> dict[Spread, float]:
    """What was measured of a row: way of spreading → calls a second."""
    u, r = calls.ulysses, 8 // calls.ulysses
    return {
        Spread(ulysses=u, ring=r, layout="basic"): calls.basic,
        Spread(ulysses=u, ring=r, layout="zigzag"): calls.zigzag,
    }


def _rows(
    table: str, model: str, nodes: int, kilo: int, rows: dict[tuple[int, int, int], float], *, batch: int = 1
) -> list[Trained]:
    """Rows of one length: (tensor, ulysses, ring) → TFLOP/s of a rank."""
    return [
        Trained(
            table,
            model,
            nodes,
            Step(length=kilo * KIBI, batch=batch),
            Degrees(tensor=t, ulysses=u, ring=r, data=8 * nodes // (t * u * r), zero=1),
            teraflops,
        )
        for (t, u, r), teraflops in rows.items()
    ]


TRAINED = [
    *_rows("5", "llama2-7b", 1, 64, {(4, 2, 1): 260.2, (4, 1, 2): 255, (8, 1, 1): 238.9}),
    *_rows(
        "5",
        "llama2-7b",
        1,
        30,
        {(2, 4, 1): 239.2, (2, 1, 4): 226.6, (4, 1, 1): 230.1, (1, 8, 1): 250.6, (1, 1, 8): 218, (8, 1, 1): 198},
        batch=16,
    ),
    *_rows(
        "6",
        "llama3-8b",
        2,
        64,
        {
            (1, 8, 2): 220.3,
            (1, 4, 4): 222.2,
            (1, 2, 8): 209.2,
            (1, 1, 16): 196.9,
            (8, 1, 2): 209.7,
            (4, 2, 2): 197.9,
            (2, 4, 2): 141.7,
            (2, 2, 4): 144.4,
            (4, 1, 4): 198.1,
            (2, 1, 8): 163.8,
        },
    ),
    *_rows("6", "llama3-8b", 2, 64, {(8, 1, 1): 228.2}, batch=2),
    *_rows(
        "6",
        "llama3-8b",
        2,
        80,
        {
            (1, 8, 2): 245.4,
            (1, 4, 4): 247.8,
            (1, 2, 8): 233.2,
            (1, 1, 16): 221.1,
            (8, 1, 2): 226.6,
            (4, 2, 2): 228.8,
            (2, 4, 2): 184.8,
            (2, 2, 4): 184.4,
            (4, 1, 4): 216.8,
            (2, 1, 8): 201.6,
        },
    ),
    *_rows("6", "llama3-8b", 2, 80, {(8, 1, 1): 240.3}, batch=2),
    *_rows("6", "llama3-8b", 2, 120, {(4, 2, 2): 266, (2, 4, 2): 238.3, (8, 1, 2): 254.5, (4, 1, 4): 263.3}),
    *_rows("7", "llama3-8b", 2, 160, {(4, 2, 2): 284.5, (8, 1, 2): 280.9, (4, 1, 4): 285.8}),
    *_rows("7", "llama3-8b", 2, 190, {(4, 1, 4): 285.8}),
    *_rows("7", "llama3-8b", 2, 208, {(8, 1, 2): 269.8}),
]
# Figure 5: Llama 2 on one node, eight sequences in all, spread over data or over the sequence.
for _length, _data, _sequence in ((4, 188.8, 175.3), (2, 152.8, 140.2), (1, 109.4, 97.5), (0.5, 61.2, 59.0)):
    _step = Step(length=int(_length * KIBI), batch=8)
    TRAINED += [
        Trained("figure 5", "llama2-7b", 1, _step, Degrees(data=8, zero=1), _data),
        Trained("figure 5", "llama2-7b", 1, _step, Degrees(ulysses=8, zero=1), _sequence),
    ]


@dataclass(frozen=True, kw_only=True)
class Headline:
    """Figures that the paper is quoted for.

    Attributes:
        said: as quoted.
        unit: "MFU" in percent of 312 TFLOP/s, or "TFLOP/s" of a rank; both count what a causal mask leaves.
    """

    said: tuple[float, float]
    unit: str


HEADLINES = [Headline(said=(47.0, 36.26), unit="% MFU"), Headline(said=(158.64, 141.20), unit="TFLOP/s")]
PEAK_TERAFLOPS = 312.0  # of an A800 in bfloat16, without sparsity: NVIDIA's data sheet of the A100
