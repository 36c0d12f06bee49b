"""TESS, the Toronto Emotional Speech Set: ``OAF_back_angry.wav``, that is speaker, word, emotion.

``ps`` is pleasant surprise. One file of the corpus is called ``OA_bite_neutral.wav``. Both speakers are women. Source
of the codes: Pichora-Fuller & Dupuis (2020), the description of the data set.
"""

from __future__ import annotations

from pathlib import PurePath

from pipeline.data.corpora.record import Corpus, Told, code_pattern
from pipeline.data.labels import canonical_name

_NAME = code_pattern(
    r"(?P<speaker>OAF?|YAF)_(?P<word>[a-z]+(?:-[a-z]+)?)_"
    r"(?P<emotion>angry|anger|disgust(?:ed)?|fear(?:ful)?|happy|neutral|ps|(?:pleasant[ _-]?)?surprised?|sad)"
)


def _read(path: PurePath) -> Told | None:
    match = _NAME.search(path.stem)
    if match is None:
        return None
    speaker, word = ("YAF" if match["speaker"].upper() == "YAF" else "OAF"), match["word"].lower()
    label = "surprised" if "surprise" in match["emotion"].lower() else canonical_name(match["emotion"])
    return Told(
        code=f"{speaker}_{word}_{label}",
        label=label,
        speaker=f"TESS_{speaker}",
        sex="female",
        statement=word,
        more=match["more"],
    )


TESS = Corpus(
    name="tess",
    title="TESS",
    family="TESS",
    citation="Pichora-Fuller & Dupuis 2020",
    source="https://doi.org/10.5683/SP2/E8H2MF",
    licence="CC BY-NC-ND 4.0: name the source, no commercial use, pass no changed version on",
    heard="two women, one young, one older, say 200 English words in the sentence 'Say the word ...'",
    example="OAF_back_angry.wav",
    read=_read,
)
