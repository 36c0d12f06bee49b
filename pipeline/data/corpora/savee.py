"""SAVEE, Surrey Audio-Visual Expressed Emotion: ``DC_a01.wav`` or ``DC/a01.wav``, that is speaker, emotion, number.

Source of the codes: Haq & Jackson (2010), "Multimodal Emotion Recognition", and the corpus' web page. All four speakers
are men. Sentences are numbered within an emotion, so that number and emotion name one together.
"""

from __future__ import annotations

from pathlib import PurePath

from pipeline.data.corpora.record import Corpus, Told, code_pattern

_EMOTIONS = {
    "a": "angry",
    "d": "disgust",
    "f": "fearful",
    "h": "happy",
    "n": "neutral",
    "sa": "sad",
    "su": "surprised",
}
_SPEAKERS = ("DC", "JE", "JK", "KL")
_SENTENCE = r"(?P<emotion>sa|su|[adfhn])(?P<number>0[1-9]|[12]\d|30)"
_FULL = code_pattern(rf"(?P<speaker>{'|'.join(_SPEAKERS)})_{_SENTENCE}")
_SHORT = code_pattern(_SENTENCE)


def _read(path: PurePath) -> Told | None:
    folder = path.parent.name.upper()
    match = _FULL.search(path.stem) or (_SHORT.search(path.stem) if folder in _SPEAKERS else None)
    if match is None:
        return None
    speaker = match["speaker"].upper() if "speaker" in match.groupdict() else folder
    sentence = f"{match['emotion'].lower()}{match['number']}"
    return Told(
        code=f"{speaker}_{sentence}",
        label=_EMOTIONS[match["emotion"].lower()],
        speaker=f"SAVEE_{speaker}",
        sex="male",
        statement=sentence,
        more=match["more"],
    )


SAVEE = Corpus(
    name="savee",
    title="SAVEE",
    family="SAVEE",
    citation="Haq & Jackson 2010",
    source="http://kahlan.eps.surrey.ac.uk/savee",
    licence="free for research, on request from its authors",
    heard="four British men speak English TIMIT sentences in a laboratory",
    example="DC_a01.wav",
    read=_read,
)
