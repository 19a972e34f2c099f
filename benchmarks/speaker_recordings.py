"""Word error rate over HTTP: every utterance by itself, and all that a speaker said as one recording in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.joined_speech import Recording, group_by_speaker, join
from benchmarks.speech_service import SpeechService
from training.error_rate import ErrorCount, count_errors

MIN_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """One speaker's errors.

    Attributes:
        name: in the data.
        seconds: of all utterances together.
        num_words: said.
        errors_alone: in the transcripts of the utterances.
        errors_joined: in the transcript of the joined recording; None if it is too short to be measured.
    """

    name: str
    seconds: float
    num_words: int
    errors_alone: int
    errors_joined: int | None


def measure_speakers(
    service: SpeechService, utterances: Sequence[Recording], *, min_seconds: float = MIN_SECONDS
) -> list[Speaker]:
    """Transcribe every utterance, and the joined ones of each speaker.

    Args:
        service: that answers.
        utterances: of all speakers.
        min_seconds: a joined recording is longer than that.
    Raises: NoAnswer.
    """
    found = []
    for name, parts in group_by_speaker(utterances).items():
        texts = [transcript.text for transcript in service.transcribe([part.audio for part in parts])]
        alone = sum(map(_count, parts, texts), ErrorCount())
        seconds = sum(part.seconds for part in parts)
        joined = None
        if seconds > min_seconds:
            whole = join(parts)
            joined = _count(whole, service.transcribe([whole.audio])[0].text).num_errors
        found.append(
            Speaker(
                name=name,
                seconds=seconds,
                num_words=alone.num_said,
                errors_alone=alone.num_errors,
                errors_joined=joined,
            )
        )
    return found


def _count(recording: Recording, text: str) -> ErrorCount:
    return count_errors(recording.text.split(), text.split())
