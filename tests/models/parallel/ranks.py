"""Processes that tests run code on, one a rank, joined by gloo.

They start once for each number of ranks and wait for work: starting them takes longer than most of what they do.
"""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT_SECONDS = 60.0  # for one run; ranks that take longer are ended


class Ranks:
    """A number of ranks at work.

    Args:
        size: G.
    """

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        # Forked from one process that has torch imported, and nothing of the tests' own state.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.device_mesh", "tests.models.parallel.cases"])
        store = str(Path(self._folder.name) / "store")
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function of a module with each rank's number and the arguments; give what each rank returns.

        A rank that ends instead gives None.
        Raises: AssertionError with the traceback of the first rank that raised, or if one takes too long.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = [self._receive(pipe) for pipe in self._pipes]
        for rank, (result, error) in enumerate(answers):
            assert error is None, f"rank {rank}:\n{error}"
            answers[rank] = result
        return answers

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()

    def _receive(self, pipe: Connection) -> tuple[Any, str | None]:
        if not pipe.poll(LIMIT_SECONDS):
            return None, f"no answer within {LIMIT_SECONDS} s"
        try:
            return pipe.recv()
        except EOFError:
            return None, None


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT_SECONDS)
    )
    while True:
        function, args = pipe.recv()
        try:
            answer = function(rank, *args), None
        except Exception:  # noqa: BLE001 - whatever it is, the test is told
            answer = None, traceback.format_exc()
        pipe.send(answer)
