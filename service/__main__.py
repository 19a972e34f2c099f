"""Run the service: `python -m service`, configured by `SERVICE_*` in the environment."""

import argparse
import asyncio
import gc
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from pydantic import ValidationError

from service.app import create_app
from service.catalog import Catalog
from service.errors import BundleError, SettingError
from service.logs import configure_logs
from service.settings import Settings, find_unknown_variables

logger = logging.getLogger("service")

KEEP_ALIVE_SECONDS = 30
BACKLOG = 2048  # connections that wait to be taken, as uvicorn has it
CLOSE_SECONDS = 5.0  # after the drain; whoever still reads, computes or opens a bundle then is cut off


class DrainingServer(uvicorn.Server):
    """A server that answers what it accepted before it stops.

    The first signal makes the service not ready at once; connections stay open, and `/health` and `/metrics` answer,
    until every accepted request has its answer. The second signal ends the process at once, and so does time: a client
    that does not read its answer, or a batch that never ends, holds nothing up.

    Args:
        config: uvicorn's.
        catalog: to be drained.
        side: a server that starts after this one and stops after it, for the metrics.
    """

    def __init__(self, config: uvicorn.Config, catalog: Catalog, side: "SideServer | None" = None) -> None:
        super().__init__(config)
        self._catalog, self._side = catalog, side
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._side_task: asyncio.Task[None] | None = None
        self._is_stopping = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember the event loop, then start as uvicorn does."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for listener in sockets or ():
            host, port, *_ = listener.getsockname()
            logger.info("running on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        if self._side is not None:
            self._side_task = asyncio.ensure_future(self._side.serve([self._side.socket]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop as uvicorn does; the metrics last."""
        await super().shutdown(sockets)
        if self._side is not None and self._side_task is not None:
            self._side.should_exit = True
            await self._side_task

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Drain at the first signal, end at the second."""
        if self._loop is None:
            self.should_exit = True
        elif not self._is_stopping:
            self._is_stopping = True
            self._loop.call_soon_threadsafe(self._start_drain)
        else:
            os._exit(128 + sig)

    def _start_drain(self) -> None:
        logger.info("stopping: accepted requests are finished, new ones are refused")
        self._drain = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        await self._catalog.drain()
        timer = threading.Timer(CLOSE_SECONDS, _leave)
        timer.daemon = True
        timer.start()
        self.should_exit = True


def _leave() -> None:
    logger.error("stopping without waiting any longer for clients and threads")
    os._exit(0)


class SideServer(uvicorn.Server):
    """A server beside another one, on the same event loop; signals are the other one's.

    Args:
        config: uvicorn's.
        listener: that it serves.
    """

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self.socket = listener

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def main() -> int:
    """Start the service and run until a signal; returns the exit status."""
    try:
        settings = Settings()
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            name = f"SERVICE_{fault['loc'][0]}".upper()
            sys.stderr.write(f"{name} is {fault['input']!r}: {fault['msg']}; see docs/operations.md\n")
        return 2
    configure_logs(settings.log_level)
    for name in find_unknown_variables():
        logger.warning("%s sets nothing; see docs/operations.md for the settings there are", name)
    try:
        # Before bundles are opened, which takes long.
        listener = _bind("SERVICE_PORT", settings.host, settings.port)
        side = _bind("SERVICE_METRICS_PORT", settings.host, settings.metrics_port) if settings.metrics_port else None
        app = create_app(settings)
        server = _make_server(app, side)
        _listen("SERVICE_PORT", listener)
    except (BundleError, SettingError) as error:
        logger.error("cannot start: %s", error)  # noqa: TRY400 - the message says it all
        return 1
    # What start-up made stays: a full collection over it would hold all threads up every few thousand requests.
    gc.collect()
    gc.freeze()
    server.run([listener])
    return 0 if server.started else 1


def _bind(setting: str, host: str, port: int) -> socket.socket:
    """Take a port, on which nobody is answered yet.

    Raises: SettingError naming the setting.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier process may linger
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _cannot_listen(setting, host, port, error) from error
    return listener


def _listen(setting: str, listener: socket.socket) -> None:
    """Let connections come.

    Raises: SettingError if another process that took the same port was first.
    """
    host, port, *_ = listener.getsockname()
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise _cannot_listen(setting, host, port, error) from error


def _cannot_listen(setting: str, host: str, port: int, error: OSError) -> SettingError:
    return SettingError(
        f"{setting}: {host}:{port} cannot be listened on: {error.strerror or error}; set {setting} to a port that is "
        "free, and SERVICE_HOST to an address of this machine"
    )


def _make_server(app: Any, side: socket.socket | None) -> DrainingServer:
    # Any: the web framework is known to the application and its routes alone.
    connection = app.state.connection
    side_server = None
    if side is not None:
        _listen("SERVICE_METRICS_PORT", side)
        side_server = SideServer(_configure(app.state.metrics_app, connection), side)
    return DrainingServer(_configure(app, connection), app.state.catalog, side_server)


def _configure(app: Any, connection: type[asyncio.Protocol]) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=connection,
        ws="none",
        backlog=BACKLOG,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks who the client is
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m service",
        usage="SERVICE_PORT=8001 %(prog)s",
        description="Serve the bundles. There are no arguments: settings are SERVICE_* in the environment.",
        epilog="All settings are in docs/operations.md.",
    ).parse_args()
    sys.exit(main())
