"""One decoded input: what a task makes of a body and what is batched with others."""

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

AnyArray = npt.NDArray[Any]
Arrays = dict[str, AnyArray]


@dataclass(frozen=True, slots=True)
class Sample:
    """One decoded input.

    Attributes:
        inputs: the program's inputs by name, without the batch dimension.
        length: what buckets are made by (frames, regions); 1 where all inputs have the same shape.
        context: what `postprocess` needs to know of the input (its original size); None where it needs nothing.
    """

    inputs: Arrays
    length: int
    context: Any
