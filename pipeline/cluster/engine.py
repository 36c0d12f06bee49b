"""Where the work of a job is done: on Ray, or by the local engine, which is child processes of this one.

Ray takes half a minute to start on two CPUs; work that is over in a few of those is done sooner without it.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar, cast

from pipeline.cluster.runtime import in_submitted_job, joins_cluster
from pipeline.storage.errors import SerError
from pipeline.storage.files import usable_cpus
from pipeline.storage.journal import RETRIES

ENGINES = ("auto", "local", "ray")
_RAY_START_S = 35.0  # until the first block of a local Ray is done, two CPUs (benchmarks/bench_score.py)
_RAY_PAYS_AT = 5.0  # times its start: estimated work from which on Ray is started

Item = TypeVar("Item")
Result = TypeVar("Result")


def choose_engine(engine: str, work_s: float, num_cpus: int | None = None) -> str:
    """The engine that does the work: "local" or "ray".

    Args:
        engine: one of ENGINES. "auto" is Ray on a cluster (``RAY_ADDRESS``), in a Ray job, and for long work.
        work_s: estimated CPU seconds.
        num_cpus: CPUs that may be used; all when None. 0, as earlier versions had it, is the local engine on all.

    Raises:
        SerError: an unknown engine.
    """
    if engine not in ENGINES:
        raise SerError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
    if engine != "auto":
        return engine
    if num_cpus == 0:
        return "local"
    if joins_cluster() or in_submitted_job():
        return "ray"
    return "local" if work_s / (num_cpus or usable_cpus()) <= _RAY_PAYS_AT * _RAY_START_S else "ray"


def in_processes(
    items: Sequence[Item],
    work: Callable[[Item], Result],
    processes: int,
    *,
    look_s: float | None = None,
    look: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """``work`` of each item in one of ``processes`` child processes, in any order; one that dies is replaced.

    Args:
        items, work: what can be pickled.
        look: called every ``look_s`` seconds at most, while the children work.

    Raises:
        SerError: an item at which processes died again and again.
        Exception: what ``work`` raised.
    """
    pending, deaths = deque(enumerate(items)), Counter[int]()
    children: dict[Connection, tuple[BaseProcess, tuple[int, Item]]] = {}
    try:
        while pending or children:
            while pending and len(children) < processes:
                _give(*_child(work), pending.popleft(), children)
            for ready in wait(list(children), look_s):
                connection = cast("Connection", ready)
                process, piece = children.pop(connection)
                try:
                    answer = connection.recv()
                except (EOFError, ConnectionError) as error:
                    _end(process, connection)
                    deaths[piece[0]] += 1
                    if deaths[piece[0]] > RETRIES:
                        raise SerError(
                            f"a process died {deaths[piece[0]]} times at the same piece of the work; is memory short?"
                        ) from error
                    pending.appendleft(piece)
                    continue
                if pending:
                    _give(process, connection, pending.popleft(), children)
                else:
                    _end(process, connection)
                if isinstance(answer, Exception):
                    raise answer
                yield answer
            look()
    finally:
        for connection, (process, _) in children.items():
            _end(process, connection)


def _give(
    process: BaseProcess,
    connection: Connection,
    piece: tuple[int, Item],
    children: dict[Connection, tuple[BaseProcess, tuple[int, Item]]],
) -> None:
    with suppress(ConnectionError):  # it has died: told where its answer is awaited
        connection.send(piece[1])
    children[connection] = process, piece


def _child(work: Callable[[Item], Result]) -> tuple[BaseProcess, Connection]:
    """A process that answers items; it ends soon after this process if that is killed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _end(process: BaseProcess, connection: Connection) -> None:
    process.kill()
    process.join()
    connection.close()


def _answer(connection: Connection, work: Callable[[Item], Result]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    with suppress(EOFError, ConnectionError):  # the parent has gone
        while True:
            item = connection.recv()
            try:
                answer: object = work(item)
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = error
            connection.send(answer)
