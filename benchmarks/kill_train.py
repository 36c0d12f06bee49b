"""Kill tests of training: kill a Ray Train worker or the driver with ``kill -9``, at random moments from a seed.

    python -m benchmarks.kill_train --data_dir RECORDINGS [--clips 96 --epochs 8 --kills 5 --seed 0]

Every run trains the same model on the same clips. A moment is drawn in epochs, between 0 and the last epoch of the
undisturbed run. The kill comes as soon as the run reaches it; the workers report their progress batch by batch.
After a killed worker the run must finish by itself. After a killed driver, the script waits for its processes to end
and starts the same command again with ``--resume``. Each kill is printed. Every run must exit with 0 and have a bundle
that loads. ``history.csv`` must list every epoch once; its losses are compared with those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.common import kill_driver, start_job
from pipeline.cluster.ray_internals import TRAIN_WORKER
from pipeline.data.manifest import scan_folder
from pipeline.models.bundle import load_bundle
from pipeline.training.run import read_history
from tests.support.processes import command_of, descendants, finish, machine


def sample(data_dir: Path, clips: int, path: Path) -> Path:
    """Manifest of every n-th recording of each class, which keeps the shares of the classes."""
    table = scan_folder(data_dir).sort_values(["label", "speech"])
    table.iloc[np.linspace(0, len(table) - 1, clips).round().astype(int)].to_csv(path, index=False)
    return path


def begin(arguments: argparse.Namespace, out: Path, *more: str) -> subprocess.Popen[str]:
    """Start the command of a run."""
    words = ["--features", arguments.features, "--out", out, "--epochs", arguments.epochs, "--patience", 0]
    words += ["--num_workers", arguments.num_workers, "--batch_size", arguments.batch_size, "--lr", 1e-3, *more]
    return start_job("jobs.train", *words)


def progress(out: Path) -> float:
    """Finished epochs plus the share of the current one."""
    done = float(len(read_history(out)))
    try:
        epoch, batches, total = json.loads((out / "ray" / "progress.json").read_text(encoding="utf-8"))
    except OSError:
        return done
    return max(done, epoch - 1 + batches / total)


def wait_for(process: subprocess.Popen[str], out: Path, moment: float) -> None:
    """Wait until a run has reached a moment, in epochs."""
    while progress(out) < moment or not workers_of(process.pid):
        if process.poll() is not None:
            raise SystemExit(f"the run ended before epoch {moment:.2f}:\n{process.communicate()[1]}")
        time.sleep(0.1)


def workers_of(driver: int) -> list[int]:
    return sorted(pid for pid in descendants(driver) if command_of(pid).startswith(TRAIN_WORKER))


def kill_worker(arguments: argparse.Namespace, out: Path, moment: float, rng: np.random.Generator) -> str:
    """Kill a random worker once; returns a description."""
    process = begin(arguments, out)
    wait_for(process, out, moment)
    victim = int(rng.choice(workers_of(process.pid)))
    found = progress(out)
    os.kill(victim, signal.SIGKILL)
    start_s = time.monotonic()
    finish(process, arguments.deadline_s)
    took_s = time.monotonic() - start_s
    return f"worker killed at epoch {found:.2f} (wanted {moment:.2f}), finished {took_s:.0f} s later"


def kill_and_resume(arguments: argparse.Namespace, out: Path, moment: float) -> str:
    """Kill the driver once, then start the command again; returns a description."""
    process = begin(arguments, out)
    wait_for(process, out, moment)
    found, ended = progress(out), kill_driver(process)
    kept = len(read_history(out))
    finish(begin(arguments, out, "--resume"), arguments.deadline_s)
    return f"driver killed at epoch {found:.2f} (wanted {moment:.2f}); {ended}; resumed after epoch {kept}"


def check(arguments: argparse.Namespace, out: Path, expected: pd.DataFrame) -> tuple[str, bool]:
    """Describe a finished run; True where everything is as expected."""
    history = pd.DataFrame(read_history(out))
    once = history["epoch"].tolist() == list(range(1, arguments.epochs + 1))
    bundle = load_bundle(out)
    bundle.build_model()
    right = once and bundle.metrics["training"]["epochs"] == arguments.epochs
    text = f"{len(history)} epochs" + (", each once" if once else f", listed as {history['epoch'].tolist()}")
    if once:
        gap = (history["train_loss"].astype(float) - expected["train_loss"].astype(float)).abs().max()
        text += f", losses within {gap:.1g} of the undisturbed run's"
    return f"{text}, bundle loads", right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=5, help="kills of a worker, and as many of the driver")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deadline_s", type=float, default=900, help="seconds after which a run is aborted")
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    print(f"machine: {machine()}")
    print(f"{arguments.clips} clips, {arguments.epochs} epochs, {arguments.num_workers} workers; seed {arguments.seed}")
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        arguments.features = folder / "features"
        manifest = sample(arguments.data_dir, arguments.clips, folder / "clips.csv")
        extract = start_job("jobs.extract", "--data_csv", manifest, "--out", arguments.features)
        finish(extract, arguments.deadline_s)
        start_s = time.monotonic()
        finish(begin(arguments, folder / "undisturbed"), arguments.deadline_s)
        expected = pd.DataFrame(read_history(folder / "undisturbed"))
        print(f"undisturbed run: {len(expected)} epochs, {time.monotonic() - start_s:.0f} s", flush=True)
        for kind in ("worker", "driver"):
            for number, moment in enumerate(rng.uniform(0, len(expected), arguments.kills)):
                out = folder / f"{kind}-{number}"
                kill = partial(kill_worker, rng=rng) if kind == "worker" else kill_and_resume
                text = kill(arguments, out, moment)
                found, right = check(arguments, out, expected)
                failed += not right
                print(f"  {text}: {found}", flush=True)
    print(f"{2 * arguments.kills} kills, {failed} wrong runs")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
