"""What the tests of the export share: small models with random weights, a training run and bundles."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from export.bundles import write_bundle
from export.source import RUN, WEIGHTS, Source, read_source
from models import BUILDERS
from models.paca_vit import PaCaViTClassifier, PaCaViTConfig
from tests.export.tiny_recogniser import CLUSTERED, FULL, RECOGNISERS, make_recogniser, make_speech_source
from tests.golden_files import REPOSITORY
from tests.service.tiny_bundle import make_facts

LEAF_SPEC = r".*treespec, LeafSpec.* is deprecated"  # torch 2.13's exporter warns of torch 2.13
ANNOTATIONS = r"The TorchScript type system doesn't support instance-level annotations"  # of torch's own classes
DEPRECATED = r".*torch\.jit"  # torch 2.13 calls TorchScript deprecated
SHARED_AXIS = r"# The axis name: (\w+) will not be used, since it shares .* axis: \1\."  # two inputs have this axis
ARCHITECTURE = "paca-vit-of-tests"
CONFIG = PaCaViTConfig(
    dims=(16, 32),
    num_heads=(2, 4),
    depths=(2, 1),
    mlp_ratios=(2, 2),
    num_clusters=(5, 0),
    clustering_kernel_sizes=(3, 3),
    onsite_clustering=(0, 0),
    stem_strides=(1, 2),
)
SIDE = 16
LABELS = ["ant", "bee", "cat", "dog", "elk"]
MEAN, STD = (0.49, 0.2, 0.7), (0.25, 0.1, 0.4)


def make_model(seed: int = 0) -> PaCaViTClassifier:
    """A model whose weights all matter and fit into float16, as training leaves them."""
    torch.manual_seed(seed)
    model = PaCaViTClassifier(CONFIG, num_classes=len(LABELS))
    with torch.no_grad():
        for weight in model.parameters():
            spread = 0.3 if weight.ndim > 1 else 0.1
            weight.copy_((weight + spread * torch.randn_like(weight)).half())
    return model.eval()


def make_source() -> Source:
    facts = make_facts() | {"name": "paca-vit-of-tests", "normalisation": {"mean": MEAN, "std": STD}}
    facts["origin"] = facts["origin"].model_copy(update={"architecture": ARCHITECTURE})
    facts["spec"] |= {"height": SIDE, "width": SIDE, "resize_shorter_side": SIDE, "labels": LABELS}
    facts["created"] = datetime(2026, 3, 4, tzinfo=UTC)
    facts["quality"] = {"valid": {"accuracy": 0.87654}, "test_dev": {"accuracy": 0.81234}}
    return Source.model_validate({name: facts[name] for name in Source.model_fields})


@pytest.fixture(scope="session", autouse=True)
def _builder() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUILDERS, ARCHITECTURE, partial(PaCaViTClassifier, CONFIG))
        for name, builder in RECOGNISERS.items():
            patch.setitem(BUILDERS, name, builder)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on busy cores make small operations a hundred times slower."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training run."""
    folder = tmp_path_factory.mktemp("run")
    save_file({name: weight.half() for name, weight in make_model().state_dict().items()}, folder / WEIGHTS)
    (folder / RUN).write_text(json.dumps(make_source().model_dump(mode="json")))
    return folder


@pytest.fixture(scope="session")
def bundle_folder(
    run_folder: Path, tmp_path_factory: pytest.TempPathFactory, _builder: None, _one_thread: None
) -> Path:
    """The bundle made of that run; not to be changed."""
    return write_quietly(*read_source(run_folder), tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="session")
def speech_bundle(tmp_path_factory: pytest.TempPathFactory, _builder: None, _one_thread: None) -> Path:
    """The bundle of a recogniser with clustered attention; not to be changed."""
    source = make_speech_source(CLUSTERED)
    return write_quietly(source, make_recogniser(CLUSTERED), tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="session")
def full_speech_bundle(tmp_path_factory: pytest.TempPathFactory, _builder: None, _one_thread: None) -> Path:
    """The bundle of a recogniser with full attention; not to be changed."""
    source = make_speech_source(FULL)
    return write_quietly(source, make_recogniser(FULL), tmp_path_factory.mktemp("exported"))


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Ignores what torch's exporter warns of without need."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", LEAF_SPEC, FutureWarning)
        warnings.filterwarnings("ignore", SHARED_AXIS, UserWarning)
        warnings.filterwarnings("ignore", ANNOTATIONS, UserWarning)
        warnings.filterwarnings("ignore", DEPRECATED, DeprecationWarning)
        yield


def write_quietly(source: Source, model: nn.Module, folder: Path) -> Path:
    """Write a bundle below a folder, from the repository's root and without the exporter's warnings."""
    out = folder / source.name
    with pytest.MonkeyPatch.context() as patch, quiet_exporter():
        patch.chdir(REPOSITORY)
        write_bundle(source, model, out)
    return out


@pytest.fixture
def source_and_model(run_folder: Path) -> Callable[[], tuple[Source, nn.Module]]:
    """Reads the run, for tests that change the model."""
    return lambda: read_source(run_folder)
