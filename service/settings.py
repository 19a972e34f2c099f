"""Settings of one deployment, read once from the environment: `SERVICE_<NAME>`.

Facts about a model stand in its manifest and what one request wants in its query; neither can be set here.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

# A scheme and a host, as browsers send it: RFC 6454, section 7; or any.
_ORIGIN = re.compile(r"https?://[a-z0-9.\-]+(:\d+)?|https?://\[[0-9a-f:]+\](:\d+)?|\*")

_GPU = re.compile(r"cuda:(0|[1-9]\d?)")


def _check_device(given: str) -> str:
    """Bring a list of GPUs into one spelling, without blanks.

    Raises: ValueError naming what is no device.
    """
    devices = [part.strip() for part in given.split(",")]
    if len(devices) == 1 and devices[0] in {"auto", "cpu", "cuda"}:
        return devices[0]
    for device in devices:
        if not _GPU.fullmatch(device):
            raise ValueError(f"{device!r} is no GPU; auto, cpu, cuda or a list such as cuda:0,cuda:1 was expected")
        if devices.count(device) > 1:
            raise ValueError(f"{device} stands twice in the list; name each GPU once")
    return ",".join(devices)


def _check_metrics_port(port: int, info: ValidationInfo) -> int:
    """Refuse the port of all else.

    Raises: ValueError.
    """
    if port and port == info.data.get("port"):
        raise ValueError("that is SERVICE_PORT; set another one, or 0 for no port of its own")
    return port


def _split_origins(given: Any) -> Any:
    """Read a list that is separated by commas.

    Raises: ValueError naming an origin that no browser sends.
    """
    origins = tuple(part.strip() for part in given.split(",") if part.strip()) if isinstance(given, str) else given
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(f"{origin!r} is no origin; scheme and host were expected, such as https://example.org")
    return origins


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
    metrics_port: Annotated[int, AfterValidator(_check_metrics_port)] = Field(
        default=0, ge=0, le=65535, description="Port for /metrics, and for /health as well; 0 is the port of all else."
    )
    bundles: Path = Field(default=Path("bundles"), description="Folder whose subfolders are the bundles to serve.")
    watch_seconds: float = Field(
        default=0.0, ge=0, description="How often the bundles' folder is looked at for changes; 0 is never."
    )
    api_keys_file: Path | None = Field(
        default=None, description="File of API keys, one a line; where it is set, a request needs one of them."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_origins)] = Field(
        default=(), description="Origins whose pages may call this service, separated by commas; by default none."
    )
    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s/]+[^\s?#]*$",
        description="Collector of OpenTelemetry traces (OTLP over HTTP); by default there are no traces.",
    )
    cache: Path = Field(default=Path("build/cache"), description="Folder for what warm-up found out; safe to delete.")
    device: Annotated[str, AfterValidator(_check_device)] = Field(
        default="auto",
        description="What programs run on: cpu; cuda, every GPU; cuda:0,cuda:1, these; auto, GPUs where they work.",
    )
    runtime: Literal["auto", "onnx", "torchscript"] = Field(
        default="auto", description="What runs programs; auto takes a bundle's ONNX program where it has one."
    )
    native_library: Path | None = Field(
        default=None,
        description="Library of the native CPU kernels; by default the newest under `build/native`, if there is one.",
    )
    workers: int = Field(
        default=0,
        ge=0,
        le=256,
        description="Batches in flight per model; 0 is one per CPU core, or what warm-up finds best.",
    )
    decode_threads: int = Field(
        default=0, ge=0, le=256, description="Threads that decode inputs; 0 is one per CPU core."
    )
    ranks: int = Field(
        default=0,
        ge=0,
        le=256,
        description="Processes that share one long recording; they need torch. 0 leaves it to the ordinary program.",
    )
    rank_timeout_seconds: float = Field(
        default=120.0, gt=0, description="How long a rank may say nothing of its work before all of them start again."
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


def make_environment(**variables: str) -> dict[str, str]:
    """Build the environment of a process that the service starts: this one's, with these and without our settings."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith("SERVICE_")} | variables


def count_cores() -> int:
    """Count the CPU cores that this process may use."""
    return len(list_cores()) or os.cpu_count() or 1


def list_cores() -> list[int]:
    """Number the CPU cores that this process may use; none where the operating system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
