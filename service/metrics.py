"""Every metric of the service, in one registry that the application owns."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# From a small model's millisecond to the longest deadline.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
RATIOS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
STAGES = ("decode", "queue", "run", "postprocess")


class Metrics:
    """The service's metrics; labels are closed sets: model names, stages, outcomes.

    Attributes:
        registry: holds them all, for `/metrics`.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "inference_requests_total",
            "Requests by outcome: ok, cancelled, or an error code.",
            ("model", "outcome"),
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "inference_request_duration_seconds",
            "From the first byte of the request to the last of the answer, successful requests.",
            ("model",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "inference_stage_duration_seconds",
            "Time of one sample in decode, queue and postprocess, and of one batch in run.",
            ("model", "stage"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "inference_batch_size", "Samples in a batch.", ("model",), buckets=BATCH_SIZES, registry=self.registry
        )
        self.batch_padding_ratio = Histogram(
            "inference_batch_padding_ratio",
            "Share of a batch that is padding.",
            ("model",),
            buckets=RATIOS,
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "inference_queue_depth", "Accepted requests without an answer yet.", ("model",), registry=self.registry
        )
        self.bundle_info = Gauge(
            "inference_bundle_info",
            "Always 1; what is served.",
            ("model", "version", "runtime", "kernel", "sha256"),
            registry=self.registry,
        )


class ModelMetrics:
    """The metrics of one model, looked up once: finding a labelled child costs more than updating it."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._requests, self._model = metrics.requests, model
        self.request_seconds = metrics.request_seconds.labels(model)
        decode, queue, run, postprocess = (metrics.stage_seconds.labels(model, stage) for stage in STAGES)
        self.decode_seconds, self.queue_seconds, self.run_seconds, self.postprocess_seconds = (
            decode,
            queue,
            run,
            postprocess,
        )
        self.batch_size = metrics.batch_size.labels(model)
        self.batch_padding_ratio = metrics.batch_padding_ratio.labels(model)
        self.queue_depth = metrics.queue_depth.labels(model)

    def count(self, outcome: str) -> None:
        """Count one finished request: `ok`, `cancelled` or an error code."""
        self._requests.labels(self._model, outcome).inc()
