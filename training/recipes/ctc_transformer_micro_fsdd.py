"""CTC transformer on spoken digits (FSDD): the whole way of a speech recogniser in two minutes of one core.

Single digits are joined to strings of up to sixteen, so that long recordings, and with them clusters, are in training.
"""

from service.tasks.audio import AudioSpec
from service.tasks.log_mel import LogMelSpec
from training.optimizers import OptimizerConfig
from training.recipe import Facts, Recipe
from training.speech_augmentation import SpeechAugmentation
from training.speech_recognition import SpeechRecognition

RECIPE = Recipe(
    name="ctc-transformer-micro-fsdd",
    model="ctc-transformer-micro",
    problem=SpeechRecognition(
        labels=("", " ", *"efghinorstuvwxz"),
        train_file="speech_recognition/fsdd_train.parquet",
        valid_file="speech_recognition/fsdd_train.parquet",
        valid_takes=(5, 6, 7, 8, 9),  # as many of each speaker and digit as the official test split has: 0 to 4
        test_file="speech_recognition/fsdd_test_dev.parquet",
        audio=AudioSpec(sample_rate_hz=8_000, min_seconds=0.1, max_seconds=60.0),
        log_mel=LogMelSpec(num_mels=40, fft_size=256, high_hz=4_000.0),
        mean=-5.1,
        std=4.0,
        subsampling=2,
        speeds=(0.9, 1.0, 1.1),
        join_sizes=(1, 4, 16),
        augmentation=SpeechAugmentation(
            level=0.2, num_band_masks=2, band_mask=6, time_masks_per_second=1.0, time_mask=6
        ),
    ),
    epochs=15,
    batch_size=32,
    optimizer=OptimizerConfig(muon_lr=5e-3, adamw_lr=5e-3),
    facts=Facts(
        version="0.1.0",
        is_default=False,
        description=(
            "Small CTC transformer of ours with clustered attention (Vyas et al. 2020), trained from scratch on FSDD: "
            "English digits, alone or one after the other."
        ),
        limits=(
            "It knows ten words, zero to nine. Trained on 15 minutes of five speakers, who are those of the test split "
            "too: expect many errors with any other voice. Made to try training, export and serving in minutes."
        ),
        license="Apache-2.0 for our work on the weights; see the licence of the data",
        data=(
            "Free Spoken Digit Dataset (Zohar Jackson et al.; github.com/Jakobovski/free-spoken-digit-dataset "
            "@ 26eb9aa). Trained on takes 10 to 49 of five speakers; valid is takes 5 to 9; test_dev is takes 0 to 4 "
            "of the same speakers, the official test split without its sixth speaker"
        ),
        data_license="CC BY-SA 4.0",
        max_body_bytes=10_000_000,
        max_batch=16,
    ),
    ema_decay=0.99,
)
