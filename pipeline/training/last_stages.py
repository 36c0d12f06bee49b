"""The last stage of an Inception trained on one's own recordings too, at a low rate, beginning with a new last layer.

Everything before it stays as it is: what it gives is computed once a recording, so that an epoch costs a tenth of a
whole one. Batch norms keep the parent's statistics, for a few voices have none of their own. Limits: one network of the
kind `inception`; ten epochs, no augmentation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.evaluation.outcomes import Floats, Ints
from pipeline.models.bundle import Bundle
from pipeline.models.networks import MEMBERS, EnhancedInceptionModel, build_model
from pipeline.training.batches import TrainingData
from pipeline.training.config import FitConfig
from pipeline.training.embeddings import with_last_layer
from pipeline.training.last_layer import (
    LAST_STAGE,
    OUTER_FOLDS,
    Choice,
    Found,
    Head,
    Parent,
    Recordings,
    fit_head,
    folds,
    loss_of,
)
from pipeline.training.loop import fit

MIN_MINUTES = 5.0  # less is not worth a try
EPOCHS, RATE, BATCH = 10, 1e-4, 32
_AT_ONCE = 16

Tell = Callable[[int, int], None]  # trainings done, in all


def can_be_tuned(bundle: Bundle) -> bool:
    """Whether a bundle's network has such a stage."""
    return bundle.model_name == "inception" and MEMBERS not in bundle.model_options


class Tail(nn.Module):
    """The last stage and the last layer: (B, channels, H, W) -> (B, C) logits."""

    def __init__(self, model: EnhancedInceptionModel) -> None:
        super().__init__()
        self.stage5, self.head = model.stage5, model.head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stage5(x))
        return logits

    def train(self, mode: bool = True) -> Tail:
        """As any module, but for batch norms, which go on with the statistics that they have."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def compete(
    found: Found,
    recordings: Recordings,
    parent: Parent,
    bundle: Bundle,
    features: np.ndarray,
    *,
    minutes: float,
    seed: int = 0,
    threads: int = 0,
    tell: Tell | None = None,
) -> tuple[Found, Mapping[str, Tensor] | None, float]:
    """The better, by log-loss out of fold, of a new last layer and of a last stage trained from there.

    Args:
        found: what `last_layer.adapt` found with this `seed`.
        features: (n, *input_shape) of the recordings.
        minutes: how long all trainings may take.

    Returns:
        What is better; the network's weights where that is the last stage; and, where the minutes do not suffice, how
        many would (else 0).
    """
    started = time.monotonic()
    given = before_tail(bundle, features)
    fold_of = folds(recordings, OUTER_FOLDS, seed)
    names = np.unique(fold_of)
    logits = np.empty_like(found.logits)
    for number, fold in enumerate(names):
        rows = np.flatnonzero(fold_of != fold)
        head = fit_head(recordings.where(rows), parent, found.choices[number])
        state = tune(bundle, head, given, recordings.truth, rows, seed=seed, threads=threads)
        logits[fold_of == fold] = tail_logits(bundle, state, given[fold_of == fold])
        if tell is not None:
            tell(number + 1, len(names) + 1)
        needed = (time.monotonic() - started) / (number + 1) * (len(names) + 1) / 60
        if needed > minutes:
            return found, None, needed
    if loss_of(logits, recordings.truth) >= loss_of(found.logits, recordings.truth):
        return found, None, 0.0
    state = tune(bundle, found.head, given, recordings.truth, np.arange(len(recordings)), seed=seed, threads=threads)
    return replace(found, logits=logits, choice=Choice(LAST_STAGE)), state, 0.0


def before_tail(bundle: Bundle, features: np.ndarray) -> np.ndarray:
    """What the last stage is given: float32 features (n, 1, n_mels, frames) -> (n, channels, H, W)."""
    model = bundle.build_model()
    assert isinstance(model, EnhancedInceptionModel)
    front = nn.Sequential(model.stem, model.stage3, model.stage4).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = []
    with torch.inference_mode():
        for start in range(0, len(features), _AT_ONCE):
            batch = torch.from_numpy(np.ascontiguousarray(features[start : start + _AT_ONCE]))
            found.append(front(batch.contiguous(memory_format=torch.channels_last)).contiguous())
    return torch.cat(found).numpy()


def tune(
    bundle: Bundle, head: Head, given: np.ndarray, truth: Ints, rows: Ints, *, seed: int = 0, threads: int = 0
) -> Mapping[str, Tensor]:
    """Weights of the whole network, its last stage trained on some of the recordings.

    Args:
        head: the last layer that it begins with.
        given: (n, channels, H, W) of `before_tail`; truth: (n,) class indices; rows: which of them are learnt from.
    """
    model = build_model(bundle.model_name, dict(bundle.model_options), len(head.bias), bundle.features.input_shape)
    assert isinstance(model, EnhancedInceptionModel)
    model.load_state_dict(with_last_layer(bundle, head.weight, head.bias))
    data = TrainingData(bundle.features, given, truth, len(head.bias), rows, np.empty(0, np.int64))
    config = FitConfig(
        epochs=EPOCHS,
        batch_size=min(BATCH, len(rows)),
        lr=RATE,
        weight_decay=0.01,
        warmup_epochs=1.0,
        label_smoothing=0.1,
        seed=seed,
        threads=threads,
    )
    tail = Tail(model)
    tail.load_state_dict(fit(tail, data, config).weights)
    return model.eval().state_dict()


def tail_logits(bundle: Bundle, state: Mapping[str, Tensor], given: np.ndarray) -> Floats:
    """Logits (n, C) of a tuned network, of what `before_tail` gave (n, channels, H, W)."""
    n_classes = len(list(state.values())[-1])
    model = build_model(bundle.model_name, dict(bundle.model_options), n_classes, bundle.features.input_shape)
    assert isinstance(model, EnhancedInceptionModel)
    model.load_state_dict(state)
    tail = Tail(model).eval()
    with torch.inference_mode():
        parts = [tail(torch.from_numpy(given[i : i + 64])) for i in range(0, len(given), 64)]
    return torch.cat(parts).double().numpy()
