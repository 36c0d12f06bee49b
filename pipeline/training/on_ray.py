"""Training with `loop.py` on Ray Train: one or more workers; failed workers are replaced; runs can be resumed.

Workers share one global stream of batches (`batches`) and average their gradients (gloo on CPU, nccl on GPU). The state
after each epoch is the run folder's checkpoint: a replaced worker group and a new driver with `--resume` both continue
from it. Limits: every worker must be able to read and write the run folder.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.cluster.engine import alive_nodes, check_nodes
from pipeline.cluster.ray_internals import TRAIN_CONTROLLER, end_at_exit
from pipeline.cluster.runtime import joins_cluster, restore_priority, start_ray
from pipeline.features.store import MANIFEST
from pipeline.storage.errors import SerError
from pipeline.storage.journal import atomic_path
from pipeline.training.loop import IN_WORKERS, DivergedError, Record, Run
from pipeline.training.plan import Plan
from pipeline.training.run import LOCK_WAIT_NODES_S, LOCK_WAIT_S, NewRecords, train_here

_BEAT_S = 0.5


def train_on_ray(
    plan: Plan,
    *,
    num_workers: int,
    use_gpu: bool = False,
    max_failures: int = 3,
    on_epoch: Callable[[Record], None] | None = None,
    on_batch: Callable[[int, int, int], None] | None = None,
) -> None:
    """Train a plan on Ray workers; the result is the run folder's checkpoint.

    Args:
        num_workers: processes that share each batch, each with one GPU (``use_gpu``) or an equal share of the CPUs.
        max_failures: how many times a failed group of workers is restarted.
        on_epoch: called in this process with each new epoch's record.
        on_batch: called in this process, about twice a second, with (epoch, batches done, batches in all).

    Raises:
        SerError: a worker found an error in the settings or the data.
        KeyboardInterrupt: Ctrl-C; the workers have ended, the checkpoint is that of the last finished epoch.
    """
    start_ray(lean=True)
    check_nodes(plan.out, [*(folder / MANIFEST for folder in plan.features), *plan.teachers])
    _check_gpus(num_workers if use_gpu else 0)
    shutil.rmtree(_storage(plan), ignore_errors=True)  # of a driver that was killed
    trainer = _trainer(plan, num_workers, use_gpu, max_failures)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with _Watch(plan.out, on_epoch, on_batch):
            complaint = trainer.fit().return_value
    except SystemExit as stop:  # raised by Ray's own Ctrl-C handler after it has stopped the workers
        raise KeyboardInterrupt from stop
    except Exception as error:
        complaint = _user_error(error)
        if complaint is None:
            raise
    finally:
        signal.signal(signal.SIGINT, handler)
        if not joins_cluster():
            end_at_exit(TRAIN_CONTROLLER)
        shutil.rmtree(_storage(plan), ignore_errors=True)
    if complaint is not None:
        raise SerError(complaint)


def _check_gpus(wanted: int) -> None:
    """Raise SerError if this machine has too few GPUs; a cluster is not checked, as it may still start nodes."""
    import ray

    found = int(ray.cluster_resources().get("GPU", 0))
    if wanted > found and not joins_cluster():
        raise SerError(
            f"{wanted} workers need one GPU each, but this machine has {found}; use fewer workers, or train on CPUs"
        )


def _storage(plan: Plan) -> Path:
    return plan.out.absolute() / "ray"


def _progress(out: Path) -> Path:
    return out / "ray" / "progress.json"


def _trainer(plan: Plan, num_workers: int, use_gpu: bool, max_failures: int) -> Any:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    class Lean(TorchTrainer):  # here, because importing Ray takes seconds
        """A trainer without the callbacks for placement groups and Ray Data, which use CPU time all along."""

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # mypy sees an older TorchTrainer
            idle = ("PlacementGroupCleanerCallback", "DatasetsCallback")
            return [callback for callback in callbacks if type(callback).__name__ not in idle]

    several = joins_cluster() and len(alive_nodes()) > 1
    free = float(ray.cluster_resources().get("CPU", 1))
    wanted = float(plan.fit.threads or 1)
    if not several:
        wanted = max(0.1, min(wanted, free / (2 * num_workers)))  # leaves CPUs for Ray's other tasks
    resources = {"CPU": wanted} | ({"GPU": 1} if use_gpu else {})
    config = {"plan": plan.to_dict(), "out": str(plan.out.absolute()), "use_gpu": use_gpu, "several": several}
    memory: dict[str, Any] = {"worker_runtime_env": {"env_vars": IN_WORKERS}}  # mypy sees an older RunConfig
    return (TorchTrainer if joins_cluster() else Lean)(
        _worker,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            # the bottleneck is the CPUs without GPUs, and the network with them
            placement_strategy="SPREAD" if several and not use_gpu else "PACK",
        ),
        run_config=RunConfig(
            name=f"attempt-{time.time_ns()}",  # always new: with an old name Ray would resume that run
            storage_path=str(_storage(plan)),
            failure_config=FailureConfig(max_failures=max_failures),
            **memory,
        ),
    )


def _worker(config: dict[str, Any]) -> Any:
    """The function that each Ray Train worker runs; returns an error message if a restart would not help, else None."""
    import ray.train
    from ray.train.torch import get_device

    restore_priority(together=ray.train.get_context().get_world_size() > 1)
    plan = Plan.from_dict(config["plan"], Path(config["out"]))
    beat = _Beat(_progress(plan.out)) if ray.train.get_context().get_world_rank() == 0 else None

    def report(record: Record, run: Run) -> None:
        ray.train.report({name: value for name, value in record.items() if value is not None})

    try:
        train_here(
            plan,
            device=str(get_device()) if config["use_gpu"] else "cpu",
            on_epoch=report,
            on_batch=beat,
            lock_wait_s=LOCK_WAIT_NODES_S if config["several"] else LOCK_WAIT_S,
        )
    except DivergedError as error:
        return str(error)
    return None


def _user_error(error: BaseException) -> str | None:
    """The message of a SerError that a worker raised, from Ray's exception; None if it holds no SerError."""
    for cause in getattr(error, "worker_failures", {}).values():
        inner: BaseException | None = cause
        while inner is not None:
            if isinstance(inner, SerError):
                return str(inner)
            inner = getattr(inner, "cause", None) or inner.__cause__
    return None


class _Beat:
    """Writes the progress of the epoch into a file, at most twice a second."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_s = 0.0

    def __call__(self, epoch: int, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last_s >= _BEAT_S or done == total:
            self.last_s = now
            with atomic_path(self.path) as beside:
                beside.write_text(json.dumps([epoch, done, total]), encoding="utf-8")


class _Watch:
    """Watches a run folder in the driver and calls back: the workers' own output would not reach the terminal."""

    def __init__(
        self, out: Path, on_epoch: Callable[[Record], None] | None, on_batch: Callable[[int, int, int], None] | None
    ) -> None:
        self.out, self.on_epoch, self.on_batch = out, on_epoch, on_batch
        self.new_records = NewRecords(out)
        self.last: list[int] = []
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self._look()

    def _run(self) -> None:
        while not self.stop.wait(_BEAT_S):
            self._look()

    def _look(self) -> None:
        for record in self.new_records():
            if self.on_epoch is not None:
                self.on_epoch(record)
        path = _progress(self.out)
        if self.on_batch is not None and path.is_file():
            progress = json.loads(path.read_text(encoding="utf-8"))
            if progress != self.last:
                self.last = progress
                self.on_batch(*progress)
