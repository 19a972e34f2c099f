"""The module that becomes a speech recogniser's program: log-mel features in, log-probabilities and clusters out."""

import math
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn

from export.plan import EXPORT_BATCH, Plan
from export.recordings import RECORDING, cut_recordings, read_recording
from export.source import Source
from models.ctc_transformer import SUBSAMPLING, CtcTransformer, count_tokens, is_real
from service.bundle import Normalisation, TensorSpec
from service.collate import pad
from service.sample import Arrays
from service.tasks.log_mel import count_frames
from service.tasks.speech_recognition import SpeechRecognitionSpec

EXPORT_FRAMES = 60
PARITY_SECONDS = (
    *((seconds,) for seconds in (0.5, 1.7, 3.1, 8.3, 12.7, 31.4)),
    (2.1, 4.4, 1.0),
    (13.9, 16.2, 21.8),
    (0.9, 1.2, 2.6, 3.3, 1.9, 4.1, 2.2, 0.6),
)
NUM_CANDIDATES = 4  # for the golden recording
NEAR = 1e-5  # relative error of the features at which a tie counts as near; float32 makes a tenth of it
# Of a dozen recordings of 3 to 31 s, one had a near tie that ONNX Runtime and torch broke differently (small model,
# fresh weights), which put 1 % of its rows off; twice the queries and keys: 1 % of the rows of all parity recordings.
MAX_SHARE_OFF = 0.05
FIRST_BUCKET_SECONDS, BUCKET_RATIO = 1.5, 1.4
SHORT_SECONDS = 30.0
LONG_SECONDS = 300.0  # up to it a recording takes the ordinary program about 0.2 GB


class SpeechRecognizerProgram(nn.Module):
    """A recogniser with its normalisation.

    Args:
        model: to be given normalised features.
        normalisation: what it was trained with, one number for all bands or one for each.
    Raises: ValueError if it has another number of numbers.
    """

    def __init__(self, model: CtcTransformer, normalisation: Normalisation) -> None:
        super().__init__()
        if len(normalisation.mean) not in {1, model.config.num_mels}:
            raise ValueError(f"normalisation has {len(normalisation.mean)} numbers for {model.config.num_mels} bands")
        self.model = model
        self.mean = nn.Buffer(torch.tensor(normalisation.mean))
        self.std = nn.Buffer(torch.tensor(normalisation.std))

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """Recognise.

        Args:
            features: (B, T, F).
            lengths: (B,) int64, how many frames are real.
        Returns: log-probabilities (B, N, V), zeros at padding; and with clustered attention the clusters of all layers,
            (B, layers, H, N) int32, C at padding.
        """
        log_probs, clusters = self.model((features - self.mean) / self.std, lengths)
        log_probs = log_probs.masked_fill(is_real(log_probs, count_tokens(lengths)) == 0, 0)
        return (log_probs, torch.stack(clusters, dim=1).int()) if clusters else (log_probs,)


def plan_speech_recognizer(source: Source, model: nn.Module) -> Plan:
    """Plan the bundle of a speech recogniser.

    Args:
        source: facts about the weights.
        model: with the weights.
    Raises: ValueError if the model is of a kind that has no program here, or its numbers are not those of the spec.
    """
    if not isinstance(model, CtcTransformer):
        raise ValueError(f"{type(model).__name__} has no speech recognition program; one of CtcTransformer has")
    config = model.config
    spec = SpeechRecognitionSpec.model_validate(source.spec | {"has_clusters": config.attention is not None})
    of_spec, of_model = (spec.features.num_mels, spec.subsampling), (config.num_mels, SUBSAMPLING)
    if of_spec != of_model:
        raise ValueError(
            f"num_mels and subsampling are {of_spec} in the spec, {of_model} in the model; make them equal"
        )
    program = SpeechRecognizerProgram(deepcopy(model), source.normalisation).eval()
    outputs = [TensorSpec(name="log_probs", dtype="float32", shape=("batch", "tokens", len(spec.labels)))]
    if spec.has_clusters:
        shape = ("batch", config.num_layers, config.num_heads, "tokens")
        outputs.append(TensorSpec(name="clusters", dtype="int32", shape=shape))
    batches = tuple(pad(cut_recordings(spec, seconds)) for seconds in PARITY_SECONDS)
    seconds = [int(length) * spec.features.hop_seconds for batch in batches for length in batch["lengths"]]
    buckets = make_buckets(spec)
    return Plan(
        program=program,
        spec=source.spec | {"has_clusters": spec.has_clusters},
        inputs=(
            TensorSpec(name="features", dtype="float32", shape=("batch", "frames", config.num_mels)),
            TensorSpec(name="lengths", dtype="int64", shape=("batch",)),
        ),
        outputs=tuple(outputs),
        example={
            "features": np.zeros((EXPORT_BATCH, EXPORT_FRAMES, config.num_mels), np.float32),
            "lengths": np.full(EXPORT_BATCH, EXPORT_FRAMES, np.int64),
        },
        golden=choose_golden(program, spec),
        parity_inputs=f"{len(seconds)} recordings of {min(seconds):.1f} to {max(seconds):.1f} s, joined from excerpts "
        f"of samples/{RECORDING}",
        parity_batches=batches,
        max_share_off=MAX_SHARE_OFF if spec.has_clusters else 0.0,
        length_buckets=buckets,
        short_length=_nearest_bucket(SHORT_SECONDS, buckets, spec),
        long_length=_nearest_bucket(LONG_SECONDS, buckets, spec),
    )


def choose_golden(program: SpeechRecognizerProgram, spec: SpeechRecognitionSpec) -> Arrays:
    """Pad the sample recording and a joined one to a batch; the latter is long enough for full attention to end.

    Of several joined ones, that with the fewest near ties is taken.
    """
    attention = program.model.config.attention
    seconds = SUBSAMPLING * (attention.full_below if attention else 0) * spec.features.hop_seconds + 1.0
    recording = read_recording(spec)
    batches = [pad([recording, *cut_recordings(spec, [seconds], seed=seed)]) for seed in range(NUM_CANDIDATES)]
    return min(batches, key=lambda batch: count_near_ties(program, batch)) if attention else batches[0]


@torch.inference_mode()
def count_near_ties(program: SpeechRecognizerProgram, inputs: Arrays) -> int:
    """Count the queries that get another cluster if features are a little larger or smaller."""
    features, lengths = (torch.from_numpy(inputs[name]) for name in ("features", "lengths"))
    less, clusters, more = (program(features * scale, lengths)[1] for scale in (1 - NEAR, 1.0, 1 + NEAR))
    return int(((less != clusters) | (more != clusters)).sum())


def make_buckets(spec: SpeechRecognitionSpec) -> tuple[int, ...]:
    """Space lengths evenly in proportion, by about 1.4, from 1.5 s to the longest recording: numbers of frames.

    Where lengths are spread evenly, a sixth of a full batch then is padding.
    """
    first, last = _count_frames(FIRST_BUCKET_SECONDS, spec), spec.max_frames
    if last <= first:
        return (last,)
    number = math.ceil(math.log(last / first) / math.log(BUCKET_RATIO))
    return tuple(round(first * (last / first) ** (index / number)) for index in range(number + 1))


def _nearest_bucket(seconds: float, buckets: tuple[int, ...], spec: SpeechRecognitionSpec) -> int | None:
    """Choose the bucket that is nearest to a length; None if no recording is longer."""
    wanted = _count_frames(seconds, spec)
    return min(buckets[:-1], key=lambda bucket: abs(bucket - wanted)) if wanted < buckets[-1] else None


def _count_frames(seconds: float, spec: SpeechRecognitionSpec) -> int:
    return count_frames(round(seconds * spec.sample_rate_hz), spec.features, sample_rate_hz=spec.sample_rate_hz)
