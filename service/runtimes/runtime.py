"""The runtime: what runs one bundle's program."""

from collections.abc import Sequence
from typing import Protocol

from service.sample import Arrays


class Runtime(Protocol):
    """Arrays in, arrays out.

    Attributes:
        name: `onnx` or `torchscript`.
        version: of the library.
        device: `cpu`, `cuda:0` or, where there are several, `cuda:0,cuda:1`: what really runs.
        kernel: `portable`, or `native` where a kernel of ours replaces a node.
        num_streams: how many threads should call `run` at once to keep the device busy.
    """

    name: str
    version: str
    device: str
    kernel: str
    num_streams: int

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        """Run a batch; blocks; several threads may call at once; gives only the outputs named.

        Args:
            inputs: (B, …) by name.
            outputs: names of the outputs wanted.
        Returns: (B, …) by name.
        """
        ...

    def close(self) -> None:
        """Give the program's memory back."""
        ...
