from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.brain_network_classifier import BrainNetworkProgram, count_near_ties, plan_brain_network_classifier
from export.source import Source
from models import BUILDERS
from models.thc import Thc
from models.thc_config import ThcConfig
from service.bundle import Manifest, Normalisation, open_bundle
from service.runtimes.onnx import open_onnx
from service.sample import Sample
from service.tasks.brain_network_classification import (
    BRAIN_NETWORK_CLASSIFICATION,
    BrainNetworkClassificationOptions,
    BrainNetworkClassificationSpec,
)
from service.tasks.connectome_input import decode_connectome
from tests.export.conftest import make_source, write_quietly

R, ARCHITECTURE = 20, "thc-of-tests"
CONFIG = ThcConfig(
    num_regions=R,
    sizes=(8, 8, 3),
    pooling=(True, False, True),
    num_heads=2,
    hidden_dim=16,
    encoder="factorised",
    encoder_dim=16,
    readout_dim=4,
    readout_hidden_dim=16,
    spectrum_limit=2.0,
    is_standardised=True,
    resolutions=(2.0, 1.0),
    has_linear_path=True,
)
SPEC = {
    "labels": ["no", "yes"],
    "atlas": "tiny",
    "regions": [f"region {i}" for i in range(R)],
    "matrix": "binary_graph",
    "edge_density": 0.2,
    "min_frames": 30,
}


def make_thc(config: ThcConfig = CONFIG) -> Thc:
    """A model whose weights all matter and fit into float16, as training leaves them."""
    torch.manual_seed(0)
    model = Thc(config, num_classes=2)
    with torch.no_grad():
        for weight in [*model.parameters(), *model.buffers()]:
            if weight.is_floating_point():
                weight.copy_((weight + 0.1 * torch.randn_like(weight)).half())
    return model.eval()


def make_connectivities(batch: int) -> Tensor:
    """Symmetric, as whatever the service lets through."""
    x = torch.rand(batch, R, R)
    return (x + x.transpose(1, 2)) / 2


def make_brain_source() -> Source:
    source = make_source()
    origin = source.origin.model_copy(update={"architecture": ARCHITECTURE})
    changes = {
        "name": ARCHITECTURE,
        "task": "brain-network-classification",
        "spec": SPEC,
        "normalisation": Normalisation(mean=(0.2,), std=(0.4,)),
        "origin": origin,
    }
    return source.model_copy(update=changes)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUILDERS, ARCHITECTURE, partial(Thc, CONFIG))
        return write_quietly(make_brain_source(), make_thc(), tmp_path_factory.mktemp("brains"))


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return open_bundle(bundle).manifest


def test_a_raw_connectivity_gives_what_a_normalised_one_gave() -> None:
    model, x = make_thc(), make_connectivities(3)
    found = BrainNetworkProgram(model, Normalisation(mean=(0.2,), std=(0.4,)))(x)
    logits, assignments, _ = model((x - 0.2) / 0.4)
    torch.testing.assert_close(found, (logits, *assignments), atol=1e-6, rtol=0)


def test_program_and_module_agree_at_other_batch_sizes(manifest: Manifest) -> None:
    # 1e-5 of the largest magnitude, the limit of every export
    assert manifest.parity.batch_sizes == (1, 3, 8)
    assert manifest.parity.max_relative_error.keys() == {"logits", "assignment_level1", "assignment_level2"}
    assert max(manifest.parity.max_relative_error.values()) <= 1e-5


def test_the_manifest_says_which_levels_merge_their_nodes(manifest: Manifest) -> None:
    assert [(tensor.name, tensor.shape) for tensor in manifest.outputs] == [
        ("logits", ("batch", 2)),
        ("assignment_level1", ("batch", R, 8)),
        ("assignment_level2", ("batch", 8, 3)),
    ]
    assert manifest.spec["num_communities"] == [8, 3]


def test_the_service_makes_an_answer_of_what_the_program_gives(bundle: Path, manifest: Manifest) -> None:
    spec = BrainNetworkClassificationSpec.model_validate(manifest.spec)
    inputs, _ = open_bundle(bundle).read_golden()
    text = "\n".join(",".join(f"{value:.0f}" for value in row) for row in inputs["connectivity"][0])
    connectome = decode_connectome(text.encode(), "text/csv", spec)
    np.testing.assert_array_equal(connectome.matrix, inputs["connectivity"][0])
    runtime = open_onnx(bundle / manifest.programs["onnx"], device="cpu")
    names = [tensor.name for tensor in manifest.outputs]
    outputs = {name: rows[0] for name, rows in runtime.run({"connectivity": connectome.matrix[None]}, names).items()}
    runtime.close()
    answer = BRAIN_NETWORK_CLASSIFICATION.postprocess(
        outputs,
        Sample({"connectivity": connectome.matrix}, length=1, context=connectome),
        spec,
        BrainNetworkClassificationOptions(),
        model="m",
        version="1.0.0",
    )
    assert sum(answer.probabilities.values()) == pytest.approx(1.0)
    assert [len(level.assignment) for level in answer.communities] == [R, R]
    expected = outputs["assignment_level1"].argmax(axis=1).tolist()
    assert answer.communities[0].assignment == expected


def test_the_program_has_standard_operators_only(bundle: Path, manifest: Manifest) -> None:
    import onnx

    model = onnx.load(bundle / manifest.programs["onnx"])
    assert {node.domain for node in model.graph.node} == {""}
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 20)]


def test_golden_connectomes_are_far_from_ties(bundle: Path) -> None:
    inputs, _ = open_bundle(bundle).read_golden()
    program = BrainNetworkProgram(make_thc(), Normalisation(mean=(0.2,), std=(0.4,)))
    assert count_near_ties(program, torch.from_numpy(inputs["connectivity"])) == 0


def test_near_ties_are_found() -> None:
    model = make_thc()
    with torch.no_grad():
        # Communities 0 to 3 are equal up to a millionth, and the mask keeps four of eight.
        weight = model.levels[0].communities.weight
        weight[:, 1:5] = weight[:, :1] * (1 + 1e-6 * torch.randn(R, 4))
    program = BrainNetworkProgram(model, Normalisation(mean=(0.0,), std=(1.0,)))
    assert count_near_ties(program, make_connectivities(4)) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(1, 1), "Linear has no brain-network classification program"),
        (lambda: make_thc(replace(CONFIG, scope="batch")), 'scope="batch" lets subjects'),
        (lambda: make_thc(replace(CONFIG, num_regions=R + 2)), "names 20 regions, the model has 22"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_brain_network_classifier(make_brain_source(), make())


def test_more_numbers_than_one_for_all_connections_are_refused() -> None:
    with pytest.raises(ValueError, match="normalisation has 2 numbers"):
        BrainNetworkProgram(make_thc(), Normalisation(mean=(0.0, 1.0), std=(1.0, 1.0)))
