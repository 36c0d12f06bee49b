"""Emotion labels: class names and their indices, the codes of RAVDESS, and an alias table for other spellings.

Source of the codes: Livingstone & Russo (2018), "The Ryerson Audio-Visual Database of Emotional Speech and Song
(RAVDESS)", PLoS ONE 13(5): e0196391, table of file-name identifiers. The alias table collects the adjective and
noun forms used by RAVDESS, TESS (``ps`` = pleasant surprise), CREMA-D (``ANG DIS FEA HAP NEU SAD``), SAVEE and EmoDB
(``anxiety``).

A class index is always the position in sorted order: for RAVDESS, angry is 0 and surprised is 7.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.storage.errors import SerError

RAVDESS_EMOTIONS: Mapping[str, str] = {
    "01": "neutral",
    "02": "calm",
    "03": "happy",
    "04": "sad",
    "05": "angry",
    "06": "fearful",
    "07": "disgust",
    "08": "surprised",
}
RAVDESS_LABELS: tuple[str, ...] = tuple(sorted(RAVDESS_EMOTIONS.values()))
NO_CLASSES = ("not_speech", "silence", "uncertain")  # predictions that are not a class
OTHER_CLASSES = ("boredom", "bored")  # known emotions that no model here is trained for

_SPELLINGS = {
    "angry": "anger ang mad",
    "calm": "calmness relaxed",
    "disgust": "disgusted dis",
    "fearful": "fear fea afraid anxiety scared",
    "happy": "happiness hap joy joyful",
    "neutral": "neu neutrality",
    "sad": "sadness",
    "surprised": "surprise sur ps pleasant_surprise pleasant_surprised",
}
ALIASES: Mapping[str, str] = {alias: name for name, aliases in _SPELLINGS.items() for alias in aliases.split()}
_KNOWN = frozenset((*RAVDESS_LABELS, *OTHER_CLASSES))


class LabelError(SerError):
    """A label is not a class, or a set of class names is invalid."""


def normalise_name(text: str) -> str:
    """The normalised label name: trimmed, lower case, inner blanks and hyphens as underscores.

    >>> normalise_name(" Pleasant Surprise ")
    'pleasant_surprise'
    """
    return "_".join(text.strip().lower().replace("-", " ").replace("_", " ").split())


def canonical_name(text: str, label_map: Mapping[str, str] | None = None) -> str:
    """The class name for a spelling: translated by ``label_map``, then by the alias table, else only normalised.

    >>> canonical_name("Fear"), canonical_name("joy", {"joy": "calm"}), canonical_name("Bored")
    ('fearful', 'calm', 'bored')
    """
    name = normalise_name(mapped(text, label_map or {}))
    return ALIASES.get(name, name)


def emotion_of(text: str, label_map: Mapping[str, str] | None = None) -> str | None:
    """The class for a name, if it is a known emotion or is in ``label_map``; None for any other name.

    >>> emotion_of("Fear"), emotion_of("bored"), emotion_of("train"), emotion_of("cough", {"cough": "cough"})
    ('fearful', 'bored', None, 'cough')
    """
    name = ALIASES.get(normalise_name(text), normalise_name(text))
    return canonical_name(text, label_map) if name in _KNOWN or is_named(text, label_map) else None


def is_named(text: str, label_map: Mapping[str, str] | None) -> bool:
    """Whether ``label_map`` has an entry for a name or its alias."""
    given = _map_key(text)
    return bool({given, ALIASES.get(given, given)} & set(label_map or ()))


def mapped(text: str, label_map: Mapping[str, str], names: Sequence[str] = ()) -> str:
    """The entry of ``label_map`` (from ``parse_label_map``) for a label; the text itself if there is none.

    The text as given is looked up first. Then its standard name is: from the alias table, or for an integer, the name
    at that index in ``names``.

    >>> wanted = parse_label_map("fear=sad,happy=calm,1=angry")
    >>> [mapped(text, wanted, ("angry", "calm", "happy")) for text in ("Fear", "joy", "2", "1.0", "afraid")]
    ['sad', 'calm', 'calm', 'angry', 'afraid']
    """
    given, number = _map_key(text), as_integer(text)
    name = ALIASES.get(given, given)
    if text not in names and number is not None and 0 <= number < len(names):
        name = names[number]
    return label_map.get(given, label_map.get(name, text))


def parse_label_map(text: str) -> dict[str, str]:
    """``"excited=happiness, 0=neutral"`` as ``{"excited": "happy", "0": "neutral"}``; LabelError refuses others."""
    mapping: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        given, separator, wanted = part.partition("=")
        if not separator or not given.strip() or not wanted.strip():
            raise LabelError(f"label map part {part!r} is not of the form given=wanted, as in excited=happy")
        mapping[_map_key(given)] = canonical_name(wanted)
    return mapping


def parse_label_names(text: str) -> tuple[str, ...]:
    """``"sad, Fear"`` as ``("sad", "fearful")``; LabelError refuses numbers, empty and double names."""
    names = tuple(map(canonical_name, text.split(",")))
    for name in names:
        if not name or as_integer(name) is not None or names.count(name) > 1:
            raise LabelError(
                f"label names {text!r}: {name!r} is empty, a number or given twice; expected angry,sad,..."
            )
    return names


def chained(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """The label map with the effect of applying ``first`` and then ``second``.

    >>> chained({"excited": "happy"}, {"happy": "sad", "calm": "neutral"})
    {'happy': 'sad', 'calm': 'neutral', 'excited': 'sad'}
    """
    return {**second, **{given: second.get(wanted, wanted) for given, wanted in first.items()}}


def _map_key(text: str) -> str:
    """The normalised key of a label map: ``"3"``, ``"03"`` and ``"3.0"`` are the same integer."""
    number = as_integer(text)
    return normalise_name(text) if number is None else str(number)


@dataclass(frozen=True)
class LabelSet:
    """Class names in index order (sorted, unique)."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise LabelError(f"a classifier needs two classes or more, got {list(self.names)}; add labelled recordings")
        if list(self.names) != sorted(set(self.names)):
            raise LabelError(f"class names must be unique and in sorted order, got {list(self.names)}")

    @classmethod
    def from_names(cls, names: Iterable[str]) -> LabelSet:
        """The set of ``names``, in sorted order. LabelError refuses fewer than two, and those of ``NO_CLASSES``."""
        found = tuple(sorted(set(names)))
        for name in set(found) & set(NO_CLASSES):
            raise LabelError(
                f'a class cannot be called {name}: predictions use that word for "no class"; give it another '
                f"name with --label_map {name}=..."
            )
        return cls(found)

    def __len__(self) -> int:
        return len(self.names)

    def index(self, value: str | int) -> int:
        """Class index of a name, an alias, or an index (``3``, ``"3"``, ``"3.0"``); class names come before indices.

        LabelError refuses anything else.
        """
        number = as_integer(value)
        if number is not None and not (isinstance(value, str) and value.strip() in self.names):
            if 0 <= number < len(self.names):
                return number
            raise LabelError(
                f"label {value} is outside 0..{len(self.names) - 1}; the classes are {describe(self.names)}; "
                f"translate other numbers with --label_map {number}=wanted,..."
            )
        name = canonical_name(str(value))
        if name not in self.names:
            raise LabelError(
                f"unknown label {str(value)!r}; the classes are {describe(self.names)}; "
                f"translate other names with --label_map {normalise_name(str(value)) or 'given'}=wanted"
            )
        return self.names.index(name)


def describe(names: Sequence[str]) -> str:
    """``"0 angry, 1 calm, ..."``: names with their indices, one line."""
    return ", ".join(f"{i} {name}" for i, name in enumerate(names))


def as_integer(value: object) -> int | None:
    """The integer in a label cell, or None if it is not an integer.

    >>> as_integer("3"), as_integer(3.0), as_integer("3.5"), as_integer("sad")
    (3, 3, None, None)
    """
    if isinstance(value, bool):
        return None
    try:
        number = float(str(value).strip())
    except ValueError:
        return None
    return int(number) if number.is_integer() else None
