from service.tasks.image_classification import IMAGE_CLASSIFICATION
from service.tasks.speech_recognition import SPEECH_RECOGNITION
from service.tasks.task import AnyTask

TASKS: dict[str, AnyTask] = {
    "image-classification": IMAGE_CLASSIFICATION,
    "speech-recognition": SPEECH_RECOGNITION,
}
