"""What is asked of the model when recordings are scored, by ``jobs.score`` and ``jobs.infer`` alike.

What a scoring run says of itself: the plan that decides its result, and the record that closes it (``run.json``).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.audio.load import Channel
from pipeline.audio.windows import SlidingWindow, check_crops
from pipeline.inference.predictor import Channels
from pipeline.inference.timeline import SILENCE_DBFS
from pipeline.models.bundle import Bundle
from pipeline.scoring.ledger import LEDGER_VERSION
from pipeline.storage.errors import SerError
from pipeline.storage.remote import stamps_of


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


LONG_S = 6.0  # of recordings longer than this, most is not heard unless in windows


@dataclass
class Tally:
    """What the parts add up to."""

    statuses: Counter[str] = field(default_factory=Counter)
    duration_s: float = 0.0
    scored_s: float = 0.0
    long: int = 0
    noted: int = 0

    def add(self, part: pa.Table) -> None:
        """Count the rows of a part."""
        self.statuses.update(part["status"].to_pylist())
        self.duration_s += pc.sum(part["duration_s"]).as_py() or 0.0
        self.scored_s += pc.sum(part["scored_s"]).as_py() or 0.0
        if "notice" in part.column_names:
            self.noted += len(part) - part["notice"].null_count
        self.long += pc.sum(pc.greater(part["duration_s"], LONG_S)).as_py() or 0


def plan_of(table: pd.DataFrame, bundle: Bundle, options: ScoreOptions) -> dict[str, Any]:
    """What decides the result: a resumed run must agree in all of it."""
    return {
        "version": LEDGER_VERSION,
        "model": bundle.weights_sha256,
        "labels": list(bundle.labels),
        "temperature": bundle.temperature,
        "features": bundle.features.fingerprint(),
        **asdict(options),
        "crops": options.crops or bundle.crops,
        "rows": len(table),
        "input": _digest(table),
        "recordings": hashlib.sha256(stamps_of(table["speech"].tolist()).tobytes()).hexdigest(),
    }


def record_of(
    plan: Mapping[str, Any],
    block_rows: int,
    bundle: Bundle,
    options: ScoreOptions,
    tally: Tally,
    scored: int,
    seconds: float,
) -> dict[str, Any]:
    """The content of ``run.json``.

    Args:
        plan: as ``plan_of`` gives it; block_rows: rows a block, which a resumption keeps to.
        tally: of all rows; scored: how many of them were scored by this start of the job, in ``seconds``.
    """
    rows, good = tally.statuses.total(), tally.statuses["ok"]
    unheard = f"{tally.scored_s:,.0f} s of {tally.duration_s:,.0f} s" if tally.long > good / 2 else None
    return {
        "version": LEDGER_VERSION,
        "model": bundle.name,
        "model_sha256": bundle.weights_sha256,
        "features_fingerprint": plan["features"],
        "labels": list(bundle.labels),
        "options": asdict(options),
        "rows": rows,
        "ok": good,
        "failed": rows - good,
        "statuses": dict(sorted(tally.statuses.items())),
        "duration_s": round(tally.duration_s, 3),
        "scored_s": round(tally.scored_s, 3),
        "noted": tally.noted,
        "unheard": unheard if options.window_s is None else None,
        "scored_now": scored,
        "seconds": round(seconds, 3),
        "files_per_s": round(scored / seconds, 2) if seconds else 0.0,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "plan": dict(plan),
        "block_rows": block_rows,
    }


def _digest(table: pd.DataFrame) -> str:
    """Hash of the manifest's cells and column names."""
    digest = hashlib.sha256(repr(list(table.columns)).encode())
    for begin in range(0, len(table), 4096):
        digest.update(table.iloc[begin : begin + 4096].to_csv(index=False, header=False).encode())
    return digest.hexdigest()
