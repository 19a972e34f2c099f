import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel, ValidationError

from samples.make_connectome import make_series
from service.errors import InvalidInput, ModelFailed, NotAcceptable
from service.sample import Arrays, Sample
from service.tasks import TASKS
from service.tasks.brain_network_answers import RESEARCH_NOTICE, BrainNetworkClassificationResult
from service.tasks.brain_network_classification import (
    BRAIN_NETWORK_CLASSIFICATION,
    BrainNetworkClassificationOptions,
    BrainNetworkClassificationSpec,
)
from service.tasks.connectomes import correlate, strongest_edges

TASK = BRAIN_NETWORK_CLASSIFICATION
MATRIX = np.array([[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]])

# Regions 0 and 3 go to community 1, region 1 to 2, region 2 to 0; then 1 goes to 0, and 0 and 2 go to 1.
LEVEL1 = np.array([[0.1, 0.7, 0.2], [0.2, 0.3, 0.5], [0.6, 0.4, 0.0], [0.3, 0.4, 0.3]], np.float32)
LEVEL2 = np.array([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]], np.float32)


def make_spec(**facts: Any) -> BrainNetworkClassificationSpec:
    usual = {
        "labels": ("control", "autism", "other"),
        "atlas": "FOUR",
        "regions": ("A", "B", "C", "D"),
        "matrix": "binary_graph",
        "edge_density": 0.5,
        "min_frames": 5,
        "num_communities": (3, 2),
    }
    return BrainNetworkClassificationSpec(**usual | facts)


def make_outputs(**others: Any) -> Arrays:
    usual = {"logits": np.array([0.5, 2, -1], np.float32), "assignment_level1": LEVEL1, "assignment_level2": LEVEL2}
    return usual | others


def decode(values: Any = MATRIX, kind: str = "connectivity", **facts: Any) -> Sample:
    return TASK.decode(json.dumps({kind: np.asarray(values).tolist()}).encode(), "application/json", make_spec(**facts))


def answer(
    outputs: Arrays | None = None, sample: Sample | None = None, **options: Any
) -> BrainNetworkClassificationResult:
    return TASK.postprocess(
        make_outputs() if outputs is None else outputs,
        sample or decode(),
        make_spec(),
        BrainNetworkClassificationOptions(**options),
        model="thc",
        version="1.2.3",
    )


def read_png(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    assert picture.format == "PNG"
    return picture


def test_the_task_is_registered_under_its_name() -> None:
    assert TASKS["brain-network-classification"] is TASK


def test_a_connectivity_becomes_the_input_of_that_name() -> None:
    sample = decode()
    assert list(sample.inputs) == ["connectivity"]
    np.testing.assert_array_equal(sample.inputs["connectivity"], MATRIX.astype(np.float32), strict=True)
    assert sample.length == 1


def test_every_level_is_asked_for_whatever_the_options() -> None:
    for options in (BrainNetworkClassificationOptions(), BrainNetworkClassificationOptions(explain="communities")):
        assert TASK.outputs(options, make_spec()) == ("logits", "assignment_level1", "assignment_level2")
    assert TASK.outputs(BrainNetworkClassificationOptions(), make_spec(num_communities=())) == ("logits",)


# The answer


def test_probabilities_are_the_softmax_of_the_logits() -> None:
    result = answer()
    expected = np.exp([0.5, 2, -1]) / np.exp([0.5, 2, -1]).sum()
    assert list(result.probabilities) == ["control", "autism", "other"]
    assert list(result.probabilities.values()) == pytest.approx(expected.tolist(), rel=1e-12)
    assert (result.model, result.version, result.label) == ("thc", "1.2.3", "autism")


def test_of_equal_logits_the_first_label_is_told() -> None:
    assert answer(make_outputs(logits=np.array([1, 3, 3], np.float32))).label == "autism"
    assert answer(make_outputs(logits=np.array([-3e38, 3e38, 3e38], np.float32))).probabilities["other"] == 0.5


def test_regions_follow_their_community_from_level_to_level() -> None:
    first, second = answer().communities
    assert (first.level, first.num_communities, first.assignment) == (1, 3, [1, 2, 0, 1])
    assert (second.level, second.num_communities, second.assignment) == (2, 2, [0, 1, 1, 0])
    assert first.weights is second.weights is None


def test_regions_that_are_together_stay_together() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        outputs = make_outputs(assignment_level1=rng.random((4, 3)), assignment_level2=rng.random((3, 2)))
        first, second = (level.assignment for level in answer(outputs).communities)
        assert len(set(zip(first, second, strict=True))) == len(set(first))


def test_weights_are_multiplied_through_the_levels() -> None:
    first, second = answer(weights=True).communities
    np.testing.assert_allclose(first.weights, LEVEL1, rtol=0, atol=1e-6)
    expected = [[sum(a * b for a, b in zip(row, column, strict=True)) for column in LEVEL2.T] for row in LEVEL1]
    np.testing.assert_allclose(second.weights, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.sum(second.weights, axis=1), 1, rtol=0, atol=1e-5)


def test_shares_that_a_mask_took_away_are_not_made_up() -> None:
    masked = np.where(LEVEL1.max(axis=1, keepdims=True) == LEVEL1, LEVEL1, 0)
    first, _ = answer(make_outputs(assignment_level1=masked), weights=True).communities
    assert first.assignment == [1, 2, 0, 1]
    np.testing.assert_allclose(np.sum(first.weights, axis=1), [0.7, 0.5, 0.6, 0.4], rtol=0, atol=1e-6)


def test_a_model_without_communities_answers_without_them() -> None:
    spec, options = make_spec(num_communities=()), BrainNetworkClassificationOptions()
    outputs = {"logits": np.zeros(3, np.float32)}
    assert TASK.postprocess(outputs, decode(), spec, options, model="m", version="1").communities == []


def test_the_answer_tells_what_the_service_saw_of_a_graph() -> None:
    quality = answer().quality.model_dump(exclude_none=True)
    assert quality == {"source": "connectivity", "matrix": "binary_graph", "density": 0.5}


def test_the_answer_tells_what_the_service_saw_of_a_time_series() -> None:
    series = np.random.default_rng(3).standard_normal((9, 4))
    quality = answer(sample=decode(series, "time_series")).quality
    strengths = np.corrcoef(series.T)[np.triu_indices(4, 1)]
    assert (quality.source, quality.num_frames, quality.density) == ("time_series", 9, 0.5)
    assert quality.mean_absolute_correlation == pytest.approx(np.abs(strengths).mean())
    assert quality.weakest_edge == pytest.approx(np.sort(strengths)[-3])


def test_the_answer_says_that_it_is_for_research() -> None:
    assert answer().notice == RESEARCH_NOTICE
    assert "research use only" in RESEARCH_NOTICE
    fields = BrainNetworkClassificationResult.model_json_schema()["properties"]
    assert fields["notice"]["examples"] == [RESEARCH_NOTICE]
    spec = make_spec(notice="Not for patients.")
    result = TASK.postprocess(
        make_outputs(), decode(), spec, BrainNetworkClassificationOptions(), model="m", version="1"
    )
    assert result.notice == "Not for patients."


def test_the_json_has_only_what_was_asked_for() -> None:
    fields = json.loads(answer().model_dump_json(exclude_none=True))
    assert list(fields) == ["model", "version", "label", "probabilities", "communities", "quality", "notice"]
    assert list(fields["communities"][0]) == ["level", "num_communities", "assignment"]


# Pictures


def test_explain_adds_a_picture_and_drawing_gives_the_same() -> None:
    picture = answer(explain="communities").picture
    assert picture is not None
    assert picture.media_type == "image/png"
    data = base64.b64decode(picture.data, validate=True)
    assert read_png(data).width > 300
    for options in (BrainNetworkClassificationOptions(), BrainNetworkClassificationOptions(explain="communities")):
        TASK.check_drawing(options, make_spec())
        assert TASK.draw(make_outputs(), decode(), make_spec(), options) == data


@pytest.mark.parametrize(("matrix", "density"), [("fisher_z", None), ("correlation", None), ("binary_graph", 0.5)])
def test_every_kind_of_matrix_is_drawn(matrix: str, density: float | None) -> None:
    facts = {"matrix": matrix, "edge_density": density}
    sample = decode(np.random.default_rng(3).standard_normal((9, 4)), "time_series", **facts)
    data = TASK.draw(make_outputs(), sample, make_spec(**facts), BrainNetworkClassificationOptions())
    assert len(read_png(data).getcolors(1 << 24) or []) > 20


def test_a_model_without_communities_draws_none() -> None:
    spec = make_spec(num_communities=())
    TASK.check_options(BrainNetworkClassificationOptions(), spec)
    with pytest.raises(NotAcceptable, match="forms no communities"):
        TASK.check_drawing(BrainNetworkClassificationOptions(), spec)
    for options in ({"explain": "communities"}, {"weights": True}):
        with pytest.raises(InvalidInput, match="this model forms none"):
            TASK.check_options(BrainNetworkClassificationOptions(**options), spec)
        TASK.check_options(BrainNetworkClassificationOptions(**options), make_spec())


# Programs that fail


@pytest.mark.parametrize(
    "output",
    [
        {"logits": np.zeros(2, np.float32)},
        {"logits": np.array([0, np.nan, 0], np.float32)},
        {"assignment_level1": LEVEL1.T},
        {"assignment_level1": np.full((4, 3), np.nan, np.float32)},
        {"assignment_level2": LEVEL1},
        {"assignment_level2": np.full((3, 2), np.inf, np.float32)},
    ],
)
def test_outputs_that_mean_nothing_are_the_model_s_failure(output: Arrays) -> None:
    with pytest.raises(ModelFailed, match="the model did not give a finite"):
        answer(make_outputs(**output))
    with pytest.raises(ModelFailed, match="the model did not give a finite"):
        TASK.draw(make_outputs(**output), decode(), make_spec(), BrainNetworkClassificationOptions())


# The spec, the options, the schema


@pytest.mark.parametrize(
    "change",
    [{"labels": ("one",)}, {"labels": ("one", "one")}, {"num_communities": (0,)}, {"notice": ""}, {"sites": 3}],
)
def test_a_spec_out_of_range_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make_spec(**change)


def test_a_manifest_s_spec_is_read_from_json() -> None:
    assert BrainNetworkClassificationSpec.model_validate_json(make_spec().model_dump_json()) == make_spec()


@pytest.mark.parametrize("options", [{"explain": "regions"}, {"weights": "many"}, {"weight": True}])
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BrainNetworkClassificationOptions.model_validate(options)


@pytest.mark.parametrize(
    "model", [BrainNetworkClassificationSpec, BrainNetworkClassificationOptions, BrainNetworkClassificationResult]
)
def test_every_field_is_described(model: type[BaseModel]) -> None:
    schema = model.model_json_schema()
    for part in [schema, *schema.get("$defs", {}).values()]:
        assert all("description" in field for field in part["properties"].values())


# The samples


def test_the_samples_are_what_their_script_makes(samples: Path) -> None:
    series = np.load(samples / "connectome_synthetic_series.npy")
    np.testing.assert_allclose(series, make_series(), rtol=0, atol=1e-2)  # another libm may round the other way
    graph = np.loadtxt(samples / "connectome_synthetic.csv", delimiter=",")
    np.testing.assert_array_equal(graph, strongest_edges(correlate(series.astype(np.float64)), 0.2))


def test_the_samples_are_decoded_to_the_same_graph(samples: Path) -> None:
    spec = make_spec(regions=tuple(f"R{number}" for number in range(116)), edge_density=0.2, min_frames=100)
    series, graph = (
        TASK.decode((samples / f"connectome_synthetic{end}").read_bytes(), "", spec) for end in ("_series.npy", ".csv")
    )
    np.testing.assert_array_equal(series.inputs["connectivity"], graph.inputs["connectivity"], strict=True)
    assert (series.context.source, graph.context.source) == ("time_series", "connectivity")
