"""Temperature scaling: one number that makes confidences honest and changes no answer.

Guo, Pleiss, Sun & Weinberger, "On Calibration of Modern Neural Networks" (ICML 2017): the logits are divided by the T
that minimises the log-loss on recordings the model was not trained on. It starts from probabilities: their logarithms
are logits up to a constant that the softmax removes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from pipeline.evaluation.outcomes import Floats, Ints, brier, log_loss, reliability
from pipeline.storage.errors import SerError

_RANGE = (0.05, 20.0)
_FLOOR = 1e-12  # of a probability, before its logarithm
MIN_RECORDINGS = 30


@dataclass(frozen=True)
class Calibration:
    """A temperature, and the figures of the recordings it was fitted on, before and after."""

    temperature: float
    n: int
    before: dict[str, float]
    after: dict[str, float]


def fit_temperature(truth: Ints, probabilities: Floats) -> Calibration:
    """The temperature that minimises the log-loss.

    Args:
        truth: (n,) class indices.
        probabilities: (n, C), at temperature 1.

    Raises:
        SerError: too few recordings, or probabilities that are none.
    """
    if len(truth) < MIN_RECORDINGS:
        raise SerError(f"{len(truth)} recordings are too few to fit a temperature; expected {MIN_RECORDINGS} or more")
    if not np.isfinite(probabilities).all() or probabilities.min() < 0:
        raise SerError("the probabilities hold negative or missing numbers; give what jobs.evaluate wrote")

    def loss(log_temperature: float) -> float:
        return log_loss(truth, scaled(probabilities, float(np.exp(log_temperature))))

    found = minimize_scalar(loss, bounds=np.log(_RANGE), method="bounded", options={"xatol": 1e-6})
    temperature = float(np.exp(found.x))
    after = scaled(probabilities, temperature)
    return Calibration(temperature, len(truth), _figures(truth, probabilities), _figures(truth, after))


def scaled(probabilities: Floats, temperature: float) -> Floats:
    """Probabilities (n, C) at another temperature."""
    logits = np.log(np.maximum(probabilities, _FLOOR)) / temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _figures(truth: Ints, probabilities: Floats) -> dict[str, float]:
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    return {
        "log_loss": log_loss(truth, probabilities),
        "brier": brier(truth, probabilities),
        "ece": float(reliability(confidence, correct).ece),
    }
