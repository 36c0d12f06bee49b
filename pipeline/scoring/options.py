"""What is asked of the model when recordings are scored, by ``jobs.score`` and ``jobs.infer`` alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.audio.windows import SlidingWindow, check_crops
from pipeline.inference.timeline import SILENCE_DBFS
from pipeline.storage.errors import SerError

if TYPE_CHECKING:
    from pipeline.audio.load import Channel
    from pipeline.inference.predictor import Channels


@dataclass(frozen=True)
class ScoreOptions:
    """What is asked of the model. A run is resumed only under the same options.

    Attributes:
        crops: windows a recording; the bundle's own number when None.
        min_confidence: answers below it become ``uncertain``; no evaluation changes by it.
        channels: ``mix``, the number of one channel, or ``each``, which implies windows.
        window_s: hear all of a recording in windows of this length; None for its middle, or its crops.
        hop_s: from one window's start to the next one's; ``window_s`` when None.
        silence_dbfs: RMS level below which a window is ``silence``.
    """

    crops: int | None = None
    min_confidence: float = 0.0
    channels: Channels = "mix"
    window_s: float | None = None
    hop_s: float | None = None
    silence_dbfs: float = SILENCE_DBFS

    def __post_init__(self) -> None:
        if self.crops is not None:
            check_crops(self.crops)
        if not 0.0 <= self.min_confidence <= 1.0:
            raise SerError(f"min_confidence must lie in 0..1, got {self.min_confidence}")
        if not math.isfinite(self.silence_dbfs):
            raise SerError(f"silence_dbfs must be a finite number, got {self.silence_dbfs}; -300 calls nothing silence")
        if self.hop_s is not None and self.window_s is None:
            raise SerError(f"hop_s {self.hop_s:g} needs window_s; give --window_s too")
        if self.window_s is None and self.channels == "each":
            raise SerError("channels heard each on their own are heard in windows; give --window_s too")
        if self.crops is not None and self.window_s is not None:
            raise SerError("crops and window_s exclude each other: windows hear all of a recording; leave one out")
        _ = self.steps  # checks the rest

    @property
    def steps(self) -> SlidingWindow | None:
        """The windows, when there are any."""
        if self.window_s is None:
            return None
        return SlidingWindow(self.window_s, self.window_s if self.hop_s is None else self.hop_s)

    @property
    def tables(self) -> list[str]:
        """The tables that a run leaves."""
        windowed = ["segments"] if self.window_s is not None else []
        return ["predictions", *windowed, *(["channels"] if self.channels == "each" else [])]

    @property
    def channel(self) -> Channel:
        """The one channel that is heard, where it is not each."""
        if self.channels == "each":
            raise ValueError("each channel is heard, not one")
        return self.channels
