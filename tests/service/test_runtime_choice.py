import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from service.bundle import open_bundle
from service.errors import BundleError
from service.metrics import Metrics
from service.opening import open_endpoint
from service.settings import Settings
from tests.service.runtimes.mean_colours import PROGRAM as TORCHSCRIPT_PROGRAM
from tests.service.runtimes.mean_colours import write_archive
from tests.service.tiny_bundle import PROGRAM, reseal

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
BOTH = {"torchscript": TORCHSCRIPT_PROGRAM, "onnx": PROGRAM}
Open = Callable[..., str]


@pytest.fixture
def bundle(bundle_copy: Path) -> Path:
    """A bundle with two programs."""
    write_archive(bundle_copy / TORCHSCRIPT_PROGRAM)
    reseal(bundle_copy, programs=BOTH)
    return bundle_copy


@pytest.fixture
def open_one(settings: Callable[..., Settings]) -> Open:
    """Opens a bundle and tells which runtime it got."""

    def run(folder: Path, **fields: str) -> str:
        with ThreadPoolExecutor(1) as pool:
            endpoint = open_endpoint(open_bundle(folder), settings(**fields), Metrics(), pool)
        name = endpoint.runtime.name
        endpoint.close()
        return name

    return run


@pytest.mark.parametrize(("setting", "expected"), [("auto", "onnx"), ("onnx", "onnx"), ("torchscript", "torchscript")])
def test_of_two_programs_the_setting_s_runs_and_onnx_if_it_leaves_the_choice(
    bundle: Path, open_one: Open, setting: str, expected: str
) -> None:
    assert open_one(bundle, runtime=setting) == expected


def test_a_bundle_with_a_torchscript_program_alone_is_served(bundle: Path, open_one: Open) -> None:
    reseal(bundle, programs={"torchscript": TORCHSCRIPT_PROGRAM})
    assert open_one(bundle) == "torchscript"
    with pytest.raises(BundleError, match=r"has programs for torchscript; this service runs onnx with SERVICE_RUNTIME"):
        open_one(bundle, runtime="onnx")


def test_a_bundle_without_the_program_asked_for_is_refused_with_the_remedy(tiny_bundle: Path, open_one: Open) -> None:
    with pytest.raises(BundleError, match=r"this service runs torchscript .*; make one with `python -m export --runt"):
        open_one(tiny_bundle, runtime="torchscript")


def test_without_torch_a_bundle_with_both_programs_is_served_from_onnx(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, open_one: Open
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert open_one(bundle) == "onnx"
    with pytest.raises(BundleError, match="needs torch"):
        open_one(bundle, runtime="torchscript")


def test_an_archive_whose_checksum_does_not_hold_is_never_opened(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, open_one: Open
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(torch.jit, "load", lambda path, **_: opened.append(path))
    content = bytearray((bundle / TORCHSCRIPT_PROGRAM).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / TORCHSCRIPT_PROGRAM).write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.pt has sha256"):
        open_one(bundle, runtime="torchscript")
    assert not opened
