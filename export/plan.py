"""What an export needs to know about a model: the one place where tasks differ."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from service.bundle import TensorSpec
from service.sample import Arrays

EXPORT_BATCH = 2
BATCH_SIZES = (1, 3, 8)  # of the parity batches; none is the export's own


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a trained model becomes a bundle.

    Attributes:
        program: what is exported; takes the inputs in their order, gives a tuple of the outputs in theirs.
        spec: what the manifest tells the task.
        inputs: of the program; the dimensions that have a name vary.
        outputs: of the program.
        example: inputs by name that the export is traced with, `EXPORT_BATCH` samples; only their shapes matter.
        golden: inputs by name that a bundle proves itself with.
        golden_outputs: names of the outputs that it keeps for that; all where none are named.
        parity_inputs: what the parity batches are, in words.
        parity_batches: inputs by name that program and module are compared on, in `BATCH_SIZES`.
        max_share_off: share of an output's numbers that may be off, as near ties of clustering by hashes may fall
            differently; 0 where nothing is decided.
        length_buckets: longest lengths that are batched together; none where all samples have one shape.
        short_length: above it samples are long; None where there are none.
        long_length: above it samples may be spread over ranks; None where the model cannot be, or none is as long.
    """

    program: nn.Module
    spec: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    example: Arrays
    golden: Arrays
    parity_inputs: str
    parity_batches: tuple[Arrays, ...]
    golden_outputs: tuple[str, ...] = ()
    max_share_off: float = 0.0
    length_buckets: tuple[int, ...] = ()
    short_length: int | None = None
    long_length: int | None = None

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return tuple(tensor.name for tensor in self.outputs)

    def run(self, inputs: Arrays) -> Arrays:
        """Compute the outputs with torch, by name, as a runtime does with the exported program."""
        with torch.inference_mode():
            found = self.program(*(torch.from_numpy(inputs[tensor.name]) for tensor in self.inputs))
        return {name: tensor.numpy() for name, tensor in zip(self.output_names, found, strict=True)}
