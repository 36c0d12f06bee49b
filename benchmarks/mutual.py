"""Do two models that learn from each other know voices never heard better than one?

    python -m benchmarks.mutual --features FEATURES --folds_csv models/splits/ravdess_six_actor_folds.csv \
        --recipe models/inception_ser_final --seed 42 --epochs 100 --out OUT

Deep mutual learning (Zhang et al. 2018): in each fold two models of the same recipe but other first weights are trained
on the same batches, each also on the other's answers of that moment. It is a teacher without a training of its own:
no further forward pass, twice the arithmetic of one model. The first, whose first weights are those of a plain run of
the same seed, is the model that counts; the second and the mean of both are told beside it. Every fold trains on all
of its recordings for exactly ``--epochs``; the last weights (their average, with ``--ema``) answer. The same command
again goes on where it was cut off. Limits: CPUs; ``--patience`` has nothing to stop by.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from jobs._common import Parser
from jobs._recipe import add_recipe_option, with_recipe
from jobs.protocols import labelled_recordings
from jobs.train_options import add_loop_options, add_model_options, fit_config, model_options
from pipeline.corpora import label_set
from pipeline.cpus import usable_cpus
from pipeline.fit import Run, StateDict
from pipeline.folds import Fold, assignment, folds_of
from pipeline.losses import ClassificationLoss
from pipeline.metrics import evaluate
from pipeline.models import build_model
from pipeline.plan import Plan
from pipeline.protocol_report import protocol_row, protocols_summary, write_protocols
from pipeline.results import predict
from pipeline.runs import begin, check_resumes, read_splits, training_data
from pipeline.states import load_checkpoint, save_checkpoint

WHO = ("first", "second")


class Twins(nn.Module):
    """Two models on the same input: (B, 2, C) logits while they are trained, the first one's (B, C) after that."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.first(x)
        return torch.stack([first, self.second(x)], dim=1) if self.training else first


class MutualLoss(nn.Module):
    """Sum over both models of (1 - share) x the loss against the labels + share x the cross-entropy with the other."""

    def __init__(self, by_labels: ClassificationLoss, share: float) -> None:
        super().__init__()
        self.by_labels, self.share = by_labels, share

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """A scalar, of logits (B, 2, C) and targets as `ClassificationLoss` takes them."""
        told = logits.detach().softmax(dim=2).flip(1)
        apart = -(told * logits.log_softmax(dim=2)).sum(dim=2).mean(dim=0).sum()
        labels = self.by_labels(logits[:, 0], targets) + self.by_labels(logits[:, 1], targets)
        return (1 - self.share) * labels + self.share * apart


def train_twins(plan: Plan) -> StateDict:
    """Train a fold's two models, on from its checkpoint where there is one; the last weights of both.

    ``plan.distill`` is the share of the loss that is the other's answers.
    """
    data = training_data(plan)
    torch.manual_seed(plan.fit.seed)
    shape = data.config.input_shape
    first, second = (build_model(plan.model_name, plan.model_options, len(plan.labels), shape) for _ in WHO)
    run = Run(Twins(first, second), data, plan.fit)
    run.loss = MutualLoss(run.loss, plan.distill)  # type: ignore[assignment]
    if plan.checkpoint.is_file():
        run.load_state(load_checkpoint(plan.checkpoint))
    while not run.finished:
        record = run.epoch()
        save_checkpoint(plan.checkpoint, run.state())
        told = f"epoch {record['epoch']}/{plan.fit.epochs}  loss {record['train_loss']:.4f}  {record['seconds']:.1f} s"
        print(f"{plan.out.name}  {told}", flush=True)
    return run.chosen_weights()


def answer_fold(plan: Plan) -> None:
    """Train, and keep what each of the two answers to the fold's test part."""
    weights = train_twins(plan)
    for name in WHO:
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        predict(plan, own, read_splits(plan.out)["test"]).to_parquet(_answers(plan, name), index=False)
    plan.checkpoint.unlink(missing_ok=True)


def _answers(plan: Plan, name: str) -> Path:
    return plan.out / f"{name}.parquet"


def mean_of(first: pd.DataFrame, second: pd.DataFrame, labels: tuple[str, ...]) -> pd.DataFrame:
    """The score table of the mean probabilities of two score tables of the same recordings."""
    columns = [f"p_{name}" for name in labels]
    p = (first[columns].to_numpy() + second[columns].to_numpy()) / 2
    told = {"predicted": np.array(labels)[p.argmax(axis=1)], "confidence": p.max(axis=1)}
    return first.assign(**told, **dict(zip(columns, p.T, strict=True)))


def report(plans: Mapping[str, Plan], folds: list[Fold], out: Path) -> None:
    """Answers, page and table of the first, the second and both."""
    first = next(iter(plans.values()))
    labels, settings = first.labels, {"share": first.distill, "settings": first.fit.to_dict()}
    answers = {
        name: pd.concat([pd.read_parquet(_answers(plan, name)).assign(fold=fold) for fold, plan in plans.items()])
        for name in WHO
    }
    answers["both"] = mean_of(answers["first"], answers["second"], labels)
    rows = []
    for name, table in answers.items():
        table.to_parquet(out / f"{name}.parquet", index=False)
        row = protocol_row("speaker_kfold", folds, table, labels, evaluate(table, labels))
        rows.append(row | {"protocol": name})
    print(protocols_summary(write_protocols(rows, out, settings)))


def main() -> None:
    """Train the folds side by side, and report."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--folds_csv", type=Path, required=True, help="folds of speakers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.5, help="of the loss, that is the other's answers (0.5)")
    parser.add_argument("--at_once", type=int, default=usable_cpus(), help="folds side by side, one thread each")
    parser.add_argument("--only", nargs="*", help="names of folds, for a pilot")
    add_recipe_option(parser)
    add_model_options(parser)
    add_loop_options(parser)
    arguments = with_recipe(parser, sys.argv[1:]).parse_args()
    table = labelled_recordings(arguments.features)
    labels = label_set(table)
    folds = folds_of(table, "speaker_kfold", inner_val=0, assigned=assignment(table, arguments.folds_csv, "fold"))
    folds = [fold for fold in folds if not arguments.only or fold.name in arguments.only]
    base = Plan(
        out=arguments.out,
        features=(arguments.features,),
        labels=labels.names,
        model_name=arguments.model,
        model_options=model_options(arguments),
        fit=replace(fit_config(arguments, labels, table, threads=1), patience=0),
        distill=arguments.share,
    )
    plans = {fold.name: replace(base, out=arguments.out / f"fold-{fold.name}") for fold in folds}
    for fold in folds:
        plan = plans[fold.name]
        if (plan.out / "plan.json").is_file():
            check_resumes(plan)
        else:
            begin(plan, fold.splits)
    todo = [plan for plan in plans.values() if not _answers(plan, WHO[-1]).is_file()]
    with ProcessPoolExecutor(arguments.at_once, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(answer_fold, plan) for plan in todo]:
            done.result()
    report(plans, folds, arguments.out)


if __name__ == "__main__":
    main()
