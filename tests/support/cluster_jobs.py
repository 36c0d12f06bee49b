"""The jobs of the cluster tests, on recordings made here: how they are given, how far they are, what they left."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import soundfile

from pipeline.data.labels import RAVDESS_LABELS
from pipeline.training.run import read_history
from tests.support.hosts import ROOT, Hosts
from tests.support.recordings import synthetic_speech

RATE_HZ = 16_000
DEADLINE_S = 1800.0


def make_recordings(folder: Path, count: int, seconds: float = 2.0) -> Path:
    """``count`` different recordings below ``folder``, and ``metadata.csv`` beside them; returns that file."""
    audio = folder / "audio"
    audio.mkdir(parents=True)
    rows = []
    for i in range(count):
        name = f"{i:05d}.wav"
        soundfile.write(audio / name, synthetic_speech(seconds, RATE_HZ, seed=i), RATE_HZ, subtype="PCM_16")
        rows.append({"speech": f"audio/{name}", "label": RAVDESS_LABELS[i % 8], "speaker": f"S{i // 8 % 4}"})
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    return folder / "metadata.csv"


@dataclass
class Work:
    """A job as the tests give it.

    Attributes:
        kind: ``extract``, ``train``, ``score`` or ``evaluate``.
        words: its command, with absolute paths on the shared folder, without ``--out``.
        titles: words in the titles of Ray's workers while they do its work.
        progress: share of the work that is done, from what is in the folder.
        check: what a finished folder holds: (rows wanted, rows lost, rows doubled, rows different).
    """

    kind: str
    words: list[str]
    titles: tuple[str, ...]
    progress: Callable[[Path], float]
    check: Callable[[Path], tuple[int, int, int, int]]
    again: list[str] = field(default_factory=list)


def extraction(data: Path, count: int, block_rows: int) -> Work:
    blocks = -(-count // block_rows)

    def check(out: Path) -> tuple[int, int, int, int]:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        rows = pd.concat([pd.read_parquet(out / name, columns=["row_id", "status"]) for name in manifest["parts"]])
        left = len(list(out.glob(".part-*"))) + len([p for p in out.glob("part-*") if p.name not in manifest["parts"]])
        bad = int((rows["status"] != "ok").sum()) + left
        return count, count - rows["row_id"].nunique(), len(rows) - rows["row_id"].nunique(), bad

    words = ["extract", "--data_csv", str(data), "--block_rows", str(block_rows)]
    return Work("extract", words, ("MapBatches",), lambda out: len(list(out.glob("part-*.parquet"))) / blocks, check)


def training(features: Path, epochs: int) -> Work:
    def progress(out: Path) -> float:
        done = float(len(read_history(out)))
        try:
            epoch, batches, total = json.loads((out / "ray" / "progress.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return done / epochs
        return float(max(done, epoch - 1 + batches / total) / epochs)

    def check(out: Path) -> tuple[int, int, int, int]:
        from pipeline.models.bundle import load_bundle

        load_bundle(out).build_model()
        seen = [int(record["epoch"]) for record in read_history(out)]
        return epochs, len(set(range(1, epochs + 1)) - set(seen)), len(seen) - len(set(seen)), 0

    words = ["train", "--features", str(features), "--epochs", str(epochs), "--patience", "0", "--num_workers", "2"]
    words += ["--batch_size", "16", "--threads", "1", "--report_split", "none"]
    return Work("train", words, ("RayTrainWorker",), progress, check, ["--resume"])


def scoring(data: Path, count: int, block_rows: int, like: Path | None = None) -> Work:
    """Scoring with the shipped model; ``like`` is the folder of a run that must have given the same answers."""
    blocks = -(-count // block_rows)

    def check(out: Path) -> tuple[int, int, int, int]:
        table = pd.read_parquet(out / "predictions.parquet")
        names = table["speech"]
        different = int((table["status"] != "ok").sum())
        if like is not None:
            expected = pd.read_parquet(like / "predictions.parquet", columns=["predicted"])
            different += int((table["predicted"].to_numpy() != expected["predicted"].to_numpy()).sum())
        return count, count - names.nunique(), len(table) - names.nunique(), different

    words = ["score", "--input", str(data), "--block_rows", str(block_rows), "--no_report"]

    def progress(out: Path) -> float:
        if (out / "run.json").is_file():
            return 1.0
        return len(list((out / ".score").glob("part-*.parquet"))) / blocks

    return Work("score", words, ("MapBatches", "score_block"), progress, check)


def evaluation(data: Path, count: int) -> Work:
    """Evaluation of the shipped model; its progress is not told before the end."""

    def check(out: Path) -> tuple[int, int, int, int]:
        table = pd.read_parquet(out / "predictions.parquet", columns=["speech", "status"])
        found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        wrong = int((table["status"] != "ok").sum()) + abs(found["n"]["read"] - count)
        return count, count - table["speech"].nunique(), len(table) - table["speech"].nunique(), wrong

    def progress(out: Path) -> float:
        return float((out / "run.json").is_file())

    return Work("evaluate", ["evaluate", "--data_csv", str(data)], ("MapBatches", "score_block"), progress, check)


class Running:
    """A job given on the head, and where its work was seen."""

    def __init__(self, hosts: Hosts, work: Work, out: Path, *, plain: bool, again: bool = False) -> None:
        self.hosts, self.work, self.out = hosts, work, out
        self.seen = {host.name: 0 for host in hosts.all}
        job = [*work.words, "--out", str(out), *(work.again if again else [])]
        url = f"http://127.0.0.1:{hosts.dashboard}"
        if plain:
            words = ["ray", "job", "submit", "--address", url, "--working-dir", ".", "--"]
            words += ["python", "-m", f"jobs.{job[0]}", *job[1:]]
        else:
            words = [sys.executable, "-m", "jobs.submit", *job, "--address", url]
        self.command = words
        self.log = hosts.folder / f"job-{time.time_ns()}.log"
        self.begin_s = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                hosts.inside(hosts.head, words, as_client=True),
                env=hosts.environment(hosts.head), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def watch(self, until: float = 2.0) -> bool:
        """Look where work is done, until so much of it is, by now, or the job ends (False)."""
        while self.process.poll() is None:
            for host in self.hosts.all:
                self.seen[host.name] += len(self.hosts.working(host, *self.work.titles))
            if self.work.progress(self.out) >= until:
                return True
            if time.monotonic() - self.begin_s > DEADLINE_S:
                self.process.kill()
                raise SystemExit(f"{self.work.kind} does not end:\n{self.text()[-3000:]}")
            time.sleep(0.1)
        return False

    def finish(self) -> int:
        """Wait for the end; the exit code."""
        self.watch()
        return self.process.wait()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin_s

    def text(self) -> str:
        """What the user has seen."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def complaint(self) -> str:
        """The line that tells why it stopped."""
        lines = [line.strip() for line in self.text().splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("error:") or ": error:" in line]
        return (told or lines or ["nothing"])[-1]
