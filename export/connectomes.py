"""Synthetic connectomes for golden vectors and parity, so that no subject's data is shipped.

Regions belong to networks and share a signal within them, as those of a brain do; nothing else of a brain is in them.
"""

import numpy as np
import numpy.typing as npt

from service.tasks.connectomes import ConnectomeSpec, correlate, fisher_z, strongest_edges

NUM_FRAMES, NUM_NETWORKS = 150, 7
NETWORK, COMMON = 0.8, 0.4  # amplitudes beside a region's own signal of 1


def make_connectomes(spec: ConnectomeSpec, number: int, *, seed: int) -> npt.NDArray[np.float32]:
    """Make connectivities of the kind that a model takes.

    Args:
        spec: regions and kind of the matrix.
        number: B, how many.
        seed: the same one gives the same connectomes.
    Returns: (B, R, R).
    """
    rng = np.random.default_rng(seed)
    networks = np.arange(len(spec.regions)) * NUM_NETWORKS // len(spec.regions)
    matrices = []
    for _ in range(number):
        signals = rng.standard_normal((NUM_FRAMES, len(spec.regions)))
        signals += NETWORK * rng.standard_normal((NUM_FRAMES, NUM_NETWORKS))[:, networks]
        signals += COMMON * rng.standard_normal((NUM_FRAMES, 1))
        matrices.append(_shape(correlate(signals), spec))
    return np.stack(matrices).astype(np.float32)


def _shape(correlations: npt.NDArray[np.float64], spec: ConnectomeSpec) -> npt.NDArray[np.float64]:
    """Turn correlations into what the model takes."""
    if spec.edge_density is not None:
        return strongest_edges(correlations, spec.edge_density)
    matrix = fisher_z(correlations) if spec.matrix == "fisher_z" else correlations.copy()
    np.fill_diagonal(matrix, spec.diagonal)
    return matrix
