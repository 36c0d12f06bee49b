"""From a run's last checkpoint to its bundle: weights, predictions on the split that is reported, metrics, model card."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pipeline.arrays import load_features
from pipeline.checkpoint import Bundle, save_bundle
from pipeline.fit import StateDict, weights_of
from pipeline.runs import Plan, load_checkpoint, plot_curves, read_splits, rows_of

CARD_SPLITS = {"test": "held-out test part", "inner_val": "inner validation part, which also chose the epoch"}


@dataclass(frozen=True)
class Results:
    """What `write_results` made: the text for the terminal and the report's path, where a split was reported."""

    bundle: Bundle
    best_epoch: int
    summary: str = ""
    path: Path | None = None


def write_results(plan: Plan, name: str, report_split: str, seconds: float) -> Results:
    """Write curves, bundle and report of a run.

    Args:
        name: of the bundle.
        report_split: `test`, `inner_val` or `none`; opened here, once.
        seconds: how long the training took.
    """
    state = load_checkpoint(plan.checkpoint)
    plot_curves(state["history"], plan.out / "curves.png")
    splits = read_splits(plan.out)
    weights = weights_of(state)
    arrays = load_features(plan.features)
    training = {
        "model": plan.model_name,
        "epochs": len(state["history"]),
        "best_epoch": state["best_epoch"],
        "seconds": round(seconds, 1),
        "trained_on": f"{len(splits['train'])} clips (splits/train.csv)",
        "settings": state["config"],
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    metrics: dict[str, Any] = {"training": training}
    summary, report_path = "", None
    part = splits.get(report_split)
    if part is not None and len(part):
        from pipeline.report import terminal_summary, write_report

        predictions = predict(plan, weights, part)
        meta = {"model": name, "split": report_split, "trained_on": training["trained_on"], "run": str(plan.out)}
        evaluation = write_report(predictions, plan.labels, plan.out / "report", meta=meta)
        metrics[report_split] = figures(evaluation) | {"n": len(part), "trained_on": training["trained_on"]}
        summary, report_path = terminal_summary(evaluation), plan.out / "report" / "report.html"
    bundle = save_bundle(
        plan.out,
        name=name,
        state_dict=weights,
        model_name=plan.model_name,
        model_options=plan.model_options,
        labels=plan.labels,
        features=arrays.config,
        metrics=metrics,
        training=training_table(splits),
        card=card(name, plan, metrics, report_split),
    )
    return Results(bundle, state["best_epoch"], summary, report_path)


def predict(plan: Plan, weights: StateDict, part: pd.DataFrame) -> pd.DataFrame:
    """Predictions of one split from stored features, in the columns of a score table."""
    from pipeline.models import build_model

    arrays = load_features(plan.features)
    rows = rows_of(arrays.table, part, plan.features)
    model = build_model(plan.model_name, plan.model_options, len(plan.labels), arrays.config.input_shape)
    model.load_state_dict(weights)
    model.eval()
    with torch.inference_mode():
        parts = [
            model(torch.from_numpy(arrays.features[rows[i : i + 64]])).softmax(dim=1) for i in range(0, len(rows), 64)
        ]
    probabilities = torch.cat(parts).double().numpy()
    best = probabilities.argmax(axis=1)
    table = part.drop(columns=["status", "error", "parent_id", "n_frames"], errors="ignore").assign(
        status="ok",
        error="",
        label_name=part["label"],
        predicted=np.array(plan.labels)[best],
        confidence=probabilities.max(axis=1),
    )
    return table.assign(**{f"p_{name}": probabilities[:, i] for i, name in enumerate(plan.labels)})


def figures(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The few numbers of an evaluation that a bundle carries."""
    overall = evaluation["overall"]
    keys = [key for key in ("accuracy", "uar", "weighted_f1", "macro_f1") if key in overall]
    found: dict[str, Any] = {key: overall[key]["value"] for key in keys}
    found["class_recall"] = {row["label"]: row["recall"]["value"] for row in evaluation["per_class"]}
    found["verdict"] = evaluation["verdict"]["outcome"]
    return found


def training_table(splits: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """`training.csv`: id (file stem), content hash, speaker and split of every recording; no audio, no path."""
    rows = []
    for split, part in splits.items():
        for row in part.to_dict("records"):
            rows.append(
                {
                    "id": Path(str(row["speech"])).stem,
                    "content_hash": row.get("content_hash", ""),
                    "speaker": row.get("speaker", ""),
                    "split": split,
                }
            )
    return pd.DataFrame(rows, columns=["id", "content_hash", "speaker", "split"])


def card(name: str, plan: Plan, metrics: Mapping[str, Any], report_split: str) -> str:
    """The model card, Markdown."""
    training = metrics["training"]
    lines = [
        f"# {name}",
        "",
        f"Speech emotion classifier `{plan.model_name}`, trained from scratch on {training['trained_on']}; "
        f"weights of epoch {training['best_epoch']} of {training['epochs']}.",
        f"Classes in index order: {', '.join(plan.labels)}.",
        "",
    ]
    if report_split in metrics:
        found = metrics[report_split]
        lines += [
            f"Measured on {found['n']} recordings ({CARD_SPLITS[report_split]}):",
            "",
            "| figure | value |",
            "|---|---|",
            f"| accuracy | {found['accuracy']:.1%} |",
            f"| weighted F1 | {found['weighted_f1']:.1%} |",
            *(
                f"| recall of {label} | {'n/a' if r is None else f'{r:.1%}'} |"
                for label, r in found["class_recall"].items()
            ),
            "",
        ]
    lines += [
        "A random split lets the same voices be in training and test; voices never heard are recognised less well.",
        "Acted speech only: do not use it to judge people.",
        "",
    ]
    return "\n".join(lines)
