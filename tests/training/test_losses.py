"""Losses against their formulas, written out in float64, and against torch's own cross-entropy."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.storage.errors import SerError
from pipeline.training.losses import ClassificationLoss

WEIGHTS = (0.5, 1.0, 2.5, 4.0)


def batch(n: int = 7, n_classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, classes, and mixtures of classes."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    classes = torch.randint(n_classes, (n,), generator=generator)
    mixtures = torch.rand(n, n_classes, generator=generator, dtype=torch.float64)
    return logits, classes, mixtures / mixtures.sum(dim=1, keepdim=True)


def by_hand(logits: np.ndarray, targets: np.ndarray, weights: np.ndarray, smoothing: float, gamma: float) -> float:
    """The module's formula, one term at a time."""
    total, norm = 0.0, 0.0
    for row, target in zip(logits, targets, strict=True):
        p = np.exp(row) / np.exp(row).sum()
        for c in range(len(p)):
            smooth = (1 - smoothing) * target[c] + smoothing / len(p)
            total += weights[c] * smooth * (1 - p[c]) ** gamma * -np.log(p[c])
            norm += weights[c] * target[c]
    return total / norm


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(smoothing: float) -> None:
    logits, classes, mixtures = batch()
    for weights, targets in ((None, classes), (WEIGHTS, classes), (None, mixtures)):
        ours = ClassificationLoss(4, class_weights=weights, label_smoothing=smoothing)(logits, targets)
        tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        expected = functional.cross_entropy(logits, targets, tensor, label_smoothing=smoothing)
        assert ours.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("weights", "smoothing", "gamma"), list(product([None, WEIGHTS], [0.0, 0.2], [0.5, 2.0])))
def test_focal_loss_is_the_formula(weights: tuple[float, ...] | None, smoothing: float, gamma: float) -> None:
    logits, classes, mixtures = batch()
    loss = ClassificationLoss(4, class_weights=weights, label_smoothing=smoothing, focal_gamma=gamma)
    for targets in (functional.one_hot(classes, 4).double(), mixtures):
        expected = by_hand(logits.numpy(), targets.numpy(), np.array(weights or [1.0] * 4), smoothing, gamma)
        assert loss(logits, targets).item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(loss(logits, classes), loss(logits, functional.one_hot(classes, 4).double()))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_certain_answers_keep_finite_gradients(gamma: float) -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    loss = ClassificationLoss(2, label_smoothing=0.1, focal_gamma=gamma)(logits, torch.tensor([0, 0]))
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"class_weights": (1.0, 2.0)}, "2 class weights"),
        ({"class_weights": (1.0, 0.0, 1.0)}, "class weight 0"),
        ({"label_smoothing": 1.0}, "smoothing"),
        ({"label_smoothing": -0.1}, "smoothing"),
        ({"focal_gamma": -1.0}, "gamma"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(SerError, match=word):
        ClassificationLoss(3, **options)


ALLOWED = torch.tensor([[True, True, True, True], [True, False, True, True], [False, True, True, False]])


@pytest.mark.parametrize(("smoothing", "gamma"), list(product([0.0, 0.2], [0.0, 2.0])))
def test_a_class_that_a_corpus_lacks_is_out_of_the_softmax(smoothing: float, gamma: float) -> None:
    """Each clip's loss is what the formula gives for a problem that has only the allowed classes."""
    logits, _, mixtures = batch(3)
    targets = mixtures * ALLOWED
    targets /= targets.sum(dim=1, keepdim=True)
    loss = ClassificationLoss(4, class_weights=WEIGHTS, label_smoothing=smoothing, focal_gamma=gamma)
    total, norm = 0.0, 0.0
    for row, target, allowed in zip(logits.numpy(), targets.numpy(), ALLOWED.numpy(), strict=True):
        weights = np.array(WEIGHTS)[allowed]
        share = float(weights @ target[allowed])
        total += share * by_hand(row[None, allowed], target[None, allowed], weights, smoothing, gamma)
        norm += share
    assert loss(logits, targets, ALLOWED).item() == pytest.approx(total / norm, rel=1e-6)


def test_a_masked_class_gets_no_gradient_and_all_classes_allowed_is_no_mask() -> None:
    logits, classes, _ = batch(3)
    loss = ClassificationLoss(4, label_smoothing=0.1, focal_gamma=1.0)
    targets = torch.tensor([0, 2, 1])
    logits.requires_grad_()
    loss(logits, targets, ALLOWED).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[~ALLOWED].any()
    assert (logits.grad[ALLOWED] != 0).all()
    everything = torch.ones_like(ALLOWED)
    torch.testing.assert_close(loss(logits, classes, everything), loss(logits, classes))
