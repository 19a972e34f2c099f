"""Data sets of brain networks: files of upper triangles → matrices with labels, folds and what is known of regions.

Source: the folder `brain_network` of the shared data and its README. Diagnosis, age and sex of the ADHD-200 set are not
there, as they do not belong to its matrices; its label is the site of the scan.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from service.sample import AnyArray
from service.tasks.connectomes import correlate, fisher_z, strongest_edges

FOLDER = "brain_network"
ABIDE_GRAPHS = "abide1_aal116_binary_train.npz"
ABIDE_SERIES = "abide1_aal116_timeseries_train.npz"
AAL_NODES = "abide1_aal116_nodes.csv"
MDD = "mdd_tulsa_shirer78_train.npz"
ADHD = "adhd200_cc200_sites_train.npz"


@dataclass(frozen=True)
class Connectomes:
    """Subjects, on the CPU.

    Attributes:
        connectivity: (N, R, R) float32, symmetric, zeros on the diagonal.
        labels: (N,) int64.
        folds: (N,) int64, 0 to 4.
        networks: of each region, the name of the network that it is said to belong to; empty where none is known.
        shares: (N, L) float32, how far training takes a subject for each class, where classes were cut out of a
            quantity; None is the label and nothing else.
    """

    connectivity: Tensor
    labels: Tensor
    folds: Tensor
    networks: tuple[str, ...] = ()
    shares: Tensor | None = None

    def __len__(self) -> int:
        """Number of subjects."""
        return len(self.labels)

    @property
    def num_regions(self) -> int:
        """R."""
        return self.connectivity.shape[1]

    def take(self, chosen: Tensor) -> "Connectomes":
        """Keep some subjects: (N,) bool, or numbers of rows."""
        shares = None if self.shares is None else self.shares[chosen]
        return Connectomes(self.connectivity[chosen], self.labels[chosen], self.folds[chosen], self.networks, shares)


def fill_matrices(upper: AnyArray) -> Tensor:
    """Make symmetric matrices of what is above their diagonals, row by row.

    Args:
        upper: (N, R·(R-1)/2).
    Returns: (N, R, R) float32, zeros on the diagonal.
    Raises: ValueError if there is no such R.
    """
    num_regions = round((1 + (1 + 8 * upper.shape[1]) ** 0.5) / 2)
    rows, columns = np.triu_indices(num_regions, 1)
    if len(rows) != upper.shape[1]:
        raise ValueError(f"{upper.shape[1]} numbers are no upper triangle; R·(R-1)/2 were expected")
    matrices = np.zeros((len(upper), num_regions, num_regions), np.float32)
    matrices[:, rows, columns] = upper
    return torch.from_numpy(matrices + matrices.transpose(0, 2, 1))


def read_abide_diagnosis(data: Path) -> Connectomes:
    """ABIDE I, AAL-116, graphs of the strongest fifth of all edges: control or autism."""
    return _read_abide(data, lambda table: table["label"])


def read_abide_age(data: Path) -> Connectomes:
    """The same graphs: age at most, or above, the median of all subjects.

    Training takes a subject for class 1 as far as others are younger, and need not part those of nearly the same age.
    """
    subjects = _read_abide(data, lambda table: table["age"] > np.median(table["age"]))
    with np.load(data / FOLDER / ABIDE_GRAPHS) as table:
        differences = table["age"][:, None] - table["age"]
    older = (0.5 + 0.5 * np.sign(differences)).mean(axis=1)
    return replace(subjects, shares=torch.from_numpy(np.stack([1 - older, older], axis=1)).float())


def read_mdd(data: Path) -> Connectomes:
    """Fisher's z of correlations among 78 regions of 14 networks (Shirer 2012): control or depression."""
    with np.load(data / FOLDER / MDD) as table:
        return _make(table["fcz_upper"], table["label"], table["fold"], table["node_network"])


def read_adhd_sites(data: Path) -> Connectomes:
    """ADHD-200, correlations among 190 regions of CC200: which of six sites."""
    with np.load(data / FOLDER / ADHD) as table:
        return _make(table["fc_upper"], table["site_id"], table["fold"], table["node_network"])


def read_abide_series(data: Path, *, edge_density: float | None = None) -> Connectomes:
    """ABIDE I time series of three sites as Fisher's z of their correlations, or as graphs of the strongest edges.

    Args:
        data: folder of all data sets.
        edge_density: share of all pairs that become edges; None is Fisher's z.
    Returns: subjects in the order of the file; they have no folds of their own, so that all are in fold 0. A region
        that has no signal in a subject has no connections there.
    """
    with np.load(data / FOLDER / ABIDE_SERIES) as table:
        correlations = [
            _correlate(series[:length].astype(np.float64))
            for series, length in zip(table["timeseries"], table["length"], strict=True)
        ]
        labels = torch.from_numpy(table["label"].astype(np.int64))
    matrices = [fisher_z(r) if edge_density is None else strongest_edges(r, edge_density) for r in correlations]
    return Connectomes(torch.from_numpy(np.stack(matrices)).float(), labels, torch.zeros_like(labels))


def read_aal_names(data: Path) -> tuple[str, ...]:
    """Names of AAL's 116 regions, in order."""
    with (data / FOLDER / AAL_NODES).open(newline="") as file:
        return tuple(row["name"] for row in csv.DictReader(file))


def _correlate(series: AnyArray) -> AnyArray:
    """Pearson's correlations (R, R) of series (T, R); 0 where a region does not change."""
    (is_moving,) = np.nonzero(np.ptp(series, axis=0))
    correlations = np.zeros((series.shape[1], series.shape[1]))
    correlations[np.ix_(is_moving, is_moving)] = correlate(series[:, is_moving])
    return correlations


def _read_abide(data: Path, choose: Callable[[dict[str, AnyArray]], AnyArray]) -> Connectomes:
    with np.load(data / FOLDER / ABIDE_GRAPHS) as table:
        return _make(table["edges_upper"], choose(table), table["fold"], np.empty(0, str))


def _make(upper: AnyArray, labels: AnyArray, folds: AnyArray, networks: AnyArray) -> Connectomes:
    return Connectomes(
        fill_matrices(upper),
        torch.from_numpy(labels.astype(np.int64)),
        torch.from_numpy(folds.astype(np.int64)),
        tuple(str(name) for name in networks),
    )


# Name of a task → reads its subjects from the folder of all data sets.
CONNECTOMES: dict[str, Callable[[Path], Connectomes]] = {
    "abide-diagnosis": read_abide_diagnosis,
    "abide-age": read_abide_age,
    "mdd": read_mdd,
    "adhd-site": read_adhd_sites,
}
