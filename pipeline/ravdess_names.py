"""What the names of RAVDESS's files tell: emotion, intensity, statement, repetition, speaker.

Source: Livingstone & Russo (2018), PLoS ONE 13(5): e0196391, table of file-name identifiers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pipeline.folders import path_text
from pipeline.labels import RAVDESS_EMOTIONS

_RAVDESS_NAME = re.compile(r"^(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)$")


@dataclass(frozen=True)
class RavdessName:
    """What a RAVDESS file name says."""

    song: bool
    emotion: str
    intensity: str
    statement: str
    repetition: int
    speaker: str
    sex: str


def parse_ravdess(stem: str) -> RavdessName | None:
    """The seven codes of a RAVDESS file stem, or None when the name is of another form.

    >>> parse_ravdess("03-01-05-02-01-02-24").emotion
    'angry'
    """
    match = _RAVDESS_NAME.match(stem)
    if not match:
        return None
    _modality, channel, emotion, intensity, statement, repetition, actor = match.groups()
    if emotion not in RAVDESS_EMOTIONS or channel not in ("01", "02"):
        return None
    return RavdessName(
        song=channel == "02",
        emotion=RAVDESS_EMOTIONS[emotion],
        intensity={"01": "normal", "02": "strong"}.get(intensity, intensity),
        statement={"01": "kids", "02": "dogs"}.get(statement, statement),
        repetition=int(repetition),
        speaker=f"Actor_{actor}",
        sex="female" if int(actor) % 2 == 0 else "male",
    )


def ravdess_row(path: Path, name: RavdessName) -> dict[str, object]:
    """A manifest's row of a recording."""
    return {
        "speech": path_text(path),
        "label": name.emotion,
        "speaker": name.speaker,
        "sex": name.sex,
        "intensity": name.intensity,
        "statement": name.statement,
        "repetition": name.repetition,
        "corpus": "RAVDESS song" if name.song else "RAVDESS",
    }


def given(cells: pd.Series) -> pd.Series:
    """Whether each cell says anything."""
    return cells.notna() & (cells.astype(str).str.strip() != "")


def with_speakers(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column ``speaker``, where it has none, or an empty one, and every file's name is of RAVDESS."""
    if "speech" not in table.columns or ("speaker" in table.columns and given(table["speaker"]).any()):
        return table
    files = [str(path).replace("\\", "/").rpartition("/")[2] for path in table["speech"]]
    names = [parse_ravdess(file.partition(".")[0]) for file in files]
    known = [name.speaker for name in names if name is not None]
    return table.assign(speaker=known) if len(known) == len(table) else table
