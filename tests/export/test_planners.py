import pytest
from torch import nn

from export.planners import PLANNERS, make_plan
from service.tasks import TASKS
from tests.export.conftest import make_source


def test_only_tasks_of_the_service_are_planned() -> None:
    assert PLANNERS.keys() <= TASKS.keys()


def test_a_task_without_export_is_refused_naming_those_that_have_one() -> None:
    source = make_source().model_copy(update={"task": "image-poetry"})
    with pytest.raises(ValueError, match="image-poetry has no export; one of image-classification, speech-recog"):
        make_plan(source, nn.Identity())


@pytest.mark.parametrize("task", PLANNERS)
def test_a_model_of_another_kind_is_refused(task: str) -> None:
    with pytest.raises(ValueError, match=r"Linear has no .* program"):
        make_plan(make_source().model_copy(update={"task": task}), nn.Linear(1, 1))
