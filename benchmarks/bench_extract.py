"""Compare extraction to Parquet on Ray Data with a hand-written pool of processes, and measure its memory.

    python -m benchmarks.bench_extract --data_dir RECORDINGS [--small 2000 --large 10000 --repeats 5 --memory 500 20000]

Both sides run the same ``BlockWriter`` over the same blocks and write the same parts. The slope, in seconds per clip
between ``--small`` and ``--large``, excludes the start: Ray has run one warm-up pipeline, the pool one block per
process. The sides alternate; medians are printed. The recordings are hard links to those in ``--data_dir`` (copies
where links fail), repeated until there are enough.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import pyarrow as pa

from pipeline.audio.load import EXTENSIONS
from pipeline.cluster.ray_internals import WORKER
from pipeline.cluster.runtime import start_ray
from pipeline.features.extract import BlockWriter, ShardOptions, extract_shards
from pipeline.features.features import FeatureConfig
from pipeline.features.store import NOTES
from pipeline.storage.files import scan
from tests.support.processes import command_of, descendants, linked_folder, machine, resident_bytes, sampled

CONFIG = FeatureConfig()


def manifest_of(folder: Path) -> pd.DataFrame:
    """Manifest of all recordings in ``folder``."""
    return pd.DataFrame({"speech": scan(folder, EXTENSIONS).files, "label": "calm"})


def blocks_of(table: pd.DataFrame, options: ShardOptions) -> list[pd.DataFrame]:
    """The blocks of ``table``, as ``extract_shards`` makes them."""
    numbered = table.assign(_row=range(len(table)))
    starts = range(0, len(table), options.block_rows)
    return [numbered.iloc[i : i + options.block_rows].assign(_block=block) for block, i in enumerate(starts)]


def on_ray(table: pd.DataFrame, out: Path, options: ShardOptions) -> float:
    """Seconds of one extraction on Ray Data."""
    start_s = time.perf_counter()
    extract_shards(table, out, CONFIG, options=options)
    return time.perf_counter() - start_s


def on_pool(pool: object, table: pd.DataFrame, out: Path, options: ShardOptions) -> float:
    """Seconds of one extraction on the pool."""
    start_s = time.perf_counter()
    (out / NOTES).mkdir(parents=True)
    write = BlockWriter(out, pa.Schema.from_pandas(table, preserve_index=False), CONFIG, options)
    for _ in pool.imap_unordered(write, blocks_of(table, options)):  # type: ignore[attr-defined]
        pass
    return time.perf_counter() - start_s


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"


def slopes(arguments: argparse.Namespace, table: pd.DataFrame, scratch: Path, options: ShardOptions) -> None:
    """Print the time per clip of both sides, and their ratio."""
    small, large = table.iloc[: arguments.small], table.iloc[: arguments.large]
    with get_context("spawn").Pool(arguments.cpus, initializer=_one_thread) as pool:
        on_pool(pool, table.iloc[: options.block_rows * arguments.cpus], scratch / "warm-pool", options)
        on_ray(table.iloc[: options.block_rows * arguments.cpus], scratch / "warm-ray", options)
        sides: dict[str, Callable[[pd.DataFrame, Path], float]] = {
            "Ray Data": lambda t, out: on_ray(t, out, options),
            "pool": lambda t, out: on_pool(pool, t, out, options),
        }
        costs: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(arguments.repeats):
            for name, side in sides.items():
                seconds = []
                for part in (small, large):
                    out = scratch / f"{name}-{repeat}-{len(part)}".replace(" ", "")
                    seconds.append(side(part, out))
                    shutil.rmtree(out)
                costs[name].append((seconds[1] - seconds[0]) / (len(large) - len(small)))
            print(
                f"  repeat {repeat + 1}: " + ", ".join(f"{n} {c[-1] * 1e3:.2f} ms a clip" for n, c in costs.items()),
                flush=True,
            )
    medians = {name: statistics.median(values) for name, values in costs.items()}
    ratio = statistics.median(p / r for r, p in zip(costs["Ray Data"], costs["pool"], strict=True))
    print(f"slope {len(small):,} -> {len(large):,} clips, median of {arguments.repeats}:")
    for name, value in medians.items():
        print(f"  {name:<9} {value * 1e3:6.2f} ms a clip")
    print(f"  Ray Data runs at {ratio:.2f} x the pool's speed (wanted: at least 0.85)")


def private_bytes() -> float:
    """Private memory of this process (the driver) and of this Ray's workers."""
    workers = [pid for pid in descendants(os.getpid()) if command_of(pid).startswith(WORKER)]
    return float(sum(map(resident_bytes, [os.getpid(), *workers])))


def memory(arguments: argparse.Namespace, table: pd.DataFrame, scratch: Path, options: ShardOptions) -> None:
    """Print the peak private memory of driver and workers for few and for many clips."""
    peaks = []
    for n in arguments.memory:
        with sampled(private_bytes) as peak:
            on_ray(table.iloc[:n], scratch / f"memory-{n}", options)
        shutil.rmtree(scratch / f"memory-{n}")
        peaks.append(peak[0])
        print(f"  {n:>7,} clips: peak private memory {peak[0] / 2**20:,.0f} MiB", flush=True)
    print(f"  ratio {peaks[-1] / peaks[0]:.2f} (wanted: at most 1.10)")


def main() -> None:
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--small", type=int, default=2_000)
    parser.add_argument("--large", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", type=int, nargs=2, default=[500, 20_000])
    parser.add_argument("--cpus", type=int, default=os.cpu_count())
    parser.add_argument("--mel_power_s", type=float, default=0.0, help="as in jobs.extract; default 0: only log-mel")
    parser.add_argument("--block_rows", type=int, default=128)
    arguments = parser.parse_args()
    options = ShardOptions(mel_power_s=arguments.mel_power_s, block_rows=arguments.block_rows)
    print(f"machine: {machine()}")
    start_ray(arguments.cpus)
    with tempfile.TemporaryDirectory(dir=arguments.data_dir.absolute().parent) as folder:
        scratch = Path(folder)
        n = max(arguments.large, *arguments.memory)
        table = manifest_of(linked_folder(arguments.data_dir, scratch / "audio", n))
        slopes(arguments, table, scratch, options)
        memory(arguments, table, scratch, options)


if __name__ == "__main__":
    main()
