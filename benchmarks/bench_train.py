"""Measure an epoch of the Inception: the loop against a bare one, Ray Train against the loop alone, memory formats.

    python -m benchmarks.bench_train --features FEATURES [--repeats 3 --epochs 4 --batch_size 64]

- loop: an epoch of ``loop.py`` (batches made during training, with augmentation) against a bare PyTorch loop over the
  same batches, prepared in RAM, with the same model, optimiser, threads and memory format. Further sides: the bare loop
  in a process that keeps freed memory (``pipeline.training.loop``), the bare loop with plain NCHW tensors, and
  ``loop.py`` in bfloat16. Each side has its own process; they take turns, one epoch each.
- ray: ``jobs.train`` with ``--num_workers 0`` on all threads, with one Ray worker on all threads, and with one worker
  per thread. Times are from one line of ``history.csv`` to the next, so they include validation, checkpoint and Ray's
  exchanges, but not the start. The sides take turns, one run each; the first epoch of a run is excluded.

A figure is the median over all epochs of a side, a ratio the median over the turns. FEATURES is a folder that
``jobs.extract`` wrote; ``loop`` trains on all its clips, ``ray`` on the parts that ``jobs.train`` makes by default.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import Seconds, in_turns, median_ratio, start_job, timed
from pipeline.data.manifest import label_set
from pipeline.features.store import load_features
from pipeline.models.networks import build_model
from pipeline.training.batches import TrainingData, from_arrays
from pipeline.training.config import FitConfig
from pipeline.training.loop import Run, batches_of, keep_freed_memory
from pipeline.training.losses import ClassificationLoss
from tests.support.processes import machine

AUGMENT = ("crop", "stretch", "shift", "masks", "mixup")
Batch = tuple[Tensor, Tensor]
FIT, BF16, BARE, KEPT, NCHW = SIDES = (
    "loop.py", "loop.py, bfloat16", "bare loop", "bare loop, memory kept", "bare loop, NCHW",
)  # fmt: skip


def all_clips(features: Path) -> TrainingData:
    """All clips as training data, without a validation part."""
    arrays = load_features(features)
    labels = label_set(arrays.table)
    classes = np.array([labels.index(name) for name in arrays.table["label"]], dtype=np.int64)
    originals = np.flatnonzero(arrays.table["parent_id"] == "")
    return from_arrays(arrays, classes, len(labels), originals, np.empty(0, np.int64))


def bare_loop(data: TrainingData, config: FitConfig, batches: Sequence[Batch]) -> Callable[[], None]:
    """An epoch of a hand-written loop over batches in RAM."""
    torch.manual_seed(config.seed)
    model = build_model("inception", {}, data.n_classes, data.config.input_shape)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loss_of = ClassificationLoss(data.n_classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)

    def epoch() -> None:
        model.train()
        for features, targets, _ in batches:
            optimizer.zero_grad(set_to_none=True)
            loss_of(model(features), targets).backward()
            optimizer.step()

    return epoch


def fit_loop(data: TrainingData, config: FitConfig) -> Run:
    """The same epoch through ``loop.py``."""
    torch.manual_seed(config.seed)
    return Run(build_model("inception", {}, data.n_classes, data.config.input_shape), data, config)


def run_side(name: str, arguments: argparse.Namespace, connection: Connection) -> None:
    """One side in its own process: returns the seconds for each requested ``epoch`` or ``batches``."""
    data = all_clips(arguments.features)
    config = FitConfig(batch_size=arguments.batch_size, augment=AUGMENT, threads=arguments.threads)
    torch.set_num_threads(arguments.threads)
    making = batches_of(data, config)
    if name in (FIT, BF16):
        epoch: Callable[[], object] = fit_loop(data, replace(config, cpu_bfloat16=name == BF16)).epoch
    else:
        if name == KEPT:
            keep_freed_memory()
        epoch = bare_loop(data, replace(config, channels_last=name != NCHW), list(making.epoch(1)))
    epoch()  # warm-up
    connection.send(len(data.train_rows))
    calls: dict[str, Callable[[], object]] = {"epoch": epoch, "batches": lambda: list(making.epoch(2))}
    while (asked := connection.recv()) is not None:
        connection.send(timed(calls[asked]))


@contextmanager
def sides_of(arguments: argparse.Namespace) -> Iterator[dict[str, Connection]]:
    """A process for each side, after its warm-up."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, Connection] = {}
    processes = []
    try:
        for name in SIDES:
            found[name], theirs = context.Pipe()
            process = context.Process(target=run_side, args=(name, arguments, theirs), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()
            arguments.clips = found[name].recv()
        yield found
    finally:
        for process in processes:
            process.kill()
            process.join()


def loop(arguments: argparse.Namespace) -> None:
    """Print the loop's epoch time against the bare loop's."""

    def ask(side: Connection, what: str) -> float:
        side.send(what)
        return float(side.recv())

    with sides_of(arguments) as sides:
        seconds = in_turns({name: partial(ask, side, "epoch") for name, side in sides.items()}, arguments.repeats)
        making_s = statistics.median(ask(sides[FIT], "batches") for _ in range(3))
    batches = f"batches of {arguments.batch_size}, {arguments.threads} threads"
    print(f"an epoch of {arguments.clips} clips, {batches}, medians:")
    for name, values in seconds.items():
        print(f"  {name:<24} {statistics.median(values):7.2f} s")
    print(f"  {'making batches':<24} {making_s:7.2f} s of loop.py's, with {', '.join(AUGMENT)}")
    result("loop.py against the bare loop", seconds[BARE], seconds[FIT], 0.95)
    result("loop.py against the bare loop that keeps freed memory, as loop.py does", seconds[KEPT], seconds[FIT])
    result("loop.py in bfloat16 against float32", seconds[FIT], seconds[BF16])
    result("channels-last against NCHW", seconds[NCHW], seconds[BARE])
    result("freed memory kept against given back", seconds[BARE], seconds[KEPT])


def epoch_seconds(arguments: argparse.Namespace, workers: int, threads: int, out: Path) -> list[float]:
    """Seconds between the lines of a run's history.csv."""
    words = ["--features", arguments.features, "--out", out, "--epochs", arguments.epochs, "--patience", 0]
    words += ["--batch_size", arguments.batch_size, "--augment", ",".join(AUGMENT), "--report_split", "none"]
    words += ["--num_workers", workers, "--threads", threads]
    process = start_job("jobs.train", *words)
    written_s: list[float] = []
    while process.poll() is None:
        try:
            changed_s = (out / "history.csv").stat().st_mtime_ns / 1e9
        except OSError:
            changed_s = 0.0
        if changed_s and (not written_s or changed_s != written_s[-1]):
            written_s.append(changed_s)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"jobs.train ended with {process.returncode}:\n{process.communicate()[1]}")
    epochs_s = written_s[-arguments.epochs :]  # the run begins with an empty file
    return list(np.diff(epochs_s))


def ray(arguments: argparse.Namespace) -> None:
    """Print the epoch times of Ray Train and of the loop alone."""
    threads = arguments.threads
    sides = {
        f"loop.py alone, {threads} threads": (0, threads),
        f"Ray, 1 worker x {threads} threads": (1, threads),
        f"Ray, {threads} workers x 1 thread": (threads, 1),
    }
    seconds: Seconds = {name: [] for name in sides}

    def median_epoch(name: str) -> float:
        with tempfile.TemporaryDirectory() as scratch:
            found = epoch_seconds(arguments, *sides[name], Path(scratch) / "run")
        seconds[name] += found
        return statistics.median(found)

    turns = in_turns({name: partial(median_epoch, name) for name in sides}, arguments.repeats)
    print("an epoch from one checkpoint to the next, medians:")
    for name, values in seconds.items():
        print(f"  {name:<28} {statistics.median(values):7.2f} s")
    alone, one, many = turns.values()
    result("Ray, 1 worker, against loop.py alone", alone, one, 0.95)
    result(f"Ray, {threads} workers, against loop.py alone", alone, many, 1.0)


def result(what: str, theirs: Sequence[float], ours: Sequence[float], wanted: float | None = None) -> None:
    """Print our speed relative to theirs."""
    ratio = median_ratio(theirs, ours)
    goal = "" if wanted is None else f" (wanted: at least {wanted:g}: {'met' if ratio >= wanted else 'MISSED'})"
    print(f"  {what}: {ratio:.2f} x the speed{goal}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=("loop", "ray"), default=["loop", "ray"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="of each run in the part ray")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    print(f"machine: {machine()}")
    if "loop" in arguments.parts:
        loop(arguments)
    if "ray" in arguments.parts:
        ray(arguments)


if __name__ == "__main__":
    main()
