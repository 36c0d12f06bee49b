"""Compare extraction to Parquet on Ray Data with a hand-written pool of processes, and measure its memory.

    python -m benchmarks.bench_extract --data_dir RECORDINGS [--small 2000 --large 10000 --repeats 5 --memory 500 20000]

Both sides run the same ``BlockWriter`` over the same blocks and write the same parts. The slope, in seconds per clip
between ``--small`` and ``--large``, excludes the start: Ray has run one warm-up pipeline, the pool one block per
process. Medians are printed. The recordings are hard links to those in ``--data_dir`` (copies
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
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import pyarrow as pa

from benchmarks.common import in_turns, median_ratio, timed
from pipeline.audio.load import EXTENSIONS
from pipeline.cluster.ray_internals import WORKER
from pipeline.cluster.runtime import start_ray
from pipeline.features.extract import BlockWriter, ShardOptions, extract_shards
from pipeline.features.features import FeatureConfig
from pipeline.features.store import NOTES
from pipeline.storage.files import scan
from tests.support.processes import command_of, descendants, linked_folder, machine, resident_bytes, sampled

CONFIG = FeatureConfig()


def blocks_of(table: pd.DataFrame, options: ShardOptions) -> list[pd.DataFrame]:
    """The blocks of ``table``, as ``extract_shards`` makes them."""
    numbered = table.assign(_row=range(len(table)))
    starts = range(0, len(table), options.block_rows)
    return [numbered.iloc[i : i + options.block_rows].assign(_block=block) for block, i in enumerate(starts)]


def on_ray(table: pd.DataFrame, out: Path, options: ShardOptions) -> float:
    """Seconds of one extraction on Ray Data."""
    return timed(lambda: extract_shards(table, out, CONFIG, options=options))


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

        def a_clip(extract: Callable[[pd.DataFrame, Path, ShardOptions], float]) -> float:
            seconds = []
            for part in (small, large):
                seconds.append(extract(part, scratch / "slope", options))
                shutil.rmtree(scratch / "slope")
            return (seconds[1] - seconds[0]) / (len(large) - len(small))

        sides = {"Ray Data": lambda: a_clip(on_ray), "pool": lambda: a_clip(partial(on_pool, pool))}
        costs = in_turns(sides, arguments.repeats, "ms a clip", 1e3)
    ratio = median_ratio(costs["pool"], costs["Ray Data"])
    print(f"slope {len(small):,} -> {len(large):,} clips, median of {arguments.repeats}:")
    for name, values in costs.items():
        print(f"  {name:<9} {statistics.median(values) * 1e3:6.2f} ms a clip")
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
        recordings = scan(linked_folder(arguments.data_dir, scratch / "audio", n), EXTENSIONS).files
        table = pd.DataFrame({"speech": recordings, "label": "calm"})
        slopes(arguments, table, scratch, options)
        memory(arguments, table, scratch, options)


if __name__ == "__main__":
    main()
