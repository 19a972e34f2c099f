"""Hold the planner's model of costs against the paper's tables: `python -m benchmarks.parallel_fit`.

A few numbers of each machine are fitted to some rows; all other rows are predictions. Prints Markdown, the same at
every run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, permutations
from statistics import median

import numpy as np
from numpy.typing import NDArray

from benchmarks.parallel_paper import (
    HEADLINES,
    KIBI,
    NVLINK_CALLS,
    PCIE_CALLS,
    PEAK_TERAFLOPS,
    TRAINED,
    Calls,
    Trained,
    call_of,
    spreads_of,
)
from models.parallel.prediction import Device, predict
from models.parallel.topology import LINKS, Link, Topology
from models.parallel.transformer_costs import TRANSFORMERS, causal_flops, full_flops, step_seconds

A100_MEMORY, L20_MEMORY = 2e12, 864e9  # bytes a second: NVIDIA's data sheets
PRIOR = 0.02  # weight of where a number started: enough where rows tell nothing of it
BLOCK_MICROSECONDS = 170.0  # of training, what table 3 tells: kernels are the same
NUMBERS_OF_TABLE_3 = {"TFLOP/s of attention": 150.0, "µs of a block": 200.0}
NUMBERS_OF_TABLE_4 = NUMBERS_OF_TABLE_3 | {"GB/s to another rank": 10.0, "contention": 1.0}
NUMBERS_OF_TRAINING = {
    "TFLOP/s of dense layers": 200.0,
    "TFLOP/s of attention": 150.0,
    "GB/s of NVLink": 200.0,
    "GB/s of a rank between nodes": 25.0,
    "s of a step beyond": 0.1,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement beside its prediction, both in the table's unit.

    Attributes:
        group: rows that are put in order among each other.
        name: of the row.
        measured, predicted: the larger the faster.
        is_fitted: whether the machine's numbers were fitted to it.
        is_strange: whether the model has no cause for it, as the text says.
    """

    group: str
    name: str
    measured: float
    predicted: float
    is_fitted: bool
    is_strange: bool = False

    @property
    def error(self) -> float:
        """Share by which the prediction is too high."""
        return self.predicted / self.measured - 1


def fit(predict_rows: Callable[[Sequence[float]], list[Row]], start: Sequence[float]) -> list[float]:
    """Find positive numbers for which predictions of the fitted rows come near, by the logarithm of the ratio.

    What rows do not tell stays where it started.

    Source: Levenberg-Marquardt, by Marquardt 1963.
    """
    first = np.log(np.array(start))
    found, damping = first, 1e-2

    def residuals(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        rows = [row for row in predict_rows(np.exp(numbers).tolist()) if row.is_fitted]
        errors = np.array([math.log(row.predicted / row.measured) for row in rows])
        return np.concatenate((errors, PRIOR * (numbers - first)))

    here = residuals(found)
    for _ in range(40):
        slopes = np.stack([(residuals(found + step) - here) / 1e-4 for step in 1e-4 * np.eye(len(found))], axis=1)
        normal = slopes.T @ slopes
        change = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slopes.T @ here)
        there = residuals(found + change)
        if there @ there < here @ here:
            found, here, damping = found + change, there, damping / 3
        else:
            damping *= 4
    return [float(number) for number in np.exp(found)]


def predict_calls(table: Sequence[Calls], numbers: Sequence[float], *, is_pcie: bool) -> list[Row]:
    """Predict calls a second of table 3 or 4.

    Args:
        table: rows.
        numbers: TFLOP/s; microseconds of a block; on PCIe GB/s and contention, too.
        is_pcie: whether it is table 4.
    """
    link = LINKS["nvlink"]
    if is_pcie:
        link = Link(bytes_per_second=numbers[2] * 1e9, latency_seconds=1e-5, contention=numbers[3])
    topology = Topology((8,), (link,))
    device = Device(
        flops_per_second=numbers[0] * 1e12,
        block_seconds=numbers[1] * 1e-6,
        memory_bytes_per_second=L20_MEMORY if is_pcie else A100_MEMORY,
    )
    rows = []
    for calls in table:
        has_backward = not is_pcie and calls.length == 128 * KIBI
        for spread, measured in spreads_of(calls).items():
            found = predict(call_of(calls), spread, topology, device, is_causal=True, has_backward=has_backward)
            kilo = calls.length // KIBI
            layout = "basic" if spread.layout == "basic" else "balanced"
            rows.append(
                Row(
                    group=f"{kilo}K",
                    name=f"{kilo}K ulysses={spread.ulysses} ring={spread.ring} {layout}",
                    measured=measured,
                    predicted=1 / found.seconds,
                    is_fitted=(calls.length == 32 * KIBI) != is_pcie,
                )
            )
    return rows


def is_fitted(row: Trained) -> bool:
    """Table 5, the shortest length of table 6 but for its strange rows, and one length of figure 5."""
    shortest = row.table == "6" and row.step.length == 64 * KIBI and not is_strange(row)
    return row.table == "5" or shortest or (row.table == "figure 5" and row.step.length == KIBI)


def is_strange(row: Trained) -> bool:
    """Tensor parallelism of two on two nodes, slower than that of one and of four: the model has no cause for it."""
    return row.nodes == 2 and row.degrees.tensor == 2


def predict_training(trained: Sequence[Trained], numbers: Sequence[float]) -> list[Row]:
    """Predict TFLOP/s of training steps, as the paper counts them.

    Args:
        trained: rows.
        numbers: TFLOP/s of dense layers and of attention; GB/s of NVLink and of a rank between nodes.
    """
    dense, attention, inner, outer, fixed = numbers
    links = (
        Link(bytes_per_second=inner * 1e9, latency_seconds=5e-6),
        Link(bytes_per_second=outer * 1e9, latency_seconds=1e-5),
    )
    device = Device(
        flops_per_second=attention * 1e12,
        block_seconds=BLOCK_MICROSECONDS * 1e-6,
        memory_bytes_per_second=A100_MEMORY,
    )
    rows = []
    for row in trained:
        model, topology = TRANSFORMERS[row.model], Topology((row.nodes, 8), links)
        seconds = step_seconds(model, row.degrees, row.step, topology, device, dense_rate=dense * 1e12) + fixed
        degrees, kilo = row.degrees, f"{row.step.length / KIBI:g}K"
        rows.append(
            Row(
                group=f"{row.table}, {kilo}, {row.step.batch}",
                name=f"{kilo} batch={row.step.batch} tensor={degrees.tensor} ulysses={degrees.ulysses} "
                f"ring={degrees.ring} data={degrees.data}",
                measured=row.teraflops,
                predicted=full_flops(model, row.step) / degrees.num_ranks / seconds / 1e12,
                is_fitted=is_fitted(row),
                is_strange=is_strange(row),
            )
        )
    return rows


def count_pairs(rows: Sequence[Row]) -> tuple[int, int]:
    """How many pairs of rows of one group are predicted in the order that was measured, of all that differ by 2 %."""
    right = total = 0
    for a, b in combinations(rows, 2):
        if a.group == b.group and abs(math.log(a.measured / b.measured)) > 0.02:
            total += 1
            right += (a.measured > b.measured) == (a.predicted > b.predicted)
    return right, total


def summarise(rows: Sequence[Row]) -> str:
    """Tell errors and order in a line."""
    said = []
    for name, some in (
        ("fitted", [r for r in rows if r.is_fitted]),
        ("predicted", [r for r in rows if not r.is_fitted]),
    ):
        if some:
            errors = [abs(row.error) for row in some]
            right, total = count_pairs(some)
            order = f", {right} of {total} pairs in order" if total else ""
            said.append(
                f"{name} rows: median error {100 * median(errors):.1f} %, largest {100 * max(errors):.0f} %{order}"
            )
    return "; ".join(said)


def render_fit(title: str, unit: str, numbers: Sequence[float], names: Sequence[str], rows: Sequence[Row]) -> str:
    """Write a table of rows, above it what was fitted, below it how well the rows are met."""
    said = ", ".join(f"{number:.3g} {name}" for name, number in zip(names, numbers, strict=True))
    lines = [f"### {title}", "", f"Fitted: {said}.", "", summarise(rows)]
    plain = [row for row in rows if not row.is_strange]
    if len(plain) < len(rows):
        lines += ["", f"Without tensor=2 on two nodes: {summarise(plain)}"]
    lines += ["", f"| | measured {unit} | predicted | error |", "|---|---|---|---|"]
    lines += [
        f"| {row.name}{' (fitted)' if row.is_fitted else ''} | {row.measured:g} | {row.predicted:.4g} "
        f"| {100 * row.error:+.0f} % |"
        for row in rows
    ]
    return "\n".join(lines)


def render_headlines(rows: Sequence[Row]) -> str:
    """Put beside the figures that the paper is quoted for the pairs of its rows that come near, and their predictions.

    Counted is what a causal mask leaves.
    """
    lines = [
        "| quoted | rows of one length: both within 3 %, their ratio within 1 % | measured | predicted |",
        "|---|---|---|---|",
    ]
    shares = [causal_flops(TRANSFORMERS[t.model], t.step) / full_flops(TRANSFORMERS[t.model], t.step) for t in TRAINED]
    for headline in HEADLINES:
        unit = 100 / PEAK_TERAFLOPS if headline.unit == "% MFU" else 1.0
        counted = [(r, r.measured * s * unit, r.predicted * s * unit) for r, s in zip(rows, shares, strict=True)]
        quoted = f"{headline.said[0]:g} and {headline.said[1]:g} {headline.unit}"
        for (row, *better), (other, *worse) in permutations(counted, 2):
            is_near = all(abs(x[0] / y - 1) < 0.03 for x, y in zip((better, worse), headline.said, strict=True))
            is_near &= abs(better[0] / worse[0] * headline.said[1] / headline.said[0] - 1) < 0.01
            if is_near and row.group == other.group:
                measured, predicted = (f"{a:.4g} and {b:.4g}" for a, b in zip(better, worse, strict=True))
                lines.append(f"| {quoted} | {row.name}; {other.name} | {measured} | {predicted} |")
        longest = max(counted, key=lambda found: TRAINED[rows.index(found[0])].step.length)
        measured, predicted = (f"{x:.4g}" for x in longest[1:])
        lines.append(f"| {quoted} | the longest: {longest[0].name} | {measured} | {predicted} |")
    return "\n".join(lines)


def main() -> None:
    """Fit, predict, print."""
    sections = []
    for title, table, start, is_pcie in (
        ("Table 3: attention on 8 A100, NVLink", NVLINK_CALLS, NUMBERS_OF_TABLE_3, False),
        ("Table 4: attention on 8 L20, PCIe", PCIE_CALLS, NUMBERS_OF_TABLE_4, True),
    ):
        predict_rows = partial(predict_calls, table, is_pcie=is_pcie)
        numbers = fit(predict_rows, list(start.values()))
        sections.append(render_fit(title, "calls/s", numbers, list(start), predict_rows(numbers)))
    numbers = fit(partial(predict_training, TRAINED), list(NUMBERS_OF_TRAINING.values()))
    rows = predict_training(TRAINED, numbers)
    for name in dict.fromkeys(row.table for row in TRAINED):
        of_table = [row for row in rows if row.group.startswith(f"{name},")]
        title = f"{'Table ' if name.isdigit() else ''}{name}".capitalize()
        sections.append(render_fit(f"{title}: training", "TFLOP/s", numbers, list(NUMBERS_OF_TRAINING), of_table))
    sections.append(f"### Quoted figures\n\n{render_headlines(rows)}")
    print("\n\n".join(sections))


if __name__ == "__main__":
    main()
