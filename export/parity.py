"""How far a program is from the module it was made of."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from export.plan import Plan
from service.bundle import Parity
from service.runtimes.runtime import Runtime
from service.sample import AnyArray

MAX_RELATIVE_ERROR = 1e-5


def measure_parity(plan: Plan, runtime: Runtime) -> Parity:
    """Compare module and program on the plan's parity batches.

    A row is what the last axis holds; of an output of integers, which are decisions, each number is a row. A row is off
    if it differs by more than 1e-5 of the largest magnitude in its batch.

    Args:
        plan: with the module.
        runtime: runs the program.
    Raises: ValueError if an output has another shape, or more of its rows are off than the plan allows.
    """
    errors: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in plan.output_names}
    for batch in plan.parity_batches:
        expected = plan.run(batch)
        found = runtime.run(batch, plan.output_names)
        for name in plan.output_names:
            errors[name].append(row_errors(found[name], expected[name]))
    worst, shares = {}, {}
    for name, parts in errors.items():
        rows = np.concatenate(parts)
        is_near = rows <= MAX_RELATIVE_ERROR  # not a number is far
        shares[name] = 1 - float(is_near.mean())
        if shares[name] > plan.max_share_off:
            raise ValueError(
                f"program and module differ by {rows.max():.2e} in {name}, in {shares[name]:.2%} of its rows; allowed "
                f"is {MAX_RELATIVE_ERROR:.0e}, and more in at most {plan.max_share_off:.2%}"
            )
        worst[name] = float(rows[is_near].max())
    return Parity(
        inputs=plan.parity_inputs,
        batch_sizes=tuple(sorted({len(array) for batch in plan.parity_batches for array in batch.values()})),
        max_relative_error=worst,
        share_of_rows_off=shares if plan.max_share_off else {},
    )


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


def row_errors(found: AnyArray, expected: AnyArray) -> npt.NDArray[np.float64]:
    """Largest difference in each row over the largest expected magnitude of all: (rows,).

    Raises: ValueError if the shapes differ.
    """
    if found.shape != expected.shape:
        raise ValueError(f"shape {found.shape}, expected {expected.shape}")
    differences = np.abs(found - expected)
    rows = differences if np.issubdtype(expected.dtype, np.integer) else differences.max(axis=-1)
    return rows.ravel() / np.abs(expected).max()
