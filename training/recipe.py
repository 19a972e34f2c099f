"""A recipe: everything that decides how a shipped model comes out, in one frozen value."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Generator, Tensor, nn

from training.optimizers import OptimizerConfig


class Problem(Protocol):
    """What the training loop needs to know about a task and its data."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the model's outputs."""
        ...

    def describe(self, data: Path) -> dict[str, Any]:
        """Tell a bundle's manifest the task, its spec and the normalisation: its fields of these names.

        Args:
            data: folder of all data sets.
        """
        ...

    def load(self, data: Path) -> Any:
        """Read the training examples; anything that has a length.

        Args:
            data: folder of all data sets.
        """
        ...

    def loss(self, model: nn.Module, examples: Any, rows: Tensor, *, progress: float, rng: Generator) -> Tensor:
        """Loss of one batch.

        Args:
            model: in training mode.
            examples: what `load` gave.
            rows: (B,) int64, which examples form the batch.
            progress: share of the run that is over, in [0, 1).
            rng: source of chance for augmentation.
        Returns: scalar.
        """
        ...

    def evaluate(self, model: nn.Module, data: Path, split: str) -> dict[str, float]:
        """Measure quality as the service would see it.

        Args:
            model: in evaluation mode.
            data: folder of all data sets.
            split: "valid" or "test_dev".
        Returns: metric → value, the first one is the headline.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a bundle's manifest and model card say that the numbers of the recipe do not.

    Attributes:
        version: of the bundle.
        is_default: whether it answers where a request names no model.
        description: what it is, one or two sentences.
        limits: what it must not be expected to do.
        license: of the weights, with what their data require.
        data: data set and splits.
        data_license: as its authors state it.
        max_body_bytes: of one request.
        max_batch: upper bound; the service may find a smaller one to be as good.
        notice: what the licence of the data wants to see wherever the weights go, word for word.
    """

    version: str
    is_default: bool
    description: str
    limits: str
    license: str
    data: str
    data_license: str
    max_body_bytes: int
    max_batch: int
    notice: str = ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one shipped model is trained.

    Attributes:
        name: of the bundle: family-version-size-data.
        model: key of `models.BUILDERS`.
        problem: task, data, augmentation.
        epochs: passes over the training split.
        batch_size: B.
        optimizer: rates, decays, warm-up.
        gradient_clip: largest gradient norm; 0 does not clip.
        ema_decay: of the averaged weights, which are the ones that ship.
        has_bf16: whether matrix products run in bfloat16.
        facts: for the manifest and the model card.
        seed: of the weights, the order of examples and the augmentation.
    """

    name: str
    model: str
    problem: Problem
    epochs: int
    batch_size: int
    optimizer: OptimizerConfig
    facts: Facts
    gradient_clip: float = 0.0
    ema_decay: float = 0.999
    has_bf16: bool = True
    seed: int = 1
