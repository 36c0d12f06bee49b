"""The settings of a training run: optimiser, loss, sampling, augmentation, stopping.

Also the learning-rate schedules, for `torch.optim.lr_scheduler.LambdaLR`. `cosine`: Loshchilov & Hutter 2017 without
restarts, down to 0. `onecycle`: Smith & Topin 2018 with cosine curves (rise from 1/25 of the peak, fall to 1e-4 of the
start). Limits: the momentum is constant.
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
ONECYCLE_RISE = 0.15  # share of the steps in which the rate rises, unless warm-up epochs are given
_START_DIVISOR = 25.0
_END_DIVISOR = 1e4
# settings that may change when a run is resumed
_FREE = frozenset({"threads", "channels_last", "mixed_precision", "cpu_bfloat16", "patience"})


def _about(group: str, text: str, **how: Any) -> dict[str, Any]:
    """Metadata that makes a field an option of the commands: its group, its help text; ``how``: metavar, choices."""
    return {"group": group, "help": text, **how}


def _option(default: Any, group: str, text: str, **how: Any) -> Any:
    return field(default=default, metadata=_about(group, text, **how))


_LOSS, _LOOP, _WORKERS = "model and loss", "training", "workers"
_NO_RECIPE = frozenset({"corpus_share", "threads", "cpu_bfloat16"})  # they depend on the data or the machine


@dataclass(frozen=True)
class FitConfig:
    """Settings of a run; kept in every checkpoint. Most fields are also options of the commands.

    Raises:
        SerError: a value out of range, an unknown scheduler or augmentation.
    """

    epochs: int = _option(50, _LOOP, "largest number of epochs")
    batch_size: int = _option(64, _LOOP, "recordings in a batch, over all workers")
    lr: float = _option(1e-4, _LOOP, "highest learning rate")
    weight_decay: float = _option(1e-5, _LOOP, "weight decay of AdamW")
    scheduler: str = _option("cosine", _LOOP, "learning-rate schedule", choices=SCHEDULERS)
    warmup_epochs: float = _option(0.0, _LOOP, "epochs in which the learning rate rises to its highest value")
    clip_norm: float = _option(0.0, _LOOP, "largest gradient norm; 0: no clipping")
    label_smoothing: float = _option(0.0, _LOSS, "share of the target that is spread over all classes")
    use_focal: bool = _option(False, _LOSS, "focal loss instead of cross-entropy")
    focal_gamma: float = _option(2.0, _LOSS, "gamma of the focal loss: the higher, the less easy recordings count")
    class_weights: tuple[float, ...] | None = _option(
        None,
        _LOSS,
        "class weights in the loss; balanced: inverse to the class frequency (default none)",
        metavar="balanced|none|CLASS:WEIGHT,...",
    )
    oversample_boost: dict[int, float] = field(
        default_factory=dict,
        metadata=_about(
            _LOSS,
            "draw these classes more often by this factor; a class is an index or a name: 1:2.0,sad:1.5",
            metavar="CLASS:FACTOR,...",
        ),
    )
    corpus_share: dict[str, float] = field(
        default_factory=dict,
        metadata=_about(
            _LOSS,
            "share of each corpus (column corpus) in the recordings drawn for training (default: in proportion to the "
            "square root of its size)",
            metavar="CORPUS:SHARE,...",
        ),
    )
    draws: int = _option(0, _LOOP, "recordings drawn in each epoch; 0: as many as the training part has")
    mask_missing_classes: bool = _option(
        True, _LOSS, "compute the softmax of a recording only over the classes that its corpus has"
    )
    ema: float = _option(
        0.0, _LOOP, "decay of the exponential moving average of the weights, such as 0.995; 0: no average"
    )
    augment: tuple[str, ...] = _option(
        (),
        _LOSS,
        "augmentations, separated by commas: crop, stretch, shift, warp, masks, mixup, gain, noise, band, pitch "
        "(default none); some take a strength: stretch:0.15 and warp:0.12 (largest change, as a share), gain:6 (dB), "
        "noise:10 (lowest SNR in dB), band:0.2 (probability)",
        metavar="NAME[:STRENGTH],...",
    )
    mixup_alpha: float = _option(0.2, _LOSS, "alpha of the Beta distribution of mixup")
    patience: int = _option(7, _LOOP, "epochs without a better validation F1 before stopping; 0: never stop early")
    seed: int = _option(42, _LOOP, "random seed of initial weights, sampling and augmentation")
    threads: int = _option(0, _WORKERS, "CPU threads of each worker; 0: an equal share of the CPUs")
    mixed_precision: bool = True  # bfloat16 on a GPU
    cpu_bfloat16: bool = _option(
        False, _LOOP, "bfloat16 arithmetic on CPUs, as on GPUs: faster if `lscpu` shows amx_bf16 or avx512_bf16"
    )
    channels_last: bool = True  # memory format of the 2-D models

    @classmethod
    def options(cls, *groups: str) -> list[Field[Any]]:
        """The fields that are options, in order; all, or those of these groups."""
        found = [option for option in fields(cls) if option.metadata]
        return [option for option in found if not groups or option.metadata["group"] in groups]

    @classmethod
    def recipe(cls) -> list[str]:
        """Names of the options that `--recipe` copies from an earlier run."""
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
            raise SerError("the learning rate must be above 0; weight decay, clip norm and warm-up must be at least 0")
        if self.seed >= 2**64:
            raise SerError(f"the seed {self.seed} is too large; expected a number below 2**64")
        if self.scheduler not in SCHEDULERS:
            raise SerError(f"unknown scheduler {self.scheduler!r}; choose one of {', '.join(SCHEDULERS)}")
        if not 0 <= self.ema < 1:
            raise SerError(f"EMA decay {self.ema}; expected 0 (off) or a value below 1, such as 0.995")
        self.augmentation()

    def augmentation(self) -> AugmentConfig:
        """The augmentation that these settings name."""
        from pipeline.training.augment import AugmentConfig  # here: it imports PyTorch, which --help does not need

        return AugmentConfig.of(self.augment, mixup_alpha=self.mixup_alpha)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FitConfig:
        """The inverse of `to_dict`, also for values read from JSON, which has neither tuples nor integer keys."""
        weights = values["class_weights"]
        restored = {
            "augment": tuple(values["augment"]),
            "class_weights": None if weights is None else tuple(weights),
            "oversample_boost": {int(index): factor for index, factor in values["oversample_boost"].items()},
        }
        return cls(**{**values, **restored})

    def check_continues(self, started: FitConfig) -> None:
        """Raise SerError if a run that was started with other settings may not be resumed with these."""
        ours, theirs = self.to_dict(), started.to_dict()
        for name in sorted(ours.keys() - _FREE):
            if ours[name] != theirs[name]:
                raise SerError(
                    f"the run was started with {name}={theirs[name]}, got {ours[name]}; resume with the same settings"
                )


def learning_rates(name: str, steps_per_epoch: int, epochs: int, warmup_epochs: float = 0.0) -> Callable[[int], float]:
    """A function from the step, 0 to `steps_per_epoch * epochs`, to the factor of the peak learning rate.

    With `cosine` the warm-up rises linearly; with `onecycle` it is the length of the rise.
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
    """Half a cosine: 1 at 0, falling to 0 at 1; 0 after that."""
    return (1 + math.cos(math.pi * min(progress, 1.0))) / 2
