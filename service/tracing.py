"""Traces: one span for a request, one for each of its stages, one for each batch, over OTLP.

Nothing imports this but an application that has a collector: without one, OpenTelemetry's SDK need not be installed,
and a request carries None where its trace would be.

A batch belongs to many requests, so it is a trace of its own: it has a link to each of its requests, and the `run` of
each request has a link to it. Spans are made with the times that were measured anyway, on the thread that measured
them, and sent by a thread of OpenTelemetry's, which drops what the collector is too slow for.

Source: OpenTelemetry's conventions for HTTP spans and for links of batches; W3C Trace Context.
"""

import time
from collections.abc import Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

NAME = "clustered-attention-server"
SEND_SECONDS = 3.0  # for sending spans, trying again included; also how much longer a stop takes without the collector


class Trace:
    """The trace of one request.

    Args:
        provider: makes spans.
        span: of the whole request.

    Attributes:
        span_context: what links name.
    """

    def __init__(self, provider: TracerProvider, span: Span) -> None:
        self._tracer, self._span = provider.get_tracer(NAME), span
        self._context = set_span_in_context(span)
        self.span_context = span.get_span_context()
        # Stages are measured with a clock that never goes back, spans want the time of day.
        self._offset = time.time() - time.monotonic()

    @property
    def trace_id(self) -> str:
        """Hexadecimal, as it stands in the log."""
        return f"{self.span_context.trace_id:032x}"

    def add_stage(self, stage: str, start: float, end: float, *, batch: SpanContext | None = None) -> None:
        """Add a stage, once it is over.

        Args:
            stage: its name.
            start, end: in seconds of `time.monotonic`.
            batch: in which it ran together with others.
        """
        links = [Link(batch)] if batch is not None else None
        span = self._tracer.start_span(stage, context=self._context, links=links, start_time=self._ns(start))
        span.end(end_time=self._ns(end))

    def add_batch(self, others: "Sequence[Trace]", start: float, end: float, *, size: int) -> SpanContext:
        """Add the batch that this request ran in, as a trace of its own.

        Args:
            others: all requests of the batch that have a trace, this one included.
            start, end: in seconds of `time.monotonic`.
            size: samples in the batch.
        """
        links = [Link(other.span_context) for other in others]
        attributes = {"inference.batch_size": size}
        span = self._tracer.start_span(
            "batch", context=Context(), links=links, attributes=attributes, start_time=self._ns(start)
        )
        span.end(end_time=self._ns(end))
        return span.get_span_context()

    def finish(self, *, model: str | None, outcome: str, status: int, request_id: str) -> None:
        """End the span of the request."""
        self._span.set_attributes(
            {"inference.outcome": outcome, "http.response.status_code": status, "inference.request_id": request_id}
        )
        if model is not None:
            self._span.set_attribute("inference.model", model)
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR, outcome))
        self._span.end()

    def _ns(self, seconds: float) -> int:
        return int((seconds + self._offset) * 1e9)


class Tracing:
    """Makes traces and sends them.

    Args:
        processor: gets every span that ended.
    """

    def __init__(self, processor: SpanProcessor) -> None:
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: NAME}))
        self._provider.add_span_processor(processor)

    def begin(self, task: str, traceparent: str) -> Trace:
        """Begin the trace of a request, within the client's own where it has one.

        Args:
            task: that it asks.
            traceparent: the header, or "" where there is none.
        """
        span = self._provider.get_tracer(NAME).start_span(
            f"POST /v1/{task}",
            context=TraceContextTextMapPropagator().extract({"traceparent": traceparent}),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": "POST", "http.route": f"/v1/{task}"},
        )
        return Trace(self._provider, span)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def open_tracing(endpoint: str) -> Tracing:
    """Make what sends traces to a collector.

    Args:
        endpoint: its address, to which `/v1/traces` is added.
    """
    return Tracing(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=SEND_SECONDS)))
