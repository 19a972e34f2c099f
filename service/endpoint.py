"""An endpoint: a task, a bundle, a runtime and a batcher under one name."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from service.batcher import Batcher, Ticket
from service.bundle import Bundle, Manifest
from service.collate import LENGTHS
from service.errors import BundleError, ModelFailed, ServiceError
from service.metrics import Metrics, ModelMetrics
from service.runtimes import RUNTIMES
from service.runtimes.native import find_native_library
from service.runtimes.runtime import Runtime
from service.runtimes.warmup import find_max_batch
from service.sample import Arrays, Sample
from service.settings import Settings, list_cores
from service.tasks import TASKS
from service.tasks.task import AnyTask

logger = logging.getLogger(__name__)

_Finish = Callable[[Arrays, Sample, BaseModel], bytes]  # a sample and its outputs → the body of the answer


@dataclass(frozen=True, slots=True)
class Answer:
    """What `predict` gives.

    Attributes:
        body: the task's result as JSON, or drawn.
        media_type: of the body.
        times: stage → seconds.
    """

    body: bytes
    media_type: str
    times: dict[str, float]


class Endpoint:
    """A served bundle.

    Args:
        task: decodes and answers.
        spec: the manifest's, checked by the task.
        bundle: what is served.
        runtime: runs its program.
        batcher: its queue.
        metrics: of this model.
        decode_pool: threads shared by all endpoints.
    """

    def __init__(
        self,
        task: AnyTask,
        spec: BaseModel,
        bundle: Bundle,
        runtime: Runtime,
        batcher: Batcher,
        *,
        metrics: ModelMetrics,
        decode_pool: ThreadPoolExecutor,
    ) -> None:
        self.task, self.spec, self.bundle, self.runtime, self.metrics = task, spec, bundle, runtime, metrics
        self._batcher, self._decode_pool = batcher, decode_pool

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self.bundle.manifest

    async def predict(
        self, body: bytes, media_type: str, options: BaseModel, *, timeout_seconds: float, as_picture: bool = False
    ) -> Answer:
        """Answer one request.

        A cancelled call drops what is left of its work.

        Args:
            body: the file as it came.
            media_type: as named by the client, or "" where it named none.
            options: the task's `Options`.
            timeout_seconds: after which nobody wants the answer.
            as_picture: whether the answer is drawn, a PNG.
        Raises: ServiceError.
        """
        self.task.check_options(options, self.spec)
        if as_picture:
            self.task.check_drawing(options, self.spec)
        ticket = self._batcher.admit(timeout_seconds)
        self._decode_pool.submit(
            self._decode, ticket, body, media_type, options, self._draw if as_picture else self._answer
        )
        return Answer(await ticket.future, "image/png" if as_picture else "application/json", ticket.times)

    def _decode(self, ticket: Ticket, body: bytes, media_type: str, options: BaseModel, answer: _Finish) -> None:
        if not self._batcher.is_wanted(ticket):
            return
        start = time.monotonic()
        try:
            sample = self.task.decode(body, media_type, self.spec)
            seconds = time.monotonic() - start
            ticket.times["decode"] = seconds
            self.metrics.decode_seconds.observe(seconds)

            def finish(outputs: Arrays) -> bytes:
                return answer(outputs, sample, options)

            self._batcher.put(ticket, sample, self.task.outputs(options, self.spec), finish)
        except ServiceError as error:
            self._batcher.fail(ticket, error)
        except Exception as error:  # the border of the decode thread: whoever waits must be answered
            logger.exception("decode failed")
            failure = ModelFailed("the input could not be decoded, and it is not known why; tell the operator")
            failure.__cause__ = error
            self._batcher.fail(ticket, failure)

    def _answer(self, outputs: Arrays, sample: Sample, options: BaseModel) -> bytes:
        result: BaseModel = self.task.postprocess(
            outputs, sample, self.spec, options, model=self.manifest.name, version=self.manifest.version
        )
        return result.model_dump_json(exclude_none=True).encode()

    def _draw(self, outputs: Arrays, sample: Sample, options: BaseModel) -> bytes:
        return self.task.draw(outputs, sample, self.spec, options)

    def start(self, num_workers: int) -> None:
        """Start the workers, on the event loop that `predict` will be called on."""
        num_workers = num_workers or self.runtime.num_streams
        cores = list_cores()
        # A worker that is moved to another core finds none of its program's weights in that core's cache.
        is_one_per_core = self.runtime.device == "cpu" and num_workers == len(cores)
        self._batcher.start(num_workers, cores if is_one_per_core else ())

    async def drain(self) -> None:
        """Refuse new requests and wait for the accepted ones."""
        await self._batcher.drain()

    def close(self) -> None:
        """End the workers and give the program's memory back."""
        self._batcher.close()
        self.runtime.close()


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
    name = next((name for name in RUNTIMES if name in manifest.programs), None)
    if name is None:
        raise BundleError(
            f"{bundle.folder} has programs for {', '.join(manifest.programs)}; this service runs {', '.join(RUNTIMES)}"
        )
    runtime = RUNTIMES[name](
        bundle.folder / manifest.programs[name],
        device=settings.device,
        native_library=find_native_library(settings.native_library),
    )
    inputs, expected = bundle.read_golden()
    outputs = task.outputs(task.Options(), spec)
    if missing := set(outputs) - expected.keys():
        raise BundleError(f"{bundle.folder} gives {', '.join(expected)}; its task needs {', '.join(sorted(missing))}")
    check_golden(runtime, bundle, inputs, expected)
    max_batch = find_max_batch(
        runtime,
        _shorten(inputs, manifest.length_buckets),
        outputs=outputs,
        limit=manifest.max_batch,
        bundle_sha256=bundle.sha256,
        cache=settings.cache,
    )
    model_metrics = ModelMetrics(metrics, manifest.name)
    metrics.bundle_info.labels(manifest.name, manifest.version, runtime.name, runtime.kernel, bundle.sha256).set(1)
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
    return Endpoint(task, spec, bundle, runtime, batcher, metrics=model_metrics, decode_pool=decode_pool)


def _shorten(inputs: Arrays, buckets: Sequence[int]) -> Arrays:
    """Cut samples to the first bucket: it is what the batch cap counts for."""
    if not buckets:
        return inputs
    return {
        name: np.minimum(array, buckets[0]) if name == LENGTHS else array[:, : buckets[0]]
        for name, array in inputs.items()
    }


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
        is_off = ~np.isclose(found[name], array, atol=golden.atol, rtol=golden.rtol)
        share = float(is_off.mean())
        if share > golden.max_share_off or not np.isfinite(found[name]).all():
            difference = float(np.max(np.abs(found[name] - array)))
            raise BundleError(
                f"{bundle.folder}: {name} differs from golden by {difference:.3g}, {share:.2%} of its numbers by more "
                f"than atol {golden.atol:g} and rtol {golden.rtol:g}; {golden.max_share_off:.2%} may; this machine "
                "does not compute what the model was measured with"
            )
