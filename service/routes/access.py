"""One request as metrics, log and traces see it."""

import time
from typing import TYPE_CHECKING, Any

from fastapi import Request

from service.endpoint import Answer, Endpoint
from service.logs import find_trace_id, log_request
from service.metrics import Metrics
from service.routes.headers import find_header
from service.routes.problems import find_request_id

if TYPE_CHECKING:
    from service.tracing import Tracing


class Access:
    """A request from its arrival to its answer.

    Args:
        request: that came.
        task: that it asks.
        metrics: of the service.
        tracing: makes traces, if there are any.

    Attributes:
        start: when it came, in seconds of `time.monotonic`.
        request_id: the client's or one of ours.
        trace: of this request, if there are traces.
    """

    def __init__(self, request: Request, task: str, metrics: Metrics, tracing: "Tracing | None") -> None:
        self.start = time.monotonic()
        self.request_id = find_request_id(request)
        traceparent = find_header(request, b"traceparent")
        self.trace = tracing.begin(task, traceparent) if tracing is not None else None
        self._trace_id = self.trace.trace_id if self.trace is not None else find_trace_id(traceparent)
        self._metrics = metrics
        self._endpoint: Endpoint | None = None

    def hold(self, endpoint: Endpoint) -> None:
        """Keep the endpoint that was found until `release`, whatever is served instead meanwhile."""
        self._endpoint = endpoint
        endpoint.hold()

    def release(self) -> None:
        """Let go of the endpoint: the request is answered."""
        if self._endpoint is not None:
            self._endpoint.release()

    def describe(self) -> dict[str, Any]:
        """What names the request in the log."""
        fields: dict[str, Any] = {"request_id": self.request_id}
        if self._trace_id is not None:
            fields["trace_id"] = self._trace_id
        return fields

    def record(self, answer: Answer | None, outcome: str, status: int) -> None:
        """Count, log and trace what became of it.

        Args:
            answer: if there is one.
            outcome: `ok`, `cancelled` or an error code.
            status: of the response.
        """
        seconds = time.monotonic() - self.start
        fields = self.describe() | {"outcome": outcome, "status": status}
        model = None
        if self._endpoint is not None:
            model = fields["model"] = self._endpoint.manifest.name
            self._endpoint.metrics.count(outcome)
            if outcome == "ok":
                self._endpoint.metrics.request_seconds.observe(seconds)
        else:
            self._metrics.count_refusal(outcome)
        fields["seconds"] = round(seconds, 6)
        if answer is not None:
            fields |= {f"{stage}_seconds": round(value, 6) for stage, value in answer.times.items()}
        log_request(fields)
        if self.trace is not None:
            self.trace.finish(model=model, outcome=outcome, status=status, request_id=self.request_id)
