"""Classification losses: cross-entropy and focal loss, with class weights, label smoothing and mixed (soft) targets.

Both are one formula. With target distribution t (one row a clip), smoothing e, class weights w and focusing gamma:

    t' = (1 - e) t + e / C
    loss = -sum_ic w_c t'_ic (1 - p_ic)^gamma log p_ic / sum_ic w_c t_ic

gamma = 0 is `torch.nn.functional.cross_entropy`; gamma > 0 is Lin et al. 2017, "Focal Loss for Dense Object Detection".
A clip of a corpus that lacks some classes says nothing about them: with its row of `allowed` classes, p is the softmax
over those alone, and the smoothing is spread over those alone (C is their number).
Limits: under several workers the denominator is that of each worker's own part of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.storage.errors import SerError


class ClassificationLoss(nn.Module):
    """Mean loss of a batch; see the module's formula.

    Args:
        n_classes: C.
        class_weights: one positive weight a class, or None for ones.
        label_smoothing: e in [0, 1).
        focal_gamma: 0 = cross-entropy.

    Raises:
        SerError: a wrong number of weights, or a value out of range.
    """

    weights: Tensor

    def __init__(
        self,
        n_classes: int,
        *,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
    ) -> None:
        super().__init__()
        if class_weights is not None and len(class_weights) != n_classes:
            raise SerError(f"{len(class_weights)} class weights for {n_classes} classes; give one weight a class")
        if class_weights is not None and min(class_weights) <= 0:
            raise SerError(f"class weight {min(class_weights)}; weights must be greater than 0")
        if not 0 <= label_smoothing < 1:
            raise SerError(f"label smoothing {label_smoothing}; expected 0 <= value < 1")
        if focal_gamma < 0:
            raise SerError(f"focal gamma {focal_gamma}; expected 0 (cross-entropy) or more")
        self.n_classes = n_classes
        self.label_smoothing = label_smoothing
        self.focal_gamma = focal_gamma
        self.register_buffer("weights", torch.tensor(class_weights or [1.0] * n_classes), persistent=False)

    def forward(self, logits: Tensor, targets: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Loss of logits (B, C) against class numbers (B,) int64 or distributions (B, C) float; a scalar.

        `allowed` (B, C) bool: the classes of each clip's softmax; all where it is None. Targets lie within them.
        """
        if targets.ndim == 1:
            targets = functional.one_hot(targets, self.n_classes).to(logits.dtype)
        log_p = log_probabilities(logits, allowed)
        weighted = targets * self.weights
        if allowed is None:
            evenly: Tensor | float = 1 / self.n_classes
        else:
            evenly = allowed.to(log_p.dtype) / allowed.sum(dim=1, keepdim=True)
        smooth = ((1 - self.label_smoothing) * targets + self.label_smoothing * evenly) * self.weights
        if self.focal_gamma:
            smooth = smooth * (1 - log_p.exp()).clamp_min(1e-12) ** self.focal_gamma
        return -(smooth * log_p).sum() / weighted.sum()


def log_probabilities(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Log-softmax of (B, C) over the classes `allowed` (B, C) bool, 0 at the others; over all where it is None."""
    if allowed is None:
        return functional.log_softmax(logits, dim=1)
    inside = functional.log_softmax(logits.masked_fill(~allowed, -torch.inf), dim=1)
    return inside.masked_fill(~allowed, 0.0)
