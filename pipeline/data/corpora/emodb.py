"""EmoDB, the Berlin Database of Emotional Speech: ``03a01Fa.wav``, that is speaker, text, emotion (German), version.

Source of the codes and of the speakers' sexes: Burkhardt et al. (2005), "A Database of German Emotional Speech",
Interspeech. Capitals count here: in small letters such a name could be a hash.
"""

from __future__ import annotations

from pathlib import PurePath

from pipeline.data.corpora.record import Corpus, Told, code_pattern

_SEXES = dict.fromkeys(("03", "10", "11", "12", "15"), "male") | dict.fromkeys(("08", "09", "13", "14", "16"), "female")
_EMOTIONS = {
    "W": "angry",  # Wut
    "L": "boredom",  # Langeweile
    "E": "disgust",  # Ekel
    "A": "fearful",  # Angst
    "F": "happy",  # Freude
    "T": "sad",  # Trauer
    "N": "neutral",
}
_NAME = code_pattern(r"(?P<code>(?P<speaker>03|08|09|1[0-6])(?P<text>[ab]\d\d)(?P<emotion>[WLEAFTN])[a-z])", flags=0)


def _read(path: PurePath) -> Told | None:
    match = _NAME.search(path.stem)
    if match is None:
        return None
    return Told(
        code=match["code"],
        label=_EMOTIONS[match["emotion"]],
        speaker=f"EmoDB_{match['speaker']}",
        sex=_SEXES[match["speaker"]],
        statement=match["text"],
        more=match["more"],
    )


EMODB = Corpus(
    name="emodb",
    title="EmoDB",
    family="EmoDB",
    citation="Burkhardt et al. 2005",
    source="http://emodb.bilderbar.info",
    licence="free for research (CC0 1.0 as audEERING publishes it)",
    heard="ten actors speak ten German sentences in a studio, at 16 kHz",
    example="03a01Fa.wav",
    read=_read,
    left_out=("boredom",),
    tried=True,
)
