"""Colours: one for each class, readable on light and dark backgrounds, and the scale of the spectrogram.

Other classes than the usual emotions get the next free colour at their first use, and keep it. The page always shows
the word beside a colour.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ACCENT = "#2a9d96"
NEUTRAL = "#8a99a0"
FOR, AGAINST = "#ffb000", "#5aa9ff"

_EMOTIONS = {
    "angry": "#d0494f",
    "calm": "#3f9c8f",
    "disgust": "#7d8f2f",
    "fearful": "#8b62c4",
    "happy": "#d99a1e",
    "neutral": "#7b8a99",
    "sad": "#4179bd",
    "surprised": "#d96f34",
    "uncertain": "#a9b3b8",
    "silence": "#ccd3d6",
}
_OTHERS = (
    *("#b0579a", "#5c9a4a", "#2f8fb3", "#a8763e", "#6f6fd0", "#c25b74"),
    *("#4d8a72", "#94589e", "#a39a2c", "#58718f", "#c77d5b", "#7a6a52"),
)
_given: dict[str, str] = {}
_HEAT = ("#0b0d1f", "#2a1458", "#5f1a77", "#982b76", "#cf4266", "#f3704f", "#fbac5c", "#fcebb0")


def colour(label: str) -> str:
    """The colour of a class, by its name alone; it does not depend on the model's other classes."""
    return _EMOTIONS.get(label) or _given.setdefault(label, _OTHERS[len(_given) % len(_OTHERS)])


def ink(background: str) -> str:
    """Black or white, whichever is easier to read on ``background`` (WCAG's contrast ratio)."""
    parts = _rgb(background) / 255.0
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def heat(levels: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Colours ``(..., 3)`` of levels 0 (dark) to 1 (bright)."""
    stops = np.array([_rgb(stop) for stop in _HEAT])
    at = np.linspace(0.0, 1.0, len(stops))
    return np.stack([np.interp(levels, at, stops[:, i]) for i in range(3)], axis=-1).round().astype(np.uint8)


def grey(levels: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Greys ``(..., 3)`` of levels 0 to 1, never bright: a background to draw on."""
    return np.repeat((18 + 150 * levels)[..., None], 3, axis=-1).round().astype(np.uint8)


def _rgb(colour: str) -> NDArray[np.float64]:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float64)
