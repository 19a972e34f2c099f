"""The program of the tiny bundle in TorchScript, for tests of that runtime."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from service.runtimes.torchscript import TENSORS

PROGRAM = "model.pt"
NAMES = {"inputs": ["image"], "outputs": ["logits", "clusters"]}


class MeanColours(nn.Module):
    """Pictures (B, Y, X, 3) → their mean colours over 16, and each cell's mean over the colours."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Buffer(torch.eye(3) / 16)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        pixels = image.float()
        return pixels.mean((1, 2)) @ self.weight, pixels.mean(3)


def write_archive(path: Path, **extra: str) -> Path:
    """Write the program; `extra` are other files of the archive than the usual one."""
    with without_deprecations():
        files = extra or {TENSORS: json.dumps(NAMES)}
        torch.jit.save(torch.jit.script(MeanColours().eval()), str(path), _extra_files=files)
    return path


@contextmanager
def without_deprecations() -> Iterator[None]:
    """Ignores that torch 2.13 calls TorchScript deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.*", DeprecationWarning)
        yield
