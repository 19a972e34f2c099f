"""Every metric of the service, in one registry that the application owns."""

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from service.devices import Devices

# From a small model's millisecond to the longest deadline.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
RATIOS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
STAGES = ("decode", "queue", "run", "postprocess")
DROPS = ("expired", "abandoned")


class Metrics:
    """The service's metrics; labels are closed sets: names of models that are served, stages, outcomes and the like.

    Those of the process and of Python come from prometheus-client, under the names that all its users know.

    Attributes:
        registry: holds them all, for `/metrics`.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "inference_requests_total",
            "Requests by outcome: ok, cancelled, or an error code; without a model where none was found for them.",
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
        self.queue_limit = Gauge(
            "inference_queue_limit",
            "Accepted requests without an answer that there may be; one more is refused.",
            ("model",),
            registry=self.registry,
        )
        self.batches_in_flight = Gauge(
            "inference_batches_in_flight", "Batches that run or are answered.", ("model",), registry=self.registry
        )
        self.workers = Gauge("inference_workers", "Batches that may run at once.", ("model",), registry=self.registry)
        self.drops = Counter(
            "inference_drops_total",
            "Accepted requests that nobody waits for any more: the deadline passed (expired) or the client left "
            "(abandoned).",
            ("model", "reason"),
            registry=self.registry,
        )
        self.bundle_info = Gauge(
            "inference_bundle_info",
            "Always 1; what is served.",
            ("model", "version", "runtime", "kernel", "sha256"),
            registry=self.registry,
        )
        self.model_device_up = Gauge(
            "inference_model_device_up",
            "1 while a GPU takes batches of the model, 0 while it is taken out because it failed.",
            ("model", "device"),
            registry=self.registry,
        )
        self.ranks_ready = Gauge(
            "inference_ranks_ready",
            "Processes that are ready to share a long recording.",
            ("model",),
            registry=self.registry,
        )
        self.rank_sent_bytes = Counter(
            "inference_rank_sent_bytes_total",
            "What ranks sent each other, all of them together.",
            ("model",),
            registry=self.registry,
        )
        self.rank_waiting_seconds = Counter(
            "inference_rank_waiting_seconds_total",
            "Time in which a rank waited for messages of others, all of them together.",
            ("model",),
            registry=self.registry,
        )
        self.rank_imbalance_ratio = Histogram(
            "inference_rank_imbalance_ratio",
            "By how much the busiest rank's own time on a recording is above the mean of the ranks.",
            ("model",),
            buckets=RATIOS,
            registry=self.registry,
        )
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    def count_refusal(self, code: str) -> None:
        """Count a request that was refused before a model was found for it."""
        self.requests.labels("", code).inc()

    def forget(self, model: str) -> None:
        """Drop every label set of a model that is served no more."""
        for metric in vars(self).values():
            if isinstance(metric, MetricWrapperBase):
                metric.remove_by_labels({"model": model})

    def watch(self, devices: Devices) -> None:
        """Tell of these GPUs, too; they are asked at every scrape."""
        self.registry.register(DeviceCollector(devices))


class DeviceCollector(Collector):
    """Asks the GPUs when the metrics are read: their state between two scrapes is nobody's business.

    Args:
        devices: to be asked.
    """

    def __init__(self, devices: Devices) -> None:
        self._devices = devices

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Give the gauges; one that a GPU does not tell of has no sample for it."""
        up, used, total, utilisation = families = (
            GaugeMetricFamily("inference_device_up", "1 while the GPU answers, 0 once it is lost.", labels=("device",)),
            GaugeMetricFamily(
                "inference_device_memory_used_bytes", "Memory of the GPU in use, by all processes.", labels=("device",)
            ),
            GaugeMetricFamily("inference_device_memory_total_bytes", "Memory of the GPU.", labels=("device",)),
            GaugeMetricFamily(
                "inference_device_utilisation_ratio", "Share of the time in which some kernel ran.", labels=("device",)
            ),
        )
        for state in self._devices.read():
            numbers = (state.memory_used_bytes, state.memory_total_bytes, state.utilisation_ratio)
            up.add_metric((str(state.index),), state.is_up)
            for family, number in zip((used, total, utilisation), numbers, strict=True):
                if number is not None:
                    family.add_metric((str(state.index),), number)
        yield from families


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
        self.queue_limit = metrics.queue_limit.labels(model)
        self.batches_in_flight = metrics.batches_in_flight.labels(model)
        self.workers = metrics.workers.labels(model)
        self.expired, self.abandoned = (metrics.drops.labels(model, reason) for reason in DROPS)

    def count(self, outcome: str) -> None:
        """Count one finished request: `ok`, `cancelled` or an error code."""
        self._requests.labels(self._model, outcome).inc()


class ModelDeviceMetrics:
    """Which GPUs take batches of one model; a model that runs on the CPU has none of these."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._up, self._model = metrics.model_device_up, model

    def set_up(self, device: str) -> None:
        """Count a device among those that take batches."""
        self._up.labels(self._model, device).set(1)

    def set_down(self, device: str) -> None:
        """Count it as taken out."""
        self._up.labels(self._model, device).set(0)


class RankMetrics:
    """The metrics of the processes that share long recordings; only a model that has some has these."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.ready = metrics.ranks_ready.labels(model)
        self.sent_bytes = metrics.rank_sent_bytes.labels(model)
        self.waiting_seconds = metrics.rank_waiting_seconds.labels(model)
        self.imbalance_ratio = metrics.rank_imbalance_ratio.labels(model)
