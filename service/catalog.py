"""The catalog: name → endpoint, and which one answers for a task where no name is given."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from service.bundle import MANIFEST, open_bundle
from service.endpoint import Endpoint, open_endpoint
from service.errors import BundleError, NotReady, UnknownModel
from service.metrics import Metrics
from service.settings import Settings, count_cores

logger = logging.getLogger(__name__)


class Catalog:
    """All endpoints of a service.

    Args:
        endpoints: to be served.
        decode_pool: the threads that they share.
        settings: of this deployment.
    Raises: BundleError if two have one name, or two are the default of one task.
    """

    def __init__(self, endpoints: list[Endpoint], decode_pool: ThreadPoolExecutor, settings: Settings) -> None:
        self._endpoints: dict[str, Endpoint] = {}
        self._defaults: dict[str, str] = {}
        self._decode_pool, self._settings = decode_pool, settings
        self.is_ready = False
        for endpoint in endpoints:
            manifest = endpoint.manifest
            if manifest.name in self._endpoints:
                raise BundleError(f"two bundles are named {manifest.name}; remove one or rename it")
            self._endpoints[manifest.name] = endpoint
            if manifest.default and (other := self._defaults.setdefault(manifest.task, manifest.name)) != manifest.name:
                raise BundleError(
                    f"{other} and {manifest.name} both say that they are the default for {manifest.task}; set "
                    '"default": false in one manifest'
                )

    @property
    def endpoints(self) -> list[Endpoint]:
        """All endpoints, by name."""
        return [self._endpoints[name] for name in sorted(self._endpoints)]

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
        asked = f"model {model!r}" if model is not None else "no model named, and no default"
        remedy = "name one of them" if names else "whoever runs it must add a bundle for this task"
        raise UnknownModel(f"{asked} for {task}; this service has {', '.join(names) or 'none'}; {remedy}")

    def get(self, model: str) -> Endpoint:
        """Give the endpoint of this name.

        Raises: UnknownModel naming those there are.
        """
        if model not in self._endpoints:
            raise UnknownModel(
                f"model {model!r} is not served; this service has {', '.join(sorted(self._endpoints)) or 'none'}; "
                "name one of them"
            )
        return self._endpoints[model]

    def start(self) -> None:
        """Start all workers on the running event loop and become ready."""
        for endpoint in self._endpoints.values():
            endpoint.start(self._settings.workers)
        self.is_ready = True

    def check_ready(self) -> None:
        """Refuse while stopping.

        Raises: NotReady.
        """
        if not self.is_ready:
            raise NotReady("the service is starting or stopping; it takes no requests; try another instance or later")

    async def drain(self) -> None:
        """Stop being ready at once, then wait until accepted requests are answered, at most `drain_seconds`."""
        self.is_ready = False
        drains = [asyncio.ensure_future(endpoint.drain()) for endpoint in self._endpoints.values()]
        if drains:
            _, late = await asyncio.wait(drains, timeout=self._settings.drain_seconds)
            for task in late:
                task.cancel()
            if late:
                logger.error("stopping with requests unanswered after %g s", self._settings.drain_seconds)

    def close(self) -> None:
        """End all threads and give memory back; after `drain`."""
        self._decode_pool.shutdown(wait=True, cancel_futures=True)
        for endpoint in self._endpoints.values():
            endpoint.close()


def open_catalog(settings: Settings, metrics: Metrics) -> Catalog:
    """Open every bundle in the settings' folder.

    Raises: BundleError if one of them cannot be served, or there are none.
    """
    folders = _find_bundles(settings.bundles)
    num_threads = settings.decode_threads or count_cores()
    decode_pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
    endpoints = [open_endpoint(open_bundle(folder), settings, metrics, decode_pool) for folder in folders]
    return Catalog(endpoints, decode_pool, settings)


def _find_bundles(root: Path) -> list[Path]:
    if not root.is_dir():
        raise BundleError(f"{root} is no folder; set SERVICE_BUNDLES to the folder that holds the bundles")
    folders = sorted(path.parent for path in root.glob(f"*/{MANIFEST}"))
    for path in sorted(root.iterdir()):
        if path.is_dir() and path not in folders and not path.name.startswith("."):
            logger.warning("%s is not served: it has no %s", path, MANIFEST)
    if not folders:
        raise BundleError(f"{root} holds no bundle (*/{MANIFEST}); export one with `python -m export`")
    return folders
