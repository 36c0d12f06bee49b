"""Batches: the stored feature where nothing is drawn, labels kept, and the same stream for any number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from toy_data import CONFIG, mel_powers, middle, toy_data

from pipeline.data.corpora.voices import corpora_of
from pipeline.features.store import FeatureArrays
from pipeline.storage.errors import SerError
from pipeline.training.augment import NAMES, POWER_NAMES, AugmentConfig, Draws
from pipeline.training.batches import Batch, Batches, TrainingData, WeightedSampler, from_arrays, pitch_copies

BATCH = 8
CORPORA = {  # of three classes
    "corpora": ("all", "two"),
    "corpus_of": np.arange(18) % 2,
    "corpus_classes": np.array([[True, True, True], [True, False, True]]),
}


def with_copies() -> TrainingData:
    """12 training clips, 6 validation clips, and two shifted copies of each training clip after them."""
    power, classes = mel_powers(18)
    copies = np.concatenate([np.roll(power[:12], shift, axis=1) for shift in (1, 2)])
    power = np.concatenate([power, copies])
    return toy_data(
        12,
        6,
        features=np.stack([middle(p) for p in power]),
        classes=np.concatenate([classes, classes[:12], classes[:12]]),
        mel_power=power,
        n_frames=np.full(len(power), power.shape[2]),
        copies={row: np.array([18 + row, 30 + row]) for row in range(12)},
    )


def batches(data: TrainingData, *names: str, **settings: Any) -> Batches:
    sampler = WeightedSampler.balanced(data.classes[data.train_rows], data.n_classes, batch_size=BATCH, seed=3)
    return Batches(data, sampler, AugmentConfig(names, **settings))


def stream(found: Batches, epoch: int = 1, world: int = 1) -> tuple[Tensor, Tensor]:
    """All examples of an epoch in the order of the global stream, put together from the workers' parts."""
    parts: list[Sequence[Batch]] = [list(found.epoch(epoch, rank, world)) for rank in range(world)]
    ordered = [part[i] for i in range(len(found)) for part in parts]
    return torch.cat([batch[0] for batch in ordered]), torch.cat([batch[1] for batch in ordered])


def test_an_example_that_draws_no_change_is_the_stored_feature_bit_for_bit() -> None:
    data = toy_data(12)
    plain = batches(data)
    rows = data.train_rows[plain.sampler.draws(1)]
    stored, (features, classes) = torch.from_numpy(data.features[rows]), stream(plain)
    assert torch.equal(features, stored)
    assert torch.equal(classes, torch.from_numpy(data.classes[rows]))
    for name in POWER_NAMES:
        features, labels = stream(batches(data, name, **{f"{name}_p": 0.5}))
        same = (features == stored).all(dim=(1, 2, 3))
        assert 0 < int(same.sum()) < len(same), name
        assert torch.equal(labels, classes), name


def test_examples_depend_on_seed_and_epoch_and_not_on_the_number_of_workers() -> None:
    found = batches(with_copies(), *NAMES)
    first, second = stream(found, 1), stream(found, 2)
    assert torch.equal(second[0], stream(batches(with_copies(), *NAMES), 2)[0])
    assert not torch.equal(first[0], second[0])
    for epoch, (alone, targets) in ((1, first), (2, second)):
        for world in (2, 4, 8):
            together, their_targets = stream(found, epoch, world)
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(their_targets, targets, rtol=0, atol=0)


def test_mixup_blends_pictures_and_labels_alike() -> None:
    data = toy_data(12)
    found = batches(data, "mixup", mixup_alpha=1.0)
    features, targets = stream(found)
    rows = data.train_rows[found.sampler.draws(1)]
    stored, labels = torch.from_numpy(data.features[rows]), torch.eye(3)[data.classes[rows]]
    assert (targets.max(dim=1).values < 1).any()
    for i, (picture, target) in enumerate(zip(features, targets, strict=True)):
        assert target @ labels[i] >= 0.5 - 1e-6
        residues = []
        for j in range(i // BATCH * BATCH, i // BATCH * BATCH + BATCH):  # one of the batch explains picture and label
            direction = (stored[i] - stored[j]).flatten()
            along = (picture - stored[j]).flatten() @ direction
            weight = along / direction.dot(direction) if direction.any() else 1.0
            blend = weight * stored[i] + (1 - weight) * stored[j]
            label = weight * labels[i] + (1 - weight) * labels[j]
            residues.append(float((picture - blend).abs().max() + (target - label).abs().max()))
        assert min(residues) < 1e-3


def test_pitch_takes_copies_of_the_same_recording() -> None:
    data = with_copies()
    found = batches(data, "pitch")
    features, classes = stream(found)
    rows = data.train_rows[found.sampler.draws(1)]
    taken = []
    for picture, label, row in zip(features.numpy(), classes, rows, strict=True):
        same = [r for r in (row, 18 + row, 30 + row) if np.array_equal(picture, data.features[r])]
        assert len(same) == 1
        assert int(label) == data.classes[row]
        taken.append((same[0] - row) > 0)
    assert 0 < sum(taken) < len(taken)


def test_validation_clips_and_their_copies_are_never_drawn() -> None:
    data = with_copies()
    found = batches(data, "pitch")
    for epoch in range(1, 20):
        assert data.train_rows[found.sampler.draws(epoch)].max() < 12
    with pytest.raises(SerError, match="2 clips"):
        toy_data(12, 6, valid_rows=np.array([3, 5, 12]))
    with pytest.raises(SerError, match="no readable"):
        toy_data(12, 6, train_rows=np.array([], dtype=np.int64))


def test_copies_are_found_by_their_parents() -> None:
    table = pd.DataFrame({"row_id": ["0", "0-1", "0+1", "1", "2+1"], "parent_id": ["", "0", "0", "", "2"]})
    found = pitch_copies(table)
    assert {parent: rows.tolist() for parent, rows in found.items()} == {0: [1, 2]}  # row 2 itself could not be read
    assert pitch_copies(table[["row_id"]]) == {}


def test_missing_mel_power_or_copies_are_refused() -> None:
    for name in POWER_NAMES:
        with pytest.raises(SerError, match=f"{name!r} needs mel power"):
            batches(toy_data(12, mel_power=None), name)
    with pytest.raises(SerError, match="--pitch_semitones"):
        batches(toy_data(12), "pitch")


def test_a_mixture_has_the_classes_of_both_corpora() -> None:
    data = toy_data(18, 0, classes=np.where(np.arange(18) % 2, 2, np.arange(18) % 3), **CORPORA)
    found = batches(data, "mixup", mixup_alpha=1.0)
    rows = data.train_rows[found.sampler.draws(1)]
    partner = Draws.of_epoch(len(rows), BATCH, 1.0, found.sampler.seed, 1).partner
    both = data.corpus_classes[data.corpus_of[rows]] | data.corpus_classes[data.corpus_of[rows[partner]]]
    told = [batch[2] for batch in found.epoch(1)]
    np.testing.assert_array_equal(torch.cat(told).numpy(), both)
    assert 0 < both[:, 1].sum() < len(both)
    for _, targets, allowed in found.epoch(1):
        assert not targets[~allowed].any()
    assert {batch[2] for batch in Batches(data, found.sampler, AugmentConfig(), mask_missing=False).epoch(1)} == {None}
    assert {batch[2] for batch in batches(toy_data(18, 0)).epoch(1)} == {None}


def test_corpora_are_told_apart_and_have_the_classes_that_their_recordings_have() -> None:
    table = pd.DataFrame({"corpus": ["b", "a", "b", None], "row_id": list("0123"), "parent_id": [""] * 4})
    assert corpora_of(table)[0] == ("", "a", "b")
    assert corpora_of(table)[1].tolist() == [2, 1, 2, 0]
    assert corpora_of(table[["row_id"]])[0] == ("",)
    arrays = FeatureArrays(CONFIG, table, toy_data(4, 0).features, None, np.ones(4, np.int64))
    data = from_arrays(arrays, np.array([0, 1, 2, 2]), 3, np.array([0]), np.array([1]))
    assert data.corpus_classes.tolist() == [[False, False, True], [False, True, False], [True, False, True]]
