"""A table of predictions as arrays: what was true, what was answered, how sure, and what could not be read.

The one place that reads the columns of a scores table (``status error label_name predicted confidence
p_<label> speaker ...``), so that metrics, breakdowns and comparisons mean the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipeline.data.corpora.voices import given, with_speakers
from pipeline.data.labels import LabelError
from pipeline.evaluation.measures import Floats, Ints, tally
from pipeline.storage.errors import SerError


@dataclass(frozen=True)
class Outcomes:
    """Labelled rows of a predictions table; C classes, n rows.

    ``answer`` is the class of the highest probability, and C where there is none (the recording could not be
    read). ``uncertain`` answers count as the class behind them: a confidence threshold never changes an
    evaluation.
    """

    labels: tuple[str, ...]
    table: pd.DataFrame
    truth: Ints
    answer: Ints
    probabilities: Floats | None
    confidence: Floats | None

    @property
    def read(self) -> NDArray[np.bool_]:
        """Rows that have an answer, (n,)."""
        return np.asarray(self.answer < len(self.labels))

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Rows whose answer is the truth, (n,)."""
        return np.asarray(self.answer == self.truth)

    @property
    def counts(self) -> Ints:
        """Tally (C, C + 1) of all rows."""
        return tally(self.truth, self.answer, len(self.labels))

    def __len__(self) -> int:
        return len(self.truth)

    def where(self, rows: NDArray[np.bool_] | Ints) -> Outcomes:
        """The rows of a boolean mask (n,), or of row numbers in their order."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return Outcomes(
            self.labels,
            self.table.iloc[rows].reset_index(drop=True),
            self.truth[rows],
            self.answer[rows],
            None if self.probabilities is None else self.probabilities[rows],
            None if self.confidence is None else self.confidence[rows],
        )


def has_labels(predictions: pd.DataFrame) -> bool:
    """Whether any row says what is true."""
    return "label_name" in predictions.columns and bool(given(predictions["label_name"]).any())


def failed_rows(predictions: pd.DataFrame) -> NDArray[np.bool_]:
    """Rows whose recording could not be read (``status`` other than ``ok``), (n,)."""
    if "status" not in predictions.columns:
        return np.zeros(len(predictions), dtype=bool)
    return (predictions["status"] != "ok").to_numpy(dtype=bool, na_value=True)


def outcomes(predictions: pd.DataFrame, labels: Sequence[str]) -> Outcomes:
    """The labelled rows of ``predictions`` as arrays; file names tell the speakers where no column does.

    Raises:
        LabelError: a label that is none of ``labels``.
        SerError: no column says what was answered.
    """
    names = tuple(labels)
    table = with_speakers(predictions[given(predictions["label_name"])].reset_index(drop=True))
    truth = _codes(table["label_name"], names)
    if (truth < 0).any():
        found = table.loc[truth < 0, "label_name"].astype(str).value_counts()
        shown = ", ".join(f"{name!r} ({count})" for name, count in found.head(5).items())
        raise LabelError(
            f"{int(found.sum())} of {len(table)} rows have labels that the model does not know: {shown}; "
            f"it knows {', '.join(names)}; translate with --label_map given=wanted, or leave these rows out"
        )
    probabilities = _probabilities(table, names)
    failed = failed_rows(table)
    if probabilities is not None:
        failed = failed | ~np.isfinite(probabilities).all(axis=1)
    answer = _answers(table, names, probabilities)
    answer[failed] = len(names)
    return Outcomes(names, table, truth, answer, probabilities, _confidence(table, probabilities))


def _codes(cells: pd.Series, names: tuple[str, ...]) -> Ints:
    """Index of each cell in ``names``, -1 for any other text."""
    return np.asarray(pd.Index(names).get_indexer(pd.Index(cells.astype(object))), dtype=np.int64)


def _probabilities(table: pd.DataFrame, names: tuple[str, ...]) -> Floats | None:
    columns = [f"p_{name}" for name in names]
    if not set(columns) <= set(table.columns):
        return None
    return table[columns].to_numpy(dtype=np.float64, na_value=np.nan)


def _answers(table: pd.DataFrame, names: tuple[str, ...], probabilities: Floats | None) -> Ints:
    """Class answered: the named one, else (as for ``uncertain``) the most probable, else C."""
    if "predicted" not in table.columns and probabilities is None:
        raise SerError(
            f"the predictions have neither a column predicted nor p_{names[0]} ... p_{names[-1]}; "
            f"found {list(table.columns)}"
        )
    named = np.full(len(table), -1, dtype=np.int64)
    if "predicted" in table.columns:
        named = _codes(table["predicted"], names)
    if probabilities is None:
        return np.where(named < 0, len(names), named)
    likeliest = np.nan_to_num(probabilities, nan=-1.0).argmax(axis=1)
    return np.where(named < 0, likeliest, named)


def _confidence(table: pd.DataFrame, probabilities: Floats | None) -> Floats | None:
    if probabilities is not None:
        return np.asarray(probabilities.max(axis=1))
    if "confidence" in table.columns:
        return table["confidence"].to_numpy(dtype=np.float64, na_value=np.nan)
    return None
