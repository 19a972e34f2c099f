import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from export.published import PACA, PUBLISHED, TCFORMER, UNSERVED, UNSERVED_PARTS, find_publication
from models import BUILDERS
from models.checkpoints import load_official
from service.tasks import TASKS
from tests.export.official_names import official_state

KEYS = "reference/tcformer_and_paca_vit/official_keys"
IMAGES = [name for name, publication in PUBLISHED.items() if publication.publisher in (PACA, TCFORMER)]


def test_every_published_checkpoint_is_known(shared_file: Callable[[str], Path]) -> None:
    published = {path.stem for path in shared_file(KEYS).glob("*.json")}
    assert published == {PUBLISHED[name].official for name in IMAGES} | UNSERVED.keys()


@pytest.mark.parametrize("name", IMAGES)
def test_names_shapes_and_classes_of_the_published_checkpoints_fit(
    name: str, shared_file: Callable[[str], Path]
) -> None:
    publication = PUBLISHED[name]
    keys = json.loads(shared_file(f"{KEYS}/{publication.official}.json").read_text())["state_dict"]
    state = {key: torch.empty(value["shape"], device="meta") for key, value in keys.items()}
    assert state[publication.class_bias].shape == (publication.data.num_classes,)
    with torch.device("meta"):
        model = BUILDERS[name](num_classes=publication.data.num_classes)
    load_official(model, publication.prepare(state), publication.renames)


@pytest.mark.parametrize("name", UNSERVED)
def test_checkpoints_without_a_task_are_known_by_their_parts(name: str, shared_file: Callable[[str], Path]) -> None:
    keys = json.loads(shared_file(f"{KEYS}/{name}.json").read_text())["state_dict"]
    assert any(key.startswith(part) for key in keys for part in UNSERVED_PARTS)


@pytest.mark.parametrize("name", [name for name, publication in PUBLISHED.items() if publication.task in TASKS])
def test_the_task_takes_what_a_publication_tells_it(name: str) -> None:
    found, publication = find_publication(PUBLISHED[name].official)
    assert found == name
    spec = {**publication.spec, "labels": ["a", "b"]}
    told = (
        TASKS[publication.task].Spec.model_validate_json(json.dumps(spec)).model_dump(mode="json", exclude_unset=True)
    )
    assert told == spec


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tcformer_pose_mta_wholebody", "needs a task for keypoint estimation, which this service does not have"),
        ("ctc-transformer-small", r"no configuration of a published whole model; one of paca-vit-tiny, .* is"),
        ("fast-transformers", "an encoder alone lacks the layers of a task"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_publication(name)


def test_the_tests_own_official_names_are_the_official_ones(shared_file: Callable[[str], Path]) -> None:
    keys = json.loads(shared_file(f"{KEYS}/pacavit_tiny_p2cconv_100_0.json").read_text())["state_dict"]
    with torch.device("meta"):
        state = official_state(BUILDERS["paca-vit-tiny"](num_classes=1000))
    found = {name: list(tensor.shape) for name, tensor in state.items() if "fc" not in name}
    assert found == {name: value["shape"] for name, value in keys.items() if "fc" not in name}
    assert state.keys() == keys.keys()
