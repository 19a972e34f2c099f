"""How far a program is from the module it was made of."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from service.runtimes.runtime import Runtime

BATCH_SIZES = (1, 3, 8)  # none is the export's own
MAX_RELATIVE_ERROR = 1e-5


def measure_parity(
    module: nn.Module, runtime: Runtime, images: npt.NDArray[np.uint8], *, output_names: Sequence[str]
) -> dict[str, float]:
    """Compare module and program on the same inputs in batches of several sizes.

    Args:
        module: gives a tuple in the order of `output_names`.
        runtime: runs the program; its input is named `image`.
        images: (N, Y, X, 3) uint8, at least as many as the largest batch.
        output_names: of the program.
    Returns: output → max|a-b| / max|b| over all batches.
    Raises: ValueError if an output has another shape or is off by more than 1e-5.
    """
    worst = dict.fromkeys(output_names, 0.0)
    for size in BATCH_SIZES:
        for start in range(0, len(images) - size + 1, size):
            batch = images[start : start + size]
            with torch.inference_mode():
                expected = module(torch.from_numpy(batch))
            found = runtime.run({"image": batch}, output_names)
            for name, tensor in zip(output_names, expected, strict=True):
                error = relative_error(found[name], tensor.numpy())
                worst[name] = float(np.maximum(worst[name], error))  # unlike max(), keeps NaN
    for name, error in worst.items():
        if not error <= MAX_RELATIVE_ERROR:
            raise ValueError(f"program and module differ by {error:.2e} in {name}; allowed is {MAX_RELATIVE_ERROR:.0e}")
    return worst


def relative_error(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Largest difference over the largest expected magnitude.

    Raises: ValueError if the shapes differ.
    """
    if found.shape != expected.shape:
        raise ValueError(f"shape {found.shape}, expected {expected.shape}")
    return float(np.abs(found - expected).max() / np.abs(expected).max())
