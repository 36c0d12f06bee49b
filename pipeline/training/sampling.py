"""Balance of classes and corpora: inverse-frequency weights, boosts, and a weighted sampler for any number of workers.

Each epoch is one global stream of draws with replacement (`torch.multinomial`, as in
`torch.utils.data.WeightedRandomSampler`), a function of (seed, epoch) alone. A global batch is a run of `batch_size`
draws; worker r of W takes its r-th W-th part, so 1, 2 or 4 workers together see exactly the same draws. Limits: W must
divide the batch size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.data.labels import LabelSet
from pipeline.storage.errors import SerError


def parse_class_values(
    given: str | Mapping[str, float], labels: LabelSet, option: str = "--oversample_boost"
) -> dict[int, float]:
    """Read `CLASS:VALUE,...`; a class is an index or a name: "1:2.0,sad:1.5" -> {1: 2.0, 6: 1.5}.

    `given` may be a mapping from classes to values instead, whose names may have commas.

    Raises:
        SerError: not that form, an unknown class, a class given twice, or a value that is not a positive number.
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
    """The parts of ``name:number,...``.

    Raises:
        SerError: a part of another form, or a number that is not above 0 and finite; says what is ``expected``.
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
    """The share of the draws of each of `corpora` (K,); None when none are given.

    `trained`: those that are trained on (all by default), which must have a share; that of others is 0.

    Raises:
        SerError: a share for a corpus that is not there, or a corpus without one.
    """
    if not given:
        return None
    for name in given:
        if name not in corpora:
            raise SerError(f"--corpus_share: no corpus {name!r} in the recordings; there are {', '.join(corpora)}")
    trained = corpora if trained is None else trained
    for name in trained:
        if name not in given:
            raise SerError(f"--corpus_share gives {name or 'the recordings without a corpus'} none; name every corpus")
    shares = np.array([given[name] if name in trained else 0.0 for name in corpora])
    found: np.ndarray = shares / shares.sum()
    return found


@dataclass(frozen=True)
class WeightedSampler:
    """Weighted draws with replacement, the same whatever the number of workers.

    Args:
        weights: (n,) unnormalised draw probability of each clip.
        batch_size: of all workers together. Every batch is full: an epoch's draws are rounded up to whole batches.
        seed: together with the epoch it decides every draw.
        n_draws: of an epoch; 0: as many as there are clips.
    """

    weights: np.ndarray
    batch_size: int
    seed: int = 0
    n_draws: int = 0

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
        """Every class of a corpus equally often, then each class times its boost.

        Args:
            classes: (n,) int, the class of each clip.
            corpora: (n,) int, the corpus of each clip; None: one for all.
            shares: (K,) of the draws that each corpus gets (before boosts); by default in proportion to the square
                root of its number of clips.
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
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        weights = torch.as_tensor(self.weights, dtype=torch.float64)
        drawn: np.ndarray = torch.multinomial(
            weights, len(self) * self.batch_size, replacement=True, generator=generator
        ).numpy()
        return drawn

    def part(self, world: int) -> int:
        """Examples of a global batch that each of `world` workers gets.

        Raises:
            SerError: the workers cannot share the batch equally.
        """
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


def _mix(seed: int, epoch: int) -> int:
    """One 63-bit seed from two numbers; neighbouring pairs give unrelated streams."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
