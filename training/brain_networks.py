"""Training and measuring classifiers of brain networks.

A subject is seen as the service would see it: one matrix, of the kind that the manifest names.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from service.tasks.connectomes import MatrixKind
from training.classification_metrics import measure_classes
from training.connectome_data import CONNECTOMES, Connectomes, read_aal_names

EVALUATION_BATCH = 64
VALID_EVERY = 10  # one of so many subjects outside the test fold is in "valid"


@dataclass(frozen=True, kw_only=True)
class BrainNetworks:
    """Brain networks with a class each, and how they are shown to the model.

    Attributes:
        dataset: key of `CONNECTOMES`.
        labels: names of the classes, in the order of the label's numbers.
        atlas: that the regions come from.
        matrix: kind of the matrices.
        edge_density: of graphs, share of all pairs that are edges.
        min_frames: of a time series that the service takes.
        test_fold: number of the fold that is "test_dev".
        mean, std: of the connections.
        has_mixup: whether each subject is mixed with another of its batch, in a ratio drawn for the batch.
    """

    dataset: str
    labels: tuple[str, ...]
    atlas: str
    matrix: MatrixKind
    edge_density: float | None = None
    min_frames: int = 60
    test_fold: int = 0
    mean: float = 0.0
    std: float = 1.0
    has_mixup: bool = False

    def describe(self, data: Path) -> dict[str, Any]:
        """Tell the manifest how connectivities become the model's input; see `Problem.describe`."""
        return {
            "task": "brain-network-classification",
            "spec": {
                "labels": self.labels,
                "atlas": self.atlas,
                "regions": read_aal_names(data),
                "matrix": self.matrix,
                "edge_density": self.edge_density,
                "min_frames": self.min_frames,
            },
            "normalisation": {"mean": (self.mean,), "std": (self.std,)},
        }

    def load(self, data: Path) -> Connectomes:
        """Read the training subjects."""
        return self.read(data, "train")

    def read(self, data: Path, split: str) -> Connectomes:
        """Read one split.

        Args:
            data: folder of all data sets.
            split: "test_dev", the test fold; "valid", one in ten of the other subjects; or "train", the rest.
        """
        subjects = CONNECTOMES[self.dataset](data)
        if split == "test_dev":
            return subjects.take(subjects.folds == self.test_fold)
        others = subjects.take(subjects.folds != self.test_fold)
        is_valid = torch.arange(len(others)) % VALID_EVERY == 0
        return others.take(is_valid if split == "valid" else ~is_valid)

    def normalise(self, connectivity: Tensor) -> Tensor:
        """Bring matrices (B, R, R) to the model's scale."""
        return (connectivity - self.mean) / self.std

    def loss(
        self,
        model: nn.Module,
        examples: Connectomes,
        rows: Tensor,
        *,
        progress: float,  # noqa: ARG002 - the same all the time
        rng: Generator,
    ) -> Tensor:
        """Cross-entropy with the shares of the classes, mixed as the subjects are, and the model's own losses."""
        device = next(model.parameters()).device
        x = self.normalise(examples.connectivity[rows])
        # Uniform, as in the official training of THC: mixup with alpha 1, one ratio for the batch.
        kept = torch.rand((), generator=rng).item() if self.has_mixup else 1.0
        logits, _, losses = model((kept * x + (1 - kept) * x.roll(1, dims=0)).to(device))
        if examples.shares is None:
            shares = F.one_hot(examples.labels[rows], logits.shape[1]).float()
        else:
            shares = examples.shares[rows]
        shares = (kept * shares + (1 - kept) * shares.roll(1, dims=0)).to(device)
        return torch.stack([F.cross_entropy(logits.float(), shares), *losses.values()]).sum()

    def evaluate(self, model: nn.Module, data: Path, split: str) -> dict[str, float]:
        """Measure a split; see `measure_classes`."""
        examples = self.read(data, split)
        return measure_classes(self.classify(model, examples), examples.labels)

    @torch.inference_mode()
    def classify(self, model: nn.Module, examples: Connectomes) -> Tensor:
        """Logits (N, L) of all subjects, on the CPU."""
        device = next(model.parameters()).device
        parts = self.normalise(examples.connectivity).split(EVALUATION_BATCH)
        return torch.cat([model(part.to(device)).logits.float().cpu() for part in parts])
