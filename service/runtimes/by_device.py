"""One runtime on each GPU: a batch goes to the one with the fewest in flight, and a GPU that fails is taken out.

When a batch fails, its GPU has to run the golden inputs again. If it does, the failure was the batch's own; only where
memory ran out the batch gets a second try, as others may have held that memory. If it does not, the GPU takes no more
batches, this one gets its second try elsewhere, and the GPU is probed from time to time until it answers again.
"""

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from service.errors import BundleError, DeviceLost, ServiceError
from service.metrics import ModelDeviceMetrics
from service.runtimes.cuda import list_devices
from service.runtimes.runtime import Runtime
from service.sample import Arrays

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0  # between two probes of a GPU that is out; each doubles it
# ONNX Runtime's arena, CUDA's and torch's own words for it; neither has an error class that all of them share.
OUT_OF_MEMORY = ("out of memory", "failed to allocate memory", "bfcarena", "cudaerrormemoryallocation")

Wait = Callable[[float], bool]  # for so many seconds; True once there is nothing left to wait for


@dataclass(slots=True, eq=False)
class _Replica:
    runtime: Runtime
    is_up: bool = True
    num_running: int = 0
    pause_seconds: float = FIRST_PAUSE_SECONDS
    turn: threading.Lock = field(default_factory=threading.Lock)  # of who probes


class _DeviceFailed(Exception):
    """What failed is not, or not surely, the batch's fault; the runtime's own error is the cause."""


class ByDevice:
    """The same program on several GPUs; about itself it tells what the first one does. See `Runtime`.

    Args:
        runtimes: one on each GPU.
        probe: raises if a runtime does not compute as it should.
        num_streams: how many batches there may be in flight on all of them together.
        metrics: of the GPUs.
        wait: between probes; by default until this runtime is closed.
    """

    def __init__(
        self,
        runtimes: Sequence[Runtime],
        probe: Callable[[Runtime], None],
        *,
        num_streams: int,
        metrics: ModelDeviceMetrics,
        wait: Wait | None = None,
    ) -> None:
        first = runtimes[0]
        self.name, self.version, self.kernel = first.name, first.version, first.kernel
        self.device = ",".join(runtime.device for runtime in runtimes)
        self.num_streams = num_streams
        self._num_slots = math.ceil(num_streams / len(runtimes))  # of each: the rest never gets a lost one's share, too
        self._replicas = [_Replica(runtime) for runtime in runtimes]
        self._probe, self._metrics = probe, metrics
        self._changed = threading.Condition()
        self._is_closed = threading.Event()
        self._wait = wait or self._is_closed.wait
        for runtime in runtimes:
            metrics.set_up(runtime.device)

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        """Run a batch, on a second GPU if the first one fails; see `Runtime.run`.

        Raises: DeviceLost if no GPU is left, or the second one failed as well.
        """
        first = self._take()
        try:
            return self._run_on(first, inputs, outputs)
        except _DeviceFailed as failure:
            logger.warning("%s failed on a batch, which is tried again: %s", first.runtime.device, failure.__cause__)
        second = self._take(avoid=first)
        try:
            return self._run_on(second, inputs, outputs)
        except _DeviceFailed as failure:
            if second.is_up:  # memory ran out twice, and not for others' sake
                raise failure.__cause__ or failure from None
            raise self._lost("two GPUs failed on this batch") from failure

    def close(self) -> None:
        """Close all of them; see `Runtime.close`."""
        self._is_closed.set()
        for replica in self._replicas:
            replica.runtime.close()

    @property
    def lost_devices(self) -> list[str]:
        """The GPUs that are taken out."""
        return [replica.runtime.device for replica in self._replicas if not replica.is_up]

    def check(self) -> None:
        """Refuse if no GPU is left.

        Raises: DeviceLost.
        """
        if not any(replica.is_up for replica in self._replicas):
            raise self._lost("every GPU of this model failed")

    def _lost(self, what: str) -> DeviceLost:
        seconds = math.ceil(min(replica.pause_seconds for replica in self._replicas))
        return DeviceLost(
            f"{what}; try again in {seconds} s, or at another instance of the service; tell the operator",
            retry_after_seconds=seconds,
        )

    def _take(self, avoid: _Replica | None = None) -> _Replica:
        """Take a place on the GPU with the fewest batches; wait where all places are taken.

        Args:
            avoid: not this one, unless it is the only one.
        Raises: DeviceLost.
        """
        with self._changed:
            while True:
                self.check()
                up = [replica for replica in self._replicas if replica.is_up]
                others = [replica for replica in up if replica is not avoid] or up
                best = min(others, key=lambda replica: replica.num_running)
                if best.num_running < self._num_slots:
                    best.num_running += 1
                    return best
                self._changed.wait()

    def _run_on(self, replica: _Replica, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        try:
            return replica.runtime.run(inputs, outputs)
        except ServiceError:
            raise
        except Exception as error:
            if self._is_well(replica) and not is_out_of_memory(error):
                raise
            raise _DeviceFailed from error
        finally:
            with self._changed:
                replica.num_running -= 1
                self._changed.notify_all()  # a second try may be waiting for a place on another one

    def _is_well(self, replica: _Replica) -> bool:
        with replica.turn:  # whoever failed beside this one has probed already, or waits to hear what comes out
            if not replica.is_up:
                return False
            try:
                self._probe(replica.runtime)
            except Exception:  # each runtime's library has exceptions of its own
                logger.exception("%s is taken out: it does not run the golden inputs", replica.runtime.device)
                self._take_out(replica)
        return replica.is_up

    def _take_out(self, replica: _Replica) -> None:
        with self._changed:
            replica.is_up = False
            replica.pause_seconds = FIRST_PAUSE_SECONDS
            self._changed.notify_all()  # who waited for a place on this one looks again
        self._metrics.set_down(replica.runtime.device)
        name = f"probe-{replica.runtime.device}"
        threading.Thread(target=self._bring_back, args=(replica,), name=name, daemon=True).start()

    def _bring_back(self, replica: _Replica) -> None:
        """Probe a GPU until it answers: memory that others held comes back, a GPU off the bus does not."""
        while not self._wait(replica.pause_seconds):
            try:
                self._probe(replica.runtime)
            except Exception as error:  # noqa: BLE001 - as above; the first failure was logged
                logger.debug("%s still fails: %s", replica.runtime.device, error)
                replica.pause_seconds = min(2 * replica.pause_seconds, LONGEST_PAUSE_SECONDS)
                continue
            with self._changed:
                replica.is_up = True
                self._changed.notify_all()
            self._metrics.set_up(replica.runtime.device)
            logger.warning("%s runs the golden inputs again and takes batches", replica.runtime.device)
            return


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library's error says that memory ran out."""
    text = f"{type(error).__name__}: {error}".lower()
    return isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY)


def open_on_devices(open_one: Callable[[str], Runtime], setting: str) -> list[Runtime]:
    """Open a program on each device that a setting stands for.

    Args:
        open_one: opens it on `cpu` or `cuda:N`.
        setting: see `list_devices`; at `auto`, a GPU that cannot be used is left out, with a warning, and where none
            can, the CPU takes over.
    Raises: BundleError; none is left open then.
    """
    opened: list[Runtime] = []
    try:
        for device in list_devices(setting):
            try:
                opened.append(open_one(device))
            except BundleError as error:
                if setting != "auto" or device == "cpu":
                    raise
                logger.warning("%s is left out: %s", device, error)
        return opened or [open_one("cpu")]
    except Exception:
        for runtime in opened:
            runtime.close()
        raise
