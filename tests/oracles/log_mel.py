"""Log-mel features, one number at a time in float64.

Written from the definitions: the discrete Fourier transform as a sum; Hann's window; the mel scale of Slaney's Auditory
Toolbox (1998), 200/3 Hz a mel up to 1000 Hz and 27 mels for a factor of 6.4 above; triangles of height 1 between the
centres of the neighbouring bands.
"""

from cmath import exp as complex_exp
from collections.abc import Sequence
from math import cos, exp, log, pi

import numpy as np
import numpy.typing as npt


def to_mel(hz: float) -> float:
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * log(hz / 1000) / log(6.4)


def to_hz(mel: float) -> float:
    return mel * 200 / 3 if mel < 15 else 1000 * exp((mel - 15) * log(6.4) / 27)


def triangle(hz: float, low: float, centre: float, high: float) -> float:
    if hz <= low or hz >= high:
        return 0.0
    return (hz - low) / (centre - low) if hz <= centre else (high - hz) / (high - centre)


def log_mel(
    samples: Sequence[float],
    *,
    sample_rate_hz: int,
    window: int,
    hop: int,
    fft_size: int,
    num_mels: int,
    low_hz: float,
    high_hz: float,
    power_floor: float,
) -> npt.NDArray[np.float64]:
    """samples: (N,) → (T, F); window and hop in samples."""
    step = (to_mel(high_hz) - to_mel(low_hz)) / (num_mels + 1)
    edges = [to_hz(to_mel(low_hz) + step * number) for number in range(num_mels + 2)]
    rows = []
    for start in range(0, len(samples) - window + 1, hop):
        frame = [samples[start + n] * (0.5 - 0.5 * cos(2 * pi * n / window)) for n in range(window)]
        powers = []
        for k in range(fft_size // 2 + 1):
            total = sum(value * complex_exp(-2j * pi * k * n / fft_size) for n, value in enumerate(frame))
            powers.append(abs(total) ** 2)
        row = []
        for band in range(num_mels):
            power = sum(
                value * triangle(k * sample_rate_hz / fft_size, *edges[band : band + 3])
                for k, value in enumerate(powers)
            )
            row.append(log(max(power, power_floor)))
        rows.append(row)
    return np.array(rows)
