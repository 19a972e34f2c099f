"""Palettes: colours for any number of classes that differ as much as they can.

Source: distances are those of Oklab (Björn Ottosson 2020, "A perceptual color space for image processing").
"""

import numpy as np
import numpy.typing as npt

from service.tasks.letterbox import Colour

MAX_COLOURS = 256

_LEVELS = np.linspace(0, 255, 9).round()
_MIN_LIGHTNESS, _MAX_LIGHTNESS = 0.35, 0.9  # seen on white paper, beside dark ink and over a picture
_MAX_CHROMA = 0.19  # brighter ones glare over a picture
_FIRST = (0, 96, 191)

_TO_CONES = ((0.4122214708, 0.5363325363, 0.0514459929), (0.2119034982, 0.6806995451, 0.1073969566),
             (0.0883024619, 0.2817188376, 0.6299787005))  # fmt: skip
_TO_LAB = ((0.2104542553, 0.7936177850, -0.0040720468), (1.9779984951, -2.4285922050, 0.4505937099),
           (0.0259040371, 0.7827717662, -0.8086757660))  # fmt: skip


def make_palette(num_colours: int) -> tuple[Colour, ...]:
    """Choose colours one by one, each as far as can be from those before and from black and white.

    Args:
        num_colours: at most `MAX_COLOURS`. A shorter palette is the start of a longer one.
    """
    colours = np.stack(np.meshgrid(_LEVELS, _LEVELS, _LEVELS, indexing="ij"), axis=-1).reshape(-1, 3)
    places = to_oklab(colours)
    lightness, chroma = places[:, 0], np.linalg.norm(places[:, 1:], axis=1)
    is_fit = (lightness >= _MIN_LIGHTNESS) & (lightness <= _MAX_LIGHTNESS) & (chroma <= _MAX_CHROMA)
    colours, places = colours[is_fit], places[is_fit]
    taken = to_oklab(np.array([(0, 0, 0), (255, 255, 255)], np.float64))
    distances = np.linalg.norm(places[:, None] - taken, axis=2).min(axis=1)
    chosen = int(np.abs(colours - _FIRST).sum(axis=1).argmin())
    palette: list[Colour] = []
    for _ in range(num_colours):
        red, green, blue = colours[chosen].astype(int).tolist()
        palette.append((red, green, blue))
        distances = np.minimum(distances, np.linalg.norm(places - places[chosen], axis=1))
        chosen = int(distances.argmax())
    return tuple(palette)


def to_oklab(colours: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Change sRGB, (N, 3) in [0, 255], to lightness and two axes of hue."""
    values = colours / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)  # IEC 61966-2-1
    lab: npt.NDArray[np.float64] = np.cbrt(linear @ np.array(_TO_CONES).T) @ np.array(_TO_LAB).T
    return lab
