"""Learning from trained models: their mean answer to each augmented example is part of the target.

Knowledge distillation (Hinton, Vinyals & Dean 2015) with teacher and student seeing the same view of an example,
mixtures and masks included (Beyer et al. 2022, "Knowledge distillation: A good teacher is patient and consistent").
With share d and the teachers' mean probabilities q of an example, its loss is (1 - d) times that against the labels
plus d times the cross-entropy -sum_c q_c log p_c. Where a clip's corpus lacks classes, p and q are renormalised over
those it has.
Limits: the teachers hear the features that the student is trained on, and know its classes in its order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.data.splits import HASH_COLUMN, leaked
from pipeline.features.features import FeatureConfig
from pipeline.models.bundle import load_bundle
from pipeline.models.networks import ConvBlock
from pipeline.storage.errors import SerError
from pipeline.training.losses import log_probabilities

DISTILL = 0.7


@dataclass(frozen=True)
class Teachers:
    """Trained models in evaluation mode, and the share of the loss that is theirs."""

    models: Sequence[nn.Module]
    share: float = DISTILL

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise SerError(f"distill share {self.share}; expected a number above 0, at most 1")

    @torch.no_grad()
    def answers(self, features: Tensor) -> Tensor:
        """Mean probabilities (B, C) for a batch of features (B, *input_shape)."""
        return torch.stack([model(features).float().softmax(dim=1) for model in self.models]).mean(dim=0)

    def loss(self, features: Tensor, logits: Tensor, by_labels: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The student's loss, a scalar: `logits` (B, C) are its answers, `by_labels` its loss against the labels.

        `allowed` (B, C) bool: the classes that each clip's corpus has; all where it is None.
        """
        taught = self.answers(features)
        if allowed is not None:
            taught = taught * allowed
            taught = taught / taught.sum(dim=1, keepdim=True)
        apart = -(taught * log_probabilities(logits, allowed)).sum(dim=1).mean()
        return (1 - self.share) * by_labels + self.share * apart


def refuse_leaks(paths: Sequence[Path], splits: Mapping[str, pd.DataFrame], what: str = "the teacher") -> None:
    """Refuse earlier models that were trained on what the new one is chosen or tested by.

    A model of the same split, whose epoch the same ``inner_val`` part chose, has not learnt from that part.

    Raises:
        SerError: names the model (``what`` it is to the new one), the part and how many recordings of it are known.
    """
    for path in paths:
        training = load_bundle(path).training
        if training.empty:
            raise SerError(f"{what} {path} does not list the recordings it was trained on; train it again")
        learnt = training[training["split"] != "inner_val"] if "split" in training.columns else training
        for part, used in (("inner_val", learnt), ("test", training)):
            known = int(leaked(splits[part], used).sum()) if HASH_COLUMN in splits[part] else 0
            if known:
                raise SerError(
                    f"{what} {path} was trained on {known} recordings of the {part} part, which would flatter the "
                    "new model; train both on the same split"
                )


def without_batch_norms(model: nn.Module) -> nn.Module:
    """A trained 2-D model, changed in place: batch norms become part of the convolutions before them."""
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
    """The models of bundles, or None when there are no paths.

    Raises:
        SerError: no bundle, or one of other classes or features than `labels` and `features`; a share out of range.
    """
    models = []
    for path in paths:
        bundle = load_bundle(path)
        if tuple(bundle.labels) != tuple(labels):
            raise SerError(
                f"the teacher {path} knows the classes {', '.join(bundle.labels)}; expected {', '.join(labels)}"
            )
        if bundle.features.fingerprint() != features.fingerprint():
            raise SerError(
                f"the teacher {path} hears {bundle.features.kind} features of other settings; train one on these"
            )
        model = without_batch_norms(bundle.build_model()).requires_grad_(False).to(device)
        if len(features.input_shape) == 3:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        models.append(model)
    return Teachers(models, share) if models else None
