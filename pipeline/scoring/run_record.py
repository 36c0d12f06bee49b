"""What a scoring run says of itself: the plan that decides its result, and the record that closes it (``run.json``)."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.models.bundle import Bundle
from pipeline.scoring.options import ScoreOptions
from pipeline.storage.ledger import LEDGER_VERSION
from pipeline.storage.stamps import stamps_of

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
