"""How well the answers agree with given labels: figures by scikit-learn, targets, confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st

from app_pages.drawing import framed
from app_pages.words import percent, spoken

ACCURACY, WEIGHTED_F1, CLASS_RECALL = 0.80, 0.80, 0.75
_CELL_PX = 42
CELL = "#1d8f89"
EMPTY, FULL = 0.06, 0.75
"""Opacity of a cell without recordings and of one with all of its row: on light and on dark, text can be read on it."""


@dataclass(frozen=True)
class Agreement:
    """Figures on labelled recordings; ``recall`` of a class without recordings is None."""

    classes: tuple[str, ...]
    n: int
    accuracy: float
    weighted_f1: float
    recall: Mapping[str, float | None]
    counts: tuple[tuple[int, ...], ...]

    @property
    def met(self) -> bool | None:
        """Whether all targets are met; None when a class without recordings leaves it open."""
        found = [share for share in self.recall.values() if share is not None]
        if self.accuracy < ACCURACY or self.weighted_f1 < WEIGHTED_F1 or min(found) < CLASS_RECALL:
            return False
        return None if len(found) < len(self.recall) else True


def agreement(truth: Sequence[str], answers: Sequence[str], classes: Sequence[str]) -> Agreement:
    """Figures of ``answers`` against ``truth``, both of at least one recording, the truth all of ``classes``.

    An answer that is no class (silence) counts as wrong; the matrix leaves it out.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score

    labels = list(classes)
    recalls = recall_score(truth, answers, labels=labels, average=None, zero_division=0)
    present = set(truth)
    return Agreement(
        classes=tuple(labels),
        n=len(truth),
        accuracy=float(accuracy_score(truth, answers)),
        weighted_f1=float(f1_score(truth, answers, labels=labels, average="weighted", zero_division=0)),
        recall={name: float(r) if name in present else None for name, r in zip(labels, recalls, strict=True)},
        counts=tuple(tuple(map(int, row)) for row in confusion_matrix(truth, answers, labels=labels)),
    )


def show(found: Agreement) -> None:
    """Figures, verdict and matrix."""
    told = {
        True: "All targets are met.",
        False: "Not all targets are met.",
        None: "Not decidable: some classes have no recording. Those that have are good enough.",
    }[found.met]
    lowest = min((r, name) for name, r in found.recall.items() if r is not None)
    words, matrix = st.columns([5, 11], gap="large")
    with words:
        st.markdown(f"**{told}**")
        st.html(targets_html(found.accuracy, found.weighted_f1, lowest))
        st.caption(
            "In the picture, each row is a given label, each column an answer, and a row adds up to 100 %. "
            "The best guess counts, also where the model is not sure."
        )
    with matrix:
        st.altair_chart(confusion(found.classes, found.counts), alt=confusion_alt(found.classes, found.counts))


def targets_html(accuracy: float, weighted_f1: float, lowest: tuple[float, str]) -> str:
    """A table of the three figures, each with its target and whether it is met."""
    rows = (
        ("Right answers (accuracy)", accuracy, ACCURACY),
        ("Balanced over the classes (weighted F1)", weighted_f1, WEIGHTED_F1),
        (f"Weakest class: {spoken(lowest[1])} (recall)", lowest[0], CLASS_RECALL),
    )
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{percent(share)}</td><td>{percent(target)}</td>'
        f"<td>{'met' if share >= target else 'missed'}</td></tr>"
        for name, share, target in rows
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Figure", "Value", "Target", "Verdict"))
    return f'<table class="ser-targets"><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table>'


def confusion(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> alt.LayerChart:
    """Rows the labels, columns the answers; strength of colour and text: the share of the row."""
    table = pd.DataFrame(_cells(classes, counts))
    words = [spoken(name) for name in classes]
    base = alt.Chart(table).encode(
        x=alt.X(
            "answer:N",
            sort=words,
            title="Answer",
            axis=alt.Axis(labelAngle=-45, labelOverlap=False, domain=False, ticks=False),
        ),
        y=alt.Y("label:N", sort=words, title="Label", axis=alt.Axis(domain=False, ticks=False)),
        tooltip=["label", "answer", "recordings", alt.Tooltip("share:Q", format=".0%", title="share of the label")],
    )
    squares = base.mark_rect(cornerRadius=2, color=CELL).encode(
        opacity=alt.Opacity("share:Q", scale=alt.Scale(domain=[0, 1], range=[EMPTY, FULL]), legend=None)
    )
    text = base.mark_text(fontSize=12, color="currentColor").encode(text="text:N")
    return framed(_CELL_PX * len(classes) + 90, squares, text)


def _cells(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> list[dict[str, object]]:
    sums = np.asarray(counts).sum(axis=1)
    return [
        {
            "label": spoken(label),
            "answer": spoken(answer),
            "recordings": counts[i][j],
            "share": counts[i][j] / sums[i] if sums[i] else 0.0,
            "text": f"{100 * counts[i][j] / sums[i]:.0f}" if counts[i][j] else "",
        }
        for i, label in enumerate(classes)
        for j, answer in enumerate(classes)
    ]


def confusion_alt(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """The matrix in words: how many are right, and the most frequent mistakes."""
    matrix = np.asarray(counts)
    wrong = sorted(
        (
            (int(matrix[i, j]), a, b)
            for i, a in enumerate(classes)
            for j, b in enumerate(classes)
            if i != j and matrix[i, j]
        ),
        key=lambda item: -item[0],
    )
    most = "; ".join(f"{n} {spoken(a)} taken for {spoken(b)}" for n, a, b in wrong[:3]) or "none"
    return f"Confusion matrix of {matrix.sum()} recordings, {np.trace(matrix)} right. Most frequent mistakes: {most}."
