"""Scores one block of a scoring run in the current process, a Ray task or a process of the local engine.

A block is a numbered group of manifest rows. A worker records which recording it is decoding (``journal.CrashLog``).
If the process dies (out of memory, killed, decoder crash), the next attempt decodes that recording in a process of its
own.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.audio.source import Segment
from pipeline.data.segments import END, START, WHOLE
from pipeline.inference.excerpts import Excerpt, listen
from pipeline.inference.predictor import Prediction, Predictor, ScoreOptions
from pipeline.inference.timeline import Timeline
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.scoring.predictions import to_table
from pipeline.storage.errors import SerError
from pipeline.storage.journal import CrashLog

REFUSAL = "refusal"


@dataclass(frozen=True)
class Task:
    """The settings that a worker needs."""

    weights: str
    weights_sha256: str
    options: ScoreOptions
    batch_size: int
    notes: str  # folder of `journal.CrashLog`
    run: str  # id of this start of the job; crashed attempts of other starts do not count against a block
    device: str = "cpu"


def make_block(number: int, paths: Sequence[str], places: Sequence[Any] = ()) -> pa.Table:
    """A table with the columns ``block``, ``position`` (in the block), ``speech``, and start and end in seconds.

    ``places``: the starts and the ends, from ``segments.bounds``; by default whole recordings.
    """
    starts, ends = places or ([WHOLE[0]] * len(paths), [WHOLE[1]] * len(paths))
    return pa.table(
        {
            "block": pa.array([number] * len(paths), pa.int64()),
            "position": pa.array(range(len(paths)), pa.int64()),
            "speech": pa.array(paths, pa.string()),
            START: pa.array(starts, pa.float64()),
            END: pa.array(ends, pa.float64()),
        }
    )


def score_block(rows: pa.Table, task: Task) -> pa.Table:
    """Score a block: the columns of ``predictions.to_table``, ``block`` and ``position``; one row per recording."""
    predictor, options = open_predictor(task), task.options
    predictions: list[Prediction] = []
    timelines: list[Timeline] | None = None
    if options.steps is None:
        excerpts: list[Excerpt] = []
        for source, isolated in _watched(rows, task):
            excerpts.append(predictor.listen(source, channel=options.channel, isolated=isolated))
            if len(excerpts) == task.batch_size:
                predictions += predictor.classify(excerpts)
                excerpts.clear()
        predictions += predictor.classify(excerpts)
    else:
        timelines = []
        for source, isolated in _watched(rows, task):
            prediction, timeline = predictor.follow(
                source, options.steps, channels=options.channels, silence_dbfs=options.silence_dbfs, isolated=isolated
            )
            predictions.append(prediction)
            timelines.append(timeline.later(source.start_s) if isinstance(source, Segment) else timeline)
    return _answer(rows, predictions, timelines, task, predictor)


def listen_block(rows: pa.Table, task: Task) -> pa.Table:
    """The first half of ``score_block`` for runs on GPUs: decoding and features, as a pickled ``excerpt`` per row."""
    bundle = _bundle(task.weights)
    crops, channel = task.options.crops or bundle.crops, task.options.channel
    excerpts = [
        pickle.dumps(listen(source, bundle.features, crops, channel, isolated=isolated), protocol=5)
        for source, isolated in _watched(rows, task)
    ]
    return rows.append_column("excerpt", pa.array(excerpts, pa.large_binary()))


def classify_block(rows: pa.Table, task: Task) -> pa.Table:
    """The second half: from the result of ``listen_block`` to that of ``score_block``."""
    predictor = open_predictor(task)
    excerpts = [pickle.loads(cell.as_py()) for cell in rows["excerpt"]]
    return _answer(rows, predictor.classify(excerpts), None, task, predictor)


def or_refusal(rows: pa.Table, work: Callable[[pa.Table, Task], pa.Table], task: Task) -> pa.Table:
    """The result of ``work``; if it raises a SerError, a table of one row with the message, in the column ``refusal``.

    Ray Data would hide a raised error. ``rows`` that are such a table already are returned unchanged.
    """
    if REFUSAL in rows.column_names:
        return rows
    try:
        return work(rows, task)
    except SerError as error:
        return pa.table({REFUSAL: [str(error)]})


class Classifier:
    """``classify_block`` as an actor that keeps its network on the GPU."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __call__(self, rows: pa.Table) -> pa.Table:
        """See ``classify_block`` and ``or_refusal``."""
        return or_refusal(rows, classify_block, self._task)


@lru_cache(maxsize=1)
def open_predictor(task: Task) -> Predictor:
    """The Predictor of this process, with one thread, as a task has one CPU. Refuses a bundle that was replaced."""
    predictor = Predictor.from_bundle(
        task.weights, device=task.device, threads=1, batch_size=task.batch_size, crops=task.options.crops
    )
    if predictor.bundle.weights_sha256 != task.weights_sha256:
        raise SerError(f"{task.weights} was replaced while its model was scoring; give the same command again")
    return predictor


@lru_cache(maxsize=1)
def _bundle(weights: str) -> Bundle:
    return load_bundle(weights)


def _watched(rows: pa.Table, task: Task) -> Iterator[tuple[str | Segment, bool]]:
    """(recording, whether to isolate its decoder) for each row of a block; each is recorded in the crash log first."""
    notes = CrashLog(Path(task.notes), rows["block"][0].as_py(), task.run)
    notes.check()
    places = zip(*(rows[name].to_pylist() for name in ("speech", START, END)), strict=True)
    for position, (path, *place) in enumerate(places):
        notes.begin(position)
        yield path if tuple(place) == WHOLE else Segment(path, *place), notes.isolated(position)
    notes.close()


def _answer(
    rows: pa.Table,
    predictions: Sequence[Prediction],
    timelines: Sequence[Timeline] | None,
    task: Task,
    predictor: Predictor,
) -> pa.Table:
    options = task.options
    table = to_table(predictions, predictor.labels, options.min_confidence, options.silence_dbfs, timelines)
    return table.append_column("block", rows["block"]).append_column("position", rows["position"])
