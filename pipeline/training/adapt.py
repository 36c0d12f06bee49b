"""From somebody's labelled recordings to a bundle of their own, with figures that say whether it was worth it.

What cannot be adapted to is refused, what is doubtful said. Cross-validation is by speaker where there are three or
more, else by recording. The verdict compares the out-of-fold answers with the parent's: the gain in UAR must be one
that chance gives in less than one of twenty tries, and so must be the UAR itself. Sources: paired randomisation test
(Fisher 1935; of whole speakers where there are eight or more, as recordings of one voice are not independent);
permutation test of a classifier (Ojala & Garriga 2010). Limits: the tests know the speakers who are there.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import softmax

from pipeline.data.segments import HASH_COLUMN
from pipeline.data.splits import has_speakers, leaked, units_of
from pipeline.evaluation.metrics import evaluate
from pipeline.evaluation.outcomes import Floats, Ints
from pipeline.models.bundle import Bundle, load_bundle, save_bundle, set_familiarity
from pipeline.models.doubt import MIN_RECORDINGS as MIN_TO_CALIBRATE
from pipeline.models.doubt import fit_temperature
from pipeline.models.model_card import OUT_OF_FOLD, model_card
from pipeline.storage.errors import SerError
from pipeline.training.embeddings import with_last_layer
from pipeline.training.last_layer import Found
from pipeline.training.plan import about_start, earlier_training
from pipeline.training.results import headline, training_table

MIN_RECORDINGS, MIN_OF_CLASS, MIN_SPEAKERS, SPEAKERS_TO_TEST = 20, 3, 3, 8
LEVEL = 0.05  # how often chance may give what counts as a gain
_DRAWS = 4000
CLASSES = ("auto", "mine", "all")


def labels_for(own: Sequence[str], theirs: Sequence[str], classes: str) -> tuple[str, ...]:
    """The classes of the adapted model, sorted.

    Args:
        own: of the user's recordings; theirs: of the parent.
        classes: ``mine``, ``all`` (both), or ``auto``: the parent's where it has all of the user's, else the user's.
    """
    if classes == "all" or (classes == "auto" and set(own) <= set(theirs)):
        return tuple(sorted({*own, *theirs}))
    return tuple(sorted(set(own)))


def usable(table: pd.DataFrame, parent: Bundle) -> tuple[Ints, list[str]]:
    """Numbers (m,) of the rows that a parent can be adapted to, and what should be said of the others.

    Args:
        table: labelled manifest with `content_hash`.

    Raises:
        SerError: too little, or labels that go with the voice instead of the emotion.
    """
    said = []
    known = leaked(table, parent.training).to_numpy(dtype=bool)
    if known.any():
        said.append(
            f"{int(known.sum())} of {len(table)} recordings are left out: {parent.name} was trained on them, as "
            f"{table.loc[known, 'speech'].iloc[0]}, and would look better than it is"
        )
    hashes = table[HASH_COLUMN].fillna("")
    for _, same in table[hashes != ""].groupby(HASH_COLUMN):
        if same["label"].nunique() > 1:
            raise SerError(
                f"{same['speech'].iloc[0]} is labelled {' and '.join(sorted(set(same['label'])))} (the same sound "
                "twice); keep one of the rows"
            )
    again = ~known & ((hashes != "") & hashes.duplicated()).to_numpy(dtype=bool)
    if again.any():
        said.append(f"{int(again.sum())} recordings are there twice, by content: the copies are left out")
    rows = np.flatnonzero(~known & ~again)
    _refuse(table.iloc[rows], said)
    return rows, said


def _refuse(table: pd.DataFrame, said: Sequence[str]) -> None:
    before = f" ({said[0]})" if said else ""
    counts = table["label"].value_counts()
    if len(table) < MIN_RECORDINGS:
        raise SerError(f"{len(table)} recordings are too few to adapt to{before}; label {MIN_RECORDINGS} or more")
    if len(counts) < 2:
        raise SerError(f"all {len(table)} recordings are {counts.index[0]}; label recordings of another class, too")
    few = counts[counts < MIN_OF_CLASS]
    if len(few):
        named = ", ".join(f"{name} {count}" for name, count in few.items())
        raise SerError(
            f"too few recordings of a class ({named}); label {MIN_OF_CLASS} or more (10 are better), or give it "
            f"another class's name with --label_map {few.index[0]}=wanted"
        )
    if has_speakers(table) and table["speaker"].nunique() > 1:
        voices = table.groupby("label")["speaker"].nunique()
        if (voices == 1).sum() * 2 > len(voices):
            name = voices.index[voices == 1][0]
            raise SerError(
                f"most classes have one speaker only, as {name} {table.loc[table['label'] == name, 'speaker'].iloc[0]}"
                ": the voice would be learnt instead of the emotion; record every class from two speakers or more"
            )


def groups_of(table: pd.DataFrame) -> tuple[Ints, str]:
    """What must stay together in folds, (n,) numbers, and in words: ``speaker`` or ``recording``."""
    by_speaker = has_speakers(table) and table["speaker"].nunique() >= MIN_SPEAKERS
    names = table["speaker"].astype(str).to_numpy() if by_speaker else units_of(table)
    return pd.factorize(names)[0].astype(np.int64), "speaker" if by_speaker else "recording"


@dataclass(frozen=True)
class Verdict:
    """Whether the adapted model is better than its parent, by out-of-fold answers.

    Attributes:
        before, after: UAR of the parent and of the adapted model.
        p_gain: how often chance gives such a gain; p_guess: and such a UAR, to somebody who guesses.
        over: what the first of the two exchanges, ``speakers`` or ``recordings``.
    """

    before: float
    after: float
    p_gain: float
    p_guess: float
    over: str

    @property
    def adapted(self) -> bool:
        """Whether to take the new model."""
        return self.after > self.before and max(self.p_gain, self.p_guess) < LEVEL

    @property
    def told(self) -> str:
        """In one line."""
        gain = f"UAR {self.before:.1%} -> {self.after:.1%}"
        if self.adapted:
            often = f"{self.p_gain:.1%}" if self.p_gain >= 0.001 else "less than 0.1%"
            return f"adapted: {gain}; chance gives such a gain in {often} of tries (exchanging {self.over})"
        if self.p_guess >= LEVEL:
            return (
                f"keep the old one: the gain could be chance ({gain}); guessing does as well in {self.p_guess:.0%} of "
                "tries: are the labels in the right rows?"
            )
        return f"keep the old one: the gain could be chance ({gain}; in {self.p_gain:.0%} of tries); label more"


def judge(
    truth: Ints, before: Ints, after: Ints, speakers: Ints | None, *, compared: int = 1, seed: int = 0
) -> Verdict:
    """Compare two sets of answers, (n,) class indices each, to the same recordings.

    A parent that does worse than a guess (as one that knows none of the classes) is no measure: the guess is.

    Args:
        speakers: (n,) numbers; None: not known.
        compared: how many sets of answers `after` is the best of (Bonferroni).
    """
    counts = np.bincount(truth)
    n_classes = int((counts > 0).sum())
    weights = 1 / (n_classes * counts[truth])
    old, new = weights * (before == truth), weights * (after == truth)
    rng = np.random.default_rng(seed)
    by_speaker = speakers is not None and len(np.unique(speakers)) >= SPEAKERS_TO_TEST
    units = speakers if by_speaker and speakers is not None else np.arange(len(truth))
    differences = np.bincount(units, weights=new - old)
    differences = differences[differences != 0]
    exchanged = [float(differences @ rng.choice([-1.0, 1.0], len(differences))) for _ in range(_DRAWS)]
    guessed = [
        float(weights[row] @ (after == truth[row])) for row in (rng.permutation(len(truth)) for _ in range(_DRAWS))
    ]
    p_gain, p_guess = _share(exchanged, differences.sum()), _share(guessed, new.sum())
    if old.sum() < 1 / n_classes:
        p_gain = p_guess
    over = "speakers" if by_speaker else "recordings"
    p_gain, p_guess = min(1.0, compared * p_gain), min(1.0, compared * p_guess)
    return Verdict(max(float(old.sum()), 1 / n_classes), float(new.sum()), p_gain, p_guess, over)


def _share(drawn: Sequence[float], found: float) -> float:
    """How often chance gives as much as was found, which counts as one of the draws."""
    return float((1 + (np.array(drawn) >= found - 1e-12).sum()) / (1 + len(drawn)))


def answers(table: pd.DataFrame, logits: Floats, labels: Sequence[str], temperature: float = 1.0) -> pd.DataFrame:
    """A scores table of logits (n, C), as `score` would write it."""
    p = softmax(logits / temperature, axis=1)
    found = table.drop(columns=["status", "error"], errors="ignore").assign(
        status="ok",
        error="",
        label_name=table["label"],
        predicted=np.array(labels)[p.argmax(axis=1)],
        confidence=p.max(axis=1),
    )
    return found.assign(**{f"p_{name}": p[:, i] for i, name in enumerate(labels)})


def temperature_of(truth: Ints, logits: Floats) -> tuple[float, dict[str, Any]]:
    """The temperature that suits out-of-fold logits (n, C), and the figures of it; 1 where they are too few."""
    if len(truth) < MIN_TO_CALIBRATE:
        return 1.0, {}
    found = fit_temperature(truth, softmax(logits, axis=1))
    return found.temperature, {"n": found.n, "before": found.before, "after": found.after}


def write(
    out: Path,
    parent: Bundle,
    table: pd.DataFrame,
    labels: Sequence[str],
    found: Found,
    *,
    about: Mapping[str, Any],
    truth: Ints,
    embeddings: Floats,
    state: Mapping[str, torch.Tensor] | None = None,
) -> Bundle:
    """The adapted bundle, with card, figures and the recordings that it and its parents have learnt from.

    Args:
        about: the `adapted` block of its training record.
        embeddings: (n, d), penultimate features of the recordings.
        state: other weights than the parent's with another last layer.
    """
    temperature, calibration = temperature_of(truth, found.logits)
    figures = headline(evaluate(answers(table, found.logits, labels, temperature), labels)) | {"n": len(table)}
    own = training_table({"train": table})
    start = about_start(parent.folder)
    before = start["init"].get("trained_on") if isinstance(start["init"], dict) else None
    training: dict[str, Any] = {
        "model": parent.model_name,
        "trained_on": f"{len(table)} recordings of the user's own (its parent: {before or 'unknown data'})",
        "adapted": dict(about),
        **start,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    if not parent.training.empty:
        own = pd.concat([own, earlier_training(parent.folder, own)], ignore_index=True)
    figures |= {"trained_on": "the other folds of these recordings, beginning with the parent"}
    blocks: dict[str, Any] = {"training": training, OUT_OF_FOLD: figures}
    if calibration:
        blocks["calibration"] = {"temperature": temperature, **calibration}
    name = out.resolve().name
    bundle = save_bundle(
        out,
        name=name,
        state_dict=with_last_layer(parent, found.head.weight, found.head.bias) if state is None else state,
        model_name=parent.model_name,
        model_options=parent.model_options,
        labels=labels,
        features=parent.features,
        crops=parent.crops,
        temperature=temperature,
        metrics=blocks,
        training=own,
        corpora={**parent.corpora, **_own_corpora(table)},
        card=model_card(name, labels, parent.features, training, {OUT_OF_FOLD: figures}, table),
    )
    if state is None and parent.familiarity is not None:  # else the features are no longer those that it knows
        set_familiarity(bundle, parent.familiarity.widened(embeddings.astype(np.float32)))
    return load_bundle(out)


def _own_corpora(table: pd.DataFrame) -> dict[str, list[str]]:
    names = table["corpus"].fillna("").astype(str) if "corpus" in table.columns else pd.Series("", index=table.index)
    return {name or "own": sorted(set(rows)) for name, rows in table["label"].groupby(names)}
