import time

import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from service.tasks.log_mel import LogMelSpec, count_frames, log_mel, make_bands
from tests.oracles import log_mel as oracle

RATE = 16_000
SPEC = LogMelSpec()


def noise(num_samples: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 0.1, num_samples).astype(np.float32)


def small_spec(**changes: object) -> LogMelSpec:
    """Frames of 48 samples every 20 at 2 kHz."""
    fields = {"num_mels": 7, "window_seconds": 0.024, "hop_seconds": 0.010, "fft_size": 64, "low_hz": 50.0}
    return LogMelSpec.model_validate({**fields, "high_hz": 1000.0, **changes})


@pytest.mark.parametrize("level", [1e-5, 0.1, 16.0])
def test_features_are_those_of_the_oracle(level: float) -> None:
    samples = noise(4 * 20 + 48 + 7) * np.float32(level * 10)
    spec = small_spec()
    expected = oracle.log_mel(
        samples.tolist(), sample_rate_hz=2000, window=48, hop=20, fft_size=64, num_mels=7, low_hz=50, high_hz=1000,
        power_floor=1e-8,
    )  # fmt: skip
    found = log_mel(samples, spec, sample_rate_hz=2000)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)  # of values down to -18: float32


def test_the_usual_settings_are_those_of_the_oracle() -> None:
    samples = noise(400, seed=1)
    expected = oracle.log_mel(
        samples.tolist(), sample_rate_hz=RATE, window=400, hop=160, fft_size=512, num_mels=80, low_hz=20, high_hz=8000,
        power_floor=1e-8,
    )  # fmt: skip
    np.testing.assert_allclose(log_mel(samples, SPEC, sample_rate_hz=RATE), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("block_frames", [1, 2, 3, 64, 197, 198, 1000])
def test_the_size_of_blocks_changes_no_bit(block_frames: int) -> None:
    samples = noise(2 * RATE + 77)
    expected = log_mel(samples, SPEC, sample_rate_hz=RATE)
    found = log_mel(samples, SPEC, sample_rate_hz=RATE, block_frames=block_frames)
    np.testing.assert_array_equal(found, expected, strict=True)


def test_a_frame_does_not_depend_on_what_comes_before_or_after() -> None:
    samples = noise(RATE)
    whole = log_mel(samples, SPEC, sample_rate_hz=RATE)
    for frame in (0, 1, 50, len(whole) - 1):
        alone = log_mel(samples[frame * 160 : frame * 160 + 400], SPEC, sample_rate_hz=RATE)
        np.testing.assert_array_equal(alone, whole[frame : frame + 1], strict=True)


@pytest.mark.parametrize(("num_samples", "num_frames"), [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16_000, 98)])
def test_only_whole_frames_count(num_samples: int, num_frames: int) -> None:
    assert count_frames(num_samples, SPEC, sample_rate_hz=RATE) == num_frames
    assert log_mel(noise(num_samples), SPEC, sample_rate_hz=RATE).shape == (num_frames, 80)


def test_silence_has_the_power_of_the_floor() -> None:
    found = log_mel(np.zeros(800, np.float32), SPEC, sample_rate_hz=RATE)
    np.testing.assert_array_equal(found, np.full((3, 80), np.log(np.float32(1e-8))), strict=True)


@pytest.mark.parametrize("hz", [100.0, 440.0, 1000.0, 3000.0, 7500.0])
def test_a_tone_is_loudest_in_the_band_whose_centre_is_nearest(hz: float) -> None:
    tone = np.sin(2 * np.pi * hz * np.arange(800) / RATE).astype(np.float32)
    edges = [oracle.to_hz(mel) for mel in np.linspace(oracle.to_mel(20), oracle.to_mel(8000), 82)]
    nearest = int(np.argmin([abs(edge - hz) for edge in edges[1:-1]]))
    loudest = log_mel(tone, SPEC, sample_rate_hz=RATE).argmax(axis=1)
    assert (abs(loudest - nearest) <= 1).all()  # a window of 25 ms is wider than the lowest bands


def test_the_loudest_samples_that_are_read_stay_finite() -> None:
    found = log_mel(np.full(4000, 16, np.float32), SPEC, sample_rate_hz=RATE)
    assert np.isfinite(found).all()


def test_half_an_hour_needs_little_more_memory_than_its_features() -> None:
    import tracemalloc

    samples = np.zeros(30 * 60 * RATE // 10, np.float32)  # a tenth of it: blocks are of one size
    tracemalloc.start()
    features = log_mel(samples, SPEC, sample_rate_hz=RATE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < features.nbytes + 6_000_000


def test_features_of_a_second_take_milliseconds() -> None:
    samples = noise(10 * RATE)
    log_mel(samples, SPEC, sample_rate_hz=RATE)
    started = time.thread_time()
    log_mel(samples, SPEC, sample_rate_hz=RATE)
    assert time.thread_time() - started < 0.1  # 10 ms for each second; 1 is usual


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"window_seconds": 0.0251}, "window_seconds=0.0251 must be a whole number of samples at 2000 Hz"),
        ({"hop_seconds": 0.0003}, "hop_seconds=0.0003 must be a whole number of samples"),
        ({"fft_size": 32}, "window_seconds=0.024 are 48 samples; fft_size=32"),
        ({"high_hz": 1001.0}, "high_hz=1001 must be at most half of sample_rate_hz=2000"),
        ({"num_mels": 60}, "fft_size=64 is too small for num_mels=60: band [0-9]+ is empty"),
    ],
)
def test_settings_that_do_not_fit_the_rate_are_refused(changes: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        make_bands(small_spec(**changes), 2000)


@pytest.mark.parametrize("changes", [{"low_hz": 1000.0}, {"num_mels": 0}, {"power_floor": 0.0}, {"hop_seconds": -1.0}])
def test_a_spec_out_of_range_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        small_spec(**changes)


def test_every_field_is_described() -> None:
    assert all("description" in field for field in LogMelSpec.model_json_schema()["properties"].values())
