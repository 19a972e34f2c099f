"""Files of brain networks in the layout of the shared data, with few regions and a class that anyone can tell."""

from pathlib import Path

import numpy as np

from training.connectome_data import ABIDE_GRAPHS, ABIDE_SERIES, ADHD, FOLDER, MDD

R = 12
N = 60


def write_connectomes(data: Path) -> None:
    """Write all files into a data folder: a subject of class 1 has an edge between the first two regions."""
    folder = data / FOLDER
    folder.mkdir()
    rng = np.random.default_rng(0)
    labels, folds = np.arange(N) % 2, np.arange(N) // 2 % 5
    upper = (rng.random((N, R * (R - 1) // 2)) < 0.3).astype(np.uint8)
    upper[:, :3] = labels[:, None]  # edges of region 0 with regions 1 to 3
    np.savez(
        folder / ABIDE_GRAPHS,
        edges_upper=upper,
        label=labels.astype(np.int8),
        age=(10 + 5 * labels + rng.random(N)).astype(np.float32),
        fold=folds.astype(np.int8),
    )
    series = rng.standard_normal((4, 40, R)).astype(np.float16)
    lengths = np.array([40, 40, 30, 20], np.int16)
    for one, length in zip(series, lengths, strict=True):
        one[length:] = 0
    np.savez(folder / ABIDE_SERIES, timeseries=series, length=lengths, label=np.array([1, 0, 1, 0], np.int8))
    networks = np.array([f"network {i // 4}" for i in range(R)])
    real = (upper + rng.normal(scale=0.1, size=upper.shape)).astype(np.float32)
    np.savez(folder / MDD, fcz_upper=real, label=labels, fold=folds, node_network=networks)
    np.savez(
        folder / ADHD, fc_upper=real.astype(np.float16), site_id=np.arange(N) % 6, fold=folds, node_network=networks
    )
    (folder / "abide1_aal116_nodes.csv").write_text(
        "node,name,group\n" + "".join(f"{i},region_{i},x\n" for i in range(R))
    )
