"""Run many trainings at once on one GPU, to compare recipes over five folds, six actor folds and seeds in minutes.

    python -m lab.gpu_lab pack --features FEATURES --out lab.npz        # here: the data to copy, without audio
    python -m lab.gpu_lab run --data lab.npz --plan PLAN.json --out OUT # on the GPU: PyTorch, pandas, sklearn
    python -m lab.gpu_lab report --features FEATURES --data lab.npz --answers answers.npz --recipe base --out OUT

A plan is a list of waves. A wave is a list of recipes, trained at once, each training on its own CUDA stream:
{"name": "base", "jobs": ["five", "six"], "seeds": [42], "fit": {FitConfig}, "dropout": 0.4, "teachers": [names]}.
``five`` are the folds of the 80 %, ``six`` the actor folds. The EMA weights of the last epoch classify the middle of
each recording, and 3, 5 and 9 crops of it ("base@5"); the answers choose nothing. "teachers" names recipes of earlier
waves; those of the same job and fold, with all seeds, teach together.

An H100 has run lab/plans/shipped_recipe.json in 4 minutes: five folds of the 80 %, whose answers gave the temperature
of the earlier model. joined_voices.json has not been run: three networks of 3 s to be joined (``report --seed 45 46
47``). ``report`` needs no GPU, only the answers that ``run`` wrote. Changed copies, the CNN-BiLSTM, trainings on the
whole 80 % and the plan unseen_voices.json are in commit 0050146 for the last time.
Limits: one GPU; ``lab.gpu_data`` rounds features, and ``lab.gpu_training`` lists the differences from
``pipeline.training.loop``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lab.gpu_data import SPLITS, Data, pack
from lab.gpu_training import N_CLASSES, Recipe, Training, train_wave
from pipeline.evaluation.outcomes import reliability, scores, tally

FOLDS = {"five": range(1, 6), "six": range(1, 7)}
CROPS = (3, 5, 9)

Answers = dict[str, NDArray[np.float32]]


def table(answers: Answers, data: Data) -> str:
    """One line per recipe, set of jobs and seed: pooled accuracy, UAR, weighted F1, recalls; mean UAR of the folds."""
    groups: dict[str, list[str]] = {}
    for key in answers:
        name, job, fold, seed = key.split("|")
        groups.setdefault(f"{name}|{job}|{seed}", []).append(fold)
    lines = []
    for group, folds in sorted(groups.items()):
        name, job, seed = group.split("|")
        counts = []
        for fold in folds:
            rows = data.rows(job, int(fold))[1]
            counts.append(tally(data.classes[rows], answers[f"{name}|{job}|{fold}|{seed}"].argmax(axis=1), N_CLASSES))
        pooled, each = scores(np.sum(counts, axis=0)), scores(np.stack(counts))
        figures = {
            "accuracy": pooled.accuracy,
            "UAR": pooled.uar,
            "weighted F1": pooled.weighted_f1,
            "mean fold UAR": each.uar.mean(),
        }
        told = "  ".join(f"{figure} {value:.1%}" for figure, value in figures.items())
        recalls = " ".join(f"{recall:.0%}" for recall in pooled.recall)
        lines.append(f"{name:20} {job:5} seed {seed}, {len(folds)} folds  {told}  recalls {recalls}")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    """Train the plan's waves in order, until all are done or the time is over."""
    started = time.monotonic()
    ends = started + 60 * arguments.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    data = Data(arguments.data, device)
    plan = [[Recipe.of(dict(given)) for given in wave] for wave in json.loads(arguments.plan.read_text())]
    teaching = {name for wave in plan for recipe in wave for name in recipe.teachers}
    teachers: dict[str, torch.nn.Module] = {}
    arguments.out.mkdir(parents=True, exist_ok=True)
    answers: Answers = {}
    for number, wave in enumerate(plan, start=1):
        trainings: dict[str, Training] = {}
        for recipe, job, fold, seed in _jobs(wave):
            own = [model for key, model in teachers.items() if _teaches(key, recipe, job, fold)]
            assert bool(own) == bool(recipe.teachers), f"{recipe.name}: no teachers of {job}, fold {fold}"
            trainings[f"{recipe.name}|{job}|{fold}|{seed}"] = Training(recipe, job, fold, seed, data, own)
        print(f"wave {number}: {len(trainings)} trainings captured at {time.monotonic() - started:.1f} s", flush=True)
        if not train_wave(list(trainings.values()), ends, started):
            print(f"wave {number}: the time is over", flush=True)
            break
        for key, training in trainings.items():
            if training.recipe.name in teaching:
                teachers[key] = training.teacher()
            answers[key] = training.answers()
            for crops in CROPS:
                answers[key.replace("|", f"@{crops}|", 1)] = training.answers(crops)
        trainings.clear()
        np.savez_compressed(arguments.out / "answers.npz", **answers)  # type: ignore[arg-type]
        print(table(answers, data), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"done at {time.monotonic() - started:.1f} s", flush=True)


def _jobs(wave: list[Recipe]) -> list[tuple[Recipe, str, int, int]]:
    return [
        (recipe, job, fold, seed)
        for recipe in wave
        for job in recipe.jobs
        for fold in FOLDS[job]
        for seed in recipe.seeds
    ]


def _teaches(key: str, recipe: Recipe, job: str, fold: int) -> bool:
    name, its_job, its_fold, _ = key.split("|")
    return name in recipe.teachers and its_job == job and int(its_fold) == fold


def confidences(found: pd.DataFrame, names: Sequence[str]) -> str:
    """Mean confidence beside accuracy: without scaling, with the temperature of inception_ravdess, and fitted."""
    from pipeline.models.bundle import load_bundle
    from pipeline.models.doubt import fit_temperature, scaled

    truth = found["label_name"].map({name: i for i, name in enumerate(names)}).to_numpy(np.int64)
    p = found[[f"p_{name}" for name in names]].to_numpy(np.float64)
    lines = [f"confidences of the {len(found)} recordings outside the test part:"]
    for temperature in (1.0, load_bundle(SPLITS.parent / "inception_ravdess").temperature, None):
        at = fit_temperature(truth, p).temperature if temperature is None else temperature
        sure, right = scaled(p, at).max(axis=1), p.argmax(axis=1) == truth
        lines.append(
            f"  temperature {at:.3f}{' (fitted)' if temperature is None else ''}: calibration error "
            f"{reliability(sure, right).ece:.1%}, mean confidence {100 * (sure.mean() - right.mean()):+.1f} points "
            "beside accuracy"
        )
    return "\n".join(lines)


def report(arguments: argparse.Namespace) -> None:
    """Write the folds of one recipe as the tables and pages of `jobs.crossval`, and print their confidences.

    For several seeds it uses the mean log-probabilities, which are those of their joined networks.
    """
    from jobs.crossval import labelled_recordings
    from pipeline.data.manifest import label_set
    from pipeline.data.splits import assignment, folds_of
    from pipeline.features.store import load_features
    from pipeline.models.ensemble import mean_answers
    from pipeline.reporting.report import write_report
    from pipeline.training.cross_validation import protocol_row, protocols_summary, write_protocols

    table, answers = labelled_recordings(arguments.features), np.load(arguments.answers)
    tested = assignment(table, SPLITS / "ravdess_split.csv", "split") == "test"
    kept_from_all = set(table.loc[tested, "row_id"])
    row_of = {row_id: row for row, row_id in enumerate(load_features(arguments.features).table["row_id"])}
    labels, data = label_set(table), Data(arguments.data, torch.device("cpu"))
    rows = []
    for job, protocol, name in (
        ("five", "kfold", "ravdess_five_folds_of_80"),
        ("six", "speaker_kfold", "ravdess_six_actor_folds"),
    ):
        if f"{arguments.recipe}|{job}|1|{arguments.seed[0]}" not in answers:
            continue  # the plan has no such job
        assigned = assignment(table, SPLITS / f"{name}.csv", "fold")
        folds = folds_of(table, protocol, inner_val=0, assigned=assigned)
        parts = []
        for fold in folds:
            place = {row: i for i, row in enumerate(data.rows(job, int(fold.name))[1])}
            order = [place[row_of[row_id]] for row_id in fold.splits["test"]["row_id"]]
            part = fold.splits["test"].assign(status="ok", error="", label_name=fold.splits["test"]["label"])
            part = part.assign(fold=fold.name)
            told = []
            for seed in arguments.seed:
                logits = torch.from_numpy(answers[f"{arguments.recipe}|{job}|{fold.name}|{seed}"])
                p = logits[order].double().softmax(dim=1).numpy()
                told.append(part.assign(**{f"p_{name}": p[:, i] for i, name in enumerate(labels.names)}))
            parts.append(mean_answers(told, labels.names))
        found, out = pd.concat(parts, ignore_index=True), arguments.out / protocol
        networks = f"{len(arguments.seed)} networks" if len(arguments.seed) > 1 else "one"
        meta = {"model": f"{arguments.recipe}, {networks} a fold", "protocol": protocol, "folds": len(folds)}
        evaluation = write_report(found, labels.names, out, meta=meta)
        found.to_parquet(out / "predictions.parquet", index=False)
        rows.append(protocol_row(protocol, folds, found, labels.names, evaluation))
        print(confidences(found[~found["row_id"].isin(kept_from_all)], labels.names))
    if not rows:
        raise SystemExit(f"{arguments.answers} has no answers of {arguments.recipe} with seed {arguments.seed[0]}")
    print(protocols_summary(write_protocols(rows, arguments.out, {"recipe": arguments.recipe})))


def main() -> None:
    """Pack, run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("--features", type=Path, required=True)
    packing.add_argument("--out", type=Path, required=True)
    running = commands.add_parser("run")
    running.add_argument("--data", type=Path, required=True, help="a packed file")
    running.add_argument("--plan", type=Path, required=True)
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--minutes", type=float, default=60.0)
    reporting = commands.add_parser("report")
    reporting.add_argument("--features", type=Path, required=True)
    reporting.add_argument("--data", type=Path, required=True)
    reporting.add_argument("--answers", type=Path, required=True)
    reporting.add_argument("--recipe", required=True)
    reporting.add_argument("--seed", type=int, nargs="+", default=[42], help="several: their joined model")
    reporting.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "pack":
        pack(arguments.features, arguments.out)
    elif arguments.command == "run":
        run(arguments)
    else:
        report(arguments)


if __name__ == "__main__":
    main()
