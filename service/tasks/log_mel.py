"""Log-mel features: samples → how loud each band of the mel scale is, frame by frame.

Serving and training call the same function. It computes in float32 and block by block, so that a recording of any
length needs little memory besides its features. The result does not depend on the blocks, to the last bit: every
operation treats frames one by one (a matrix product would not, as its kernels depend on the number of rows).

Frames are not padded at the ends: the first starts with the first sample, and samples after the last whole frame are
left out. Nothing is normalised; a model that wants that does it itself.
"""

from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

Features = npt.NDArray[np.float32]

_BLOCK_FRAMES = 256  # half a megabyte of spectra stays in a core's own cache


class LogMelSpec(BaseModel):
    """How samples become features."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_mels: int = Field(default=80, ge=1, description="Bands of the mel scale, F.")
    window_seconds: float = Field(default=0.025, gt=0, description="Length of a frame.")
    hop_seconds: float = Field(default=0.010, gt=0, description="Time from the start of one frame to the next.")
    fft_size: int = Field(default=512, ge=2, description="Samples of a transform; a frame is filled up with zeros.")
    low_hz: float = Field(default=20.0, ge=0, description="Lower end of the first band.")
    high_hz: float = Field(default=8000.0, gt=0, description="Upper end of the last band.")
    power_floor: float = Field(
        default=1e-8,  # about what rounding to 16 bits adds to a band
        gt=0,
        description="Power that a band has at least, before the logarithm.",
    )

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.low_hz >= self.high_hz:
            raise ValueError(f"low_hz={self.low_hz:g} must be below high_hz={self.high_hz:g}")
        return self


class Bands(NamedTuple):
    """What `log_mel` computes with.

    Attributes:
        window: (W,) float32, of the W samples of a frame.
        hop: samples between the starts of frames.
        first: (F,) int64, the first bin of each band.
        weights: (width, F) float32; band f is the sum over i of weights[i, f] times the power of bin first[f] + i.
    """

    window: npt.NDArray[np.float32]
    hop: int
    first: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]


def count_frames(num_samples: int, spec: LogMelSpec, *, sample_rate_hz: int) -> int:
    """Count the frames, T, of so many samples; 0 if there is no whole frame.

    Raises: ValueError as `make_bands`.
    """
    bands = make_bands(spec, sample_rate_hz)
    return max(0, 1 + (num_samples - len(bands.window)) // bands.hop)


def log_mel(
    samples: npt.NDArray[np.float32], spec: LogMelSpec, *, sample_rate_hz: int, block_frames: int = _BLOCK_FRAMES
) -> Features:
    """Compute log-mel features.

    Args:
        samples: (N,) float32.
        spec: what to compute.
        sample_rate_hz: of the samples.
        block_frames: how many frames are computed together; changes memory and time only.
    Returns: (T, F) float32, natural logarithms of power.
    Raises: ValueError as `make_bands`.
    """
    bands = make_bands(spec, sample_rate_hz)
    T = count_frames(len(samples), spec, sample_rate_hz=sample_rate_hz)
    features = np.empty((T, spec.num_mels), np.float32)
    if not T:
        return features
    frames = np.lib.stride_tricks.sliding_window_view(samples, len(bands.window))[:: bands.hop]  # (T, W), no copy
    for start in range(0, T, block_frames):
        rows = slice(start, min(start + block_frames, T))
        spectrum = np.fft.rfft(frames[rows] * bands.window, n=spec.fft_size)  # complex64
        power = np.ascontiguousarray((spectrum.real**2 + spectrum.imag**2).T)  # (bins, frames)
        mel = np.zeros((spec.num_mels, power.shape[1]), np.float32)
        for offset, weights in enumerate(bands.weights):
            mel += weights[:, None] * power[bands.first + offset]
        features[rows] = np.log(np.maximum(mel, np.float32(spec.power_floor))).T
    return features


@lru_cache(maxsize=16)
def make_bands(spec: LogMelSpec, sample_rate_hz: int) -> Bands:
    """Make the window and the filters.

    A band is a triangle of height 1, linear in Hz, from the centre of the band below to that of the band above; the
    centres are evenly spaced on the mel scale. The window is Hann's, with the period of a frame.

    Raises: ValueError if window or hop are not a whole number of samples, the window does not fit into the transform,
        `high_hz` is above half the rate, or a band lies between two bins of the transform.
    Source: the mel scale of Slaney's Auditory Toolbox (1998): linear up to 1000 Hz, logarithmic above. Its lowest bands
        are wider than those of HTK's scale, of which some would hold no bin.
    """
    window, hop = (_count_samples(name, getattr(spec, name), sample_rate_hz) for name in _DURATIONS)
    if window > spec.fft_size:
        raise ValueError(f"window_seconds={spec.window_seconds} are {window} samples; fft_size={spec.fft_size}")
    if spec.high_hz > sample_rate_hz / 2:
        raise ValueError(f"high_hz={spec.high_hz:g} must be at most half of sample_rate_hz={sample_rate_hz}")
    lowest, highest = _to_mel(np.array([spec.low_hz, spec.high_hz])).tolist()
    edges = _to_hz(np.linspace(lowest, highest, spec.num_mels + 2))  # (F + 2,)
    bins = np.arange(spec.fft_size // 2 + 1) * (sample_rate_hz / spec.fft_size)  # (bins,)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.maximum(0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))  # (F, bins)
    if empty := np.flatnonzero(~triangles.any(axis=1)).tolist():
        raise ValueError(
            f"fft_size={spec.fft_size} is too small for num_mels={spec.num_mels}: band {empty[0]} is empty"
        )
    width = int((triangles > 0).sum(axis=1).max())
    first = np.minimum(np.argmax(triangles > 0, axis=1), len(bins) - width)
    weights = np.take_along_axis(triangles, first[:, None] + np.arange(width), axis=1).T
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    return Bands(hann.astype(np.float32), hop, first, weights.astype(np.float32))


_DURATIONS = ("window_seconds", "hop_seconds")


def _count_samples(name: str, seconds: float, sample_rate_hz: int) -> int:
    num_samples = round(seconds * sample_rate_hz)
    if num_samples < 1 or abs(num_samples - seconds * sample_rate_hz) > 1e-6:
        raise ValueError(f"{name}={seconds} must be a whole number of samples at {sample_rate_hz} Hz")
    return num_samples


def _to_mel(hz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(hz < 1000, 3 * hz / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4))


def _to_hz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp(np.log(6.4) * (np.maximum(mel, 15) - 15) / 27))
