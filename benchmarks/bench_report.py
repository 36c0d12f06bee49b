"""Measure seconds and peak memory of the report on up to a million predictions, and of a bootstrap over rows.

    python -m benchmarks.bench_report [--rows 1000 100000 1000000] [--repeats 3]

Synthetic predictions of eight classes (2 % unreadable, 5,000 speakers, five further columns) are written as Parquet.
Each measurement is a new process that reads them and writes the whole report: 1,000 resamples over recordings
and 1,000 over speakers, tables, charts, page. Times are medians over the repeats, memory is the largest peak. On a
busy machine, CPU seconds estimate the time on an idle one. "By rows" is the time of the bootstrap over recordings alone
with scikit-learn on resampled rows, from 5 resamples. Target for a million rows: under 60 s and 2 GiB.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import accuracy_score, f1_score

from pipeline.data.labels import RAVDESS_LABELS as LABELS
from pipeline.reporting.report import write_report

WANTED_S, WANTED_GIB = 60.0, 2.0


def made_up(rows: int, path: Path) -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 8, rows)
    logits = rng.normal(size=(rows, 8)).astype(np.float32)
    logits[np.arange(rows), np.where(rng.random(rows) < 0.87, truth, rng.integers(0, 8, rows))] += 4
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    failed = rng.random(rows) < 0.02
    names = np.array(LABELS)
    table = pd.DataFrame(
        {
            "speech": [f"/calls/2026/{i // 1000:04d}/{i:07d}.wav" for i in range(rows)],
            "label": names[truth],
            "speaker": rng.integers(0, min(5000, rows // 10), rows).astype(str),
            "sex": np.where(rng.random(rows) < 0.5, "female", "male"),
            "corpus": rng.choice(["one", "two", "three"], rows),
            "room": rng.integers(0, 40, rows).astype(str),
            "status": np.where(failed, "truncated", "ok"),
            "error": np.where(failed, "ends early", None),
            "label_name": names[truth],
            "predicted": np.where(failed, None, names[p.argmax(axis=1)]),
            "confidence": np.where(failed, np.nan, p.max(axis=1)),
            **{f"p_{name}": np.where(failed, np.nan, p[:, i]) for i, name in enumerate(LABELS)},
            "duration_s": np.where(failed, np.nan, rng.gamma(4, 2, rows)),
        }
    )
    table.to_parquet(path)


def report(path: Path, out: Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak GiB of this process for one report; call it in a new process."""
    start, start_cpu = time.perf_counter(), time.process_time()
    write_report(pd.read_parquet(path), LABELS, out, meta={"model": "made up"})
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return time.perf_counter() - start, time.process_time() - start_cpu, peak_gib


def by_rows_s(path: Path) -> float:
    """Estimated seconds of 1,000 resamples of rows, for accuracy and weighted F1."""
    table = pd.read_parquet(path, columns=["label_name", "predicted"]).dropna()
    truth, answer = (pd.Index(LABELS).get_indexer(pd.Index(table[c])) for c in ("label_name", "predicted"))
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    for _ in range(5):
        rows = rng.integers(0, len(truth), len(truth))
        accuracy_score(truth[rows], answer[rows])
        f1_score(truth[rows], answer[rows], average="weighted")
    return (time.perf_counter() - start) / 5 * 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, Python {platform.python_version()}, {arguments.repeats} repeats")
    print(f"{'rows':>10} {'report, s':>10} {'CPU, s':>10} {'peak, GiB':>10} {'by rows, s':>11}")
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        for rows in arguments.rows:
            path = Path(folder, f"{rows}.parquet")
            made_up(rows, path)
            found = []
            for _ in range(arguments.repeats):
                with get_context("spawn").Pool(1) as pool:
                    found.append(pool.apply(report, (path, Path(folder, "report"))))
            seconds, cpu_s, peaks = zip(*found, strict=True)
            median_s, peak_gib = statistics.median(seconds), max(peaks)
            missed |= median_s > WANTED_S or peak_gib > WANTED_GIB
            figures = f"{median_s:>10.1f} {statistics.median(cpu_s):>10.1f} {peak_gib:>10.2f}"
            print(f"{rows:>10,} {figures} {by_rows_s(path):>11.0f}", flush=True)
    print(f"wanted: under {WANTED_S:g} s and {WANTED_GIB:g} GiB: {'MISSED' if missed else 'met'}")
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
