"""Adapts a trained model to a few labelled recordings: fits a new last layer, and measures it by nested folds.

The candidates are the parent itself (`keep`), the parent with another temperature and other class biases (`biases`),
and a new last layer with an L2 penalty on its distance from that (`last layer`, with several strengths of the penalty,
called the pull). The one with the lowest cross-validated log-loss is chosen; every class has the same weight. In each
outer fold the choice is made again on the training part alone, so that no recording influences the model that answers
it. Sources: Yosinski et al. 2014 (features are transferable); Xuhong, Grandvalet & Davoine 2018, "Explicit inductive
bias for transfer learning with convolutional networks" (the penalty, L2-SP); Varma & Simon 2006, "Bias in error
estimation when using cross-validation for model selection" (nested folds).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from threadpoolctl import ThreadpoolController

from pipeline.evaluation.outcomes import Floats, Ints
from pipeline.models.doubt import log_softmax

KEEP, BIASES, LAST_LAYER, LAST_STAGE = "keep", "biases", "last layer", "last stage"
PULLS = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)  # strengths of the penalty on the distance from the parent's last layer
OUTER_FOLDS, INNER_FOLDS, MANY = 5, 4, 1500
_BIAS_PULL = 0.001
REHEARSAL = 0.3  # share of the old recordings in the loss, if they are used
_STEPS = 100  # largest number of optimiser steps
_FACTORS = np.geomspace(0.1, 2.0, 14)  # of the logits: 1 / temperature, for each temperature tried

Tell = Callable[[int, int], None]  # folds done, folds in all


@dataclass(frozen=True)
class Head:
    """A last layer: weights (C, d) and biases (C,)."""

    weight: Floats
    bias: Floats

    def logits(self, embeddings: Floats) -> Floats:
        """(n, d) -> (n, C)."""
        return np.asarray(embeddings @ self.weight.T + self.bias)


@dataclass(frozen=True)
class Recordings:
    """Labelled recordings (n,) as input of a last layer."""

    embeddings: Floats  # (n, d) penultimate features of the parent
    truth: Ints  # (n,) class indices
    groups: Ints  # (n,) group numbers; a group (a speaker, or a recording) is never on both sides of a fold

    def where(self, rows: Ints | NDArray[np.bool_]) -> Recordings:
        """The recordings of these row numbers or this mask."""
        return Recordings(self.embeddings[rows], self.truth[rows], self.groups[rows])

    def __len__(self) -> int:
        return len(self.truth)


@dataclass(frozen=True)
class Choice:
    """A candidate: kind (`KEEP`, `BIASES`, `LAST_LAYER` or `LAST_STAGE`), pull, and whether old recordings are used."""

    kind: str
    pull: float = 0.0
    rehearsal: bool = False

    @property
    def told(self) -> str:
        """The candidate in words."""
        names = {
            KEEP: "the parent unchanged",
            BIASES: "other temperature and class biases",
            LAST_STAGE: "last stage of the network trained, too",
        }
        if self.kind in names:
            return names[self.kind]
        return f"new last layer (pull {self.pull:g}{', with the old recordings' if self.rehearsal else ''})"


@dataclass(frozen=True)
class Found:
    """Out-of-fold answers of the whole procedure, and the last layer fitted on all recordings."""

    logits: Floats  # (n, C) each recording's from a model that was not trained on its group
    choices: tuple[Choice, ...]  # the candidate chosen in each fold
    choice: Choice  # the one chosen on all recordings
    head: Head  # the layer fitted on all recordings; for `keep` the parent's


@dataclass(frozen=True)
class Parent:
    """The parent model: the start of the fit, and what the result is compared with."""

    head: Head  # last layer for the new classes; for a class that the parent lacks, the mean of all its rows
    known: NDArray[np.bool_]  # (C,) which of the classes the parent has
    old: Recordings | None = None  # recordings that the parent was trained on, for rehearsal

    def answers(self, embeddings: Floats) -> Floats:
        """The parent's own logits (n, C): -inf for classes that it lacks; all 0 if it has none of the classes."""
        if not self.known.any():
            return np.zeros((len(embeddings), len(self.known)))
        return np.where(self.known, self.head.logits(embeddings), -np.inf)


def parent_of(weight: Floats, bias: Floats, theirs: Sequence[str], labels: Sequence[str]) -> Parent:
    """The parent with its last layer, (K, d) and (K,) for the classes `theirs`, rewritten for the classes `labels`."""
    known = np.array([label in theirs for label in labels])
    rows = [theirs.index(label) for label in labels if label in theirs]
    weights = np.tile(weight.mean(axis=0), (len(labels), 1))
    biases = np.full(len(labels), float(bias.mean()))
    weights[known], biases[known] = weight[rows], bias[rows]
    return Parent(Head(weights, biases), known)


def adapt(recordings: Recordings, parent: Parent, *, seed: int = 0, tell: Tell | None = None) -> Found:
    """Choose and fit the last layer on all recordings, and answer each out of fold."""
    fold_of = folds(recordings, OUTER_FOLDS, seed)
    logits, choices = out_of_fold(recordings, parent, fold_of, seed=seed, tell=tell)
    choice = choose(recordings, parent, seed)
    return Found(logits, choices, choice, fit_head(recordings, parent, choice))


def out_of_fold(
    recordings: Recordings,
    parent: Parent,
    fold_of: Ints,
    *,
    share: float = 1.0,
    choices: Sequence[Choice] = (),
    seed: int = 0,
    tell: Tell | None = None,
) -> tuple[Floats, tuple[Choice, ...]]:
    """Out-of-fold logits (n, C) of the whole procedure, and the candidate chosen in each fold.

    Args:
        fold_of: (n,) fold numbers from `folds`.
        share: share of each training part to use, for learning curves: the same of every class, at least 2 recordings.
        choices: the candidate for each fold, if already chosen.
    """
    logits = np.empty((len(recordings), len(parent.known)))
    made: list[Choice] = []
    names = np.unique(fold_of)
    for number, fold in enumerate(names):
        tested = fold_of == fold
        train = recordings.where(_some(recordings, ~tested, share, seed))
        choice = choices[number] if choices else choose(train, parent, seed)
        logits[tested] = fit_head(train, parent, choice).logits(recordings.embeddings[tested])
        if choice.kind == KEEP:
            logits[tested] = parent.answers(recordings.embeddings[tested])
        made.append(choice)
        if tell is not None:
            tell(number + 1, len(names))
    return logits, tuple(made)


def _some(recordings: Recordings, among: NDArray[np.bool_], share: float, seed: int) -> Ints:
    """Row numbers of a random share of each class among the rows of the mask `among`, at least 2 of each."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in np.unique(recordings.truth[among]):
        of_class = rng.permutation(np.flatnonzero(among & (recordings.truth == index)))
        rows.append(of_class[: max(2, round(share * len(of_class)))])
    return np.sort(np.concatenate(rows))


def folds(recordings: Recordings, most: int, seed: int) -> Ints:
    """(n,) number of the fold in which each recording is tested; groups stay together, classes are spread evenly."""
    import warnings

    from sklearn.model_selection import StratifiedGroupKFold  # takes seconds to import

    number = min(most, len(np.unique(recordings.groups)), int(np.bincount(recordings.truth).max()))
    splitter = StratifiedGroupKFold(n_splits=number, shuffle=True, random_state=seed)
    fold_of = np.zeros(len(recordings), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes with fewer recordings than folds are in some folds only
        for fold, (_, tested) in enumerate(splitter.split(recordings.embeddings, recordings.truth, recordings.groups)):
            fold_of[tested] = fold
    return fold_of


def choose(recordings: Recordings, parent: Parent, seed: int = 0) -> Choice:
    """The candidate with the lowest log-loss in inner folds of these recordings; every class has the same weight.

    From `MANY` recordings on, only one of the folds is used.
    """
    choices = [Choice(KEEP), Choice(BIASES), *(Choice(LAST_LAYER, pull) for pull in PULLS)]
    if parent.old is not None:
        choices += [replace(c, rehearsal=True) for c in choices if c.kind == LAST_LAYER]
    if len(np.unique(recordings.groups)) < 2:
        return choices[1]
    fold_of = folds(recordings, INNER_FOLDS, seed)
    names = np.unique(fold_of)[: 1 if len(recordings) >= MANY else INNER_FOLDS]
    logits = np.empty((len(choices), len(recordings), len(parent.known)))
    for fold in names:
        tested = fold_of == fold
        for number, head in enumerate(_fits(recordings.where(~tested), parent, choices)):
            logits[number, tested] = head.logits(recordings.embeddings[tested])
    answered = np.isin(fold_of, names)
    return choices[int(np.argmin([loss_of(each[answered], recordings.truth[answered]) for each in logits]))]


def loss_of(logits: Floats, truth: Ints) -> float:
    """Log-loss of logits (n, C) at the best of the tried temperatures; every class has the same weight."""
    own = np.arange(len(truth)), truth
    weights = _balance(truth)
    return min(-float(weights @ log_softmax(logits * factor)[own]) for factor in _FACTORS)


def fit_head(recordings: Recordings, parent: Parent, choice: Choice) -> Head:
    """The last layer of a candidate, fitted on all the recordings."""
    return _fits(recordings, parent, [choice])[0]


@cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()  # cached, as it searches all loaded libraries


def _fits(recordings: Recordings, parent: Parent, choices: Sequence[Choice]) -> list[Head]:
    """The last layers of several candidates, each fit started from the result of the one before it."""
    # on small matrices, the BLAS threads of a busy machine wait for each other ten times as long as they compute
    with _threads().limit(limits=1 if len(recordings) < 1000 else None, user_api="blas"):
        scaled = _biases(parent.head, recordings)
        heads: list[Head] = []
        spaces: dict[bool, _Space] = {}
        for choice in choices:
            if choice.kind == KEEP:
                heads.append(parent.head)
            elif choice.kind == BIASES:
                heads.append(scaled)
            else:
                if choice.rehearsal not in spaces:
                    spaces[choice.rehearsal] = _Space(recordings, parent.old if choice.rehearsal else None, scaled)
                heads.append(spaces[choice.rehearsal].fit(choice.pull))
        return heads


def _balance(truth: Ints) -> Floats:
    """Weights (n,) with sum 1 that give every class the same weight."""
    counts = np.bincount(truth).astype(np.float64)
    return np.asarray(1 / (counts[truth] * (counts > 0).sum()))


def _biases(head: Head, recordings: Recordings) -> Head:
    """The parent's layer times a factor, plus class biases: only C + 1 numbers are fitted."""
    logits, weights = head.logits(recordings.embeddings), _balance(recordings.truth)
    targets = np.eye(len(head.bias))[recordings.truth]

    def loss(values: Floats) -> tuple[float, Floats]:
        factor, biases = np.exp(values[0]), values[1:]
        log_p = log_softmax(factor * logits + biases)
        slope = weights[:, None] * (np.exp(log_p) - targets)
        value = -(weights[:, None] * targets * log_p).sum() + _BIAS_PULL / 2 * float(values @ values)
        return value, np.append((slope * logits).sum() * factor, slope.sum(axis=0)) + _BIAS_PULL * values

    start = np.zeros(1 + len(head.bias))
    values = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": _STEPS}).x
    factor = float(np.exp(values[0]))
    return Head(head.weight * factor, head.bias * factor + values[1:])


class _Space:
    """Fits the last layer on one set of recordings, for several pulls.

    A change of the layer lies in the span of the recordings' features, so that only its coordinates there are fitted.
    Features are centred and scaled to mean square length 1, so that a pull means the same for every network.
    """

    def __init__(self, own: Recordings, old: Recordings | None, start: Head) -> None:
        embeddings = own.embeddings if old is None else np.concatenate([own.embeddings, old.embeddings])
        truth = own.truth if old is None else np.concatenate([own.truth, old.truth])
        self.start, self.mean = start, own.embeddings.mean(axis=0)
        self.scale = float(np.sqrt(((own.embeddings - self.mean) ** 2).sum(axis=1).mean())) or 1.0
        centred = (embeddings - self.mean) / self.scale
        self.axes: Floats | None = None
        if len(centred) < centred.shape[1]:
            _, size, rows = np.linalg.svd(centred, full_matrices=False)
            self.axes = rows[size > 1e-6 * size[0]].T if size[0] > 0 else rows[:0].T
        self.weights = _balance(own.truth)
        if old is not None:
            self.weights = np.append((1 - REHEARSAL) * self.weights, REHEARSAL * _balance(old.truth))
        self.places = centred if self.axes is None else centred @ self.axes
        self.logits = start.logits(embeddings)
        self.targets = np.eye(len(start.bias))[truth]
        self.values = np.zeros(len(start.bias) * (self.places.shape[1] + 1))

    def fit(self, pull: float) -> Head:
        """The layer that minimises log-loss + pull / 2 * the squared distance from the layer at the start."""
        n_classes, weights = len(self.start.bias), self.weights[:, None]

        def loss(values: Floats) -> tuple[float, Floats]:
            change, bias = values[:-n_classes].reshape(n_classes, -1), values[-n_classes:]
            log_p = log_softmax(self.logits + self.places @ change.T + bias)
            slope = weights * (np.exp(log_p) - self.targets)
            pulled = pull * float((change**2).sum()) + _BIAS_PULL * float(bias @ bias)
            steepest = (slope.T @ self.places + pull * change).ravel()
            return (
                -(weights * self.targets * log_p).sum() + pulled / 2,
                np.append(steepest, slope.sum(axis=0) + _BIAS_PULL * bias),
            )

        options = {"maxiter": _STEPS}
        self.values = minimize(loss, self.values, jac=True, method="L-BFGS-B", options=options).x
        change, bias = self.values[:-n_classes].reshape(n_classes, -1), self.values[-n_classes:]
        weight = (change if self.axes is None else change @ self.axes.T) / self.scale
        return Head(self.start.weight + weight, self.start.bias + bias - weight @ self.mean)
