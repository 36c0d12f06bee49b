"""A block of a scoring run: what is asked of it, and scoring it in this process, whoever runs the process.

A block is some rows of the manifest under one number. While a worker decodes, it notes the recording at hand
(``journal.CrashLog``), so that, when the process dies (out of memory, killed, a decoder that takes it down), the next
attempt decodes that one in a process of its own.
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
    """All that a worker needs to know.

    Attributes:
        notes: folder of ``journal.CrashLog``.
        run: name of this start of the job; attempts that died with another start are not held against a block.
    """

    weights: str
    weights_sha256: str
    options: ScoreOptions
    batch_size: int
    notes: str
    run: str
    device: str = "cpu"


def make_block(number: int, paths: Sequence[str], places: Sequence[Any] = ()) -> pa.Table:
    """Columns ``block``, ``position`` in it, ``speech``, and where in it to start and end, by default nowhere.

    ``places``: the starts and the ends, as ``segments.bounds`` gives them.
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
    """Our columns (``predictions.to_table``), ``block`` and ``position``, a row per recording, in order."""
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
    """The first half of ``score_block``, where networks run elsewhere: a pickled ``excerpt`` a row."""
    bundle = _bundle(task.weights)
    crops, channel = task.options.crops or bundle.crops, task.options.channel
    excerpts = [
        pickle.dumps(listen(source, bundle.features, crops, channel, isolated=isolated), protocol=5)
        for source, isolated in _watched(rows, task)
    ]
    return rows.append_column("excerpt", pa.array(excerpts, pa.large_binary()))


def classify_block(rows: pa.Table, task: Task) -> pa.Table:
    """The second half: what ``score_block`` gives, of what ``listen_block`` gave."""
    predictor = open_predictor(task)
    excerpts = [pickle.loads(cell.as_py()) for cell in rows["excerpt"]]
    return _answer(rows, predictor.classify(excerpts), None, task, predictor)


def or_refusal(rows: pa.Table, work: Callable[[pa.Table, Task], pa.Table], task: Task) -> pa.Table:
    """What ``work`` gives; its SerError as a column ``REFUSAL``, for Ray Data buries what a task raises."""
    if REFUSAL in rows.column_names:
        return rows
    try:
        return work(rows, task)
    except SerError as error:
        return pa.table({REFUSAL: [str(error)]})


class Classifier:
    """``classify_block``, as an actor that keeps its network on a device."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __call__(self, rows: pa.Table) -> pa.Table:
        """See ``classify_block`` and ``or_refusal``."""
        return or_refusal(rows, classify_block, self._task)


@lru_cache(maxsize=1)
def open_predictor(task: Task) -> Predictor:
    """The process's Predictor, one math thread: a task has one CPU.

    Raises:
        SerError: the bundle is another one than when scoring began.
    """
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
    """The recordings of a block, each noted down before it is given, and whether to isolate its decoder."""
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
