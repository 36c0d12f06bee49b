"""Everything that decides a training run, given data and model: optimiser, loss, sampling, augmentation, stopping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.storage.errors import SerError
from pipeline.training.augment import AugmentConfig
from pipeline.training.schedules import SCHEDULERS

# may change when a run is resumed
_FREE = frozenset({"threads", "channels_last", "mixed_precision", "cpu_bfloat16", "patience"})


@dataclass(frozen=True)
class FitConfig:
    """Settings of a run; kept in every checkpoint.

    Raises:
        SerError: a value out of range, an unknown scheduler or augmentation.
    """

    epochs: int = 50
    batch_size: int = 64  # of all workers together
    lr: float = 1e-4
    weight_decay: float = 1e-5
    scheduler: str = "cosine"
    warmup_epochs: float = 0.0
    clip_norm: float = 0.0  # 0 = no clipping
    label_smoothing: float = 0.0
    use_focal: bool = False
    focal_gamma: float = 2.0
    class_weights: tuple[float, ...] | None = None
    oversample_boost: dict[int, float] = field(default_factory=dict)
    corpus_share: dict[str, float] = field(default_factory=dict)  # of the draws; empty: by the root of their size
    draws: int = 0  # of an epoch; 0 = as many as there are recordings
    mask_missing_classes: bool = True  # a class that a corpus lacks is not in the softmax of its clips
    ema: float = 0.0  # decay an update; 0 = no average
    augment: tuple[str, ...] = ()  # names, with or without a strength, as warp:0.2
    mixup_alpha: float = 0.2
    patience: int = 7  # epochs without a better validation weighted F1; 0 = never stop early
    seed: int = 42
    threads: int = 0  # math threads of a worker; 0 = as PyTorch chooses
    mixed_precision: bool = True  # bfloat16 on a GPU
    cpu_bfloat16: bool = False  # bfloat16 on CPUs too: faster where they have AMX
    channels_last: bool = True  # memory format of the 2-D models

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise SerError(f"{name} must be a finite number, got {value}")
        if self.epochs < 1 or self.batch_size < 1:
            raise SerError("epochs and batch size must be at least 1")
        if min(self.patience, self.threads, self.seed, self.draws) < 0:
            raise SerError("patience, threads, seed and draws must be at least 0")
        if not self.lr > 0 or self.weight_decay < 0 or self.clip_norm < 0 or self.warmup_epochs < 0:
            raise SerError("the learning rate must be above 0; weight decay, clip norm and warm-up at least 0")
        if self.seed >= 2**64:
            raise SerError(f"the seed {self.seed} is too large; expected a number below 2**64")
        if self.scheduler not in SCHEDULERS:
            raise SerError(f"unknown scheduler {self.scheduler!r}; choose one of {', '.join(SCHEDULERS)}")
        if not 0 <= self.ema < 1:
            raise SerError(f"EMA decay {self.ema}; expected 0 (off) or a value below 1, as 0.995")
        self.augmentation()

    def augmentation(self) -> AugmentConfig:
        """The augmentation that these settings name."""
        return AugmentConfig.of(self.augment, mixup_alpha=self.mixup_alpha)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FitConfig:
        """The inverse of `to_dict`, also after a way through JSON, which knows neither tuples nor integer keys."""
        weights = values["class_weights"]
        restored = {
            "augment": tuple(values["augment"]),
            "class_weights": None if weights is None else tuple(weights),
            "oversample_boost": {int(index): factor for index, factor in values["oversample_boost"].items()},
        }
        return cls(**{**values, **restored})

    def check_continues(self, started: FitConfig) -> None:
        """Refuse to go on with a run that was started with settings that would give other weights.

        Raises:
            SerError: names the first setting that differs.
        """
        ours, theirs = self.to_dict(), started.to_dict()
        for name in sorted(ours.keys() - _FREE):
            if ours[name] != theirs[name]:
                raise SerError(
                    f"the run was started with {name}={theirs[name]}, got {ours[name]}; resume with the same settings"
                )
