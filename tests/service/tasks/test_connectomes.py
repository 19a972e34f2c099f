from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from service.tasks.connectomes import ConnectomeSpec, correlate, fisher_z, strongest_edges

Values = npt.NDArray[np.float64]

GOOD: dict[str, Any] = {"atlas": "A", "regions": ("a", "b"), "matrix": "correlation", "min_frames": 3}


def make_series(num_frames: int = 40, num_regions: int = 7) -> Values:
    rng = np.random.default_rng(1)
    return rng.standard_normal((num_frames, 2)) @ rng.standard_normal((2, num_regions)) + rng.standard_normal(
        (num_frames, num_regions)
    )


def naive_correlation(x: Values, y: Values) -> float:
    """Pearson's correlation by the sums of the textbook."""
    n = len(x)
    sums = sum(x), sum(y), sum(x * y), sum(x * x), sum(y * y)
    above = n * sums[2] - sums[0] * sums[1]
    return float(above / np.sqrt((n * sums[3] - sums[0] ** 2) * (n * sums[4] - sums[1] ** 2)))


def test_correlations_are_pearson_s() -> None:
    series = make_series()
    expected = [[naive_correlation(x, y) for y in series.T] for x in series.T]
    np.testing.assert_allclose(correlate(series), expected, rtol=0, atol=1e-12)


def test_correlations_are_symmetric_to_the_bit_and_one_on_the_diagonal() -> None:
    correlations = correlate(make_series(50, 60))
    np.testing.assert_array_equal(correlations, correlations.T)
    np.testing.assert_array_equal(np.diagonal(correlations), np.ones(60))
    assert np.abs(correlations).max() <= 1


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_units_and_offsets_do_not_matter(scale: float) -> None:
    series = make_series()
    np.testing.assert_allclose(correlate(series * scale), correlate(series), rtol=0, atol=1e-12)
    np.testing.assert_allclose(correlate(series + 1e4), correlate(series), rtol=0, atol=1e-9)


def test_fisher_z_is_arctanh_with_a_zero_diagonal() -> None:
    correlations = correlate(make_series())
    expected = np.array([[0 if i == j else np.log((1 + r) / (1 - r)) / 2 for j, r in enumerate(row)] for i, row in
                         enumerate(correlations)])  # fmt: skip
    np.testing.assert_allclose(fisher_z(correlations), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("num_regions", "density", "num_edges"), [(116, 0.2, 1334), (7, 0.2, 4), (7, 0.01, 0), (5, 0.25, 3)]
)
def test_a_graph_has_the_strongest_edges(num_regions: int, density: float, num_edges: int) -> None:
    correlations = correlate(make_series(60, num_regions))
    graph = strongest_edges(correlations, density)
    pairs = np.triu_indices(num_regions, 1)
    is_edge = graph[pairs] == 1
    assert is_edge.sum() == num_edges
    if num_edges:
        assert correlations[pairs][is_edge].min() >= correlations[pairs][~is_edge].max()
    np.testing.assert_array_equal(graph, graph.T)
    np.testing.assert_array_equal(np.unique(graph), [0, 1] if num_edges else [0])
    assert not np.diagonal(graph).any()


def test_of_equal_correlations_the_first_pairs_become_edges() -> None:
    correlations = np.full((4, 4), 0.5)
    correlations[2, 3] = correlations[3, 2] = 0.9
    expected = [[0, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0]]
    np.testing.assert_array_equal(strongest_edges(correlations, 0.5), expected)


def test_a_negative_correlation_is_weak() -> None:
    correlations = np.array([[1, -0.9, 0.1], [-0.9, 1, 0], [0.1, 0, 1]])
    np.testing.assert_array_equal(strongest_edges(correlations, 1 / 3), [[0, 0, 1], [0, 0, 0], [1, 0, 0]])


def test_graphs_of_abide_agree_with_those_of_others(shared_file: Callable[[str], Path]) -> None:
    """Their scans were cleaned in another way: three fifths of the edges agree, one fifth would by chance."""
    ours = np.load(shared_file("data/brain_network/abide1_aal116_timeseries_train.npz"))
    theirs = np.load(shared_file("data/brain_network/abide1_aal116_binary_train.npz"))
    rows = {int(subject.rsplit("_", 1)[1]): row for row, subject in enumerate(theirs["subject"])}
    edges, pairs = theirs["edges_upper"] > 0, np.triu_indices(116, 1)
    shares = []
    for series, length, subject in zip(ours["timeseries"], ours["length"], ours["subject"].tolist(), strict=True):
        signals = series[:length].astype(np.float64)
        if subject in rows and np.ptp(signals, axis=0).all():
            graph = strongest_edges(correlate(signals), 0.2)[pairs] > 0
            shares.append((graph & edges[rows[subject]]).sum() / graph.sum())
    assert len(shares) > 50
    assert np.mean(shares) == pytest.approx(0.60, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regions": ("a",)}, "at least 2 items"),
        ({"regions": ("a",) * 1001}, "at most 1000 items"),
        ({"matrix": "covariance"}, "fisher_z"),
        ({"matrix": "binary_graph"}, "edge_density=None does not fit matrix=binary_graph"),
        ({"edge_density": 0.2}, "edge_density=0.2 does not fit matrix=correlation"),
        ({"matrix": "fisher_z", "diagonal": 1}, "diagonal=1 does not fit matrix=fisher_z"),
        ({"diagonal": 2}, "0 or 1"),
        ({"min_frames": 2}, "greater than or equal to 3"),
        ({"max_frames": 2}, "max_frames=2 must be at least min_frames=3"),
        ({"tolerance": float("nan")}, "finite"),
        ({"networks": 7}, "Extra inputs"),
    ],
)
def test_a_spec_that_does_not_fit_together_is_refused(change: dict[str, Any], message: str) -> None:
    ConnectomeSpec.model_validate(GOOD)
    with pytest.raises(ValidationError, match=message):
        ConnectomeSpec.model_validate(GOOD | change)
