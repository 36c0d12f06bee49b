"""Before a job runs on several nodes: do all of them see what it reads, and is its folder one and the same to all?

A small task goes to each node that is alive, whatever that node is doing. It reads a file with a random content that
the driver has just written, opens the inputs, and answers with a file of its own. What does not hold is one line with
the node and the path. Nothing is asked on a cluster of one node, nor of nodes that an autoscaler brings up later.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster.runtime import in_submitted_job, joins_cluster, start_ray
from pipeline.storage.errors import SerError
from pipeline.storage.files import is_remote, local_path, usable_cpus

_WAIT_S = 120.0
_SAMPLE = 32
_REMEDY = "every node must see it at the same path: put it on a file system that all of them mount (docs/cluster.md)"


class NodeError(SerError):
    """A node that does not see what the job needs."""


@dataclass(frozen=True)
class Node:
    """A node that is alive: Ray's name for it, what people call it, its CPUs."""

    id: str
    name: str
    cpus: float


def alive_nodes() -> list[Node]:
    """The nodes of the Ray that this process is connected to."""
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
    """CPUs that work can be spread over: those of the cluster that is joined, else those that this process may use."""
    if not joins_cluster():
        return usable_cpus()
    start_ray()
    return max(1, int(sum(node.cpus for node in alive_nodes())))


def cpus_a_worker(workers: int) -> int:
    """The largest number of CPUs that each of so many workers can have, no worker on two nodes; at least 1."""
    if not joins_cluster():
        return max(1, usable_cpus() // max(workers, 1))
    start_ray()
    nodes = [int(node.cpus) for node in alive_nodes()]
    fitting = [n for n in range(1, max(nodes, default=1) + 1) if sum(cpus // n for cpus in nodes) >= workers]
    return max(fitting, default=1)


def check_nodes(folder: Path, inputs: Sequence[str | Path] = (), some_of: Sequence[str] = ()) -> None:
    """Refuse to begin where a node would fail in the middle.

    Args:
        folder: one that the job writes into, on all nodes; it is there already.
        inputs: files that every node must be able to open. Those that this process cannot open either are not the
            nodes' fault and are left out, as are object-store URIs.
        some_of: many files, of which some, spread evenly, are tried in the same way.

    Raises:
        NodeError: names the node, the path and the remedy.
    """
    if in_submitted_job() and "runtime_resources" in folder.absolute().parts:
        raise NodeError(
            f"results in {folder} would be lost: it lies in Ray's temporary copy of the uploaded folder; "
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
                raise NodeError(f"what node {node.name} writes into {folder.absolute()} is not seen here; {_REMEDY}")
    finally:
        for path in probe.parent.glob(f"{probe.name}*"):
            path.unlink(missing_ok=True)


def _spread(paths: Sequence[str]) -> list[str]:
    """About ``_SAMPLE`` of the paths, the first and the last among them."""
    return [*paths[:: max(1, len(paths) // _SAMPLE)], *paths[-1:]]


def _readable_here(inputs: Sequence[str | Path]) -> list[str]:
    """Absolute paths of those inputs that this process can open."""
    paths = dict.fromkeys(os.path.abspath(local_path(str(path))) for path in inputs if not is_remote(str(path)))
    return [path for path in paths if os.access(path, os.R_OK)]


def _ask(nodes: Sequence[Node], probe: str, content: str, paths: Sequence[str]) -> dict[Node, str | None]:
    """What each node finds wrong, None when nothing; nodes that die meanwhile are left out.

    Raises:
        NodeError: a node does not answer.
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
    """What a remote traceback ends with."""
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _look(probe: str, content: str, paths: Sequence[str], name: str) -> str | None:
    """What is wrong on this node, for a sentence that begins with the node."""
    folder = os.path.dirname(probe)
    try:
        with open(probe, encoding="ascii") as file:
            if file.read() != content:
                return f"has another folder at {folder}"
    except OSError as error:
        return f"does not see {folder} ({error.strerror})"
    try:
        with open(f"{probe}.{name}", "x", encoding="ascii"):
            pass
    except OSError as error:
        return f"cannot write into {folder} ({error.strerror})"
    for path in paths:
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            return f"cannot read {path} ({error.strerror})"
    return None
