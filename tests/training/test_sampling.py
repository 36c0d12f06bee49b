"""The sampler against torch's own and against scikit-learn's class weights; one stream for any number of workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2_contingency, chisquare
from sklearn.utils.class_weight import compute_class_weight
from torch import Generator
from torch.utils.data import WeightedRandomSampler

from pipeline.data.labels import LabelSet
from pipeline.storage.errors import SerError
from pipeline.training.batches import WeightedSampler, class_weights, parse_class_values, shares_of

LABELS = LabelSet(("angry", "calm", "happy", "sad"))
CLASSES = np.repeat([0, 1, 2, 3], [400, 40, 150, 210])


def test_class_weights_are_scikit_learns_balanced_ones() -> None:
    expected = compute_class_weight("balanced", classes=np.arange(4), y=CLASSES)
    np.testing.assert_allclose(class_weights(CLASSES, 4), expected)
    np.testing.assert_allclose(class_weights(CLASSES, 5), [*expected, 0.0])


@pytest.mark.parametrize(("boosts", "shares"), [(None, [1, 1, 1, 1]), ({1: 2.0, 3: 0.5}, [1, 2, 1, 0.5])])
def test_classes_are_drawn_equally_often_times_their_boosts(boosts: Any, shares: list[float]) -> None:
    sampler = WeightedSampler.balanced(CLASSES, 4, batch_size=32, seed=1, boosts=boosts)
    counts = sum(np.bincount(CLASSES[sampler.draws(epoch)], minlength=4) for epoch in range(1, 11))
    assert chisquare(counts, np.array(shares) / sum(shares) * counts.sum()).pvalue > 0.01
    assert chisquare(counts, np.bincount(CLASSES) / 800 * counts.sum()).pvalue < 1e-9  # the data are not balanced


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
    assert parse_class_values("1:2.0, sad:1.5", LABELS) == {1: 2.0, 3: 1.5}
    assert parse_class_values("Happiness:3", LABELS) == {2: 3.0}  # an alias
    assert parse_class_values("", LABELS) == {}


@pytest.mark.parametrize(
    "text", ["sad", "sad:", "sad:two", "sad:0", "sad:-1", "sad:nan", "sad:inf", "bored:2", "4:2", "sad:2,3:2"]
)
def test_bad_boosts_are_refused(text: str) -> None:
    with pytest.raises(SerError, match=text.partition(":")[0]):
        parse_class_values(text, LABELS)


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
