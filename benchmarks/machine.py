"""What a result depends on besides the code: hardware, versions, commit, and what else the machine was doing."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from service.settings import count_cores

PACKAGES = (
    "onnxruntime-gpu",
    "onnxruntime",
    "torch",
    "numpy",
    "pillow",
    "fastapi",
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
)
RESULTS = Path("benchmarks/results")

_TICKS = os.sysconf("SC_CLK_TCK")
# Words of a processor's name that tell nothing about it.
_NOISE = re.compile(r"\((r|tm)\)|@.*|\b(amd|intel|cpu|processor|\d+-core|with .*)", re.IGNORECASE)


class CoreSeconds(NamedTuple):
    """CPU time since the machine started, summed over cores.

    Attributes:
        busy: all processes.
        stolen: what the hypervisor gave to other machines.
    """

    busy: float
    stolen: float


def read_core_seconds() -> CoreSeconds:
    """Read the kernel's count of CPU time."""
    fields = [int(field) / _TICKS for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _wait, interrupt, soft_interrupt, stolen = fields[:8]
    return CoreSeconds(user + nice + system + interrupt + soft_interrupt, stolen)


def read_process_seconds(process_id: int) -> float:
    """CPU time of a process, user and system."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def processor() -> str:
    """Name of the processor."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def hardware_name(processor_name: str, num_cores: int) -> str:
    """Short name for file names: `epyc-7763-2c`."""
    words = re.findall(r"[a-z0-9]+", _NOISE.sub(" ", processor_name).lower())
    return "-".join((*words, f"{num_cores}c"))


def result_path(what: str) -> Path:
    """Where a result of this machine and month lies."""
    return RESULTS / f"{what}_{hardware_name(processor(), count_cores())}_{datetime.now(UTC):%Y%m}.md"


def describe_setting(command: str) -> str:
    """Command, commit, machine and versions as a Markdown list."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES if _is_installed(name))
    return f"""- Command: `{command}`
- Commit: {_commit()}
- Date: {datetime.now(UTC):%Y-%m-%d}
- Machine: {processor()}, {count_cores()} cores, Linux {platform.release()}
- Versions: Python {platform.python_version()}, {versions}"""


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except ModuleNotFoundError:
        return False
    return True


def _commit() -> str:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "none yet"
    changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    code = [line for line in changes.splitlines() if "benchmarks/results/" not in line]
    return head.stdout.strip() + (" with uncommitted changes" if code else "")
