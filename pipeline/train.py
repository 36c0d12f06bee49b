"""`fit.py` under Ray Train: 1..N workers, a failed worker replaced, the run resumed on purpose.

Workers share one global stream of batches (`sampling`), average their gradients (gloo on CPU, nccl on GPU) and report
every epoch equally often. The state after each epoch is the run folder's checkpoint: a replaced worker group and a
new driver with `--resume` both go on from it. Limits: the run folder must be visible to every worker.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.errors import SerError
from pipeline.fit import FitConfig, Record, Run
from pipeline.runs import Plan, train_here
from pipeline.runtime import start_ray

PROGRESS = "progress.json"
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
        num_workers: processes that share each batch.
        use_gpu: one GPU a worker, instead of an equal share of the CPUs.
        max_failures: how often a failed group of workers is started again.
        on_epoch: called in this process with each new epoch's record.
        on_batch: called in this process, about twice a second, with (epoch, batches done, batches in all).

    Raises:
        SerError: what a worker found wrong with the settings or the data.
    """
    start_ray()
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    free = float(ray.cluster_resources().get("CPU", 1))
    cpus = max(0.1, min(1.0, free / (2 * num_workers)))
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"plan": plan.to_dict(), "out": str(plan.out.absolute()), "use_gpu": use_gpu},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name=f"attempt-{time.time_ns()}",
            storage_path=str((plan.out / "ray").absolute()),
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    )
    with _Watch(plan.out, on_epoch, on_batch):
        try:
            trainer.fit()
        except Exception as error:
            found = _user_error(error)
            if found is None:
                raise
            raise SerError(found) from error


def _worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train
    from ray.train.torch import get_device

    values = config["plan"]
    plan = Plan(
        out=Path(config["out"]),
        features=Path(values["features"]),
        labels=tuple(values["labels"]),
        model_name=values["model"]["name"],
        model_options=values["model"]["options"],
        fit=FitConfig.from_dict(values["fit"]),
    )
    beat = _Beat(plan.out / PROGRESS) if ray.train.get_context().get_world_rank() == 0 else None

    def report(record: Record, run: Run) -> None:
        ray.train.report({name: value for name, value in record.items() if value is not None})

    train_here(plan, device=str(get_device()) if config["use_gpu"] else "cpu", on_epoch=report, on_batch=beat)


def _user_error(error: BaseException) -> str | None:
    """The message of a SerError that a worker raised, from Ray's wrapping of it."""
    for cause in getattr(error, "worker_failures", {}).values():
        inner: BaseException | None = cause
        while inner is not None:
            if isinstance(inner, SerError):
                return str(inner)
            inner = getattr(inner, "cause", None) or inner.__cause__
    return None


class _Beat:
    """Writes how far the epoch is, at most twice a second."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_s = 0.0

    def __call__(self, epoch: int, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last_s >= _BEAT_S or done == total:
            self.last_s = now
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text(json.dumps([epoch, done, total]), encoding="utf-8")
            temporary.replace(self.path)


class _Watch:
    """Follows a run folder from the driver: what workers print would not reach the user's terminal."""

    def __init__(
        self,
        out: Path,
        on_epoch: Callable[[Record], None] | None,
        on_batch: Callable[[int, int, int], None] | None,
    ) -> None:
        self.out, self.on_epoch, self.on_batch = out, on_epoch, on_batch
        self.seen = len(self._history())
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
        for record in self._history()[self.seen :]:
            self.seen += 1
            if self.on_epoch is not None:
                self.on_epoch(record)
        path = self.out / PROGRESS
        if self.on_batch is not None and path.is_file():
            progress = json.loads(path.read_text(encoding="utf-8"))
            if progress != self.last:
                self.last = progress
                self.on_batch(*progress)

    def _history(self) -> list[Record]:
        path = self.out / "history.csv"
        if not path.is_file():
            return []
        records: list[Record] = pd.read_csv(path).astype(object).where(lambda t: t.notna(), None).to_dict("records")
        return records
