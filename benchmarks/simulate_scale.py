"""Measure the cost of the driver: a scoring run of many files on many logical CPUs, with a sleep in place of the model.

Everything is as in ``jobs.score`` (listing, plan, Ray Data, ledger, tables, ``run.json``), except that a block is not
decoded and classified. Instead a worker sleeps for the usual time, and returns a constant prediction. So hundreds of
logical CPUs fit on a few real ones, and only the cost that more nodes do not reduce is left. It prints the CPU seconds
of the driver and of Ray's own processes for each phase; other work on the machine changes these little. The cost of a
file is the slope between two sizes. docs/scaling.md draws the conclusions.

    python -m benchmarks.simulate_scale [--engine ray|local] --sizes 20000 100000 --num_cpus 32

``--engine local`` does the same with this machine's processes, without Ray.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline.audio.load import EXTENSIONS
from pipeline.cluster.runtime import start_ray
from pipeline.inference.predictor import Prediction, ScoreOptions
from pipeline.models.bundle import load_bundle
from pipeline.scoring.blocks import Task, make_block
from pipeline.scoring.predictions import to_table
from pipeline.scoring.scoring import Execution, score_manifest
from pipeline.storage.files import scan
from tests.support.processes import command_of, descendants, machine, resident_bytes, sampled

CLIP_S = 0.0076  # docs/benchmarks.md: slope between 5,000 and 20,000 files
PHASES = ("list", "plan", "blocks", "tables")
WHO = ("driver", "Ray's processes")
Costs = dict[str, dict[str, float]]  # process -> phase -> CPU seconds
SYSTEM = ("raylet", "gcs_server")
_TICKS = os.sysconf("SC_CLK_TCK")


def stand_in(rows: int, labels: Sequence[str]) -> pa.Table:
    """The constant result of a worker for ``rows`` recordings."""
    p = np.full(len(labels), 0.5 / (len(labels) - 1))
    p[0] = 0.5
    heard = Prediction("ok", None, labels[0], 0.5, p, 3.5, 2.0, 48_000, 1, -30.0)
    return to_table([heard] * rows, labels)


def sleeping_block(rows: pa.Table, task: Task) -> pa.Table:
    """Replacement of ``blocks.score_block`` that sleeps."""
    time.sleep(CLIP_S * len(rows))
    table = stand_in(len(rows), load_bundle(task.weights).labels)
    return table.append_column("block", rows["block"]).append_column("position", rows["position"])


def make_files(folder: Path, n: int) -> None:
    """Make ``n`` empty files, 1,000 in each sub-folder."""
    for i in range(n):
        path = folder / f"{i // 1000:05d}" / f"{i:08d}.wav"
        if i % 1000 == 0:
            path.parent.mkdir(parents=True)
        path.touch()


def cpu_s() -> tuple[float, float]:
    """CPU seconds used so far by this process, and by Ray's own processes, children of this one."""
    total = 0.0
    for pid in descendants(os.getpid()):
        if Path(command_of(pid).split(" ")[0]).name in SYSTEM:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / _TICKS
    return time.process_time(), total


def simulate(folder: Path, out: Path, execution: Execution) -> tuple[Costs, float]:
    """Score ``folder``; returns the CPU seconds of each phase, by process, and the seconds in all."""
    marks, begin_s = [cpu_s()], time.monotonic()
    table = pd.DataFrame({"speech": scan(folder, EXTENSIONS).files})
    marks.append(cpu_s())

    def progress(done: int, total: int, failed: int) -> None:
        if done in (0, total):  # before the first block, and after the last
            marks.append(cpu_s())

    with patch("pipeline.scoring.scoring.score_block", sleeping_block):
        options = ScoreOptions(crops=1)
        run = score_manifest(table, out, options=options, execution=execution, report=False, on_progress=progress)
    marks.append(cpu_s())
    if run.rows != len(table) or run.statuses != {"ok": len(table)}:
        raise SystemExit(f"{run.rows} rows, {run.statuses}: expected {len(table)} that are ok")
    steps = np.diff(marks, axis=0).T  # (processes, phases)
    costs = {who: dict(zip(PHASES, step, strict=True)) for who, step in zip(WHO, steps, strict=True)}
    return costs, time.monotonic() - begin_s


def bytes_a_file(labels: Sequence[str], path: str) -> tuple[float, float]:
    """Bytes per recording through the object store, to the worker and back."""
    rows = 256
    asked = make_block(0, [path] * rows)
    answer = stand_in(rows, labels)
    for column in ("block", "position"):
        answer = answer.append_column(column, asked[column])
    return asked.nbytes / rows, answer.nbytes / rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("ray", "local"), default="ray")
    parser.add_argument("--sizes", type=int, nargs=2, default=[20_000, 100_000], help="files, two sizes")
    parser.add_argument("--num_cpus", type=int, default=32, help="logical CPUs; each is a sleeping process")
    parser.add_argument("--scratch", type=Path, help="folder for the files (default: the system's)")
    arguments = parser.parse_args()
    print(f"machine: {machine()}\nlogical CPUs: {arguments.num_cpus}, {CLIP_S * 1e3:g} ms of sleep a file\n")
    if arguments.engine == "ray":
        start_ray(arguments.num_cpus)
    execution = Execution(arguments.engine, num_cpus=arguments.num_cpus, block_rows=256)
    found: list[Costs] = []
    heads = ["files", "", *PHASES, "seconds in all", "driver's memory, MiB"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="simulate-") as scratch:
        for n in (2_000, *arguments.sizes):  # the first run warms up
            make_files(Path(scratch) / f"in-{n}", n)
            with sampled(lambda: resident_bytes(os.getpid()), 0.2) as peak:
                costs, seconds = simulate(Path(scratch) / f"in-{n}", Path(scratch) / f"out-{n}", execution)
            found.append(costs)
            for who in WHO:
                cells = " | ".join(f"{costs[who][name]:.2f} s" for name in PHASES)
                print(f"| {n:,} | {who} | {cells} | {seconds:.0f} | {peak[0] / 2**20:.0f} |", flush=True)
        kept = sum(path.stat().st_size for path in (Path(scratch) / f"out-{arguments.sizes[-1]}").iterdir())
    (_, first, second), (small, large) = found, arguments.sizes
    for who in WHO:
        slope = {name: (second[who][name] - first[who][name]) / (large - small) * 1e6 for name in PHASES}
        cells = " | ".join(f"{slope[name]:.1f} ms" for name in PHASES)
        print(f"| 1,000 more | {who} | {cells} | {sum(slope.values()):.1f} ms of CPU together |", flush=True)
    there, back = bytes_a_file(load_bundle().labels, f"{tempfile.gettempdir()}/folder/00042/00042042.wav")
    print(f"\nobject store: {there:.0f} bytes a file to the worker, {back:.0f} back")
    print(f"tables: {kept / large:.0f} bytes a file on the disk")


if __name__ == "__main__":
    main()
