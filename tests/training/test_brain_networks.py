from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from models.communities import BrainOutput
from service.tasks.brain_network_classification import BrainNetworkClassificationSpec
from tests.training.tiny_connectomes import N, R, write_connectomes
from training.brain_networks import BrainNetworks
from training.connectome_data import read_abide_diagnosis

PROBLEM = BrainNetworks(
    dataset="abide-diagnosis",
    labels=("no", "yes"),
    atlas="tiny",
    matrix="binary_graph",
    edge_density=0.3,
    mean=0.5,
    std=0.25,
)


class FirstEdge(nn.Module):
    """Says class 1 as far as the first two regions are connected; remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> BrainOutput:
        self.seen.append(x)
        score = self.scale * x[:, 0, 1]
        return BrainOutput(torch.stack([-score, score], dim=1), [], {"cluster": 0.0 * score.sum() + 0.5})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("connectomes")
    write_connectomes(data)
    return data


def test_no_subject_is_in_two_splits_and_the_test_fold_is_one_fold(folder: Path) -> None:
    splits = [PROBLEM.read(folder, split) for split in ("train", "valid", "test_dev")]
    assert [len(split) for split in splits] == [43, 5, 12]
    assert splits[2].folds.unique().tolist() == [0]
    assert not (splits[0].folds == 0).any()
    assert not (splits[1].folds == 0).any()
    together = torch.cat([split.connectivity.flatten(1) for split in splits])
    assert len(together.unique(dim=0)) == len(read_abide_diagnosis(folder).connectivity.flatten(1).unique(dim=0)) == N


def test_the_manifest_gets_a_spec_that_the_service_takes(folder: Path) -> None:
    told = PROBLEM.describe(folder)
    spec = BrainNetworkClassificationSpec.model_validate(told["spec"] | {"num_communities": (4, 2)})
    assert spec.labels == ("no", "yes")
    assert len(spec.regions) == R
    assert told["normalisation"] == {"mean": (0.5,), "std": (0.25,)}


def test_quality_is_measured_over_the_whole_split(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.brain_networks.EVALUATION_BATCH", 5)
    model = FirstEdge()
    assert PROBLEM.evaluate(model, folder, "test_dev")["auroc"] == 1.0
    assert [len(x) for x in model.seen] == [5, 5, 2]
    assert set(model.seen[0].unique().tolist()) == {-2.0, 2.0}  # (0 - 0.5) / 0.25 and (1 - 0.5) / 0.25
    nn.init.constant_(model.scale, -1.0)
    assert PROBLEM.evaluate(model, folder, "test_dev")["accuracy"] == 0.0


def test_the_loss_is_cross_entropy_plus_the_losses_of_the_model(folder: Path) -> None:
    examples, rows = PROBLEM.load(folder), torch.arange(8)
    found = PROBLEM.loss(FirstEdge(), examples, rows, progress=0.0, rng=Generator())
    expected = nn.functional.softplus(torch.tensor(-8.0)) + 0.5  # logits are ±4 and right
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_mixed_subject_counts_for_both_labels(folder: Path) -> None:
    examples, rows, model = PROBLEM.load(folder), torch.arange(6), FirstEdge()
    problem = replace(PROBLEM, has_mixup=True)
    found = problem.loss(model, examples, rows, progress=0.0, rng=Generator().manual_seed(1))
    kept = torch.rand((), generator=Generator().manual_seed(1)).item()
    assert 0.01 < kept < 0.99
    x = problem.normalise(examples.connectivity[rows])
    torch.testing.assert_close(model.seen[0], kept * x + (1 - kept) * x.roll(1, 0), atol=1e-6, rtol=0)
    log_shares = model(model.seen[0]).logits.log_softmax(dim=1)
    labels = examples.labels[rows]
    own, other = (log_shares.gather(1, part[:, None])[:, 0] for part in (labels, labels.roll(1)))
    expected = -(kept * own + (1 - kept) * other).mean() + 0.5
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_training_aims_at_shares_where_classes_were_cut_out_of_a_quantity(folder: Path) -> None:
    examples, rows = replace(PROBLEM, dataset="abide-age").load(folder), torch.arange(8)
    assert examples.shares is not None
    found = PROBLEM.loss(FirstEdge(), examples, rows, progress=0.0, rng=Generator())
    log_shares = FirstEdge()(PROBLEM.normalise(examples.connectivity[rows])).logits.log_softmax(dim=1)
    expected = -(examples.shares[rows] * log_shares).sum(dim=1).mean() + 0.5
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert found > PROBLEM.loss(FirstEdge(), replace(examples, shares=None), rows, progress=0.0, rng=Generator()) + 0.1
