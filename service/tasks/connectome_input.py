"""What a client sends of a brain → the matrix that a model takes, or a reason why not.

A time series becomes a matrix of the model's kind. A connectivity has to be of that kind already: from its numbers
alone one cannot tell what was done to them.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from service.errors import InvalidInput
from service.tasks.connectome_formats import Kind, Table, read_connectome
from service.tasks.connectomes import ConnectomeSpec, MatrixKind, Values, correlate, fisher_z, strongest_edges

_MAX_FISHER_Z = 19.0  # arctanh of the largest float64 below 1 is 18.7
_COPY = 1 - 1e-9  # measured regions never correlate as closely; copies differ by rounding only
_FLAT = 1e-9  # range of a region's signal, as a share of its largest value, that rounding can make

_MATRIX_NAMES: dict[MatrixKind, str] = {
    "fisher_z": "Fisher's z of correlations",
    "correlation": "correlations",
    "binary_graph": "the edges of a graph, 0 or 1",
}


class Connectome(NamedTuple):
    """A matrix as the model takes it, and how it came about.

    Attributes:
        matrix: (R, R) float32.
        source: what was sent.
        num_frames: of a time series, else None.
        mean_absolute_correlation: over all pairs; None where only a graph is known.
        weakest_edge: lowest correlation that became an edge; None unless a time series became a graph.
    """

    matrix: npt.NDArray[np.float32]
    source: Kind
    num_frames: int | None
    mean_absolute_correlation: float | None
    weakest_edge: float | None


def decode_connectome(body: bytes, media_type: str, spec: ConnectomeSpec) -> Connectome:
    """Read a file, check it and make the model's matrix of it.

    Args:
        body: the file.
        media_type: as in `read_connectome`.
        spec: what the model takes.
    Raises: InvalidInput.
    """
    table = read_connectome(body, media_type)
    kind = _find_kind(table, spec)
    _check_names(table.names, spec)
    return _from_connectivity(table.values, spec) if kind == "connectivity" else _from_series(table.values, spec)


def _find_kind(table: Table, spec: ConnectomeSpec) -> Kind:
    """Tell a connectivity from a time series.

    Raises: InvalidInput if the shape fits neither, or not what the file calls it.
    """
    num_regions = len(spec.regions)
    shape = table.values.shape
    size = f"{' x '.join(map(str, shape))} numbers" if 0 < len(shape) <= 4 else f"{len(shape)} dimensions"
    came = f"the {_name(table.kind)} has {size}"
    atlas = f"this model takes the {num_regions} regions of atlas {spec.atlas}"
    if len(shape) != 2:
        raise InvalidInput(f"{came}; {atlas}, as a table of rows and columns; send one subject's matrix")
    kind = table.kind or ("connectivity" if shape[0] == shape[1] else "time_series")
    if kind == "connectivity":
        if shape[0] != shape[1]:
            raise InvalidInput(f"{came}; a square matrix, a row and a column per region, was expected; {atlas}")
        if shape[0] != num_regions:
            raise InvalidInput(f"{came}; {atlas}; use that atlas, or ask a model for yours")
        return kind
    if shape[1] != num_regions:
        advice = "turn it: a row per frame and a column per region" if shape[0] == num_regions else "use that atlas"
        raise InvalidInput(
            f"{came}; {atlas}: {num_regions} columns, with {num_regions} rows of connectivity or a row per frame of a "
            f"time series; {advice}"
        )
    if table.kind is None and _is_connectivity_in_part(table.values, spec):
        raise InvalidInput(
            f"the table has {shape[0]} rows and looks like a connectivity that has lost or gained some; {atlas}; send "
            'all rows, or a time series as JSON "time_series"'
        )
    return kind


def _is_connectivity_in_part(values: Values, spec: ConnectomeSpec) -> bool:
    """Whether R columns are a connectivity that lost or gained rows, which must not pass for a time series."""
    num_rows, num_regions = values.shape
    if spec.matrix == "binary_graph":
        return bool(values.any() and ((values == 0) | (values == 1)).all())
    if num_rows > num_regions:
        parts = (values[:num_regions], values[-num_regions:])
        return any(np.array_equal(part, part.T) and (part != part[0, 0]).any() for part in parts)
    # Row i of what is left was row i, i + 1, … or i + the number lost, and there it has the diagonal's number. So has a
    # series in a region without signal, but that is the same place in all rows.
    is_diagonal = values == spec.diagonal
    places = [np.diagonal(is_diagonal, lost) for lost in range(num_regions - num_rows + 1)]
    return bool(np.any(places, axis=0).all()) and not is_diagonal.all(axis=0).any()


def _check_names(names: tuple[str, ...], spec: ConnectomeSpec) -> None:
    """Refuse columns in another order than the model's; names that it does not know say nothing about the order."""
    if not names or names == spec.regions or sorted(names) != sorted(spec.regions):
        return
    column = next(index for index, pair in enumerate(zip(names, spec.regions, strict=True)) if pair[0] != pair[1])
    raise InvalidInput(
        f"column {column + 1} of the table is {names[column]}; in this model it is {spec.regions[column]}, as in atlas "
        f"{spec.atlas}; bring the regions into the order of the model's manifest"
    )


def _from_connectivity(values: Values, spec: ConnectomeSpec) -> Connectome:
    _check_finite(values, "connectivity", spec)
    _check_symmetric(values, spec)
    _check_diagonal(values, spec)
    np.fill_diagonal(values, spec.diagonal)
    values = _check_range(values, spec)
    values = (values + values.T) / 2
    pairs = values[np.triu_indices(len(values), 1)]
    mean = None
    if spec.matrix != "binary_graph":
        mean = float(np.abs(np.tanh(pairs) if spec.matrix == "fisher_z" else pairs).mean())
    return Connectome(values.astype(np.float32), "connectivity", None, mean, None)


def _from_series(values: Values, spec: ConnectomeSpec) -> Connectome:
    num_frames = len(values)
    if not spec.min_frames <= num_frames <= spec.max_frames:
        raise InvalidInput(
            f"the time series has {num_frames} frames; this model takes {spec.min_frames} to {spec.max_frames}, as "
            "fewer make correlations of noise; send a whole scan"
        )
    _check_finite(values, "time series", spec)
    spread, size = np.ptp(values / 2, axis=0), np.abs(values).max(axis=0)  # halves, as the range may overflow
    if (is_constant := spread <= _FLAT * size).any():
        region = int(np.argmax(is_constant))
        raise InvalidInput(
            f"region {_name_region(region, spec)} is constant in all {num_frames} frames, and "
            f"{int(is_constant.sum())} of {len(size)} are; a signal that varies was expected, as nothing correlates "
            "with a constant; check that the scan covers the region"
        )
    correlations = correlate(values)
    pairs = np.triu_indices(len(correlations), 1)
    if (is_copy := np.abs(correlations[pairs]) >= _COPY).any():
        first, second = (int(index[np.argmax(is_copy)]) for index in pairs)
        raise InvalidInput(
            f"regions {_name_region(first, spec)} and {_name_region(second, spec)} have the same signal; each region's "
            "own was expected; check how the time series was extracted"
        )
    matrix, weakest = correlations, None
    if spec.matrix == "fisher_z":
        matrix = fisher_z(correlations)
    elif spec.edge_density is not None:
        matrix = strongest_edges(correlations, spec.edge_density)
        weakest = float(correlations[matrix > 0].min(initial=1))
    np.fill_diagonal(matrix, spec.diagonal)
    mean = float(np.abs(correlations[pairs]).mean())
    return Connectome(matrix.astype(np.float32), "time_series", num_frames, mean, weakest)


def _check_finite(values: Values, name: str, spec: ConnectomeSpec) -> None:
    is_bad = ~np.isfinite(values)
    if name == "connectivity":
        np.fill_diagonal(is_bad, val=False)  # the check of the diagonal says more
    if is_bad.any():
        row, column = (int(index[0]) for index in np.nonzero(is_bad))
        place = f"row {row + 1}, region {_name_region(column, spec)}"
        raise InvalidInput(
            f"the {name} has {int(is_bad.sum())} numbers that are missing, NaN or infinite, the first in {place}; "
            "finite numbers were expected; leave out frames without signal, or repair the extraction"
        )


def _check_diagonal(values: Values, spec: ConnectomeSpec) -> None:
    is_off = ~(np.abs(np.diagonal(values) - spec.diagonal) <= spec.tolerance)  # also where it is NaN
    if is_off.any():
        region = int(np.argmax(is_off))
        raise InvalidInput(
            f"the diagonal has {values[region, region]:g} for region {_name_region(region, spec)}; "
            f"{spec.diagonal} was expected, as this model takes {_MATRIX_NAMES[spec.matrix]}; set the diagonal to "
            f"{spec.diagonal}"
        )


def _check_symmetric(values: Values, spec: ConnectomeSpec) -> None:
    with np.errstate(over="ignore"):  # an infinite difference is none that is allowed
        difference = np.abs(np.triu(values, 1) - np.tril(values, -1).T)
    if difference.max() > spec.tolerance:
        row, column = divmod(int(np.argmax(difference)), len(values))
        raise InvalidInput(
            f"the connectivity is not symmetric: {values[row, column]:g} for row {row + 1}, column {column + 1} and "
            f"{values[column, row]:g} the other way round; differences up to {spec.tolerance:g} were expected; send "
            'the symmetric matrix, or, if it is a time series of as many frames as regions, JSON with "time_series"'
        )


def _check_range(values: Values, spec: ConnectomeSpec) -> Values:
    """Check that numbers are of the model's kind; clip what rounding took beyond it.

    Raises: InvalidInput.
    """
    if spec.matrix == "binary_graph":
        is_off, expected = (values != 0) & (values != 1), "0 or 1"
        advice = "send the graph, or the time series, of which this service makes it"
    elif spec.matrix == "correlation":
        is_off, expected = np.abs(values) > 1 + spec.tolerance, "-1 to 1"
        advice = "send correlations, neither covariances nor Fisher's z, or the time series"
    else:
        is_off, expected = np.abs(values) > _MAX_FISHER_Z, f"{-_MAX_FISHER_Z:g} to {_MAX_FISHER_Z:g}"
        advice = "send arctanh of the correlations, or the time series"
    if is_off.any():
        row, column = divmod(int(np.argmax(is_off)), len(values))
        raise InvalidInput(
            f"the connectivity has {values[row, column]:g} in row {row + 1}, column {column + 1}; {expected} was "
            f"expected, as this model takes {_MATRIX_NAMES[spec.matrix]}; {advice}"
        )
    return values.clip(-1, 1) if spec.matrix == "correlation" else values


def _name(kind: Kind | None) -> str:
    return "table" if kind is None else kind.replace("_", " ")


def _name_region(index: int, spec: ConnectomeSpec) -> str:
    return f"{spec.regions[index]} (number {index + 1})"
