"""Hand-written batch scoring for comparison: a pool of processes with one thread each, without Ray.

    python -m benchmarks.pool_score FOLDER OUT MODEL [PROCESSES]

It uses the same decoder, features, network and table writer; only the distribution of the work differs. It cannot
resume, and handles neither crashes nor circular links.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa

from pipeline.inference.predictor import Predictor
from pipeline.scoring.predictions import to_table, write_tables

CHUNK = 256
_predictor: Predictor


def start(model: str) -> None:
    """Open the model; runs in each process of the pool."""
    global _predictor
    _predictor = Predictor.from_bundle(model, threads=1)


def score(paths: Sequence[str]) -> pa.Table:
    return to_table(_predictor.predict(paths), _predictor.labels)


def run(pool: multiprocessing.pool.Pool, paths: Sequence[str], out: Path, labels: Sequence[str]) -> None:
    """Score ``paths`` and write the tables."""
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    out.mkdir(parents=True)
    write_tables(pd.DataFrame({"speech": paths}), pool.imap(score, chunks), out, labels)


def open_pool(model: str, processes: int) -> multiprocessing.pool.Pool:
    os.environ["OMP_NUM_THREADS"] = "1"
    return multiprocessing.get_context("spawn").Pool(processes, start, (model,))


def main() -> None:
    folder, out, model = map(Path, sys.argv[1:4])
    processes = int(sys.argv[4]) if len(sys.argv) > 4 else os.cpu_count() or 1
    paths = sorted(str(path) for path in folder.rglob("*.*") if path.is_file())
    from pipeline.models.bundle import load_bundle

    with open_pool(str(model), processes) as pool:
        run(pool, paths, out, load_bundle(model).labels)


if __name__ == "__main__":
    main()
