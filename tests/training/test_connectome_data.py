from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.tiny_connectomes import N, R, write_connectomes
from training.connectome_data import (
    ABIDE_GRAPHS,
    ABIDE_SERIES,
    CONNECTOMES,
    FOLDER,
    MDD,
    fill_matrices,
    read_aal_names,
    read_abide_series,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("connectomes")
    write_connectomes(data)
    return data


def test_numbers_above_the_diagonal_stand_on_both_sides_of_it() -> None:
    expected = [[0, 1, 2], [1, 0, 3], [2, 3, 0]]
    assert fill_matrices(np.array([[1, 2, 3]])).tolist() == [expected]


def test_numbers_that_are_no_upper_triangle_are_refused() -> None:
    with pytest.raises(ValueError, match="4 numbers are no upper triangle"):
        fill_matrices(np.zeros((2, 4)))


@pytest.mark.parametrize("name", CONNECTOMES)
def test_every_task_has_symmetric_matrices_and_a_label_and_fold_for_each(name: str, folder: Path) -> None:
    subjects = CONNECTOMES[name](folder)
    assert subjects.connectivity.shape == (N, R, R)
    assert subjects.connectivity.equal(subjects.connectivity.transpose(1, 2))
    assert not subjects.connectivity.diagonal(dim1=1, dim2=2).any()
    assert len(subjects.labels) == len(subjects.folds) == N
    assert set(subjects.folds.tolist()) == set(range(5))


def test_labels_and_networks_are_those_of_the_file(folder: Path) -> None:
    subjects = CONNECTOMES["mdd"](folder)
    with np.load(folder / FOLDER / MDD) as table:
        assert subjects.labels.tolist() == table["label"].tolist()
        assert subjects.networks == tuple(table["node_network"])
    assert CONNECTOMES["adhd-site"](folder).labels.max() == 5
    assert CONNECTOMES["abide-diagnosis"](folder).networks == ()


def test_half_of_the_subjects_is_above_the_median_age(folder: Path) -> None:
    labels = CONNECTOMES["abide-age"](folder).labels
    assert labels.float().mean() == 0.5
    assert labels.equal(CONNECTOMES["abide-diagnosis"](folder).labels)  # who has class 1 is older in this file


def test_the_share_of_the_older_class_is_the_share_of_the_younger_subjects(folder: Path) -> None:
    subjects = CONNECTOMES["abide-age"](folder)
    assert subjects.shares is not None
    with np.load(folder / FOLDER / ABIDE_GRAPHS) as table:
        ages = torch.from_numpy(table["age"])
    order = ages.argsort()
    expected = (torch.arange(N) + 0.5) / N  # half of oneself
    torch.testing.assert_close(subjects.shares[order, 1], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(subjects.shares.sum(dim=1), torch.ones(N), atol=1e-6, rtol=0)
    kept = subjects.take(subjects.folds == 3)
    assert kept.shares is not None
    assert kept.shares.equal(subjects.shares[subjects.folds == 3])
    assert CONNECTOMES["abide-diagnosis"](folder).shares is None


def test_time_series_become_z_of_their_correlations_without_the_padding(folder: Path) -> None:
    found = read_abide_series(folder)
    with np.load(folder / FOLDER / ABIDE_SERIES) as table:
        series = table["timeseries"][3, :20].astype(np.float64)
    expected = np.corrcoef(series.T)
    np.fill_diagonal(expected, 0)
    torch.testing.assert_close(
        found.connectivity[3].double(), torch.from_numpy(np.arctanh(expected)), atol=1e-6, rtol=0
    )


def test_time_series_become_graphs_of_a_density(folder: Path) -> None:
    graphs = read_abide_series(folder, edge_density=0.2).connectivity
    assert set(graphs.unique().tolist()) == {0.0, 1.0}
    assert graphs.sum(dim=(1, 2)).tolist() == [2 * round(0.2 * R * (R - 1) / 2)] * 4


def test_regions_have_the_names_of_the_file(folder: Path) -> None:
    assert read_aal_names(folder)[:2] == ("region_0", "region_1")


def test_graphs_made_of_the_shared_time_series_are_nearest_to_the_same_subject_s_shared_graph(
    shared_file: Callable[[str], Path],
) -> None:
    data = shared_file("data/brain_network/README.md").parents[1]
    graphs = CONNECTOMES["abide-diagnosis"](data)
    assert graphs.connectivity.shape == (729, 116, 116)
    density = graphs.connectivity.sum(dim=(1, 2)) / (116 * 115)
    assert (density - 0.2).abs().max() < 0.01
    series = read_abide_series(data, edge_density=0.2)
    with np.load(data / FOLDER / ABIDE_GRAPHS) as table:
        of_graphs = [int(name[-7:]) for name in table["subject"]]  # after the name of the site
    with np.load(data / FOLDER / ABIDE_SERIES) as table:
        pairs = [(row, of_graphs.index(id_)) for row, id_ in enumerate(table["subject"]) if id_ in of_graphs]
    rows, own = (torch.tensor(column) for column in zip(*pairs, strict=True))
    assert series.labels[rows].equal(graphs.labels[own])
    flat = series.connectivity[rows].flatten(1)
    agreement = flat @ graphs.connectivity.flatten(1).T / flat.sum(dim=1, keepdim=True)  # share of the edges
    # The two were preprocessed differently, so a third of the edges differs, but each subject is nearest to itself.
    assert agreement.argmax(dim=1).eq(own).float().mean() > 0.98
    assert agreement[torch.arange(len(rows)), own].median() > 0.55
