import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from service.collate import LENGTHS
from service.errors import BundleError
from service.runtimes import warmup
from service.runtimes.warmup import RUNS_PER_STREAM, find_max_batch, find_num_streams, fit_length, warm_up
from service.sample import Arrays

EXAMPLE = {"image": np.arange(6, dtype=np.uint8).reshape(2, 3)}

# Seconds of a whole batch by its size: 4 is the smallest whose samples are within 2 % of the fastest.
USUAL = {1: 1.0, 2: 1.4, 4: 2.02, 8: 4.0, 12: 6.0}


class ScriptedRuntime:
    """Takes as long as its script says, on a clock of its own."""

    name, version, device, kernel, num_streams = "scripted", "1", "cpu", "portable", 1

    def __init__(self, seconds: Mapping[int, float] = USUAL) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.sizes: list[int] = []
        self.delays: dict[int, float] = {}  # the run of this number takes so much longer

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        assert tuple(outputs) == ("logits",)
        size = len(inputs["image"])
        self.now += self.seconds[size] + self.delays.get(len(self.sizes), 0.0)
        self.sizes.append(size)
        np.testing.assert_array_equal(inputs["image"], np.resize(EXAMPLE["image"], (size, 3)))
        return {}

    def close(self) -> None:
        pass


def find(monkeypatch: pytest.MonkeyPatch, runtime: ScriptedRuntime, cache: Path, **facts: object) -> int:
    monkeypatch.setattr(
        warmup, "time", SimpleNamespace(perf_counter=lambda: runtime.now, thread_time=lambda: runtime.now)
    )
    usual = {"outputs": ("logits",), "limit": 12, "bundle_sha256": "a" * 64, "cache": cache}
    return find_max_batch(runtime, EXAMPLE, **usual | facts)


def test_the_smallest_batch_that_is_nearly_as_fast_is_the_cap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runtime = ScriptedRuntime()
    assert find(monkeypatch, runtime, tmp_path) == 4
    assert sorted(set(runtime.sizes)) == [1, 2, 4, 8, 12]


def test_where_batches_do_not_pay_samples_run_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runtime = ScriptedRuntime({size: float(size) for size in (1, 2, 4, 8, 12)})
    assert find(monkeypatch, runtime, tmp_path) == 1


def test_one_slow_run_decides_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runtime = ScriptedRuntime()
    runtime.delays = {2: 100.0}  # the first run of batch size 4
    assert find(monkeypatch, runtime, tmp_path) == 4


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])])
def test_no_batch_is_larger_than_the_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: int, sizes: list[int]
) -> None:
    runtime = ScriptedRuntime()
    assert find(monkeypatch, runtime, tmp_path, limit=limit) <= limit
    assert sorted(set(runtime.sizes)) == sizes


def test_a_finding_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find(monkeypatch, ScriptedRuntime(), tmp_path / "made" / "for it")
    runtime = ScriptedRuntime()
    assert find(monkeypatch, runtime, tmp_path / "made" / "for it") == 4
    assert runtime.sizes == []


@pytest.mark.parametrize("facts", [{"bundle_sha256": "b" * 64}, {"limit": 8}])
def test_another_bundle_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, facts: dict[str, object]
) -> None:
    find(monkeypatch, ScriptedRuntime(), tmp_path)
    runtime = ScriptedRuntime()
    find(monkeypatch, runtime, tmp_path, **facts)
    assert runtime.sizes


@pytest.mark.parametrize(
    ("name", "value"), [("count_cores", lambda: 77), ("_processor", lambda: "model name: another one")]
)
def test_another_machine_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: object
) -> None:
    find(monkeypatch, ScriptedRuntime(), tmp_path)
    monkeypatch.setattr(warmup, name, value)
    runtime = ScriptedRuntime()
    find(monkeypatch, runtime, tmp_path)
    assert runtime.sizes


@pytest.mark.parametrize(("name", "value"), [("device", "cuda"), ("version", "2"), ("name", "other")])
def test_another_runtime_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str
) -> None:
    find(monkeypatch, ScriptedRuntime(), tmp_path)
    runtime = ScriptedRuntime()
    setattr(runtime, name, value)
    find(monkeypatch, runtime, tmp_path)
    assert runtime.sizes


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"max_batch": null}',
        b'{"max_batch": "x"}',
        b'{"max_batch": 1e999}',
    ],
)
def test_a_corrupt_finding_is_measured_again_and_mended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    find(monkeypatch, ScriptedRuntime(), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    runtime = ScriptedRuntime()
    assert find(monkeypatch, runtime, tmp_path) == 4
    assert runtime.sizes
    assert json.loads(path.read_text()) == {"max_batch": 4}


@pytest.mark.parametrize(("found", "used"), [(0, 1), (-3, 1), (99, 12)])
def test_a_finding_out_of_range_is_brought_into_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: int, used: int
) -> None:
    find(monkeypatch, ScriptedRuntime(), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps({"max_batch": found}))
    assert find(monkeypatch, ScriptedRuntime(), tmp_path) == used


def test_a_cache_that_cannot_be_written_only_warns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the place of a folder")
    assert find(monkeypatch, ScriptedRuntime(), blocker) == 4
    (record,) = caplog.records
    assert (record.levelname, "the next start measures again" in record.getMessage()) == ("WARNING", True)


class SmallRuntime(ScriptedRuntime):
    """Has memory for so many samples in a batch."""

    device = "cuda:0"

    def __init__(self, most: int, words: str = "CUDA out of memory") -> None:
        super().__init__({1: 1.0, 2: 1.4, 4: 2.0, 8: 3.0, 12: 4.0})
        self.most, self.words = most, words

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        found = super().run(inputs, outputs)
        if self.sizes[-1] > self.most:
            raise RuntimeError(self.words)
        return found


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "name_gpu", lambda index: f"GPU {index}")


@pytest.mark.usefixtures("_no_gpu")
@pytest.mark.parametrize(("most", "expected"), [(1, 1), (3, 2), (4, 4), (11, 8)])
def test_the_cap_is_a_batch_that_fits_into_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, most: int, expected: int
) -> None:
    runtime = SmallRuntime(most)
    assert find(monkeypatch, runtime, tmp_path) == expected
    assert sum(size > most for size in runtime.sizes) == 1, "what does not fit is tried once"
    (record,) = caplog.records
    assert f"at most {expected} run there" in record.getMessage()


@pytest.mark.usefixtures("_no_gpu")
def test_memory_for_not_even_one_sample_refuses_the_bundle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="memory of cuda:0 ran out with 1 samples in a batch"):
        find(monkeypatch, SmallRuntime(0), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_no_gpu")
def test_another_fault_while_measuring_stays_what_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="another fault"):
        find(monkeypatch, SmallRuntime(4, "another fault"), tmp_path)


# Streams


class Streams:
    """Batches of a second each; so many in flight take this share of their time one after another; `most` fit."""

    def __init__(self, shares: Mapping[int, float], most: int = 3) -> None:
        self.shares, self.most = shares, most
        self.now = 0.0
        self.numbers: list[int] = []

    def run_together(self, number: int, run: Callable[[], object]) -> None:
        self.numbers.append(number)
        if number > self.most:
            raise MemoryError
        self.now += self.shares[number] * number * RUNS_PER_STREAM
        run()


def find_streams(monkeypatch: pytest.MonkeyPatch, streams: Streams, cache: Path, **facts: object) -> int:
    monkeypatch.setattr(warmup, "time", SimpleNamespace(perf_counter=lambda: streams.now))
    runtime = ScriptedRuntime()
    usual = {"outputs": ("logits",), "batch": 4, "bundle_sha256": "a" * 64, "cache": cache}
    return find_num_streams(runtime, EXAMPLE, run_together=streams.run_together, **usual | facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [({1: 1.0, 2: 0.7, 3: 0.69}, 2), ({1: 1.0, 2: 0.7, 3: 0.5}, 3), ({1: 1.0, 2: 1.0, 3: 1.2}, 1)],
)
def test_the_fewest_streams_that_are_nearly_as_fast_are_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shares: dict[int, float], expected: int
) -> None:
    streams = Streams(shares)
    assert find_streams(monkeypatch, streams, tmp_path) == expected
    assert sorted(set(streams.numbers)) == [1, 2, 3]


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (2, 2)])
def test_no_more_streams_than_fit_into_memory_are_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, most: int, expected: int
) -> None:
    streams = Streams({1: 1.0, 2: 0.7, 3: 0.5}, most=most)
    assert find_streams(monkeypatch, streams, tmp_path) == expected


def test_memory_for_not_even_one_stream_refuses_the_bundle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="ran out with 1 batches of 4 samples at a time"):
        find_streams(monkeypatch, Streams({1: 1.0}, most=0), tmp_path)


def test_the_number_of_streams_is_remembered_for_this_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_streams(monkeypatch, Streams({1: 1.0, 2: 0.7, 3: 0.7}), tmp_path)
    again = Streams({})
    assert find_streams(monkeypatch, again, tmp_path) == 2
    assert again.numbers == []
    assert find_streams(monkeypatch, Streams({1: 1.0, 2: 1.0, 3: 1.0}), tmp_path, batch=8) == 1


def test_streams_are_threads_that_run_beside_each_other() -> None:
    barrier = threading.Barrier(3)
    warmup._run_together(3, lambda: barrier.wait(timeout=30))  # breaks unless three wait at once
    assert not barrier.broken


@pytest.mark.parametrize("name", ["NVIDIA H100", "NVIDIA A100"])
def test_another_gpu_is_measured_anew(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    runtime = ScriptedRuntime()
    runtime.device = "cuda:1"
    before = warmup._fingerprint(runtime, 4, "a")
    monkeypatch.setattr(warmup, "name_gpu", lambda index: name if index == 1 else "")
    assert warmup._fingerprint(runtime, 4, "a") != before


# Before the first request


class ShapesRuntime(ScriptedRuntime):
    """Remembers the shapes that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        assert tuple(outputs) == ("logits",)
        (array,) = [array for name, array in inputs.items() if name != LENGTHS]
        self.shapes.append(array.shape)
        return {}


def test_every_batch_size_runs_once() -> None:
    runtime = ShapesRuntime()
    warm_up(runtime, EXAMPLE, outputs=("logits",), max_batch=6, buckets=())
    assert runtime.shapes == [(1, 3), (2, 3), (4, 3), (6, 3)]


def test_every_bucket_runs_in_the_batches_that_the_batcher_makes_of_it() -> None:
    runtime = ShapesRuntime()
    example = {"features": np.zeros((2, 5, 1), np.float32), LENGTHS: np.array([5, 3])}
    warm_up(runtime, example, outputs=("logits",), max_batch=4, buckets=(4, 8, 100))
    assert runtime.shapes == [(1, 4, 1), (2, 4, 1), (4, 4, 1), (1, 8, 1), (2, 8, 1), (1, 100, 1)]


@pytest.mark.usefixtures("_no_gpu")
def test_a_batch_that_does_not_fit_before_the_first_request_is_named() -> None:
    with pytest.raises(BundleError, match="memory of cuda:0 ran out with a batch of 4 samples;"):
        warm_up(SmallRuntime(3), EXAMPLE, outputs=("logits",), max_batch=12, buckets=())


@pytest.mark.parametrize(
    ("length", "rows", "lengths"),
    [
        (2, [[1, 2], [4, 5]], [2, 1]),
        (3, [[1, 2, 3], [4, 5, 0]], [3, 1]),
        (5, [[1, 2, 3, 1, 2], [4, 5, 0, 4, 5]], [5, 5]),
    ],
)
def test_samples_are_cut_or_repeated_to_a_length(length: int, rows: list[list[int]], lengths: list[int]) -> None:
    fitted = fit_length({"x": np.array([[1, 2, 3], [4, 5, 0]]), LENGTHS: np.array([3, 1])}, length)
    np.testing.assert_array_equal(fitted["x"], rows)
    np.testing.assert_array_equal(fitted[LENGTHS], lengths)
