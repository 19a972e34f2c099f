"""Reloading: what changed in the bundles' folder is opened beside what is served, then takes its place at once.

A bundle that cannot be served is refused, and what its folder served before goes on. Nothing here touches a request:
the next versions are opened on a thread, the catalog swaps them on the event loop, and the old ones drain.
"""

import asyncio
import hashlib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from service.bundle import MANIFEST, open_bundle
from service.catalog import Catalog, find_bundles, find_conflict
from service.endpoint import Endpoint
from service.errors import BundleError, NotReady, SettingError
from service.keys import ApiKeys
from service.metrics import Metrics
from service.opening import open_endpoint
from service.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusal:
    """What was not taken over.

    Attributes:
        folder: of the bundle, or the file of keys.
        reason: for the operator.
    """

    folder: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What a reload did; names of models, but for `refused`."""

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)


@dataclass
class _Found:
    """The endpoints that a look at the folder gave.

    Attributes:
        kept: served already.
        opened: folder → not yet served.
        tried: names of models that were opened, or nearly: whatever became of it, they have metrics.
        refused: and why.
    """

    kept: list[Endpoint] = field(default_factory=list)
    opened: dict[Path, Endpoint] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)
    refused: list[Refusal] = field(default_factory=list)

    def refuse(self, folder: Path, reason: str, old: Endpoint | None) -> None:
        self.refused.append(Refusal(str(folder), reason))
        if old is not None:
            self.kept.append(old)


class Reloader:
    """Reloads, one at a time.

    Args:
        catalog: that serves.
        keys: to be read again, if there are any.
        settings: of this deployment.
        metrics: of the service.
    """

    def __init__(self, catalog: Catalog, keys: ApiKeys | None, settings: Settings, metrics: Metrics) -> None:
        self._catalog, self._keys, self._settings, self._metrics = catalog, keys, settings, metrics
        self._lock = asyncio.Lock()

    async def reload(self) -> Report:
        """Serve what is in the folder by now; a second call waits for the first.

        Raises: NotReady if the service is stopping, or what the last reload replaced does not end.
        """
        async with self._lock:
            await self._catalog.wait_for_retired()
            served = {endpoint.manifest.name: endpoint for endpoint in self._catalog.endpoints}
            found = await asyncio.to_thread(self._look, list(served.values()))
            if not self._catalog.is_ready:
                await asyncio.to_thread(_close, list(found.opened.values()))
            self._catalog.check_ready()
            serves = {endpoint.manifest.name: endpoint for endpoint in (*found.kept, *found.opened.values())}
            # What should be the default instead may be among those that were refused.
            self._catalog.swap(list(serves.values()), fallback=self._catalog.defaults if found.refused else {})
            for name in found.tried - serves.keys() - served.keys():
                self._metrics.forget(name)
        report = _compare(served, serves, found.refused)
        _log(report)
        return report

    def _look(self, served: list[Endpoint]) -> _Found:
        """Open what is not served yet; takes seconds, so it runs on a thread."""
        found = _Found()
        if self._keys is not None:
            try:
                self._keys.reread()
            except SettingError as error:
                found.refused.append(Refusal(str(self._settings.api_keys_file), str(error)))
        try:
            folders = find_bundles(self._settings.bundles)
        except (BundleError, OSError) as error:  # a folder that is not mounted must not take everything away
            found.kept = served
            found.refused.append(Refusal(str(self._settings.bundles), str(error)))
            return found
        olds = {endpoint.bundle.folder: endpoint for endpoint in served}
        for folder in folders:
            self._open(folder, olds.get(folder), found)
        _settle(found, olds)
        return found

    def _open(self, folder: Path, old: Endpoint | None, found: _Found) -> None:
        try:
            if old is not None and _hash_manifest(folder) == old.bundle.sha256:
                found.kept.append(old)
                return
            bundle = open_bundle(folder)
            found.tried.add(bundle.manifest.name)
            found.opened[folder] = open_endpoint(bundle, self._settings, self._metrics, self._catalog.decode_pool)
        except (BundleError, OSError) as error:
            found.refuse(folder, str(error), old)
        except Exception:  # the border of the reload: whatever is wrong with this bundle, the service goes on
            logger.exception("%s cannot be opened", folder)
            found.refuse(folder, "it cannot be opened, and it is not known why; the log has the traceback", old)

    async def watch(self) -> None:
        """Reload whenever the folder or the keys changed, for as long as the service runs.

        A change is taken over once it stayed as it is from one look to the next: a copy may be under way.
        """
        taken, last = None, None
        while True:
            now = await asyncio.to_thread(self._read_state)
            if now == last != taken:
                taken = now
                try:
                    await self.reload()
                except NotReady as error:
                    if not self._catalog.is_ready:
                        return
                    taken = None  # tried again at the next look
                    logger.warning("reload refused: %s", error)
                except Exception:  # the loop goes on, whatever this one met
                    logger.exception("reload failed")
            last = now
            await asyncio.sleep(self._settings.watch_seconds)

    def _read_state(self) -> frozenset[tuple[str, int, int, int]]:
        """What the files are like, without reading them."""
        paths = [Path(entry) for entry in _list(self._settings.bundles)]
        paths = [file for path in paths for file in (path, *_list(path))]
        keys = self._settings.api_keys_file
        return frozenset(state for path in (*paths, *([keys] if keys else [])) for state in _stat(path))


def _list(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # no folder, or gone
        return []


def _stat(path: Path) -> list[tuple[str, int, int, int]]:
    try:
        found: os.stat_result = path.stat()
    except OSError:
        return []
    return [(str(path), found.st_ino, found.st_size, found.st_mtime_ns)]


def _hash_manifest(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def _settle(found: _Found, olds: dict[Path, Endpoint]) -> None:
    """Refuse, of those that were opened, who cannot be served beside the others.

    What is kept was served together, so it is always one that was opened who comes too late.
    """
    while conflict := find_conflict([*found.kept, *found.opened.values()]):
        endpoint, reason = conflict
        folder = endpoint.bundle.folder
        found.opened.pop(folder).close()
        found.refuse(folder, reason, olds.get(folder))


def _close(endpoints: list[Endpoint]) -> None:
    for endpoint in endpoints:
        endpoint.close()


def _compare(served: dict[str, Endpoint], serves: dict[str, Endpoint], refused: list[Refusal]) -> Report:
    return Report(
        added=sorted(serves.keys() - served.keys()),
        replaced=sorted(name for name, one in serves.items() if served.get(name, one) is not one),
        removed=sorted(served.keys() - serves.keys()),
        unchanged=sorted(name for name, one in serves.items() if served.get(name) is one),
        refused=refused,
    )


def _log(report: Report) -> None:
    changes = {name: getattr(report, name) for name in ("added", "replaced", "removed") if getattr(report, name)}
    for refusal in report.refused:
        logger.error("%s is refused: %s", refusal.folder, refusal.reason)
    if changes:
        logger.info("reloaded", extra={"fields": changes})
