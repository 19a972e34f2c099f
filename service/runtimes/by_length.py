"""Two runtimes of one bundle: long samples go to the one, all others to the other."""

from collections.abc import Sequence

from service.collate import LENGTHS
from service.runtimes.runtime import Runtime
from service.sample import Arrays


class ByLength:
    """Sends each batch where it belongs; about itself it tells what the ordinary runtime does. See `Runtime`.

    Args:
        ordinary: for batches whose samples are all of `long_length` or shorter.
        long: for all others.
        long_length: of a sample.
    """

    def __init__(self, ordinary: Runtime, long: Runtime, *, long_length: int) -> None:
        self.name, self.version, self.device = ordinary.name, ordinary.version, ordinary.device
        self.kernel = ordinary.kernel
        self.num_streams = ordinary.num_streams + long.num_streams  # who waits for the other one uses no core
        self._ordinary, self._long, self._long_length = ordinary, long, long_length

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        """Run a batch; see `Runtime.run`."""
        runtime = self._long if inputs[LENGTHS].max() > self._long_length else self._ordinary
        return runtime.run(inputs, outputs)

    def close(self) -> None:
        """Close both."""
        self._long.close()
        self._ordinary.close()
