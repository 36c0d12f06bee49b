"""Bundles of untrained networks, from a seed: their answers are chance, but differ between recordings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.data.labels import RAVDESS_LABELS
from pipeline.features.features import FeatureConfig
from pipeline.models.bundle import Bundle, save_bundle
from pipeline.models.networks import build_model

NARROW = {"width": 0.125}


def untrained(
    folder: Path,
    model: str = "inception",
    options: Mapping[str, float] = NARROW,
    *,
    labels: Sequence[str] = RAVDESS_LABELS,
    features: FeatureConfig | None = None,
    seed: int = 0,
    **more: Any,
) -> Bundle:
    """A network whose batch norms are set on noise; ``more`` goes to ``save_bundle``."""
    features = features or FeatureConfig()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        network = build_model(model, options, len(labels), features.input_shape)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                module.momentum = 1.0  # running statistics are those of the one batch that follows
        network.train()(torch.randn(16, *features.input_shape))
    made = {"name": folder.name, "state_dict": network.state_dict(), "model_name": model, "model_options": options}
    return save_bundle(folder, **made | {"labels": labels, "features": features, "metrics": {}} | more)


def resaved(bundle: Bundle, folder: Path, **changes: Any) -> Bundle:
    """The bundle once more in another folder, with ``changes``."""
    names = ("model_name", "model_options", "labels", "features")
    same = {name: getattr(bundle, name) for name in names}
    same |= {"name": folder.name, "state_dict": bundle.state_dict(), "metrics": {}}
    return save_bundle(folder, **same | changes)
