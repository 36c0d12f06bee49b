"""Makes a bundle from a run's last checkpoint: weights, predictions and metrics on test or inner_val, model card."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from pipeline.data.corpora.voices import corpora_of
from pipeline.data.segments import END, RECORDING_HASH, START, has_segments, ids
from pipeline.evaluation.metrics import OVERALL
from pipeline.evaluation.outcomes import score_table
from pipeline.features.store import load_features
from pipeline.models.bundle import Bundle, load_bundle, save_bundle, set_familiarity
from pipeline.models.doubt import LEAST_RECORDINGS, Familiarity
from pipeline.models.model_card import model_card
from pipeline.models.networks import build_model
from pipeline.reporting.report import terminal_summary, write_report
from pipeline.training.embeddings import embed, open_network
from pipeline.training.loop import StateDict, weights_of
from pipeline.training.plan import SPLIT_SEED, Plan, earlier_training
from pipeline.training.run import load_checkpoint, plot_curves, read_splits, rows_of

INTERRUPTED = "interrupted"
MOST_FAMILIAR = 4000  # training recordings that the familiarity is fitted on: a minute on two CPUs
LEAST_HELD_OUT, LEAST_ALONE = 50, 2000
_BATCH = 64


@dataclass(frozen=True)
class Results:
    """A run's bundle; and, if a part was reported on, the report page and its summary for the terminal."""

    bundle: Bundle
    best_epoch: int
    summary: str = ""
    report: Path | None = None


def write_results(plan: Plan, report_split: str) -> Results:
    """Write a finished run's bundle into its folder, with learning curves and a report on one part, or on `none`."""
    state = load_checkpoint(plan.checkpoint)
    plot_curves(state["history"], plan.out / "curves.png")
    part = read_splits(plan.out).get(report_split)
    if part is None or part.empty:
        results = Results(_save(plan, plan.out, state, {}), state["best_epoch"])
    else:
        report = plan.out / "report"
        meta = {
            "model": bundle_name(plan.model_name),
            "data": f"{plan.out / 'splits' / report_split}.csv",
            "epoch": state["best_epoch"],
            "trained_on": ", ".join(map(str, plan.features)),
        }
        evaluation = write_report(predict(plan, weights_of(state), part), plan.labels, report, meta=meta)
        bundle = _save(plan, plan.out, state, {report_split: headline(evaluation) | {"n": len(part)}})
        results = Results(bundle, state["best_epoch"], terminal_summary(evaluation), report / "report.html")
    shutil.rmtree(plan.out / INTERRUPTED, ignore_errors=True)
    return results


def keep_weights(plan: Plan) -> Results:
    """Write the best weights of an unfinished run as a bundle into `OUT/interrupted`, without an evaluation."""
    state = load_checkpoint(plan.checkpoint)
    return Results(_save(plan, plan.out / INTERRUPTED, state, {}), state["best_epoch"])


def bundle_name(model_name: str) -> str:
    """The name of a trained model's bundle."""
    return f"{model_name}_ser_final"


def _save(plan: Plan, folder: Path, state: Mapping[str, Any], figures: Mapping[str, dict[str, Any]]) -> Bundle:
    splits, features = read_splits(plan.out), load_features(plan.features).config
    name, training = bundle_name(plan.model_name), _training(plan, state, splits["train"])
    table = training_table(splits)
    if plan.init is not None:
        table = pd.concat([table, earlier_training(load_bundle(plan.init), table)], ignore_index=True)
    figures = {part: found | {"trained_on": training["trained_on"]} for part, found in figures.items()}
    bundle = save_bundle(
        folder,
        name=name,
        state_dict=weights_of(dict(state)),
        model_name=plan.model_name,
        model_options=plan.model_options,
        labels=plan.labels,
        crops=plan.crops,
        features=features,
        metrics={"training": training, **figures},
        training=table,
        corpora={name: about["classes"] for name, about in training["corpora"].items()},
        card=model_card(name, plan.labels, features, training, figures, pd.concat(splits.values())),
    )
    learn_familiarity(bundle, plan.features, set(splits["train"]["row_id"]), set(splits["inner_val"]["row_id"]))
    return load_bundle(folder)


def learn_familiarity(
    bundle: Bundle, folders: Sequence[Path], row_ids: Collection[str], held_out: Collection[str]
) -> int:
    """Fit the familiarity of a bundle on its training recordings and write it into the bundle; see ``models.doubt``.

    Args:
        folders: of features.
        row_ids: of the training recordings in them, of which at most ``MOST_FAMILIAR`` are used.
        held_out: of recordings that the network was not trained on. From ``LEAST_HELD_OUT`` on they set the threshold:
            a network that knows few recordings by heart finds every other one unfamiliar.

    Returns:
        The number of training recordings used; 0 if there are too few, and then nothing is written.
    """
    arrays = load_features(folders, bundle.features)
    rows, others = (np.flatnonzero(arrays.table["row_id"].isin(part)) for part in (row_ids, held_out))
    if len(rows) < (LEAST_RECORDINGS if len(others) >= LEAST_HELD_OUT else LEAST_ALONE):
        return 0
    network = open_network(bundle)

    def embeddings(part: NDArray[np.intp]) -> NDArray[np.float32]:
        part = part[np.linspace(0, len(part) - 1, min(len(part), MOST_FAMILIAR)).astype(int)]
        batches = (part[i : i + _BATCH] for i in range(0, len(part), _BATCH))
        return np.concatenate([embed(network, np.asarray(arrays.features[batch])) for batch in batches])

    found = Familiarity.fit(embeddings(rows))
    set_familiarity(bundle, found.widened(embeddings(others)) if len(others) >= LEAST_HELD_OUT else found)
    return min(len(rows), MOST_FAMILIAR)


def _training(plan: Plan, state: Mapping[str, Any], train: pd.DataFrame) -> dict[str, Any]:
    """The `training` block of metrics.json; `train`: the manifest rows of the training part."""
    return {
        "model": plan.model_name,
        "epochs": len(state["history"]),
        "best_epoch": state["best_epoch"],
        "seconds": round(sum(record["seconds"] for record in state["history"]), 1),
        "trained_on": f"{len(train)} clips (splits/train.csv)",
        "corpora": _corpora(plan, train),
        "split_seed": SPLIT_SEED,
        "settings": state["config"],
        **({"teachers": [load_bundle(path).about() for path in plan.teachers]} if plan.teachers else {}),
        **({"distill": plan.distill} if plan.teachers else {}),
        **({"init": load_bundle(plan.init).about()} if plan.init else {}),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def _corpora(plan: Plan, train: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """For each corpus in the training part: its recordings and speakers there, and its classes in any part."""
    table = load_features(plan.features).table
    if "corpus" not in table.columns:
        return {}
    names, corpus_of = corpora_of(train)
    return {
        name: {
            "recordings": int((corpus_of == k).sum()),
            "speakers": int(train["speaker"][corpus_of == k].nunique()) if "speaker" in train.columns else 0,
            "classes": sorted(set(table["label"][table["corpus"].fillna("").astype(str) == name])),
        }
        for k, name in enumerate(names)
    }


def predict(plan: Plan, weights: StateDict, part: pd.DataFrame) -> pd.DataFrame:
    """Predictions for one part from stored features, in the columns of a score table.

    Raises:
        SerError: the features lack a recording, or lack the mel power that several crops need.
    """
    arrays = load_features(plan.features)
    rows = rows_of(arrays.table, part, plan.features)
    model = build_model(plan.model_name, plan.model_options, len(plan.labels), arrays.config.input_shape)
    model.load_state_dict(weights)
    model.eval()
    with torch.inference_mode():
        answers = []
        for start in range(0, len(rows), _BATCH):
            crops = [arrays.crops(int(row), plan.crops) for row in rows[start : start + _BATCH]]
            log_p = model(torch.from_numpy(np.concatenate(crops))).double().log_softmax(dim=1)
            answers += [each.mean(dim=0).softmax(dim=0) for each in log_p.split([len(windows) for windows in crops])]
        probabilities = torch.stack(answers).numpy()
    return score_table(part, probabilities, plan.labels)


def headline(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation for metrics.json, with 95 % intervals (over speakers, if they are known)."""
    overall, per_class = evaluation["overall"], evaluation["per_class"]
    totals = {name: overall[name] for name in OVERALL}
    recalls = {row["label"]: row["recall"] for row in per_class}
    over = "over_speakers" if evaluation["bootstrap"]["speakers"] else "over_recordings"
    return {
        **{name: figure["value"] for name, figure in totals.items()},
        "class_recall": {label: figure["value"] for label, figure in recalls.items()},
        "intervals_95": {
            "method": "bootstrap over speakers; where every recording is right, the exact bound"
            if over == "over_speakers"
            else "over recordings: Wilson's score for shares, bootstrap for the rest",
            **{name: figure[over] for name, figure in totals.items()},
            "class_recall": {label: figure[over] or figure["over_recordings"] for label, figure in recalls.items()},
        },
        "confidence": {name: overall[name] for name in ("log_loss", "brier", "ece")},
        "confusion": {"counts": evaluation["confusion"]["counts"]},
        "verdict": evaluation["verdict"]["outcome"],
    }


def training_table(splits: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The table `training.csv`: id (file stem), content hash, speaker and split of every recording; no audio, no path.

    For segments also the hash of the whole recording, and the segment's start and end in it.
    """
    tables = [
        pd.DataFrame(
            {
                "id": ids(part),
                "content_hash": part.get("content_hash", ""),
                "speaker": part.get("speaker", ""),
                "split": split,
                **{name: part[name] for name in (RECORDING_HASH, START, END) if has_segments(part)},
            }
        )
        for split, part in splits.items()
    ]
    return pd.concat(tables, ignore_index=True)
