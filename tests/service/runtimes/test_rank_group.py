import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from service.runtimes.rank_group import Cost, GroupLost, RankGroup
from service.sample import Arrays
from tests.service.runtimes.fake_rank import FAIL, FAULT, SLEEP, WELL

COMMAND = (sys.executable, "-m", "tests.service.runtimes.fake_rank")
OPENING = {"version": "3.2.1"}
TIMEOUT_SECONDS = 1.0
OUTPUTS = ("y", "z")


def make_inputs(wish: int = WELL, *, size: int = 5) -> Arrays:
    return {"wish": np.array([wish]), "x": np.arange(size, dtype=np.float32)}


def start_group(*, timeout_seconds: float = 30.0) -> RankGroup:
    return RankGroup(OPENING, num_ranks=2, timeout_seconds=timeout_seconds, command=COMMAND)


@pytest.fixture
def group() -> Iterator[RankGroup]:
    started = start_group()
    yield started
    started.close()


def test_every_rank_is_asked_and_rank_0_answers(group: RankGroup) -> None:
    assert (group.version, group.device) == ("3.2.1", "cpu")
    for _ in range(2):
        outputs, costs = group.run(make_inputs(), OUTPUTS)
        assert outputs.keys() == set(OUTPUTS)
        np.testing.assert_array_equal(outputs["z"], 2 * np.arange(5, dtype=np.float32), strict=True)
        assert costs == [Cost(3.0, 1.0, 10), Cost(4.0, 1.0, 10)]
    assert not group.ended.is_set()


def test_inputs_larger_than_a_pipe_go_through(group: RankGroup) -> None:
    outputs, _ = group.run(make_inputs(size=1_000_000), ["y"])
    np.testing.assert_array_equal(outputs["y"], 2 * np.arange(1_000_000, dtype=np.float32))


def test_a_rank_that_is_killed_amid_an_input_loses_the_group_at_once(group: RankGroup) -> None:
    threading.Timer(0.2, group.processes[1].kill).start()
    begun = time.monotonic()
    with pytest.raises(GroupLost, match="rank 1 ended with status -9"):
        group.run(make_inputs(SLEEP), OUTPUTS)
    assert time.monotonic() - begun < 10
    assert group.ended.wait(10)
    assert all(process.wait(10) for process in group.processes)


def test_what_a_rank_printed_at_last_is_told(group: RankGroup) -> None:
    with pytest.raises(GroupLost, match="rank 1 ended with status 1"):
        group.run(make_inputs(FAIL), OUTPUTS)
    group.close()
    assert FAULT in group.tell_end()


@pytest.mark.parametrize("size", [5, 1_000_000], ids=["small", "larger than a pipe"])
def test_a_rank_that_is_stuck_loses_the_group_after_the_stated_time(size: int) -> None:
    group = start_group(timeout_seconds=TIMEOUT_SECONDS)
    os.kill(group.processes[1].pid, signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(GroupLost, match="silent for 1 s"):
        group.run(make_inputs(size=size), OUTPUTS)
    assert TIMEOUT_SECONDS <= time.monotonic() - begun < 10 * TIMEOUT_SECONDS
    group.close()
    assert [process.returncode for process in group.processes] == [-9, -9]


def test_a_group_that_does_not_start_leaves_nothing_behind() -> None:
    before = threading.active_count()
    with pytest.raises(GroupLost, match=r"rank \d ended with status 3"):
        RankGroup(OPENING, num_ranks=2, timeout_seconds=30.0, command=(sys.executable, "-c", "exit(3)"))
    assert threading.active_count() == before


def test_a_rank_sees_no_setting_of_the_service(group: RankGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_API_KEYS_FILE", "secret")
    other = start_group()
    environment = Path(f"/proc/{other.processes[1].pid}/environ").read_bytes()
    other.close()
    assert b"SERVICE_" not in environment
    assert b"RANK=1" in environment.split(b"\0")


def test_ranks_talk_over_the_loopback_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    group = start_group()
    variables = Path(f"/proc/{group.processes[0].pid}/environ").read_bytes().split(b"\0")
    group.close()
    assert {b"MASTER_ADDR=127.0.0.1", b"GLOO_SOCKET_IFNAME=lo", b"NCCL_SOCKET_IFNAME=lo"} <= set(variables)
    assert sum(variable.startswith(b"NCCL_SOCKET_IFNAME=") for variable in variables) == 1


def test_closing_ends_every_rank_and_thread(group: RankGroup) -> None:
    group.close()
    assert [process.returncode for process in group.processes] == [-9, -9]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank-")]
