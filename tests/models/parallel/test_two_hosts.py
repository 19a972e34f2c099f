"""Two network namespaces as two hosts, joined by torchrun's rendezvous as docs/parallel.md says."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.golden_files import REPOSITORY

NUM_HOSTS, PER_HOST = 2, 2
PORT, DEVICE = 29511, "sp0"
LIMIT_SECONDS = 100.0


@dataclass(frozen=True)
class Host:
    """A network namespace with one link to the other.

    Attributes:
        namespace: its name.
        address: of its end of the link.
    """

    namespace: str
    address: str

    def run(self, *command: str) -> list[str]:
        """The command that runs another on this host."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def sent_bytes(self) -> int:
        counted = self.run("cat", f"/sys/class/net/{DEVICE}/statistics/tx_bytes")
        return int(subprocess.run(counted, capture_output=True, check=True).stdout)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    names = [f"sp{os.getpid()}{letter}" for letter in "ab"]
    found = [Host(name, f"10.213.77.{i + 1}") for i, name in enumerate(names)]
    ends = [f"v{name}" for name in names]
    commands = [["ip", "netns", "add", name] for name in names]
    commands.append(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]])
    for host, end in zip(found, ends, strict=True):
        commands += [
            ["ip", "link", "set", end, "netns", host.namespace, "name", DEVICE],
            host.run("ip", "address", "add", f"{host.address}/24", "dev", DEVICE),
            host.run("ip", "link", "set", DEVICE, "up"),
            host.run("ip", "link", "set", "lo", "up"),
        ]
    try:
        for command in commands:
            try:
                made = subprocess.run(command, capture_output=True, text=True, check=False)
            except FileNotFoundError:
                pytest.skip("needs the command `ip` of iproute2")
            if made.returncode:
                pytest.skip(f"needs the right to make network namespaces: {' '.join(command)}: {made.stderr.strip()}")
        yield found
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def test_ranks_on_two_hosts_find_each_other_and_give_the_exact_answer(hosts: list[Host], tmp_path: Path) -> None:
    started = []
    for i, host in enumerate(hosts):
        command = host.run(sys.executable, "-m", "torch.distributed.run")
        command += [f"--nnodes={NUM_HOSTS}", f"--nproc-per-node={PER_HOST}", "--rdzv-backend=c10d", "--rdzv-id=test"]
        command += [f"--rdzv-endpoint={hosts[0].address}:{PORT}", f"--local-addr={host.address}"]
        command += [f"--rdzv-conf=is_host={'false' if i else 'true'}"]  # the machine's name leads to neither address
        command += ["-m", "tests.models.parallel.host_rank", str(tmp_path)]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        said = [process.communicate(timeout=LIMIT_SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert [process.returncode for process in started] == [0, 0], said
    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(NUM_HOSTS * PER_HOST)]
    for answer in answers:
        assert {name: error for name, error in answer["errors"].items() if not error <= 1e-5} == {}
        assert answer["ulysses_bytes"] > 0
    # The ring went over the link between the hosts; heads were exchanged within each.
    for host, ranks in zip(hosts, (answers[:PER_HOST], answers[PER_HOST:]), strict=True):
        ring_bytes = sum(answer["ring_bytes"] for answer in ranks)
        assert ring_bytes > 2_000_000
        assert ring_bytes < host.sent_bytes() < 1.2 * ring_bytes
