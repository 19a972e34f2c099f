"""The catalog: name → endpoint, and which one answers for a task where no name is given.

What it serves changes at once, on the event loop; how the next versions are opened stands in `service.reload`.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from service.bundle import MANIFEST, open_bundle
from service.endpoint import Endpoint
from service.errors import BundleError, NotReady, UnknownModel
from service.metrics import Metrics
from service.opening import open_endpoint
from service.settings import Settings, count_cores

logger = logging.getLogger(__name__)


class Catalog:
    """All endpoints of a service.

    Args:
        endpoints: to be served.
        decode_pool: the threads that they share.
        settings: of this deployment.
        metrics: of the service.
    Raises: BundleError if two have one name, or two are the default of one task.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], decode_pool: ThreadPoolExecutor, settings: Settings, metrics: Metrics
    ) -> None:
        if conflict := find_conflict(endpoints):
            raise BundleError(conflict[1])
        self._endpoints: dict[str, Endpoint] = {}
        self._defaults: dict[str, str] = {}
        self._retiring: dict[asyncio.Task[None], Endpoint] = {}
        self._settings, self._metrics = settings, metrics
        self.decode_pool = decode_pool
        self.is_ready = False
        self._serve(endpoints, {})

    def _serve(self, endpoints: Sequence[Endpoint], fallback: Mapping[str, str]) -> None:
        served = {endpoint.manifest.name: endpoint for endpoint in endpoints}
        stated = {manifest.task: manifest.name for manifest in (e.manifest for e in endpoints) if manifest.default}
        outdated = set(map(_describe, self._endpoints.values()))
        self._endpoints = served
        self._defaults = {task: name for task, name in fallback.items() if name in served} | stated
        for labels in map(_describe, endpoints):
            self._metrics.bundle_info.labels(*labels).set(1)
            outdated.discard(labels)
        for labels in outdated:
            self._metrics.bundle_info.remove(*labels)

    @property
    def endpoints(self) -> list[Endpoint]:
        """All endpoints, by name."""
        return [self._endpoints[name] for name in sorted(self._endpoints)]

    @property
    def defaults(self) -> Mapping[str, str]:
        """Task → name of the endpoint that answers where a request names none."""
        return self._defaults

    def find(self, task: str, model: str | None) -> Endpoint:
        """Find who answers.

        Args:
            task: name of the task.
            model: name of the endpoint; None is the task's default.
        Raises: UnknownModel naming those there are.
        """
        name = self._defaults.get(task) if model is None else model
        endpoint = self._endpoints.get(name or "")
        if endpoint is not None and endpoint.task.name == task:
            return endpoint
        names = [e.manifest.name for e in self.endpoints if e.task.name == task]
        asked = f"model {model[:100]!r}" if model is not None else "no model named, and no default"
        remedy = "name one of them" if names else "whoever runs it must add a bundle for this task"
        raise UnknownModel(f"{asked} for {task}; this service has {', '.join(names) or 'none'}; {remedy}")

    def get(self, model: str) -> Endpoint:
        """Give the endpoint of this name.

        Raises: UnknownModel naming those there are.
        """
        if model not in self._endpoints:
            raise UnknownModel(
                f"model {model[:100]!r} is not served; this service has "
                f"{', '.join(sorted(self._endpoints)) or 'none'}; name one of them"
            )
        return self._endpoints[model]

    def start(self) -> None:
        """Start all workers on the running event loop and become ready."""
        for endpoint in self._endpoints.values():
            endpoint.start(self._settings.workers)
        self.is_ready = True

    def swap(self, endpoints: Sequence[Endpoint], *, fallback: Mapping[str, str]) -> None:
        """Serve these from the next request on; those that are served no more drain and close by themselves.

        A request is answered by the version that it found, even if its body is still on the way.

        Args:
            endpoints: without conflict; those that are not served yet are started here.
            fallback: task → name of its default, where no manifest says that it is the default of this task.
        """
        served = set(self._endpoints.values())
        for endpoint in endpoints:
            if endpoint not in served:
                endpoint.start(self._settings.workers)
        self._serve(endpoints, fallback)
        for endpoint in served.difference(endpoints):
            retiring = asyncio.ensure_future(self._retire(endpoint))
            self._retiring[retiring] = endpoint
            retiring.add_done_callback(self._retiring.pop)

    async def _retire(self, endpoint: Endpoint) -> None:
        await endpoint.retire()
        await asyncio.to_thread(endpoint.close)
        if endpoint.manifest.name not in self._endpoints:
            self._metrics.forget(endpoint.manifest.name)
        logger.info("endpoint closed", extra={"fields": {"model": endpoint.manifest.name}})

    async def wait_for_retired(self) -> None:
        """Wait until all that is served no more is closed, so that no more than two versions are in memory.

        Raises: NotReady if it takes longer than `drain_seconds`.
        """
        if not self._retiring:
            return
        _, late = await asyncio.wait(self._retiring, timeout=self._settings.drain_seconds)
        if late:
            raise NotReady(
                f"{len(late)} models that are served no more still answer after {self._settings.drain_seconds:g} s; a "
                "reload waits for their end; try again later"
            )

    def check_ready(self) -> None:
        """Refuse while stopping.

        Raises: NotReady.
        """
        if not self.is_ready:
            raise NotReady("the service is starting or stopping; it takes no requests; try another instance or later")

    def check_devices(self) -> list[str]:
        """Tell which GPUs are lost to some model; refuse if one model has none left.

        Raises: DeviceLost.
        """
        for endpoint in self._endpoints.values():
            endpoint.check_devices()
        return sorted({device for endpoint in self._endpoints.values() for device in endpoint.lost_devices})

    async def drain(self) -> None:
        """Stop being ready at once, then wait until accepted requests are answered, at most `drain_seconds`.

        Whoever has no answer by then gets `NotReady`.
        """
        self.is_ready = False
        drains = [asyncio.ensure_future(endpoint.drain()) for endpoint in self._endpoints.values()]
        drains += self._retiring
        if drains:
            _, late = await asyncio.wait(drains, timeout=self._settings.drain_seconds)
            if late:
                logger.error("stopping with requests unanswered after %g s", self._settings.drain_seconds)
                for endpoint in (*self._endpoints.values(), *self._retiring.values()):
                    endpoint.give_up()
            for task in late:
                task.cancel()

    def close(self) -> None:
        """End all threads and give memory back; after `drain`."""
        self.decode_pool.shutdown(wait=True, cancel_futures=True)
        for endpoint in self._endpoints.values():
            endpoint.close()


def open_catalog(settings: Settings, metrics: Metrics) -> Catalog:
    """Open every bundle in the settings' folder.

    Raises: BundleError if one of them cannot be served, or there are none.
    """
    folders = find_bundles(settings.bundles)
    num_threads = settings.decode_threads or count_cores()
    decode_pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
    endpoints = [open_endpoint(open_bundle(folder), settings, metrics, decode_pool) for folder in folders]
    return Catalog(endpoints, decode_pool, settings, metrics)


def find_conflict(endpoints: Sequence[Endpoint]) -> tuple[Endpoint, str] | None:
    """Find the first endpoint that cannot be served beside those before it.

    Returns: it and the reason: its name is taken, or its task has a default already.
    """
    names: set[str] = set()
    defaults: dict[str, str] = {}
    for endpoint in endpoints:
        manifest = endpoint.manifest
        if manifest.name in names:
            return endpoint, f"two bundles are named {manifest.name}; remove one or rename it"
        names.add(manifest.name)
        if manifest.default and (other := defaults.setdefault(manifest.task, manifest.name)) != manifest.name:
            return endpoint, (
                f"{other} and {manifest.name} both say that they are the default for {manifest.task}; set "
                '"default": false in one manifest'
            )
    return None


def _describe(endpoint: Endpoint) -> tuple[str, ...]:
    """What is served, in the order of the metric's labels."""
    manifest, runtime = endpoint.manifest, endpoint.runtime
    return manifest.name, manifest.version, runtime.name, runtime.kernel, endpoint.bundle.sha256


def find_bundles(root: Path) -> list[Path]:
    """Find the folders in a folder that have a manifest; hidden ones are for copies that are under way.

    Raises: BundleError if there are none.
    """
    if not root.is_dir():
        raise BundleError(f"{root} is no folder; set SERVICE_BUNDLES to the folder that holds the bundles")
    folders = sorted(path.parent for path in root.glob(f"[!.]*/{MANIFEST}"))
    for path in sorted(root.iterdir()):
        if path.is_dir() and path not in folders and not path.name.startswith("."):
            logger.warning("%s is not served: it has no %s", path, MANIFEST)
    if not folders:
        raise BundleError(f"{root} holds no bundle (*/{MANIFEST}); export one with `python -m export`")
    return folders
