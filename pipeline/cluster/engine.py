"""Chooses where a job runs: on Ray, or by the local engine, which uses child processes; and checks a cluster's nodes.

Ray takes half a minute to start on two CPUs, so work of a few such times is finished sooner without it.

Before a job runs on several nodes, ``check_nodes`` runs a small task on each: it reads a file of random content, just
written by the driver, opens the inputs, and writes a file of its own into the output folder. Not checked: a cluster of
one node, and nodes that an autoscaler adds later.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar, cast

from pipeline.cluster.runtime import in_submitted_job, joins_cluster, start_ray
from pipeline.storage.errors import SerError
from pipeline.storage.files import is_remote, local_path, usable_cpus
from pipeline.storage.journal import RETRIES

ENGINES = ("auto", "local", "ray")
_RAY_START_S = 35.0  # until a local Ray has finished its first block, on two CPUs (benchmarks/bench_score.py)
_RAY_PAYS_AT = 5.0  # "auto" starts Ray if the estimated work takes longer than this many starts
_BLAS_THREADS = "OMP_NUM_THREADS"  # OpenBLAS and MKL read it as well

Item = TypeVar("Item")
Result = TypeVar("Result")


def choose_engine(engine: str, work_s: float, num_cpus: int | None = None) -> str:
    """The engine for work of about ``work_s`` CPU seconds: "local" or "ray". Refuses an unknown engine.

    "auto" is Ray on a cluster (``RAY_ADDRESS``), in a Ray job, and for long work; with ``num_cpus`` 0 it is local.
    """
    if engine not in ENGINES:
        raise SerError(f"unknown engine {engine!r}; expected one of {', '.join(ENGINES)}")
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
    """Run ``work`` on each item in ``processes`` child processes; yields results in any order.

    A process that dies is replaced, and its item is tried again.

    Args:
        items, work: must be picklable.
        look: called while the children work: after each result, and at the latest every ``look_s`` seconds.

    Raises:
        SerError: an item at which more than ``RETRIES`` processes died.
        Exception: raised by ``work``.
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
                            f"a process died {deaths[piece[0]]} times at the same piece of work; check free memory"
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
    with suppress(ConnectionError):  # it has died: handled where its answer is received
        connection.send(piece[1])
    children[connection] = process, piece


def _child(work: Callable[[Item], Result]) -> tuple[BaseProcess, Connection]:
    """Start a process that receives items and sends results; it also ends soon after this process is killed.

    BLAS uses one thread there, as in Ray's workers: more threads in each of several processes block one another.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, work), daemon=True)
    chosen = os.environ.get(_BLAS_THREADS)
    os.environ.setdefault(_BLAS_THREADS, "1")  # numpy reads it at import, so it must be set before the process starts
    try:
        process.start()
    finally:
        if chosen is None:
            del os.environ[_BLAS_THREADS]
    theirs.close()
    return process, ours


def _end(process: BaseProcess, connection: Connection) -> None:
    process.kill()
    process.join()
    connection.close()


def _answer(connection: Connection, work: Callable[[Item], Result]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    with suppress(EOFError, ConnectionError):  # the parent has ended
        while True:
            item = connection.recv()
            try:
                answer: object = work(item)
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = error
            connection.send(answer)


_WAIT_S = 120.0
_SAMPLE = 32
_REMEDY = "every node must see it at the same path: put it on a file system that all of them mount (docs/cluster.md)"


class NodeError(SerError):
    """A node cannot access the files that the job needs, or does not answer."""


@dataclass(frozen=True)
class Node:
    """A live node: its Ray id, its host name and address, its number of CPUs."""

    id: str
    name: str
    cpus: float


def alive_nodes() -> list[Node]:
    """The live nodes of the Ray that this process is connected to."""
    import ray

    return [
        Node(node["NodeID"], _name_of(node), float(node["Resources"].get("CPU", 0)))
        for node in ray.nodes()
        if node["Alive"]
    ]


def _name_of(node: dict[str, Any]) -> str:
    host, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
    return str(address) if host == address else f"{host} ({address})"


def cpus_here() -> int:
    """Number of CPUs for the work: those of the joined cluster, else those that this process may use."""
    if not joins_cluster():
        return usable_cpus()
    start_ray()
    return max(1, int(sum(node.cpus for node in alive_nodes())))


def cpus_a_worker(workers: int) -> int:
    """The largest number of CPUs for each of ``workers``, if no worker spans two nodes; at least 1."""
    if not joins_cluster():
        return max(1, usable_cpus() // max(workers, 1))
    start_ray()
    nodes = [int(node.cpus) for node in alive_nodes()]
    fitting = [n for n in range(1, max(nodes, default=1) + 1) if sum(cpus // n for cpus in nodes) >= workers]
    return max(fitting, default=1)


def check_nodes(folder: Path, inputs: Sequence[str | Path] = (), some_of: Sequence[str] = ()) -> None:
    """Check before a job starts that every node can read its inputs and write into its folder, which exists.

    Args:
        inputs: files that every node must be able to open. Files that this process cannot open either are not
            checked, nor are object-store URIs.
        some_of: many files, of which about 32, evenly spaced, are checked in the same way.

    Raises:
        NodeError: with the node, the path and the remedy.
    """
    if in_submitted_job() and "runtime_resources" in folder.absolute().parts:
        raise NodeError(
            f"results in {folder} would be lost: it is in Ray's temporary copy of the uploaded folder; "
            "give --out as an absolute path on storage that all nodes share"
        )
    nodes = alive_nodes() if joins_cluster() else []
    if len(nodes) < 2:
        return
    probe = folder.absolute() / f".probe-{uuid.uuid4().hex}"
    content = uuid.uuid4().hex
    probe.write_text(content, encoding="ascii")
    try:
        answers = _ask(nodes, str(probe), content, _readable_here([*inputs, *_spread(some_of)]))
        for node, wrong in answers.items():
            if wrong:
                raise NodeError(f"node {node.name} {wrong}; {_REMEDY}")
            if not probe.with_name(f"{probe.name}.{node.id}").is_file():
                raise NodeError(f"files of node {node.name} in {folder.absolute()} are not visible here; {_REMEDY}")
    finally:
        for path in probe.parent.glob(f"{probe.name}*"):
            path.unlink(missing_ok=True)


def _spread(paths: Sequence[str]) -> list[str]:
    """About ``_SAMPLE`` evenly spaced paths, including the first and the last."""
    return [*paths[:: max(1, len(paths) // _SAMPLE)], *paths[-1:]]


def _readable_here(inputs: Sequence[str | Path]) -> list[str]:
    """Absolute paths of the local inputs that this process can open."""
    paths = dict.fromkeys(os.path.abspath(local_path(str(path))) for path in inputs if not is_remote(str(path)))
    return [path for path in paths if os.access(path, os.R_OK)]


def _ask(nodes: Sequence[Node], probe: str, content: str, paths: Sequence[str]) -> dict[Node, str | None]:
    """Node -> the problem it found, or None; nodes that die meanwhile are left out.

    Raises:
        NodeError: a node does not answer, or cannot run the task.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(_look)
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        reference = look.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(
            probe, content, paths, node.id
        )
        asked[reference] = node
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=_WAIT_S)
    if late:
        raise NodeError(f"node {asked[late[0]].name} does not answer within {_WAIT_S:.0f} s; see Ray's logs there")
    answers: dict[Node, str | None] = {}
    for reference in done:
        node = asked[reference]
        try:
            answers[node] = ray.get(reference)
        except ray.exceptions.RayError as error:
            if node in alive_nodes():
                raise NodeError(f"node {node.name} cannot run the job: {_last_line(error)}") from error
    return answers


def _last_line(error: Exception) -> str:
    """The last line of a remote traceback."""
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _look(probe: str, content: str, paths: Sequence[str], name: str) -> str | None:
    """Run on a node: the problem found, as the end of a sentence that begins with the node; None if all is well."""
    folder = os.path.dirname(probe)
    try:
        if Path(probe).read_text(encoding="ascii") != content:
            return f"has another folder at {folder}"
    except OSError as error:
        return f"does not see {folder} ({error.strerror})"
    try:
        open(f"{probe}.{name}", "xb").close()
    except OSError as error:
        return f"cannot write into {folder} ({error.strerror})"
    for path in paths:
        try:
            open(path, "rb").close()
        except OSError as error:
            return f"cannot read {path} ({error.strerror})"
    return None
