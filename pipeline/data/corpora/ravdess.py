"""RAVDESS, speech and song: ``03-01-05-02-01-02-07.wav``, two corpora of the same 24 actors.

Modality (01 with picture, 03 sound alone), vocal channel (01 speech, 02 song), emotion, intensity, statement,
repetition, actor (even: female). Source of the codes: Livingstone & Russo (2018), PLoS ONE 13(5): e0196391, table of
file-name identifiers.
"""

from __future__ import annotations

from functools import partial
from pathlib import PurePath

from pipeline.data.corpora.record import Corpus, Told, code_pattern
from pipeline.data.labels import RAVDESS_EMOTIONS

_NAME = code_pattern(
    r"0[13]-(?P<code>(?P<channel>0[12])-(?P<emotion>0[1-8])-(?P<intensity>0[12])-(?P<statement>0[12])"
    r"-(?P<repetition>0[12])-(?P<actor>0[1-9]|1\d|2[0-4]))"
)


def _read(channel: str, path: PurePath) -> Told | None:
    match = _NAME.search(path.stem)
    if match is None or match["channel"] != channel:
        return None
    return Told(
        code=match["code"],  # without the modality: a video's sound is the same recording
        label=RAVDESS_EMOTIONS[match["emotion"]],
        speaker=f"RAVDESS_{match['actor']}",
        sex="female" if int(match["actor"]) % 2 == 0 else "male",
        intensity={"01": "normal", "02": "strong"}[match["intensity"]],
        statement={"01": "kids", "02": "dogs"}[match["statement"]],
        repetition=str(int(match["repetition"])),
        more=match["more"],
    )


def _corpus(name: str, channel: str, title: str, heard: str, example: str) -> Corpus:
    return Corpus(
        name=name,
        title=title,
        family="RAVDESS",
        citation="Livingstone & Russo 2018",
        source="https://doi.org/10.5281/zenodo.1188976",
        licence="CC BY-NC-SA 4.0: name the source, no commercial use, share alike",
        heard=heard,
        example=example,
        read=partial(_read, channel),
        tried=True,
    )


SPEECH = _corpus(
    "ravdess_speech",
    "01",
    "speech of RAVDESS",
    "North American actors speak two English sentences of about 1.5 s in a studio",
    "03-01-05-01-02-01-07.wav",
)
SONG = _corpus(
    "ravdess_song",
    "02",
    "song of RAVDESS",
    "North American actors sing two English sentences in a studio",
    "03-02-05-01-02-01-07.wav",
)
