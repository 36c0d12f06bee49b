"""Agreement of the answers with labels: accuracy, F1 and recall by scikit-learn, targets, confusion matrix."""

from __future__ import annotations

import math
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
_Z, _DRAWS = 1.959964, 1000
CELL = "#1d8f89"
EMPTY, FULL = 0.06, 0.75
"""Opacity of a cell with 0 % and with 100 % of its row; text stays readable on light and dark backgrounds."""


@dataclass(frozen=True)
class Agreement:
    """Accuracy, F1, recall and confusion matrix; ``recall`` of a class without recordings is None."""

    classes: tuple[str, ...]
    n: int
    accuracy: float
    weighted_f1: float
    recall: Mapping[str, float | None]
    counts: tuple[tuple[int, ...], ...]
    f1_interval: tuple[float, float] | None = None

    @property
    def met(self) -> bool | None:
        """Whether all targets are met; None where only a class without recordings leaves it open."""
        found = [share for share in self.recall.values() if share is not None]
        if self.accuracy < ACCURACY or self.weighted_f1 < WEIGHTED_F1 or min(found) < CLASS_RECALL:
            return False
        return None if len(found) < len(self.recall) else True


def agreement(truth: Sequence[str], answers: Sequence[str], classes: Sequence[str]) -> Agreement:
    """Compare ``answers`` with ``truth``: at least one recording each; all labels in ``truth`` are ``classes``.

    An answer that is not a class (silence) counts as wrong; the matrix leaves it out.
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
        f1_interval=_f1_interval(truth, answers, labels),
    )


def _f1_interval(truth: Sequence[str], answers: Sequence[str], labels: Sequence[str]) -> tuple[float, float]:
    """The 95 % interval of the weighted F1, by bootstrap over recordings."""
    codes = {name: number for number, name in enumerate(labels)}
    right = np.array([codes[name] for name in truth])
    told = np.array([codes.get(name, len(labels)) for name in answers])
    rng, found = np.random.default_rng(0), []
    for _ in range(_DRAWS):
        drawn = rng.integers(len(right), size=len(right))
        matrix = np.zeros((len(labels) + 1, len(labels) + 1))
        np.add.at(matrix, (right[drawn], told[drawn]), 1)
        hits, support, answered = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
        f1 = 2 * hits / np.maximum(support + answered, 1)
        found.append(float((f1 * support).sum() / len(drawn)))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def show(found: Agreement) -> None:
    """Draw figures, verdict and matrix."""
    told = {
        True: "All targets are met.",
        False: "Not all targets are met.",
        None: "Not decidable: some classes have no recording. Those that have are good enough.",
    }[found.met]
    words, matrix = st.columns([1, 1], gap="large")
    with words:
        st.markdown(f"**{told}**")
        st.html(targets_html(figures(found)))
        st.caption(
            "In the picture, each row is a given label, each column an answer, and a row adds up to 100 %. "
            "The best guess counts, also where the model is not sure. "
            "Intervals take every recording for a speaker of its own."
        )
    with matrix:
        st.altair_chart(confusion(found.classes, found.counts), alt=confusion_alt(found.classes, found.counts))


@dataclass(frozen=True)
class Figure:
    """A measured share, its 95 % interval where known, and its target."""

    name: str
    share: float
    target: float
    interval: tuple[float, float] | None = None


def figures(found: Agreement) -> list[Figure]:
    """Accuracy, weighted F1 and the lowest recall, each with interval and target."""
    lowest, name = min((r, name) for name, r in found.recall.items() if r is not None)
    n = sum(found.counts[found.classes.index(name)])
    return [
        Figure("Right answers (accuracy)", found.accuracy, ACCURACY, wilson(found.accuracy, found.n)),
        Figure("Balanced (weighted F1)", found.weighted_f1, WEIGHTED_F1, found.f1_interval),
        Figure(f"Weakest class: {spoken(name)} (recall)", lowest, CLASS_RECALL, wilson(lowest, n)),
    ]


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of ``n`` recordings (Wilson 1927), as if each had a different speaker."""
    if n < 1:
        return 0.0, 1.0
    middle, width = share + _Z**2 / (2 * n), _Z * math.sqrt(share * (1 - share) / n + (_Z / (2 * n)) ** 2)
    low, high = (middle - width) / (1 + _Z**2 / n), (middle + width) / (1 + _Z**2 / n)
    return max(low, 0.0), min(high, 1.0)


def interval_words(interval: tuple[float, float] | None) -> str:
    """An interval in whole percent.

    >>> interval_words((0.811, 0.9049)), interval_words(None)
    ('81 to 90', 'not known')
    """
    return f"{100 * interval[0]:.0f} to {100 * interval[1]:.0f}" if interval else "not known"


def targets_html(shown: Sequence[Figure]) -> str:
    """A table of figures, each with its interval, its target and whether it is met."""
    cells = "".join(
        f'<tr><th scope="row">{escape(figure.name)}</th><td>{percent(figure.share)}</td>'
        f"<td>{interval_words(figure.interval)}</td><td>{percent(figure.target)}</td>"
        f"<td>{'met' if figure.share >= figure.target else 'missed'}</td></tr>"
        for figure in shown
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Figure", "Value", "95 % interval", "Target", "Verdict"))
    return f'<table class="ser-targets"><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table>'


def confusion(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> alt.LayerChart:
    """The confusion matrix: rows are labels, columns are answers; colour and text show the share of the row."""
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
    rows = [zip(row, classes, strict=True) for row in counts]
    wrong = [(int(n), a, b) for a, row in zip(classes, rows, strict=True) for n, b in row if a != b and n]
    wrong.sort(key=lambda item: -item[0])
    most = "; ".join(f"{n} {spoken(a)} taken for {spoken(b)}" for n, a, b in wrong[:3]) or "none"
    return f"Confusion matrix of {matrix.sum()} recordings, {np.trace(matrix)} right. Most frequent mistakes: {most}."
