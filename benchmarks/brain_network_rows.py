"""What is compared on brain networks: THC in variants, a Brain Network Transformer, an MLP and a ridge classifier.

All models go through the same training loop, with the same mixing of subjects and the same number of steps. Settings
were chosen on ABIDE diagnosis and kept for all tasks but for one, the rate of the linear path: like a ridge penalty, it
depends on how strong a task's signal is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from models.brain_baselines import BntConfig, BrainMlp, BrainMlpConfig, BrainNetworkTransformer
from models.thc import THC_AAL116, THC_CC200_OFFICIAL, Thc
from training.optimizers import OptimizerConfig
from training.recipes.thc_aal116_abide import RECIPE


@dataclass(frozen=True)
class TaskSettings:
    """What differs between tasks.

    Attributes:
        num_classes: L.
        linear_lr: AdamW's rate in rows that have a linear path; chosen on folds 1 to 3, trained without fold 0.
    """

    num_classes: int
    linear_lr: float


TASKS = {
    "abide-diagnosis": TaskSettings(num_classes=2, linear_lr=RECIPE.optimizer.adamw_lr),
    "abide-age": TaskSettings(num_classes=2, linear_lr=3e-4),
    "mdd": TaskSettings(num_classes=2, linear_lr=RECIPE.optimizer.adamw_lr),
    "adhd-site": TaskSettings(num_classes=6, linear_lr=RECIPE.optimizer.adamw_lr),
}
DIAGNOSIS = ("abide-diagnosis",)
# Models without a linear path have to learn everything with their matrices, which then need larger steps.
LARGE_STEPS = replace(RECIPE.optimizer, muon_lr=1e-2)
# A matrix with a very large smaller side is out of reach for Muon. Rates and decay of the official configuration.
OFFICIAL = OptimizerConfig(muon_lr=0.0, adamw_lr=5e-4, adamw_weight_decay=1e-4, warmup_share=0.1)
OF_MLP = OptimizerConfig(muon_lr=0.0, adamw_lr=3e-4, adamw_weight_decay=0.05, warmup_share=0.1)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        key: names it on the command line.
        title: in the table.
        make: number of regions, number of classes → a model with fresh weights; None is the ridge classifier.
        optimizer: of the training; None is the shipped recipe's, with the task's rate of the linear path.
        num_seeds: how often each fold is trained.
        tasks: that it is measured on.
        num_steps: of the training, about; whole epochs are trained.
    """

    key: str
    title: str
    make: Callable[[int, int], nn.Module] | None
    optimizer: OptimizerConfig | None = None
    num_seeds: int = 1
    tasks: tuple[str, ...] = tuple(TASKS)
    num_steps: int = 90


def make_thc(num_regions: int, num_classes: int) -> Thc:
    """The default, at any number of regions."""
    return Thc(replace(THC_AAL116, num_regions=num_regions), num_classes=num_classes)


def make_variational(num_regions: int, num_classes: int) -> Thc:
    """The default with the variational encoder."""
    return Thc(replace(THC_AAL116, num_regions=num_regions, is_variational=True), num_classes=num_classes)


def make_ocread(num_regions: int, num_classes: int) -> Thc:
    """The default with communities around centres."""
    return Thc(replace(THC_AAL116, num_regions=num_regions, assignment="ocread"), num_classes=num_classes)


def make_plain(num_regions: int, num_classes: int) -> Thc:
    """The default with communities around centres and no encoder, so that nodes stay as different as they come."""
    config = replace(THC_AAL116, num_regions=num_regions, assignment="ocread", encoder="none")
    return Thc(config, num_classes=num_classes)


def make_batch_scope(num_regions: int, num_classes: int) -> Thc:
    """The default with assignments from the mean attention of the batch."""
    return Thc(replace(THC_AAL116, num_regions=num_regions, scope="batch"), num_classes=num_classes)


def make_levels(num_regions: int, num_classes: int) -> Thc:
    """The default without the linear path."""
    return Thc(replace(THC_AAL116, num_regions=num_regions, has_linear_path=False), num_classes=num_classes)


def make_official(num_regions: int, num_classes: int) -> Thc:
    """The published layout."""
    return Thc(replace(THC_CC200_OFFICIAL, num_regions=num_regions), num_classes=num_classes)


def make_bnt(num_regions: int, num_classes: int) -> BrainNetworkTransformer:
    """Brain Network Transformer; two heads, as four do not divide every number of regions."""
    config = BntConfig(num_regions=num_regions, num_communities=min(100, num_regions), num_heads=2)
    return BrainNetworkTransformer(config, num_classes=num_classes)


def make_mlp(num_regions: int, num_classes: int) -> BrainMlp:
    """An MLP over connections."""
    return BrainMlp(BrainMlpConfig(num_regions=num_regions), num_classes=num_classes)


ROWS = (
    Row("ridge", "ridge classifier", None),
    Row("thc", "THC, default", make_thc, num_seeds=3),
    Row("thc-batch", "THC, scope of the batch", make_batch_scope, tasks=DIAGNOSIS),
    Row("thc-variational", "THC, variational encoder", make_variational, tasks=DIAGNOSIS),
    Row("thc-ocread", "THC, ocread", make_ocread, tasks=DIAGNOSIS),
    Row("thc-plain", "THC, ocread, no encoder", make_plain),
    Row("thc-levels", "THC, no linear path", make_levels, LARGE_STEPS, tasks=DIAGNOSIS),
    Row("thc-official", "THC, published layout", make_official, OFFICIAL, tasks=DIAGNOSIS),
    Row("bnt", "BNT-style", make_bnt, LARGE_STEPS),
    Row("mlp", "MLP over connections", make_mlp, OF_MLP),
)
