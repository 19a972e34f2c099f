"""A group of processes that share every input: started together, asked together, ended together.

Each is a rank, `python -m models.parallel.worker`, and is spoken to by frames over its standard input and output. This
module knows nothing of models and starts nothing again (`service.runtimes.sequence_parallel`).

What ends a group: a rank that ends, or all ranks saying nothing for as long as the settings allow while an input is
being worked on. A rank that is stuck holds up all others, who wait for its messages, so that is how it shows. Nothing
waits longer than that, and nothing of a group outlives this process, as ranks end when their standard input does.
"""

import io
import logging
import queue
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from service.runtimes.frames import Facts, read_frame, write_frame
from service.sample import Arrays
from service.settings import make_environment

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "models.parallel.worker")
ROOT = Path(__file__).resolve().parents[2]  # where `models` is found
HOST, LOOPBACK = "127.0.0.1", "lo"  # all ranks are on this machine
START_SECONDS = 120.0  # to import torch, find each other and build the model
NUM_LAST_LINES = 20  # of what a rank printed, for the log


class GroupLost(Exception):
    """A rank ended, or all of them are stuck; the group is of no further use."""


@dataclass(frozen=True)
class Cost:
    """What an input took one rank.

    Attributes:
        seconds: in all.
        waiting_seconds: of them, for messages of other ranks.
        sent_bytes: to other ranks.
    """

    seconds: float
    waiting_seconds: float
    sent_bytes: int


class _Report(NamedTuple):
    """A frame that a rank wrote; facts are None if it was its end."""

    rank: int
    facts: Facts | None
    arrays: Arrays


class RankGroup:
    """G processes, from their start to their end.

    Args:
        opening: what each of them has to build, the first frame.
        num_ranks: G.
        timeout_seconds: how long all ranks may say nothing while they work.
        command: that starts a rank; rank 0 also gets the number of a socket that listens at `MASTER_PORT`.

    Attributes:
        ended: set once a rank has ended.
        version, device: as rank 0 tells: of torch, and `cpu` or `cuda`.
    Raises: GroupLost if one of them does not become ready; then all have ended.
    """

    def __init__(
        self, opening: Facts, *, num_ranks: int, timeout_seconds: float, command: Sequence[str] = COMMAND
    ) -> None:
        self.ended = threading.Event()
        self._timeout_seconds = timeout_seconds
        self._reports: queue.SimpleQueue[_Report] = queue.SimpleQueue()
        self._ended_ranks: list[int] = []
        self._last_lines: list[deque[str]] = [deque(maxlen=NUM_LAST_LINES) for _ in range(num_ranks)]
        # The port of the store where ranks find each other, which rank 0 takes over: no other program can take it, and
        # none on another machine can reach it.
        with socket.create_server((HOST, 0), backlog=num_ranks) as listener:
            self.processes = [_start(command, rank, num_ranks, listener) for rank in range(num_ranks)]
        self._threads = [
            threading.Thread(target=function, args=(rank,), name=f"rank-{rank}", daemon=True)
            for rank in range(num_ranks)
            for function in (self._listen, self._keep_lines)
        ]
        for thread in self._threads:
            thread.start()
        try:
            facts, _ = self._ask(opening, {}, answer="ready", patience_seconds=START_SECONDS)
        except BaseException:
            self.close()
            raise
        self.version, self.device = str(facts[0]["version"]), str(facts[0]["device"])

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> tuple[Arrays, list[Cost]]:
        """Ask all ranks; one caller at a time.

        Args:
            inputs: for every rank, whole.
            outputs: names of those wanted.
        Returns: the outputs, and what they took each rank.
        Raises: GroupLost; then all ranks are ending.
        """
        facts, arrays = self._ask(
            {"outputs": list(outputs)}, inputs, answer="done", patience_seconds=self._timeout_seconds
        )
        return arrays, [Cost(float(f["seconds"]), float(f["waiting_seconds"]), int(f["sent_bytes"])) for f in facts]

    def tell_end(self) -> str:
        """Say which rank ended first, how, and what it printed at last; for the log."""
        rank = self._ended_ranks[0]
        with suppress(subprocess.TimeoutExpired):  # it closed its output and is still there
            self.processes[rank].wait(1.0)
        lines = "\n".join(self._last_lines[rank])
        return f"rank {rank} ended with status {self.processes[rank].returncode}" + (
            f" after\n{lines}" if lines else ""
        )

    def close(self) -> None:
        """End all ranks, whatever they do, and wait for their end."""
        self._kill()
        for process in self.processes:
            process.wait()
        for thread in self._threads:
            thread.join()
        for process in self.processes:
            for pipe in (process.stdin, process.stdout, process.stderr):
                with suppress(OSError):  # what was not flushed can go nowhere
                    assert pipe is not None
                    pipe.close()

    def _ask(self, facts: Facts, arrays: Arrays, *, answer: str, patience_seconds: float) -> tuple[list[Facts], Arrays]:
        # Each rank has a sender of its own: one that does not read must not keep the others waiting.
        senders = [
            threading.Thread(target=self._send, args=(rank, facts, arrays), daemon=True)
            for rank in range(len(self.processes))
        ]
        for sender in senders:
            sender.start()
        try:
            return self._collect(answer, patience_seconds)
        except GroupLost:
            self._kill()  # the senders' pipes break
            raise
        finally:
            for sender in senders:
                sender.join()

    def _collect(self, answer: str, patience_seconds: float) -> tuple[list[Facts], Arrays]:
        found: dict[int, Facts] = {}
        outputs: Arrays = {}
        while len(found) < len(self.processes):
            try:
                rank, facts, arrays = self._reports.get(timeout=patience_seconds)
            except queue.Empty:
                raise GroupLost(f"all ranks were silent for {patience_seconds:g} s") from None
            if facts is None:
                raise GroupLost(self.tell_end())
            if facts.get("kind") == answer:
                found[rank] = facts
                outputs |= arrays
        return [found[rank] for rank in range(len(found))], outputs

    def _send(self, rank: int, facts: Facts, arrays: Arrays) -> None:
        pipe = self.processes[rank].stdin
        assert isinstance(pipe, io.BufferedWriter)
        try:
            write_frame(pipe, facts, arrays)
        except (OSError, ValueError):  # it ended, or `close` closed the pipe; whoever listens to it notices
            logger.debug("rank %d takes nothing any longer", rank)

    def _listen(self, rank: int) -> None:
        pipe = self.processes[rank].stdout
        assert isinstance(pipe, io.BufferedReader)
        try:
            while True:
                self._reports.put(_Report(rank, *read_frame(pipe)))
        except (EOFError, OSError, ValueError, TypeError):  # its end, or no frame
            self._ended_ranks.append(rank)
            self._reports.put(_Report(rank, None, {}))
            self.ended.set()

    def _keep_lines(self, rank: int) -> None:
        pipe = self.processes[rank].stderr
        assert pipe is not None
        for line in pipe:
            text = line.decode(errors="replace").rstrip()
            self._last_lines[rank].append(text)
            logger.debug("rank %d: %s", rank, text)

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()


def _start(command: Sequence[str], rank: int, num_ranks: int, listener: socket.socket) -> "subprocess.Popen[bytes]":
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": num_ranks,
        "MASTER_ADDR": HOST,
        "MASTER_PORT": listener.getsockname()[1],
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "NCCL_SOCKET_IFNAME": LOOPBACK,  # left to itself, it takes another interface where there is one
        "TORCHELASTIC_USE_AGENT_STORE": True,  # all ranks are clients of the store, rank 0 as well
    }
    inherited = [listener.fileno()] if rank == 0 else []
    return subprocess.Popen(  # noqa: S603 - this program
        [*command, *map(str, inherited)],
        cwd=ROOT,
        env=make_environment(**{name: str(value) for name, value in variables.items()}),
        pass_fds=inherited,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is the service's, which finishes what it accepted
    )
