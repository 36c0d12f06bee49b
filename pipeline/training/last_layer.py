"""A trained model made somebody's own: a new last layer on a few labelled recordings, and whether that was worth it.

The network stays but for its last layer, which maps a recording's penultimate features (1,024 of the Inception) to the
classes and is fitted anew. Three kinds of answers compete: the parent's (`keep`), the parent's with another
temperature and other class biases (`biases`), and a last layer that is pulled towards those (`last layer`, by how much:
several). The choice is by cross-validated log-loss, every class counting alike. The figures are those of the whole
procedure: in each outer fold the choice is made again, on the training part alone, so that no recording has a say in
the model that answers it. Sources: Yosinski et al. 2014 (features carry over); Xuhong, Grandvalet & Davoine 2018,
"Explicit inductive bias for transfer learning with convolutional networks" (the pull towards the parent, L2-SP);
Varma & Simon 2006, "Bias in error estimation when using cross-validation for model selection" (nested folds).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, wraps

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from threadpoolctl import ThreadpoolController

from pipeline.evaluation.outcomes import Floats, Ints

KEEP, BIASES, LAST_LAYER, LAST_STAGE = "keep", "biases", "last layer", "last stage"
PULLS = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)  # of the last layer towards the parent's
OUTER_FOLDS, INNER_FOLDS, MANY = 5, 4, 1500
_BIAS_PULL = 0.001
REHEARSAL = 0.3  # share of the loss that the old recordings make up, where they are heard too
_STEPS = 100  # of the optimiser
_FACTORS = np.geomspace(0.1, 2.0, 14)  # of logits: one over the temperatures that are tried

Tell = Callable[[int, int], None]  # folds done, folds in all


@dataclass(frozen=True)
class Head:
    """A last layer: weights (C, d) and biases (C,); classes that it does not know have bias -inf."""

    weight: Floats
    bias: Floats

    def logits(self, embeddings: Floats) -> Floats:
        """(n, d) -> (n, C)."""
        return np.asarray(embeddings @ self.weight.T + self.bias)


@dataclass(frozen=True)
class Recordings:
    """Labelled recordings as a last layer gets them.

    Attributes:
        embeddings: (n, d), what the parent's last layer is given.
        truth: (n,) class indices.
        groups: (n,) what must not be on both sides of a fold: the speaker, or the recording itself.
    """

    embeddings: Floats
    truth: Ints
    groups: Ints

    def where(self, rows: Ints | NDArray[np.bool_]) -> Recordings:
        """Some of them."""
        return Recordings(self.embeddings[rows], self.truth[rows], self.groups[rows])

    def __len__(self) -> int:
        return len(self.truth)


@dataclass(frozen=True)
class Choice:
    """What is fitted: `KEEP`, `BIASES` or `LAST_LAYER`; the pull towards the parent; with the old recordings too?"""

    kind: str
    pull: float = 0.0
    rehearsal: bool = False

    @property
    def told(self) -> str:
        """In words."""
        names = {
            KEEP: "the parent as it is",
            BIASES: "other temperature and class biases",
            LAST_STAGE: "last stage of the network trained, too",
        }
        if self.kind in names:
            return names[self.kind]
        return f"new last layer (pull {self.pull:g}{', with the old recordings' if self.rehearsal else ''})"


@dataclass(frozen=True)
class Found:
    """Out-of-fold answers of the whole procedure, and the last layer of all recordings.

    Attributes:
        logits: (n, C) of each recording, by a model that has not heard its group.
        choices: what was chosen in each fold.
        choice, head: what was chosen and fitted on all; the parent's own where that is `keep`.
    """

    logits: Floats
    choices: tuple[Choice, ...]
    choice: Choice
    head: Head


@dataclass(frozen=True)
class Parent:
    """Where the fit begins, and what it is compared with.

    Attributes:
        head: of the new classes; where the parent does not know one, its weights are the mean of the others'.
        known: (C,) which of the classes the parent knows.
        old: recordings that the parent was trained on, for rehearsal; None: none at hand.
    """

    head: Head
    known: NDArray[np.bool_]
    old: Recordings | None = None

    def answers(self, embeddings: Floats) -> Floats:
        """The parent's own logits (n, C), -inf of what it does not know; 0 where it knows none of the classes."""
        if not self.known.any():
            return np.zeros((len(embeddings), len(self.known)))
        return np.where(self.known, self.head.logits(embeddings), -np.inf)


def parent_of(weight: Floats, bias: Floats, theirs: Sequence[str], labels: Sequence[str]) -> Parent:
    """The parent's last layer, weights (K, d) and biases (K,) of the classes `theirs`, for the classes `labels`."""
    known = np.array([label in theirs for label in labels])
    rows = [theirs.index(label) for label in labels if label in theirs]
    weights = np.tile(weight.mean(axis=0), (len(labels), 1))
    biases = np.full(len(labels), float(bias.mean()))
    weights[known], biases[known] = weight[rows], bias[rows]
    return Parent(Head(weights, biases), known)


def adapt(recordings: Recordings, parent: Parent, *, seed: int = 0, tell: Tell | None = None) -> Found:
    """Fit, choose, and answer every recording by a model that has not heard its group."""
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
    """Logits (n, C) of the whole procedure, each fold answered by the others; and what was chosen in each.

    Args:
        fold_of: (n,) as `folds` gives it.
        share: of each training part that is used, for learning curves: the same of every class, two at least.
        choices: of each fold, where they are made already.
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
    """Row numbers of a share of each class of the rows `among`."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in np.unique(recordings.truth[among]):
        of_class = rng.permutation(np.flatnonzero(among & (recordings.truth == index)))
        rows.append(of_class[: max(2, round(share * len(of_class)))])
    return np.sort(np.concatenate(rows))


def folds(recordings: Recordings, most: int, seed: int) -> Ints:
    """(n,) number of the fold that each recording is tested in; groups stay together, classes are spread evenly."""
    import warnings

    from sklearn.model_selection import StratifiedGroupKFold  # takes seconds to import

    number = min(most, len(np.unique(recordings.groups)), int(np.bincount(recordings.truth).max()))
    splitter = StratifiedGroupKFold(n_splits=number, shuffle=True, random_state=seed)
    fold_of = np.zeros(len(recordings), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with fewer recordings than folds: they are in some folds only
        for fold, (_, tested) in enumerate(splitter.split(recordings.embeddings, recordings.truth, recordings.groups)):
            fold_of[tested] = fold
    return fold_of


def choose(recordings: Recordings, parent: Parent, seed: int = 0) -> Choice:
    """The choice of the lowest log-loss in folds of these recordings, every class counting alike.

    Of `MANY` recordings one of the folds is enough.
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
    told = np.isin(fold_of, names)
    return choices[int(np.argmin([loss_of(each[told], recordings.truth[told]) for each in logits]))]


def loss_of(logits: Floats, truth: Ints) -> float:
    """Log-loss of logits (n, C), every class counting alike, at the temperature that suits them best."""
    own = np.arange(len(truth)), truth
    weights = _balance(truth)
    return min(-float(weights @ _log_softmax(logits * factor)[own]) for factor in _FACTORS)


def fit_head(recordings: Recordings, parent: Parent, choice: Choice) -> Head:
    """The last layer of a choice, fitted to all the recordings."""
    return _fits(recordings, parent, [choice])[0]


@cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all loaded libraries


def _one_thread(function: Callable[..., list[Head]]) -> Callable[..., list[Head]]:
    """On small matrices threads of a busy machine wait for each other ten times as long as they compute."""

    @wraps(function)
    def alone(recordings: Recordings, *rest: object) -> list[Head]:
        with _threads().limit(limits=1 if len(recordings) < 1000 else None, user_api="blas"):
            return function(recordings, *rest)

    return alone


@_one_thread
def _fits(recordings: Recordings, parent: Parent, choices: Sequence[Choice]) -> list[Head]:
    """The last layers of several choices, each begun where the one before it ended."""
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


def _log_softmax(logits: Floats) -> Floats:
    """As SciPy's of each row (n, C), at a fifth of its cost for a few rows."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _balance(truth: Ints) -> Floats:
    """Weights (n,) of sum 1 that let every class count alike."""
    counts = np.bincount(truth).astype(np.float64)
    return np.asarray(1 / (counts[truth] * (counts > 0).sum()))


def _biases(head: Head, recordings: Recordings) -> Head:
    """The parent's layer times a factor, plus biases: two numbers more than there are classes decide nothing else."""
    logits, weights = head.logits(recordings.embeddings), _balance(recordings.truth)
    targets = np.eye(len(head.bias))[recordings.truth]

    def loss(values: Floats) -> tuple[float, Floats]:
        factor, biases = np.exp(values[0]), values[1:]
        log_p = _log_softmax(factor * logits + biases)
        slope = weights[:, None] * (np.exp(log_p) - targets)
        value = -(weights[:, None] * targets * log_p).sum() + _BIAS_PULL / 2 * float(values @ values)
        return value, np.append((slope * logits).sum() * factor, slope.sum(axis=0)) + _BIAS_PULL * values

    start = np.zeros(1 + len(head.bias))
    values = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": _STEPS}).x
    factor = float(np.exp(values[0]))
    return Head(head.weight * factor, head.bias * factor + values[1:])


class _Space:
    """Fits of one set of recordings: a change of the last layer lies in the span of their features, not in all of it.

    Features are centred and have mean square 1 a recording, so that a pull means the same for every network.
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
        """The layer that minimises log-loss + pull / 2 * the squared distance from where it began."""
        n_classes, weights = len(self.start.bias), self.weights[:, None]

        def loss(values: Floats) -> tuple[float, Floats]:
            change, bias = values[:-n_classes].reshape(n_classes, -1), values[-n_classes:]
            log_p = _log_softmax(self.logits + self.places @ change.T + bias)
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
