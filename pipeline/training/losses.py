"""The training loss: a loss against the labels, and one against the answers of trained models (teachers).

Cross-entropy and focal loss, with class weights, label smoothing and mixed (soft) targets, are one formula. With target
distribution t (one row for each clip), smoothing e, class weights w and focal gamma:

    t' = (1 - e) t + e / C
    loss = -sum_ic w_c t'_ic (1 - p_ic)^gamma log p_ic / sum_ic w_c t_ic

gamma = 0 is `torch.nn.functional.cross_entropy`; gamma > 0 is Lin et al. 2017, "Focal Loss for Dense Object Detection".
A clip of a corpus that lacks some classes gives no evidence about them: p is then the softmax over the clip's `allowed`
classes only, and the smoothing is spread over these (C is their number).
Limits: with several workers, each worker's denominator is that of its own part of the batch.

Teachers: knowledge distillation (Hinton, Vinyals & Dean 2015), with the same augmented example for teacher and student
(Beyer et al. 2022, "Knowledge distillation: A good teacher is patient and consistent"). With share d and the teachers'
mean probabilities q, the loss of an example is (1 - d) times the loss against the labels plus d times the cross-entropy
-sum_c q_c log p_c. If a clip's corpus lacks classes, p and q are renormalised over those it has.
Limits: the teachers need the student's features, and its classes in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.data.splits import HASH_COLUMN, leaked
from pipeline.features.features import FeatureConfig
from pipeline.models.bundle import load_bundle
from pipeline.models.networks import ConvBlock
from pipeline.storage.errors import SerError


class ClassificationLoss(nn.Module):
    """Mean loss of a batch, by the module's formula; without class weights all are 1.

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
            raise SerError(
                f"{len(class_weights)} class weights for {n_classes} classes; give one weight for each class"
            )
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

        `allowed` (B, C) bool: the classes of each clip's softmax, which include its target; None: all classes.
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
    """Log-softmax of logits (B, C) over the `allowed` classes, (B, C) bool; None: over all.

    Other classes get 0 instead of -inf, so that their product with a probability of 0 is 0.
    """
    if allowed is None:
        return functional.log_softmax(logits, dim=1)
    inside = functional.log_softmax(logits.masked_fill(~allowed, -torch.inf), dim=1)
    return inside.masked_fill(~allowed, 0.0)


DISTILL = 0.7


@dataclass(frozen=True)
class Teachers:
    """Trained models in evaluation mode, and their share of the loss."""

    models: Sequence[nn.Module]
    share: float = DISTILL

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise SerError(f"distill share {self.share}; expected a number above 0 and at most 1")

    @torch.no_grad()
    def answers(self, features: Tensor) -> Tensor:
        """Mean probabilities (B, C) for a batch of features (B, *input_shape)."""
        return torch.stack([model(features).float().softmax(dim=1) for model in self.models]).mean(dim=0)

    def loss(self, features: Tensor, logits: Tensor, by_labels: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The student's loss, a scalar: `logits` (B, C) are its answers, `by_labels` its loss against the labels.

        `allowed` (B, C) bool: the classes that each clip's corpus has; None: all classes.
        """
        taught = self.answers(features)
        if allowed is not None:
            taught = taught * allowed
            taught = taught / taught.sum(dim=1, keepdim=True)
        taught_loss = -(taught * log_probabilities(logits, allowed)).sum(dim=1).mean()
        return (1 - self.share) * by_labels + self.share * taught_loss


def refuse_leaks(paths: Sequence[Path], splits: Mapping[str, pd.DataFrame], what: str = "the teacher") -> None:
    """Refuse earlier models that were trained on recordings of the new model's ``inner_val`` or ``test`` part.

    An earlier model may have chosen its epoch by the same ``inner_val`` part, as it did not train on it. ``what`` names
    it in the message.

    Raises:
        SerError: names the model, the part, and how many of its recordings the model was trained on.
    """
    for path in paths:
        training = load_bundle(path).training
        if training.empty:
            raise SerError(f"{what} {path} has no list of its training recordings; train it again")
        learnt = training[training["split"] != "inner_val"] if "split" in training.columns else training
        for part, used in (("inner_val", learnt), ("test", training)):
            known = int(leaked(splits[part], used).sum()) if HASH_COLUMN in splits[part] else 0
            if known:
                raise SerError(
                    f"{what} {path} was trained on {known} recordings of the {part} part, which would make the new "
                    "model look too good; train both on the same split"
                )


def without_batch_norms(model: nn.Module) -> nn.Module:
    """Fold the batch norms of a trained 2-D model into the convolutions before them, in place."""
    for block in model.modules():
        if isinstance(block, ConvBlock):
            convolution, norm = block[0].eval(), block[1].eval()
            assert isinstance(convolution, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            block[0], block[1] = fuse_conv_bn_eval(convolution, norm), nn.Identity()
    return model


def load_teachers(
    paths: Sequence[Path], share: float, labels: Sequence[str], features: FeatureConfig, device: str = "cpu"
) -> Teachers | None:
    """The models of these bundles as teachers; None if there are no paths.

    Raises:
        SerError: no bundle, other classes than `labels`, other features than `features`, or a share out of range.
    """
    models = []
    for path in paths:
        bundle = load_bundle(path)
        if tuple(bundle.labels) != tuple(labels):
            raise SerError(
                f"the teacher {path} has the classes {', '.join(bundle.labels)}; expected {', '.join(labels)}"
            )
        if bundle.features.fingerprint() != features.fingerprint():
            raise SerError(
                f"the teacher {path} needs other features ({bundle.features.unlike(features)}); train one on these"
            )
        model = without_batch_norms(bundle.build_model()).requires_grad_(False).to(device)
        if len(features.input_shape) == 3:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        models.append(model)
    return Teachers(models, share) if models else None
