"""Everything that decides a training run, given data and model: optimiser, loss, sampling, augmentation, stopping.

Learning-rate schedules as factors of the peak, a function of the step, for `torch.optim.lr_scheduler.LambdaLR`.

`cosine`: Loshchilov & Hutter 2017 without restarts, to 0 (`CosineAnnealingLR`). `onecycle`: Smith & Topin 2018 with
cosine arms (`OneCycleLR`: rise from 1/25 of the peak, fall to 1e-4 of the start). Limits: momentum stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from pipeline.storage.errors import SerError

if TYPE_CHECKING:
    from pipeline.training.augment import AugmentConfig

SCHEDULERS = ("cosine", "onecycle")
ONECYCLE_RISE = 0.15  # share of the steps, unless warm-up epochs are given
_START_DIVISOR = 25.0
_END_DIVISOR = 1e4
# may change when a run is resumed
_FREE = frozenset({"threads", "channels_last", "mixed_precision", "cpu_bfloat16", "patience"})


def _about(group: str, told: str, **how: Any) -> dict[str, Any]:
    """What makes a setting an option of the commands too: its group there, its help; ``how``: metavar, choices."""
    return {"group": group, "help": told, **how}


def _option(default: Any, group: str, told: str, **how: Any) -> Any:
    return field(default=default, metadata=_about(group, told, **how))


_LOSS, _LOOP, _WORKERS = "model and loss", "training", "workers"
_NO_RECIPE = frozenset({"corpus_share", "threads", "cpu_bfloat16"})  # of these data, of this machine


@dataclass(frozen=True)
class FitConfig:
    """Settings of a run; kept in every checkpoint. The commands' options are made of these fields.

    Raises:
        SerError: a value out of range, an unknown scheduler or augmentation.
    """

    epochs: int = _option(50, _LOOP, "at most so many")
    batch_size: int = _option(64, _LOOP, "of all workers together")
    lr: float = _option(1e-4, _LOOP, "highest learning rate")
    weight_decay: float = _option(1e-5, _LOOP, "of AdamW")
    scheduler: str = _option("cosine", _LOOP, "course of the learning rate", choices=SCHEDULERS)
    warmup_epochs: float = _option(0.0, _LOOP, "rise to the highest rate")
    clip_norm: float = _option(0.0, _LOOP, "largest gradient norm; 0: no clipping")
    label_smoothing: float = _option(0.0, _LOSS, "share of the target spread over all classes")
    use_focal: bool = _option(False, _LOSS, "focal loss instead of cross-entropy")
    focal_gamma: float = _option(2.0, _LOSS, "how far easy clips count less")
    class_weights: tuple[float, ...] | None = _option(
        None, _LOSS, "weights in the loss (default none)", metavar="balanced|none|CLASS:WEIGHT,..."
    )
    oversample_boost: dict[int, float] = field(
        default_factory=dict,
        metadata=_about(_LOSS, "draw classes more often, by index or name: 1:2.0,sad:1.5", metavar="CLASS:FACTOR,..."),
    )
    corpus_share: dict[str, float] = field(
        default_factory=dict,
        metadata=_about(
            _LOSS,
            "how much of the draws each corpus gets (column corpus; default: by the square root of its size)",
            metavar="CORPUS:SHARE,...",
        ),
    )
    draws: int = _option(0, _LOOP, "recordings drawn an epoch; 0: as many as there are")
    mask_missing_classes: bool = _option(
        True, _LOSS, "take classes that a corpus has not got out of the softmax of its recordings"
    )
    ema: float = _option(0.0, _LOOP, "decay of the average of weights at an update, as 0.995; 0: none")
    augment: tuple[str, ...] = _option(
        (),
        _LOSS,
        "of crop, stretch, shift, warp, masks, mixup, gain, noise, band, pitch; with commas (default none); stronger "
        "or weaker than usual: stretch:0.15, warp:0.12 (shares), gain:6 (dB), noise:10 (lowest SNR in dB), band:0.2 "
        "(how often)",
        metavar="NAME[:STRENGTH],...",
    )
    mixup_alpha: float = _option(0.2, _LOSS, "of the Beta distribution that mixes")
    patience: int = _option(7, _LOOP, "epochs without a better validation F1 before stopping; 0: never stop early")
    seed: int = _option(42, _LOOP, "of weights, order and augmentation")
    threads: int = _option(0, _WORKERS, "math threads a worker; 0: the CPUs shared out equally")
    mixed_precision: bool = True  # bfloat16 on a GPU
    cpu_bfloat16: bool = _option(
        False,
        _LOOP,
        "bfloat16 arithmetic on CPUs, as on GPUs: faster where `lscpu` shows amx_bf16 or avx512_bf16",
    )
    channels_last: bool = True  # memory format of the 2-D models

    @classmethod
    def options(cls, *groups: str) -> list[Field[Any]]:
        """The fields that are options, of these groups or of all, in order."""
        found = [option for option in fields(cls) if option.metadata]
        return [option for option in found if not groups or option.metadata["group"] in groups]

    @classmethod
    def recipe(cls) -> list[str]:
        """Names of the options that another training takes over from a run to learn as that did."""
        return [option.name for option in cls.options() if option.name not in _NO_RECIPE]

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
        from pipeline.training.augment import AugmentConfig  # and PyTorch, which the commands' help can do without

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


def learning_rates(name: str, steps_per_epoch: int, epochs: int, warmup_epochs: float = 0.0) -> Callable[[int], float]:
    """Factor of the peak learning rate at each step, from 0 to `steps_per_epoch * epochs`.

    Warm-up is linear from 0 for `cosine`; for `onecycle` it is the length of the rise.
    """
    total = steps_per_epoch * epochs
    warmup = min(round(warmup_epochs * steps_per_epoch), total)
    return _onecycle(total, warmup) if name == "onecycle" else _cosine(total, warmup)


def _cosine(total: int, warmup: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return _descent((step - warmup) / max(total - warmup, 1))

    return factor


def _onecycle(total: int, warmup: int) -> Callable[[int], float]:
    peak = float(warmup or ONECYCLE_RISE * total) - 1
    start, end = 1 / _START_DIVISOR, 1 / _START_DIVISOR / _END_DIVISOR

    def factor(step: int) -> float:
        if step < peak:
            return 1 - (1 - start) * _descent(step / peak)
        return end + (1 - end) * _descent((step - peak) / max(total - 1 - peak, 1))

    return factor


def _descent(progress: float) -> float:
    """Half a cosine: 1 at 0, 0 at 1 and after."""
    return (1 + math.cos(math.pi * min(progress, 1.0))) / 2
