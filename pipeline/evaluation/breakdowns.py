"""Figures by group, for every column of the manifest that divides the recordings into a few groups.

The difference to the rest is the accuracy in the group minus the accuracy outside it, with the hybrid score interval of
Newcombe (1998, "Interval estimation for the difference between independent proportions", method 10). With many groups,
one interval in twenty excludes zero by chance: take them as hints, not as findings.

Also figures for data that has fewer classes than the model: of the open answer (the most probable of all classes, as
in use), and of the answer restricted to the classes that the recording's corpus has among the labelled recordings here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from pipeline.data.corpora.voices import corpora_of
from pipeline.data.segments import END, START
from pipeline.evaluation.outcomes import Ints, Outcomes, count_cells, newcombe, shares, tally

MAX_GROUPS = 60
MAX_NUMBERS = 12  # a column of fractional numbers with more different values is a measurement, not groups
SMALL_GROUP = 10
MISSING = "(not given)"
NAMELESS = "(no name)"
GROUP_FIGURES = ("group", "n", "failed", "small", "accuracy", "uar", "difference", "difference_interval")
_BANDS_S = (0, 1, 2, 3, 4, 6, 10, 30, 60, 600, np.inf)
_FIRST = ("speaker", "sex", "intensity", "statement", "corpus", "duration band")
_NOT_GROUPS = {
    *("speech", "label", "label_name", "status", "error", "predicted", "confidence", "entropy", "margin"),
    *("level_dbfs", "row_id", "parent_id", "n_frames", "content_hash", "scored_s", "start_s", "end_s", START, END),
}


def group_columns(table: pd.DataFrame, labels: Sequence[str]) -> tuple[dict[str, pd.Series], list[str]]:
    """Columns to break down by, as ordered categories; and the names of columns with too many values."""
    ours = _NOT_GROUPS | {f"p_{label}" for label in labels}
    columns: dict[str, pd.Series] = {}
    left_out = []
    for name in map(str, table.columns):
        if name.removeprefix("in_") in ours:
            continue
        if name == "duration_s":
            columns["duration band"] = _bands(table[name])
        elif _too_many(table[name]):
            left_out.append(name or NAMELESS)
        else:
            columns[name or NAMELESS] = _as_categories(table[name])
    useful = {name: cells for name, cells in columns.items() if cells.nunique() > 1}
    order = sorted(useful, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))
    return {name: useful[name] for name in order}, left_out


def breakdowns(found: Outcomes) -> tuple[list[dict[str, Any]], list[str]]:
    """One entry for each column, with its groups, and the columns left out; figures are of the readable recordings."""
    columns, left_out = group_columns(found.table, found.labels)
    shape = len(found.labels), len(found.labels) + 1
    result = []
    for name, cells in columns.items():
        groups = [str(group) for group in cells.cat.categories]
        place = cells.cat.codes.to_numpy(np.int64), found.truth, found.answer
        tallies = count_cells(np.ravel_multi_index(place, (len(groups), *shape)), (len(groups), *shape))
        whole = tallies.sum(axis=0)
        rows = [_group(group, own, whole) for group, own in zip(groups, tallies, strict=True) if own.any()]
        result.append({"column": name, "groups": [row for row in rows if row["n"] or row["group"] != MISSING]})
    return result, left_out


def _group(name: str, own: Ints, everything: Ints) -> dict[str, Any]:
    n_classes = own.shape[0]
    inside, outside = own[:, :n_classes], (everything - own)[:, :n_classes]
    n, n_rest = int(inside.sum()), int(outside.sum())
    row: dict[str, Any] = {"group": name, "n": n, "failed": int(own[:, n_classes].sum()), "small": n < SMALL_GROUP}
    row |= {"accuracy": None, "uar": None, "difference": None, "difference_interval": None}
    if n:
        row |= shares(inside, ("accuracy", "uar"))
    if n and n_rest:
        right, right_rest = int(np.trace(inside)), int(np.trace(outside))
        row["difference"] = right / n - right_rest / n_rest
        row["difference_interval"] = list(newcombe(right, n, right_rest, n_rest))
    return row


def _too_many(cells: pd.Series) -> bool:
    """Whether there are too many different cells to be groups; also if all differ, as in an index that pandas wrote."""
    values = cells.nunique(dropna=False)
    return values > (MAX_NUMBERS if _has_fractions(cells) else MAX_GROUPS) or 1 < values == len(cells)


def _has_fractions(cells: pd.Series) -> bool:
    """Whether the cells are numbers, some of them with a fraction."""
    numbers = pd.to_numeric(cells.dropna(), errors="coerce").to_numpy(np.float64)
    return bool(len(numbers) and np.isfinite(numbers).all() and (numbers % 1 != 0).any())


def _as_categories(cells: pd.Series) -> pd.Series:
    """The cells as ordered categories of text, in natural order."""
    codes, values = pd.factorize(cells, use_na_sentinel=False)
    texts = [_as_text(value) for value in values]
    order = sorted(set(texts), key=_natural)
    position = np.array([order.index(text) for text in texts])
    return pd.Series(pd.Categorical.from_codes(position[codes], pd.Index(order), ordered=True), index=cells.index)


def _as_text(cell: object) -> str:
    if cell is None or cell is pd.NA or cell != cell or str(cell).strip() == "":
        return MISSING
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell)


def _natural(text: str) -> list[tuple[int, int | str]]:
    """Sort key that puts 2 before 10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", text) if part]


def _bands(durations_s: pd.Series) -> pd.Series:
    names = [f"{low:g}-{high:g} s" for low, high in pairwise(_BANDS_S[:-1])]
    names.append(f"{_BANDS_S[-2]:g} s and more")
    seconds = pd.to_numeric(durations_s, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    bands = pd.cut(pd.Series(seconds, durations_s.index), _BANDS_S, right=False, labels=names)
    return bands.cat.add_categories(MISSING).fillna(MISSING)


def restricted(found: Outcomes) -> dict[str, Any] | None:
    """Open and restricted figures, of all readable recordings and of each corpus (column ``corpus``).

    Returns:
        ``{"missing": [class, ...], "all": row, "corpora": [row, ...], "mean": row}``; a row is ``{"corpus", "n",
        "classes", "open", "restricted"}``, with figures as shares of 1. For a single corpus ``corpora`` is empty and
        ``mean`` None. None for a single corpus with all classes, or without probabilities.
    """
    read = found.where(found.read)
    if read.probabilities is None or not len(read):
        return None
    names, corpus_of = corpora_of(read.table)
    present = np.zeros((len(names), len(read.labels)), bool)
    present[corpus_of, read.truth] = True
    if len(names) == 1 and present.all():
        return None
    inside = np.where(present[corpus_of], read.probabilities, -np.inf).argmax(axis=1).astype(np.int64)
    rows = [_row(name, read, inside, corpus_of == k, present[k]) for k, name in enumerate(names)]
    anywhere = np.asarray(present.any(axis=0))
    several = len(names) > 1
    return {
        "missing": [label for label, there in zip(read.labels, anywhere, strict=True) if not there],
        "all": _row("", read, inside, np.ones(len(read), bool), anywhere),
        "corpora": rows if several else [],
        "mean": {kind: _mean(rows, kind) for kind in ("open", "restricted")} if several else None,
    }


def _row(name: str, read: Outcomes, inside: Ints, rows: np.ndarray, present: np.ndarray) -> dict[str, Any]:
    truth, n_classes = read.truth[rows], len(read.labels)
    return {
        "corpus": name,
        "n": int(rows.sum()),
        "classes": [label for label, there in zip(read.labels, present, strict=True) if there],
        "open": shares(tally(truth, read.answer[rows], n_classes)),
        "restricted": shares(tally(truth, inside[rows], n_classes)),
    }


def _mean(rows: list[dict[str, Any]], kind: str) -> dict[str, float]:
    return {name: float(np.mean([row[kind][name] for row in rows])) for name in rows[0][kind]}
