"""One training of ``lab.gpu_lab`` on its own CUDA stream, and many trainings at once.

Model (Inception), sampler, draws, losses, schedules and augmentation are those of ``pipeline``. The step is captured
once as a CUDA graph: forward and backward in bfloat16, AdamW and EMA in float32. Teachers classify all augmented
examples of an epoch before its steps; the targets are the same as in ``loop.py``.
Limits: one GPU; on a CPU the same steps run one by one. The noise differs from that of the same seed on the CPU.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lab.gpu_data import Data
from pipeline.models.networks import build_model
from pipeline.training.augment import Augmenter, Column, Draws
from pipeline.training.batches import WeightedSampler
from pipeline.training.config import FitConfig, learning_rates
from pipeline.training.losses import ClassificationLoss

N_CLASSES = 8


@dataclass
class Recipe:
    """The settings of a training."""

    name: str
    jobs: list[str]
    fit: FitConfig
    seeds: list[int] = field(default_factory=lambda: [42])
    dropout: float = 0.4
    teachers: list[str] = field(default_factory=list)  # recipes of an earlier wave
    share: float = 0.7  # the teachers' share of the loss, as in pipeline.training.losses

    @classmethod
    def of(cls, given: dict[str, Any]) -> Recipe:
        """A recipe from a plan's JSON."""
        fit = dict(given.pop("fit"))
        fit["augment"] = tuple(fit["augment"])
        boosts = {int(index): factor for index, factor in fit.pop("oversample_boost", {}).items()}
        return cls(fit=FitConfig(**fit, oversample_boost=boosts), **given)


class FastAugmenter(Augmenter):
    """The augmentation of ``pipeline``, with all noises of a batch drawn at once."""

    def _add_noise(self, power: Tensor, u: Tensor) -> Tensor:
        happens = self._happens("noise", u, Column.NOISE)
        low, high = self.config.min_snr_db, self.config.max_snr_db
        snr_db = low + u[:, Column.SNR] * (high - low)
        level = torch.where(happens, 10 ** (-snr_db / 10), 0.0)[:, None, None] * power.mean(dim=(1, 2), keepdim=True)
        return power + torch.empty_like(power).exponential_() * level


def in_bfloat16(model: nn.Module) -> nn.Module:
    """The same model with bfloat16 convolutions and linear layers."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(torch.bfloat16)
    return model


def laid_out(x: Tensor) -> Tensor:
    """Log-mel features in channels-last order and bfloat16."""
    return x.to(torch.bfloat16, memory_format=torch.channels_last)


class Training:
    """One model on its own stream: `prepare` and `launch` enqueue epochs, which run asynchronously on the device.

    Convolutions have bfloat16 copies of float32 master weights, which needs far fewer kernels than autocast.
    """

    def __init__(
        self, recipe: Recipe, job: str, fold: int, seed: int, data: Data, teachers: Sequence[nn.Module] = ()
    ) -> None:
        self.recipe, self.data, self.teachers = recipe, data, teachers
        self.fit = replace(recipe.fit, seed=seed)
        self.train_rows, self.test_rows = data.rows(job, fold)
        self.augmenter = FastAugmenter(self.fit.augmentation(), data.config)
        self.sampler = WeightedSampler.balanced(
            data.classes[self.train_rows],
            N_CLASSES,
            batch_size=self.fit.batch_size,
            seed=seed,
            boosts=self.fit.oversample_boost,
        )
        self.steps, self.epoch = len(self.sampler), 0
        self._build_model(seed, data.device)
        self._build_step(data.device)

    def _build_model(self, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)
        model = build_model("inception", {"dropout": self.recipe.dropout}, N_CLASSES, self.data.config.input_shape)
        self.ema = copy.deepcopy(model).to(device).eval().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None  # saves a kernel per layer; the number is not used
        self.model = in_bfloat16(model).to(device).train()
        for each in (self.ema, self.model):
            each.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parameters = dict(self.model.named_parameters())
        averaged = dict(self.ema.named_parameters())
        self.masters = {name: averaged[name].clone() for name in self.parameters}
        self.low = [name for name, value in self.parameters.items() if value.dtype == torch.bfloat16]
        for name, value in self.parameters.items():
            if name not in self.low:
                self.masters[name] = value
        buffers, own = dict(self.ema.named_buffers()), dict(self.model.named_buffers())
        self.pairs = (
            [averaged[name] for name in self.parameters] + [buffers[name] for name in own],
            [self.masters[name].detach() for name in self.parameters] + list(own.values()),
        )
        self.gradients = {name: torch.zeros_like(self.masters[name]) for name in self.low}

    def _build_step(self, device: torch.device) -> None:
        size = self.steps * self.fit.batch_size
        self.inputs = torch.zeros((size, *self.data.config.input_shape), device=device)
        self.targets = torch.zeros((size, N_CLASSES), device=device)
        rate = learning_rates(self.fit.scheduler, self.steps, self.fit.epochs, self.fit.warmup_epochs)
        rates = [self.fit.lr * rate(step) for step in range(self.steps * self.fit.epochs)]
        self.rates = torch.tensor([*rates, *[0.0] * 8], device=device)
        self.step_of_epoch, self.step_of_all = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        self.batch = torch.arange(self.fit.batch_size, device=device)
        self.lr = torch.tensor(self.fit.lr, device=device)
        self.loss = ClassificationLoss(N_CLASSES).to(device)  # `prepare` makes its targets
        self.total = torch.zeros((), device=device)
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            list(self.masters.values()), self.lr, weight_decay=self.fit.weight_decay, fused=True, capturable=on_gpu
        )
        self.stream = torch.cuda.Stream() if on_gpu else None
        self.graph = self._captured() if on_gpu else None
        self.done: Any = None

    def _captured(self) -> Any:
        """Capture the step as a CUDA graph; weights and optimiser are unchanged afterwards."""
        changed = [*self.parameters.values(), *self.masters.values(), *self.model.buffers(), *self.pairs[0]]
        changed = [value.detach() for value in changed]
        before = [value.clone() for value in changed]
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self._step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self._step()
        torch.cuda.synchronize()
        torch._foreach_copy_(changed, before)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        for counter in (self.step_of_epoch, self.step_of_all, self.total):
            counter.zero_()
        torch.cuda.synchronize()
        return graph

    def _step(self) -> None:
        places = self.step_of_epoch * self.fit.batch_size + self.batch
        x = self.inputs.index_select(0, places)
        loss = self.loss(self.model(laid_out(x)).float(), self.targets.index_select(0, places))
        found = dict(zip(self.parameters, torch.autograd.grad(loss, list(self.parameters.values())), strict=True))
        with torch.no_grad():
            self.lr.copy_(self.rates.index_select(0, self.step_of_all)[0])
            if self.low:
                torch._foreach_copy_(list(self.gradients.values()), [found[name] for name in self.low])
            for name, master in self.masters.items():
                master.grad = self.gradients.get(name, found[name])
            self.optimizer.step()
            if self.low:
                torch._foreach_copy_(
                    [self.parameters[name].detach() for name in self.low], [self.masters[name] for name in self.low]
                )
            torch._foreach_lerp_(*self.pairs, 1 - self.fit.ema)
            self.total += loss.detach()
            self.step_of_epoch += 1
            self.step_of_all += 1

    @property
    def finished(self) -> bool:
        """Whether all epochs are enqueued."""
        return self.epoch >= self.fit.epochs

    @torch.no_grad()
    def prepare(self) -> tuple[Tensor, Tensor]:
        """Make the next epoch's augmented examples and targets, in the sampler's order."""
        epoch, device = self.epoch + 1, self.data.device
        rows = torch.from_numpy(self.train_rows[self.sampler.draws(epoch)]).to(device)
        draws = Draws.of_epoch(len(rows), self.fit.batch_size, self.fit.mixup_alpha, self.fit.seed, epoch)
        u = torch.from_numpy(draws.uniform).to(device)
        targets = nn.functional.one_hot(torch.from_numpy(self.data.classes).to(device)[rows], N_CLASSES).float()
        with device:
            powered = self.augmenter.from_power(self.data.power[rows], self.data.n_frames[rows], u)
            changed = self.augmenter.needs_power(u)
            features = torch.where(changed[:, None, None, None], powered, self.data.stored[rows])
            features = self.augmenter.mask(features, u)
        if "mixup" in self.augmenter.config.names:
            partner = torch.from_numpy(draws.partner).to(device)
            weight = torch.from_numpy(draws.weight).to(device)
            features = torch.lerp(features[partner], features, weight.view(-1, 1, 1, 1))
            targets = torch.lerp(targets[partner], targets, weight[:, None])
        targets = torch.lerp(targets, torch.full_like(targets, 1 / N_CLASSES), self.fit.label_smoothing)
        if self.teachers:
            x = laid_out(features)
            told = torch.stack([teacher(x).float().softmax(dim=1) for teacher in self.teachers]).mean(dim=0)
            targets = torch.lerp(targets, told, self.recipe.share)
        return features, targets

    def launch(self, features: Tensor, targets: Tensor, side: Any) -> None:
        """Enqueue one epoch of steps."""
        first = self.epoch == 0
        if self.stream is not None:
            self.stream.wait_stream(side)
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            self.inputs.copy_(features)
            self.targets.copy_(targets)
            self.step_of_epoch.zero_()
            self.total.zero_()
            for step in range(self.steps):
                if self.graph is None:
                    self._step()
                else:
                    self.graph.replay()
                if first and step == 0:
                    torch._foreach_copy_(*self.pairs)
            if self.stream is not None:
                for tensor in (features, targets):
                    tensor.record_stream(self.stream)
                self.done = torch.cuda.Event()
                self.done.record()
        self.epoch += 1

    @torch.no_grad()
    def answers(self, crops: int = 1) -> NDArray[np.float32]:
        """Logits of the EMA weights for the middle windows of the test rows; mean log-probabilities for crops."""
        rows = self.test_rows
        if crops == 1:
            return self._heard(self.data.stored[torch.from_numpy(rows).to(self.data.device)]).cpu().numpy()
        told = [self._heard(window).log_softmax(dim=1) for window in self.data.crops(rows, crops)]
        return torch.stack(told).mean(dim=0).cpu().numpy()

    def _heard(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        padded = torch.cat([x, x[:1].expand(-len(x) % 64, *x.shape[1:])])  # cuDNN tunes for each batch size
        return torch.cat([self.ema(part).float() for part in padded.split(64)])[: len(x)]

    def teacher(self) -> nn.Module:
        """A model with the EMA weights that classifies large batches."""
        return in_bfloat16(copy.deepcopy(self.ema))


def train_wave(trainings: list[Training], ends: float, started: float) -> bool:
    """Run all trainings at once; False where the time was over before the end."""
    side = torch.cuda.Stream(priority=-1) if torch.cuda.is_available() else None
    previous: dict[int, Any] = {}
    rounds = 0
    while any(not t.finished for t in trainings):
        if time.monotonic() > ends:
            return False
        for index, training in enumerate(trainings):
            if training.finished:
                continue
            if previous.get(index) is not None:
                previous[index].synchronize()
            previous[index] = training.done
            with torch.cuda.stream(side) if side is not None else nullcontext():
                prepared = training.prepare()
            training.launch(*prepared, side)
        rounds += 1
        if rounds in (1, 20) or rounds % 50 == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            losses = [round(float(t.total) / t.steps, 3) for t in trainings[:3]]
            print(f"  round {rounds}: {time.monotonic() - started:.1f} s, losses {losses}", flush=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return True
