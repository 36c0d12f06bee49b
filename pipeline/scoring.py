"""Scoring a whole manifest with Ray Data: streamed, resumable, one row per recording whatever happens.

The manifest is cut into blocks (``pipeline.ledger``). On CPUs one stateless task scores one block: decode, features
and network in one process, which keeps its Predictor from block to block; results travel to the driver, which commits
them. With GPUs, tasks decode and make features, and an actor per GPU runs the network. When every block is there, the
tables are written from the parts, one block in memory at a time.

A task that dies (out of memory, killed, a decoder that takes the process down) is run again by Ray; the notes it left
name the recording it was decoding, which the next attempt decodes in a process of its own. Few recordings are scored
in one child process without starting Ray, which takes longer than they do.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.audio import Channel
from pipeline.checkpoint import Bundle, load_bundle
from pipeline.errors import SerError
from pipeline.excerpts import Excerpt
from pipeline.folders import local_path
from pipeline.ledger import LEDGER_VERSION, Ledger, LedgerError, Notes, open_ledger
from pipeline.onnx_export import ensure_onnx
from pipeline.predictions import plain_manifest, to_table, write_tables
from pipeline.predictor import Predictor

FEW = 200  # recordings that are not worth starting Ray for
_BLOCK_ROWS = 256
_BLOCKS_A_CPU = 8  # smaller runs get smaller blocks, so that every CPU has some
_RETRIES = 20
_SUSPECT_ALL = 4  # attempts at a block that died before each of its recordings is decoded apart
ProgressCallback = Callable[[int, int, int], None]


@dataclass(frozen=True)
class ScoreOptions:
    """What is asked of the model. A run is resumed only under the same options.

    Attributes:
        crops: windows a recording; the bundle's own number when None.
        min_confidence: answers below it become ``uncertain``.
        channel: ``mix``, or the number of one channel.
    """

    crops: int | None = None
    min_confidence: float = 0.0
    channel: Channel = "mix"

    def __post_init__(self) -> None:
        if self.crops is not None and self.crops < 1:
            raise SerError(f"crops must be 1 or more, got {self.crops}")
        if not 0.0 <= self.min_confidence <= 1.0:
            raise SerError(f"min_confidence must lie in 0..1, got {self.min_confidence}")


@dataclass(frozen=True)
class Execution:
    """How the work is spread; changes no result, and may differ between a run and its resumption.

    Attributes:
        num_cpus: CPUs of the Ray that is started; all when None. 0 scores in one child process, without Ray.
        num_gpus: GPUs to use, 0 for none.
        batch_size: examples the network sees at once.
        block_rows: recordings a block; chosen by their number and that of the CPUs when None.
    """

    num_cpus: int | None = None
    num_gpus: int = 0
    batch_size: int = 16
    block_rows: int | None = None


@dataclass(frozen=True)
class ScoreRun:
    """A finished run: where, how many rows, how many of each status, rows scored now, and how fast."""

    out: Path
    rows: int
    statuses: Mapping[str, int]
    scored: int
    seconds: float
    evaluation: Mapping[str, Any] | None

    @property
    def failed(self) -> int:
        """Recordings that could not be used."""
        return self.rows - self.statuses.get("ok", 0)


@dataclass(frozen=True)
class _Task:
    """All that a worker needs to know."""

    weights: str
    weights_sha256: str
    options: ScoreOptions
    batch_size: int
    notes: str


def score_manifest(
    manifest: pd.DataFrame,
    out: Path,
    *,
    weights: str | os.PathLike[str] | None = None,
    options: ScoreOptions | None = None,
    execution: Execution | None = None,
    overwrite: bool = False,
    report: bool = True,
    on_progress: ProgressCallback | None = None,
) -> ScoreRun:
    """Score every recording of ``manifest`` into ``out``; a run that was cut off is continued.

    Writes ``predictions.parquet``, ``predictions.csv``, the report, and ``run.json`` last. A finished run of the same
    model, options and input is returned as it is.

    Args:
        manifest: as ``pipeline.corpora`` makes it: ``speech``, perhaps ``label``, and further columns.
        weights: a bundle, or the ``.pt`` in it; None for the shipped one.
        overwrite: begin again whatever ``out`` holds.
        report: also write ``report.html`` and what belongs to it.
        on_progress: called with (rows done, rows in all, failed so far), in the driver.

    Raises:
        LedgerError: ``out`` holds a run of another model, options or input, is in use, or cannot be written.
        BundleError: no usable model.
        SerError: an option out of range.
    """
    begin_s = time.monotonic()
    options, execution = options or ScoreOptions(), execution or Execution()
    bundle = load_bundle(weights)
    table = plain_manifest(manifest, bundle.labels)
    if table.empty:
        raise SerError("nothing to score: the input has no recordings")
    plan = _plan(table, bundle, options)
    with open_ledger(out.absolute()) as ledger:
        block_rows = ledger.claim(plan, execution.block_rows or _block_rows(len(table)), overwrite=overwrite)
        finished = ledger.finished()
        if finished is not None:
            return ScoreRun(out, len(table), finished["statuses"], 0, time.monotonic() - begin_s, None)
        starts = range(0, len(table), block_rows)
        sizes = {block: min(block_rows, len(table) - start) for block, start in enumerate(starts)}
        before = ledger.committed(sizes)
        todo = {b: list(table["speech"].iloc[starts[b] :][:n]) for b, n in sizes.items() if b not in before}
        task = _Task(
            str(bundle.folder.absolute()), bundle.weights_sha256, options, execution.batch_size, str(ledger.notes)
        )
        done, failed = len(table) - sum(map(len, todo.values())), sum(before.values())
        if todo:
            ensure_onnx(bundle)
            if on_progress:
                on_progress(done, len(table), failed)
        for block, part in _score_blocks(todo, task, execution):
            ledger.commit(block, part)
            done, failed = done + len(part), failed + _failures(part)
            if on_progress:
                on_progress(done, len(table), failed)
        statuses: Counter[str] = Counter()
        write_tables(table, _parts(ledger, len(sizes), statuses), ledger.out, bundle.labels)
        evaluation = _report(ledger.out, bundle, plan) if report else None
        scored = sum(map(len, todo.values()))
        seconds = time.monotonic() - begin_s
        ledger.finish(_summary(plan, block_rows, bundle, options, statuses, scored, seconds))
    return ScoreRun(out, len(table), dict(statuses), scored, seconds, evaluation)


def _plan(table: pd.DataFrame, bundle: Bundle, options: ScoreOptions) -> dict[str, Any]:
    """What decides the result: a resumed run must agree in all of it."""
    return {
        "version": LEDGER_VERSION,
        "model": bundle.weights_sha256,
        "labels": list(bundle.labels),
        "temperature": bundle.temperature,
        "features": bundle.features.fingerprint(),
        **asdict(options),
        "crops": options.crops or bundle.crops,
        "rows": len(table),
        "input": _digest(table),
        "recordings": _stamps(table["speech"]),
    }


def _digest(table: pd.DataFrame) -> str:
    """Hash of the manifest's cells and column names."""
    digest = hashlib.sha256(repr(list(table.columns)).encode())
    for begin in range(0, len(table), 4096):
        digest.update(table.iloc[begin : begin + 4096].to_csv(index=False, header=False).encode())
    return digest.hexdigest()


def _stamps(speech: pd.Series[str]) -> str:
    """Hash of the recordings' sizes and times of change: one that was replaced since is another input."""

    def stamp(path: str) -> tuple[int, int]:
        try:
            status = os.stat(local_path(path))
        except (OSError, ValueError):
            return -1, -1
        return status.st_size, status.st_mtime_ns

    with ThreadPoolExecutor(8) as pool:
        stamps = np.array(list(pool.map(stamp, speech, chunksize=512)), dtype=np.int64)
    return hashlib.sha256(stamps.tobytes()).hexdigest()


def _block_rows(rows: int) -> int:
    cpus = os.cpu_count() or 1
    return int(np.clip(-(-rows // (cpus * _BLOCKS_A_CPU)), 16, _BLOCK_ROWS))


def _score_blocks(
    todo: Mapping[int, Sequence[str]], task: _Task, execution: Execution
) -> Iterator[tuple[int, pa.Table]]:
    """Run the blocks; yields each as it is done, in any order."""
    if not todo:
        return
    few = sum(map(len, todo.values())) <= FEW and execution.num_cpus is None and not execution.num_gpus
    blocks = [
        pa.table({"block": pa.array([block] * len(paths), pa.int64()), "speech": pa.array(paths, pa.string())})
        for block, paths in todo.items()
    ]
    if execution.num_cpus == 0 or (few and "RAY_ADDRESS" not in os.environ):
        yield from _in_child(blocks, task)
    else:
        yield from _on_ray(blocks, task, execution)


def _in_child(blocks: Sequence[pa.Table], task: _Task) -> Iterator[tuple[int, pa.Table]]:
    """One block after the other in a child process, which is replaced when a decoder takes it down."""
    context = multiprocessing.get_context("spawn")
    deaths = 0
    pending = list(blocks)
    while pending:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                while pending:
                    result = pool.submit(score_block, pending[0], task).result()
                    deaths = 0
                    yield pending.pop(0)["block"][0].as_py(), result.drop_columns(["block"])
            except BrokenProcessPool as error:
                deaths += 1
                if deaths > _RETRIES:
                    raise SerError(f"the scoring process died {deaths} times at one block; is memory short?") from error


def _on_ray(blocks: Sequence[pa.Table], task: _Task, execution: Execution) -> Iterator[tuple[int, pa.Table]]:
    import ray
    from ray.exceptions import RayTaskError

    from pipeline.runtime import data_context, start_ray

    if execution.num_gpus:
        raise SerError("scoring on GPUs is not ready yet; leave --num_gpus out")
    start_ray(execution.num_cpus)
    context: Any = data_context()
    context.execution_options.preserve_order = False  # blocks carry their numbers
    dataset = ray.data.from_arrow(list(blocks)).map_batches(
        partial(score_block, task=task),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=1,
    )
    try:
        for result in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            table: Any = result
            yield table["block"][0].as_py(), table.drop_columns(["block"])
    except RayTaskError as error:
        cause = error.as_instanceof_cause()
        if isinstance(cause, SerError):
            raise SerError(str(error.cause)) from error
        raise


def score_block(rows: pa.Table, task: _Task) -> pa.Table:
    """Score one block (columns ``block``, ``speech``): our columns and ``block``, a row per recording, in order."""
    predictor = _predictor(task.weights, task.weights_sha256, task.options.crops, task.batch_size)
    block, paths = rows["block"][0].as_py(), rows["speech"].to_pylist()
    channel = task.options.channel
    notes = Notes(Path(task.notes), block)
    if notes.attempts > _RETRIES:
        raise SerError(f"block {block} took its process down {notes.attempts} times; is memory short? See Ray's logs")
    predictions = []
    for begin in range(0, len(paths), task.batch_size):
        excerpts: list[Excerpt] = []
        for position in range(begin, min(begin + task.batch_size, len(paths))):
            notes.begin(position)
            apart = position in notes.suspects or notes.attempts >= _SUSPECT_ALL
            listen = predictor.listen_apart if apart else predictor.listen
            excerpts.append(listen(paths[position], channel=channel))
        predictions += predictor.classify(excerpts)
    notes.close()
    table = to_table(predictions, predictor.labels, task.options.min_confidence)
    return table.append_column("block", pa.array([block] * len(table), pa.int64()))


@lru_cache(maxsize=1)
def _predictor(weights: str, weights_sha256: str, crops: int | None, batch_size: int) -> Predictor:
    """The process's Predictor, one math thread: a task has one CPU."""
    predictor = Predictor.from_bundle(weights, threads=1, batch_size=batch_size, crops=crops)
    if predictor.bundle.weights_sha256 != weights_sha256:
        raise SerError(f"{weights} was replaced while its model was scoring; give the same command again")
    return predictor


def _failures(part: pa.Table) -> int:
    return sum(status != "ok" for status in part["status"].to_pylist())


def _parts(ledger: Ledger, blocks: int, statuses: Counter[str]) -> Iterator[pa.Table]:
    """The committed parts in order; counts their statuses on the way."""
    for block in range(blocks):
        try:
            part = pq.read_table(ledger.part_path(block))
        except (OSError, pa.ArrowException) as error:
            raise LedgerError(f"{ledger.part_path(block)} is damaged; give the same command again") from error
        statuses.update(part["status"].to_pylist())
        yield part


def _report(out: Path, bundle: Bundle, plan: Mapping[str, Any]) -> Mapping[str, Any]:
    from pipeline.report import write_report

    meta = {"model": bundle.name, "model_sha256": bundle.weights_sha256, "features": plan["features"]}
    return write_report(pd.read_parquet(out / "predictions.parquet"), bundle.labels, out, meta=meta)


def _summary(
    plan: Mapping[str, Any],
    block_rows: int,
    bundle: Bundle,
    options: ScoreOptions,
    statuses: Mapping[str, int],
    scored: int,
    seconds: float,
) -> dict[str, Any]:
    rows = sum(statuses.values())
    return {
        "version": LEDGER_VERSION,
        "model": bundle.name,
        "model_sha256": bundle.weights_sha256,
        "features_fingerprint": plan["features"],
        "labels": list(bundle.labels),
        "options": asdict(options),
        "rows": rows,
        "ok": statuses.get("ok", 0),
        "failed": rows - statuses.get("ok", 0),
        "statuses": dict(sorted(statuses.items())),
        "scored_now": scored,
        "seconds": round(seconds, 3),
        "files_per_s": round(scored / seconds, 2) if seconds else 0.0,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "plan": dict(plan),
        "block_rows": block_rows,
    }
