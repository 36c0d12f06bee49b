"""Starting Ray quietly: one place for the switches that every Ray part of the pipeline relies on.

On its own, a command starts a local Ray bound to loopback with token authentication; inside ``ray job submit`` (or with
``RAY_ADDRESS`` set) it joins that cluster. Ray's own chatter is turned down so that a job's output can be read.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.cluster.submit import make_token, use_token
from pipeline.storage.cpus import usable_cpus
from pipeline.storage.errors import SerError

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # of 2 s; shorter ones cost the workers CPU time
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_LOG_TO_STDERR": "0",
    "RAY_worker_niceness": "0",  # as the command itself; Ray's default, 15, starves on a busy machine
}
_LEAN = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # this machine is the only node, and does not announce its end
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_num_workers_soft_limit": "0",  # an idle Python process wakes up 100 times a second
    "RAY_memory_monitor_refresh_ms": "1000",  # of 250
}
_OBJECT_STORE_BYTES = 1 << 30
_CLUSTER_TASKS = 256
_STARTS = 3
_finished: dict[int, bytes] = {}
_BEYOND_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in the command of a submitted job


def joins_cluster() -> bool:
    """Whether ``start_ray`` joins a Ray that runs already."""
    return bool(os.environ.get("RAY_ADDRESS"))


def in_submitted_job() -> bool:
    """Whether this process is the command of a Ray job."""
    return _JOB in os.environ


def start_ray(
    num_cpus: int | None = None,
    *,
    object_store_bytes: int = _OBJECT_STORE_BYTES,
    metrics_port: int | None = None,
    lean: bool = False,
) -> None:
    """Start or join Ray; does nothing when this process is already connected. A start that times out is tried again.

    Args:
        num_cpus: logical CPUs of a local Ray, by default as many as this process may use. Ignored when joining.
        object_store_bytes: cap of a local Ray's shared memory.
        metrics_port: where a local Ray exports metrics in Prometheus' format; any free port when None.
        lean: a local Ray without metrics, list of tasks and idle workers, for a long computation on all CPUs: what
            Ray does beside it costs about twice its CPU time, as the threads of an operator wait for the slowest.

    Raises:
        SerError: the machine is too busy to bring Ray up, or the cluster of ``RAY_ADDRESS`` cannot be joined.
    """
    joining = joins_cluster()
    for name, value in (_QUIET | (_LEAN if lean and not joining else {})).items():
        os.environ.setdefault(name, value)
    if joining:
        use_token()
    else:
        make_token()
        os.environ.setdefault(_BEYOND_LOOPBACK, "0")  # bind everything to 127.0.0.1
    if "ray" not in sys.modules:
        atexit.register(_end_finished)  # before Ray registers its own, to come after it
    import ray

    if ray.is_initialized():
        return
    _reread_environment(joining)
    level = logging.ERROR
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": level,
        "runtime_env": {"env_vars": _worker_environment()},
    }
    if joining:
        _join(options)
    else:
        if num_cpus is None and usable_cpus() < (os.cpu_count() or 1):
            num_cpus = usable_cpus()  # else Ray counts, which knows the quotas of containers
        options |= {"num_cpus": num_cpus, "object_store_memory": object_store_bytes, "include_dashboard": False}
        options |= {"_metrics_export_port": metrics_port} if metrics_port else {}
        _start_here(options, lean)
    logging.getLogger("ray").setLevel(level)


def stop_ray() -> None:
    """End a local Ray, or leave the cluster that was joined."""
    import ray

    ray.shutdown()


def _reread_environment(joining: bool) -> None:
    """Ray reads some variables when it is first imported, and only then; somebody may have imported it before.

    They are ``RAY_AUTH_MODE`` and, for a local Ray, the one that decides between loopback and all interfaces.
    """
    from ray._private import ray_constants
    from ray._private.ray_constants import env_bool  # type: ignore[attr-defined]
    from ray._raylet import Config  # type: ignore[attr-defined]  # compiled, without a stub

    Config.initialize("")
    if not joining:
        ray_constants.ENABLE_RAY_CLUSTER = env_bool(_BEYOND_LOOPBACK, ray_constants.ENABLE_RAY_CLUSTER)


def _start_here(options: dict[str, Any], lean: bool) -> None:
    """Start a local Ray; one that a busy machine has not brought up in time is ended and started anew.

    Raises:
        SerError: none came up in time.
    """
    import ray

    before = _ray_children()
    for _ in range(_STARTS):
        try:
            ray.init(address="local", **options)
            _stop_helpers(lean)
            if lean:
                _yield_to_computation()
            return
        except Exception as error:  # Ray raises a bare Exception when its processes are not up within 30 s
            if "timed out" not in str(error):
                raise
            ray.shutdown()
            for left in _ray_children() - before:  # Ray forgets those of a start that failed
                with suppress(ProcessLookupError):
                    os.kill(left, signal.SIGKILL)
    raise SerError(
        f"Ray was not up within 30 s, {_STARTS} times; the machine is too busy: give the command again later"
    )


def _stop_helpers(lean: bool) -> None:
    """End processes of a local Ray that do nothing for us but use CPU time.

    One reads all log files ten times a second to print them in the driver, where we print none. ``lean``: also those
    that serve a dashboard and ask an autoscaler for nodes. ``ray.init`` has no options for that; where Ray changes its
    insides they stay.
    """
    from ray._private import worker

    for name in ("log_monitor", *(("dashboard", "monitor") if lean else ())):
        with suppress(AttributeError, KeyError):
            getattr(worker._global_node, f"kill_{name}")(check_alive=False)


def _yield_to_computation() -> None:
    """Have the processes of a local Ray, and what they start, wait for their turn instead of interrupting a thread.

    A thread of the policy SCHED_BATCH (Linux) that wakes up does not take a CPU from one that computes: it gets a free
    CPU, or comes next when the time slice is over. Its share of the time is the usual one, so that nothing starves.
    """
    if hasattr(os, "SCHED_BATCH"):
        for child in _ray_children():
            _schedule(child, os.SCHED_BATCH)


def restore_priority(*, together: bool) -> None:
    """In a worker of a local Ray: take this thread, and those it starts, out of what `_yield_to_computation` set.

    ``together``: all threads of the process, as those that exchange gradients have been started before.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    if together:
        _schedule(os.getpid(), os.SCHED_OTHER)
    else:
        with suppress(OSError):  # a sandbox that forbids it forbade the other as well
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _schedule(process: int, policy: int) -> None:
    """Give all threads of a process this scheduling policy."""
    for thread in Path(f"/proc/{process}/task").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended, or a sandbox forbids it
            os.sched_setscheduler(int(thread.name), policy, os.sched_param(0))


def end_at_exit(title: str) -> None:
    """Have the workers of a local Ray that bear this title, and have done their work, gone when this process has ended.

    In Ray 2.60 a worker that owns objects others still look at can block for ever in its own destructor (it publishes
    to an event loop that is gone), and then outlives Ray. Nothing happens where there is no /proc.
    """
    ours = _ray_children()
    _finished.update(
        {pid: command for pid, parent, command in _processes() if parent in ours and command.startswith(title.encode())}
    )


def _end_finished() -> None:
    """At exit, after Ray's own end: kill what is left of the workers that ``end_at_exit`` was told of."""
    for pid, _, command in _processes():
        if _finished.get(pid) == command:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _ray_children() -> set[int]:
    """Ray's processes that this one has started; none where there is no /proc."""
    return {pid for pid, parent, command in _processes() if parent == os.getpid() and b"/ray/" in command}


def _processes() -> Iterator[tuple[int, int, bytes]]:
    """Number, parent's number and command line of every process."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            parent = int((process / "stat").read_bytes().rpartition(b")")[2].split()[1])
            yield int(process.name), parent, (process / "cmdline").read_bytes()


def _join(options: dict[str, Any]) -> None:
    """Join the cluster of ``RAY_ADDRESS``, or say in one line why that cannot be."""
    import ray
    from ray.exceptions import AuthenticationError

    address = os.environ["RAY_ADDRESS"]
    if address.startswith(("http://", "https://")):
        raise SerError(
            f"RAY_ADDRESS {address} is where jobs are submitted: put 'ser submit' before the command, or set "
            "RAY_ADDRESS to host:6379 of the head"
        )
    try:
        ray.init(**options)
    except AuthenticationError as error:
        raise SerError(
            f"the Ray cluster at {address} wants its token; copy the head's ~/.ray/auth_token here, mode 600"
        ) from error
    except ConnectionError as error:
        raise SerError(f"no Ray cluster answers at RAY_ADDRESS {address}; start it, or unset RAY_ADDRESS") from error


def _worker_environment() -> dict[str, str]:
    """Variables that workers need to import this project and to stay quiet.

    In a submitted job Ray itself puts the uploaded folder on the workers' path, each node its own copy, and refuses
    a variable that the job was submitted with.
    """
    if in_submitted_job():
        given = json.loads(os.environ[_JOB]).get("runtime_env", {}).get("env_vars", {})
        return {name: value for name, value in _QUIET.items() if name not in given}
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**_QUIET, "PYTHONPATH": path}


def data_context() -> object:
    """Ray Data's settings for this process: order kept, native tensor columns, no silent hang. Returns the context.

    Its reservation of resources for each operator is off: while the grant for a new execution is on its way (seconds,
    and for back-to-back executions all along) it holds a pipeline to one task at a time. ``task_pool`` bounds instead.
    """
    from ray.data import DataContext
    from ray.data._internal.tensor_extensions.arrow import FixedShapeTensorFormat

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # after the import: ray.data configures its own logging
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = 300
    context.op_resource_reservation_enabled = False
    context.arrow_fixed_shape_tensor_format = FixedShapeTensorFormat.ARROW_NATIVE
    return context


def task_pool(blocks: int) -> Any:
    """How many tasks of a stage Ray Data hands to Ray: two for each CPU, so that none waits for the driver's next turn.

    ``blocks`` is how many tasks there are in all. Each still occupies a CPU while it runs. On a cluster that was joined
    some hundreds are handed over at least: tasks that wait are what makes an autoscaler bring up nodes.
    """
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 1))
    wanted = max(2 * cpus, _CLUSTER_TASKS if joins_cluster() else 2)
    return ray.data.TaskPoolStrategy(size=max(1, min(wanted, blocks)))
