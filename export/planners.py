"""Which task is planned by what."""

from collections.abc import Callable

from torch import nn

from export.brain_network_classifier import plan_brain_network_classifier
from export.image_classifier import plan_image_classifier
from export.image_segmenter import plan_image_segmenter
from export.plan import Plan
from export.source import Source
from export.speech_recognizer import plan_speech_recognizer

PLANNERS: dict[str, Callable[[Source, nn.Module], Plan]] = {
    "image-classification": plan_image_classifier,
    "speech-recognition": plan_speech_recognizer,
    "brain-network-classification": plan_brain_network_classifier,
    "image-segmentation": plan_image_segmenter,
}


def make_plan(source: Source, model: nn.Module) -> Plan:
    """Plan a bundle.

    Args:
        source: facts about the weights.
        model: with the weights, in evaluation mode; it is left as it is.
    Raises: ValueError if the task has no planner, or as the planner does.
    """
    planner = PLANNERS.get(source.task)
    if planner is None:
        raise ValueError(f"task {source.task} has no export; one of {', '.join(PLANNERS)} has")
    return planner(source, model)
