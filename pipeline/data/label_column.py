"""What the cells of a label column mean: names, spellings of them, and integers, which mean only what somebody says.

With a model, integers are indices of its classes; with ``--label_names``, of those; else a class is called by its
integer. Where files are named by the code of a known corpus, or a second column tells the class in words, and that
names another class than the integer does, the integers follow another order: the table is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import pandas as pd

from pipeline.data.corpora import recognised
from pipeline.data.labels import (
    LabelError,
    LabelSet,
    as_integer,
    canonical_name,
    describe,
    mapped,
    normalise_name,
)
from pipeline.data.tables import MISSING

WORDS = ("emotion", "emotion_name", "emotion_label", "label_name", "label_text", "class", "class_name", "category")
_SHOWN = 12


@dataclass(frozen=True)
class Meaning:
    """What labels are translated with.

    Attributes:
        label_map: given text, or the name that it stands for -> wanted name, see ``labels.mapped``.
        labels: the classes of a model, which integers index and names must be among.
        label_names: what integers index where there is no model, in any order.
    """

    label_map: Mapping[str, str] = field(default_factory=dict)
    labels: Sequence[str] | None = None
    label_names: Sequence[str] | None = None

    @property
    def by_index(self) -> Sequence[str] | None:
        """The name of each integer."""
        return self.labels if self.labels is not None else self.label_names

    def name(self, wanted: str) -> str:
        """The class of a label that is no integer, or the name of one.

        Raises:
            LabelError: no class is called so.
        """
        if self.labels is not None:
            known = LabelSet(tuple(self.labels))
            return known.names[known.index(wanted)]
        name = canonical_name(wanted)
        if self.label_names is not None and name not in {*self.label_names, *self.label_map.values()}:
            raise LabelError(
                f"unknown label {wanted!r}; --label_names are {describe(self.label_names)}; "
                f"translate other names with --label_map {normalise_name(wanted)}=wanted"
            )
        return name

    def of_integer(self, number: int) -> str:
        """The class that an integer stands for.

        Raises:
            LabelError: none.
        """
        names = self.by_index
        if (names is None and number >= 0) or (self.labels and str(number) in self.labels):
            return str(number)
        if self.labels and all(str(as_integer(name)) == name for name in self.labels):
            raise LabelError(f"label {number} is none of the classes, which are called {', '.join(self.labels)}")
        if names is not None and 0 <= number < len(names):
            return names[number]
        expected = f"outside 0..{len(names) - 1}; the classes are {describe(names)}" if names else "below 0"
        raise LabelError(f"label {number} is {expected}; translate other numbers with --label_map {number}=wanted,...")


def class_names(
    table: pd.DataFrame,
    meaning: Meaning,
    *,
    required: bool,
    where: Callable[[int], str],
    tell: Callable[[str], None] | None = None,
) -> list[str | None]:
    """The class of each row of a table with ``label`` and ``speech``; None where a label is missing.

    Args:
        required: whether a missing label is an error.
        where: how messages call a row.
        tell: is given a line on what integers were taken for.

    Raises:
        LabelError: a label that is no class, names beside integers that have none, or integers that the table's own
            words or file names contradict.
    """
    texts = _texts(table["label"], meaning)
    names: list[str | None] = []
    integers: dict[int, int] = {}  # row -> the integer that its label is
    named = -1
    for row, text in enumerate(texts):
        wanted = mapped(text, meaning.label_map, meaning.by_index or ()) if text else text
        number = None if wanted in (meaning.labels or ()) else as_integer(wanted)
        try:
            if not text:
                if required:
                    raise LabelError("the label is empty; label every recording, or leave the row out")
                names.append(None)
            elif number is None:
                names.append(meaning.name(wanted))
                named = row
            else:
                names.append(meaning.of_integer(number))
                integers[row] = number
        except LabelError as error:
            by_map = "" if wanted == text else f", {text!r} by --label_map"
            raise LabelError(f"{where(row)}{by_map}: {error}") from None
    if integers:
        first = next(iter(integers))
        if meaning.by_index is None and named >= 0:
            raise LabelError(
                f"{where(first)}: the label {texts[first]} is an integer, that of {where(named)} is {texts[named]!r}; "
                f"say which class each integer is, with --label_map {integers[first]}=wanted,..."
            )
        _compare(table, integers, names, meaning, where, tell)
    return names


def _texts(cells: pd.Series, meaning: Meaning) -> list[str]:
    """The labels as text; empty where a cell holds what tables write for a missing one, unless that is a class."""
    named = {*(meaning.by_index or ()), *meaning.label_map}
    texts = ["" if cell is None or cell is pd.NA or cell != cell else str(cell).strip() for cell in cells]
    return ["" if t.lower() in MISSING and not named & {t, normalise_name(t)} else t for t in texts]


def _compare(
    table: pd.DataFrame,
    integers: Mapping[int, int],
    names: Sequence[str | None],
    meaning: Meaning,
    where: Callable[[int], str],
    tell: Callable[[str], None] | None,
) -> None:
    """Hold integers against what else the table tells of their rows, and tell what they were taken for."""
    told = _told(table, integers, meaning.label_map)
    say: dict[int, set[str]] = {number: set() for number in sorted(set(integers.values()))}
    for row, (name, _) in told.items():
        say[integers[row]].add(name)
    whole = all(len(words) == 1 for words in say.values()) and len(set().union(*say.values())) == len(say)
    pairs = [f"{number}={next(iter(words))}" for number, words in say.items()] if whole else []
    if meaning.by_index is not None:
        for row, (name, by) in told.items():
            if name in meaning.by_index and name != names[row]:
                advice = ",".join(pairs) or f"{integers[row]}=wanted,..."
                raise LabelError(
                    f"{where(row)}: label {integers[row]} is taken for {names[row]} ({describe(meaning.by_index)}), "
                    f"but {by} says {name}; say what the integers mean with --label_map {advice}"
                )
    if tell is None:
        return
    if meaning.by_index is not None:
        whose = "the model's classes" if meaning.labels is not None else "--label_names"
        tell(f"integer labels are indices of {whose}: {describe(meaning.by_index)}")
        return
    called = list(map(str, say))
    shown = ", ".join(called[:_SHOWN]) + (f" and {len(called) - _SHOWN} more" if len(called) > _SHOWN else "")
    hint = f"--label_map {','.join(pairs)}, as the table says," if pairs else "--label_names NAME,NAME,..."
    tell(f"labels are integers: the classes are called {shown}; {hint} gives them names")


def _told(table: pd.DataFrame, rows: Mapping[int, int], label_map: Mapping[str, str]) -> dict[int, tuple[str, str]]:
    """Row -> (class, what says so) by a column of words, else by a file name of a known corpus."""
    words = [column for column in table.columns if str(column).strip().lower() in WORDS]
    told: dict[int, tuple[str, str]] = {}
    for row in rows:
        for column in words:
            text = str(table[column].iloc[row]).strip()
            if text and text.lower() not in MISSING and as_integer(text) is None:
                told[row] = canonical_name(text, label_map), f"its column {column}"
                break
        else:
            name = str(table["speech"].iloc[row]).replace("\\", "/").rpartition("/")[2]
            if (found := recognised(PurePosixPath(name))) is not None:
                told[row] = canonical_name(found[1].label, label_map), f"the file name {name}"
    return told
