"""The fit of a last layer: against scikit-learn, against what must hold, and against labels that mean nothing."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from pipeline.training.adapt import Verdict, judge
from pipeline.training.last_layer import (
    BIASES,
    KEEP,
    LAST_LAYER,
    Choice,
    Head,
    Parent,
    Recordings,
    adapt,
    choose,
    fit_head,
    folds,
    out_of_fold,
    parent_of,
)

D = 40


def voices(n: int, n_classes: int = 3, *, noise: float = 1.0, speakers: int = 6, seed: int = 0) -> Recordings:
    """Hidden features (n, 40) around a point of each class and a smaller one of each speaker."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((n_classes, D))
    truth = np.arange(n) % n_classes
    groups = (np.arange(n) // n_classes) % speakers
    own = 0.3 * rng.standard_normal((speakers, D))
    return Recordings(centres[truth] + own[groups] + noise * rng.standard_normal((n, D)), truth, groups)


def blank(n_classes: int = 3) -> Parent:
    """A parent whose last layer says nothing."""
    return Parent(Head(np.zeros((n_classes, D)), np.zeros(n_classes)), np.ones(n_classes, bool))


def right(recordings: Recordings, head: Head) -> float:
    return float((head.logits(recordings.embeddings).argmax(axis=1) == recordings.truth).mean())


def judged(recordings: Recordings, parent: Parent, seed: int = 0) -> Verdict:
    """Whether adapting is worth while, by the answers out of fold."""
    before = parent.answers(recordings.embeddings).argmax(axis=1)
    after = adapt(recordings, parent, seed=seed).logits.argmax(axis=1)
    return judge(recordings.truth, before, after, recordings.groups)


@pytest.mark.parametrize("n", [30, 120])  # fewer and more recordings than features
def test_from_a_blank_parent_it_is_scikit_learns_logistic_regression(n: int) -> None:
    recordings, fresh = voices(n, noise=2.0), voices(300, noise=2.0, seed=1)
    found = fit_head(recordings, blank(), Choice(LAST_LAYER, 0.01))
    centred = recordings.embeddings - recordings.embeddings.mean(axis=0)
    scale = np.sqrt((centred**2).sum(axis=1).mean())
    theirs = LogisticRegression(C=1 / (0.01 * n), tol=1e-8, max_iter=5000).fit(centred / scale, recordings.truth)
    ours = found.logits(fresh.embeddings)
    expected = theirs.decision_function((fresh.embeddings - recordings.embeddings.mean(axis=0)) / scale)
    ours, expected = ours - ours.mean(axis=1, keepdims=True), expected - expected.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(ours, expected, atol=0.05 * np.abs(expected).max())


def test_a_strong_pull_leaves_the_answers_of_the_rescaled_parent_and_a_weak_one_fits_the_recordings() -> None:
    recordings = voices(60, noise=3.0)
    parent = Parent(Head(np.random.default_rng(3).standard_normal((3, D)) / D, np.zeros(3)), np.ones(3, bool))
    scaled = fit_head(recordings, parent, Choice(BIASES)).logits(recordings.embeddings)
    pulled = fit_head(recordings, parent, Choice(LAST_LAYER, 1e6)).logits(recordings.embeddings)
    difference = pulled - scaled
    np.testing.assert_allclose(difference - difference.mean(axis=1, keepdims=True), 0, atol=0.02)
    assert right(recordings, fit_head(recordings, parent, Choice(LAST_LAYER, 1e-5))) == 1.0


def test_biases_undo_a_parent_that_always_says_the_same() -> None:
    recordings = voices(90, noise=0.5)
    good = fit_head(recordings, blank(), Choice(LAST_LAYER, 0.01))
    shifted = Parent(Head(good.weight, good.bias + np.array([10.0, 0, 0])), np.ones(3, bool))
    assert right(recordings, shifted.head) < 0.4
    assert right(recordings, fit_head(recordings, shifted, Choice(BIASES))) > 0.95


def test_a_parent_that_is_right_already_is_hardly_changed() -> None:
    recordings = voices(60, noise=0.2)
    centres = np.random.default_rng(99).standard_normal((3, D))
    parent = Parent(Head(centres, -0.5 * (centres**2).sum(axis=1)), np.ones(3, bool))
    assert right(recordings, adapt(recordings, parent).head) == 1.0
    assert not judged(recordings, parent).adapted


def test_no_recording_has_a_say_in_its_own_answer() -> None:
    recordings, parent = voices(36, noise=2.0), blank()
    fold_of = folds(recordings, 3, 0)
    before, _ = out_of_fold(recordings, parent, fold_of)
    tested = fold_of == 1
    truth = np.where(tested, (recordings.truth + 1) % 3, recordings.truth)  # other labels in that fold alone
    changed = Recordings(recordings.embeddings, truth, recordings.groups)
    after, _ = out_of_fold(changed, parent, fold_of)
    np.testing.assert_array_equal(before[tested], after[tested])
    assert not np.allclose(before[~tested], after[~tested])


def test_no_voice_is_on_both_sides_of_a_fold() -> None:
    recordings = voices(61, speakers=7)
    fold_of = folds(recordings, 5, 0)
    assert all(len(set(fold_of[recordings.groups == voice])) == 1 for voice in range(7))
    assert len(set(fold_of)) == 5


def test_what_the_parent_does_not_know_begins_at_the_mean_and_is_never_its_answer() -> None:
    weight, bias = np.arange(3 * D, dtype=float).reshape(3, D), np.array([1.0, 2.0, 3.0])
    parent = parent_of(weight, bias, ["angry", "happy", "sad"], ["angry", "bored", "sad"])
    np.testing.assert_array_equal(parent.head.weight[[0, 2]], weight[[0, 2]])
    np.testing.assert_array_equal(parent.head.weight[1], weight.mean(axis=0))
    answers = parent.answers(np.random.default_rng(0).standard_normal((20, D)))
    assert np.isneginf(answers[:, 1]).all()
    assert np.isfinite(parent.head.logits(np.ones((1, D)))).all()


def test_a_gain_that_is_there_is_found_also_over_a_parent_that_knows_no_class() -> None:
    recordings = voices(60, noise=1.0)
    verdict = judged(recordings, parent_of(np.ones((2, D)), np.zeros(2), ["left", "right"], ["a", "b", "c"]))
    assert verdict.before == pytest.approx(1 / 3)
    assert verdict.after > 0.9
    assert verdict.adapted
    wrong = Parent(Head(np.random.default_rng(8).standard_normal((3, D)), np.zeros(3)), np.ones(3, bool))
    assert choose(recordings, wrong).kind != KEEP
    assert judged(recordings, wrong).adapted


def test_old_recordings_keep_a_class_that_the_new_ones_lack() -> None:
    old, new = voices(90, noise=1.0), voices(60, n_classes=2, noise=1.0, seed=5)
    parent = Parent(fit_head(old, blank(), Choice(LAST_LAYER, 0.01)), np.ones(3, bool), old)
    alone, rehearsed = (fit_head(new, parent, Choice(LAST_LAYER, 3e-4, rehearsal=both)) for both in (False, True))
    lost = old.where(old.truth == 2)
    assert right(lost, rehearsed) > 0.9
    assert right(lost, rehearsed) >= right(lost, alone)


def test_meaningless_labels_say_keep() -> None:
    parent = Parent(fit_head(voices(90, seed=77), blank(), Choice(LAST_LAYER, 0.01)), np.ones(3, bool))
    adapted = 0
    for seed in range(8):
        made = voices(24, n_classes=3, noise=1.5, seed=seed)
        shuffled = np.random.default_rng(seed).permutation(made.truth)
        adapted += judged(Recordings(made.embeddings, shuffled, made.groups), parent, seed).adapted
    assert adapted <= 1


def test_the_verdict_exchanges_whole_speakers_where_there_are_enough() -> None:
    truth, speakers = np.arange(160) % 4, np.arange(160) // 20
    before = np.where(np.random.default_rng(0).random(160) < 0.5, truth, (truth + 1) % 4)
    one_voice = judge(truth, before, np.where(speakers == 0, truth, before), speakers)  # all the gain is in one of 8
    assert one_voice.over == "speakers"
    assert not one_voice.adapted
    assert judge(truth, before, truth, speakers).adapted
    assert judge(truth, before, truth, None).over == "recordings"
