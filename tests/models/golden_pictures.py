"""What golden tests of picture models share: read a file, run every stored picture, compare all that is stored."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

GOLDEN_TOLERANCE = 1e-5  # of max|a - b| / max|b|


def read_golden(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a golden file."""
    return read_metadata(path), load_file(path)


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        metadata: dict[str, str] = file.metadata()
    return metadata


def taken(stored: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the tensors with this prefix, and give them without it."""
    return {name.removeprefix(prefix): stored.pop(name) for name in list(stored) if name.startswith(prefix)}


def assert_reproduced(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Hold whole numbers to equality and others to the tolerance; everything expected must have been found."""
    assert expected.keys() <= found.keys(), "stored but not compared"
    assert {k: found[k].shape for k in expected} == {k: want.shape for k, want in expected.items()}
    whole = {k for k, want in expected.items() if not want.is_floating_point()}
    assert {k: int((found[k] != expected[k]).sum()) for k in whole if found[k].ne(expected[k]).any()} == {}
    errors = {
        k: ((found[k] - want).abs().max() / want.abs().max()).item() for k, want in expected.items() if k not in whole
    }
    assert {k: error for k, error in errors.items() if not error <= GOLDEN_TOLERANCE} == {}


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
        expected = taken(stored, f"in{i}.")
        assert needed in expected
        assert_reproduced(seen, expected)
        seen.clear()
    assert stored == {}, "stored but not compared"
