from service.tasks.brain_network_classification import BRAIN_NETWORK_CLASSIFICATION
from service.tasks.image_classification import IMAGE_CLASSIFICATION
from service.tasks.image_segmentation import IMAGE_SEGMENTATION
from service.tasks.speech_recognition import SPEECH_RECOGNITION
from service.tasks.task import AnyTask

TASKS: dict[str, AnyTask] = {
    "brain-network-classification": BRAIN_NETWORK_CLASSIFICATION,
    "image-classification": IMAGE_CLASSIFICATION,
    "image-segmentation": IMAGE_SEGMENTATION,
    "speech-recognition": SPEECH_RECOGNITION,
}
