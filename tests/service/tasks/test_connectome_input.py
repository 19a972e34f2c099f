import io
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from service.errors import InvalidInput
from service.tasks.connectome_input import Connectome, decode_connectome
from service.tasks.connectomes import ConnectomeSpec, correlate, fisher_z, strongest_edges

Values = npt.NDArray[np.float64]

R, T = 12, 30
REGIONS = tuple(f"region {letter}" for letter in "ABCDEFGHIJKL")


def make_spec(**facts: Any) -> ConnectomeSpec:
    usual = {"atlas": "TINY-12", "regions": REGIONS, "matrix": "correlation", "diagonal": 1, "min_frames": 20}
    return ConnectomeSpec(**usual | facts)


CORRELATION = make_spec()
FISHER_Z = make_spec(matrix="fisher_z", diagonal=0)
GRAPH = make_spec(matrix="binary_graph", diagonal=0, edge_density=0.2)
SPECS = {"correlation": CORRELATION, "fisher_z": FISHER_Z, "binary_graph": GRAPH}


def make_series(num_frames: int = T) -> Values:
    rng = np.random.default_rng(4)
    return rng.standard_normal((num_frames, 3)) @ rng.standard_normal((3, R)) + rng.standard_normal((num_frames, R))


def make_matrix(spec: ConnectomeSpec) -> Values:
    correlations = correlate(make_series())
    if spec.matrix == "fisher_z":
        return fisher_z(correlations)
    return correlations if spec.edge_density is None else strongest_edges(correlations, spec.edge_density)


def as_json(values: Values, kind: str = "connectivity") -> bytes:
    return json.dumps({kind: values.tolist()}).encode()


def as_csv(values: Values, separator: str = ",") -> bytes:
    return "\n".join(separator.join(map(repr, row)) for row in values.tolist()).encode()


def as_npy(values: Values) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def decode(body: bytes, spec: ConnectomeSpec = CORRELATION) -> Connectome:
    return decode_connectome(body, "", spec)


def refusal(body: bytes, spec: ConnectomeSpec = CORRELATION) -> str:
    with pytest.raises(InvalidInput) as caught:
        decode(body, spec)
    message = str(caught.value)
    assert message.count("; ") >= 2
    return message


def change(values: Values, row: int, column: int, value: float) -> Values:
    changed = values.copy()
    changed[row, column] = changed[column, row] = value
    return changed


# What is taken


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("write", [as_json, as_csv, lambda values: as_csv(values, " "), as_npy])
def test_a_connectivity_is_taken_as_it_is(spec: ConnectomeSpec, write: Any) -> None:
    matrix = make_matrix(spec)
    connectome = decode(write(matrix), spec)
    np.testing.assert_array_equal(connectome.matrix, matrix.astype(np.float32), strict=True)
    assert (connectome.source, connectome.num_frames, connectome.weakest_edge) == ("connectivity", None, None)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("write", [lambda values: as_json(values, "time_series"), as_csv, as_npy])
def test_a_time_series_becomes_what_the_model_takes(spec: ConnectomeSpec, write: Any) -> None:
    connectome = decode(write(make_series()), spec)
    np.testing.assert_array_equal(connectome.matrix, make_matrix(spec).astype(np.float32), strict=True)
    assert (connectome.source, connectome.num_frames) == ("time_series", T)
    pairs = np.triu_indices(R, 1)
    correlations = correlate(make_series())
    assert connectome.mean_absolute_correlation == pytest.approx(np.abs(correlations[pairs]).mean())
    if spec is GRAPH:
        assert connectome.weakest_edge == np.sort(correlations[pairs])[-13]  # round(0.2 * 66) edges
    else:
        assert connectome.weakest_edge is None


@pytest.mark.parametrize("matrix", ["correlation", "binary_graph"])
@pytest.mark.parametrize("diagonal", [0, 1])
def test_a_time_series_gets_the_diagonal_that_the_model_takes(matrix: str, diagonal: int) -> None:
    density = 0.2 if matrix == "binary_graph" else None
    spec = make_spec(matrix=matrix, diagonal=diagonal, edge_density=density)
    assert (np.diagonal(decode(as_csv(make_series()), spec).matrix) == diagonal).all()


def test_the_mean_correlation_of_a_connectivity_is_told_where_it_is_known() -> None:
    expected = np.abs(make_matrix(CORRELATION)[np.triu_indices(R, 1)]).mean()
    assert decode(as_csv(make_matrix(CORRELATION))).mean_absolute_correlation == pytest.approx(expected)
    assert decode(as_csv(make_matrix(FISHER_Z)), FISHER_Z).mean_absolute_correlation == pytest.approx(expected)
    assert decode(as_csv(make_matrix(GRAPH)), GRAPH).mean_absolute_correlation is None


def test_what_rounding_did_is_put_right() -> None:
    rough = make_matrix(CORRELATION) + np.random.default_rng(0).uniform(-4e-5, 4e-5, (R, R))
    rough[0, 1], rough[1, 0] = 1.00005, 1.00002
    matrix = decode(as_json(rough)).matrix
    np.testing.assert_array_equal(matrix, matrix.T)
    assert (np.diagonal(matrix) == 1).all()
    assert matrix.max() == 1
    np.testing.assert_allclose(matrix, rough, rtol=0, atol=1e-4)


def test_a_graph_without_edges_is_a_graph() -> None:
    assert not decode(as_csv(np.zeros((R, R))), GRAPH).matrix.any()


def test_a_table_as_high_as_wide_is_a_connectivity_and_json_may_say_otherwise() -> None:
    series = make_series(R)
    spec = make_spec(min_frames=R)
    assert "is not symmetric" in refusal(as_csv(series), spec)
    assert 'JSON with "time_series"' in refusal(as_npy(series), spec)
    assert decode(as_json(series, "time_series"), spec).num_frames == R


def test_names_in_the_atlas_s_order_or_of_another_atlas_are_taken() -> None:
    body = as_csv(make_matrix(CORRELATION), ";")
    for names in (REGIONS, [f"V{number}" for number in range(R)]):
        assert decode(";".join(names).encode() + b"\n" + body).source == "connectivity"


def test_the_model_s_names_in_another_order_are_refused() -> None:
    names = [*REGIONS[:3], REGIONS[4], REGIONS[3], *REGIONS[5:]]
    message = refusal(",".join(names).encode() + b"\n" + as_csv(make_matrix(CORRELATION)))
    assert message.startswith("column 4 of the table is region E; in this model it is region D, as in atlas TINY-12")


# Shapes


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (np.zeros((R, R - 1)), "connectivity", "the connectivity has 12 x 11 numbers; a square matrix"),
        (np.zeros((R + 1, R)), "connectivity", "the connectivity has 13 x 12 numbers; a square matrix"),
        (np.zeros((90, 90)), "connectivity", "has 90 x 90 numbers; this model takes the 12 regions of atlas TINY-12"),
        (np.zeros((R, R, 1)), "connectivity", "the connectivity has 12 x 12 x 1 numbers"),
        (np.zeros(R), "time_series", "the time series has 12 numbers"),
        (np.zeros(0), "connectivity", "the connectivity has 0 numbers"),
        (np.zeros((1, 0)), "time_series", "the time series has 1 x 0 numbers"),
        (np.zeros((T, R - 1)), "time_series", "has 30 x 11 numbers; this model takes the 12 regions of atlas TINY-12"),
        (np.zeros((R, T)), "time_series", "turn it: a row per frame and a column per region"),
    ],
)
def test_a_wrong_shape_is_refused(values: Values, kind: str, message: str) -> None:
    assert message in refusal(as_json(values, kind))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((R, R - 1), "the table has 12 x 11 numbers; this model takes the 12 regions of atlas TINY-12"),
        ((90, 90), "the connectivity has 90 x 90 numbers"),
        ((T, 2 * R), "the table has 30 x 24 numbers"),
        ((R, T), "turn it"),
    ],
)
@pytest.mark.parametrize("write", [as_csv, as_npy])
def test_a_table_of_a_wrong_shape_is_refused(shape: tuple[int, int], message: str, write: Any) -> None:
    expected = message.replace("the connectivity", "the table")
    assert expected in refusal(write(np.random.default_rng(0).standard_normal(shape)))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("lost", [[0], [5], [R - 1], [2, 3, 9]])
def test_a_connectivity_that_lost_rows_is_no_time_series(spec: ConnectomeSpec, lost: list[int]) -> None:
    spec = spec.model_copy(update={"min_frames": 3})
    body = as_csv(np.delete(make_matrix(spec), lost, axis=0))
    assert f"has {R - len(lost)} rows and looks like a connectivity that has lost" in refusal(body, spec)


@pytest.mark.parametrize("place", [0, R])
def test_a_connectivity_that_gained_a_row_is_no_time_series(place: int) -> None:
    spec = make_spec(min_frames=3)
    values = make_matrix(spec)
    assert "13 rows and looks like a connectivity" in refusal(as_csv(np.insert(values, place, 0.5, axis=0)), spec)


def test_a_short_time_series_with_a_region_without_signal_is_none_either() -> None:
    series = make_series(R // 2)
    series[:, R // 2] = 0
    assert "is constant" in refusal(as_csv(series), make_spec(matrix="fisher_z", diagonal=0, min_frames=3))


@pytest.mark.parametrize("num_frames", [5, R - 1, R + 1, T])
def test_a_short_time_series_is_not_taken_for_a_damaged_connectivity(num_frames: int) -> None:
    spec = make_spec(min_frames=3)
    assert decode(as_csv(make_series(num_frames)), spec).num_frames == num_frames


# Numbers of a connectivity


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(spec: ConnectomeSpec, value: float) -> None:
    message = refusal(as_csv(change(make_matrix(spec), 2, 5, value)), spec)
    assert message.startswith("the connectivity has 2 numbers that are missing, NaN or infinite, the first in row 3, ")
    assert "region region F (number 6)" in message


def test_null_in_json_is_a_missing_number() -> None:
    body = as_json(make_matrix(CORRELATION)).replace(b"[[1.0, ", b"[[1.0, null, ", 1).replace(b", 1.0], ", b"], ", 1)
    assert "missing, NaN" in refusal(as_json(change(make_matrix(CORRELATION), 0, 1, 7)).replace(b"7.0", b"null"))
    assert refusal(body)


def test_an_asymmetric_connectivity_is_refused_with_the_place_and_the_tolerance() -> None:
    values = make_matrix(CORRELATION)
    values[3, 7] += 2e-4
    message = refusal(as_json(values))
    assert message.startswith("the connectivity is not symmetric: ")
    assert "for row 4, column 8" in message
    assert "differences up to 0.0001 were expected" in message
    values[3, 7] -= 1.5e-4
    assert decode(as_json(values)).source == "connectivity"


@pytest.mark.parametrize(
    ("spec", "value", "expected"),
    [
        (CORRELATION, 0.0, "1 was expected"),
        (CORRELATION, np.nan, "1 was expected"),
        (CORRELATION, 0.9998, "1 was expected"),
        (FISHER_Z, 1.0, "0 was expected"),
        (FISHER_Z, np.inf, "the diagonal has inf"),
        (GRAPH, 1.0, "set the diagonal to 0"),
    ],
)
def test_a_diagonal_of_another_kind_is_refused(spec: ConnectomeSpec, value: float, expected: str) -> None:
    message = refusal(as_npy(change(make_matrix(spec), 4, 4, value)), spec)
    assert message.startswith("the diagonal has ")
    assert "region region E (number 5)" in message
    assert expected in message


@pytest.mark.parametrize(
    ("spec", "value", "expected"),
    [
        (CORRELATION, 1.2, "the connectivity has 1.2 in row 2, column 7; -1 to 1 was expected"),
        (CORRELATION, -1.001, "-1 to 1 was expected"),
        (CORRELATION, 1e308, "-1 to 1 was expected"),
        (FISHER_Z, 19.5, "-19 to 19 was expected"),
        (FISHER_Z, -1e308, "-19 to 19 was expected"),
        (GRAPH, 0.4, "the connectivity has 0.4 in row 2, column 7; 0 or 1 was expected"),
        (GRAPH, -1, "0 or 1 was expected"),
        (GRAPH, 2, "or the time series, of which this service makes it"),
    ],
)
def test_numbers_of_another_kind_are_refused(spec: ConnectomeSpec, value: float, expected: str) -> None:
    assert expected in refusal(as_json(change(make_matrix(spec), 1, 6, value)), spec)


def test_differences_that_overflow_are_asymmetry() -> None:
    values = make_matrix(FISHER_Z)
    values[0, 1], values[1, 0] = 1.7e308, -1.7e308
    assert "is not symmetric" in refusal(as_npy(values), FISHER_Z)


# Numbers of a time series


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(
    "signal",
    [np.zeros(T), np.full(T, 3.7), 1e6 + 1e-7 * np.arange(T), np.full(T, 1.7e308), np.full(T, 5e-324)],
    ids=["zero", "constant", "constant up to rounding", "huge", "tiny"],
)
def test_a_constant_region_is_refused_by_its_name(spec: ConnectomeSpec, signal: Values) -> None:
    series = make_series()
    series[:, 6] = series[:, 9] = signal
    message = refusal(as_csv(series), spec)
    assert message.startswith("region region G (number 7) is constant in all 30 frames, and 2 of 12 are")


@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_a_region_that_copies_another_is_refused(factor: float) -> None:
    series = make_series()
    series[:, 8] = factor * series[:, 3] + 5
    assert "regions region D (number 4) and region I (number 9) have the same signal" in refusal(as_npy(series))


@pytest.mark.parametrize("num_frames", [1, 19, 51])
@pytest.mark.parametrize("write", [lambda values: as_json(values, "time_series"), as_csv])
def test_too_few_or_too_many_frames_are_refused(num_frames: int, write: Any) -> None:
    message = refusal(write(make_series(num_frames)), make_spec(max_frames=50))
    assert message.startswith(f"the time series has {num_frames} frames; this model takes 20 to 50")


@pytest.mark.parametrize("num_frames", [20, 50])
def test_as_few_and_as_many_frames_as_allowed_are_taken(num_frames: int) -> None:
    assert decode(as_csv(make_series(num_frames)), make_spec(max_frames=50)).num_frames == num_frames


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_time_series_with_gaps_is_refused_with_the_place(value: float) -> None:
    series = make_series()
    series[17, 2] = value
    message = refusal(as_npy(series), GRAPH)
    assert message.startswith("the time series has 1 numbers that are missing, NaN or infinite, the first in row 18, ")
    assert "region region C (number 3)" in message


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_units_do_not_matter(scale: float) -> None:
    matrix = decode(as_npy(make_series() * scale)).matrix
    np.testing.assert_allclose(matrix, decode(as_npy(make_series())).matrix, rtol=0, atol=1e-6)


def test_numbers_at_random_give_a_matrix_or_invalid_input() -> None:
    rng = np.random.default_rng(8)
    extremes = np.array([0, 1, -1, 0.5, 2, np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324, 1e-9])
    outcomes = set()
    for _ in range(1500):
        spec = list(SPECS.values())[rng.integers(3)]
        values = make_matrix(spec) if rng.random() < 0.5 else make_series()
        for _ in range(rng.integers(0, 4)):
            value = extremes[rng.integers(len(extremes))]
            match rng.integers(4):
                case 0:
                    values = change(values, int(rng.integers(R - 3)), int(rng.integers(R - 3)), value)
                case 1:
                    values[rng.integers(len(values))] = value
                case 2:
                    values[:, rng.integers(R)] = value
                case _:
                    values = np.delete(values, 0, axis=0)
        try:
            connectome = decode(as_npy(values), spec)
        except InvalidInput:
            outcomes.add("refused")
        else:
            assert np.isfinite(connectome.matrix).all()
            np.testing.assert_array_equal(connectome.matrix, connectome.matrix.T)
            outcomes.add(connectome.source)
    assert outcomes == {"refused", "connectivity", "time_series"}


@pytest.mark.parametrize(("text", "size"), [("5", 0), ("null", 0), ("[" * 60 + "1" + "]" * 60, 60)])
def test_what_is_no_table_is_told_by_its_dimensions(text: str, size: int) -> None:
    assert f"the connectivity has {size} dimensions; " in refusal(f'{{"connectivity": {text}}}'.encode())
