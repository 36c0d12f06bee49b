"""Augmented batches for training, and the weighted sampler that balances classes and corpora.

Batches are read from memory-mapped arrays in the worker itself: this takes a small part of a training step, so there
are no loader processes.

Each epoch is one global stream of draws with replacement (`torch.multinomial`, as in
`torch.utils.data.WeightedRandomSampler`), which depends only on (seed, epoch). A global batch is `batch_size`
consecutive draws, of which each of W workers takes an equal part, so that 1, 2 or 4 workers together read the same.
Limits: W must divide the batch size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.data.corpora.voices import corpora_of
from pipeline.data.labels import LabelSet
from pipeline.features.features import FeatureConfig
from pipeline.features.store import FeatureArrays, Stacked
from pipeline.storage.errors import SerError
from pipeline.training.augment import POWER_NAMES, AugmentConfig, Augmenter, Draws


def parse_class_values(
    given: str | Mapping[str, float], labels: LabelSet, option: str = "--oversample_boost"
) -> dict[int, float]:
    """Read `CLASS:VALUE,...`; a class is an index or a name: "1:2.0,sad:1.5" -> {1: 2.0, 6: 1.5}.

    `given` may also be a mapping from classes to values; its names may contain commas.

    Raises:
        SerError: another form, an unknown class, a class given twice, or a value that is not a positive number.
    """
    values: dict[int, float] = {}
    for name, number in pairs(given, option) if isinstance(given, str) else given.items():
        index = labels.index(name)
        if index in values:
            raise SerError(f"{option}: class {labels.names[index]!r} is given twice; give it once")
        values[index] = number
    return values


def pairs(
    text: str, option: str, expected: str = "CLASS:FACTOR with a factor above 0, as in 1:2.0,sad:1.5"
) -> Iterator[tuple[str, float]]:
    """Yield the (name, number) pairs of ``name:number,...``.

    Raises:
        SerError: a part of another form, or a number that is not above 0 and finite; the message names ``expected``.
    """
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, separator, value = item.rpartition(":")
        try:
            number = float(value) if separator else float("nan")
        except ValueError:
            number = float("nan")
        if not (0 < number < float("inf")):
            raise SerError(f"{option}: got {item!r}, expected {expected}")
        yield name.strip(), number


def class_weights(classes: np.ndarray, n_classes: int) -> np.ndarray:
    """Inverse-frequency weights (C,): n / (C_present * count), mean 1 over the clips; 0 for a class without clips."""
    counts = np.bincount(classes, minlength=n_classes).astype(np.float64)
    present = counts > 0
    weights = np.zeros(n_classes)
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights


def shares_of(
    given: Mapping[str, float], corpora: Sequence[str], trained: Collection[str] | None = None
) -> np.ndarray | None:
    """The share (K,) that each of `corpora` has in the draws; None if none are given. Those not `trained` get 0.

    Raises:
        SerError: a share for an unknown corpus, or a training corpus without a share.
    """
    if not given:
        return None
    for name in given:
        if name not in corpora:
            raise SerError(f"--corpus_share: no corpus {name!r} in the recordings; choose from {', '.join(corpora)}")
    trained = corpora if trained is None else trained
    for name in trained:
        if name not in given:
            raise SerError(
                f"--corpus_share has no share for {name or 'the recordings without a corpus'}; name every corpus"
            )
    shares = np.array([given[name] if name in trained else 0.0 for name in corpora])
    found: np.ndarray = shares / shares.sum()
    return found


@dataclass(frozen=True)
class WeightedSampler:
    """Weighted draws with replacement, which do not depend on the number of workers."""

    weights: np.ndarray  # (n,) unnormalised draw probability of each clip
    batch_size: int  # draws in a batch, over all workers; every batch is full
    seed: int = 0
    n_draws: int = 0  # draws in an epoch, rounded up to whole batches; 0: as many as there are clips

    def __post_init__(self) -> None:
        if self.batch_size < 1 or len(self.weights) == 0:
            raise SerError(
                f"cannot draw batches of {self.batch_size} from {len(self.weights)} clips; both must be at least 1"
            )
        if not np.isfinite(self.weights).all() or self.weights.min() < 0 or self.weights.sum() <= 0:
            raise SerError("sampling weights must be finite, not negative, and not all 0")

    @classmethod
    def balanced(
        cls,
        classes: np.ndarray,
        n_classes: int,
        *,
        batch_size: int,
        seed: int = 0,
        boosts: dict[int, float] | None = None,
        corpora: np.ndarray | None = None,
        shares: np.ndarray | None = None,
        n_draws: int = 0,
    ) -> WeightedSampler:
        """A sampler that draws every class of a corpus equally often, then each class times its boost.

        Args:
            classes: (n,) int, the class of each clip.
            corpora: (n,) int, the corpus of each clip; None: all are of one corpus.
            shares: (K,) share of each corpus in the draws, before boosts; by default in proportion to the square root
                of its number of clips.
        """
        weights = np.zeros(len(classes))
        corpora = np.zeros(len(classes), np.int64) if corpora is None else corpora
        present = np.unique(corpora)
        for corpus in present:
            of_it = corpora == corpus
            weights[of_it] = class_weights(classes[of_it], n_classes)[classes[of_it]]
            if len(present) > 1:
                share = np.sqrt(of_it.sum()) if shares is None else shares[corpus]
                weights[of_it] *= share / of_it.sum()  # class_weights have mean 1 over the clips
        factors = np.ones(n_classes)
        for index, factor in (boosts or {}).items():
            factors[index] = factor
        return cls(weights * factors[classes], batch_size, seed, n_draws)

    def __len__(self) -> int:
        """Number of global batches in an epoch."""
        return -(-(self.n_draws or len(self.weights)) // self.batch_size)

    def draws(self, epoch: int) -> np.ndarray:
        """All draws of an epoch, in order: (len(self) * batch_size,) int64 indices of clips."""
        seed = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0] >> 1
        generator = torch.Generator().manual_seed(int(seed))
        weights = torch.as_tensor(self.weights, dtype=torch.float64)
        n_draws = len(self) * self.batch_size
        drawn: np.ndarray = torch.multinomial(weights, n_draws, replacement=True, generator=generator).numpy()
        return drawn

    def part(self, world: int) -> int:
        """Examples that each of `world` workers gets of a global batch. Raise SerError if that is no whole number."""
        if self.batch_size % world:
            raise SerError(
                f"batch size {self.batch_size} cannot be shared by {world} workers; make it a multiple of {world}"
            )
        return self.batch_size // world

    def positions(self, rank: int = 0, world: int = 1) -> Iterator[np.ndarray]:
        """One worker's part of each global batch, as positions in `draws(epoch)`: (batch_size / world,) int64."""
        part = self.part(world)
        for batch in range(len(self)):
            start = batch * self.batch_size + rank * part
            yield np.arange(start, start + part)


Rows = NDArray[np.int64]


@dataclass(frozen=True)
class TrainingData:
    """Features of all clips, and the row numbers of the training and of the validation part."""

    config: FeatureConfig
    features: NDArray[np.float32] | Stacked  # (n, *config.input_shape)
    classes: Rows  # (n,) class numbers
    n_classes: int
    train_rows: Rows
    valid_rows: Rows  # may be empty
    mel_power: NDArray[np.floating] | Stacked | None = None  # (n, n_mels, most frames)
    n_frames: Rows | None = None  # (n,) valid frames of mel_power
    copies: Mapping[int, Rows] | None = None  # row -> rows of its pitch-shifted copies
    corpora: tuple[str, ...] = ("",)
    corpus_of: Rows | None = None  # (n,) index in `corpora`; None: all clips are of one corpus
    corpus_classes: NDArray[np.bool_] | None = None  # (K, C) the classes that each corpus has; None: all classes

    def __post_init__(self) -> None:
        if len(self.train_rows) == 0:
            raise SerError("the training part has no readable clip; check the manifest and the split")
        shared = np.intersect1d(self.train_rows, self.valid_rows)
        if len(shared):
            raise SerError(f"{len(shared)} clips are in both the training and the validation part; split again")

    def allowed(self, rows: Rows) -> Tensor | None:
        """(len(rows), C) bool: the classes that each clip's corpus has; None if every corpus has all classes."""
        if self.corpus_of is None or self.corpus_classes is None or self.corpus_classes.all():
            return None
        return torch.from_numpy(self.corpus_classes[self.corpus_of[rows]])


def from_arrays(
    arrays: FeatureArrays, classes: Rows, n_classes: int, train_rows: Rows, valid_rows: Rows
) -> TrainingData:
    """Training data of extracted features; `classes` (n,) and the row numbers refer to `arrays.features`.

    The classes of a corpus are those of all its recordings, in any part.
    """
    corpora, corpus_of = corpora_of(arrays.table)
    present = np.zeros((len(corpora), n_classes), bool)
    present[corpus_of, classes] = True
    return TrainingData(
        config=arrays.config,
        features=arrays.features,
        classes=classes,
        n_classes=n_classes,
        train_rows=train_rows,
        valid_rows=valid_rows,
        mel_power=arrays.mel_power,
        n_frames=arrays.n_frames,
        copies=pitch_copies(arrays.table),
        corpora=corpora,
        corpus_of=corpus_of,
        corpus_classes=present,
    )


def pitch_copies(table: pd.DataFrame) -> dict[int, Rows]:
    """Row -> rows ``(k,)`` of its k pitch-shifted copies, where it has some; from the columns row_id and parent_id."""
    if "parent_id" not in table.columns:
        return {}
    row_of = {row_id: row for row, row_id in enumerate(table["row_id"])}
    copies: dict[int, list[int]] = {}
    for row, parent in enumerate(table["parent_id"]):
        if pd.notna(parent) and parent in row_of and row_of[parent] != row:
            copies.setdefault(row_of[parent], []).append(row)
    return {parent: np.array(rows, dtype=np.int64) for parent, rows in copies.items()}


Batch = tuple[Tensor, Tensor, Tensor | None]


class Batches:
    """Augmented batches of a sampler's draws; ``mask_missing``: with the classes that each clip's corpus has.

    Raises:
        SerError: an augmentation for which these features lack the data.
    """

    def __init__(
        self, data: TrainingData, sampler: WeightedSampler, augment: AugmentConfig, *, mask_missing: bool = True
    ) -> None:
        self.data, self.sampler, self.config = data, sampler, augment
        self.mask_missing = mask_missing
        self.augmenter = Augmenter(augment, data.config)
        needs_power = [name for name in augment.names if name in POWER_NAMES]
        if needs_power and (data.mel_power is None or data.n_frames is None):
            raise SerError(
                f"augmentation {needs_power[0]!r} needs mel power; extract the features again with --mel_power_s 6"
            )
        if "pitch" in augment.names and not data.copies:
            raise SerError(
                "augmentation 'pitch' needs pitch-shifted copies; extract the features again with "
                "--pitch_semitones=-1,1"
            )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.sampler)

    def epoch(self, epoch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """One worker's batches: features (b, *input_shape), targets, and the allowed classes of each example.

        Targets are (b,) classes, or (b, C) mixtures. The allowed classes are (b, C) bool, for a mixture those of both
        clips; None: all classes.
        """
        rows = self.data.train_rows[self.sampler.draws(epoch)]
        draws = Draws.of_epoch(len(rows), self.sampler.batch_size, self.config.mixup_alpha, self.sampler.seed, epoch)
        for positions in self.sampler.positions(rank, world):
            make = self._mixed if "mixup" in self.config.names else self._plain
            yield make(rows, draws, positions)

    def _plain(self, rows: Rows, draws: Draws, positions: Rows) -> Batch:
        """The examples at `positions` of the stream, augmented, without mixup."""
        u = torch.from_numpy(draws.uniform[positions])
        chosen = self._copies(rows[positions], u)
        features = torch.from_numpy(self.data.features[chosen])
        by_power = self.augmenter.needs_power(u)
        if by_power.any():
            source = chosen[by_power.numpy()]
            assert self.data.mel_power is not None  # both checked in __init__
            assert self.data.n_frames is not None
            power = torch.from_numpy(self.data.mel_power[source]).float()
            n_frames = torch.from_numpy(self.data.n_frames[source])
            features[by_power] = self.augmenter.from_power(power, n_frames, u[by_power])
        allowed = self.data.allowed(chosen) if self.mask_missing else None
        return self.augmenter.mask(features, u), torch.from_numpy(self.data.classes[chosen]), allowed

    def _copies(self, rows: Rows, u: Tensor) -> Rows:
        if not self.data.copies or "pitch" not in self.config.names:
            return rows
        copies = [self.data.copies.get(int(row), np.empty(0, np.int64)) for row in rows]
        numbers = self.augmenter.copy_numbers(u, torch.tensor([len(c) for c in copies])).tolist()
        return np.array([c[k] if k >= 0 else row for row, c, k in zip(rows, copies, numbers, strict=True)])

    def _mixed(self, rows: Rows, draws: Draws, positions: Rows) -> Batch:
        """The examples at `positions`, each mixed with a partner of the same global batch, perhaps another worker's."""
        partners = draws.partner[positions]
        needed, index = np.unique(np.concatenate([positions, partners]), return_inverse=True)
        features, classes, allowed = self._plain(rows, draws, needed)
        targets = functional.one_hot(classes, self.data.n_classes).float()
        own, other = torch.from_numpy(index[: len(positions)]), torch.from_numpy(index[len(positions) :])
        weight = torch.from_numpy(draws.weight[positions])
        mixed = torch.lerp(features[other], features[own], weight.view(-1, *[1] * (features.ndim - 1)))
        union = None if allowed is None else allowed[own] | allowed[other]
        return mixed, torch.lerp(targets[other], targets[own], weight[:, None]), union
