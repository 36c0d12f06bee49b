"""Kill tests of batch scoring: kill the driver or workers with ``kill -9``, at random moments from a seed.

    python -m benchmarks.kill_score --data_dir RECORDINGS [--files 2000 --worker_kills 20 --engine local]

Every run scores the same folder. The driver is killed when a random share of the rows (5 to 95 %) is committed, and the
same command is started again. Workers are killed while they score, ``--kills_a_run`` in each run at random shares; that
run must finish by itself. Each kill is printed. At the end the rows of every run are compared, as multisets, with those
of an undisturbed run: lost, doubled and different rows are counted.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from benchmarks.common import kill_driver, start_job
from pipeline.models.backends import ensure_onnx
from pipeline.models.bundle import load_bundle
from tests.support.processes import command_of, descendants, finish, linked_folder, machine

BROKEN = {"empty.wav": b"", "words.wav": b"no audio, only words\n" * 30, "cut.flac": b"fLaC" + bytes(40)}
_WORKER = {"ray": "score_block", "local": "spawn_main"}  # part of the command line of worker processes
Rows = Counter[tuple[object, ...]]


def begin(arguments: argparse.Namespace, out: Path) -> subprocess.Popen[str]:
    """Start the command of a run."""
    words = ["jobs.score", "--input", arguments.folder, "--out", out, "--block_rows", arguments.block_rows]
    words += ["--model_weights", arguments.model_weights, "--no_report", "--tolerate_failures"]
    words += ["--num_cpus", arguments.num_cpus, "--engine", arguments.engine]
    return start_job(*words)


def rows_of(out: Path) -> Rows:
    """The rows of a table as tuples, probabilities rounded to six digits."""
    table = pd.read_parquet(out / "predictions.parquet")
    p = [name for name in table.columns if name.startswith("p_")]
    table[p] = table[p].round(6)
    kept = table[["speech", "status", "predicted", *p]].astype(object).where(table.notna(), None)
    return Counter(map(tuple, kept.itertuples(index=False)))


def committed_rows(out: Path) -> int:
    total = 0
    for part in (out / ".score").glob("part-*.parquet"):
        with suppress(OSError):  # the run has just finished and removed it
            total += rows_in(part)
    return total


@cache
def rows_in(part: Path) -> int:
    """Number of rows in a part; cached, because a part never changes and watching must not slow the run."""
    return int(pq.read_metadata(part).num_rows)


def wait_for(process: subprocess.Popen[str], out: Path, rows: int) -> bool:
    """Wait until a number of rows is committed; False where the run ended before."""
    while process.poll() is None:
        if committed_rows(out) >= rows:
            return True
        time.sleep(0.05)
    return False


def kill_and_resume(arguments: argparse.Namespace, out: Path, share: float) -> tuple[str, int]:
    """Kill the driver once, then start the command again; returns a description and the number of kills."""
    process = begin(arguments, out)
    hit = wait_for(process, out, int(share * arguments.files))
    ended = kill_driver(process)
    found = committed_rows(out) / arguments.files
    finish(begin(arguments, out), arguments.deadline_s)
    return f"driver killed at {found:6.1%} of the rows (wanted {share:.1%}); {ended}", int(hit)


def kill_workers(
    arguments: argparse.Namespace, out: Path, shares: list[float], rng: np.random.Generator
) -> tuple[str, int]:
    """Kill a random busy worker at each share of one run; returns a description and the number of kills."""
    process = begin(arguments, out)
    kills = []
    for share in sorted(shares):
        if not wait_for(process, out, int(share * arguments.files)):
            break
        busy = [pid for pid in descendants(process.pid) if _WORKER[arguments.engine] in command_of(pid)]
        if busy:
            os.kill(int(rng.choice(busy)), signal.SIGKILL)
            kills.append(committed_rows(out) / arguments.files)
    finish(process, arguments.deadline_s)
    return f"workers killed at {', '.join(f'{kill:.1%}' for kill in kills)} of the rows", len(kills)


def compare(expected: Rows, out: Path) -> tuple[int, int, int]:
    """Rows lost, doubled and different, of a finished run."""
    found = rows_of(out)
    names, wanted = (Counter(row[0] for row in rows.elements()) for rows in (found, expected))
    lost, doubled = (wanted - names).total(), (names - wanted).total()
    return lost, doubled, (expected - found).total() - lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--model_weights", type=Path, help="default: the shipped bundle")
    parser.add_argument("--engine", choices=_WORKER, default="ray")
    parser.add_argument("--files", type=int, default=2_000)
    parser.add_argument("--block_rows", type=int, default=40)
    parser.add_argument("--num_cpus", type=int, default=os.cpu_count())
    parser.add_argument("--driver_kills", type=int, default=20)
    parser.add_argument("--worker_kills", type=int, default=20)
    parser.add_argument("--kills_a_run", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deadline_s", type=float, default=600, help="seconds after which a run is aborted")
    parser.add_argument("--scratch", type=Path, help="folder for the runs; default: beside DATA_DIR, for hard links")
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.model_weights)
    ensure_onnx(bundle)
    arguments.model_weights = bundle.folder
    rng = np.random.default_rng(arguments.seed)
    files = f"{arguments.files:,} files, {len(BROKEN)} of them broken"
    print(f"machine: {machine()}\nmodel: {bundle.name}; {files}; seed {arguments.seed}")
    beside = arguments.scratch or arguments.data_dir.absolute().parent
    with tempfile.TemporaryDirectory(dir=beside, prefix=".kill-") as scratch:
        arguments.folder = linked_folder(arguments.data_dir, Path(scratch) / "audio", arguments.files - len(BROKEN))
        for name, content in BROKEN.items():
            (arguments.folder / name).write_bytes(content)
        start_s = time.monotonic()
        finish(begin(arguments, Path(scratch) / "undisturbed"), arguments.deadline_s)
        print(f"undisturbed run: {time.monotonic() - start_s:.1f} s", flush=True)
        expected = rows_of(Path(scratch) / "undisturbed")
        totals = np.zeros(4, dtype=int)
        driver = [("driver", [share]) for share in rng.uniform(0.05, 0.95, arguments.driver_kills)]
        shares = rng.uniform(0.05, 0.95, arguments.worker_kills)
        a_run = arguments.kills_a_run
        workers = [("workers", list(shares[i : i + a_run])) for i in range(0, len(shares), a_run)]
        for number, (kind, at) in enumerate([*driver, *workers]):
            out = Path(scratch) / f"{kind}-{number}"
            killed = kind == "driver"
            text, kills = kill_and_resume(arguments, out, at[0]) if killed else kill_workers(arguments, out, at, rng)
            lost, doubled, different = compare(expected, out)
            totals += [kills, lost, doubled, different]
            print(f"  {text}: {lost} lost, {doubled} doubled, {different} different", flush=True)
    kills, lost, doubled, different = totals
    print(f"{kills} kills, {expected.total():,} rows a run: {lost} lost, {doubled} doubled, {different} different")
    sys.exit(bool(lost or doubled or different))


if __name__ == "__main__":
    main()
