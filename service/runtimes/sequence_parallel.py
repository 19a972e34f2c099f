"""The runtime of long samples: a group of ranks, watched, and started again when it is lost.

A sample that is being worked on when the group is lost fails, and so does every one that comes before the group is
back; each error says when trying again is worth it. Nobody else notices.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

from service.bundle import SEQUENCE_PARALLEL, Bundle
from service.errors import BundleError, RanksLost
from service.metrics import RankMetrics
from service.runtimes.rank_group import Cost, GroupLost, RankGroup
from service.sample import Arrays
from service.settings import Settings, count_cores

logger = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS = 60.0  # between two starts; the first is 1 s, and each failure doubles it
NEEDS = ("torch", "safetensors")  # of the ranks; this process imports neither


class SequenceParallelRuntime:
    """Arrays in, arrays out, by all ranks together; see `Runtime`.

    Args:
        start: starts a group.
        metrics: of the ranks.
    Raises: GroupLost if the first group does not start.
    """

    name = "sequence_parallel"
    kernel = "portable"
    num_streams = 1

    def __init__(self, start: Callable[[], RankGroup], metrics: RankMetrics) -> None:
        self._start, self._metrics = start, metrics
        self._turn = threading.Lock()  # an input has all ranks to itself
        self._is_closed = threading.Event()
        self._num_failures = 0
        self._start_seconds = 0.0
        self._group: RankGroup | None = self._open()
        self.version, self.device = self._group.version, self._group.device
        self._keeper = threading.Thread(target=self._keep, args=(self._group,), name="ranks", daemon=True)
        self._keeper.start()

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        """Run a batch; see `Runtime.run`.

        Raises: RanksLost.
        """
        with self._turn:
            group = self._group
            if group is None:
                raise self._lost("the processes for long recordings are starting again")
            try:
                found, costs = group.run(inputs, outputs)
            except GroupLost as error:
                logger.error("ranks lost amid a sample", extra={"fields": {"error": str(error)}})  # noqa: TRY400
                raise self._lost("the processes that shared this recording ended") from error
        self._num_failures = 0
        self._count(costs)
        return found

    def close(self) -> None:
        """End all ranks; see `Runtime.close`."""
        self._is_closed.set()
        group = self._group
        if group is not None:
            group.ended.set()
        self._keeper.join()

    def _lost(self, what: str) -> RanksLost:
        seconds = math.ceil(self._pause_seconds() + self._start_seconds)
        return RanksLost(
            f"{what}; every other input is answered; send it again in {seconds} s", retry_after_seconds=seconds
        )

    def _pause_seconds(self) -> float:
        return min(LONGEST_PAUSE_SECONDS, 2.0**self._num_failures)

    def _count(self, costs: Sequence[Cost]) -> None:
        own = [cost.seconds - cost.waiting_seconds for cost in costs]
        self._metrics.sent_bytes.inc(sum(cost.sent_bytes for cost in costs))
        self._metrics.waiting_seconds.inc(sum(cost.waiting_seconds for cost in costs))
        self._metrics.imbalance_ratio.observe(max(own) * len(own) / sum(own) - 1)

    def _open(self) -> RankGroup:
        begun = time.monotonic()
        group = self._start()
        self._start_seconds = time.monotonic() - begun
        self._metrics.ready.inc(len(group.processes))
        return group

    def _keep(self, group: RankGroup) -> None:
        """Replace the group whenever it ends, until this runtime is closed."""
        while True:
            group.ended.wait()
            self._group = None
            self._metrics.ready.dec(len(group.processes))
            group.close()
            if self._is_closed.is_set():
                return
            logger.error("a rank ended; all of them start again", extra={"fields": {"error": group.tell_end()}})
            replaced = self._replace()
            if replaced is None:
                return
            self._group = group = replaced
            if self._is_closed.is_set():  # `close` came while there was no group
                group.ended.set()

    def _replace(self) -> RankGroup | None:
        """Start a group, as often as it takes; None once this runtime is closed."""
        while not self._is_closed.wait(self._pause_seconds()):
            self._num_failures += 1  # until an input succeeds
            try:
                return self._open()
            except GroupLost as error:
                logger.error("ranks do not start", extra={"fields": {"error": str(error)}})  # noqa: TRY400
        return None


def open_ranks(bundle: Bundle, settings: Settings, metrics: RankMetrics) -> SequenceParallelRuntime:
    """Start the ranks that a bundle's long samples are spread over.

    Args:
        bundle: names this runtime.
        settings: how many, on what, and how patient.
        metrics: of the ranks.
    Raises: BundleError if torch is not installed, too few GPUs are named, or the ranks do not start.
    """
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise BundleError(
            f"SERVICE_RANKS={settings.ranks}, but {' and '.join(missing)} is not installed; install what ranks need "
            "(`make setup` does), or leave the setting out: the ordinary program then takes long recordings, too"
        )
    named = settings.device.split(",") if ":" in settings.device else []
    if named and settings.ranks > len(named):
        raise BundleError(
            f"SERVICE_RANKS={settings.ranks} with SERVICE_DEVICE={settings.device}, but each rank needs a GPU of its "
            f"own; name as many GPUs, or set SERVICE_RANKS={len(named)}"
        )
    manifest = bundle.manifest
    file = manifest.programs[SEQUENCE_PARALLEL]
    opening = {
        "architecture": manifest.origin.architecture,
        "num_classes": len(manifest.spec["labels"]),
        "weights": str((bundle.folder / file).resolve()),
        "sha256": manifest.files[file],
        "mean": manifest.normalisation.mean,
        "std": manifest.normalisation.std,
        "device": settings.device,
        "num_threads": max(1, count_cores() // settings.ranks),
        "timeout_seconds": settings.rank_timeout_seconds,
    }
    start = partial(RankGroup, opening, num_ranks=settings.ranks, timeout_seconds=settings.rank_timeout_seconds)
    try:
        return SequenceParallelRuntime(start, metrics)
    except GroupLost as error:
        raise BundleError(f"{bundle.folder}: the ranks for long recordings do not start: {error}") from error
