"""Adapts a parent model to a user's labelled recordings, writes the new bundle, and tests whether it is better.

Recordings that cannot be used are refused or left out with a message. Cross-validation is by speaker if there are three
or more, else by recording. The verdict compares the out-of-fold answers with the parent's: both the gain in UAR and the
UAR itself must be such that chance gives them in less than 5 % of tries. Sources: paired randomisation test (Fisher
1935; it exchanges whole speakers if there are eight or more, as recordings of one speaker are not independent);
permutation test of a classifier (Ojala & Garriga 2010). Limits: the tests say nothing about other speakers.

The last stage of a single Inception network may be trained too, at a low rate, starting from a new last layer. The
output of the layers before it is computed once per recording, so that an epoch takes a tenth of the time. Batch norms
keep the parent's statistics, as a few speakers are too few for new ones.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import softmax
from torch import Tensor, nn

from pipeline.audio.windows import Window
from pipeline.data.corpora.voices import corpora_of
from pipeline.data.labels import LabelSet
from pipeline.data.segments import HASH_COLUMN
from pipeline.data.splits import has_speakers, leaked, units_of
from pipeline.evaluation.metrics import evaluate
from pipeline.evaluation.outcomes import Floats, Ints, score_table
from pipeline.models.bundle import Bundle, load_bundle, save_bundle, set_familiarity
from pipeline.models.doubt import MIN_RECORDINGS as MIN_TO_CALIBRATE
from pipeline.models.doubt import fit_temperature
from pipeline.models.model_card import OUT_OF_FOLD, model_card
from pipeline.models.networks import MEMBERS, EnhancedInceptionModel, build_model
from pipeline.storage.errors import SerError
from pipeline.training.batches import TrainingData
from pipeline.training.config import FitConfig
from pipeline.training.embeddings import with_last_layer
from pipeline.training.last_layer import (
    LAST_STAGE,
    OUTER_FOLDS,
    Choice,
    Found,
    Head,
    Parent,
    Recordings,
    Tell,
    fit_head,
    folds,
    loss_of,
)
from pipeline.training.loop import fit
from pipeline.training.plan import earlier_training
from pipeline.training.results import headline, training_table

MIN_RECORDINGS, MIN_OF_CLASS, MIN_SPEAKERS, SPEAKERS_TO_TEST = 20, 3, 3, 8
LEVEL = 0.05  # significance level of the tests
_DRAWS = 4000
CLASSES = ("auto", "mine", "all")
MIN_MINUTES = 5.0  # the last stage is tried only with more than this
EPOCHS, RATE, BATCH = 10, 1e-4, 32
_AT_ONCE = 16


def labels_for(own: Sequence[str], theirs: Sequence[str], classes: str) -> tuple[str, ...]:
    """The classes of the adapted model, sorted.

    Args:
        own: classes of the user's recordings; theirs: of the parent.
        classes: ``mine``, ``all`` (both), or ``auto``: the parent's if they include all of the user's, else the user's.

    Raises:
        LabelError: a name that is not allowed for a class.
    """
    if classes == "all" or (classes == "auto" and set(own) <= set(theirs)):
        return LabelSet.from_names([*own, *theirs]).names
    return LabelSet.from_names(own).names


def usable(table: pd.DataFrame, parent: Bundle) -> tuple[Ints, list[str]]:
    """Numbers (m,) of the rows that can be used, and messages about the others; `table` has labels and `content_hash`.

    Raises:
        SerError: too few recordings, contradicting labels, or most classes from one speaker only.
    """
    said = []
    known = leaked(table, parent.training).to_numpy(dtype=bool)
    if known.any():
        said.append(
            f"{int(known.sum())} of {len(table)} recordings are left out: {parent.name} was trained on them, such as "
            f"{table.loc[known, 'speech'].iloc[0]}, and would look better than it is"
        )
    hashes = table[HASH_COLUMN].fillna("")
    for _, same in table[hashes != ""].groupby(HASH_COLUMN):
        if same["label"].nunique() > 1:
            raise SerError(
                f"{same['speech'].iloc[0]} is labelled {' and '.join(sorted(set(same['label'])))} (two rows with the "
                "same sound); keep one of the rows"
            )
    again = ~known & ((hashes != "") & hashes.duplicated()).to_numpy(dtype=bool)
    if again.any():
        said.append(f"{int(again.sum())} recordings have the same content as another one: these copies are left out")
    rows = np.flatnonzero(~known & ~again)
    _refuse(table.iloc[rows], said)
    return rows, said


def _refuse(table: pd.DataFrame, said: Sequence[str]) -> None:
    before = f" ({said[0]})" if said else ""
    counts = table["label"].value_counts()
    if len(table) < MIN_RECORDINGS:
        raise SerError(f"{len(table)} recordings are too few to adapt to{before}; label {MIN_RECORDINGS} or more")
    if len(counts) < 2:
        raise SerError(f"all {len(table)} recordings are {counts.index[0]}; add recordings of another class")
    few = counts[counts < MIN_OF_CLASS]
    if len(few):
        named = ", ".join(f"{name} {count}" for name, count in few.items())
        raise SerError(
            f"too few recordings of a class ({named}); label {MIN_OF_CLASS} or more (10 are better), or join it with "
            f"another class: --label_map {few.index[0]}=OTHER"
        )
    if has_speakers(table) and table["speaker"].nunique() > 1:
        speakers_of = table.groupby("label")["speaker"].nunique()
        if (speakers_of == 1).sum() * 2 > len(speakers_of):
            name = speakers_of.index[speakers_of == 1][0]
            raise SerError(
                f"most classes have one speaker only, such as {name} with "
                f"{table.loc[table['label'] == name, 'speaker'].iloc[0]}: the model would learn the voice instead of "
                "the emotion; record every class from two speakers or more"
            )


def groups_of(table: pd.DataFrame) -> tuple[Ints, str]:
    """Group number (n,) of each recording for cross-validation, and what a group is: ``speaker`` or ``recording``."""
    by_speaker = has_speakers(table) and table["speaker"].nunique() >= MIN_SPEAKERS
    names = table["speaker"].astype(str).to_numpy() if by_speaker else units_of(table)
    return pd.factorize(names)[0].astype(np.int64), "speaker" if by_speaker else "recording"


@dataclass(frozen=True)
class Verdict:
    """Figures of the parent and of the adapted model on out-of-fold answers."""

    before: float  # UAR of the parent
    after: float  # UAR of the adapted model
    p_gain: float  # p-value of the gain (randomisation test)
    p_guess: float  # p-value of the UAR `after` (permutation test)
    over: str  # what the randomisation test exchanges: speakers or recordings

    @property
    def adapted(self) -> bool:
        """Whether the new model is better, beyond chance."""
        return self.after > self.before and max(self.p_gain, self.p_guess) < LEVEL

    @property
    def told(self) -> str:
        """The verdict in one line."""
        gain = f"UAR {self.before:.1%} -> {self.after:.1%}"
        if self.adapted:
            often = f"{self.p_gain:.1%}" if self.p_gain >= 0.001 else "less than 0.1%"
            return f"adapted: {gain}; chance gives such a gain in {often} of tries (test over {self.over})"
        if self.p_guess >= LEVEL:
            return (
                f"keep the old one: the gain could be chance ({gain}); guessing is as good in {self.p_guess:.0%} of "
                "tries: are the labels in the right rows?"
            )
        return f"keep the old one: the gain could be chance ({gain}; in {self.p_gain:.0%} of tries); label more"


def judge(truth: Ints, before: Ints, after: Ints, speakers: Ints | None, *, compared: int = 1) -> Verdict:
    """Compare two sets of answers to the same recordings, (n,) class indices each.

    If the parent is worse than guessing (for example if it has none of the classes), the comparison is with guessing.

    Args:
        speakers: (n,) speaker numbers; None: unknown.
        compared: the number of models of which `after` is the best (Bonferroni correction).
    """
    counts = np.bincount(truth)
    n_classes = int((counts > 0).sum())
    weights = 1 / (n_classes * counts[truth])
    old, new = weights * (before == truth), weights * (after == truth)
    rng = np.random.default_rng(0)
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
    """The share of draws that are at least `found`; `found` itself counts as one of the draws."""
    return float((1 + (np.array(drawn) >= found - 1e-12).sum()) / (1 + len(drawn)))


def answers(table: pd.DataFrame, logits: Floats, labels: Sequence[str], temperature: float = 1.0) -> pd.DataFrame:
    """`table` with the predictions of logits (n, C) / temperature, in columns named as by `jobs.score`."""
    return score_table(table, softmax(logits / temperature, axis=1), labels)


def temperature_of(truth: Ints, logits: Floats) -> tuple[float, dict[str, Any]]:
    """The temperature fitted to out-of-fold logits (n, C), and its figures; 1 and {} if there are too few."""
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
    window: Window,
    state: Mapping[str, Tensor] | None = None,
) -> Bundle:
    """Write the adapted bundle, with model card, figures and the training recordings of the model and its parents.

    Args:
        about: the `adapted` block of its training record.
        embeddings: (n, d), penultimate features of the recordings, of their input window `window`.
        state: all weights, if more than the last layer changed; None: the parent's with the last layer of `found`.
    """
    temperature, calibration = temperature_of(truth, found.logits)
    figures = headline(evaluate(answers(table, found.logits, labels, temperature), labels))
    figures |= {"n": len(table), "trained_on": "the other folds of these recordings, beginning with the parent"}
    own = training_table({"train": table})
    start = parent.about()
    trained_on = start["trained_on"] or "unknown data"
    training: dict[str, Any] = {
        "model": parent.model_name,
        "trained_on": f"{len(table)} recordings of the user's own (its parent: {trained_on})",
        "adapted": dict(about),
        "init": start,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    if not parent.training.empty:
        own = pd.concat([own, earlier_training(parent, own)], ignore_index=True)
    blocks: dict[str, Any] = {"training": training, OUT_OF_FOLD: figures}
    if calibration:
        blocks["calibration"] = {"temperature": temperature, **calibration}
    name, features = out.resolve().name, replace(parent.features, window=window)
    bundle = save_bundle(
        out,
        name=name,
        state_dict=with_last_layer(parent, found.head.weight, found.head.bias) if state is None else state,
        model_name=parent.model_name,
        model_options=parent.model_options,
        labels=labels,
        features=features,
        crops=parent.crops if window == parent.features.window else 1,
        temperature=temperature,
        metrics=blocks,
        training=own,
        corpora={**parent.corpora, **_own_corpora(table)},
        card=model_card(name, labels, features, training, {OUT_OF_FOLD: figures}, table),
    )
    if state is None and parent.familiarity is not None:  # with other weights the embeddings, too, are others
        set_familiarity(bundle, parent.familiarity.widened(embeddings.astype(np.float32)))
    return load_bundle(out)


def _own_corpora(table: pd.DataFrame) -> dict[str, list[str]]:
    names, corpus_of = corpora_of(table)
    return {name or "own": sorted(set(table["label"][corpus_of == k])) for k, name in enumerate(names)}


def can_be_tuned(bundle: Bundle) -> bool:
    """Whether the last stage of a bundle's network can be trained: only that of a single inception network."""
    return bundle.model_name == "inception" and MEMBERS not in bundle.model_options


class Tail(nn.Module):
    """The last stage and the last layer: (B, channels, H, W) -> (B, C) logits."""

    def __init__(self, model: EnhancedInceptionModel) -> None:
        super().__init__()
        self.stage5, self.head = model.stage5, model.head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stage5(x))
        return logits

    def train(self, mode: bool = True) -> Tail:
        """As in any module, but batch norms stay in evaluation mode and keep their statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def compete(
    found: Found,
    recordings: Recordings,
    parent: Parent,
    bundle: Bundle,
    features: np.ndarray,
    *,
    minutes: float,
    seed: int = 0,
    threads: int = 0,
    tell: Tell | None = None,
) -> tuple[Found, Mapping[str, Tensor] | None, float]:
    """Train the last stage too, and choose between it and the new last layer by out-of-fold log-loss.

    Args:
        found: the result of `last_layer.adapt` with this `seed`.
        features: (n, *input_shape) of the recordings.

    Returns:
        The better result; the network's weights if that is the last stage, else None; and the minutes needed if
        `minutes` are too few, else 0.
    """
    started = time.monotonic()
    given = before_tail(bundle, features)
    fold_of = folds(recordings, OUTER_FOLDS, seed)
    names = np.unique(fold_of)
    logits = np.empty_like(found.logits)
    for number, fold in enumerate(names):
        rows = np.flatnonzero(fold_of != fold)
        head = fit_head(recordings.where(rows), parent, found.choices[number])
        state = tune(bundle, head, given, recordings.truth, rows, seed=seed, threads=threads)
        logits[fold_of == fold] = tail_logits(bundle, state, given[fold_of == fold])
        if tell is not None:
            tell(number + 1, len(names) + 1)
        needed = (time.monotonic() - started) / (number + 1) * (len(names) + 1) / 60
        if needed > minutes:
            return found, None, needed
    if loss_of(logits, recordings.truth) >= loss_of(found.logits, recordings.truth):
        return found, None, 0.0
    state = tune(bundle, found.head, given, recordings.truth, np.arange(len(recordings)), seed=seed, threads=threads)
    return replace(found, logits=logits, choice=Choice(LAST_STAGE)), state, 0.0


def before_tail(bundle: Bundle, features: np.ndarray) -> np.ndarray:
    """The input of the last stage: float32 features (n, 1, n_mels, frames) -> (n, channels, H, W)."""
    model = bundle.build_model()
    assert isinstance(model, EnhancedInceptionModel)
    front = nn.Sequential(model.stem, model.stage3, model.stage4).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = []
    with torch.inference_mode():
        for start in range(0, len(features), _AT_ONCE):
            batch = torch.from_numpy(np.ascontiguousarray(features[start : start + _AT_ONCE]))
            found.append(front(batch.contiguous(memory_format=torch.channels_last)).contiguous())
    return torch.cat(found).numpy()


def tune(
    bundle: Bundle, head: Head, given: np.ndarray, truth: Ints, rows: Ints, *, seed: int = 0, threads: int = 0
) -> Mapping[str, Tensor]:
    """Train the last stage on some of the recordings; returns the weights of the whole network.

    Args:
        head: the last layer to start from.
        given: (n, channels, H, W) of `before_tail`; truth: (n,) class indices; rows: the rows to train on.
    """
    model = _network(bundle, with_last_layer(bundle, head.weight, head.bias))
    data = TrainingData(bundle.features, given, truth, len(head.bias), rows, np.empty(0, np.int64))
    config = FitConfig(
        epochs=EPOCHS,
        batch_size=min(BATCH, len(rows)),
        lr=RATE,
        weight_decay=0.01,
        warmup_epochs=1.0,
        label_smoothing=0.1,
        seed=seed,
        threads=threads,
    )
    tail = Tail(model)
    tail.load_state_dict(fit(tail, data, config).weights)
    return model.eval().state_dict()


def _network(bundle: Bundle, state: Mapping[str, Tensor]) -> EnhancedInceptionModel:
    """The bundle's network with other weights, perhaps for another number of classes."""
    n_classes = len(list(state.values())[-1])
    model = build_model(bundle.model_name, dict(bundle.model_options), n_classes, bundle.features.input_shape)
    assert isinstance(model, EnhancedInceptionModel)
    model.load_state_dict(state)
    return model


def tail_logits(bundle: Bundle, state: Mapping[str, Tensor], given: np.ndarray) -> Floats:
    """Logits (n, C) of a tuned network for the output of `before_tail` (n, channels, H, W)."""
    tail = Tail(_network(bundle, state)).eval()
    with torch.inference_mode():
        parts = [tail(torch.from_numpy(given[i : i + 64])) for i in range(0, len(given), 64)]
    return torch.cat(parts).double().numpy()
