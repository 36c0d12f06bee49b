"""CREMA-D: ``1001_DFA_ANG_XX.wav``, that is speaker, sentence, emotion, level (``XX``: none was asked for).

Source of the codes: Cao et al. (2014), "CREMA-D: Crowd-sourced Emotional Multimodal Actors Dataset", IEEE Transactions
on Affective Computing 5(4). The names do not tell a speaker's sex: ``VideoDemographics.csv`` of the corpus does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath

from pipeline.data.corpora.record import Corpus, Told, code_pattern
from pipeline.data.labels import canonical_name, normalise_name
from pipeline.data.tables import ManifestError, read_cells

_NAME = code_pattern(
    r"(?P<code>(?P<speaker>1\d{3})_(?P<sentence>[A-Z]{3})_(?P<emotion>ANG|DIS|FEA|HAP|NEU|SAD)_(?P<level>LO|MD|HI|XX?))"
)
_LEVELS = {"LO": "low", "MD": "medium", "HI": "high"}


def _read(path: PurePath) -> Told | None:
    match = _NAME.search(path.stem)
    if match is None:
        return None
    return Told(
        code=match["code"].upper(),
        label=canonical_name(match["emotion"]),
        speaker=f"CREMA-D_{match['speaker']}",
        intensity=_LEVELS.get(match["level"].upper(), ""),
        statement=match["sentence"].upper(),
        more=match["more"],
    )


def _sexes(csv_path: Path) -> Mapping[str, str]:
    """Speaker -> sex, by the columns ActorID and Sex."""
    table, _ = read_cells(csv_path)
    if not {"ActorID", "Sex"} <= set(table.columns):
        raise ManifestError(
            f"{csv_path} has the columns {list(table.columns)}; expected ActorID and Sex, as CREMA-D has them; "
            "remove it, or put that of the corpus there"
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
    heard="91 American actors of many ages speak twelve English sentences, at 16 kHz",
    example="1001_DFA_ANG_XX.wav",
    read=_read,
    broken={"1076_MTI_SAD_XX": "digital silence"},
    speakers_file="VideoDemographics.csv",
    sexes=_sexes,
    tried=True,
)
