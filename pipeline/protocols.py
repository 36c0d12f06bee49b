"""A protocol run: one model a fold, trained on Ray side by side, and the answers of all folds in one table.

Each fold is a run folder (``pipeline.runs``) below ``OUT/PROTOCOL``: a worker that dies goes on from its last epoch,
and the same command again trains only what is missing. A finished fold keeps its plan, splits, history and answers
(``predictions.parquet``), not its weights. Limits: one worker (a share of the CPUs, or a GPU) a fold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.arrays import MANIFEST
from pipeline.errors import SerError
from pipeline.fit import Record
from pipeline.folds import Fold
from pipeline.history import read_history
from pipeline.runs import Plan, begin, check, load_checkpoint, read_plan, read_splits, train_here

PREDICTIONS = "predictions.parquet"
_LOOK_S = 0.5

FoldCallback = Callable[[str, Record], None]  # the fold's name, and the epoch's record


@dataclass(frozen=True)
class SideBySide:
    """How many folds train at once, each with how many CPUs and what share of a GPU."""

    folds: int
    cpus: int
    gpus: float = 0.0

    @classmethod
    def of(cls, folds: int, at_once: int | None, cpus: int, gpus: int) -> SideBySide:
        """``at_once`` folds (as many as there are GPUs, or CPUs, when None) of ``folds`` on what there is.

        Raises:
            SerError: ``at_once`` below 1 or above the CPUs.
        """
        wanted = at_once or min(folds, gpus or cpus)
        if not 1 <= wanted <= cpus:
            raise SerError(f"--folds_at_once {wanted} on {cpus} CPUs; expected 1 to {cpus}")
        return cls(wanted, max(1, cpus // wanted), gpus / wanted)


def train_folds(
    folds: Sequence[Fold],
    base: Plan,
    side: SideBySide,
    *,
    max_failures: int = 3,
    on_epoch: FoldCallback = lambda _fold, _record: None,
) -> pd.DataFrame:
    """Train and test every fold that is not done yet.

    Args:
        base: what each fold trains; its ``out`` is the protocol's folder.
        max_failures: how often a fold whose process died is started again.
        on_epoch: called in this process with each new epoch.

    Returns:
        A scores table of all test parts with a column ``fold``, in the order of the folds.

    Raises:
        SerError: settings that do not fit the data, or a folder that holds another protocol run.
    """
    plans = {fold.name: replace(base, out=base.out / f"fold-{fold.name}") for fold in folds}
    for fold in folds:
        _lay_down(plans[fold.name], fold)
    todo = {name: plan for name, plan in plans.items() if not (plan.out / PREDICTIONS).is_file()}
    if todo:
        _run(todo, side, max_failures, on_epoch)
    tables = [pd.read_parquet(plan.out / PREDICTIONS).assign(fold=name) for name, plan in plans.items()]
    return pd.concat(tables, ignore_index=True)


def _lay_down(plan: Plan, fold: Fold) -> None:
    """Begin the fold's run, or see that what is there is the same."""
    if not (plan.out / "plan.json").is_file():
        begin(plan, fold.splits)
        check(plan)
        return
    try:
        plan.check_continues(read_plan(plan.out))
    except SerError as error:
        raise SerError(f"{plan.out}: {error}, or give another --out, or --overwrite") from error
    for name, part in read_splits(plan.out).items():
        if sorted(part["row_id"]) != sorted(fold.splits[name]["row_id"].astype(str)):
            raise SerError(f"{plan.out} was begun with other recordings; give another --out, or --overwrite")


def _run(todo: dict[str, Plan], side: SideBySide, max_failures: int, on_epoch: FoldCallback) -> None:
    import ray

    from pipeline.cluster import check_nodes
    from pipeline.runtime import start_ray

    start_ray(side.folds * side.cpus)
    first = next(iter(todo.values()))
    check_nodes(first.out, [first.features / MANIFEST])
    task = ray.remote(_train_fold).options(num_cpus=side.cpus, num_gpus=side.gpus, max_retries=max_failures)
    device = "cuda" if side.gpus else "cpu"
    seen = {name: len(read_history(plan.out)) for name, plan in todo.items()}
    running = {task.remote(plan.to_dict(), str(plan.out.absolute()), device): name for name, plan in todo.items()}
    try:
        while running:
            done, _ = ray.wait(list(running), timeout=_LOOK_S)
            for name in list(running.values()):
                records = read_history(todo[name].out)[seen[name] :]
                seen[name] += len(records)
                for record in records:
                    on_epoch(name, record)
            for reference in done:
                ray.get(reference)
                running.pop(reference)
    except SerError as error:  # Ray's copy carries the worker's traceback in its text
        raise SerError(str(getattr(error, "cause", error))) from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _train_fold(values: dict[str, Any], out: str, device: str) -> None:
    """What runs in a worker: train (on), answer the test part, keep the answers, drop the checkpoint."""
    from pipeline.fit import weights_of
    from pipeline.results import predict

    plan = Plan.from_dict(values, Path(out))
    train_here(plan, device=device)
    answers = predict(plan, weights_of(load_checkpoint(plan.checkpoint)), read_splits(plan.out)["test"])
    temporary = plan.out / f".{PREDICTIONS}.{time.time_ns()}.tmp"
    answers.to_parquet(temporary, index=False)
    temporary.replace(plan.out / PREDICTIONS)
    plan.checkpoint.unlink()
