"""Measure batch scoring: against a simple script and a hand-written pool, over sizes, resumed, on a long call.

    python -m benchmarks.bench_score --data_dir RECORDINGS [--parts plain command slope scale call broken infer]
        [--ends 100 1000 5000 20000 --small 5000 --large 20000 --sizes 1000 10000 --repeats 3 --hours 3]

The recordings are hard links to those in ``--data_dir``, repeated until there are enough. A figure is the median over
the repeats, a ratio the median of the ratios of each turn.

- plain: a simple script: per file ``librosa.load`` at 48 kHz, the middle 2 s, librosa's log-mel, eager
  PyTorch at batch 1, default threads; measured per file after a warm-up.
- command: the whole command with its start and tables, by ``--engine auto`` and the pool, and at the largest of
  ``--ends`` by ``--engine ray``; with report against the plain script.
- slope: seconds per additional file between ``--small`` and ``--large``; Ray and pool are started and warm.
- scale: one Ray, growing inputs; then the command once more on the finished largest run.
- call: a stereo telephone call, 2 s windows every second, each channel; memory above that of a 10 s call.
- broken: a folder of 10,000 with 500 broken recordings of every kind: number of rows, and each failure's code.
- infer: ``jobs.infer`` against ``python -c "import torch"``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soundfile

from benchmarks.common import in_turns, median_ratio, start_job, timed
from benchmarks.pool_score import open_pool
from benchmarks.pool_score import run as run_pool
from pipeline.audio.load import EXTENSIONS
from pipeline.models.backends import ensure_onnx
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.storage.files import local_path, scan
from tests.support.processes import ROOT, descendants, finish, linked_folder, machine, resident_bytes, sampled
from tests.support.recordings import encode

WARM = 512
_AGAINST_POOL = {100: 2.5, 1_000: 1.5, 5_000: 1.25}  # files -> largest ratio to the pool's seconds


def command(*words: object) -> float:
    """Seconds of a Python command; the benchmark ends if it fails."""
    line = [sys.executable, *map(str, words)]
    return timed(lambda: subprocess.run(line, cwd=ROOT, check=True, capture_output=True))


def score_words(bundle: Bundle, folder: Path, out: Path, *more: object) -> list[object]:
    return ["-m", "jobs.score", "--model_weights", bundle.folder, "--input", folder, "--out", out, "--crops", 1, *more]


def plain_seconds(bundle: Bundle, folder: Path, n: int) -> float:
    """Seconds per file of the simple script."""
    import torch

    from benchmarks.bench_features import plain

    model = bundle.build_model()

    def one(path: str) -> int:
        with torch.no_grad():
            return int(model(torch.from_numpy(plain(path, bundle.features))[None]).softmax(dim=1).argmax())

    paths = scan(folder, EXTENSIONS).files
    for path in paths[:20]:
        one(path)
    return timed(lambda: [one(path) for path in paths[:n]]) / min(n, len(paths))


def inner(arguments: argparse.Namespace, side: str, sizes: Sequence[int]) -> dict[str, Any]:
    """Run one side in a new process: start, warm-up, then each size; returns its JSON output."""
    words = ["-m", "benchmarks.bench_score", "--inner", side, "--sizes", *sizes, "--data_dir", arguments.folder]
    words += ["--model_weights", arguments.model_weights or "", "--scratch", arguments.scratch]
    line = [sys.executable, *map(str, words)]
    done = subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_inner(arguments: argparse.Namespace) -> None:
    """The process that ``inner`` starts: measure, and print JSON."""
    bundle = load_bundle(arguments.model_weights or None)
    paths = list(scan(arguments.data_dir, EXTENSIONS).files)
    seconds, memory, store = [], [], []
    sizes = [WARM, *arguments.sizes]
    if arguments.inner == "pool":
        with open_pool(str(bundle.folder), os.cpu_count() or 1) as pool:
            for n in sizes:
                out = Path(arguments.scratch) / f"pool-{n}"
                shutil.rmtree(out, ignore_errors=True)
                seconds.append(timed(lambda n=n, out=out: run_pool(pool, paths[:n], out, bundle.labels)))
    else:
        import ray

        from pipeline.cluster.runtime import start_ray
        from pipeline.scoring.scoring import Execution, ScoreOptions, score_manifest

        start_ray()
        cap = ray.cluster_resources()["object_store_memory"]

        def stored() -> float:
            return cap - ray.available_resources().get("object_store_memory", cap)

        options = ScoreOptions(crops=1)
        for n in sizes:
            out = Path(arguments.scratch) / f"ray-{n}"
            shutil.rmtree(out, ignore_errors=True)
            table = pd.DataFrame({"speech": paths[:n]})
            how = {"weights": bundle.folder, "options": options, "execution": Execution("ray"), "report": False}
            with sampled(lambda: resident_bytes(os.getpid()), 1.0) as peak, sampled(stored, 2.0) as in_store:
                seconds.append(timed(partial(score_manifest, table, out, **how)))
            memory.append(peak[0])
            store.append(in_store[0] / cap)
    print(json.dumps({"seconds": seconds[1:], "memory": memory[1:], "store": store[1:]}))


def slope(arguments: argparse.Namespace, _: Bundle) -> None:
    sizes = (arguments.small, arguments.large)

    def a_file(side: str) -> float:
        small_s, large_s = inner(arguments, side, sizes)["seconds"]
        return float(large_s - small_s) / (sizes[1] - sizes[0])

    sides = {side: partial(a_file, side) for side in ("ray", "pool")}
    costs = in_turns(sides, arguments.repeats, "ms a file", 1e3)
    ratio = median_ratio(costs["pool"], costs["ray"])
    ours, theirs = (statistics.median(found) * 1e3 for found in costs.values())
    result(f"slope {sizes[0]:,} -> {sizes[1]:,} files", f"{ours:.2f} ms a file, pool {theirs:.2f}", ratio, 0.85)


def plain(arguments: argparse.Namespace, bundle: Bundle) -> None:
    turns = [plain_seconds(bundle, arguments.folder, arguments.plain) for _ in range(arguments.repeats)]
    arguments.plain_s = statistics.median(turns)


def anew(out: Path, words: Sequence[object]) -> float:
    shutil.rmtree(out, ignore_errors=True)
    return command(*words)


def whole_command(arguments: argparse.Namespace, bundle: Bundle) -> None:
    for n in arguments.ends:
        folder = linked_folder(arguments.data_dir, Path(arguments.scratch) / f"end-{n}", n)
        out = Path(arguments.scratch) / f"command-{n}"
        sides = {
            "auto": score_words(bundle, folder, out / "auto", "--no_report"),
            "pool": ["-m", "benchmarks.pool_score", folder, out / "pool", bundle.folder],
            "report": score_words(bundle, folder, out / "report"),
        }
        if n == max(arguments.ends):
            sides["ray"] = score_words(bundle, folder, out / "ray", "--no_report", "--engine", "ray")
        calls = {side: partial(anew, out / side, words) for side, words in sides.items()}
        seconds = in_turns(calls, arguments.repeats)
        middle = {side: statistics.median(found) for side, found in seconds.items()}
        figures = f"{middle['auto']:.1f} s ({middle['report']:.1f} with report), pool {middle['pool']:.1f} s"
        ratio = median_ratio(seconds["auto"], seconds["pool"])
        limit = next((most for size, most in _AGAINST_POOL.items() if n <= size), 1.15)
        result(f"whole command over the pool's, {n:,} files", figures, ratio, limit, at_most=True)
        if "ray" in sides:
            ratio = median_ratio(seconds["ray"], seconds["pool"])
            result(f"the same with --engine ray, {n:,} files", f"{middle['ray']:.1f} s", ratio, 1.4, at_most=True)
        if arguments.plain_s:
            figures = f"{middle['report']:.1f} s with report; plain {arguments.plain_s * 1e3:.1f} ms a file"
            result(f"folder of {n:,} against the plain way", figures, arguments.plain_s * n / middle["report"], 8.0)


def scale(arguments: argparse.Namespace, bundle: Bundle) -> None:
    sizes = arguments.sizes
    found = inner(arguments, "ray", sizes)
    for n, seconds, memory, store in zip(sizes, found["seconds"], found["memory"], found["store"], strict=True):
        line = f"{seconds:.1f} s, driver {memory / 2**20:.0f} MiB, object store {store:.1%} of its cap"
        print(f"  {n:>7,} files: {line}", flush=True)
    if len(sizes) > 2:
        (s0, s1, s2), (n0, n1, n2) = found["seconds"][:3], sizes[:3]
        low, high = (s1 - s0) / (n1 - n0), (s2 - s1) / (n2 - n1)
        figures = f"{low * 1e3:.2f} -> {high * 1e3:.2f} ms a file"
        result(f"cost of a file {n1:,}..{n2:,} over {n0:,}..{n1:,}", figures, high / low, 1.1, at_most=True)
    out = Path(arguments.scratch) / f"ray-{sizes[-1]}"
    seconds = command(*score_words(bundle, arguments.folder, out, "--no_report"))
    result(f"finished run of {sizes[-1]:,} files once more", "", seconds, 30.0, at_most=True, unit=" s")


def call(arguments: argparse.Namespace, bundle: Bundle) -> None:
    rate_hz, rng = 8_000, np.random.default_rng(0)
    peaks: list[float] = []
    seconds = 0.0
    for duration_s in (10, round(arguments.hours * 3600)):
        path = Path(arguments.scratch) / f"call-{duration_s}" / "call.wav"
        path.parent.mkdir()
        with soundfile.SoundFile(path, "w", rate_hz, 2, "PCM_16") as file:
            for _ in range(0, duration_s, 10):
                loud = np.repeat(rng.random((10, 2)), rate_hz, axis=0) * 0.3
                file.write(loud * rng.standard_normal((10 * rate_hz, 2)) * 0.3)
        words = ["jobs.score", "--model_weights", bundle.folder, "--input", path.parent, "--out", path.parent / "out"]
        words += ["--no_report", "--window_s", 2, "--hop_s", 1, "--channels", "each", "--num_cpus", 0]
        before = time.perf_counter()
        process = start_job(*words)
        with sampled(lambda pid=process.pid: sum(map(resident_bytes, [pid, *descendants(pid)]))) as peak:
            finish(process, 24 * 3600)
        seconds = time.perf_counter() - before
        peaks.append(peak[0])
    windows = len(pd.read_parquet(path.parent / "out" / "segments.parquet", columns=["row"]))
    figures = f"{windows:,} windows in {seconds:.0f} s, {duration_s / seconds:.0f} x real time; memory over a 10 s call"
    more_mib = (peaks[1] - peaks[0]) / 2**20
    result(f"{arguments.hours:g} h stereo call", figures, more_mib, 1024, at_most=True, unit=" MiB")


def broken_recordings(good: bytes) -> dict[str, tuple[bytes, str]]:
    """Name ending -> content and expected status; ``good`` is an intact 16-bit WAV."""
    quiet = np.zeros((4_000, 1), np.float32)
    return {
        "empty.wav": (b"", "empty_file"),
        "words.wav": (b"no audio, only words\n" * 50, "not_audio"),
        "noise.mp3": (np.random.default_rng(0).bytes(20_000), "not_audio"),
        "header.wav": (encode(quiet[:0], 16_000, "WAV", "PCM_16"), "no_samples"),
        "cut.wav": (good[: len(good) // 2], "truncated"),
        "codec.wav": (good[:20] + b"\x34\x12" + good[22:], "unsupported_format"),
        "nan.wav": (encode(quiet + np.float32(np.nan), 16_000, "WAV", "FLOAT"), "not_finite"),
        "loud.wav": (encode(quiet + np.float32(1e30), 16_000, "WAV", "FLOAT"), "out_of_range"),
        "slow.wav": (encode(quiet, 1_000, "WAV", "PCM_16"), "bad_sample_rate"),
        "wide.wav": (encode(np.zeros((4_000, 12), np.float32), 16_000, "WAV", "PCM_16"), "bad_channels"),
    }


def broken(arguments: argparse.Namespace, bundle: Bundle) -> None:
    n, bad = arguments.broken, arguments.broken // 20
    folder = linked_folder(arguments.data_dir, Path(arguments.scratch) / "broken", n - bad)
    first = Path(local_path(scan(folder, EXTENSIONS).files[0]))
    samples, rate_hz = soundfile.read(first, dtype="int16", always_2d=True)
    good = encode(samples, rate_hz, "WAV", "PCM_16")
    kinds = broken_recordings(good) | {"pipe.wav": (b"", "not_a_file"), "link.wav": (b"", "not_found")}
    expected: dict[str, str] = {}
    for i in range(bad):
        kind, (content, code) = list(kinds.items())[i % len(kinds)]
        path = folder / f"{i % (n // 1000):03d}" / f"bad-{i:04d}-{kind}"
        path.parent.mkdir(exist_ok=True)
        if kind == "pipe.wav":
            os.mkfifo(path)
        elif kind == "link.wav":
            path.symlink_to("nowhere.wav")
        else:
            path.write_bytes(content)
        expected[str(path)] = code
    out = Path(arguments.scratch) / "broken-out"
    command(*score_words(bundle, folder, out, "--no_report", "--tolerate_failures"))
    found = pd.read_parquet(out / "predictions.parquet", columns=["speech", "status"])
    wanted = found["speech"].map(expected).fillna("ok")
    counts = found["status"].value_counts().to_dict()
    print("  " + ", ".join(f"{count:,} {code}" for code, count in sorted(counts.items())), flush=True)
    right = int((found["status"] == wanted).sum())
    figures = f"{right:,} rows with the right status"
    result(f"{n:,} files, {bad} of them broken: rows out", figures, len(found), n, unit="")


def infer(arguments: argparse.Namespace, bundle: Bundle) -> None:
    recording = scan(arguments.folder, EXTENSIONS).files[0]
    words = ("-m", "jobs.infer", "--model_weights", bundle.folder, "--file", recording)
    sides = {"infer": lambda: command(*words), "import torch": lambda: command("-c", "import torch")}
    ours, torch = in_turns(sides, max(arguments.repeats, 5)).values()
    figures = f"{statistics.median(ours):.2f} s, import torch {statistics.median(torch):.2f} s"
    result("infer of one file over import torch", figures, median_ratio(ours, torch), 2.5, at_most=True)


PARTS = {
    "plain": plain,
    "command": whole_command,
    "slope": slope,
    "scale": scale,
    "call": call,
    "broken": broken,
    "infer": infer,
}


def result(what: str, figures: str, value: float, wanted: float, *, at_most: bool = False, unit: str = " x") -> None:
    """Print a line of the table."""
    reached = value <= wanted if at_most else value >= wanted
    limit = f"{'at most' if at_most else 'at least'} {wanted:g}{unit}"
    print(f"| {what} | {figures} | {value:.2f}{unit} | {limit} | {'yes' if reached else 'NO'} |", flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--model_weights", help="default: the shipped bundle")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--small", type=int, default=5_000)
    parser.add_argument("--large", type=int, default=20_000)
    parser.add_argument("--ends", type=int, nargs="+", default=[100, 1_000, 5_000, 20_000])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", type=int, default=300)
    parser.add_argument("--broken", type=int, default=10_000)
    parser.add_argument("--hours", type=float, default=3.0)
    parser.add_argument("--inner", choices=("ray", "pool"), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.inner:
        run_inner(arguments)
        return
    bundle = load_bundle(arguments.model_weights)
    ensure_onnx(bundle)
    print(f"machine: {machine()}\nmodel: {bundle.name}\n", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.data_dir.absolute().parent, prefix=".bench-") as scratch:
        arguments.scratch, arguments.plain_s = scratch, 0.0
        n = max(arguments.large, *(arguments.sizes if "scale" in arguments.parts else [0]))
        arguments.folder = linked_folder(arguments.data_dir, Path(scratch) / "audio", n)
        print("| what | figures | value | wanted | reached |\n|---|---|---|---|---|", flush=True)
        for name, part in PARTS.items():
            if name in arguments.parts:
                part(arguments, bundle)


if __name__ == "__main__":
    main()
