"""Training and measuring speech recognisers on parquet files of encoded recordings.

Recordings go through the service's own decoder, features and search for the text, so that training, evaluation and
serving agree.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soxr
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from service.sample import Sample
from service.tasks.audio import AudioSpec, decode_audio
from service.tasks.language_model import SPACE
from service.tasks.log_mel import LogMelSpec, log_mel
from service.tasks.speech_recognition import (
    SPEECH_RECOGNITION,
    SpeechRecognitionOptions,
    SpeechRecognitionSpec,
)
from training.error_rate import ErrorCount, count_errors
from training.speech_augmentation import SpeechAugmentation, augment_features
from training.word_model import build_language_model

EVALUATION_BATCH = 16


@dataclass(frozen=True)
class Utterances:
    """Decoded examples, on the CPU.

    Attributes:
        features: for each utterance its log-mel features (T, F), once for each speed.
        targets: for each utterance its characters as labels, (length,) int64.
        texts: what was said.
        seconds: how long each is, at its own speed.
    """

    features: list[list[Tensor]]
    targets: list[Tensor]
    texts: list[str]
    seconds: list[float]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.texts)


@dataclass(frozen=True, kw_only=True)
class WordModel:
    """How much the words of the transcripts decide, chosen on the validation split; see `LanguageModel`.

    Attributes:
        beam_width: that the service uses where a request names none.
    """

    weight: float
    word_bonus: float
    is_closed: bool
    beam_width: int


@dataclass(frozen=True, kw_only=True)
class SpeechRecognition:
    """A data set of transcribed recordings and how it is shown to the model.

    Attributes:
        labels: characters, the blank "" first.
        train_file, test_file: parquet with columns audio, text, relative to the data folder.
        valid_file: the same, for choices.
        valid_takes: where that is the training file too: which numbers in its column `index` are for choices; the
            other rows are for training.
        audio: which recordings the service takes.
        log_mel: the features.
        mean, std: of all features, for the normalisation.
        subsampling: frames a token of the model.
        word_model: of the transcripts; None leaves the text to the model alone.
        speeds: each utterance is heard at one of them in each epoch.
        join_sizes: one of them is drawn for each batch; about so many utterances are joined to one recording.
        augmentation: strengths.
    """

    labels: tuple[str, ...]
    train_file: str
    valid_file: str
    test_file: str
    audio: AudioSpec
    log_mel: LogMelSpec
    mean: float
    std: float
    subsampling: int
    valid_takes: tuple[int, ...] = ()
    word_model: WordModel | None = None
    speeds: tuple[float, ...] = (1.0,)
    join_sizes: tuple[int, ...] = (1,)
    augmentation: SpeechAugmentation = field(default_factory=SpeechAugmentation)

    def describe(self, data: Path) -> dict[str, Any]:
        """Tell the manifest how recordings become the model's input and its output words; see `Problem.describe`."""
        return {
            "task": SPEECH_RECOGNITION.name,
            "spec": self.make_spec(data).model_dump(mode="json"),
            "normalisation": {"mean": [self.mean], "std": [self.std]},
        }

    def make_spec(self, data: Path) -> SpeechRecognitionSpec:
        """Make what the service is told, with the words counted in the training split."""
        words = self.word_model
        return SpeechRecognitionSpec(
            **self.audio.model_dump(),
            features=self.log_mel,
            labels=self.labels,
            subsampling=self.subsampling,
            beam_width=words.beam_width if words else 1,
            language_model=build_language_model(
                self._read_columns(data, "train", ["text"])["text"].to_pylist(),
                weight=words.weight,
                word_bonus=words.word_bonus,
                is_closed=words.is_closed,
            )
            if words
            else None,
        )

    def load(self, data: Path) -> Utterances:
        """Decode the training split at every speed."""
        return self.read(data, "train", speeds=self.speeds)

    def read(self, data: Path, split: str, *, speeds: tuple[float, ...] = (1.0,)) -> Utterances:
        """Decode one split.

        Args:
            data: folder of all data sets.
            split: "train", "valid" or "test_dev".
            speeds: at which each utterance is wanted; pitch changes with it, as on a tape.
        Raises: ValueError naming a character that is no label.
        """
        table = self._read_columns(data, split, ["audio", "text"])
        index = {label: number for number, label in enumerate(self.labels)}
        texts: list[str] = table["text"].to_pylist()
        if strange := {*"".join(texts)} - index.keys():
            raise ValueError(f"{split} has {sorted(strange)}, which the labels do not have")
        features, seconds = [], []
        rate = self.audio.sample_rate_hz
        for row in table["audio"]:
            samples = decode_audio(row.as_py(), self.audio)
            heard = [samples if speed == 1.0 else soxr.resample(samples, rate * speed, rate) for speed in speeds]
            features.append([torch.from_numpy(log_mel(x, self.log_mel, sample_rate_hz=rate)) for x in heard])
            seconds.append(len(samples) / rate)
        targets = [torch.tensor([index[character] for character in text]) for text in texts]
        return Utterances(features, targets, texts, seconds)

    def _read_columns(self, data: Path, split: str, columns: list[str]) -> pa.Table:
        file = {"train": self.train_file, "valid": self.valid_file, "test_dev": self.test_file}[split]
        rule = {"train": "not in", "valid": "in"}.get(split) if self.valid_takes else None
        filters = [("index", rule, self.valid_takes)] if rule else None
        return pq.read_table(data / file, columns=columns, filters=filters)

    def normalise(self, features: Tensor) -> Tensor:
        """Bring features to the model's scale."""
        return (features - self.mean) / self.std

    def loss(self, model: nn.Module, examples: Utterances, rows: Tensor, *, progress: float, rng: Generator) -> Tensor:  # noqa: ARG002
        """CTC loss a character of a batch of joined, augmented recordings."""
        device = next(model.parameters()).device
        size = self.join_sizes[int(torch.randint(len(self.join_sizes), (), generator=rng))]
        speed = torch.randint(len(self.speeds), (len(rows),), generator=rng).tolist()
        parts = [examples.features[row][which] for row, which in zip(rows.tolist(), speed, strict=True)]
        groups = join_evenly([len(part) for part in parts], -(-len(parts) // size))
        space = torch.tensor([self.labels.index(SPACE)])
        joined = [torch.cat([parts[i] for i in group]) for group in groups]
        targets = [_join_targets([examples.targets[int(rows[i])] for i in group], space) for group in groups]
        lengths = torch.tensor([len(features) for features in joined])
        features = self.normalise(nn.utils.rnn.pad_sequence(joined, batch_first=True)).to(device)
        frames_per_second = 1.0 / self.log_mel.hop_seconds
        features = augment_features(features, lengths, self.augmentation, rng, frames_per_second=frames_per_second)
        log_probs, _ = model(features, lengths.to(device))
        target_lengths = torch.tensor([len(target) for target in targets])
        return F.ctc_loss(
            log_probs.transpose(0, 1),
            torch.cat(targets).to(device),
            (lengths + self.subsampling - 1) // self.subsampling,
            target_lengths,
            reduction="sum",
            zero_infinity=True,  # spoken faster than one character a token: no path exists
        ) / int(target_lengths.sum())

    def evaluate(self, model: nn.Module, data: Path, split: str) -> dict[str, float]:
        """Error rates over a whole split, in the service's own words.

        Returns: `word_error_rate` as the service answers by default, `word_error_rate_greedy` and
            `character_error_rate_greedy` without search and words.
        """
        spec = self.make_spec(data)
        examples = self.read(data, split)
        log_probs = self.recognise(model, examples)
        rates = {}
        for name, width in (("", None), ("_greedy", 1)):
            words, characters = ErrorCount(), ErrorCount()
            for row, text in enumerate(examples.texts):
                found = self.find_text(log_probs[row], examples, row, spec, beam_width=width)
                words += count_errors(text.split(), found.split())
                characters += count_errors(text, found)
            rates[f"word_error_rate{name}"] = words.rate
            if width == 1:
                rates[f"character_error_rate{name}"] = characters.rate
        return rates

    def recognise(self, model: nn.Module, examples: Utterances) -> list[Tensor]:
        """Compute log-probabilities (N, V) of each utterance, in batches of similar length."""
        device = next(model.parameters()).device
        order = sorted(range(len(examples)), key=lambda row: len(examples.features[row][0]))
        found: list[Tensor] = [torch.empty(0)] * len(examples)
        with torch.inference_mode():
            for start in range(0, len(order), EVALUATION_BATCH):
                rows = order[start : start + EVALUATION_BATCH]
                parts = [examples.features[row][0] for row in rows]
                lengths = torch.tensor([len(part) for part in parts])
                features = self.normalise(nn.utils.rnn.pad_sequence(parts, batch_first=True))
                log_probs, _ = model(features.to(device), lengths.to(device))
                num_tokens = (lengths + self.subsampling - 1) // self.subsampling
                for row, tokens, num in zip(rows, log_probs.float().cpu(), num_tokens.tolist(), strict=True):
                    found[row] = tokens[:num]
        return found

    @staticmethod
    def find_text(
        log_probs: Tensor, examples: Utterances, row: int, spec: SpeechRecognitionSpec, *, beam_width: int | None
    ) -> str:
        """Let the service's task find the text in log-probabilities (N, V)."""
        sample = Sample(inputs={}, length=len(examples.features[row][0]), context=examples.seconds[row])
        options = SpeechRecognitionOptions(beam_width=beam_width)
        outputs = {"log_probs": np.asarray(log_probs)}
        return SPEECH_RECOGNITION.postprocess(outputs, sample, spec, options, model="", version="").text


def join_evenly(lengths: list[int], num_groups: int) -> list[list[int]]:
    """Divide examples into groups whose lengths add up to about the same, so that little padding is needed.

    Args:
        lengths: of the examples.
        num_groups: at most so many are made.
    Returns: indices of each group, none empty.
    """
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    totals = [0] * num_groups
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # the longest first, each to the emptiest group
        emptiest = totals.index(min(totals))
        groups[emptiest].append(i)
        totals[emptiest] += lengths[i]
    return [group for group in groups if group]


def _join_targets(targets: list[Tensor], space: Tensor) -> Tensor:
    return torch.cat([part for target in targets for part in (space, target)][1:])
