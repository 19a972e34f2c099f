"""The module that becomes a program for brain networks: a connectivity in, logits and soft communities out."""

from copy import deepcopy

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from export.connectomes import make_connectomes
from export.plan import BATCH_SIZES, EXPORT_BATCH, Plan
from export.source import Source
from models.communities import SharedMean
from models.thc import Thc
from service.bundle import Normalisation, TensorSpec
from service.tasks.brain_network_classification import BrainNetworkClassificationSpec

NUM_GOLDEN = 3
NUM_CANDIDATES = 4  # for the golden connectomes
NEAR = 1e-4  # relative change of the connections at which a community counts as near to the edge of the top-k mask


class BrainNetworkProgram(nn.Module):
    """A classifier of brain networks with its normalisation.

    Args:
        model: to be given normalised connectivities.
        normalisation: what it was trained with, one number for all connections.
    Raises: ValueError if it has another number of numbers.
    """

    def __init__(self, model: Thc, normalisation: Normalisation) -> None:
        super().__init__()
        if len(normalisation.mean) != 1:
            raise ValueError(f"normalisation has {len(normalisation.mean)} numbers; one for all connections is taken")
        self.model = model
        self.mean, self.std = normalisation.mean[0], normalisation.std[0]

    def forward(self, connectivity: Tensor) -> tuple[Tensor, ...]:
        """Classify.

        Args:
            connectivity: (B, R, R) float32, of the kind that the manifest names.
        Returns: logits (B, L), then of each level that merges its nodes (B, N, C): one row for each node, the share of
            each community in it.
        """
        logits, assignments, _ = self.model((connectivity - self.mean) / self.std)
        return (logits, *assignments)


def plan_brain_network_classifier(source: Source, model: nn.Module) -> Plan:
    """Plan the bundle of a classifier of brain networks.

    Args:
        source: facts about the weights.
        model: with the weights.
    Raises: ValueError if the model is of a kind that has no program here, if its answers would depend on the other
        subjects of the batch, or if it has other regions than the spec.
    """
    if not isinstance(model, Thc):
        raise ValueError(f"{type(model).__name__} has no brain-network classification program; one of Thc has")
    if any(module.scope == "batch" for module in model.modules() if isinstance(module, SharedMean)):
        raise ValueError('scope="batch" lets subjects of a batch change each other\'s answers; export another scope')
    config = model.config
    pooled = [
        (n, c) for n, c, is_pooled in zip(config.num_nodes, config.sizes, config.pooling, strict=True) if is_pooled
    ]
    fields = source.spec | {"num_communities": [size for _, size in pooled]}
    spec = BrainNetworkClassificationSpec.model_validate(fields)
    R, L = config.num_regions, len(spec.labels)
    if len(spec.regions) != R:
        raise ValueError(f"the spec names {len(spec.regions)} regions, the model has {R}; make them equal")
    program = BrainNetworkProgram(deepcopy(model), source.normalisation).eval()
    batches = [make_connectomes(spec, size, seed=seed) for seed, size in enumerate(BATCH_SIZES)]
    return Plan(
        program=program,
        spec=fields,
        inputs=(TensorSpec(name="connectivity", dtype="float32", shape=("batch", R, R)),),
        outputs=(
            TensorSpec(name="logits", dtype="float32", shape=("batch", L)),
            *(
                TensorSpec(name=f"assignment_level{level}", dtype="float32", shape=("batch", *shape))
                for level, shape in enumerate(pooled, 1)
            ),
        ),
        example={"connectivity": make_connectomes(spec, EXPORT_BATCH, seed=len(batches))},
        golden={"connectivity": choose_golden(program, spec, first_seed=len(batches) + 1)},
        parity_inputs=f"{sum(BATCH_SIZES)} synthetic connectomes with networks, of nobody's brain",
        parity_batches=tuple({"connectivity": batch} for batch in batches),
    )


def choose_golden(
    program: BrainNetworkProgram, spec: BrainNetworkClassificationSpec, *, first_seed: int
) -> npt.NDArray[np.float32]:
    """Take, of several batches of connectomes, the one with the fewest near ties: (B, R, R)."""
    candidates = [make_connectomes(spec, NUM_GOLDEN, seed=first_seed + i) for i in range(NUM_CANDIDATES)]
    return min(candidates, key=lambda batch: count_near_ties(program, torch.from_numpy(batch)))


@torch.inference_mode()
def count_near_ties(program: BrainNetworkProgram, connectivity: Tensor) -> int:
    """Count the shares that the top-k mask would take or leave if all connections were a little stronger or weaker."""
    less, own, more = (program(connectivity * scale)[1:] for scale in (1 - NEAR, 1.0, 1 + NEAR))
    return sum(
        int((((a > 0) != (b > 0)) | ((c > 0) != (b > 0))).sum()) for a, b, c in zip(less, own, more, strict=True)
    )
