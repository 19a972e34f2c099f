"""What is compared on brain networks: THC in variants, a Brain Network Transformer, an MLP and a ridge classifier.

All models go through the same training loop with the same number of steps. Settings were chosen on ABIDE diagnosis and
kept for all tasks but for two: the rate of the head, which like a ridge penalty depends on how strong a signal is,
and the limit of the spectrum.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from models.brain_baselines import BntConfig, BrainMlp, BrainMlpConfig, BrainNetworkTransformer
from models.thc import Thc
from models.thc_config import THC_AAL116, THC_CC200_OFFICIAL, ThcConfig
from training.optimizers import OptimizerConfig
from training.recipes.thc_aal116_abide import RECIPE


@dataclass(frozen=True)
class TaskSettings:
    """What differs between tasks.

    Attributes:
        num_classes: L.
        head_lr: AdamW's rate in rows that have a linear head; chosen on folds 1 to 3, trained without fold 0.
        spectrum_limit: of rows that have one; chosen as the rate, among 1, 2, 4 and 16.
    """

    num_classes: int
    head_lr: float
    spectrum_limit: float


LIMIT = THC_AAL116.spectrum_limit
TASKS = {
    "abide-diagnosis": TaskSettings(num_classes=2, head_lr=RECIPE.optimizer.adamw_lr, spectrum_limit=LIMIT),
    "abide-age": TaskSettings(num_classes=2, head_lr=3e-4, spectrum_limit=16.0),
    "mdd": TaskSettings(num_classes=2, head_lr=3e-5, spectrum_limit=1.0),
    "adhd-site": TaskSettings(num_classes=6, head_lr=5e-4, spectrum_limit=LIMIT),
}
DIAGNOSIS = ("abide-diagnosis",)
# A matrix with a very large smaller side is out of reach for Muon. Rates and decay of the official configuration.
OFFICIAL = OptimizerConfig(muon_lr=0.0, adamw_lr=5e-4, adamw_weight_decay=1e-4, warmup_share=0.1)
OF_MLP = OptimizerConfig(muon_lr=0.0, adamw_lr=3e-4, adamw_weight_decay=0.05, warmup_share=0.1)
PLAIN = replace(THC_AAL116, is_variational=False)
BARE = replace(PLAIN, encoder="none", has_skip=False)
LEARNABLE = replace(THC_AAL116, assignment="learnable")

Make = Callable[[int, TaskSettings], nn.Module]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        key: names it on the command line.
        title: in the table.
        make: number of regions, settings of the task → a model with fresh weights; None is the ridge classifier.
        optimizer: of the training; None is the shipped recipe's, with the task's rate of the head.
        num_seeds: how often each fold is trained.
        tasks: that it is measured on.
        num_steps: of the training, about; whole epochs are trained.
        is_plain: whether the model brings connections to no scale by itself, so that the training subjects' mean and
            spread are taken from them before, and subjects are mixed as its authors do.
        has_limit: of the ridge classifier, whether it sees what THC sees, connectivities of limited spectrum.
    """

    key: str
    title: str
    make: Make | None
    optimizer: OptimizerConfig | None = None
    num_seeds: int = 1
    tasks: tuple[str, ...] = tuple(TASKS)
    num_steps: int = 90
    is_plain: bool = False
    has_limit: bool = False


def make_thc(config: ThcConfig) -> Make:
    """Make a variant at any number of regions, with the task's limit of the spectrum where it has one."""

    def make(num_regions: int, task: TaskSettings) -> Thc:
        limit = task.spectrum_limit if config.spectrum_limit else 0.0
        return Thc(
            replace(config, num_regions=num_regions, spectrum_limit=limit),
            num_classes=task.num_classes,
        )

    return make


def make_bnt(num_regions: int, task: TaskSettings) -> BrainNetworkTransformer:
    """Brain Network Transformer; two heads, as four do not divide every number of regions."""
    config = BntConfig(num_regions=num_regions, num_communities=min(100, num_regions), num_heads=2)
    return BrainNetworkTransformer(config, num_classes=task.num_classes)


def make_mlp(num_regions: int, task: TaskSettings) -> BrainMlp:
    """An MLP over connections."""
    return BrainMlp(BrainMlpConfig(num_regions=num_regions), num_classes=task.num_classes)


ROWS = (
    Row("ridge", "ridge classifier", None),
    Row("ridge-limited", "ridge classifier, limited spectrum", None, has_limit=True),
    Row("thc", "THC, default", make_thc(THC_AAL116), num_seeds=3),
    Row(
        "thc-unlimited",
        "THC, spectrum as it is",
        make_thc(replace(THC_AAL116, spectrum_limit=0.0)),
        tasks=("abide-diagnosis", "abide-age", "mdd"),
    ),
    Row(
        "thc-unmodular",
        "THC, no modularity loss",
        make_thc(replace(THC_AAL116, resolutions=())),
        tasks=("abide-diagnosis", "mdd"),
    ),
    Row("thc-batch", "THC, scope of the batch", make_thc(replace(THC_AAL116, scope="batch")), tasks=DIAGNOSIS),
    Row("thc-levels", "THC, no linear path", make_thc(replace(THC_AAL116, has_linear_path=False)), tasks=DIAGNOSIS),
    Row("thc-mlps", "THC, MLPs as readouts", make_thc(replace(THC_AAL116, readout="sum")), tasks=DIAGNOSIS),
    Row("thc-plain", "THC, encoder not variational", make_thc(PLAIN), num_seeds=3),
    Row("thc-no-skip", "THC, encoder neither variational nor with a skip", make_thc(replace(PLAIN, has_skip=False))),
    Row("thc-bare", "THC, no encoder", make_thc(BARE)),
    Row("thc-learnable", "THC, learnable", make_thc(LEARNABLE), tasks=DIAGNOSIS),
    Row(
        "thc-learnable-batch",
        "THC, learnable, scope of the batch",
        make_thc(replace(LEARNABLE, scope="batch")),
        tasks=DIAGNOSIS,
    ),
    Row(
        "thc-official", "THC, published layout", make_thc(THC_CC200_OFFICIAL), OFFICIAL, tasks=DIAGNOSIS, is_plain=True
    ),
    Row("bnt", "BNT-style", make_bnt, RECIPE.optimizer, is_plain=True),
    Row("mlp", "MLP over connections", make_mlp, OF_MLP, is_plain=True),
)
