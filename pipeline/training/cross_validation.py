"""A protocol run: one model a fold, trained side by side on Ray or in processes of this machine; one table of answers.

Each fold is a run folder (``pipeline.training.run``) below ``OUT/PROTOCOL``: a worker that dies goes on from its last
epoch, and the same command again trains only what is missing. A finished fold keeps its plan, splits, history and
answers (``predictions.parquet``), and its weights as a bundle where they are asked for: a later run's folds can then
learn from it, each from the models that never heard what it is tested on. Limits: one worker (a share of the CPUs, or a
GPU) a fold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.cluster.engine import in_processes
from pipeline.data.splits import HASH_COLUMN, Fold
from pipeline.features.store import MANIFEST
from pipeline.storage.errors import SerError
from pipeline.storage.journal import PLAN, atomic_path
from pipeline.training.config import FitConfig
from pipeline.training.distillation import refuse_leaks
from pipeline.training.loop import Record
from pipeline.training.plan import Plan
from pipeline.training.run import begin, check, check_resumes, load_checkpoint, read_history, read_splits, train_here

PREDICTIONS = "predictions.parquet"
_BUNDLE = "config.json"  # what a folder with a finished bundle holds
_LOOK_S = 0.5

FoldCallback = Callable[[str, Record], None]  # the fold's name, and the epoch's record


@dataclass(frozen=True)
class FoldConcurrency:
    """How many folds train at once, each with how many CPUs and what share of a GPU."""

    folds: int
    cpus: int
    gpus: float = 0.0

    @classmethod
    def of(cls, folds: int, at_once: int | None, cpus: int, gpus: int) -> FoldConcurrency:
        """``at_once`` folds (as many as there are GPUs, or CPUs, when None) of ``folds`` on what there is.

        Raises:
            SerError: ``at_once`` below 1 or above the CPUs.
        """
        wanted = min(folds, gpus or cpus) if at_once is None else at_once
        if not 1 <= wanted <= cpus:
            raise SerError(f"--folds_at_once {wanted} on {cpus} CPUs; expected 1 to {cpus}")
        share = gpus / wanted
        return cls(wanted, max(1, cpus // wanted), share if share <= 1 else int(share))  # Ray gives no fraction above 1


def train_folds(
    folds: Sequence[Fold],
    base: Plan,
    side: FoldConcurrency,
    *,
    fits: Mapping[str, FitConfig] | None = None,
    keep_weights: bool = False,
    max_failures: int = 3,
    engine: str = "ray",
    on_epoch: FoldCallback = lambda _fold, _record: None,
) -> pd.DataFrame:
    """Train and test every fold that is not done yet.

    Args:
        base: what each fold trains; its ``out`` is the protocol's folder, its ``teachers`` are folders of earlier runs
            of the same protocol with ``keep_weights``.
        fits: settings of single folds, by name, in place of those of ``base``.
        keep_weights: make a bundle of each fold's folder.
        max_failures: how often a fold whose process died is started again, on Ray.
        engine: "ray", or "local" for CPUs of this machine.
        on_epoch: called in this process with each new epoch.

    Returns:
        A scores table of all test parts with a column ``fold``, in the order of the folds.

    Raises:
        SerError: settings that do not fit the data, a folder that holds another protocol run, or teachers that were
            trained on what a fold is tested on.
    """
    plans = {fold.name: _plan_of(base, fold.name, (fits or {}).get(fold.name, base.fit)) for fold in folds}
    for fold in folds:
        _check_teachers(plans[fold.name].teachers, fold)
    for fold in folds:
        _lay_down(plans[fold.name], fold)
    todo = {name: plan for name, plan in plans.items() if not (plan.out / PREDICTIONS).is_file()}
    if keep_weights:
        _refuse_without_weights([plan.out for name, plan in plans.items() if name not in todo])
    if todo:
        watch = _Watch(todo, on_epoch)
        if engine == "local":
            _in_processes(todo, side, keep_weights, watch)
        else:
            _on_ray(todo, side, keep_weights, max_failures, watch)
    tables = [pd.read_parquet(plan.out / PREDICTIONS).assign(fold=name) for name, plan in plans.items()]
    return pd.concat(tables, ignore_index=True)


def _plan_of(base: Plan, fold: str, fit: FitConfig) -> Plan:
    name = f"fold-{fold}"
    return replace(base, out=base.out / name, fit=fit, teachers=tuple(folder / name for folder in base.teachers))


def _check_teachers(teachers: Sequence[Path], fold: Fold) -> None:
    for teacher in teachers:
        if not (teacher / _BUNDLE).is_file():
            raise SerError(f"no teacher at {teacher}; train the same folds with --keep_weights first")
    refuse_leaks(teachers, fold.splits)


def _refuse_without_weights(finished: Sequence[Path]) -> None:
    for out in finished:
        if not (out / _BUNDLE).is_file():
            raise SerError(f"{out} was trained without --keep_weights; give another --out, or --overwrite")


def _lay_down(plan: Plan, fold: Fold) -> None:
    """Begin the fold's run, or see that what is there is the same."""
    if not (plan.out / PLAN).is_file():
        begin(plan, fold.splits)
        check(plan)
        return
    try:
        check_resumes(plan)
    except SerError as error:
        raise SerError(f"{plan.out}: {error}, or give another --out, or --overwrite") from error
    for name, part in read_splits(plan.out).items():
        if not _same_recordings(part, fold.splits[name]):
            raise SerError(f"{plan.out} was begun with other recordings; give another --out, or --overwrite")


def _same_recordings(begun: pd.DataFrame, found: pd.DataFrame) -> bool:
    """By row number and label, and by content where both know it: recordings may have been moved away since."""
    before, now = (
        dict(zip(zip(part["row_id"].astype(str), part["label"], strict=True), part[HASH_COLUMN], strict=True))
        for part in (begun, found)
    )
    return before.keys() == now.keys() and all(now[row] in (known, "") for row, known in before.items() if known)


class _Watch:
    """Tells of each new epoch of the folds."""

    def __init__(self, plans: Mapping[str, Plan], on_epoch: FoldCallback) -> None:
        self._outs = {name: plan.out for name, plan in plans.items()}
        self._on_epoch = on_epoch
        self._seen = {name: len(read_history(out)) for name, out in self._outs.items()}

    def __call__(self) -> None:
        for name, out in self._outs.items():
            records = read_history(out)[self._seen[name] :]
            self._seen[name] += len(records)
            for record in records:
                self._on_epoch(name, record)


def _in_processes(todo: Mapping[str, Plan], side: FoldConcurrency, keep_weights: bool, watch: _Watch) -> None:
    work = partial(_train_plan, device="cpu", keep_weights=keep_weights)
    for _ in in_processes(list(todo.values()), work, side.folds, look_s=_LOOK_S, look=watch):
        watch()


def _train_plan(plan: Plan, device: str, keep_weights: bool) -> None:
    _train_fold(plan.to_dict(), str(plan.out.absolute()), device, keep_weights)


def _on_ray(
    todo: Mapping[str, Plan], side: FoldConcurrency, keep_weights: bool, max_failures: int, watch: _Watch
) -> None:
    import ray

    from pipeline.cluster.nodes import check_nodes
    from pipeline.cluster.runtime import start_ray

    start_ray(side.folds * side.cpus)
    first = next(iter(todo.values()))
    check_nodes(first.out, [*(folder / MANIFEST for folder in first.features), *first.teachers])
    task = ray.remote(_train_fold).options(num_cpus=side.cpus, num_gpus=side.gpus, max_retries=max_failures)
    device = "cuda" if side.gpus else "cpu"
    running = [task.remote(plan.to_dict(), str(plan.out.absolute()), device, keep_weights) for plan in todo.values()]
    try:
        while running:
            done, running = ray.wait(running, timeout=_LOOK_S)
            watch()
            ray.get(done)
    except SerError as error:  # Ray's copy carries the worker's traceback in its text
        raise SerError(str(getattr(error, "cause", error))) from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _train_fold(values: dict[str, Any], out: str, device: str, keep_weights: bool) -> None:
    """What runs in a worker: train (on), answer the test part, keep the answers, drop the checkpoint."""
    from pipeline.training.loop import weights_of
    from pipeline.training.results import predict, write_results

    plan = Plan.from_dict(values, Path(out))
    train_here(plan, device=device)
    answers = predict(plan, weights_of(load_checkpoint(plan.checkpoint)), read_splits(plan.out)["test"])
    if keep_weights:
        write_results(plan, "none")
    with atomic_path(plan.out / PREDICTIONS) as beside:
        answers.to_parquet(beside, index=False)
    plan.checkpoint.unlink()
