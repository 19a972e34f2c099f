"""Settings of one deployment, read once from the environment: `SERVICE_<NAME>`.

Facts about a model stand in its manifest and what one request wants in its query; neither can be set here.
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """How this deployment runs; every field can be set as `SERVICE_<NAME>`."""

    model_config = SettingsConfigDict(
        env_prefix="SERVICE_",
        env_ignore_empty=True,  # what compose files make of a variable that is not set
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
    )

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    bundles: Path = Field(default=Path("bundles"), description="Folder whose subfolders are the bundles to serve.")
    cache: Path = Field(default=Path("build/cache"), description="Folder for what warm-up found out; safe to delete.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="What programs run on; auto takes CUDA where it works, cuda refuses to start else."
    )
    native_library: Path | None = Field(
        default=None,
        description="Library of the native CPU kernels; by default the newest under `build/native`, if there is one.",
    )
    workers: int = Field(
        default=0, ge=0, le=256, description="Batches in flight per model; 0 is one per CPU core, or two on CUDA."
    )
    decode_threads: int = Field(
        default=0, ge=0, le=256, description="Threads that decode inputs; 0 is one per CPU core."
    )
    max_queue: int = Field(default=256, ge=1, description="Accepted requests per model; one more is answered 503.")
    max_wait_seconds: float = Field(
        default=0.0, ge=0, le=10, description="How long a free worker waits for a fuller batch; 0 never waits."
    )
    request_timeout_seconds: float = Field(
        default=30.0, gt=0, description="Deadline of a request that states none, and the longest it may state."
    )
    body_timeout_seconds: float = Field(default=30.0, gt=0, description="Time a client has to send its whole body.")
    drain_seconds: float = Field(default=30.0, gt=0, description="Time accepted requests have to finish at stop.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe log line."
    )


def find_unknown_variables() -> list[str]:
    """Name the `SERVICE_*` variables of the environment that set nothing: a typo would go unseen otherwise."""
    known = {f"SERVICE_{name}".upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.upper().startswith("SERVICE_") and name.upper() not in known)


def count_cores() -> int:
    """Count the CPU cores that this process may use."""
    return len(list_cores()) or os.cpu_count() or 1


def list_cores() -> list[int]:
    """Number the CPU cores that this process may use; none where the operating system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
