"""Runtimes that fail when told. Probes of a GPU that is out wait until the test lets them."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import anyio
import numpy as np
import pytest

from service.batcher import Batcher
from service.errors import BundleError, DeviceLost, InvalidInput, ServiceError
from service.metrics import Metrics, ModelDeviceMetrics, ModelMetrics
from service.runtimes import by_device
from service.runtimes.by_device import LONGEST_PAUSE_SECONDS, ByDevice, is_out_of_memory, open_on_devices
from service.runtimes.runtime import Runtime
from service.sample import Arrays, Sample

BATCH = {"x": np.array([[1.0]])}
OUT_OF_MEMORY = "CUDA failure 2: out of memory ; GPU=0"
POISON = -1.0


class Gpu:
    """Doubles `x`; fails on every batch while it is lost."""

    name, version, kernel, num_streams = "fake", "1", "portable", 2

    def __init__(self, device: str) -> None:
        self.device = device
        self.failure: Exception | None = None
        self.is_lost = False
        self.is_closed = False
        self.num_runs = 0
        self.amid: Callable[[], object] = lambda: None

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        self.num_runs += 1
        self.amid()
        if self.is_lost:
            raise RuntimeError("CUDA failure 719: unspecified launch failure")
        if (inputs["x"] == POISON).any():
            raise ValueError("an input that no GPU likes")
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        return dict.fromkeys(outputs, inputs["x"] * 2)

    def close(self) -> None:
        self.is_closed = True


def probe(runtime: Runtime) -> None:
    assert isinstance(runtime, Gpu)
    if runtime.is_lost:
        raise BundleError("the program does not run on its golden inputs")


class Bench:
    """Some GPUs, and a clock for the probes that moves when told."""

    made: ClassVar[list["Bench"]] = []

    def __init__(self, number: int, *, num_streams: int = 0) -> None:
        Bench.made.append(self)
        self.gpus = [Gpu(f"cuda:{index}") for index in range(number)]
        self.metrics = Metrics()
        self.pauses: list[float] = []
        self._ticks = threading.Semaphore(0)
        self._waits = threading.Semaphore(0)
        self.is_over = False
        self.runtime = ByDevice(
            self.gpus,
            probe,
            num_streams=num_streams or 2 * number,
            metrics=ModelDeviceMetrics(self.metrics, "m"),
            wait=self._wait,
        )

    def _wait(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        self._waits.release()
        assert self._ticks.acquire(timeout=30)
        return self.is_over

    def wait_for_pause(self) -> None:
        """Return once the only GPU that is out waits for its next probe."""
        assert self._waits.acquire(timeout=30)

    def let_probe(self) -> None:
        """Let its next probe come."""
        self._ticks.release()

    def run(self, value: float = 1.0) -> list[float]:
        found: list[float] = self.runtime.run({"x": np.array([[value]])}, ("y",))["y"][:, 0].tolist()
        return found

    def up(self) -> list[float | None]:
        return [
            self.metrics.registry.get_sample_value("inference_model_device_up", {"model": "m", "device": gpu.device})
            for gpu in self.gpus
        ]


def join_probes() -> None:
    """Wait for the end of all probes."""
    for thread in threading.enumerate():
        if thread.name.startswith("probe-"):
            thread.join(timeout=30)


@pytest.fixture(autouse=True)
def _no_probe_is_left() -> Iterator[None]:
    yield
    for bench in Bench.made:
        bench.is_over = True
        for _ in bench.gpus:
            bench.let_probe()
    Bench.made = []
    join_probes()


# Spreading


def test_about_itself_it_tells_what_its_runtimes_are() -> None:
    runtime = Bench(2).runtime
    assert (runtime.name, runtime.version, runtime.kernel) == ("fake", "1", "portable")
    assert (runtime.device, runtime.num_streams) == ("cuda:0,cuda:1", 4)


def test_a_batch_goes_to_the_gpu_with_the_fewest_in_flight() -> None:
    bench = Bench(3)
    order: list[int] = []

    def run_next(number: int) -> None:
        order.append(number)
        if len(order) < 6:
            bench.run()  # while this one is in flight

    for number, gpu in enumerate(bench.gpus):
        gpu.amid = lambda number=number: run_next(number)  # type: ignore[misc]
    bench.run()
    assert order == [0, 1, 2, 0, 1, 2]
    bench.run()
    assert order[-1] == 0  # all of them are free again


def test_only_what_was_asked_for_comes_back() -> None:
    assert list(Bench(1).runtime.run(BATCH, ("y", "z"))) == ["y", "z"]


# Failing


def test_the_batch_of_a_lost_gpu_is_answered_by_another_one_which_takes_the_rest() -> None:
    bench = Bench(2)
    bench.gpus[0].is_lost = True
    assert bench.run() == [2.0]
    assert bench.runtime.lost_devices == ["cuda:0"]
    assert bench.up() == [0, 1]
    assert [bench.run(value) for value in (2.0, 3.0)] == [[4.0], [6.0]]
    assert [gpu.num_runs for gpu in bench.gpus] == [1, 3]
    bench.runtime.check()


def test_when_the_last_gpu_goes_clients_are_told_when_to_come_back() -> None:
    bench = Bench(2)
    for gpu in bench.gpus:
        gpu.is_lost = True
    for _ in range(2):
        with pytest.raises(DeviceLost, match=r"try again in 1 s, .* tell the operator") as caught:
            bench.run()
        assert caught.value.retry_after_seconds == 1
    assert [gpu.num_runs for gpu in bench.gpus] == [1, 1]
    assert bench.up() == [0, 0]
    with pytest.raises(DeviceLost, match="every GPU of this model failed"):
        bench.runtime.check()


def test_a_batch_that_is_itself_to_blame_takes_no_gpu_out_and_is_not_tried_again() -> None:
    bench = Bench(2)
    with pytest.raises(ValueError, match="no GPU likes"):
        bench.run(POISON)
    assert bench.runtime.lost_devices == []
    assert [gpu.num_runs for gpu in bench.gpus] == [1, 0]
    assert bench.run() == [2.0]


def test_an_error_that_the_runtime_raises_on_purpose_is_passed_on() -> None:
    bench = Bench(1)
    bench.gpus[0].failure = InvalidInput("too long")
    with pytest.raises(InvalidInput):
        bench.run()
    assert bench.runtime.lost_devices == []


@pytest.mark.parametrize("number", [1, 2])
def test_a_batch_for_which_memory_ran_out_is_tried_again_elsewhere_if_there_is_an_elsewhere(number: int) -> None:
    bench = Bench(number)
    bench.gpus[0].failure = RuntimeError(OUT_OF_MEMORY)
    assert bench.run() == [2.0]
    assert bench.runtime.lost_devices == []
    assert [gpu.num_runs for gpu in bench.gpus] == {1: [2], 2: [1, 1]}[number]


def test_a_batch_for_which_memory_runs_out_twice_is_itself_to_blame() -> None:
    bench = Bench(2)
    for gpu in bench.gpus:
        gpu.failure = RuntimeError(OUT_OF_MEMORY)
    with pytest.raises(RuntimeError, match="out of memory"):
        bench.run()
    assert bench.runtime.lost_devices == []
    assert bench.run() == [2.0]


def test_batches_that_fail_beside_each_other_probe_a_gpu_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(2)
    meeting = threading.Barrier(2)
    bench.gpus[0].amid = lambda: meeting.wait(timeout=30)
    bench.gpus[0].is_lost = True
    probed: list[str] = []
    monkeypatch.setattr(bench.runtime, "_probe", lambda runtime: [probed.append(runtime.device), probe(runtime)])
    bench.gpus[1].num_runs = 0
    bench.runtime._replicas[1].num_running = -2  # the second one is the busier of both only at the third batch
    bench.runtime._replicas[0].num_running = -4
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(bench.run, (1.0, 2.0))) == [[2.0], [4.0]]
    assert probed == ["cuda:0"]


def test_a_lost_gpu_s_share_waits_for_a_place_instead_of_crowding_the_others() -> None:
    bench = Bench(2, num_streams=2)
    bench.gpus[0].is_lost = True
    bench.run()
    inside, leave = threading.Semaphore(0), threading.Semaphore(0)
    most: list[int] = []

    def stay() -> None:
        most.append(bench.runtime._replicas[1].num_running)
        inside.release()
        assert leave.acquire(timeout=30)

    bench.gpus[1].amid = stay
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(bench.run, value) for value in (1.0, 2.0)]
        for _ in answers:
            assert inside.acquire(timeout=30)
            leave.release()
        assert [answer.result(timeout=30) for answer in answers] == [[2.0], [4.0]]
    assert most == [1, 1]


# Coming back


def test_a_gpu_that_answers_again_takes_batches_again() -> None:
    bench = Bench(1)
    bench.gpus[0].is_lost = True
    with pytest.raises(DeviceLost):
        bench.run()
    bench.wait_for_pause()
    for _ in range(2):
        bench.let_probe()
        bench.wait_for_pause()
    bench.gpus[0].is_lost = False
    bench.let_probe()
    join_probes()
    assert bench.runtime.lost_devices == []
    assert bench.up() == [1]
    assert bench.run() == [2.0]
    assert bench.pauses == [1.0, 2.0, 4.0]


def test_probes_become_rare_and_end_with_the_runtime() -> None:
    bench = Bench(1)
    bench.gpus[0].is_lost = True
    with pytest.raises(DeviceLost):
        bench.run()
    bench.wait_for_pause()
    for _ in range(8):
        bench.let_probe()
        bench.wait_for_pause()
    with pytest.raises(DeviceLost) as caught:
        bench.runtime.check()
    assert caught.value.retry_after_seconds <= LONGEST_PAUSE_SECONDS
    bench.is_over = True
    bench.runtime.close()
    bench.let_probe()
    join_probes()
    assert bench.pauses[-1] == LONGEST_PAUSE_SECONDS
    assert bench.gpus[0].is_closed


def test_by_default_probes_wait_until_the_runtime_is_closed() -> None:
    gpu = Gpu("cuda:0")
    runtime = ByDevice([gpu], probe, num_streams=1, metrics=ModelDeviceMetrics(Metrics(), "m"))
    gpu.is_lost = True
    with pytest.raises(DeviceLost):
        runtime.run(BATCH, ("y",))
    runtime.close()
    join_probes()
    assert not [thread for thread in threading.enumerate() if thread.name == "probe-cuda:0"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(OUT_OF_MEMORY), True),
        (RuntimeError("bfc_arena.cc: BFCArena::AllocateRawInternal Failed to allocate memory"), True),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA failure 700: an illegal memory access was encountered"), False),
        (ValueError("memory"), False),
    ],
)
def test_libraries_say_that_memory_ran_out_in_words_of_their_own(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


# With a batcher


@pytest.mark.anyio
async def test_no_accepted_request_is_lost_while_gpus_fail() -> None:
    bench = Bench(3)
    bench.gpus[0].amid = lambda: setattr(bench.gpus[0], "is_lost", bench.gpus[0].num_runs > 3)
    bench.gpus[1].amid = lambda: setattr(bench.gpus[1], "is_lost", bench.gpus[1].num_runs > 5)
    batcher = Batcher(bench.runtime, ModelMetrics(bench.metrics, "m"), max_batch=4, max_queue=1000)
    batcher.start(bench.runtime.num_streams)

    async def ask(value: int) -> float | ServiceError:
        ticket = batcher.admit(1000.0)
        sample = Sample(inputs={"x": np.full((1,), float(value))}, length=1, context=None)
        batcher.put(ticket, sample, ("y",), lambda outputs: float(outputs["y"][0]))
        try:
            answer: float = await ticket.future
        except ServiceError as error:
            return error
        return answer

    with anyio.fail_after(60):
        answers = await asyncio.gather(*(ask(value) for value in range(200)))
    assert bench.runtime.lost_devices == ["cuda:0", "cuda:1"]
    # A batch that was on both when they went has had its second try; every other one has its answer.
    told = [answer for answer in answers if isinstance(answer, DeviceLost)]
    right = [answer for value, answer in enumerate(answers) if answer == 2 * value]
    assert len(told) + len(right) == len(answers)
    assert len(told) <= 4 * 2
    bench.gpus[2].is_lost = True
    with anyio.fail_after(60):
        answers = await asyncio.gather(*(ask(value) for value in range(50)))
    assert all(isinstance(answer, DeviceLost) for answer in answers)
    batcher.close()


# Opening


def pretend_devices(monkeypatch: pytest.MonkeyPatch, *devices: str) -> None:
    monkeypatch.setattr(by_device, "list_devices", lambda setting: devices)


def test_a_program_opens_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_devices(monkeypatch, "cuda:0", "cuda:1")
    assert [runtime.device for runtime in open_on_devices(Gpu, "cuda")] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(("broken", "left"), [({"cuda:0"}, ["cuda:1"]), ({"cuda:0", "cuda:1"}, ["cpu"])])
def test_auto_leaves_out_with_a_warning_what_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: set[str], left: list[str]
) -> None:
    pretend_devices(monkeypatch, "cuda:0", "cuda:1")

    def open_one(device: str) -> Gpu:
        if device in broken:
            raise BundleError("libcudnn.so.9 is missing")
        return Gpu(device)

    assert [runtime.device for runtime in open_on_devices(open_one, "auto")] == left
    assert [record.message for record in caplog.records] == [
        f"{device} is left out: libcudnn.so.9 is missing" for device in sorted(broken)
    ]


def test_a_device_that_was_asked_for_and_does_not_open_leaves_none_open(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_devices(monkeypatch, "cuda:0", "cuda:1")
    opened: list[Gpu] = []

    def open_one(device: str) -> Gpu:
        if opened:
            raise BundleError("no memory")
        opened.append(Gpu(device))
        return opened[0]

    with pytest.raises(BundleError, match="no memory"):
        open_on_devices(open_one, "cuda:0,cuda:1")
    assert opened[0].is_closed
