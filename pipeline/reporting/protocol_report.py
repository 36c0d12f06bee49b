"""What several protocols say of one recipe, side by side: table, files, and one page. The gap to unseen speakers shows.

The figures of a protocol are those of all its folds' answers together (``metrics.evaluate``, with its intervals: over
speakers where they are known and enough); mean and standard deviation over folds are beside them. ``protocols.json``
holds everything that the page shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.data.splits import UNSEEN_SPEAKERS, Fold, sharing
from pipeline.data.tables import write_csv
from pipeline.evaluation.outcomes import scores, tally
from pipeline.reporting.report import meta_rows, percent, points, render, span

FIGURES = {"accuracy": "accuracy", "weighted_f1": "weighted F1", "uar": "UAR"}


def protocol_row(
    protocol: str, folds: Sequence[Fold], answers: pd.DataFrame, labels: Sequence[str], evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    """What one protocol came to.

    Args:
        answers: of all folds, with the column ``fold``; evaluation: of the same answers.
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
    index = {label: i for i, label in enumerate(labels)}
    truth, answer = ([index[label] for label in answers[column]] for column in ("label_name", "predicted"))
    found = scores(tally(np.array(truth, np.int64), np.array(answer, np.int64), len(labels)))
    return {"fold": name, "n": len(answers)} | {figure: float(getattr(found, figure)) for figure in FIGURES}


def _mean_and_sd(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def _total(counts: Sequence[int | None]) -> int | None:
    return None if None in counts else sum(count or 0 for count in counts)


def gaps(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Unseen minus same speakers, for each pair of protocols, in shares of 1."""
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
    text = json.dumps(found, indent=1, allow_nan=False, default=str)
    (out / "protocols.json").write_text(text + "\n", encoding="utf-8")
    page = render("protocols.html.j2", p=json.loads(text), figures=FIGURES, meta_rows=meta_rows(meta))
    (out / "protocols.html").write_text(page, encoding="utf-8", errors="backslashreplace")
    return found


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {"protocol": row["protocol"], "folds": len(row["folds"]), "n": row["n"]}
    for name in FIGURES:
        flat[name] = row["overall"][name]["value"]
        flat |= {f"{name}_fold_{key}": value for key, value in row["over_folds"][name].items()}
    return flat | {"lowest_class": row["lowest_class"]["label"], "lowest_recall": row["lowest_class"]["recall"]}


def protocols_summary(found: Mapping[str, Any]) -> str:
    """The table as text, at most 80 columns."""
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
    lines += [_heard(row) for row in found["protocols"]]
    for gap in found["gaps"]:
        change = ", ".join(f"{title} {points(gap[name])}" for name, title in FIGURES.items())
        lines.append(f"{gap['unseen']} minus {gap['same']}, points: {change}")
    return "\n".join(lines)


def _spread(values: Mapping[str, float]) -> str:
    return f"{values['mean'] * 100:.1f} ± {values['sd'] * 100:.1f}"


def _heard(row: Mapping[str, Any]) -> str:
    shared, n = row["heard_before"], row["n"]
    if shared["speakers"] is None:
        return f"{row['protocol']}: no speaker column, so it is unknown who was heard in training"
    takes = "" if shared["takes"] is None else f", {shared['takes'] / n:.0%} another take of the same performance"
    return f"{row['protocol']}: training had the speaker of {shared['speakers'] / n:.0%} of the recordings{takes}"
