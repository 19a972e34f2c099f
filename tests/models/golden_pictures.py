"""What the golden tests of the picture models share: run every stored picture, compare everything that was stored."""

import json
from collections.abc import Callable

import torch
from torch import Tensor

GOLDEN_TOLERANCE = 1e-5  # of max|a - b| / max|b|


def assert_stored_outputs(
    run: Callable[[Tensor], object],
    seen: dict[str, Tensor],
    stored: dict[str, Tensor],
    metadata: dict[str, str],
    *,
    needed: str,
) -> None:
    """Compare what a model shows of each picture of a golden file with what the official code gave.

    Args:
        run: takes a picture (B, 3, Y, X) and fills `seen`.
        seen: name → tensor; emptied after each picture.
        stored: the file's tensors without its weights; all of them must be used.
        metadata: of the file.
        needed: the output without which a comparison proves nothing.
    """
    for i in range(len(json.loads(metadata["sizes"]))):
        with torch.no_grad():
            run(stored.pop(f"in{i}.image"))
        names = [name for name in stored if name.startswith(f"in{i}.")]
        expected = {name.removeprefix(f"in{i}."): stored.pop(name) for name in names}
        assert needed in expected
        assert expected.keys() <= seen.keys(), "stored but not compared"
        assert {name: seen[name].shape for name in expected} == {name: want.shape for name, want in expected.items()}
        errors = {name: ((seen[name] - want).abs().max() / want.abs().max()).item() for name, want in expected.items()}
        assert {name: error for name, error in errors.items() if not error <= GOLDEN_TOLERANCE} == {}
        seen.clear()
    assert stored == {}, "stored but not compared"
