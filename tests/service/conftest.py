"""What the tests of the service share: a tiny bundle and the application that serves it, in this process."""

import io
import logging
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from service.app import create_app
from service.settings import Settings
from tests.service.tiny_bundle import NAME, write_tiny_bundle

Serve = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny bundle; not to be changed."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / NAME)


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The folder of a copy of the tiny bundle, alone among its siblings, to be changed at will."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundles" / NAME)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what warm-up finds, kept between the tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(tiny_bundle: Path, cache: Path) -> Callable[..., Settings]:
    """Makes settings that serve the tiny bundle."""

    def make(**fields: Any) -> Settings:
        usual = {"bundles": tiny_bundle.parent, "cache": cache, "device": "cpu", "workers": 1, "decode_threads": 1}
        return Settings(**usual | fields)

    return make


@pytest.fixture
def serve(settings: Callable[..., Settings]) -> Serve:
    """Runs the application within this process and gives a client of it."""

    @asynccontextmanager
    async def run(**fields: Any) -> AsyncIterator[httpx.AsyncClient]:
        app = create_app(settings(**fields))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://t") as client,
        ):
            yield client

    return run


@pytest.fixture
async def client(serve: Serve) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application that serves the tiny bundle."""
    async with serve() as one:
        yield one


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, put back afterwards."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield root
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., bytes]:
    """Makes the file of a picture in one colour."""

    def make(colour: tuple[int, int, int], *, size: tuple[int, int] = (16, 12), kind: str = "PNG") -> bytes:
        file = io.BytesIO()
        Image.new("RGB", size, colour).save(file, kind)
        return file.getvalue()

    return make
