"""Scores a whole manifest, on Ray Data or in processes of this machine; resumable, and every recording gets a row.

The manifest is cut into blocks (``ledger``). On CPUs, one task scores one block: decoding, features and network run in
one process, which keeps its Predictor for further blocks. With GPUs, tasks decode and compute features, and one actor
per GPU runs the network. The driver commits the results. When all blocks are committed, the tables are written from the
parts, with only a few parts in memory. A task whose process died is run again (``blocks``). Small work, for which
starting Ray takes too long, runs in processes of this machine, with the same blocks, ledger and results.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cluster.engine import check_nodes, choose_engine, cpus_here, in_processes
from pipeline.cluster.runtime import joins_cluster
from pipeline.data.segments import bounds
from pipeline.inference.predictor import ScoreOptions
from pipeline.models.backends import ensure_onnx
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.scoring.blocks import REFUSAL, Classifier, Task, listen_block, make_block, or_refusal, score_block
from pipeline.scoring.ledger import Ledger, LedgerError, Tally, open_ledger, plan_of, record_of
from pipeline.scoring.predictions import PARQUET, plain_manifest, restore_csv, write_exports, write_tables
from pipeline.storage.errors import SerError
from pipeline.storage.files import usable_cpus

__all__ = ["Execution", "ScoreOptions", "ScoreRun", "score_manifest"]

_RECORDING_S, _WALKED_S = 0.0125, 0.5  # CPU seconds per recording: for one window of 2 s, for windows over all of it
_BLOCK_ROWS, _BLOCK_ROWS_WALKED = 256, 8
_BLOCKS_A_CPU = 8  # in small runs, blocks are made smaller so that every CPU gets some
ProgressCallback = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Execution:
    """Where and how the work runs. It does not change the results, and may differ when a run is resumed.

    ``engine``: "ray": Ray Data, here or on the cluster of ``RAY_ADDRESS``; "local": processes of this machine;
    "auto": local for small work without a cluster and without GPUs, else Ray.
    """

    engine: str = "auto"
    num_cpus: int | None = None  # None: all; 0: the local engine on all
    num_gpus: int = 0
    batch_size: int = 16  # examples per batch of the network
    block_rows: int | None = None  # recordings per block; None: chosen from the number of recordings and CPUs

    def __post_init__(self) -> None:
        for name, least in (("num_cpus", 0), ("num_gpus", 0), ("batch_size", 1), ("block_rows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SerError(f"{name} must be {least} or more, got {value}")
        choose_engine(self.engine, 0.0)
        if self.num_gpus and self.is_local():
            raise SerError("the local engine uses no GPU; leave --num_gpus out, or give --engine ray")

    def is_local(self) -> bool:
        """Whether the options demand the local engine."""
        return self.engine == "local" or (self.engine == "auto" and self.num_cpus == 0)

    def chosen(self, recordings: int, *, walked: bool) -> str:
        """The engine for this number of recordings, "local" or "ray"; ``walked``: scored in windows."""
        if self.is_local():
            return "local"
        if self.num_gpus:
            return "ray"
        return choose_engine(self.engine, recordings * (_WALKED_S if walked else _RECORDING_S), self.num_cpus)


@dataclass(frozen=True)
class ScoreRun:
    """A finished run."""

    out: Path
    rows: int
    statuses: Mapping[str, int]  # status -> number of rows
    scored: int  # rows scored now, not by an earlier start of the same run
    seconds: float  # wall time of this call
    unheard: str | None  # "2 s of 184 s" scored, if most recordings are long and only a part of each was read
    evaluation: Mapping[str, Any] | None  # the content of `metrics.json`, if a report was requested
    exports: Sequence[Path]  # further files and folders written
    noted: int = 0  # recordings with a remark in the column `notice`
    silence_s: float = 0.0  # only in silent windows, so not scored

    @property
    def failed(self) -> int:
        """Recordings that could not be used."""
        return self.rows - self.statuses.get("ok", 0)


def score_manifest(
    manifest: pd.DataFrame,
    out: Path,
    *,
    weights: str | os.PathLike[str] | None = None,
    options: ScoreOptions | None = None,
    execution: Execution | None = None,
    overwrite: bool = False,
    report: bool = True,
    formats: Sequence[str] = (),
    merge: bool = False,
    meta: Mapping[str, Any] | None = None,
    on_progress: ProgressCallback | None = None,
) -> ScoreRun:
    """Score every recording of ``manifest`` into ``out``, continuing an earlier run of the same.

    Writes the tables (``pipeline.scoring.predictions``), report and exports, and ``run.json`` last. A finished run of
    the same model, options and input is not scored again; a missing report, requested exports and missing CSV tables
    are added.

    Args:
        manifest: from ``pipeline.data.manifest``.
        weights: a bundle, or the ``.pt`` in it; None for the shipped one.
        overwrite: replace any run in ``out``.
        formats, merge: see ``predictions.write_exports``.
        meta: facts about the run for the report (command, versions ...), in addition to the model.
        on_progress: called in the driver with (rows done, rows in total, rows failed so far).

    Raises:
        LedgerError: ``out`` holds a run of another model, options or input, or one whose tables are missing.
        BundleError: no usable model.
        SerError: an option out of range; ``out`` is in use or cannot be written.
    """
    begin_s = time.monotonic()
    options, execution = options or ScoreOptions(), execution or Execution()
    bundle = load_bundle(weights)
    _check(options, execution, bundle, windows_needed=merge or "audacity" in formats)
    table = plain_manifest(manifest, bundle.labels)
    if table.empty:
        raise SerError("nothing to score: the input has no recordings")
    plan = plan_of(table, bundle, options)
    with open_ledger(out.absolute()) as ledger:
        wanted = execution.block_rows or _block_rows(len(table), walked=options.steps is not None)
        block_rows = ledger.check_or_init(plan, wanted, overwrite=overwrite, tables=options.tables)
        run, scored, tally = ledger.finished(), 0, Tally()
        anew = run is None
        if anew:
            tally, scored = _score(table, ledger, block_rows, bundle, options, execution, on_progress)
        else:
            restore_csv(ledger.out)
        evaluation = _report(ledger.out, bundle, meta or {}, anew=anew) if report else None
        exported = write_exports(ledger.out, bundle.labels, formats, merge=merge)
        seconds = time.monotonic() - begin_s
        if run is None:
            run = record_of(plan, block_rows, bundle, options, tally, scored, seconds)
            ledger.finish(run)
    of_read = run.get("noted", 0), run.get("silence_s") or 0.0  # missing in runs of earlier versions
    return ScoreRun(out, len(table), run["statuses"], scored, seconds, run["unheard"], evaluation, exported, *of_read)


def _check(options: ScoreOptions, execution: Execution, bundle: Bundle, *, windows_needed: bool) -> None:
    """Refuse options that do not fit together or the model, before any work starts."""
    if options.window_s is not None and options.window_s > bundle.features.window_s:
        longest = f"{bundle.features.window_s:g}"
        raise SerError(
            f"window_s {options.window_s:g} is more than the {longest} s that {bundle.name} reads at a time; "
            f"give --window_s {longest}"
        )
    if options.window_s is None and windows_needed:
        raise SerError("merged segments and Audacity labels need windows; give --window_s too")
    if options.window_s is not None and execution.num_gpus:
        raise SerError("windows are scored on CPUs only; leave --num_gpus out")


def _score(
    table: pd.DataFrame,
    ledger: Ledger,
    block_rows: int,
    bundle: Bundle,
    options: ScoreOptions,
    execution: Execution,
    on_progress: ProgressCallback | None,
) -> tuple[Tally, int]:
    """Score the missing blocks and write the tables; returns (the tally of all rows, number of rows scored now)."""
    starts = range(0, len(table), block_rows)
    sizes = {block: min(block_rows, len(table) - start) for block, start in enumerate(starts)}
    before = ledger.committed(sizes)
    todo = {b: table.iloc[starts[b] : starts[b] + n] for b, n in sizes.items() if b not in before}
    scored = sum(map(len, todo.values()))
    done, failed = len(table) - scored, sum(before.values())
    if todo:
        device = "cuda" if execution.num_gpus else "cpu"
        if device == "cpu":
            ensure_onnx(bundle)
        weights, run = str(bundle.folder.absolute()), uuid.uuid4().hex
        task = Task(weights, bundle.weights_sha256, options, execution.batch_size, str(ledger.notes), run, device)
        if on_progress:
            on_progress(done, len(table), failed)
        for block, part in _score_blocks(todo, task, execution):
            ledger.commit(block, part)
            done, failed = done + len(part), failed + _failures(part)
            if on_progress:
                on_progress(done, len(table), failed)
    tally = Tally()
    write_tables(
        table,
        _parts(ledger, len(sizes), tally),
        ledger.out,
        bundle.labels,
        min_confidence=options.min_confidence,
        silence_dbfs=options.silence_dbfs,
        each_channel=options.channels == "each",
    )
    return tally, scored


def _block_rows(rows: int, *, walked: bool) -> int:
    if walked:
        return _BLOCK_ROWS_WALKED
    return int(np.clip(-(-rows // (cpus_here() * _BLOCKS_A_CPU)), 16, _BLOCK_ROWS))


def _score_blocks(todo: Mapping[int, pd.DataFrame], task: Task, execution: Execution) -> Iterator[tuple[int, pa.Table]]:
    """Score the blocks; yields (number, part) of each finished block, in any order."""
    blocks = [make_block(number, list(rows["speech"]), bounds(rows)) for number, rows in todo.items()]
    recordings = sum(map(len, blocks))
    if execution.chosen(recordings, walked=task.options.steps is not None) == "local":
        results = in_processes(
            blocks, partial(score_block, task=task), min(len(blocks), execution.num_cpus or usable_cpus())
        )
    else:
        results = _on_ray(blocks, task, execution)
    pieces: dict[int, list[pa.Table]] = {}  # Ray Data splits very large results
    for result in results:
        block = result["block"][0].as_py()
        pieces.setdefault(block, []).append(result)
        if sum(map(len, pieces[block])) == len(todo[block]):
            part = pa.concat_tables(pieces.pop(block)).sort_by("position")
            yield block, part.drop_columns(["block", "position"])


def _on_ray(blocks: Sequence[pa.Table], task: Task, execution: Execution) -> Iterator[pa.Table]:
    import ray

    from pipeline.cluster.runtime import data_context, start_ray, task_pool

    start_ray(execution.num_cpus or None)
    recordings = [path for block in blocks for path in block["speech"].to_pylist()]
    check_nodes(Path(task.notes), [load_bundle(task.weights).weights_path], some_of=recordings)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if execution.num_gpus > gpus and not joins_cluster():
        raise SerError(f"num_gpus {execution.num_gpus}, but there are {gpus} here; leave --num_gpus out")
    context: Any = data_context()
    context.execution_options.preserve_order = False  # blocks carry their numbers
    dataset: ray.data.Dataset = ray.data.from_arrow(list(blocks))
    how: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
    if execution.num_gpus:
        context.op_resource_reservation_enabled = True  # features between the stages must not fill the object store
        actors = ray.data.ActorPoolStrategy(min_size=1, max_size=execution.num_gpus)
        listen = partial(or_refusal, work=listen_block, task=task)
        dataset = dataset.map_batches(listen, num_cpus=1, **how).map_batches(
            Classifier, fn_constructor_args=(task,), num_gpus=1, compute=actors, **how
        )
    else:
        dataset = dataset.map_batches(
            partial(or_refusal, work=score_block, task=task), num_cpus=1, compute=task_pool(len(blocks)), **how
        )
    results: Iterator[Any] = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    for result in results:
        if REFUSAL in result.column_names:
            raise SerError(result[REFUSAL][0].as_py())
        yield result


def _failures(part: pa.Table) -> int:
    return sum(status != "ok" for status in part["status"].to_pylist())


def _parts(ledger: Ledger, blocks: int, tally: Tally) -> Iterator[pa.Table]:
    """The committed parts in order; adds each one to ``tally``."""
    for block in range(blocks):
        try:
            part = pq.read_table(ledger.part_path(block))
        except (OSError, pa.ArrowException) as error:
            raise LedgerError(f"{ledger.part_path(block)} is damaged; give the same command again") from error
        tally.add(part)
        yield part


def _report(out: Path, bundle: Bundle, meta: Mapping[str, Any], *, anew: bool) -> Mapping[str, Any]:
    """The content of ``metrics.json``; the report is written if it is missing, has another note, or ``anew``."""
    from pipeline.reporting.report import rerender, write_report

    if not anew and (out / "metrics.json").is_file():
        before: dict[str, Any] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        note = meta.get("note") or before["meta"].get("note")
        if (out / "report.html").is_file() and note == before["meta"].get("note"):
            return before
        return rerender(before, pd.read_parquet(out / PARQUET), out, note)
    model = {"model": bundle.name, "model_sha256": bundle.weights_sha256, "data": None}
    return write_report(pd.read_parquet(out / PARQUET), bundle.labels, out, meta=model | dict(meta))
