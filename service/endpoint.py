"""An endpoint: a task, a bundle, a runtime and a batcher under one name; `opening.py` makes one of a bundle."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel

from service.batcher import Batcher
from service.bundle import Bundle, Manifest
from service.errors import ModelFailed, ServiceError
from service.metrics import ModelMetrics
from service.runtimes.by_device import ByDevice
from service.runtimes.runtime import Runtime
from service.sample import Arrays, Sample
from service.settings import list_cores
from service.tasks.task import AnyTask
from service.ticket import Ticket

if TYPE_CHECKING:
    from service.tracing import Trace

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
        devices: the part of the runtime that spreads batches over GPUs; None on the CPU.
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
        devices: ByDevice | None = None,
    ) -> None:
        self.task, self.spec, self.bundle, self.runtime, self.metrics = task, spec, bundle, runtime, metrics
        self._batcher, self._decode_pool, self._devices = batcher, decode_pool, devices
        self._num_holders = 0
        self._freed: asyncio.Event | None = None

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self.bundle.manifest

    @property
    def lost_devices(self) -> list[str]:
        """The GPUs that failed and take no batches."""
        return self._devices.lost_devices if self._devices is not None else []

    def check_devices(self) -> None:
        """Refuse if no GPU is left.

        Raises: DeviceLost.
        """
        if self._devices is not None:
            self._devices.check()

    async def predict(
        self,
        body: bytes,
        media_type: str,
        options: BaseModel,
        *,
        timeout_seconds: float,
        as_picture: bool = False,
        request_id: str = "",
        trace: "Trace | None" = None,
    ) -> Answer:
        """Answer one request.

        A cancelled call drops what is left of its work.

        Args:
            body: the file as it came.
            media_type: as named by the client, or "" where it named none.
            options: the task's `Options`.
            timeout_seconds: after which nobody wants the answer.
            as_picture: whether the answer is drawn, a PNG.
            request_id: for the log.
            trace: gets a span for each stage, where there are traces.
        Raises: ServiceError.
        """
        self.task.check_options(options, self.spec)
        if as_picture:
            self.task.check_drawing(options, self.spec)
        self.check_devices()
        ticket = self._batcher.admit(timeout_seconds)
        ticket.request_id, ticket.trace = request_id, trace
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
            if ticket.trace is not None:
                ticket.trace.add_stage("decode", start, start + seconds)

            def finish(outputs: Arrays) -> bytes:
                return answer(outputs, sample, options)

            self._batcher.put(ticket, sample, self.task.outputs(options, self.spec), finish)
        except ServiceError as error:
            self._batcher.fail(ticket, error)
        except Exception as error:  # the border of the decode thread: whoever waits must be answered
            logger.exception("decode failed", extra={"fields": {"request_id": ticket.request_id}})
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

    def hold(self) -> None:
        """Count a request that found this endpoint, though its body may still be on the way; on the event loop."""
        self._num_holders += 1

    def release(self) -> None:
        """Count it as answered."""
        self._num_holders -= 1
        if self._freed is not None and not self._num_holders:
            self._freed.set()

    async def retire(self) -> None:
        """Wait, when no more requests find this endpoint, until those that found it are answered."""
        if self._num_holders:
            self._freed = asyncio.Event()
            await self._freed.wait()  # each of them ends by its deadline
        await self.drain()

    async def drain(self) -> None:
        """Refuse new requests and wait for the accepted ones."""
        await self._batcher.drain()

    def give_up(self) -> None:
        """Answer the accepted ones with `NotReady`."""
        self._batcher.give_up()

    def close(self) -> None:
        """End the workers and give the program's memory back."""
        self._batcher.close()
        self.runtime.close()
