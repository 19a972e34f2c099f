"""CTC transformer on CMU AN4: letters, digits, dates, names and commands, read aloud.

In two runs with the same weights: full attention first, which is quick on short recordings; then improved-clustered
attention on recordings of up to a minute, joined from utterances.
"""

from dataclasses import replace
from pathlib import Path

from service.tasks.audio import AudioSpec
from service.tasks.log_mel import LogMelSpec
from training.optimizers import OptimizerConfig
from training.recipe import Facts, Recipe
from training.speech_augmentation import SpeechAugmentation
from training.speech_recognition import SpeechRecognition, WordModel

_PROBLEM = SpeechRecognition(
    labels=("", " ", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    train_file="speech_recognition/an4_train.parquet",
    valid_file="speech_recognition/an4_valid.parquet",
    test_file="speech_recognition/an4_test_dev.parquet",
    audio=AudioSpec(sample_rate_hz=16_000, min_seconds=0.1, max_seconds=3_600.0),
    log_mel=LogMelSpec(),
    mean=-6.1,
    std=3.7,
    subsampling=2,
    speeds=(0.9, 1.0, 1.1),
    join_sizes=(1, 2, 4),
    augmentation=SpeechAugmentation(level=0.2, num_band_masks=2, band_mask=15, time_masks_per_second=1.0, time_mask=12),
)

FIRST = Recipe(
    name="ctc-transformer-small-an4-first",
    model="ctc-transformer-small-full",
    problem=_PROBLEM,
    epochs=60,
    batch_size=32,
    optimizer=OptimizerConfig(muon_lr=3e-3, adamw_lr=2e-3),
    facts=Facts(
        version="1.0.0",
        is_default=False,
        description=(
            "CTC transformer of ours with clustered attention (Vyas et al. 2020), trained from scratch on CMU AN4: "
            "spelled words, numbers, dates and a few commands in American English."
        ),
        limits=(
            "It knows the 72 words of AN4's training transcripts and the letters; other "
            "words come out as something that sounds like them. "
            "Trained on 37.6 minutes of 66 speakers in quiet rooms at one microphone: expect more errors with noise, "
            "telephones, accents, children, or several speakers at once. Not for decisions about people or safety."
        ),
        license="Apache-2.0 for our work on the weights; see the licence of the data",
        data=(
            "CMU AN4 (Carnegie Mellon University, 1991; copy: github.com/sands-lab/SIDCo @ 197f3c3). Trained on 845 "
            "utterances of 66 speakers; valid is 103 utterances of 8 other speakers, used for choices; test_dev is 65 "
            "utterances of 5 of the official test speakers, used for nothing but the final figure"
        ),
        data_license=(
            "CMU's own, in the style of BSD: free for any purpose, the notice is in samples/LICENSE_AN4.txt and in the "
            "model card"
        ),
        max_body_bytes=200_000_000,
        max_batch=16,
        notice=Path("samples/LICENSE_AN4.txt").read_text(encoding="utf-8"),
    ),
    ema_decay=0.998,
)

RECIPE = replace(
    FIRST,
    name="ctc-transformer-small-an4",
    model="ctc-transformer-small",
    problem=replace(
        _PROBLEM,
        join_sizes=(4, 8, 22),
        # The best of `python -m training.choose_words`; a closed vocabulary is as good, and forbids all other words.
        word_model=WordModel(weight=0.25, word_bonus=0.0, is_closed=False, beam_width=8),
    ),
    epochs=8,
    optimizer=OptimizerConfig(muon_lr=1e-3, adamw_lr=7e-4),
    facts=replace(FIRST.facts, version="1.1.0", is_default=True),
)
