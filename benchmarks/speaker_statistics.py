"""Does a model know a voice better that may hear the voice's recordings first, without their labels?

    python -m benchmarks.speaker_statistics --run OUT/speaker_kfold --out OUT/statistics

RUN is what ``jobs.evaluate --protocol speaker_kfold --keep_weights`` left. Batch norm's means and variances are taken
anew from some of a speaker's test recordings, and recordings of the same speaker are answered with them (adaptive batch
normalisation, Li et al. 2016; nothing is learnt, and labels only choose what is heard). Each way has its own row:

    plain         as trained: every recording alone. The figure for voices never heard.
    speaker       from all recordings of the speaker. RAVDESS' speakers acted every emotion equally often.
    half_trained  the mean of those statistics and the training's.
    enrolled      from one half of the speaker's recordings for the other half, and the other way round.
    eight         from eight recordings of the speaker for all of them.
    four_classes  the recordings of every other emotion together: a one-sided folder.
    one_class     the recordings of one emotion together: a folder of nothing but anger, the worst case.
    calm_folder   twelve neutral or calm recordings and six others, nearer to what people say all day, for all of them.
    equal_classes no new statistics: as plain, with a bias a class, such that a voice's recordings have each class
                  equally often. What the other ways owe to RAVDESS' balance, and not to the voice.

Limits: models with batch norm over pictures; the middle window of each recording; one draw of the halves and the eight.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from jobs._common import Parser
from pipeline.data.splits import Fold
from pipeline.evaluation.metrics import evaluate
from pipeline.features.store import load_features
from pipeline.models.bundle import load_bundle
from pipeline.reporting.protocol_report import protocol_row, protocols_summary, write_protocols
from pipeline.storage.errors import SerError
from pipeline.training.config import Plan, read_plan
from pipeline.training.loop import StateDict
from pipeline.training.results import predict
from pipeline.training.run import read_splits, rows_of

Groups = Iterator[tuple[pd.DataFrame, pd.DataFrame]]  # what is heard first, and what is answered then


def _apart(rows: pd.DataFrame, keys: Any) -> Groups:
    """Each group is heard, and answered."""
    return ((group, group) for _, group in rows.groupby(keys, sort=True))


def _enrolled(rows: pd.DataFrame) -> Groups:
    order = np.random.default_rng(0).permutation(len(rows))
    halves = rows.iloc[order[::2]], rows.iloc[order[1::2]]
    yield halves[0], halves[1]
    yield halves[1], halves[0]


def _four_classes(rows: pd.DataFrame) -> Groups:
    return _apart(rows, rows["label"].map({name: i % 2 for i, name in enumerate(sorted(set(rows["label"])))}))


def _calm_folder(rows: pd.DataFrame) -> Groups:
    calm = rows["label"].isin(["neutral", "calm"])
    drawn = [part.sample(min(n, len(part)), random_state=0) for part, n in ((rows[calm], 12), (rows[~calm], 6))]
    yield pd.concat(drawn), rows


WAYS: dict[str, Callable[[pd.DataFrame], Groups]] = {  # of one speaker's recordings
    "speaker": lambda rows: iter([(rows, rows)]),
    "half_trained": lambda rows: iter([(rows, rows)]),
    "enrolled": _enrolled,
    "eight": lambda rows: iter([(rows.sample(min(8, len(rows)), random_state=0), rows)]),
    "four_classes": _four_classes,
    "one_class": lambda rows: _apart(rows, "label"),
    "calm_folder": _calm_folder,
}
SHARES = {"half_trained": 0.5}  # of the voice's own statistics; else all


def adapted(model: nn.Module, heard: Tensor, share: float = 1.0) -> StateDict:
    """The weights of ``model``, with batch norm's statistics those of ``heard`` (N, 1, n_mels, frames).

    Args:
        share: of the statistics of ``heard``; the rest are the model's own.
    """
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = share  # for the one batch that follows
    with torch.no_grad():
        model(heard)
    return model.state_dict()


def equal_classes(told: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """A voice's score table with each class equally probable on the whole.

    The biases are found by repeated scaling (Saerens et al. 2002 estimate priors so; here they are given, all equal).
    """
    columns = [f"p_{name}" for name in labels]
    p = told[columns].to_numpy()
    scale = np.ones(len(labels))
    for _ in range(1000):
        balanced = p * scale / (p * scale).sum(axis=1, keepdims=True)
        scale /= balanced.mean(axis=0) * len(labels)
    predicted = np.array(labels)[balanced.argmax(axis=1)]
    return told.assign(
        predicted=predicted, confidence=balanced.max(axis=1), **dict(zip(columns, balanced.T, strict=True))
    )


def answers(plan: Plan, test: pd.DataFrame, way: str) -> pd.DataFrame:
    """The score table of a fold's test part, with a model adapted to each group that ``way`` makes."""
    bundle = load_bundle(plan.out)
    if way in ("plain", "equal_classes"):
        plain = predict(plan, bundle.state_dict(), test)
        if way == "plain":
            return plain
        return pd.concat([equal_classes(told, plan.labels) for _, told in plain.groupby("speaker", sort=True)])
    arrays = load_features(plan.features)
    told = []
    for _, recordings in test.groupby("speaker", sort=True):
        for first, then in WAYS[way](recordings):
            rows = rows_of(arrays.table, first, plan.features)
            heard = torch.from_numpy(np.concatenate([arrays.crops(int(row), 1) for row in rows]))
            told.append(predict(plan, adapted(bundle.build_model(), heard, SHARES.get(way, 1.0)), then))
    return pd.concat(told, ignore_index=True)


def main() -> None:
    """Answer all folds in each way, and report."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder with fold-1, fold-2, ...")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    plans = [read_plan(path.parent) for path in sorted(arguments.run.glob("fold-*/plan.json"))]
    if not plans:
        raise SerError(f"no folds in {arguments.run}; give the folder that holds fold-1, fold-2, ...")
    names = [plan.out.name.removeprefix("fold-") for plan in plans]
    folds = [Fold(name, read_splits(plan.out)) for name, plan in zip(names, plans, strict=True)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for way in ("plain", *WAYS, "equal_classes"):
        told = [
            answers(plan, fold.splits["test"], way).assign(fold=fold.name)
            for plan, fold in zip(plans, folds, strict=True)
        ]
        table = pd.concat(told, ignore_index=True)
        table.to_parquet(arguments.out / f"{way}.parquet", index=False)
        row = protocol_row("speaker_kfold", folds, table, plans[0].labels, evaluate(table, plans[0].labels))
        rows.append(row | {"protocol": way})
    print(protocols_summary(write_protocols(rows, arguments.out, {"settings": plans[0].fit.to_dict()})))


if __name__ == "__main__":
    main()
