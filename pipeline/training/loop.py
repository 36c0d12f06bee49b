"""The training loop in plain PyTorch: epochs, validation, early stopping, best weights, exact resume.

Runs in one process, or in each of several workers if `torch.distributed` (gloo or nccl) is initialised, by Ray Train,
torchrun or a test. The workers share the validation; each makes its decisions from the gathered results, so that all
decide the same. Random choices depend only on (seed, epoch, worker), so that a resumed run gives the same result.
Limits: the validation part must be small enough to be gathered after every epoch; batch-norm statistics are each
worker's own during an epoch and averaged at its end.

Freed memory is kept in the process for the next step. By default glibc returns large blocks to the kernel, which clears
every page again on the next allocation, and a step allocates over a gigabyte. Source: mallopt(3). Limits: only on Linux
with glibc; the process keeps its largest size.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.evaluation.outcomes import scores, tally
from pipeline.storage.errors import SerError
from pipeline.training.batches import Batches, TrainingData, WeightedSampler, shares_of
from pipeline.training.config import FitConfig, learning_rates
from pipeline.training.losses import ClassificationLoss, Teachers


@dataclass(frozen=True)
class Workers:
    """The rank of this process, and the number of all workers. With a single one every exchange returns its input."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Workers:
        """Rank and number from `torch.distributed`; a single worker if it is not initialised."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def share_gradients(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Wrap the model so that its backward pass averages gradients (not batch-norm statistics) over the workers."""
        if self.world == 1:
            return model
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    def wait_for_all(self) -> None:
        """Wait until every worker has called this."""
        if self.world > 1:
            dist.barrier()

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor, of any shape but the same in all workers, over all workers in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def average_buffers(self, module: nn.Module) -> None:
        """Replace each floating-point buffer (batch-norm statistics) by its mean over all workers."""
        floating = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        if self.world == 1 or not floating:
            return
        mean = self.sum(torch.cat([buffer.flatten() for buffer in floating])) / self.world
        for buffer, part in zip(floating, mean.split([b.numel() for b in floating]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def gather_rows(self, rows: Tensor, total: int, device: torch.device) -> Tensor:
        """Interleave the workers' rows: row i of the (total, C) result is row i // world of worker i % world."""
        if self.world == 1:
            return rows
        longest = -(-total // self.world)
        padded = functional.pad(rows, (0, 0, 0, longest - len(rows))).to(device)
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).reshape(-1, rows.shape[1])[:total].to(rows.device)


# numbers and limits of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_INT = 2**31 - 1
_MMAP_THRESHOLDS = (2**30, 2**25)  # the first accepted one is used: glibc before 2.35 allows at most 32 MiB

IN_WORKERS = {"MALLOC_ARENA_MAX": "1"}
"""Environment of processes that train in a thread of their own, whose separate malloc arena would return its memory."""


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, from now on; returns False if the C library cannot do so."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None:  # also with musl
        return False
    accepted = any(mallopt(_M_MMAP_THRESHOLD, threshold) for threshold in _MMAP_THRESHOLDS)
    return bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)) and accepted


CHECKPOINT_VERSION = 1
_VALIDATION_BATCH = 64


class DivergedError(SerError):
    """The training loss is no longer a finite number. All workers raise this in the same epoch."""


StateDict = dict[str, Tensor]
Record = dict[str, Any]  # one epoch: a row of history.csv


@dataclass
class FitResult:
    """The result of a run. `weights`: the best by validation weighted F1; without a validation part the last ones."""

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
    teachers: Teachers | None = None,
    state: dict[str, Any] | None = None,
    on_epoch: EpochCallback | None = None,
    on_batch: BatchCallback | None = None,
) -> FitResult:
    """Train `model` in place.

    Args:
        teachers: trained models, on `device`, whose answers are part of the targets.
        state: a checkpoint made by `Run.state`, to continue from.
        on_epoch: called in every worker after each epoch with its record and the run.
        on_batch: called in every worker after each training step.

    After Ctrl-C the result is the best so far; with several workers Ctrl-C is raised instead.

    Raises:
        SerError: settings that do not fit the data or the number of workers.
        DivergedError: a loss that is not finite.
    """
    run = Run(model, data, config, device, teachers)
    if state is not None:
        run.load_state(state)
    interrupted = False
    try:
        while not run.finished:
            record = run.epoch(on_batch)
            if on_epoch is not None:
                on_epoch(record, run)
    except KeyboardInterrupt:
        if run.workers.world > 1 or not run.history:
            raise
        interrupted = True
    return FitResult(run.chosen_weights(), run.best_epoch, run.history, run.stopped_early, interrupted)


def batches_of(data: TrainingData, config: FitConfig) -> Batches:
    """The batches of a run, over all its workers.

    Raises:
        SerError: settings that do not fit the data.
    """
    rows = data.train_rows
    corpora = None if data.corpus_of is None else data.corpus_of[rows]
    trained = data.corpora if corpora is None else [data.corpora[k] for k in np.unique(corpora)]
    sampler = WeightedSampler.balanced(
        data.classes[rows],
        data.n_classes,
        batch_size=config.batch_size,
        seed=config.seed,
        boosts=config.oversample_boost,
        corpora=corpora,
        shares=shares_of(config.corpus_share, data.corpora, trained),
        n_draws=config.draws,
    )
    return Batches(data, sampler, config.augmentation(), mask_missing=config.mask_missing_classes)


class Run:
    """A training run: its state between two epochs is what a checkpoint holds."""

    def __init__(
        self,
        model: nn.Module,
        data: TrainingData,
        config: FitConfig,
        device: str = "cpu",
        teachers: Teachers | None = None,
    ) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config, self.data, self.device = config, data, torch.device(device)
        self.teachers = teachers
        if self.device.type == "cpu":
            keep_freed_memory()
        self.workers = Workers.current()
        self.batches = batches_of(data, config)
        self.loss = ClassificationLoss(
            data.n_classes,
            class_weights=config.class_weights,
            label_smoothing=config.label_smoothing,
            focal_gamma=config.focal_gamma if config.use_focal else 0.0,
        ).to(self.device)
        self.model = model.to(self.device)
        if config.channels_last and len(data.config.input_shape) == 3:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trained = self.workers.share_gradients(self.model, self.device)
        self.ema: AveragedModel | None = None
        if config.ema:
            average = get_ema_multi_avg_fn(config.ema)
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True).requires_grad_(False)
        decay = config.weight_decay
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=decay, fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, learning_rates(config.scheduler, len(self.batches), config.epochs, config.warmup_epochs)
        )
        self.history: list[Record] = []
        self.best_epoch = 0
        self.best_weights: StateDict | None = None

    @property
    def validates(self) -> bool:
        """Whether there is a validation part to choose the best epoch by."""
        return len(self.data.valid_rows) > 0

    @property
    def stopped_early(self) -> bool:
        """Whether the validation F1 has not improved for `patience` epochs."""
        waited = len(self.history) - self.best_epoch
        return bool(self.validates and self.config.patience and self.history and waited >= self.config.patience)

    @property
    def finished(self) -> bool:
        """Whether no epoch is left to train."""
        return len(self.history) >= self.config.epochs or self.stopped_early

    def epoch(self, on_batch: BatchCallback | None = None) -> Record:
        """Train and validate one epoch; returns its record, the same in every worker except for the seconds."""
        started = time.perf_counter()
        number = len(self.history) + 1
        seed = np.random.SeedSequence([self.config.seed, number, self.workers.rank])
        torch.manual_seed(int(seed.generate_state(1)[0]))
        record: Record = {"epoch": number, "lr": self.scheduler.get_last_lr()[0]}
        record["train_loss"] = self._train(number, on_batch)
        trained = time.perf_counter()
        record |= self._validate(number)
        record["seconds"] = time.perf_counter() - started
        record["train_seconds"] = trained - started
        self.history.append(record)
        return record

    def _train(self, number: int, on_batch: BatchCallback | None) -> float:
        self.trained.train()
        total = torch.zeros((), device=self.device)
        batches = self.batches.epoch(number, self.workers.rank, self.workers.world)
        for step, (features, targets, allowed) in enumerate(batches, start=1):
            self.optimizer.zero_grad(set_to_none=True)
            inputs = features.to(self.device)
            classes = None if allowed is None else allowed.to(self.device)
            with self._autocast():
                logits = self.trained(inputs).float()
                loss = self.loss(logits, targets.to(self.device), classes)
                if self.teachers is not None:
                    loss = self.teachers.loss(inputs, logits, loss, classes)
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
        for module in filter(None, (self.model, self.ema)):
            self.workers.average_buffers(module)
        mean = float(self.workers.sum(total)) / (len(self.batches) * self.workers.world)
        if not np.isfinite(mean):
            raise DivergedError(f"the training loss became {mean} in epoch {number}; lower --lr or set --clip_norm 1")
        return mean

    def _autocast(self) -> torch.autocast:
        on_cpu = self.device.type == "cpu"
        enabled = self.config.cpu_bfloat16 if on_cpu else self.config.mixed_precision
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _validate(self, number: int) -> Record:
        """Validation figures of the raw or the averaged weights, whichever are better; keeps them if best so far."""
        candidates: dict[str, nn.Module] = {"raw": self.model} | ({"ema": self.ema.module} if self.ema else {})
        if not self.validates:
            self.best_epoch = number
            return {"val_loss": None, "val_accuracy": None, "val_weighted_f1": None, "weights": list(candidates)[-1]}
        found = {name: self._score(module) for name, module in candidates.items()}
        name = max(found, key=lambda n: (found[n]["val_weighted_f1"], -found[n]["val_loss"]))
        best_yet = max((record["val_weighted_f1"] for record in self.history), default=-1.0)
        if found[name]["val_weighted_f1"] > best_yet:
            self.best_epoch = number
            self.best_weights = _copy(candidates[name])
        return found[name] | {"weights": name}

    def _score(self, module: nn.Module) -> Record:
        rows = self.data.valid_rows
        mine = self.logits(module, rows[self.workers.rank :: self.workers.world])
        logits = self.workers.gather_rows(mine, len(rows), self.device)
        allowed = self.data.allowed(rows) if self.config.mask_missing_classes else None
        if allowed is not None:  # as in training: only the classes that the clip's corpus has
            logits = logits.masked_fill(~allowed, -torch.inf)
        classes = self.data.classes[rows]
        found = scores(tally(classes, logits.argmax(dim=1).numpy(), self.data.n_classes))
        return {
            "val_loss": float(functional.cross_entropy(logits, torch.from_numpy(classes))),
            "val_accuracy": float(found.accuracy),
            "val_weighted_f1": float(found.weighted_f1),
        }

    @torch.inference_mode()
    def logits(self, module: nn.Module, rows: np.ndarray) -> Tensor:
        """Logits of stored features, without augmentation: (len(rows), C) float32 on the CPU."""
        module.eval()
        parts = [torch.empty(0, self.data.n_classes)]
        for start in range(0, len(rows), _VALIDATION_BATCH):
            features = torch.from_numpy(self.data.features[rows[start : start + _VALIDATION_BATCH]])
            with self._autocast():
                parts.append(module(features.to(self.device)).float().cpu())
        return torch.cat(parts)

    def chosen_weights(self) -> StateDict:
        """The best weights so far; without a validation part the last ones (of the moving average, if there is one)."""
        if self.best_weights is not None:
            return self.best_weights
        return _copy(self.model if self.ema is None else self.ema.module)

    def state(self) -> dict[str, Any]:
        """A checkpoint: tensors and plain values only, loadable with `torch.load(weights_only=True)`.

        It holds no random generators: they are seeded anew in every epoch from (seed, epoch, worker).
        """
        return {
            "version": CHECKPOINT_VERSION,
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best_weights": self.best_weights,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. Raise SerError if it is of another version or of other settings."""
        if state.get("version") != CHECKPOINT_VERSION:
            raise SerError(
                f"the checkpoint has version {state.get('version')}, expected {CHECKPOINT_VERSION}; start a new run"
            )
        self.config.check_continues(FitConfig.from_dict(state["config"]))
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.history = list(state["history"])
        self.best_epoch = state["best_epoch"]
        self.best_weights = state["best_weights"]


def weights_of(state: dict[str, Any]) -> StateDict:
    """The weights to use from a checkpoint: the best by validation, else the moving average, else the last."""
    if state["best_weights"] is not None:
        return dict(state["best_weights"])
    if state["ema"] is None:
        return dict(state["model"])
    prefix = "module."
    return {name.removeprefix(prefix): value for name, value in state["ema"].items() if name.startswith(prefix)}


def _copy(module: nn.Module) -> StateDict:
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in module.state_dict().items()}
