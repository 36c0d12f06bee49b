"""Many trainings side by side on one GPU: recipes compared over five folds, six actor folds and seeds, in minutes.

    python -m benchmarks.gpu_lab pack --features FEATURES --out lab.npz        # here: what travels, without audio
    python -m benchmarks.gpu_lab run --data lab.npz --plan PLAN.json --out OUT # on the GPU: PyTorch, pandas, sklearn
    python -m benchmarks.gpu_lab report --features FEATURES --data lab.npz --answers answers.npz --recipe base --out OUT

A plan is a list of waves; a wave is a list of recipes, trained at once, every training on its own CUDA stream:
{"name": "base", "jobs": ["five", "six"], "seeds": [42], "fit": {FitConfig}, "dropout": 0.4, "augment":
{AugmentConfig}, "style": 0.0}. Models, sampler, draws, losses, schedules and augmentation are the project's own; the
step (bfloat16 forward and backward, AdamW and EMA in float32) is captured once as a CUDA graph. The last epoch's EMA
weights answer; nothing is chosen by them, but where a recipe says "like_best_of": [names], "margin": points: it takes
after the recipe of the best pooled accuracy on ``five``, or an earlier one of the list that is at most `margin` below.

``five`` are the folds of the 80 %, ``six`` the actor folds, ``inner`` trains on train and answers inner_val, ``final``
trains on the 80 % (``--keep``: and keeps them; ``--open_test``: answers the test part: write it in docs/LAB_LOG.md).
Limits: one GPU; features are rounded to about 0.2 dB; a drawn noise differs from that of the same seed on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pipeline.augment import AugmentConfig, Augmenter, Column, Draws
from pipeline.features import FeatureConfig
from pipeline.fit_config import FitConfig
from pipeline.losses import ClassificationLoss
from pipeline.measures import scores, tally
from pipeline.models import build_model
from pipeline.sampling import WeightedSampler
from pipeline.schedules import learning_rates

N_CLASSES = 8
STEP_DB = 0.2
STYLE_ALPHA = 0.3
FEATURES = FeatureConfig()
FOLDS = {"five": range(1, 6), "six": range(1, 7), "inner": [1], "final": [1]}
SPLITS = Path("models/splits")


def pack(features: Path, out: Path) -> None:
    """Mel power and features of all recordings, rounded, with their class and folds."""
    from pipeline.arrays import load_features
    from pipeline.corpora import label_set

    arrays = load_features(features)
    assert arrays.mel_power is not None
    stems = arrays.table["speech"].map(lambda path: Path(str(path)).stem)
    labels = label_set(arrays.table)
    n_frames = arrays.n_frames
    power = np.array(arrays.mel_power[:, :, : n_frames.max()])
    decibel = 10 * np.log10(np.maximum(power, 1e-10))
    frame_is_there = np.arange(power.shape[2]) < n_frames[:, None]
    decibel = np.where(frame_is_there[:, None, :], decibel, 0)

    def column(name: str, which: str) -> np.ndarray:
        table = pd.read_csv(SPLITS / f"{name}.csv", dtype=str).set_index("id")[which]
        return stems.map(table).fillna("0").to_numpy(str)

    np.savez_compressed(
        out,
        decibel=np.round(decibel / STEP_DB).astype(np.int16),
        n_frames=n_frames,
        features=np.round(np.array(arrays.features) * 100).astype(np.int16),
        classes=np.array([labels.index(label) for label in arrays.table["label"]], dtype=np.int64),
        part=column("ravdess_split", "split"),
        five=column("ravdess_five_folds_of_80", "fold").astype(int),
        six=column("ravdess_six_actor_folds", "fold").astype(int),
        stems=stems.to_numpy(str),
    )


@dataclass
class Recipe:
    """One way to train."""

    name: str
    jobs: list[str]
    fit: FitConfig
    seeds: list[int] = field(default_factory=lambda: [42])
    dropout: float = 0.4
    augment: dict[str, Any] = field(default_factory=dict)
    style: float = 0.0  # share of examples that take on another's band statistics
    like_best_of: list[str] = field(default_factory=list)
    margin: float = 0.0
    folds: list[int] = field(default_factory=list)  # of these only

    @classmethod
    def of(cls, given: dict[str, Any]) -> Recipe:
        """From a plan's JSON."""
        fit = dict(given.pop("fit"))
        fit["augment"] = tuple(fit["augment"])
        boosts = {int(index): factor for index, factor in fit.pop("oversample_boost", {}).items()}
        return cls(fit=FitConfig(**fit, oversample_boost=boosts), **given)


class Data:
    """What all trainings share, on the device."""

    def __init__(self, path: Path, device: torch.device) -> None:
        stored = np.load(path)
        self.device = device
        decibel = torch.from_numpy(stored["decibel"]).to(device).float() * STEP_DB
        n_frames = torch.from_numpy(stored["n_frames"]).to(device)
        there = torch.arange(decibel.shape[2], device=device) < n_frames[:, None]
        self.power = torch.where(there[:, None, :], 10 ** (decibel / 10), 0.0)
        self.n_frames = n_frames
        self.stored = torch.from_numpy(stored["features"]).to(device).float() / 100
        self.classes = stored["classes"]
        self.part, self.five, self.six = stored["part"], stored["five"], stored["six"]

    def rows(self, job: str, fold: int) -> tuple[np.ndarray, np.ndarray]:
        """Training and answering rows of a job."""
        seen = self.part != "test"
        train, test = {
            "five": (seen & (self.five != fold), seen & (self.five == fold)),
            "six": (self.six != fold, self.six == fold),
            "inner": (self.part == "train", self.part == "inner_val"),
            "final": (seen, ~seen),
        }[job]
        return np.flatnonzero(train), np.flatnonzero(test)


class FastAugmenter(Augmenter):
    """The project's augmentation with all noises of a batch drawn at once."""

    def _add_noise(self, power: Tensor, u: Tensor) -> Tensor:
        happens = self._happens("noise", u, Column.NOISE)
        low, high = self.config.min_snr_db, self.config.max_snr_db
        snr_db = low + u[:, Column.SNR] * (high - low)
        level = torch.where(happens, 10 ** (-snr_db / 10), 0.0)[:, None, None] * power.mean(dim=(1, 2), keepdim=True)
        return power + torch.empty_like(power).exponential_() * level


class Training:
    """One model on its own stream: epochs are laid down by `prepare` and `launch`, and run on the device meanwhile.

    Convolutions hold bfloat16 copies of float32 masters, which costs far fewer kernels than autocast.
    """

    def __init__(self, recipe: Recipe, job: str, fold: int, seed: int, data: Data) -> None:
        self.recipe, self.job, self.fold, self.data = recipe, job, fold, data
        self.fit = replace(recipe.fit, seed=seed)
        self.train_rows, self.test_rows = data.rows(job, fold)
        augment = AugmentConfig(self.fit.augment, mixup_alpha=self.fit.mixup_alpha, **recipe.augment)
        self.augmenter = FastAugmenter(augment, FEATURES)
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
        model = build_model("inception", {"dropout": self.recipe.dropout}, N_CLASSES, FEATURES.input_shape)
        self.ema = (
            copy.deepcopy(model).to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)
        )
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None  # a kernel each, for a number nobody needs
            elif isinstance(module, nn.Conv2d | nn.Linear):
                module.to(torch.bfloat16)
        self.model = model.to(device=device, memory_format=torch.channels_last).train()
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
        self.inputs = torch.zeros((size, *FEATURES.input_shape), device=device)
        self.targets = torch.zeros((size, N_CLASSES), device=device)
        rate = learning_rates(self.fit.scheduler, self.steps, self.fit.epochs, self.fit.warmup_epochs)
        rates = [self.fit.lr * rate(step) for step in range(self.steps * self.fit.epochs)]
        self.rates = torch.tensor([*rates, *[0.0] * 8], device=device)
        self.step_of_epoch, self.step_of_all = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        self.batch = torch.arange(self.fit.batch_size, device=device)
        self.lr = torch.tensor(self.fit.lr, device=device)
        self.loss = ClassificationLoss(N_CLASSES, label_smoothing=self.fit.label_smoothing).to(device)
        self.total = torch.zeros((), device=device)
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            list(self.masters.values()), self.lr, weight_decay=self.fit.weight_decay, fused=True, capturable=on_gpu
        )
        self.stream = torch.cuda.Stream() if on_gpu else None
        self.graph = self._captured() if on_gpu else None
        self.done: Any = None

    def _captured(self) -> Any:
        """The step as a CUDA graph; weights and optimiser are afterwards as they were before."""
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
        x = self.inputs.index_select(0, places).to(torch.bfloat16, memory_format=torch.channels_last)
        loss = self.loss(self.model(x).float(), self.targets.index_select(0, places))
        found = dict(zip(self.parameters, torch.autograd.grad(loss, list(self.parameters.values())), strict=True))
        with torch.no_grad():
            self.lr.copy_(self.rates.index_select(0, self.step_of_all)[0])
            torch._foreach_copy_(list(self.gradients.values()), [found[name] for name in self.low])
            for name, master in self.masters.items():
                master.grad = self.gradients.get(name, found[name])
            self.optimizer.step()
            torch._foreach_copy_(
                [self.parameters[name].detach() for name in self.low], [self.masters[name] for name in self.low]
            )
            torch._foreach_lerp_(*self.pairs, 1 - self.fit.ema)
            self.total += loss.detach()
            self.step_of_epoch += 1
            self.step_of_all += 1

    @property
    def finished(self) -> bool:
        """Whether all epochs are laid down."""
        return self.epoch >= self.fit.epochs

    @torch.no_grad()
    def prepare(self) -> tuple[Tensor, Tensor]:
        """The next epoch's augmented examples and targets, in the order of the sampler's stream."""
        epoch, device = self.epoch + 1, self.data.device
        rows = torch.from_numpy(self.train_rows[self.sampler.draws(epoch)]).to(device)
        draws = Draws.of_epoch(len(rows), self.fit.batch_size, self.fit.mixup_alpha, self.fit.seed, epoch)
        u = torch.from_numpy(draws.uniform).to(device)
        targets = nn.functional.one_hot(torch.from_numpy(self.data.classes).to(device)[rows], N_CLASSES).float()
        with device:
            powered = self.augmenter.from_power(self.data.power[rows], self.data.n_frames[rows], u)
            by_power = self.augmenter.needs_power(u)[:, None, None, None]
            features = torch.where(by_power, powered, self.data.stored[rows])
            if self.recipe.style:
                features = self._styled(features)
            features = self.augmenter.mask(features, u)
        if "mixup" in self.fit.augment:
            partner = torch.from_numpy(draws.partner).to(device)
            weight = torch.from_numpy(draws.weight).to(device)
            features = torch.lerp(features[partner], features, weight[:, None, None, None])
            targets = torch.lerp(targets[partner], targets, weight[:, None])
        return features, targets

    def _styled(self, features: Tensor) -> Tensor:
        """Frequency-wise MixStyle: some examples take on a mixture of their own and the next one's band statistics."""
        batches = features.view(-1, self.fit.batch_size, *features.shape[1:])
        other = batches.roll(1, dims=1).view_as(features)
        std, mean = torch.std_mean(features, dim=3, keepdim=True)
        other_std, other_mean = torch.std_mean(other, dim=3, keepdim=True)
        weight = torch.distributions.Beta(STYLE_ALPHA, STYLE_ALPHA).sample((len(features), 1, 1, 1))
        weight = torch.where(torch.rand(len(features), 1, 1, 1) < self.recipe.style, weight, 1.0)
        plain = (features - mean) / (std + 1e-3)
        return plain * torch.lerp(other_std, std, weight) + torch.lerp(other_mean, mean, weight)

    def launch(self, features: Tensor, targets: Tensor, side: Any) -> None:
        """Lay down one epoch of steps."""
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
    def answers(self, rows: np.ndarray) -> np.ndarray:
        """Logits of the EMA weights for the middle windows of `rows`, float32."""
        x = self.data.stored[torch.from_numpy(rows).to(self.data.device)].contiguous(memory_format=torch.channels_last)
        return torch.cat([self.ema(part).float() for part in x.split(64)]).cpu().numpy()


def train_wave(trainings: list[Training], ends: float, started: float) -> bool:
    """Train all at once; False when the time was up before."""
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


def table(answers: dict[str, np.ndarray], data: Data) -> str:
    """One line a recipe, job set and seed: pooled accuracy, UAR, weighted F1, recalls; mean UAR of the folds."""
    groups: dict[str, list[str]] = {}
    for key in answers:
        name, job, fold, seed = key.split("|")
        groups.setdefault(f"{name}|{job}|{seed}", []).append(fold)
    lines = []
    for group, folds in sorted(groups.items()):
        name, job, seed = group.split("|")
        counts = []
        for fold in folds:
            rows = data.rows(job, int(fold))[1]
            counts.append(tally(data.classes[rows], answers[f"{name}|{job}|{fold}|{seed}"].argmax(axis=1), N_CLASSES))
        pooled, each = scores(np.sum(counts, axis=0)), scores(np.stack(counts))
        figures = {
            "accuracy": pooled.accuracy,
            "UAR": pooled.uar,
            "weighted F1": pooled.weighted_f1,
            "mean fold UAR": each.uar.mean(),
        }
        told = "  ".join(f"{figure} {value:.1%}" for figure, value in figures.items())
        recalls = " ".join(f"{recall:.0%}" for recall in pooled.recall)
        lines.append(f"{name:20} {job:5} seed {seed}, {len(folds)} folds  {told}  recalls {recalls}")
    return "\n".join(lines)


def take_after(recipe: Recipe, all_recipes: list[Recipe], answers: dict[str, np.ndarray], data: Data) -> Recipe:
    """The recipe with all settings of the best one that it names."""
    accuracy = {}
    for name in recipe.like_best_of:
        keys = [key for key in answers if key.startswith(f"{name}|five|")]
        rows = np.concatenate([data.rows("five", int(key.split("|")[2]))[1] for key in keys])
        found = np.concatenate([answers[key].argmax(axis=1) for key in keys])
        accuracy[name] = 100 * float((found == data.classes[rows]).mean())
    good_enough = max(accuracy.values()) - recipe.margin
    chosen = next(name for name in recipe.like_best_of if accuracy[name] >= good_enough)
    print(f"{recipe.name} takes after {chosen}: {accuracy}", flush=True)
    model = next(r for r in all_recipes if r.name == chosen)
    return replace(model, name=recipe.name, jobs=recipe.jobs, seeds=recipe.seeds, folds=recipe.folds)


def run(arguments: argparse.Namespace) -> None:
    """Train the plan's waves in order until they are done or the time is up."""
    started = time.monotonic()
    ends = started + 60 * arguments.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    data = Data(arguments.data, device)
    plan = [[Recipe.of(dict(given)) for given in wave] for wave in json.loads(arguments.plan.read_text())]
    arguments.out.mkdir(parents=True, exist_ok=True)
    answers: dict[str, np.ndarray] = {}
    for number, wave in enumerate(plan, start=1):
        trainings: dict[str, Training] = {}
        for recipe in wave:
            if recipe.like_best_of:
                recipe = take_after(recipe, [r for w in plan for r in w], answers, data)
            for job in recipe.jobs:
                for fold in recipe.folds or FOLDS[job]:
                    for seed in recipe.seeds:
                        trainings[f"{recipe.name}|{job}|{fold}|{seed}"] = Training(recipe, job, fold, seed, data)
        print(f"wave {number}: {len(trainings)} trainings captured at {time.monotonic() - started:.1f} s", flush=True)
        if not train_wave(list(trainings.values()), ends, started):
            print(f"wave {number}: the time was up", flush=True)
            break
        for key, training in trainings.items():
            if training.job != "final" or arguments.open_test:
                answers[key] = training.answers(training.test_rows)
            if training.job == "final" and key in arguments.keep:
                keep(training, arguments.out)
        trainings.clear()
        np.savez_compressed(arguments.out / "answers.npz", **answers)
        print(table(answers, data), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"done at {time.monotonic() - started:.1f} s", flush=True)


def keep(training: Training, out: Path) -> None:
    """The EMA weights in two files of half the size each."""
    state = {
        name: value.detach().to("cpu", copy=True).contiguous() for name, value in training.ema.state_dict().items()
    }
    sizes = np.cumsum([value.nbytes for value in state.values()])
    for half in (0, 1):
        chosen = (sizes > sizes[-1] / 2) == bool(half)
        torch.save(
            {name: state[name] for name, here in zip(state, chosen, strict=True) if here}, out / f"weights-{half}.pt"
        )


def report(arguments: argparse.Namespace) -> None:
    """The folds of one recipe as the tables and pages that `jobs.evaluate --protocol` writes."""
    from jobs.protocols import labelled_recordings
    from pipeline.arrays import load_features
    from pipeline.corpora import label_set
    from pipeline.folds import assignment, folds_of
    from pipeline.protocol_report import protocol_row, protocols_summary, write_protocols
    from pipeline.report import write_report

    table, answers = labelled_recordings(arguments.features), np.load(arguments.answers)
    row_of = {row_id: row for row, row_id in enumerate(load_features(arguments.features).table["row_id"])}
    labels, data = label_set(table), Data(arguments.data, torch.device("cpu"))
    rows = []
    for job, protocol, name in (
        ("five", "kfold", "ravdess_five_folds_of_80"),
        ("six", "speaker_kfold", "ravdess_six_actor_folds"),
    ):
        assigned = assignment(table, SPLITS / f"{name}.csv", "fold")
        folds = folds_of(table, protocol, inner_val=0, assigned=assigned)
        parts = []
        for fold in folds:
            logits = torch.from_numpy(answers[f"{arguments.recipe}|{job}|{fold.name}|{arguments.seed}"])
            place = {row: i for i, row in enumerate(data.rows(job, int(fold.name))[1])}
            order = [place[row_of[row_id]] for row_id in fold.splits["test"]["row_id"]]
            p = logits[order].double().softmax(dim=1).numpy()
            part = fold.splits["test"].assign(status="ok", error="", label_name=fold.splits["test"]["label"])
            part = part.assign(predicted=np.array(labels.names)[p.argmax(axis=1)], confidence=p.max(axis=1))
            parts.append(part.assign(**{f"p_{c}": p[:, i] for i, c in enumerate(labels.names)}, fold=fold.name))
        found, out = pd.concat(parts, ignore_index=True), arguments.out / protocol
        meta = {"model": f"{arguments.recipe}, one a fold", "protocol": protocol, "folds": len(folds)}
        evaluation = write_report(found, labels.names, out, meta=meta)
        found.to_parquet(out / "predictions.parquet", index=False)
        rows.append(protocol_row(protocol, folds, found, labels.names, evaluation))
    print(protocols_summary(write_protocols(rows, arguments.out, {"recipe": arguments.recipe})))


def main() -> None:
    """Pack, run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("--features", type=Path, required=True)
    packing.add_argument("--out", type=Path, required=True)
    running = commands.add_parser("run")
    running.add_argument("--data", type=Path, required=True)
    running.add_argument("--plan", type=Path, required=True)
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--minutes", type=float, default=60.0)
    running.add_argument("--open_test", action="store_true")
    running.add_argument("--keep", nargs="*", default=[], metavar="NAME|final|1|SEED")
    reporting = commands.add_parser("report")
    reporting.add_argument("--features", type=Path, required=True)
    reporting.add_argument("--data", type=Path, required=True)
    reporting.add_argument("--answers", type=Path, required=True)
    reporting.add_argument("--recipe", required=True)
    reporting.add_argument("--seed", type=int, default=42)
    reporting.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "pack":
        pack(arguments.features, arguments.out)
    elif arguments.command == "run":
        run(arguments)
    else:
        report(arguments)


if __name__ == "__main__":
    main()
