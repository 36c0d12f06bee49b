"""All uses of names of Ray that are private, undocumented, or given as strings.

This module works with the pinned version of Ray (``SUPPORTED``) and may fail with another. `check` looks the names up
before they are used, and raises an error if one is missing: a setting that silently has no effect could leave ports
open on all interfaces. Limits: an existing name may have changed its meaning; tests of the behaviour are in
``tests/cluster``.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.storage.errors import SerError, SerWarning

SUPPORTED = "2.60"
BEYOND_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": Ray binds to loopback, not to all interfaces
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in the command of a submitted job
WORKER = "ray::"  # start of the process title of every Ray worker; the next four are of special workers
TRAIN_CONTROLLER, TRAIN_WORKER = f"{WORKER}TrainController", f"{WORKER}RayTrainWorker"
SERVE_PROXY, SERVE_REPLICA = f"{WORKER}ProxyActor", f"{WORKER}ServeReplica:"  # then APPLICATION:DEPLOYMENT
TALKATIVE = (  # loggers that repeat this project's own messages
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_CORE = (  # module, name in it
    ("ray._private.ray_constants", "ENABLE_RAY_CLUSTER"),
    ("ray._private.ray_constants", "env_bool"),
    ("ray._raylet", "Config.initialize"),
    ("ray._private.worker", "_global_node"),
    ("ray._private.node", "Node.kill_log_monitor"),
    ("ray._private.node", "Node.kill_dashboard"),
    ("ray._private.node", "Node.kill_monitor"),
    ("ray._private.services", "get_node"),
)
_OF_DATA = (("ray.data._internal.tensor_extensions.arrow", "FixedShapeTensorFormat.ARROW_NATIVE"),)
_OF_SERVE = (
    ("ray._common.tls_utils", "add_port_to_grpc_server"),
    ("ray.serve._private.replica", "add_port_to_grpc_server"),
)
_SESSION_BYTES = len("/ray/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store.1")
_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107  # longest path in sockaddr_un
_finished: dict[int, bytes] = {}


def missing(names: tuple[tuple[str, str], ...]) -> list[str]:
    """The names that the installed Ray lacks, as ``module.name``."""
    lacking = []
    for module, name in names:
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            lacking.append(f"{module}.{name}")
    return lacking


def check(names: tuple[tuple[str, str], ...] = _CORE) -> None:
    """Refuse a Ray that lacks any of ``names``.

    Raises:
        SerError: with the first missing name.
    """
    if lacking := missing(names):
        import ray

        raise SerError(
            f"Ray {ray.__version__} has no {lacking[0]}, which this project relies on; install Ray {SUPPORTED}"
        )


def reread_environment(*, joining: bool) -> None:
    """Make Ray read environment variables again that it reads only at import, in case it was imported earlier.

    These are ``RAY_AUTH_MODE`` and, for a local Ray, ``BEYOND_LOOPBACK``.
    """
    check()
    from ray._private import ray_constants
    from ray._private.ray_constants import env_bool  # type: ignore[attr-defined]
    from ray._raylet import Config  # type: ignore[attr-defined]  # compiled, without a stub

    Config.initialize("")
    if not joining:
        ray_constants.ENABLE_RAY_CLUSTER = env_bool(BEYOND_LOOPBACK, ray_constants.ENABLE_RAY_CLUSTER)


def stop_helpers(*, lean: bool) -> None:
    """End processes of a local Ray that are not needed and use CPU time; ``ray.init`` has no options for that.

    The log monitor reads all log files ten times a second to print them in the driver, which is switched off here.
    ``lean``: also end the dashboard and the autoscaler's monitor.
    """
    from ray._private import worker

    for name in ("log_monitor", *(("dashboard", "monitor") if lean else ())):
        with suppress(AttributeError, KeyError):  # it is not running
            getattr(worker._global_node, f"kill_{name}")(check_alive=False)


@contextmanager
def patience(limit_s: float) -> Iterator[None]:
    """Within this context, a local Ray has ``limit_s`` seconds to start; it fails at once if its raylet dies.

    Ray's own limit of 30 s is a constant, too short for a busy machine. Also, a raylet ends itself if its agents (two
    Python processes) do not start within about 15 s, and Ray does not notice. Ray polls the state of its new node by
    `get_node`; this context replaces that function by one that waits until the node answers or its raylet is dead.
    """
    from ray._private import services

    known: Callable[..., Any] = services.get_node
    deadline_s, before = time.monotonic() + limit_s, _raylets()

    def get_node(*words: Any, **named: Any) -> Any:
        seen = False
        while True:
            try:
                return known(*words, **named)
            except RuntimeError as error:  # not there yet
                up = bool(_raylets() - before)
                if (seen and not up) or time.monotonic() > deadline_s:
                    raise Exception("timed out during startup") from error
                seen = seen or up
                time.sleep(0.1)

    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = known


def metrics_port(port: int | None) -> dict[str, Any]:
    """The option of ``ray.init`` for the port of Prometheus metrics; empty for any free port."""
    return {"_metrics_export_port": port} if port else {}


def temp_folder() -> dict[str, Any]:
    """The option of ``ray.init`` for the folder of its sessions; empty if Ray's own choice works.

    Ray's sockets are in that folder, and socket paths are limited to about 100 bytes. In batch systems ``TMPDIR`` is
    often longer. Then the first of several folders that is short enough and writable is used, with a warning.

    Raises:
        SerError: no folder is suitable.
    """
    if sys.platform == "win32":
        return {}
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    given = os.environ[name] if name is not None else "/tmp"
    if os.path.isabs(given) and _can_hold_sockets(given):
        return {}
    runtime_folder = os.environ.get("XDG_RUNTIME_DIR", "")
    for other in (os.path.abspath(given), "/tmp", runtime_folder, "/var/tmp", "/dev/shm", os.path.expanduser("~")):
        if os.path.isabs(other) and _can_hold_sockets(other):
            if other != os.path.abspath(given):
                warnings.warn(
                    f"{name or 'the folder'} {given} is too long for Ray's sockets, or cannot be written: Ray keeps "
                    f"its session in {other}/ray",
                    SerWarning,
                    stacklevel=2,
                )
            return {"_temp_dir": os.path.join(other, "ray")}
    raise SerError(
        f"{name or 'the folder'} {given} cannot hold Ray's sockets, nor can /tmp: their paths are limited to "
        f"{_SOCKET_BYTES} bytes; set RAY_TMPDIR to a writable folder with a short name, or give --engine local"
    )


def _can_hold_sockets(folder: str) -> bool:
    """Whether Ray can create its sessions in a folder, with socket paths short enough for the system."""
    if len(os.fsencode(folder.rstrip("/"))) + _SESSION_BYTES > _SOCKET_BYTES:
        return False
    place = Path(folder, "ray")
    while not place.exists() and place != place.parent:
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def native_tensors(context: Any) -> None:
    """Make Ray Data write tensors of one shape in pyarrow's own format."""
    check(_OF_DATA)
    from ray.data._internal.tensor_extensions.arrow import FixedShapeTensorFormat

    context.arrow_fixed_shape_tensor_format = FixedShapeTensorFormat.ARROW_NATIVE


class OwnPort:
    """Makes a process of Ray Serve open its gRPC port at the node's address only (loopback for a local Ray).

    Ray Serve opens the port after the deployment's constructor, on all interfaces. `install` replaces the function that
    opens it; `check`, called once the process serves, fails if the port was opened without that replacement.
    """

    def __init__(self) -> None:
        self._opened = False

    def install(self) -> None:
        """Replace the function that opens the port.

        Raises:
            SerError: Ray Serve has no such function, or does not use it by that name.
        """
        check(_OF_SERVE)
        from ray._common.tls_utils import add_port_to_grpc_server
        from ray.serve._private import replica
        from ray.util import get_node_ip_address

        address = get_node_ip_address()
        host = f"[{address}]" if ":" in address else address

        def add_port(server: Any, _: str) -> Any:
            self._opened = True
            return add_port_to_grpc_server(server, f"{host}:0")

        replica.add_port_to_grpc_server = add_port  # type: ignore[attr-defined]

    def check(self) -> None:
        """Raise SerError unless the port was opened by the replaced function."""
        if not self._opened:
            raise SerError(f"Ray Serve has opened a port on all interfaces; install Ray {SUPPORTED}")


def children() -> set[int]:
    """Process ids of Ray's processes started by this one; empty on systems without /proc."""
    return {pid for pid, parent, command in _processes() if parent == os.getpid() and b"/ray/" in command}


def _raylets() -> set[int]:
    return {pid for pid, parent, command in _processes() if parent == os.getpid() and b"/raylet/raylet" in command}


def end_at_exit(title: str) -> None:
    """Kill a local Ray's current workers with this process title when this process exits; call it after their work.

    In Ray 2.60 a worker whose objects are still watched by others can block forever in its own destructor, which
    publishes to an event loop that no longer exists. It then outlives Ray. Does nothing on systems without /proc.
    """
    ours = children()
    _finished.update(
        {pid: command for pid, parent, command in _processes() if parent in ours and command.startswith(title.encode())}
    )


def end_finished() -> None:
    """At exit, after Ray's own handler: kill the remaining workers registered by ``end_at_exit``."""
    for pid, _, command in _processes():
        if _finished.get(pid) == command:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def schedule(process: int, policy: int) -> None:
    """Give all threads of a process this scheduling policy (Linux)."""
    for thread in Path(f"/proc/{process}/task").glob("[0-9]*"):
        with suppress(OSError):  # the thread has just ended, or a sandbox forbids it
            os.sched_setscheduler(int(thread.name), policy, os.sched_param(0))


def _processes() -> Iterator[tuple[int, int, bytes]]:
    """(process id, parent's id, command line) of every process."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has just ended
            parent = int((process / "stat").read_bytes().rpartition(b")")[2].split()[1])
            yield int(process.name), parent, (process / "cmdline").read_bytes()
