"""Makes the sample connectome: signals of 116 regions that belong to seven networks, and nobody's brain.

    python -m samples.make_connectome

Regions come in pairs, left and right, as in the atlas AAL-116; the two of a pair share much of their signal, regions of
a network some of it, and all regions a little. Signals drift as slowly as those of a scanner do.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from service.tasks.connectomes import correlate, strongest_edges

FOLDER = Path(__file__).parent
NUM_FRAMES, NUM_REGIONS, NUM_NETWORKS = 180, 116, 7
SEED = 116
EDGE_DENSITY = 0.2
PERSISTENCE = 0.6  # of a signal from one frame to the next
SHARED, NETWORK, PAIR, OWN = 0.4, 0.6, 0.5, 1.0  # amplitudes of what all, a network, a pair and a region has

Values = npt.NDArray[np.float64]


def make_series() -> npt.NDArray[np.float16]:
    """Signals, (T, R); half precision, which is as much as a scanner's noise leaves of a signal."""
    rng = np.random.default_rng(SEED)
    num_pairs = NUM_REGIONS // 2
    # Neighbours in an atlas are neighbours in the head: networks are runs of pairs, some of them torn in two.
    networks = np.sort(rng.integers(0, NUM_NETWORKS, num_pairs))
    is_moved = rng.random(num_pairs) < 0.25
    networks[is_moved] = rng.permutation(networks[is_moved])
    of_region = np.repeat(networks, 2)
    signals = (
        SHARED * _drift(rng, 1)
        + NETWORK * _drift(rng, NUM_NETWORKS)[:, of_region]
        + PAIR * _drift(rng, num_pairs).repeat(2, axis=1)
        + OWN * _drift(rng, NUM_REGIONS)
    )
    half: npt.NDArray[np.float16] = (signals / signals.std(axis=0)).astype(np.float16)
    return half


def _drift(rng: np.random.Generator, num_signals: int) -> Values:
    """Noise (T, num_signals) that keeps a part of itself from frame to frame."""
    signals = rng.standard_normal((NUM_FRAMES, num_signals))
    for frame in range(1, NUM_FRAMES):
        signals[frame] = PERSISTENCE * signals[frame - 1] + np.sqrt(1 - PERSISTENCE**2) * signals[frame]
    return signals


def main() -> None:
    """Write both samples."""
    series = make_series()
    np.save(FOLDER / "connectome_synthetic_series.npy", series)
    graph = strongest_edges(correlate(series.astype(np.float64)), EDGE_DENSITY)
    np.savetxt(FOLDER / "connectome_synthetic.csv", graph, fmt="%d", delimiter=",")


if __name__ == "__main__":
    main()
