"""What a training epoch reads: the clips of a split, and the augmented batches of one worker.

Everything comes from memory-mapped arrays in the worker itself: making a batch costs a small part of a training step,
so there are no loader processes. A batch is a function of (seed, epoch, position in the global stream): the workers of
one run see what a single worker would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.features.features import FeatureConfig
from pipeline.features.store import FeatureArrays, Stacked
from pipeline.storage.errors import SerError
from pipeline.training.augment import POWER_NAMES, AugmentConfig, Augmenter, Draws
from pipeline.training.sampling import WeightedSampler

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class TrainingData:
    """Features of all clips, with the rows that train and those that choose the best epoch."""

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
    corpus_of: Rows | None = None  # (n,) numbers in `corpora`; None: all are of one
    corpus_classes: NDArray[np.bool_] | None = None  # (K, C) which classes each corpus has; None: all have all

    def __post_init__(self) -> None:
        if len(self.train_rows) == 0:
            raise SerError("no readable clip is in the training part; check the manifest and the split")
        shared = np.intersect1d(self.train_rows, self.valid_rows)
        if len(shared):
            raise SerError(f"{len(shared)} clips are in both the training and the validation part; split again")

    def allowed(self, rows: Rows) -> Tensor | None:
        """(len(rows), C) bool: the classes that each clip's corpus has; None where every corpus has all classes."""
        if self.corpus_of is None or self.corpus_classes is None or self.corpus_classes.all():
            return None
        return torch.from_numpy(self.corpus_classes[self.corpus_of[rows]])


def from_arrays(
    arrays: FeatureArrays, classes: Rows, n_classes: int, train_rows: Rows, valid_rows: Rows
) -> TrainingData:
    """Training data of extracted features; `classes` (n,) and the rows index `arrays.features`.

    The classes of a corpus are those of all its recordings here, whichever part they are in.
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


def corpora_of(table: pd.DataFrame) -> tuple[tuple[str, ...], Rows]:
    """The names in column `corpus`, sorted, and the number of each row's, (n,); one without a name without it."""
    if "corpus" not in table.columns:
        return ("",), np.zeros(len(table), np.int64)
    names, number = np.unique(table["corpus"].fillna("").astype(str).to_numpy(dtype=str), return_inverse=True)
    return tuple(map(str, names)), number.astype(np.int64)


def pitch_copies(table: pd.DataFrame) -> dict[int, Rows]:
    """Array rows of the pitch-shifted copies of each row that has some (columns row_id, parent_id)."""
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
    """Augmented batches of a sampler's draws.

    Args:
        mask_missing: whether batches say which classes each clip's corpus has.

    Raises:
        SerError: an augmentation that these features cannot give.
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
            raise SerError("augmentation 'pitch' needs copies; extract the features again with --pitch_semitones=-1,1")

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.sampler)

    def epoch(self, epoch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """One worker's batches: features (b, *input_shape), targets, and the classes of each softmax.

        Targets are (b,) classes or (b, C) mixtures; the third is (b, C) bool, of a mixture the union of its two clips'
        classes, or None for all classes.
        """
        rows = self.data.train_rows[self.sampler.draws(epoch)]
        draws = Draws.of_epoch(len(rows), self.sampler.batch_size, self.config.mixup_alpha, self.sampler.seed, epoch)
        for positions in self.sampler.positions(rank, world):
            yield (
                self._mixed(rows, draws, positions)
                if "mixup" in self.config.names
                else self._plain(rows, draws, positions)
            )

    def _plain(self, rows: Rows, draws: Draws, positions: Rows) -> Batch:
        """Examples at `positions` of the stream, augmented one by one."""
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
        """Mixup with partners of the same global batch, which another worker may be training on."""
        partners = draws.partner[positions]
        needed, index = np.unique(np.concatenate([positions, partners]), return_inverse=True)
        features, classes, allowed = self._plain(rows, draws, needed)
        targets = functional.one_hot(classes, self.data.n_classes).float()
        own, other = torch.from_numpy(index[: len(positions)]), torch.from_numpy(index[len(positions) :])
        weight = torch.from_numpy(draws.weight[positions])
        mixed = torch.lerp(features[other], features[own], weight.view(-1, *[1] * (features.ndim - 1)))
        union = None if allowed is None else allowed[own] | allowed[other]
        return mixed, torch.lerp(targets[other], targets[own], weight[:, None]), union
