import numpy as np
import pytest

from export.connectomes import make_connectomes
from service.tasks.connectomes import ConnectomeSpec, MatrixKind

REGIONS = tuple(f"region {i}" for i in range(21))


def make_spec(matrix: MatrixKind, density: float | None = None) -> ConnectomeSpec:
    return ConnectomeSpec(atlas="tiny", regions=REGIONS, matrix=matrix, edge_density=density, min_frames=10)


@pytest.mark.parametrize(("matrix", "density"), [("fisher_z", None), ("correlation", None), ("binary_graph", 0.2)])
def test_a_connectome_is_of_the_kind_that_the_model_takes(matrix: MatrixKind, density: float | None) -> None:
    found = make_connectomes(make_spec(matrix, density), 3, seed=0)
    assert found.shape == (3, 21, 21)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, found.transpose(0, 2, 1))
    assert not found[:, np.arange(21), np.arange(21)].any()
    if matrix == "fisher_z":
        correlations = make_connectomes(make_spec("correlation"), 3, seed=0)
        np.testing.assert_allclose(found, np.arctanh(correlations), rtol=0, atol=1e-6)  # both are float32
    if density:
        assert set(np.unique(found).tolist()) == {0.0, 1.0}
        assert found.sum(axis=(1, 2)).tolist() == [2 * round(density * 210)] * 3


def test_regions_of_a_network_are_closer_to_each_other() -> None:
    found = make_connectomes(make_spec("correlation"), 4, seed=1).mean(axis=0)
    is_same = np.arange(21)[:, None] // 3 == np.arange(21) // 3
    np.fill_diagonal(is_same, val=False)
    assert found[is_same].mean() > found[~is_same].mean() + 0.1


def test_the_same_seed_gives_the_same_connectomes_and_another_one_others() -> None:
    spec = make_spec("correlation")
    one, again, other = (make_connectomes(spec, 2, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert (one[0] != one[1]).any()
