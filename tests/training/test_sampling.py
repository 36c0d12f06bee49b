"""The sampler against torch's own and against scikit-learn's class weights; one stream for any number of workers."""

from __future__ import annotations

from collections import Counter

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


def drawn_classes(sampler: WeightedSampler, epochs: int = 10) -> np.ndarray:
    """How often each class is drawn in the first epochs."""
    return sum(np.bincount(CLASSES[sampler.draws(epoch)], minlength=4) for epoch in range(1, epochs + 1))


def test_class_weights_are_scikit_learns_balanced_ones() -> None:
    expected = compute_class_weight("balanced", classes=np.arange(4), y=CLASSES)
    np.testing.assert_allclose(class_weights(CLASSES, 4), expected)
    np.testing.assert_allclose(class_weights(CLASSES, 5), [*expected, 0.0])


def test_classes_are_drawn_equally_often() -> None:
    counts = drawn_classes(WeightedSampler.balanced(CLASSES, 4, batch_size=32, seed=1))
    assert chisquare(counts).pvalue > 0.01
    assert chisquare(np.bincount(CLASSES)).pvalue < 1e-9  # the same test sees the imbalance of the data


def test_boosts_multiply_the_share_of_a_class() -> None:
    sampler = WeightedSampler.balanced(CLASSES, 4, batch_size=32, seed=1, boosts={1: 2.0, 3: 0.5})
    counts = drawn_classes(sampler)
    expected = np.array([1, 2, 1, 0.5]) / 4.5 * counts.sum()
    assert chisquare(counts, expected).pvalue > 0.01
    assert chisquare(drawn_classes(WeightedSampler.balanced(CLASSES, 4, batch_size=32, seed=1)), expected).pvalue < 1e-9


def test_distribution_over_clips_is_torchs() -> None:
    weights = np.linspace(0.2, 3.0, 40)
    ours = np.bincount(WeightedSampler(weights, 40, seed=3).draws(1), minlength=40)
    for epoch in range(2, 200):
        ours += np.bincount(WeightedSampler(weights, 40, seed=3).draws(epoch), minlength=40)
    theirs = list(WeightedRandomSampler(weights.tolist(), 200 * 40, generator=Generator().manual_seed(3)))
    table = np.stack([ours, np.bincount(theirs, minlength=40)])
    assert chi2_contingency(table).pvalue > 0.01
    assert chi2_contingency(np.stack([ours, ours[::-1]])).pvalue < 1e-9


@pytest.mark.parametrize("n", [50, 64])
def test_any_number_of_workers_draws_the_same_clips(n: int) -> None:
    sampler = WeightedSampler(np.random.default_rng(0).random(n), 16, seed=5)
    for epoch in (1, 2):
        draws = sampler.draws(epoch)
        seen = {}
        for world in (1, 2, 4):
            parts = [list(sampler.positions(rank, world)) for rank in range(world)]
            assert {len(part) for part in parts} == {len(sampler)}
            assert {len(p) for part in parts for p in part} == {16 // world}
            positions = np.concatenate([p for part in parts for p in part])
            assert sorted(positions) == list(range(len(draws)))  # disjoint, and nothing left out
            seen[world] = Counter(draws[positions].tolist())
            batches = [np.concatenate([part[i] for part in parts]) for i in range(len(sampler))]
            for i, batch in enumerate(batches):
                np.testing.assert_array_equal(np.sort(batch), np.arange(16 * i, 16 * i + 16))
        assert seen[1] == seen[2] == seen[4]


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    weights = np.ones(100)
    first = WeightedSampler(weights, 10, seed=7).draws(3)
    np.testing.assert_array_equal(first, WeightedSampler(weights, 10, seed=7).draws(3))
    np.testing.assert_array_equal(first, WeightedSampler(weights, 20, seed=7).draws(3))
    for seed, epoch in ((7, 4), (8, 3), (3, 7)):
        assert not np.array_equal(first, WeightedSampler(weights, 10, seed=seed).draws(epoch))


def test_an_epoch_is_whole_batches() -> None:
    assert len(WeightedSampler(np.ones(33), 16)) == 3
    assert len(WeightedSampler(np.ones(33), 16).draws(1)) == 48
    assert len(WeightedSampler(np.ones(3), 16).draws(1)) == 16


def test_class_values_by_index_or_name() -> None:
    assert parse_class_values("1:2.0, sad:1.5", LABELS) == {1: 2.0, 3: 1.5}
    assert parse_class_values("Happiness:3", LABELS) == {2: 3.0}  # an alias
    assert parse_class_values("", LABELS) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sad", "expected CLASS:FACTOR"),
        ("sad:", "expected CLASS:FACTOR"),
        ("sad:two", "expected CLASS:FACTOR"),
        ("sad:0", "factor above 0"),
        ("sad:-1", "factor above 0"),
        ("sad:nan", "factor above 0"),
        ("sad:inf", "factor above 0"),
        ("bored:2", "unknown label 'bored'"),
        ("4:2", "outside 0..3"),
        ("sad:2,3:2", "'sad' is given twice"),
    ],
)
def test_bad_boosts_are_refused(text: str, message: str) -> None:
    with pytest.raises(SerError, match=message):
        parse_class_values(text, LABELS)


def test_workers_that_cannot_share_a_batch_are_refused() -> None:
    with pytest.raises(SerError, match="multiple of 3"):
        list(WeightedSampler(np.ones(10), 16).positions(0, 3))


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(SerError):
        WeightedSampler(np.array(weights), 4)
    with pytest.raises(SerError):
        WeightedSampler(np.ones(4), 0)


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


@pytest.mark.parametrize("world", [2, 4])
def test_several_corpora_are_one_stream_for_any_number_of_workers(world: int) -> None:
    sampler = WeightedSampler.balanced(
        np.arange(60) % 3, 3, batch_size=8, seed=5, corpora=np.arange(60) % 2, n_draws=100
    )
    alone = np.concatenate(list(sampler.positions()))
    parts = [list(sampler.positions(rank, world)) for rank in range(world)]
    together = np.concatenate([part[i] for i in range(len(sampler)) for part in parts])
    np.testing.assert_array_equal(sampler.draws(2)[together], sampler.draws(2)[alone])
    assert len(alone) == 104


def test_shares_name_every_corpus_and_no_other() -> None:
    assert shares_of({}, ("a", "b")) is None
    np.testing.assert_allclose(shares_of({"b": 3.0, "a": 1.0}, ("a", "b")), [0.25, 0.75])
    with pytest.raises(SerError, match="no corpus 'c'"):
        shares_of({"a": 1, "c": 1}, ("a", "b"))
    with pytest.raises(SerError, match="no share for b"):
        shares_of({"a": 1}, ("a", "b"))
