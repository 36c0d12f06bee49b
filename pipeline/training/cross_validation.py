"""Cross-validation by a protocol: trains one model per fold, in parallel, and collects their answers in one table.

Each fold has a run folder (``pipeline.training.run``) below ``OUT/PROTOCOL``. A fold whose process dies continues from
its last epoch, and the same command again trains only the missing folds. A finished fold keeps its plan, parts, history
and answers (``predictions.parquet``), and with ``keep_weights`` its bundle, which a later run can use as a teacher of
the same fold. Limits: one worker per fold, with a share of the CPUs or a GPU.

The report compares several protocols of one recipe, to show the gap to unseen speakers. A protocol's figures are those
of all its folds' answers together, with mean and standard deviation over folds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.cluster.engine import in_processes
from pipeline.data.splits import HASH_COLUMN, UNSEEN_SPEAKERS, Fold, sharing
from pipeline.data.tables import write_csv
from pipeline.evaluation.outcomes import outcomes, shares
from pipeline.features.store import MANIFEST
from pipeline.reporting.report import percent, points, span, write_page
from pipeline.storage.errors import SerError
from pipeline.storage.journal import PLAN, atomic_path
from pipeline.training.config import FitConfig
from pipeline.training.loop import Record
from pipeline.training.losses import refuse_leaks
from pipeline.training.plan import Plan
from pipeline.training.run import NewRecords, begin, check, check_resumes, load_checkpoint, read_splits, train_here

PREDICTIONS = "predictions.parquet"
_BUNDLE = "config.json"  # exists in a folder whose bundle is complete
_LOOK_S = 0.5

FoldCallback = Callable[[str, Record], None]  # the fold's name, and the epoch's record


@dataclass(frozen=True)
class FoldConcurrency:
    """How many folds train at once, and the CPUs and the share of a GPU that each gets."""

    folds: int
    cpus: int
    gpus: float = 0.0

    @classmethod
    def of(cls, folds: int, at_once: int | None, cpus: int, gpus: int) -> FoldConcurrency:
        """Share ``cpus`` and ``gpus`` among ``at_once`` of ``folds``; None: one fold for each GPU, or else CPU.

        Raises:
            SerError: ``at_once`` is below 1 or above ``cpus``.
        """
        wanted = min(folds, gpus or cpus) if at_once is None else at_once
        if not 1 <= wanted <= cpus:
            raise SerError(f"--folds_at_once {wanted} on {cpus} CPUs; expected 1 to {cpus}")
        share = gpus / wanted
        return cls(wanted, max(1, cpus // wanted), share if share <= 1 else int(share))  # above 1 Ray needs an integer


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
    """Train and test every fold that is not finished yet.

    Args:
        base: the plan of each fold, but ``out`` is the protocol's folder, and ``teachers`` are folders of earlier runs
            of the same protocol with ``keep_weights``.
        fits: settings of single folds, by name, instead of those of ``base``.
        keep_weights: write a bundle into each fold's folder.
        max_failures: how many times a fold whose process died is restarted, on Ray.
        engine: "ray", or "local" for processes on this machine, on CPUs.
        on_epoch: called in this process with each new epoch.

    Returns:
        The score tables of all folds' test parts, with a column ``fold``.

    Raises:
        SerError: settings that do not fit the data, a folder with another protocol run, or teachers that were trained
            on recordings of a fold's test part.
    """
    plans = {fold.name: _plan_of(base, fold.name, (fits or {}).get(fold.name, base.fit)) for fold in folds}
    for fold in folds:
        _check_teachers(plans[fold.name].teachers, fold)
    for fold in folds:
        _lay_down(plans[fold.name], fold)
    todo = {name: plan for name, plan in plans.items() if not (plan.out / PREDICTIONS).is_file()}
    for name, plan in plans.items():
        if keep_weights and name not in todo and not (plan.out / _BUNDLE).is_file():
            raise SerError(f"{plan.out} was trained without --keep_weights; give another --out, or --overwrite")
    if todo:
        new_records = {name: NewRecords(plan.out) for name, plan in todo.items()}

        def watch() -> None:
            for name, new in new_records.items():
                for record in new():
                    on_epoch(name, record)

        absolute = [Plan.from_dict(plan.to_dict(), plan.out.absolute()) for plan in todo.values()]
        if engine == "local":
            work = partial(_train_fold, device="cpu", keep_weights=keep_weights)
            for _ in in_processes(absolute, work, side.folds, look_s=_LOOK_S, look=watch):
                watch()
        else:
            _on_ray(absolute, side, keep_weights, max_failures, watch)
    tables = [pd.read_parquet(plan.out / PREDICTIONS).assign(fold=name) for name, plan in plans.items()]
    return pd.concat(tables, ignore_index=True)


def _plan_of(base: Plan, fold: str, fit: FitConfig) -> Plan:
    name = f"fold-{fold}"
    return replace(base, out=base.out / name, fit=fit, teachers=tuple(folder / name for folder in base.teachers))


def _check_teachers(teachers: Sequence[Path], fold: Fold) -> None:
    for teacher in teachers:
        if not (teacher / _BUNDLE).is_file():
            raise SerError(f"no teacher at {teacher}; first train the same folds with --keep_weights")
    refuse_leaks(teachers, fold.splits)


def _lay_down(plan: Plan, fold: Fold) -> None:
    """Start the fold's run folder, or check that the existing one has the same settings and recordings."""
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
            raise SerError(f"{plan.out} was started with other recordings; give another --out, or --overwrite")


def _same_recordings(begun: pd.DataFrame, found: pd.DataFrame) -> bool:
    """Whether both have the same row numbers and labels, and the same content hashes where both have one."""
    before, now = (
        dict(zip(zip(part["row_id"].astype(str), part["label"], strict=True), part[HASH_COLUMN], strict=True))
        for part in (begun, found)
    )
    return before.keys() == now.keys() and all(now[row] in (known, "") for row, known in before.items() if known)


def _on_ray(
    todo: Sequence[Plan], side: FoldConcurrency, keep_weights: bool, max_failures: int, watch: Callable[[], None]
) -> None:
    import ray

    from pipeline.cluster.engine import check_nodes
    from pipeline.cluster.runtime import start_ray

    start_ray(side.folds * side.cpus)
    check_nodes(todo[0].out, [*(folder / MANIFEST for folder in todo[0].features), *todo[0].teachers])
    task = ray.remote(_train_fold).options(num_cpus=side.cpus, num_gpus=side.gpus, max_retries=max_failures)
    device = "cuda" if side.gpus else "cpu"
    running = [task.remote(plan, device, keep_weights) for plan in todo]
    try:
        while running:
            done, running = ray.wait(running, timeout=_LOOK_S)
            watch()
            ray.get(done)
    except SerError as error:  # the text of Ray's copy includes the worker's traceback
        raise SerError(str(getattr(error, "cause", error))) from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _train_fold(plan: Plan, device: str, keep_weights: bool) -> None:
    """The work of one process: train or continue, predict the test part, save the answers, delete the checkpoint."""
    from pipeline.training.loop import weights_of
    from pipeline.training.results import predict, write_results

    train_here(plan, device=device)
    answers = predict(plan, weights_of(load_checkpoint(plan.checkpoint)), read_splits(plan.out)["test"])
    if keep_weights:
        write_results(plan, "none")
    with atomic_path(plan.out / PREDICTIONS) as beside:
        answers.to_parquet(beside, index=False)
    plan.checkpoint.unlink()


FIGURES = {"accuracy": "accuracy", "weighted_f1": "weighted F1", "uar": "UAR"}


def protocol_row(
    protocol: str, folds: Sequence[Fold], answers: pd.DataFrame, labels: Sequence[str], evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    """The figures of one protocol: its row of the comparison.

    Args:
        answers: those of all folds, with a column ``fold``; evaluation: of these answers.
    """
    single = [_fold_row(fold.name, answers[answers["fold"] == fold.name], labels) for fold in folds]
    recalls = {row["label"]: row["recall"]["value"] for row in evaluation["per_class"]}
    known = {label: value for label, value in recalls.items() if value is not None}
    lowest = min(known, key=lambda label: known[label])
    shared = [sharing(fold) for fold in folds]
    return {
        "protocol": protocol,
        "unseen_speakers": protocol in UNSEEN_SPEAKERS,
        "n": len(answers),
        "overall": {name: evaluation["overall"][name] for name in FIGURES},
        "intervals_over": "speakers" if evaluation["bootstrap"]["speakers"] else "recordings",
        "lowest_class": {"label": lowest, "recall": known[lowest]},
        "class_recall": recalls,
        "verdict": evaluation["verdict"]["outcome"],
        "folds": single,
        "over_folds": {name: _mean_and_sd([fold[name] for fold in single]) for name in FIGURES},
        "heard_before": {key: _total([counts[key] for counts in shared]) for key in ("speakers", "takes")},
    }


def _fold_row(name: str, answers: pd.DataFrame, labels: Sequence[str]) -> dict[str, Any]:
    return {"fold": name, "n": len(answers), **shares(outcomes(answers, labels).counts, tuple(FIGURES))}


def _mean_and_sd(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def _total(counts: Sequence[int | None]) -> int | None:
    return None if None in counts else sum(count or 0 for count in counts)


def gaps(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Figures on unseen speakers minus figures on known ones, as shares of 1, for each such pair of protocols."""
    same = [row for row in rows if not row["unseen_speakers"]]
    unseen = [row for row in rows if row["unseen_speakers"]]
    return [
        {"same": a["protocol"], "unseen": b["protocol"]}
        | {name: b["overall"][name]["value"] - a["overall"][name]["value"] for name in FIGURES}
        for a in same
        for b in unseen
    ]


def write_protocols(rows: Sequence[Mapping[str, Any]], out: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``protocols.json``, ``protocols.csv``, ``folds.csv`` and ``protocols.html`` into ``out``."""
    found = {"protocols": list(rows), "gaps": gaps(rows), "meta": dict(meta)}
    write_csv(pd.DataFrame([_flat(row) for row in rows]), out / "protocols.csv")
    folds = [{"protocol": row["protocol"], **fold} for row in rows for fold in row["folds"]]
    write_csv(pd.DataFrame(folds), out / "folds.csv")
    write_page(out / "protocols.html", out / "protocols.json", found, figures=FIGURES)
    return found


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {"protocol": row["protocol"], "folds": len(row["folds"]), "n": row["n"]}
    for name in FIGURES:
        flat[name] = row["overall"][name]["value"]
        flat |= {f"{name}_fold_{key}": value for key, value in row["over_folds"][name].items()}
    return flat | {"lowest_class": row["lowest_class"]["label"], "lowest_recall": row["lowest_class"]["recall"]}


def protocols_summary(found: Mapping[str, Any]) -> str:
    """The comparison as a text of at most 80 columns."""
    lines = [f"{'':<14}{'folds':>6}{'n':>7}" + "".join(f"{name:>14}" for name in FIGURES.values()) + f"{'lowest':>9}"]
    for row in found["protocols"]:
        cells = "".join(f"{percent(row['overall'][name]['value']):>14}" for name in FIGURES)
        lowest = percent(row["lowest_class"]["recall"])
        lines.append(f"{row['protocol']:<14}{len(row['folds']):>6}{row['n']:>7}{cells}{lowest:>9}")
        over = f"over_{row['intervals_over']}"
        intervals = "".join(f"{span(row['overall'][name][over]):>14}" for name in FIGURES)
        lines.append(f"{'  95 % over ' + row['intervals_over']:<27}{intervals}  {row['lowest_class']['label']:.7}")
        if len(row["folds"]) > 1:
            spread = "".join(f"{_spread(row['over_folds'][name]):>14}" for name in FIGURES)
            lines.append(f"{'  folds, mean ± SD':<27}{spread}")
    ways = dict.fromkeys(row["intervals_over"] for row in found["protocols"])
    kinds = [f"{'bootstrap ' if name == 'speakers' else ''}over {name}" for name in ways]
    lines += ["", f"Intervals: {' or '.join(kinds)}."]
    lines += [_known_speakers(row) for row in found["protocols"]]
    for gap in found["gaps"]:
        change = ", ".join(f"{title} {points(gap[name])}" for name, title in FIGURES.items())
        lines.append(f"{gap['unseen']} minus {gap['same']}, points: {change}")
    return "\n".join(lines)


def _spread(values: Mapping[str, float]) -> str:
    return f"{values['mean'] * 100:.1f} ± {values['sd'] * 100:.1f}"


def _known_speakers(row: Mapping[str, Any]) -> str:
    """A sentence: for what share of the tested recordings training had the speaker, and another take."""
    shared, n = row["heard_before"], row["n"]
    if shared["speakers"] is None:
        return f"{row['protocol']}: no speaker column, so it is unknown which speakers were in training"
    takes = "" if shared["takes"] is None else f", {shared['takes'] / n:.0%} another take of the same performance"
    return f"{row['protocol']}: training had the speaker of {shared['speakers'] / n:.0%} of the recordings{takes}"
