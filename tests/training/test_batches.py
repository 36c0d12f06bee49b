"""Batches and the sampler against torch's and scikit-learn's; one stream for any number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from sklearn.utils.class_weight import compute_class_weight
from torch import Generator, Tensor
from torch.utils.data import WeightedRandomSampler
from toy_data import CONFIG, mel_powers, middle, toy_data

from pipeline.data.corpora.voices import corpora_of
from pipeline.data.labels import LabelSet
from pipeline.features.store import FeatureArrays
from pipeline.storage.errors import SerError
from pipeline.training.augment import NAMES, POWER_NAMES, AugmentConfig, Draws
from pipeline.training.batches import (
    Batch,
    Batches,
    TrainingData,
    WeightedSampler,
    class_weights,
    from_arrays,
    parse_class_values,
    pitch_copies,
    shares_of,
)

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


NAMES_OF_FOUR = LabelSet(("angry", "calm", "happy", "sad"))
UNEVEN = np.repeat([0, 1, 2, 3], [400, 40, 150, 210])


def test_class_weights_are_scikit_learns_balanced_ones() -> None:
    expected = compute_class_weight("balanced", classes=np.arange(4), y=UNEVEN)
    np.testing.assert_allclose(class_weights(UNEVEN, 4), expected)
    np.testing.assert_allclose(class_weights(UNEVEN, 5), [*expected, 0.0])


@pytest.mark.parametrize(("boosts", "shares"), [(None, [1, 1, 1, 1]), ({1: 2.0, 3: 0.5}, [1, 2, 1, 0.5])])
def test_classes_are_drawn_equally_often_times_their_boosts(boosts: Any, shares: list[float]) -> None:
    sampler = WeightedSampler.balanced(UNEVEN, 4, batch_size=32, seed=1, boosts=boosts)
    counts = sum(np.bincount(UNEVEN[sampler.draws(epoch)], minlength=4) for epoch in range(1, 11))
    assert chisquare(counts, np.array(shares) / sum(shares) * counts.sum()).pvalue > 0.01
    assert chisquare(counts, np.bincount(UNEVEN) / 800 * counts.sum()).pvalue < 1e-9  # the data are not balanced


def test_distribution_over_clips_is_torchs() -> None:
    weights = np.linspace(0.2, 3.0, 40)
    sampler = WeightedSampler(weights, 40, seed=3)
    ours = sum(np.bincount(sampler.draws(epoch), minlength=40) for epoch in range(1, 200))
    theirs = list(WeightedRandomSampler(weights.tolist(), 200 * 40, generator=Generator().manual_seed(3)))
    assert chi2_contingency(np.stack([ours, np.bincount(theirs, minlength=40)])).pvalue > 0.01
    assert chi2_contingency(np.stack([ours, ours[::-1]])).pvalue < 1e-9


@pytest.mark.parametrize("n", [50, 64])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_workers_share_out_every_batch(n: int, world: int) -> None:
    sampler = WeightedSampler(np.random.default_rng(0).random(n), 16, seed=5)
    parts = [list(sampler.positions(rank, world)) for rank in range(world)]
    assert {len(positions) for part in parts for positions in part} == {16 // world}
    assert {len(part) for part in parts} == {len(sampler)} == {4}
    together = np.concatenate([positions for batch in zip(*parts, strict=True) for positions in batch])
    np.testing.assert_array_equal(together, np.arange(64))
    assert len(sampler.draws(2)) == 64


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    weights = np.ones(100)
    first = WeightedSampler(weights, 10, seed=7).draws(3)
    np.testing.assert_array_equal(first, WeightedSampler(weights, 10, seed=7).draws(3))
    np.testing.assert_array_equal(first, WeightedSampler(weights, 20, seed=7).draws(3))
    for seed, epoch in ((7, 4), (8, 3), (3, 7)):
        assert not np.array_equal(first, WeightedSampler(weights, 10, seed=seed).draws(epoch))


def test_an_epoch_is_whole_batches() -> None:
    for n, options, n_batches in ((33, {}, 3), (3, {}, 1), (60, {"n_draws": 100}, 7)):
        sampler = WeightedSampler(np.ones(n), 16, **options)
        assert (len(sampler), len(sampler.draws(1))) == (n_batches, 16 * n_batches)


def test_class_values_by_index_or_name() -> None:
    assert parse_class_values("1:2.0, sad:1.5", NAMES_OF_FOUR) == {1: 2.0, 3: 1.5}
    assert parse_class_values("Happiness:3", NAMES_OF_FOUR) == {2: 3.0}  # an alias
    assert parse_class_values("", NAMES_OF_FOUR) == {}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        *((f"sad{value}", "above 0") for value in ("", ":", ":two", ":0", ":-1", ":nan", ":inf")),
        *(("bored:2", "bored"), ("4:2", "outside 0..3"), ("sad:2,3:2", "twice")),
    ],
)
def test_bad_boosts_are_refused(text: str, word: str) -> None:
    with pytest.raises(SerError, match=word):
        parse_class_values(text, NAMES_OF_FOUR)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_what_cannot_be_drawn_or_shared_out_is_refused(weights: list[float]) -> None:
    with pytest.raises(SerError):
        WeightedSampler(np.array(weights), 4)
    with pytest.raises(SerError, match="batches of 0"):
        WeightedSampler(np.ones(4), 0)
    with pytest.raises(SerError, match="multiple of 3"):
        list(WeightedSampler(np.ones(10), 16).positions(0, 3))


def test_corpora_get_their_shares_and_classes_are_even_within_each() -> None:
    classes = np.array([0] * 30 + [1] * 10 + [0] * 5 + [2] * 55)
    corpora = np.repeat([0, 1], [40, 60])
    given = WeightedSampler.balanced(
        classes, 3, batch_size=50, corpora=corpora, shares=np.array([0.8, 0.2]), n_draws=2000
    )
    assert len(given) == 40
    drawn = np.concatenate([given.draws(epoch) for epoch in range(5)])
    found = [np.mean((corpora[drawn] == k) & (classes[drawn] == c)) for k, c in ((0, 0), (0, 1), (1, 0), (1, 2))]
    assert found == pytest.approx([0.4, 0.4, 0.1, 0.1], abs=0.02)
    by_root = WeightedSampler.balanced(classes, 3, batch_size=50, corpora=corpora).weights
    shares = np.array([by_root[corpora == k].sum() for k in (0, 1)])
    assert shares / shares.sum() == pytest.approx(np.sqrt([40, 60]) / np.sqrt([40, 60]).sum())


def test_shares_name_every_corpus_and_no_other() -> None:
    assert shares_of({}, ("a", "b")) is None
    np.testing.assert_allclose(shares_of({"b": 3.0, "a": 1.0}, ("a", "b")), [0.25, 0.75])
    for given, missing in (({"a": 1, "c": 1}, "'c'"), ({"a": 1}, "for b")):
        with pytest.raises(SerError, match=missing):
            shares_of(given, ("a", "b"))
