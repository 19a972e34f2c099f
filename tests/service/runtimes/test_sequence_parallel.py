import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service.bundle import Bundle, open_bundle
from service.errors import BundleError, RanksLost
from service.metrics import Metrics, RankMetrics
from service.runtimes import sequence_parallel
from service.runtimes.frames import Facts
from service.runtimes.rank_group import GroupLost, RankGroup
from service.runtimes.sequence_parallel import SequenceParallelRuntime, open_ranks
from service.settings import Settings
from tests.service.runtimes.fake_rank import SLEEP
from tests.service.runtimes.test_rank_group import COMMAND, OUTPUTS, make_inputs, start_group
from tests.service.server_process import eventually

MODEL = "tiny"


class Groups:
    """Starts groups of two ranks, unless it is told to fail."""

    def __init__(self) -> None:
        self.started: list[RankGroup] = []
        self.num_tries = 0
        self.fails = threading.Event()

    def __call__(self) -> RankGroup:
        self.num_tries += 1
        if self.fails.is_set():
            raise GroupLost("no memory")
        self.started.append(start_group())
        return self.started[-1]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Groups:
    monkeypatch.setattr(sequence_parallel, "LONGEST_PAUSE_SECONDS", 0.05)
    return Groups()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def runtime(groups: Groups, metrics: Metrics) -> Iterator[SequenceParallelRuntime]:
    opened = SequenceParallelRuntime(groups, RankMetrics(metrics, MODEL))
    yield opened
    opened.close()


def read_metric(metrics: Metrics, name: str) -> float:
    value = metrics.registry.get_sample_value(f"inference_{name}", {"model": MODEL})
    assert value is not None
    return value


def test_an_answer_is_counted_by_what_it_took_the_ranks(runtime: SequenceParallelRuntime, metrics: Metrics) -> None:
    outputs = runtime.run(make_inputs(), OUTPUTS)
    np.testing.assert_array_equal(outputs["y"], 2 * np.arange(5))
    assert (runtime.name, runtime.version, runtime.device) == ("sequence_parallel", "3.2.1", "cpu")
    assert read_metric(metrics, "ranks_ready") == 2
    assert read_metric(metrics, "rank_sent_bytes_total") == 20
    assert read_metric(metrics, "rank_waiting_seconds_total") == 2
    assert read_metric(metrics, "rank_imbalance_ratio_sum") == pytest.approx(3 / 2.5 - 1)  # own seconds: 2 and 3


def test_a_lost_group_fails_its_input_and_is_replaced(
    runtime: SequenceParallelRuntime, groups: Groups, metrics: Metrics
) -> None:
    threading.Timer(0.1, groups.started[0].processes[1].kill).start()
    with pytest.raises(RanksLost, match=r"ended; every other input is answered; send it again in \d+ s") as caught:
        runtime.run(make_inputs(SLEEP), OUTPUTS)
    assert caught.value.retry_after_seconds >= 1
    eventually(lambda: len(groups.started) == 2 and read_metric(metrics, "ranks_ready") == 2)
    assert runtime.run(make_inputs(), OUTPUTS).keys() == set(OUTPUTS)
    assert all(process.returncode is not None for process in groups.started[0].processes)


def test_a_rank_that_ends_idle_is_replaced_and_meanwhile_every_input_is_refused(
    runtime: SequenceParallelRuntime, groups: Groups, metrics: Metrics
) -> None:
    groups.fails.set()
    groups.started[0].processes[0].kill()
    eventually(lambda: groups.num_tries >= 3)
    assert read_metric(metrics, "ranks_ready") == 0
    with pytest.raises(RanksLost, match="starting again"):
        runtime.run(make_inputs(), OUTPUTS)
    groups.fails.clear()
    eventually(lambda: read_metric(metrics, "ranks_ready") == 2)
    runtime.run(make_inputs(), OUTPUTS)


@pytest.mark.parametrize("is_down", [False, True])
def test_closing_ends_the_ranks_for_good(groups: Groups, metrics: Metrics, is_down: bool) -> None:
    runtime = SequenceParallelRuntime(groups, RankMetrics(metrics, MODEL))
    if is_down:
        groups.fails.set()
        groups.started[0].processes[0].kill()
        eventually(lambda: groups.num_tries >= 2)
    runtime.close()
    num_tries = groups.num_tries
    assert read_metric(metrics, "ranks_ready") == 0
    assert all(process.returncode is not None for process in groups.started[0].processes)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank")]
    assert groups.num_tries == num_tries


def test_ranks_without_torch_refuse_to_start(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_parallel, "find_spec", lambda name: None)
    with pytest.raises(BundleError, match="SERVICE_RANKS=2, but torch and safetensors is not installed"):
        open_ranks(open_bundle(tiny_bundle), Settings(ranks=2), RankMetrics(Metrics(), MODEL))


def open_parallel_bundle(folder: Path) -> Bundle:
    """The bundle, as if its model could be spread over ranks."""
    bundle = open_bundle(folder)
    programs = {"onnx": "model.onnx", "sequence_parallel": "weights.safetensors"}
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"programs": programs}))


def test_ranks_run_on_the_gpus_that_are_named(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openings: list[Facts] = []

    def start(opening: Facts, *, num_ranks: int, timeout_seconds: float) -> RankGroup:
        openings.append(opening)
        return RankGroup(opening | {"version": "1"}, num_ranks=num_ranks, timeout_seconds=30.0, command=COMMAND)

    monkeypatch.setattr(sequence_parallel, "RankGroup", start)
    settings = Settings(ranks=2, device="cuda:1,cuda:3,cuda:0")
    open_ranks(open_parallel_bundle(tiny_bundle), settings, RankMetrics(Metrics(), MODEL)).close()
    (opening,) = openings
    assert opening["device"] == "cuda:1,cuda:3,cuda:0"  # the worker takes them in this order


def test_more_ranks_than_gpus_that_are_named_refuse_the_bundle(tiny_bundle: Path) -> None:
    settings = Settings(ranks=3, device="cuda:1,cuda:3")
    with pytest.raises(BundleError, match=r"needs a GPU of its own; name as many GPUs, or set SERVICE_RANKS=2$"):
        open_ranks(open_parallel_bundle(tiny_bundle), settings, RankMetrics(Metrics(), MODEL))


def test_ranks_that_do_not_start_refuse_the_bundle(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(opening: object, **_: object) -> RankGroup:
        raise GroupLost("rank 0 ended with status 1")

    monkeypatch.setattr(sequence_parallel, "RankGroup", fail)
    with pytest.raises(BundleError, match="do not start: rank 0 ended with status 1"):
        open_ranks(open_parallel_bundle(tiny_bundle), Settings(ranks=2), RankMetrics(Metrics(), MODEL))
