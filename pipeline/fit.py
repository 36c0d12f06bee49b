"""The training loop in plain PyTorch: epochs, validation, early stopping, best weights, exact resume.

Runs alone, or in each of several workers once `torch.distributed` is initialised (DDP; gloo or nccl). AdamW, cosine or
one-cycle learning rate with warm-up, gradient clipping, an exponential moving average (EMA) of weights and buffers.
Validation is shared among the workers; every decision is made from the gathered numbers, so that all take the same one.
Every random choice is a function of (seed, epoch, worker), so that resuming from a checkpoint repeats nothing and loses
nothing. Limits: the validation part is small enough to be gathered after every epoch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.augment import AugmentConfig
from pipeline.batches import Batches, TrainingData
from pipeline.errors import SerError
from pipeline.losses import ClassificationLoss
from pipeline.sampling import WeightedSampler
from pipeline.schedules import SCHEDULERS, learning_rates

StateDict = dict[str, Tensor]
Record = dict[str, Any]  # one epoch: numbers for history.csv


@dataclass(frozen=True)
class FitConfig:
    """Everything that decides a training run, given data and model."""

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
    ema: float = 0.0  # decay an update; 0 = no average
    augment: tuple[str, ...] = ()
    mixup_alpha: float = 0.2
    patience: int = 7  # epochs without a better validation weighted F1; 0 = never stop early
    seed: int = 42
    threads: int = 0  # 0 = as PyTorch chooses
    mixed_precision: bool = True  # bfloat16, on GPU only
    channels_last: bool = True

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.patience < 0 or self.threads < 0:
            raise SerError("epochs and batch size must be at least 1, patience and threads at least 0")
        if not self.lr > 0 or self.weight_decay < 0 or self.clip_norm < 0 or self.warmup_epochs < 0:
            raise SerError("the learning rate must be above 0; weight decay, clip norm and warm-up at least 0")
        if self.scheduler not in SCHEDULERS:
            raise SerError(f"unknown scheduler {self.scheduler!r}; choose one of {', '.join(SCHEDULERS)}")
        if not 0 <= self.ema < 1:
            raise SerError(f"EMA decay {self.ema}; expected 0 (off) or a value below 1, as 0.995")
        AugmentConfig(self.augment, mixup_alpha=self.mixup_alpha)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FitConfig:
        """The inverse of `dataclasses.asdict`."""
        weights = values["class_weights"]
        tuples = {"augment": tuple(values["augment"]), "class_weights": None if weights is None else tuple(weights)}
        return cls(**{**values, **tuples})


@dataclass
class FitResult:
    """What a run came to. `weights` are the best by validation weighted F1, or the last without a validation part."""

    weights: StateDict
    best_epoch: int
    history: list[Record]
    stopped_early: bool = False
    interrupted: bool = False


EpochCallback = Callable[[Record, "Run"], None]
BatchCallback = Callable[[int, int, int], None]  # epoch, batches done, batches in all


def fit(
    model: nn.Module,
    data: TrainingData,
    config: FitConfig,
    *,
    device: str = "cpu",
    state: dict[str, Any] | None = None,
    on_epoch: EpochCallback | None = None,
    on_batch: BatchCallback | None = None,
) -> FitResult:
    """Train `model` in place.

    Args:
        state: a checkpoint made by `Run.state`, to go on from.
        on_epoch: called in every worker after each epoch with its record and the run.
        on_batch: called in every worker after each training step.

    Returns:
        The best weights and the history. On Ctrl-C (alone, not under several workers) the best so far.

    Raises:
        SerError: settings that do not fit the data or the number of workers; a loss that is not finite.
    """
    run = Run(model, data, config, device)
    if state is not None:
        run.load_state(state)
    interrupted = False
    try:
        while not run.finished:
            record = run.epoch(on_batch)
            if on_epoch is not None:
                on_epoch(record, run)
    except KeyboardInterrupt:
        if run.world > 1 or not run.history:
            raise
        interrupted = True
    return FitResult(run.chosen_weights(), run.best_epoch, run.history, run.stopped_early, interrupted)


class Run:
    """A training run between two epochs: all that a checkpoint holds."""

    def __init__(self, model: nn.Module, data: TrainingData, config: FitConfig, device: str = "cpu") -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config, self.data, self.device = config, data, torch.device(device)
        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.model = model.to(self.device)
        if config.channels_last and len(data.config.input_shape) == 3:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trained: nn.Module = self.model
        if self.world > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.trained = DistributedDataParallel(self.model, device_ids=devices, broadcast_buffers=False)
        self.ema = _average(self.model, config.ema) if config.ema else None
        sampler = WeightedSampler.balanced(
            data.classes[data.train_rows],
            data.n_classes,
            batch_size=config.batch_size,
            seed=config.seed,
            boosts=config.oversample_boost,
        )
        self.batches = Batches(data, sampler, AugmentConfig(config.augment, mixup_alpha=config.mixup_alpha))
        self.loss = ClassificationLoss(
            data.n_classes,
            class_weights=config.class_weights,
            label_smoothing=config.label_smoothing,
            focal_gamma=config.focal_gamma if config.use_focal else 0.0,
        ).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            learning_rates(config.scheduler, len(self.batches), config.epochs, config.warmup_epochs),
        )
        self.history: list[Record] = []
        self.best_epoch = 0
        self.best_weights: StateDict | None = None

    @property
    def validates(self) -> bool:
        """Whether there are clips to choose the best epoch by."""
        return len(self.data.valid_rows) > 0

    @property
    def stopped_early(self) -> bool:
        """Whether the patience ran out."""
        waited = len(self.history) - self.best_epoch
        return bool(self.validates and self.config.patience and self.history and waited >= self.config.patience)

    @property
    def finished(self) -> bool:
        """Whether no epoch is left to do."""
        return len(self.history) >= self.config.epochs or self.stopped_early

    def epoch(self, on_batch: BatchCallback | None = None) -> Record:
        """Train and validate one epoch; returns its record, the same in every worker."""
        started = time.perf_counter()
        number = len(self.history) + 1
        torch.manual_seed(_epoch_seed(self.config.seed, number, self.rank))
        record: Record = {"epoch": number, "lr": self.scheduler.get_last_lr()[0]}
        record["train_loss"] = self._train(number, on_batch)
        trained = time.perf_counter()
        record |= self._validate()
        record["seconds"] = time.perf_counter() - started
        record["train_seconds"] = trained - started
        self.history.append(record)
        return record

    def _train(self, number: int, on_batch: BatchCallback | None) -> float:
        self.trained.train()
        total = torch.zeros((), device=self.device)
        for step, (features, targets) in enumerate(self.batches.epoch(number, self.rank, self.world), start=1):
            features, targets = features.to(self.device), targets.to(self.device)
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16, enabled=self._mixes_precision):
                loss = self.loss(self.trained(features).float(), targets)
            loss.backward()
            if self.config.clip_norm:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
            self.optimizer.step()
            self.scheduler.step()
            if self.ema is not None:
                self.ema.update_parameters(self.model)
            total += loss.detach()
            if on_batch is not None:
                on_batch(number, step, len(self.batches))
        for module in (self.model, self.ema):
            if module is not None and self.world > 1:
                _average_buffers(module, self.world)
        mean = float(self._sum(total)) / (len(self.batches) * self.world)
        if not np.isfinite(mean):
            raise SerError(f"the training loss became {mean} in epoch {number}; lower --lr or set --clip_norm 1")
        return mean

    @property
    def _mixes_precision(self) -> bool:
        return self.config.mixed_precision and self.device.type == "cuda"

    def _sum(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def _validate(self) -> Record:
        """Validation numbers of the better of raw and averaged weights, which are kept when they are the best yet."""
        if not self.validates:
            self.best_epoch = len(self.history) + 1
            return {"val_loss": None, "val_accuracy": None, "val_weighted_f1": None, "weights": self._last_name}
        candidates = {"raw": self.model} | ({"ema": self.ema.module} if self.ema is not None else {})
        scores = {name: self._score(module) for name, module in candidates.items()}
        name = max(scores, key=lambda n: (scores[n]["val_weighted_f1"], -scores[n]["val_loss"]))
        best = max((r["val_weighted_f1"] for r in self.history), default=-1.0)
        if scores[name]["val_weighted_f1"] > best:
            self.best_epoch = len(self.history) + 1
            self.best_weights = _copy(candidates[name])
        return scores[name] | {"weights": name}

    @property
    def _last_name(self) -> str:
        return "raw" if self.ema is None else "ema"

    def _score(self, module: nn.Module) -> Record:
        rows = self.data.valid_rows[self.rank :: self.world]
        logits = self._gather(self.logits(module, rows))
        classes = torch.from_numpy(self.data.classes[self.data.valid_rows])
        predicted = logits.argmax(dim=1)
        return {
            "val_loss": float(functional.cross_entropy(logits, classes)),
            "val_accuracy": float((predicted == classes).float().mean()),
            "val_weighted_f1": weighted_f1(classes.numpy(), predicted.numpy(), self.data.n_classes),
        }

    @torch.inference_mode()
    def logits(self, module: nn.Module, rows: np.ndarray) -> Tensor:
        """Logits of stored features: (len(rows), C) float32 on the CPU."""
        module.eval()
        parts = [torch.empty(0, self.data.n_classes)]
        for start in range(0, len(rows), 64):
            features = torch.from_numpy(self.data.features[rows[start : start + 64]]).to(self.device)
            with torch.autocast("cuda", torch.bfloat16, enabled=self._mixes_precision):
                parts.append(module(features).float().cpu())
        return torch.cat(parts)

    def _gather(self, logits: Tensor) -> Tensor:
        """Interleave the workers' parts again: row i of the validation part was scored by worker i % world."""
        if self.world == 1:
            return logits
        n = len(self.data.valid_rows)
        longest = -(-n // self.world)
        padded = functional.pad(logits, (0, 0, 0, longest - len(logits))).to(self.device)
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).reshape(-1, logits.shape[1])[:n].cpu()

    def chosen_weights(self) -> StateDict:
        """The best weights so far; without a validation part the last ones (the average, where there is one)."""
        if self.best_weights is not None:
            return self.best_weights
        return _copy(self.model if self.ema is None else self.ema.module)

    def state(self) -> dict[str, Any]:
        """A checkpoint: tensors and plain values only, loadable with `torch.load(weights_only=True)`.

        The random generators are not in it: they are seeded anew in every epoch from (seed, epoch, worker).
        """
        return {
            "version": 1,
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best_weights": self.best_weights,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was made.

        Raises:
            SerError: a checkpoint of another version or of other settings.
        """
        if state.get("version") != 1:
            raise SerError(f"the checkpoint has version {state.get('version')}, expected 1; start a new run")
        free = {"threads", "channels_last", "mixed_precision", "patience"}
        ours = asdict(self.config)
        theirs = asdict(FitConfig.from_dict(state["config"]))
        changed = sorted(name for name in ours if name not in free and ours[name] != theirs[name])
        if changed:
            name = changed[0]
            raise SerError(
                f"the run was started with {name}={theirs[name]}, got {ours[name]}; resume with the same settings"
            )
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.history = list(state["history"])
        self.best_epoch = state["best_epoch"]
        self.best_weights = state["best_weights"]


def weights_of(state: dict[str, Any]) -> StateDict:
    """The weights a checkpoint stands for: the best by validation, else the average, else the last."""
    if state["best_weights"] is not None:
        return dict(state["best_weights"])
    if state["ema"] is None:
        return dict(state["model"])
    prefix = "module."
    return {name[len(prefix) :]: value for name, value in state["ema"].items() if name.startswith(prefix)}


def weighted_f1(truth: np.ndarray, predicted: np.ndarray, n_classes: int) -> float:
    """F1 of each class, weighted by its clips; 0 for a class never predicted right (as scikit-learn)."""
    table = np.bincount(truth * n_classes + predicted, minlength=n_classes**2).reshape(n_classes, n_classes)
    support, guesses, right = table.sum(axis=1), table.sum(axis=0), table.diagonal()
    f1 = 2 * right / np.maximum(support + guesses, 1)
    return float((f1 * support).sum() / support.sum())


def _average(model: nn.Module, decay: float) -> AveragedModel:
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return averaged.requires_grad_(False)


def _average_buffers(module: nn.Module, world: int) -> None:
    """Give all workers the mean of their batch-norm statistics."""
    floating = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if not floating:
        return
    flat = torch.cat([buffer.flatten() for buffer in floating])
    dist.all_reduce(flat)
    for buffer, mean in zip(floating, (flat / world).split([b.numel() for b in floating]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def _copy(module: nn.Module) -> StateDict:
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in module.state_dict().items()}


def _epoch_seed(seed: int, epoch: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])
