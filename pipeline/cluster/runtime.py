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
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.cluster import ray_internals
from pipeline.cluster.submit import make_token, use_token
from pipeline.storage.errors import SerError
from pipeline.storage.files import usable_cpus

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
_START_LIMIT_S = 180.0  # an idle machine takes 3 to 5
_TOLD_EVERY_S = 10.0


def joins_cluster() -> bool:
    """Whether ``start_ray`` joins a Ray that runs already."""
    return bool(os.environ.get("RAY_ADDRESS"))


def in_submitted_job() -> bool:
    """Whether this process is the command of a Ray job."""
    return ray_internals.JOB_CONFIG in os.environ


def start_ray(
    num_cpus: int | None = None,
    *,
    object_store_bytes: int = _OBJECT_STORE_BYTES,
    metrics_port: int | None = None,
    lean: bool = False,
) -> None:
    """Start or join Ray; does nothing when this process is already connected.

    Args:
        num_cpus: logical CPUs of a local Ray, by default as many as this process may use. Ignored when joining.
        object_store_bytes: cap of a local Ray's shared memory.
        metrics_port: where a local Ray exports metrics in Prometheus' format; any free port when None.
        lean: a local Ray without metrics, list of tasks and idle workers, for a long computation on all CPUs: what
            Ray does beside it costs about twice its CPU time, as the threads of an operator wait for the slowest.

    Raises:
        SerError: the machine is too busy to bring Ray up, no folder can hold its sockets, or the cluster of
            ``RAY_ADDRESS`` cannot be joined.
    """
    joining = joins_cluster()
    for name, value in (_QUIET | (_LEAN if lean and not joining else {})).items():
        os.environ.setdefault(name, value)
    if joining:
        use_token()
    else:
        make_token()
        os.environ.setdefault(ray_internals.BEYOND_LOOPBACK, "0")  # bind everything to 127.0.0.1
    if "ray" not in sys.modules:
        atexit.register(ray_internals.end_finished)  # before Ray registers its own, to come after it
    import ray

    if ray.is_initialized():
        return
    ray_internals.reread_environment(joining=joining)
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
        options |= ray_internals.metrics_port(metrics_port) | ray_internals.temp_folder()
        _start_here(options, lean)
    logging.getLogger("ray").setLevel(level)


def stop_ray() -> None:
    """End a local Ray, or leave the cluster that was joined."""
    import ray

    ray.shutdown()


def _start_here(options: dict[str, Any], lean: bool) -> None:
    """Start a local Ray, and say how long it takes where that is long; one that died on a busy machine, anew.

    Raises:
        SerError: none is up after ``_START_LIMIT_S``.
    """
    import ray

    before, deadline_s = ray_internals.children(), time.monotonic() + _START_LIMIT_S
    with _said_how_long("starting Ray"):
        while True:
            try:
                with ray_internals.patience(deadline_s - time.monotonic()):
                    ray.init(address="local", **options)
                break
            except Exception as error:  # Ray raises a bare Exception when its processes are not up in time
                if "timed out" not in str(error):
                    raise
                ray.shutdown()
                for left in ray_internals.children() - before:  # Ray forgets those of a start that failed
                    with suppress(ProcessLookupError):
                        os.kill(left, signal.SIGKILL)
                if time.monotonic() > deadline_s:
                    raise SerError(
                        f"Ray was not up within {_START_LIMIT_S:.0f} s; the machine is too busy: "
                        "give the command again later"
                    ) from error
    ray_internals.stop_helpers(lean=lean)
    if lean:
        _yield_to_computation()


@contextmanager
def _said_how_long(doing: str) -> Iterator[None]:
    """A line every ten seconds on stderr while the block runs."""
    done, begun_s = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(_TOLD_EVERY_S):
            print(f"{doing} ... {time.monotonic() - begun_s:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _yield_to_computation() -> None:
    """Have the processes of a local Ray, and what they start, wait for their turn instead of interrupting a thread.

    A thread of the policy SCHED_BATCH (Linux) that wakes up does not take a CPU from one that computes: it gets a free
    CPU, or comes next when the time slice is over. Its share of the time is the usual one, so that nothing starves.
    """
    if hasattr(os, "SCHED_BATCH"):
        for child in ray_internals.children():
            ray_internals.schedule(child, os.SCHED_BATCH)


def restore_priority(*, together: bool) -> None:
    """In a worker of a local Ray: take this thread, and those it starts, out of what `_yield_to_computation` set.

    ``together``: all threads of the process, as those that exchange gradients have been started before.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    if together:
        ray_internals.schedule(os.getpid(), os.SCHED_OTHER)
    else:
        with suppress(OSError):  # a sandbox that forbids it forbade the other as well
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


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
        given = json.loads(os.environ[ray_internals.JOB_CONFIG]).get("runtime_env", {}).get("env_vars", {})
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

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # after the import: ray.data configures its own logging
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = 300
    context.op_resource_reservation_enabled = False
    ray_internals.native_tensors(context)
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
