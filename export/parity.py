"""How far a program is from the module it was made of."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from export.forced_decisions import run_with_decisions
from export.plan import Plan
from service.bundle import Parity, Precision
from service.runtimes.runtime import Runtime
from service.sample import AnyArray, Arrays

Errors = npt.NDArray[np.float64]

MAX_RELATIVE_ERROR = 1e-5
TOLERANCES: dict[Precision, float] = {"fp32": MAX_RELATIVE_ERROR, "fp16": 1e-2}
# float16 rounds what leads to a decision, so that more than near ties fall differently: 7 % of the rows of the shipped
# recogniser are off. With the program's own decisions, which are compared too, none may be.
MAX_SHARE_OFF_FP16 = 0.15


def measure_parity(plan: Plan, runtime: Runtime, *, precision: Precision = "fp32") -> Parity:
    """Compare module and program on the plan's parity batches.

    A row is what the last axis holds; of an output of integers, which are decisions, each number is a row. A row is off
    if it differs by more than the precision's tolerance, 1e-5 or 1e-2 of the largest magnitude in its batch; an integer
    is off if it differs at all.

    Args:
        plan: with the module, which computes in float32.
        runtime: runs the program.
        precision: of the program. One in fp16 is also compared with the module that takes the program's decisions; the
            errors told are those then.
    Raises: ValueError if an output has another shape, or more of its rows are off than may be.
    """
    free: dict[str, list[Errors]] = {name: [] for name in plan.output_names}
    forced: dict[str, list[Errors]] = {name: [] for name in plan.output_names}
    for batch in plan.parity_batches:
        found = runtime.run(batch, plan.output_names)
        _compare(found, plan.run(batch), free)
        if precision == "fp16":
            _compare(found, run_with_decisions(plan, batch, found), forced)
    tolerance, max_share_off = TOLERANCES[precision], allow_share_off(plan, precision)
    worst, shares = _judge(free, tolerance=tolerance, max_share_off=max_share_off)
    if precision == "fp16":
        worst, _ = _judge(forced, tolerance=tolerance, max_share_off=0.0)
    return Parity(
        inputs=plan.parity_inputs,
        batch_sizes=tuple(sorted({len(array) for batch in plan.parity_batches for array in batch.values()})),
        max_relative_error=worst,
        share_of_rows_off=shares if max_share_off else {},
    )


def allow_share_off(plan: Plan, precision: Precision) -> float:
    """Tell which share of an output may be off; 0 where nothing is decided."""
    return MAX_SHARE_OFF_FP16 if precision == "fp16" and plan.max_share_off else plan.max_share_off


def _compare(found: Arrays, expected: Arrays, errors: dict[str, list[Errors]]) -> None:
    for name, parts in errors.items():
        parts.append(row_errors(found[name], expected[name]))


def _judge(
    errors: dict[str, list[Errors]], *, tolerance: float, max_share_off: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Find the largest error of each output among its rows that are not off, and the share of those that are.

    Raises: ValueError if more are off than may be.
    """
    worst, shares = {}, {}
    for name, parts in errors.items():
        rows = np.concatenate(parts)
        is_near = rows <= tolerance  # not a number is far
        shares[name] = 1 - float(is_near.mean())
        if shares[name] > max_share_off:
            raise ValueError(
                f"program and module differ by {rows.max():.2e} in {name}, in {shares[name]:.2%} of its rows; allowed "
                f"is {tolerance:.0e}, and more in at most {max_share_off:.2%}"
            )
        worst[name] = float(rows[is_near].max())
    return worst, shares


def join_parities(parities: Sequence[Parity]) -> Parity:
    """Take the worst of several programs of one plan."""
    first, *others = parities
    for other in others:
        worst, shares = (
            {name: max(value, b[name]) for name, value in a.items()}
            for a, b in (
                (first.max_relative_error, other.max_relative_error),
                (first.share_of_rows_off, other.share_of_rows_off),
            )
        )
        first = first.model_copy(update={"max_relative_error": worst, "share_of_rows_off": shares})
    return first


def row_errors(found: AnyArray, expected: AnyArray) -> Errors:
    """Largest difference in each row over the largest expected magnitude of all: (rows,).

    Of integers, which name things, one is as wrong as another: 0 where they are the same, 1 where not.

    Raises: ValueError if the shapes differ.
    """
    if found.shape != expected.shape:
        raise ValueError(f"shape {found.shape}, expected {expected.shape}")
    if np.issubdtype(expected.dtype, np.integer):
        return (found != expected).ravel().astype(np.float64)
    return np.abs(found - expected).max(axis=-1).ravel() / magnitude(expected)


def magnitude(array: AnyArray) -> float:
    """Largest magnitude among numbers, which an error is measured by; 1 where all are 0."""
    return float(np.abs(array).max()) or 1.0
