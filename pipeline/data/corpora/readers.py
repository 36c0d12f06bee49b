"""Readers for corpora whose file names contain a code: one section per corpus, with the source of its codes.

To add a corpus, write a section here (or a module in this folder), and add a line to ``CORPORA``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath

from pipeline.data.corpora.record import Corpus, Told, code_pattern
from pipeline.data.labels import RAVDESS_EMOTIONS, canonical_name, normalise_name
from pipeline.data.tables import ManifestError, read_cells

# RAVDESS, speech and song: ``03-01-05-02-01-02-07.wav``, two corpora of the same 24 actors.
#
# Modality (01 with video, 03 audio only), vocal channel (01 speech, 02 song), emotion, intensity, statement,
# repetition, actor (even: female). Source of the codes: Livingstone & Russo (2018), PLoS ONE 13(5): e0196391, table
# of file-name identifiers.

_RAVDESS_NAME = code_pattern(
    r"0[13]-(?P<code>(?P<channel>0[12])-(?P<emotion>0[1-8])-(?P<intensity>0[12])-(?P<statement>0[12])"
    r"-(?P<repetition>0[12])-(?P<actor>0[1-9]|1\d|2[0-4]))"
)


def _read_ravdess(channel: str, path: PurePath) -> Told | None:
    match = _RAVDESS_NAME.search(path.stem)
    if match is None or match["channel"] != channel:
        return None
    return Told(
        code=match["code"],  # without the modality: the audio of a video is the same recording
        label=RAVDESS_EMOTIONS[match["emotion"]],
        speaker=f"RAVDESS_{match['actor']}",
        sex="female" if int(match["actor"]) % 2 == 0 else "male",
        intensity={"01": "normal", "02": "strong"}[match["intensity"]],
        statement={"01": "kids", "02": "dogs"}[match["statement"]],
        repetition=str(int(match["repetition"])),
        more=match["more"],
    )


SPEECH = Corpus(
    name="ravdess_speech",
    title="speech of RAVDESS",
    family="RAVDESS",
    citation="Livingstone & Russo 2018",
    source="https://doi.org/10.5281/zenodo.1188976",
    licence="CC BY-NC-SA 4.0: name the source, no commercial use, share alike",
    summary="North American actors speak two English sentences of about 1.5 s in a studio",
    example="03-01-05-01-02-01-07.wav",
    read=partial(_read_ravdess, "01"),
    tried=True,
)
SONG = replace(
    SPEECH,
    name="ravdess_song",
    title="song of RAVDESS",
    summary="North American actors sing two English sentences in a studio",
    example="03-02-05-01-02-01-07.wav",
    read=partial(_read_ravdess, "02"),
)


# CREMA-D: ``1001_DFA_ANG_XX.wav``, that is speaker, sentence, emotion, level (``XX``: unspecified).
#
# Source of the codes: Cao et al. (2014), "CREMA-D: Crowd-sourced Emotional Multimodal Actors Dataset", IEEE
# Transactions on Affective Computing 5(4). A speaker's sex is not in the names, but in the corpus'
# ``VideoDemographics.csv``.

_CREMA_D_NAME = code_pattern(
    r"(?P<code>(?P<speaker>1\d{3})_(?P<sentence>[A-Z]{3})_(?P<emotion>ANG|DIS|FEA|HAP|NEU|SAD)_(?P<level>LO|MD|HI|XX?))"
)
_CREMA_D_LEVELS = {"LO": "low", "MD": "medium", "HI": "high"}


def _read_crema_d(path: PurePath) -> Told | None:
    match = _CREMA_D_NAME.search(path.stem)
    if match is None:
        return None
    return Told(
        code=match["code"].upper(),
        label=canonical_name(match["emotion"]),
        speaker=f"CREMA-D_{match['speaker']}",
        intensity=_CREMA_D_LEVELS.get(match["level"].upper(), ""),
        statement=match["sentence"].upper(),
        more=match["more"],
    )


def _sexes_crema_d(csv_path: Path) -> Mapping[str, str]:
    """Speaker -> sex, from the columns ActorID and Sex."""
    table, _ = read_cells(csv_path)
    if not {"ActorID", "Sex"} <= set(table.columns):
        raise ManifestError(
            f"{csv_path} has the columns {list(table.columns)}; expected ActorID and Sex; "
            "remove it, or replace it by the file of CREMA-D"
        )
    pairs = zip(table["ActorID"], table["Sex"], strict=True)
    return {f"CREMA-D_{actor.strip()}": normalise_name(sex) for actor, sex in pairs}


CREMA_D = Corpus(
    name="crema_d",
    title="CREMA-D",
    family="CREMA-D",
    citation="Cao et al. 2014",
    source="https://github.com/CheyneyComputerScience/CREMA-D",
    licence="ODbL 1.0 and DbCL 1.0: name the source, share changed databases alike",
    summary="91 American actors of many ages speak twelve English sentences, at 16 kHz",
    example="1001_DFA_ANG_XX.wav",
    read=_read_crema_d,
    broken={"1076_MTI_SAD_XX": "digital silence"},
    speakers_file="VideoDemographics.csv",
    sexes=_sexes_crema_d,
    tried=True,
)


# EmoDB, the Berlin Database of Emotional Speech: ``03a01Fa.wav``, that is speaker, text, emotion (German), version.
#
# Source of the codes and of the speakers' sexes: Burkhardt et al. (2005), "A Database of German Emotional Speech",
# Interspeech. Upper case is required here: in lower case such a name could be a hash.

_EMODB_SEXES = dict.fromkeys(("03", "10", "11", "12", "15"), "male") | dict.fromkeys(
    ("08", "09", "13", "14", "16"), "female"
)
_EMODB_EMOTIONS = {
    "W": "angry",  # Wut
    "L": "boredom",  # Langeweile
    "E": "disgust",  # Ekel
    "A": "fearful",  # Angst
    "F": "happy",  # Freude
    "T": "sad",  # Trauer
    "N": "neutral",
}
_EMODB_NAME = code_pattern(
    r"(?P<code>(?P<speaker>03|08|09|1[0-6])(?P<text>[ab]\d\d)(?P<emotion>[WLEAFTN])[a-z])", flags=0
)


def _read_emodb(path: PurePath) -> Told | None:
    match = _EMODB_NAME.search(path.stem)
    if match is None:
        return None
    return Told(
        code=match["code"],
        label=_EMODB_EMOTIONS[match["emotion"]],
        speaker=f"EmoDB_{match['speaker']}",
        sex=_EMODB_SEXES[match["speaker"]],
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
    summary="ten actors speak ten German sentences in a studio, at 16 kHz",
    example="03a01Fa.wav",
    read=_read_emodb,
    left_out=("boredom",),
    tried=True,
)


# TESS, the Toronto Emotional Speech Set: ``OAF_back_angry.wav``, that is speaker, word, emotion.
#
# ``ps`` is pleasant surprise. One file of the corpus is called ``OA_bite_neutral.wav``. Both speakers are women.
# Source of the codes: Pichora-Fuller & Dupuis (2020), the description of the data set.

_TESS_NAME = code_pattern(
    r"(?P<speaker>OAF?|YAF)_(?P<word>[a-z]+(?:-[a-z]+)?)_"
    r"(?P<emotion>angry|anger|disgust(?:ed)?|fear(?:ful)?|happy|neutral|ps|(?:pleasant[ _-]?)?surprised?|sad)"
)


def _read_tess(path: PurePath) -> Told | None:
    match = _TESS_NAME.search(path.stem)
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
    summary="two women, one young, one older, say 200 English words in the sentence 'Say the word ...'",
    example="OAF_back_angry.wav",
    read=_read_tess,
)


# SAVEE, Surrey Audio-Visual Expressed Emotion: ``DC_a01.wav`` or ``DC/a01.wav``, that is speaker, emotion, number.
#
# Source of the codes: Haq & Jackson (2010), "Multimodal Emotion Recognition", and the corpus' web page. All four
# speakers are men. Sentences are numbered within each emotion, so emotion and number together identify one.

_SAVEE_EMOTIONS = {
    "a": "angry",
    "d": "disgust",
    "f": "fearful",
    "h": "happy",
    "n": "neutral",
    "sa": "sad",
    "su": "surprised",
}
_SAVEE_SPEAKERS = ("DC", "JE", "JK", "KL")
_SAVEE_SENTENCE = r"(?P<emotion>sa|su|[adfhn])(?P<number>0[1-9]|[12]\d|30)"
_SAVEE_FULL = code_pattern(rf"(?P<speaker>{'|'.join(_SAVEE_SPEAKERS)})_{_SAVEE_SENTENCE}")
_SAVEE_SHORT = code_pattern(_SAVEE_SENTENCE)


def _read_savee(path: PurePath) -> Told | None:
    folder = path.parent.name.upper()
    match = _SAVEE_FULL.search(path.stem) or (_SAVEE_SHORT.search(path.stem) if folder in _SAVEE_SPEAKERS else None)
    if match is None:
        return None
    speaker = match["speaker"].upper() if "speaker" in match.groupdict() else folder
    sentence = f"{match['emotion'].lower()}{match['number']}"
    return Told(
        code=f"{speaker}_{sentence}",
        label=_SAVEE_EMOTIONS[match["emotion"].lower()],
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
    summary="four British men speak English TIMIT sentences in a laboratory",
    example="DC_a01.wav",
    read=_read_savee,
)
