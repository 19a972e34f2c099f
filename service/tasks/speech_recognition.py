"""Speech recognition: a recording in, its words out.

The program takes `features`, float32 (T, F), log-mel features as `spec.features` says, and `lengths`, how many of the T
frames are real. It returns `log_probs`, (N, labels), natural logarithms, one row for every `subsampling` frames; and
`clusters`, (layers, H, N) integers, which rows attended as one, -1 where they attended by themselves, computed only if
asked for. Rows of padding are cut off here.
"""

from typing import Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.errors import InvalidInput, ModelFailed
from service.sample import Arrays, Sample
from service.tasks.audio import AUDIO_MEDIA_TYPES, AudioSpec, decode_audio
from service.tasks.ctc import Hypothesis, Word, greedy, split_words
from service.tasks.language_model import SPACE, LanguageModel
from service.tasks.log_mel import LogMelSpec, count_frames, log_mel, make_bands
from service.tasks.prefix_beam_search import prefix_beam_search
from service.tasks.task import Task, TaskResult

MAX_BEAM_WIDTH = 64
_ALONE = -1  # the cluster of frames that attended by themselves


class SpeechRecognitionSpec(AudioSpec):
    """What a manifest says about a speech recogniser."""

    features: LogMelSpec = Field(description="What the program takes.")
    labels: tuple[str, ...] = Field(
        min_length=2, description='Characters in the order of the log probabilities; the first is the blank, "".'
    )
    subsampling: int = Field(default=2, ge=1, description="Frames of features for each row of log probabilities.")
    beam_width: int = Field(ge=1, le=MAX_BEAM_WIDTH, description="Used where a request names none.")
    language_model: LanguageModel | None = Field(
        default=None, description="What else decides; used from a beam width of 2 on."
    )
    has_clusters: bool = Field(default=True, description="Whether the program gives `clusters`.")

    @property
    def max_frames(self) -> int:
        """Frames of the longest recording: what the longest bucket must hold; one sample more may come of rounding."""
        num_samples = int(self.max_seconds * self.sample_rate_hz) + 1
        return count_frames(num_samples, self.features, sample_rate_hz=self.sample_rate_hz)

    @model_validator(mode="after")
    def _check(self) -> Self:
        make_bands(self.features, self.sample_rate_hz)
        shortest = self.features.window_seconds + self.features.hop_seconds
        if self.min_seconds < shortest:
            raise ValueError(f"min_seconds={self.min_seconds:g} must be at least window and hop, {shortest:g}")
        blank, *characters = self.labels
        if blank or len(set(characters)) < len(characters) or any(len(label) != 1 for label in characters):
            raise ValueError('labels must be "" and then single characters that differ from each other')
        if self.language_model is not None and (
            strange := {SPACE, *"".join(self.language_model.words)} - set(characters)
        ):
            raise ValueError(f"language_model needs {sorted(strange)}, which labels do not have")
        return self


class SpeechRecognitionOptions(BaseModel):
    """What one request may ask of a speech recogniser."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timestamps: Literal["none", "word"] = Field(
        default="none", description="Whether to tell when each word was said.", examples=["word"]
    )
    beam_width: int | None = Field(
        default=None,
        ge=1,
        le=MAX_BEAM_WIDTH,
        description="How many texts to follow through the recording; 1 takes the most probable label of each frame, "
        "without a language model. By default what the model's manifest says.",
        examples=[16],
    )
    explain: Literal["none", "clusters"] = Field(
        default="none", description="Whether to tell which frames attended as one.", examples=["clusters"]
    )


class SpokenWord(BaseModel):
    """One word and when it was said."""

    word: str = Field(description="The word.", examples=["HELLO"])
    start_seconds: float = Field(description="Its start, from the start of the recording.", examples=[0.408])
    end_seconds: float = Field(description="Its end.", examples=[0.768])
    score: float = Field(
        description="Mean probability of its characters, each over the frames that the most probable alignment gives "
        "it; in [0, 1].",
        examples=[0.97],
    )


class Clusters(BaseModel):
    """Which frames attended as one."""

    is_clustered: bool = Field(
        description="False for a recording so short that every frame attended by itself; there are no layers then.",
        examples=[True],
    )
    frame_seconds: float = Field(description="Time from one frame to the next.", examples=[0.02])
    num_frames: int = Field(description="Frames of the recording.", examples=[4])
    layers: list[list[list[tuple[int, int]]]] = Field(
        description="For each layer and head, runs of frames in time: cluster and number of frames. Frames of one "
        "cluster attended as one; numbers mean nothing across layers and heads.",
        examples=[[[[(7, 1), (0, 3)]]]],
    )


class SpeechRecognitionResult(TaskResult):
    """What was said in one recording."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "ctc-transformer-small-an4",
                    "version": "1.0.0",
                    "text": "RUBOUT G",
                    "duration_seconds": 1.62,
                    "words": [
                        {"word": "RUBOUT", "start_seconds": 0.268, "end_seconds": 0.728, "score": 0.98},
                        {"word": "G", "start_seconds": 0.968, "end_seconds": 1.028, "score": 0.91},
                    ],
                }
            ]
        }
    )

    text: str = Field(description="Its words, separated by one space.", examples=["RUBOUT G"])
    duration_seconds: float = Field(description="Length of the recording.", examples=[1.62])
    words: list[SpokenWord] | None = Field(default=None, description="If `timestamps` is `word`.")
    clusters: Clusters | None = Field(default=None, description="If `explain` is `clusters`.")


class _Timing(NamedTuple):
    """How rows of log probabilities lie in a recording.

    Attributes:
        start: seconds at which the first row begins.
        row: seconds from one row to the next.
        end: seconds of the recording.
    """

    start: float
    row: float
    end: float


class SpeechRecognition(Task[SpeechRecognitionSpec, SpeechRecognitionOptions, SpeechRecognitionResult]):
    """A recording in, its words out."""

    name = "speech-recognition"
    media_types = AUDIO_MEDIA_TYPES
    Spec = SpeechRecognitionSpec
    Options = SpeechRecognitionOptions
    Result = SpeechRecognitionResult

    def check_options(self, options: SpeechRecognitionOptions, spec: SpeechRecognitionSpec) -> None:
        """Refuse to explain what a model does not have.

        Raises: InvalidInput.
        """
        if options.explain == "clusters" and not spec.has_clusters:
            raise InvalidInput(
                "explain is clusters; this model forms none, as its frames attend one by one; leave explain out or "
                "ask another model"
            )

    def outputs(
        self,
        options: SpeechRecognitionOptions,
        spec: SpeechRecognitionSpec,  # noqa: ARG002
    ) -> tuple[str, ...]:
        """Ask for the log probabilities, and for the clusters only where they are wanted."""
        return ("log_probs", "clusters") if options.explain == "clusters" else ("log_probs",)

    def decode(
        self,
        body: bytes,
        media_type: str,  # noqa: ARG002
        spec: SpeechRecognitionSpec,
    ) -> Sample:
        """Decode a recording and compute its features; its first bytes tell the format, whatever media type was named.

        Returns: `features`, float32 (T, F); length T; context the recording's seconds.
        Raises: InvalidInput.
        """
        samples = decode_audio(body, spec)
        features = log_mel(samples, spec.features, sample_rate_hz=spec.sample_rate_hz)
        return Sample({"features": features}, length=len(features), context=len(samples) / spec.sample_rate_hz)

    def postprocess(
        self,
        outputs: Arrays,
        sample: Sample,
        spec: SpeechRecognitionSpec,
        options: SpeechRecognitionOptions,
        *,
        model: str,
        version: str,
    ) -> SpeechRecognitionResult:
        """Find the text, and what else was asked for.

        Args:
            outputs: `log_probs`, (N, labels), and where asked for `clusters`, (layers, H, N); N may have padding.
            sample, spec, options: as in `Task.postprocess`.
            model, version: as in `Task.postprocess`.
        Raises: ModelFailed if an output has too few rows, or the log probabilities are not one finite number per label.
        """
        num_rows = -(-sample.length // spec.subsampling)
        log_probs = outputs["log_probs"][:num_rows]
        if log_probs.shape != (num_rows, len(spec.labels)) or not np.isfinite(log_probs).all():
            raise _failed("a finite probability for each character in each frame")
        words = split_words(_search(log_probs, spec, options).tokens, spec.labels)
        hop = spec.features.hop_seconds
        # A row stands for the middles of its frames: of each window, half a hop on either side of its centre.
        timing = _Timing((spec.features.window_seconds - hop) / 2, spec.subsampling * hop, sample.context)
        return SpeechRecognitionResult(
            model=model,
            version=version,
            text=SPACE.join(word.text for word in words),
            duration_seconds=round(sample.context, 3),
            words=[_tell_time(word, timing) for word in words] if options.timestamps == "word" else None,
            clusters=_explain(outputs["clusters"], num_rows, timing) if options.explain == "clusters" else None,
        )


def _search(
    log_probs: npt.NDArray[np.float32], spec: SpeechRecognitionSpec, options: SpeechRecognitionOptions
) -> Hypothesis:
    width = spec.beam_width if options.beam_width is None else options.beam_width
    if width == 1:
        return greedy(log_probs)
    return prefix_beam_search(log_probs, spec.labels, beam_width=width, language_model=spec.language_model)[0]


def _tell_time(word: Word, timing: _Timing) -> SpokenWord:
    start, end = (min(timing.start + row * timing.row, timing.end) for row in (word.start, word.end))
    return SpokenWord(word=word.text, start_seconds=round(start, 3), end_seconds=round(end, 3), score=word.score)


def _explain(ids: npt.NDArray[np.int32], num_rows: int, timing: _Timing) -> Clusters:
    ids = ids[..., :num_rows]
    if ids.ndim != 3 or ids.shape[2] != num_rows:
        raise _failed("a cluster for each frame in each layer and head")
    is_clustered = bool((ids != _ALONE).any())
    layers = [[_count_runs(head) for head in layer] for layer in ids] if is_clustered else []
    return Clusters(is_clustered=is_clustered, frame_seconds=timing.row, num_frames=num_rows, layers=layers)


def _count_runs(ids: npt.NDArray[np.int32]) -> list[tuple[int, int]]:
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    lengths = np.diff(starts, append=len(ids))
    return list(zip(ids[starts].tolist(), lengths.tolist(), strict=True))


def _failed(expected: str) -> ModelFailed:
    return ModelFailed(f"the model did not give {expected}, as it should; tell whoever runs this service")


SPEECH_RECOGNITION = SpeechRecognition()
