"""Starts or joins Ray, with the settings that all Ray code of the project relies on.

A command normally starts a local Ray, bound to loopback, with token authentication. Inside ``ray job submit``, or with
``RAY_ADDRESS`` set, it joins that cluster. Ray's own log output is reduced, so that a job's output can be read.
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
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # default: 2 s; shorter intervals cost the workers CPU time
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_LOG_TO_STDERR": "0",
    "RAY_worker_niceness": "0",  # same as the command; with Ray's default, 15, workers starve on a busy machine
}
_LEAN = {  # CPU time of Ray slows a computation on all CPUs by about twice that: threads wait for the slowest one
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # not needed: this machine is the only node
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_num_workers_soft_limit": "0",  # an idle Python process wakes up 100 times a second
    "RAY_memory_monitor_refresh_ms": "1000",  # default: 250
}
_OBJECT_STORE_BYTES = 1 << 30  # limit of a local Ray's shared memory
_CLUSTER_TASKS = 256
_START_LIMIT_S = 180.0  # an idle machine needs 3 to 5
_TOLD_EVERY_S = 10.0


def joins_cluster() -> bool:
    """Whether ``start_ray`` joins a running Ray, because ``RAY_ADDRESS`` is set."""
    return bool(os.environ.get("RAY_ADDRESS"))


def in_submitted_job() -> bool:
    """Whether this process is the command of a Ray job."""
    return ray_internals.JOB_CONFIG in os.environ


def start_ray(
    num_cpus: int | None = None,
    *,
    metrics_port: int | None = None,
    lean: bool = False,
) -> None:
    """Start or join Ray; does nothing if this process is already connected.

    Args:
        num_cpus: logical CPUs of a local Ray, by default as many as this process may use. Ignored when joining.
        metrics_port: port where a local Ray exports metrics in Prometheus' format; None: any free port.
        lean: start a local Ray without metrics, task list and idle workers, for a long computation on all CPUs.

    Raises:
        SerError: the machine is too busy to start Ray, no folder can hold its sockets, or the cluster of
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
        atexit.register(ray_internals.end_finished)  # registered before Ray's own handler, so it runs after that
    import ray

    if ray.is_initialized():
        return
    ray_internals.reread_environment(joining=joining)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    options["runtime_env"] = {"env_vars": _worker_environment()}
    if joining:
        _join(options)
    else:
        if num_cpus is None and usable_cpus() < (os.cpu_count() or 1):
            num_cpus = usable_cpus()  # otherwise Ray counts CPUs; it respects the quotas of containers
        options |= {"num_cpus": num_cpus, "object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
        options |= ray_internals.metrics_port(metrics_port) | ray_internals.temp_folder()
        _start_here(options, lean)
    logging.getLogger("ray").setLevel(logging.ERROR)


def stop_ray() -> None:
    """Stop a local Ray, or disconnect from the joined cluster."""
    import ray

    ray.shutdown()


def _start_here(options: dict[str, Any], lean: bool) -> None:
    """Start a local Ray, printing the elapsed time every ten seconds; try again if a start fails on a busy machine.

    Raises:
        SerError: no start has succeeded within ``_START_LIMIT_S``.
    """
    import ray

    before, deadline_s = ray_internals.children(), time.monotonic() + _START_LIMIT_S
    with _said_how_long("starting Ray"):
        while True:
            try:
                with ray_internals.patience(deadline_s - time.monotonic()):
                    ray.init(address="local", **options)
                break
            except Exception as error:  # Ray raises a bare Exception if its processes do not start in time
                if "timed out" not in str(error):
                    raise
                ray.shutdown()
                for left in ray_internals.children() - before:  # Ray does not end the processes of a failed start
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
    """Print the elapsed time to stderr every ten seconds while the block runs."""
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
    """Set the scheduling policy SCHED_BATCH (Linux) for the processes of a local Ray and those they start later.

    A waking thread with this policy does not interrupt a computing one: it takes a free CPU, or waits for the end of
    the time slice. It still gets its usual share of CPU time, so nothing starves.
    """
    if hasattr(os, "SCHED_BATCH"):
        for child in ray_internals.children():
            ray_internals.schedule(child, os.SCHED_BATCH)


def restore_priority(*, together: bool) -> None:
    """In a worker of a local Ray: undo `_yield_to_computation` for this thread and the threads it starts later.

    ``together``: for all threads of the process, because those that exchange gradients are already running.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    if together:
        ray_internals.schedule(os.getpid(), os.SCHED_OTHER)
    else:
        with suppress(OSError):  # a sandbox that forbids this has also prevented the earlier change
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _join(options: dict[str, Any]) -> None:
    """Join the cluster of ``RAY_ADDRESS``. Raises SerError if that fails."""
    import ray
    from ray.exceptions import AuthenticationError

    address = os.environ["RAY_ADDRESS"]
    if address.startswith(("http://", "https://")):
        raise SerError(
            f"RAY_ADDRESS {address} is a dashboard's URL, for submitting jobs: put 'ser submit' before the command, or "
            "set RAY_ADDRESS to host:6379 of the head"
        )
    try:
        ray.init(**options)
    except AuthenticationError as error:
        raise SerError(
            f"the Ray cluster at {address} requires its token; copy the head's ~/.ray/auth_token here, mode 600"
        ) from error
    except ConnectionError as error:
        raise SerError(f"no Ray cluster answers at RAY_ADDRESS {address}; start it, or unset RAY_ADDRESS") from error


def _worker_environment() -> dict[str, str]:
    """Environment variables with which workers can import this project and log little.

    In a submitted job, Ray itself adds each node's copy of the uploaded folder to the workers' path. It refuses
    variables that were already set at submission, so these are left out.
    """
    if in_submitted_job():
        given = json.loads(os.environ[ray_internals.JOB_CONFIG]).get("runtime_env", {}).get("env_vars", {})
        return {name: value for name, value in _QUIET.items() if name not in given}
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**_QUIET, "PYTHONPATH": path}


def data_context() -> object:
    """Set Ray Data's options for this process: rows in order, native tensor columns, an error instead of a hang.

    Its reservation of resources per operator is off. While a new execution waits for its grant (seconds, and the whole
    time for back-to-back executions), the reservation would allow only one task at a time. ``task_pool`` sets the
    limit instead. Returns the context.
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
    """The number of a stage's tasks that Ray Data submits at once: two per CPU, so no CPU waits for the driver.

    ``blocks``: number of tasks in total. A task still occupies one CPU while it runs. On a joined cluster at least
    ``_CLUSTER_TASKS`` are submitted, because an autoscaler adds nodes only for waiting tasks.
    """
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 1))
    wanted = max(2 * cpus, _CLUSTER_TASKS if joins_cluster() else 2)
    return ray.data.TaskPoolStrategy(size=max(1, min(wanted, blocks)))
