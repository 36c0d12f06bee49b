"""The user's recordings (name and bytes, kept in the session) and the project's example clips."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
_TYPES = {name: f"audio/{name}" for name in ("wav", "flac", "ogg", "mp4", "webm", "aac")}
_TYPES |= {"oga": "audio/ogg", "opus": "audio/ogg", "mp3": "audio/mpeg", "m4a": "audio/mp4"}


@dataclass(frozen=True)
class Recorded:
    """A recording of the user; ``origin`` is upload, microphone or example."""

    name: str
    data: bytes
    origin: str = "upload"

    @cached_property
    def digest(self) -> str:
        """sha256 of its bytes."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def media_type(self) -> str | None:
        """Its media type, by its file name; None where browsers cannot play it."""
        return _TYPES.get(PurePosixPath(self.name.lower()).suffix.removeprefix("."))

    @property
    def source(self) -> tuple[str, bytes]:
        """Name and bytes, the form that the client takes."""
        return self.name, self.data


def examples() -> dict[str, Path]:
    """Name of an example clip -> its path; empty where the project has no samples folder."""
    listed = SAMPLES / "metadata.csv"
    if not listed.is_file():
        return {}
    with listed.open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    return {f"{row['speaker'].capitalize()}, {row['label']}": SAMPLES / row["speech"] for row in rows}


def example(name: str) -> Recorded:
    """The example clip with this name."""
    path = examples()[name]
    return Recorded(path.name, path.read_bytes(), "example")
