"""Does a model know a voice better that may hear all of its recordings first, without their labels?

    python -m benchmarks.speaker_statistics --run OUT/speaker_kfold --out OUT/statistics

RUN is what ``jobs.evaluate --protocol speaker_kfold --keep_weights`` left. Batch norm's means and variances are taken
anew from a group of the fold's test recordings, and the group is answered with them (adaptive batch normalisation, Li
et al. 2016; nothing is learnt, no label is read). Three ways, each with a page of its own row:

    plain       as trained: every recording alone. The figure for voices never heard.
    speaker     groups are speakers. RAVDESS' speakers acted every emotion equally often, which others do not.
    one_class   groups are recordings of one speaker and one emotion, a folder of nothing but anger: the worst case.

Limits: models with batch norm over pictures; the middle window of each recording; a group of one recording is answered
by its own statistics.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from jobs._common import Parser
from pipeline.arrays import load_features
from pipeline.checkpoint import load_bundle
from pipeline.errors import SerError
from pipeline.fit import StateDict
from pipeline.folds import Fold
from pipeline.metrics import evaluate
from pipeline.protocol_report import protocol_row, protocols_summary, write_protocols
from pipeline.results import predict
from pipeline.runs import Plan, read_plan, read_splits, rows_of

GROUPS: dict[str, list[str]] = {"speaker": ["speaker"], "one_class": ["speaker", "label"]}


def adapted(model: nn.Module, heard: Tensor) -> StateDict:
    """The weights of ``model``, with batch norm's statistics those of ``heard`` (N, 1, n_mels, frames)."""
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # the running statistics become those of the one batch that follows
    with torch.no_grad():
        model(heard)
    return model.state_dict()


def answers(plan: Plan, test: pd.DataFrame, way: str) -> pd.DataFrame:
    """The score table of a fold's test part, with a model adapted to each group that ``way`` makes."""
    bundle = load_bundle(plan.out)
    if way == "plain":
        return predict(plan, bundle.state_dict(), test)
    arrays = load_features(plan.features)
    told = []
    for _, group in test.groupby(GROUPS[way], sort=True):
        rows = rows_of(arrays.table, group, plan.features)
        heard = np.concatenate([arrays.crops(int(row), 1) for row in rows])
        told.append(predict(plan, adapted(bundle.build_model(), torch.from_numpy(heard)), group))
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
    for way in ("plain", *GROUPS):
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
