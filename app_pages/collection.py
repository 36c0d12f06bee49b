"""The list of the page Many recordings: recordings with their answers, and the tables made from them.

Entries stay in the session until the user clears the list. An entry that has an answer is not sent again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import pandas as pd

from app_pages.recordings import Recorded
from app_pages.timeline import shares
from app_pages.words import NO_ANSWER, NOT_SURE_BELOW, UNCERTAIN, percent, reason, spoken, unsure
from serve.schema import Failure, Recording

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass
class Entry:
    """A recording and its answer, once there is one."""

    recorded: Recorded
    answer: Recording | Failure | None = None


@dataclass
class Collection:
    """Entries in the order given, and the labels that came with them (file name -> class)."""

    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    truth: dict[str, str] = field(default_factory=dict)

    def add(self, recordings: Iterable[Recorded]) -> int:
        """Add the new recordings; returns how many were already in the list (same name, same bytes)."""
        known = 0
        for recorded in recordings:
            key = (recorded.name, recorded.digest)
            known += key in self.entries
            self.entries.setdefault(key, Entry(recorded))
        return known

    def waiting(self) -> list[Entry]:
        """The entries without an answer."""
        return [entry for entry in self.entries.values() if entry.answer is None]

    def read(self) -> list[tuple[Entry, Recording]]:
        """The entries that could be analysed, with their answers."""
        return [(entry, entry.answer) for entry in self.entries.values() if isinstance(entry.answer, Recording)]

    def failed(self) -> list[tuple[Entry, Failure]]:
        """The entries that could not be used, with their failures."""
        return [(entry, entry.answer) for entry in self.entries.values() if isinstance(entry.answer, Failure)]

    def label_of(self, entry: Entry) -> str | None:
        """The user's label for an entry; None where there is none."""
        return self.truth.get(entry.recorded.name.casefold())


def as_told(answer: Recording) -> Recording:
    """The answer as the page shows it: ``uncertain`` where the confidence is below 0.5."""
    unsure_of_it = answer.label not in NO_ANSWER and (answer.confidence or 0.0) < NOT_SURE_BELOW
    return answer.model_copy(update={"label": UNCERTAIN}) if unsure_of_it else answer


def result_table(collection: Collection) -> pd.DataFrame:
    """Columns ``row file sounds word confidence duration_s``, and ``label wrong`` if there are labels.

    There is one row per recording that could be analysed. ``sounds`` is the text in the table, ``word`` (the answer, or
    "not sure") the value for the filter.
    """
    rows = [
        {
            "row": number,
            "file": entry.recorded.name,
            **_sounds(as_told(answer)),
            "label": spoken(collection.label_of(entry) or ""),
            "wrong": (label := collection.label_of(entry)) is not None and label != answer.label,
            "duration_s": answer.duration_s,
        }
        for number, (entry, answer) in enumerate(collection.read())
    ]
    columns = ["row", "file", "sounds", "word", "confidence", "label", "wrong", "duration_s"]
    table = pd.DataFrame(rows, columns=columns)
    return table if collection.truth else table.drop(columns=["label", "wrong"])


def _sounds(answer: Recording) -> dict[str, object]:
    """The columns ``sounds``, ``word`` and ``confidence`` of an answer."""
    if answer.segments:  # a share of the time is shown, and it is not a confidence
        label, share = next(iter(shares(answer.segments).items()))
        told = spoken(label) if share == 1 else f"{spoken(label)}, {percent(share)} of the time"
        return {"sounds": told, "word": spoken(label), "confidence": math.nan}
    told = unsure(answer.scores[0].label) if answer.label == UNCERTAIN else spoken(answer.label)
    confidence = math.nan if answer.confidence is None else answer.confidence
    return {"sounds": told, "word": spoken(answer.label), "confidence": confidence}


def failure_table(collection: Collection) -> pd.DataFrame:
    """Columns ``file reason``."""
    rows = [{"file": entry.recorded.name, "reason": reason(answer.problem)} for entry, answer in collection.failed()]
    return pd.DataFrame(rows, columns=["file", "reason"])


def chosen_rows(
    table: pd.DataFrame, text: str, words: Sequence[str], order: str, *, only_wrong: bool = False
) -> pd.DataFrame:
    """The rows whose file name contains ``text``, in any case, and whose word is in ``words`` (empty: any), sorted.

    ``order`` is one of ``many_results.ORDERS``; ``only_wrong``: only rows whose answer differs from the label.
    """
    table = table[table["wrong"]] if only_wrong else table
    found = table[table["file"].str.contains(text, case=False, regex=False)]
    if words:
        found = found[found["word"].isin(list(words))]
    by, ascending = {
        "As added": ("row", True),
        "File name": ("file", True),
        "Most sure first": ("confidence", False),
        "Least sure first": ("confidence", True),
    }[order]
    return found.sort_values(by, ascending=ascending, kind="stable")


def csv_bytes(collection: Collection, labels: Sequence[str]) -> bytes:
    """A CSV of all entries with an answer, in UTF-8; columns are named as in the table of ``jobs.score``.

    Text that a spreadsheet would read as a formula gets the prefix ``'``.
    """
    rows = list(_csv_rows(collection, labels))
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n").encode("utf-8")


def _csv_rows(collection: Collection, labels: Sequence[str]) -> Iterator[dict[str, object]]:
    for entry in collection.entries.values():
        answer = entry.answer
        if answer is None:
            continue
        row: dict[str, object] = {"speech": _safe(entry.recorded.name)}
        if collection.truth:
            row["label_name"] = collection.label_of(entry)
        if isinstance(answer, Failure):
            yield row | {"status": answer.problem.code, "error": _safe(answer.problem.detail)}
            continue
        shares = {score.label: score.score for score in answer.scores}
        yield row | {
            "status": "ok",
            "error": None,
            "predicted": answer.label,
            "confidence": answer.confidence,
            **{f"p_{label}": shares.get(label) for label in labels},
            "duration_s": answer.duration_s,
            "scored_s": answer.scored_s,
        }


def _safe(text: str) -> str:
    return "'" + text if text.startswith(_FORMULA) else text
