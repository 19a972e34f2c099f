"""Opening a bundle: its program is loaded, proves itself on the golden vectors, and becomes an endpoint."""

import json
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from pydantic import ValidationError

from service.batcher import Batcher
from service.bundle import Bundle
from service.endpoint import Endpoint
from service.errors import BundleError
from service.metrics import Metrics, ModelDeviceMetrics, ModelMetrics, RankMetrics
from service.runtimes import RUNTIMES
from service.runtimes.by_device import ByDevice, open_on_devices
from service.runtimes.by_length import ByLength
from service.runtimes.native import find_native_library
from service.runtimes.runtime import Runtime
from service.runtimes.sequence_parallel import open_ranks
from service.runtimes.warmup import find_max_batch, find_num_streams, fit_length, warm_up
from service.sample import Arrays
from service.settings import Settings
from service.tasks import TASKS

logger = logging.getLogger(__name__)


def open_endpoint(bundle: Bundle, settings: Settings, metrics: Metrics, decode_pool: ThreadPoolExecutor) -> Endpoint:
    """Load a bundle's program and let it prove itself.

    Args:
        bundle: to be served.
        settings: of this deployment.
        metrics: of the service.
        decode_pool: threads shared by all endpoints.
    Raises: BundleError if the task or every runtime is unknown, the spec or the outputs do not fit the task, the
        program does not load or does not reproduce the golden outputs.
    """
    manifest = bundle.manifest
    task = TASKS.get(manifest.task)
    if task is None:
        raise BundleError(f"{bundle.folder}: unknown task {manifest.task}; known are {', '.join(TASKS)}")
    try:
        spec = task.Spec.model_validate_json(json.dumps(manifest.spec))
    except ValidationError as error:
        raise BundleError(f"{bundle.folder}: spec does not fit {manifest.task}: {error}") from error
    opened = _open_programs(bundle, _choose_runtime(bundle, settings.runtime), settings)
    try:
        ordinary, max_batch = _prove(opened, bundle, task.outputs(task.Options(), spec), settings, metrics)
        runtime = _add_ranks(ordinary, bundle, settings, metrics)
    except Exception:
        for one in opened:
            one.close()  # a service that runs goes on without this bundle
        raise
    model_metrics = ModelMetrics(metrics, manifest.name)
    batcher = Batcher(
        runtime,
        model_metrics,
        max_batch=max_batch,
        max_queue=settings.max_queue,
        max_wait_seconds=settings.max_wait_seconds,
        buckets=manifest.length_buckets,
        short_length=manifest.short_length,
    )
    fields = {"model": manifest.name, "runtime": runtime.name, "device": runtime.device, "max_batch": max_batch}
    logger.info("endpoint opened", extra={"fields": fields})
    return Endpoint(
        task,
        spec,
        bundle,
        runtime,
        batcher,
        metrics=model_metrics,
        decode_pool=decode_pool,
        devices=ordinary if isinstance(ordinary, ByDevice) else None,
    )


def _choose_runtime(bundle: Bundle, setting: str) -> str:
    """Choose what runs a bundle: the runtime that the setting names, at `auto` the first one that it has a program for.

    Raises: BundleError if it has no such program.
    """
    allowed = tuple(RUNTIMES) if setting == "auto" else (setting,)
    name = next((name for name in allowed if name in bundle.manifest.programs), None)
    if name is None:
        raise BundleError(
            f"{bundle.folder} has programs for {', '.join(bundle.manifest.programs)}; this service runs "
            f"{', '.join(allowed)} with SERVICE_RUNTIME={setting}; make one with `python -m export --runtime`"
        )
    return name


def _open_programs(bundle: Bundle, name: str, settings: Settings) -> list[Runtime]:
    """Load a program on the CPU, or on each GPU.

    Raises: BundleError.
    """
    path = bundle.folder / bundle.manifest.programs[name]
    library = find_native_library(settings.native_library)

    def open_one(device: str) -> Runtime:
        return RUNTIMES[name](path, device=device, native_library=library)

    return open_on_devices(open_one, settings.device)


def _prove(
    opened: Sequence[Runtime], bundle: Bundle, outputs: Sequence[str], settings: Settings, metrics: Metrics
) -> tuple[Runtime, int]:
    """Hold a program to its golden outputs on every device, and find how it runs best there.

    Returns: the runtime to use, and the batch cap.
    Raises: BundleError.
    """
    manifest = bundle.manifest
    inputs, expected = bundle.read_golden()
    if missing := set(outputs) - expected.keys():
        raise BundleError(f"{bundle.folder} gives {', '.join(expected)}; its task needs {', '.join(sorted(missing))}")
    for runtime in opened:
        check_golden(runtime, bundle, inputs, expected)
    buckets = manifest.length_buckets
    example = fit_length(inputs, buckets[0]) if buckets else inputs  # what the batch cap counts for
    max_batch = find_max_batch(
        opened[0],
        example,
        outputs=outputs,
        limit=manifest.max_batch,
        bundle_sha256=bundle.sha256,
        cache=settings.cache,
    )
    if opened[0].device == "cpu":
        return opened[0], max_batch
    num_streams = find_num_streams(
        opened[0], example, outputs=outputs, batch=max_batch, bundle_sha256=bundle.sha256, cache=settings.cache
    )
    short = [bucket for bucket in buckets if bucket <= (manifest.short_length or math.inf)]
    for runtime in opened:
        warm_up(runtime, inputs, outputs=outputs, max_batch=max_batch, buckets=short)
    joined = ByDevice(
        opened,
        lambda runtime: check_golden(runtime, bundle, inputs, expected),
        num_streams=settings.workers or num_streams * len(opened),
        metrics=ModelDeviceMetrics(metrics, manifest.name),
    )
    return joined, max_batch


def _add_ranks(ordinary: Runtime, bundle: Bundle, settings: Settings, metrics: Metrics) -> Runtime:
    """Let ranks answer for long samples, if the bundle names them and the settings have some.

    Raises: BundleError if the ranks do not start or do not reproduce the golden outputs; they have ended then.
    """
    manifest = bundle.manifest
    if manifest.long_length is None:
        return ordinary
    if not settings.ranks:
        logger.info("%s: SERVICE_RANKS is 0; the ordinary program takes long samples, too", manifest.name)
        return ordinary
    ranks = open_ranks(bundle, settings, RankMetrics(metrics, manifest.name))
    try:
        check_golden(ranks, bundle, *bundle.read_golden())
    except BundleError:
        ranks.close()
        raise
    fields = {"model": manifest.name, "ranks": settings.ranks, "device": ranks.device, "torch": ranks.version}
    logger.info("ranks opened", extra={"fields": fields})
    return ByLength(ordinary, ranks, long_length=manifest.long_length)


def check_golden(runtime: Runtime, bundle: Bundle, inputs: Arrays, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    """Run the golden inputs and compare.

    Raises: BundleError if the program does not run, or naming the output that is off and by how much.
    """
    golden = bundle.manifest.golden
    try:
        found = runtime.run(inputs, tuple(expected))
    except Exception as error:  # each runtime's library has exceptions of its own
        raise BundleError(f"{bundle.folder}: the program does not run on its golden inputs: {error}") from error
    for name, array in expected.items():
        if not array.size:
            raise BundleError(f"{bundle.folder}: golden {name} is empty and proves nothing; export the bundle again")
        if found[name].shape != array.shape:
            raise BundleError(f"{bundle.folder}: {name} has shape {found[name].shape}, golden has {array.shape}")
        atol = golden.atol_by_output.get(name, golden.atol)
        is_off = ~np.isclose(found[name], array, atol=atol, rtol=golden.rtol)
        share = float(is_off.mean())
        if share > golden.max_share_off or not np.isfinite(found[name]).all():
            difference = float(np.max(np.abs(found[name] - array)))
            raise BundleError(
                f"{bundle.folder}: {name} differs from golden by {difference:.3g}, {share:.2%} of its numbers by more "
                f"than atol {atol:g} and rtol {golden.rtol:g}; {golden.max_share_off:.2%} may; this machine "
                "does not compute what the model was measured with"
            )
