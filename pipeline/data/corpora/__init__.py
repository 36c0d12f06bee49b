"""The corpora recognised by their file names (``readers``); speaker and corpus names across them are in ``voices``.

To add a corpus, write a ``Corpus`` record (CONTRIBUTING.md shows one) and add a line to ``CORPORA``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from pipeline.data.corpora.audiofolder import AUDIOFOLDER
from pipeline.data.corpora.readers import CREMA_D, EMODB, SAVEE, SONG, SPEECH, TESS
from pipeline.data.corpora.record import Corpus as Corpus
from pipeline.data.corpora.record import Told as Told

CORPORA: tuple[Corpus, ...] = (
    SPEECH,
    SONG,
    CREMA_D,
    EMODB,
    TESS,
    SAVEE,
    AUDIOFOLDER,
)
_EARLIER = {"RAVDESS": SPEECH.name, "RAVDESS song": SONG.name}  # names in manifests and features of earlier versions


def by_name(name: str) -> Corpus | None:
    """The known corpus with that name, current or earlier; None for any other name."""
    name = _EARLIER.get(name, name)
    return next((corpus for corpus in CORPORA if corpus.name == name), None)


def family_of(name: str) -> str:
    """The family of the corpus with that name; the name itself if it is unknown or has none."""
    corpus = by_name(name)
    return corpus.family if corpus and corpus.family else name


def recognised(path: PurePath, corpora: Sequence[Corpus] = CORPORA) -> tuple[Corpus, Told] | None:
    """The corpus whose file names have this form, and the facts in the name; None if no known corpus fits.

    >>> found = recognised(PurePath("x/03-01-05-02-01-02-24_angry (1).wav"))
    >>> found and (found[0].name, found[1].label, found[1].speaker, found[1].more)
    ('ravdess_speech', 'angry', 'RAVDESS_24', '_angry (1)')
    """
    for corpus in corpora:
        if (told := corpus.read(path)) is not None:
            return corpus, told
    return None
