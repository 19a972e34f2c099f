from collections.abc import Sequence

import numpy as np
import pytest

from service.runtimes.by_length import ByLength
from service.sample import Arrays


class Remembering:
    """A runtime that answers with its name."""

    version, kernel, num_streams = "1", "native", 2

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device
        self.is_closed = False

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        return {name: np.array([self.name]) for name in outputs}

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(
    ("lengths", "name"), [([1, 99], "ordinary"), ([100], "ordinary"), ([101], "long"), ([3, 101], "long")]
)
def test_a_batch_goes_by_its_longest_sample(lengths: list[int], name: str) -> None:
    runtime = ByLength(Remembering("ordinary", "cpu"), Remembering("long", "cuda"), long_length=100)
    outputs = runtime.run({"lengths": np.array(lengths)}, ["y"])
    assert outputs == {"y": np.array([name])}


def test_it_tells_of_itself_what_the_ordinary_runtime_does_and_closes_both() -> None:
    ordinary, long = Remembering("ordinary", "cpu"), Remembering("long", "cuda")
    runtime = ByLength(ordinary, long, long_length=100)
    assert (runtime.name, runtime.version, runtime.device, runtime.kernel) == ("ordinary", "1", "cpu", "native")
    assert runtime.num_streams == 4
    runtime.close()
    assert ordinary.is_closed
    assert long.is_closed
