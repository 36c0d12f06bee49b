"""The training loop: it learns, resumes exactly, stops early, keeps the best, and refuses to go on with nonsense."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from torch.nn import functional
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from toy_data import CONFIG, toy_data, toy_model

from pipeline.features.features import FeatureConfig
from pipeline.models.networks import build_model
from pipeline.storage.errors import SerError
from pipeline.training.augment import POWER_NAMES
from pipeline.training.batches import TrainingData
from pipeline.training.config import FitConfig, learning_rates
from pipeline.training.loop import DivergedError, FitResult, Record, Run, StateDict, fit, weights_of

FAST = {"batch_size": 8, "lr": 1e-2, "threads": 1}


def trained(data: TrainingData | None = None, *, model: nn.Module | None = None, **settings: Any) -> FitResult:
    torch.manual_seed(0)
    return fit(model or toy_model(), data or toy_data(), FitConfig(**{**FAST, **settings}))


def assert_same(ours: StateDict, theirs: StateDict) -> None:
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=0, atol=0)


def without_times(history: list[Record]) -> list[Record]:
    return [{k: v for k, v in record.items() if not k.endswith("seconds")} for record in history]


def accuracy(model: nn.Module, data: TrainingData, rows: np.ndarray) -> float:
    with torch.inference_mode():
        answers = model.eval()(torch.from_numpy(data.features[rows])).argmax(dim=1).numpy()
    return float(accuracy_score(data.classes[rows], answers))


def small_set(name: str, n: int = 32) -> tuple[nn.Module, TrainingData]:
    """A model of that name, the Inception a narrow one, and ``n`` clips that it can hear."""
    data = toy_data(n, 0, n_classes=4)
    shape: tuple[int, ...] = CONFIG.input_shape
    if name == "cnn_bilstm":
        frames = FeatureConfig(kind="frame_features", sample_rate_hz=8000, window_s=0.5, hop_length=128, n_mfcc=2)
        shape = (32, CONFIG.n_mels)
        data = toy_data(n, 0, n_classes=4, config=frames, features=data.features[:, 0].transpose(0, 2, 1).copy())
    torch.manual_seed(0)
    return build_model(name, {"width": 0.25} if name == "inception" else {}, 4, shape), data


@pytest.mark.parametrize("name", ["inception", "cnn_bilstm"])
def test_both_models_learn_a_small_set_by_heart(name: str) -> None:
    model, data = small_set(name)

    def enough(record: Record, run: Run) -> None:
        if accuracy(run.model, data, data.train_rows) == 1.0:
            raise KeyboardInterrupt

    config = FitConfig(epochs=150, batch_size=16, lr=1e-3, threads=1)
    result = fit(model, data, config, on_epoch=enough)
    model.load_state_dict(result.weights)
    assert accuracy(model, data, data.train_rows) == 1.0
    assert result.history[-1]["train_loss"] < 0.5 * result.history[0]["train_loss"]


def test_validation_figures_are_scikit_learns() -> None:
    data = toy_data(24, 30, classes=np.random.default_rng(0).integers(0, 3, 54))
    run = Run(toy_model(), data, FitConfig(epochs=1, **FAST))
    record = run.epoch()
    logits = run.logits(run.model, data.valid_rows)
    truth, answers = data.classes[data.valid_rows], logits.argmax(dim=1).numpy()
    assert record["val_accuracy"] == pytest.approx(accuracy_score(truth, answers))
    assert record["val_weighted_f1"] == pytest.approx(f1_score(truth, answers, average="weighted"))
    assert record["val_loss"] == pytest.approx(float(functional.cross_entropy(logits, torch.from_numpy(truth))))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema": 0.9, "scheduler": "onecycle", "clip_norm": 1.0, "augment": (*POWER_NAMES, "masks", "mixup")},
        {"use_focal": True, "warmup_epochs": 1.0, "class_weights": (1.0, 2.0, 0.5), "label_smoothing": 0.1},
    ],
)
@pytest.mark.parametrize("n_valid", [0, 6])
def test_resuming_is_exact(settings: dict[str, Any], n_valid: int, tmp_path: Path) -> None:
    data, config = toy_data(24, n_valid), FitConfig(epochs=4, **FAST, **settings)
    whole = trained(data, epochs=4, **settings)
    torch.manual_seed(0)
    first = Run(toy_model(), data, config)
    first.epoch()
    first.epoch()
    torch.save(first.state(), tmp_path / "checkpoint.pt")
    torch.manual_seed(99)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = fit(toy_model(), data, config, state=state)
    assert_same(resumed.weights, whole.weights)
    assert without_times(resumed.history) == without_times(whole.history)
    assert (resumed.best_epoch, resumed.stopped_early) == (whole.best_epoch, whole.stopped_early)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    settings: dict[str, Any] = {"epochs": 2, "augment": ("crop", "mixup")}
    assert_same(trained(**settings).weights, trained(**settings).weights)
    assert not torch.equal(trained(**settings).weights["5.bias"], trained(seed=1, **settings).weights["5.bias"])


def test_the_best_weights_are_kept_and_epochs_without_a_better_f1_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    f1, kept = [0.2, 0.5, 0.5, 0.4, 0.45, 0.9], []
    scores = ({"val_loss": 1.0, "val_accuracy": 0.0, "val_weighted_f1": value} for value in f1 * 2)
    monkeypatch.setattr(Run, "_score", lambda *_: next(scores))

    def remember(_: Record, run: Run) -> None:
        kept.append({name: value.clone() for name, value in run.model.state_dict().items()})

    assert len(trained(epochs=6, patience=0).history) == 6
    result = fit(toy_model(), toy_data(), FitConfig(epochs=6, patience=3, **FAST), on_epoch=remember)
    assert [record["val_weighted_f1"] for record in result.history] == f1[:5]
    assert (result.best_epoch, result.stopped_early) == (2, True)
    assert_same(result.weights, kept[1])
    assert not torch.equal(kept[1]["5.bias"], kept[4]["5.bias"])


def test_without_validation_the_last_weights_count() -> None:
    model = toy_model()
    result = trained(toy_data(24, 0), model=model, epochs=3, patience=1)
    assert result.best_epoch == len(result.history) == 3
    assert result.history[0]["val_loss"] is None
    assert_same(result.weights, dict(model.state_dict()))


def test_the_average_of_weights_is_the_formula() -> None:
    decay = 0.7
    torch.manual_seed(0)
    run = Run(toy_model(), toy_data(16, 0), FitConfig(epochs=2, ema=decay, **FAST))
    followed: list[StateDict] = []
    for _ in range(2):
        run.epoch(lambda *_: followed.append({k: v.clone() for k, v in run.model.state_dict().items()}))
    expected = followed[0]
    for state in followed[1:]:
        expected = {k: decay * expected[k] + (1 - decay) * v for k, v in state.items() if v.is_floating_point()}
    chosen = run.chosen_weights()
    torch.testing.assert_close({name: chosen[name] for name in expected}, expected)
    assert_same(weights_of(run.state()), chosen)


def test_weighted_and_focal_losses_reach_the_training() -> None:
    plain = trained(epochs=1).history[0]["train_loss"]
    assert trained(epochs=1, focal_gamma=1.5).history[0]["train_loss"] == plain
    assert trained(epochs=1, use_focal=True).history[0]["train_loss"] < plain
    assert trained(epochs=1, class_weights=(1.0, 5.0, 1.0)).history[0]["train_loss"] != plain
    loss = Run(toy_model(), toy_data(), FitConfig(class_weights=(1.0, 2.0, 3.0), use_focal=True, focal_gamma=1.5)).loss
    assert (loss.weights.tolist(), loss.focal_gamma) == ([1.0, 2.0, 3.0], 1.5)


def test_gradients_are_clipped() -> None:
    norms: list[float] = []
    run = Run(toy_model(), toy_data(), FitConfig(epochs=1, clip_norm=0.01, **FAST))

    def note(*_: object) -> None:
        norms.append(float(nn.utils.get_total_norm(p.grad for p in run.model.parameters() if p.grad is not None)))

    run.optimizer.register_step_pre_hook(note)
    run.epoch()
    assert len(norms) == 3
    assert max(norms) <= 0.01 * 1.001
    assert min(norms) > 0.009  # they were longer before


def test_mixed_precision_is_left_to_gpus() -> None:
    assert FitConfig().mixed_precision
    assert_same(trained(epochs=1).weights, trained(epochs=1, mixed_precision=False).weights)


@pytest.mark.parametrize("name", ["inception", "cnn_bilstm"])
def test_bfloat16_on_a_cpu_learns_the_same_to_its_precision(name: str) -> None:
    n, epochs = (32, 3) if name == "inception" else (8, 1)  # an LSTM in bfloat16 takes long

    def losses(cpu_bfloat16: bool) -> tuple[Run, list[float]]:
        model, data = small_set(name, n)
        config = FitConfig(batch_size=n // 2, lr=1e-4, threads=1, ema=0.9, cpu_bfloat16=cpu_bfloat16)
        run = Run(model, data, config)
        return run, [run.epoch()["train_loss"] for _ in range(epochs)]

    (exact, wanted), (rounded, found) = losses(False), losses(True)
    assert found[0] == pytest.approx(wanted[0], rel=0.05)
    assert found == pytest.approx(wanted, rel=0.2)  # CPUs round in their own ways: 8 % by the third epoch on AVX2
    assert found != wanted  # it did round
    with rounded._autocast():
        assert rounded.model.eval()(torch.from_numpy(rounded.data.features[:1])).dtype == torch.bfloat16
    assert rounded.ema is not None
    for kept in (*rounded.model.state_dict().values(), *rounded.ema.state_dict().values()):
        assert kept.dtype in (torch.float32, torch.int64)  # weights and their average are never rounded
    exact.config.check_continues(rounded.config)  # a run may go on with the other arithmetic


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    features = toy_data().features.copy()
    features[::3] = np.nan
    with pytest.raises(DivergedError, match="nan in epoch 1"):
        trained(toy_data(features=features))


def test_ctrl_c_keeps_the_best_so_far_and_is_passed_on_before_there_is_one() -> None:
    def interrupted(at: tuple[int, int]) -> FitResult:
        def interrupt(epoch: int, done: int, _total: int) -> None:
            if (epoch, done) == at:
                raise KeyboardInterrupt

        torch.manual_seed(0)
        return fit(toy_model(), toy_data(), FitConfig(epochs=5, **FAST), on_batch=interrupt)

    third, second = interrupted((3, 2)), interrupted((3, 1))
    assert third.interrupted
    assert len(third.history) == 2
    assert_same(third.weights, second.weights)
    with pytest.raises(KeyboardInterrupt):
        interrupted((1, 1))


def test_progress_is_told_after_every_batch() -> None:
    told: list[tuple[int, int, int]] = []
    fit(toy_model(), toy_data(20), FitConfig(epochs=2, **FAST), on_batch=lambda *state: told.append(state))
    assert told == [(epoch, done, 3) for epoch in (1, 2) for done in (1, 2, 3)]


def test_a_checkpoint_of_another_run_is_refused() -> None:
    state = Run(toy_model(), toy_data(), FitConfig(epochs=4, **FAST)).state()

    def resumed(version: int = 1, **changes: Any) -> FitResult:
        config = FitConfig(**{"epochs": 4, **FAST, **changes})
        return fit(toy_model(), toy_data(), config, state={**state, "version": version})

    for change, word in (({"epochs": 5}, "epochs=4"), ({"lr": 0.5}, "lr=0.01"), ({"version": 7}, "version 7")):
        with pytest.raises(SerError, match=word):
            resumed(**change)
    assert len(resumed(threads=2, patience=3).history) == 4


def test_channels_last_changes_the_layout_and_not_the_result() -> None:
    kept: dict[bool, Run] = {}
    for channels_last in (False, True):
        torch.manual_seed(0)
        run = kept[channels_last] = Run(toy_model(), toy_data(), FitConfig(channels_last=channels_last, **FAST))
        run.epoch()
    weight = kept[True].model[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert kept[True].history[0]["train_loss"] == pytest.approx(kept[False].history[0]["train_loss"], rel=1e-4)
    assert all(value.is_contiguous() for value in kept[True].chosen_weights().values())


NAN, INF = float("nan"), float("inf")
WRONG = {
    **{"epochs": [0], "batch_size": [0], "patience": [-1], "draws": [-1], "threads": [-1], "seed": [-1, 2**64]},
    **{"lr": [0.0, NAN, INF], "weight_decay": [-1.0, NAN], "clip_norm": [-1.0, NAN], "warmup_epochs": [-1.0, INF]},
    **{"focal_gamma": [NAN], "label_smoothing": [INF], "ema": [1.0, -0.1, NAN]},
    **{"scheduler": ["steps"], "augment": [("echo",)]},
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(SerError):
        FitConfig(**{name: value})


def test_settings_survive_json() -> None:
    config = FitConfig(augment=("crop", "mixup"), class_weights=(1.0, 2.0), oversample_boost={3: 2.0})
    assert FitConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("masked", [True, False])
def test_a_class_that_the_corpus_lacks_is_left_alone_by_training_and_validation(masked: bool) -> None:
    """One corpus without class 1: its row of the last layer has no gradient, and no clip is taken for it."""
    lacking = {"corpora": ("one",), "corpus_of": np.zeros(30, int), "corpus_classes": np.array([[True, False, True]])}
    data = toy_data(classes=np.where(np.arange(30) % 2, 2, 0), **lacking)
    settings = {"weight_decay": 0.0, "label_smoothing": 0.1, "augment": ("mixup",), "mask_missing_classes": masked}
    run = Run(toy_model(), data, FitConfig(epochs=1, batch_size=8, threads=1, **settings))
    head = run.model[-1]
    with torch.no_grad():
        head.bias[1] = 50.0  # it would win every clip
    before = head.weight[1].clone()
    record = run.epoch()
    assert torch.equal(head.weight[1], before) == masked
    assert (record["val_accuracy"] > 0) == masked
    assert np.isfinite(record["val_loss"])


STEPS, EPOCHS = 10, 20


@pytest.mark.parametrize(
    ("name", "warmup_epochs", "make"),
    [
        ("cosine", 0.0, lambda sgd: CosineAnnealingLR(sgd, T_max=STEPS * EPOCHS)),
        ("onecycle", 0.0, lambda sgd: OneCycleLR(sgd, max_lr=1.0, total_steps=STEPS * EPOCHS, pct_start=0.15)),
        ("onecycle", 6.0, lambda sgd: OneCycleLR(sgd, max_lr=1.0, total_steps=STEPS * EPOCHS, pct_start=0.3)),
    ],
)
def test_rates_are_torchs(name: str, warmup_epochs: float, make: Callable[[SGD], LRScheduler]) -> None:
    factor = learning_rates(name, STEPS, EPOCHS, warmup_epochs)
    scheduler = make(SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    for step in range(STEPS * EPOCHS):
        assert factor(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        scheduler.optimizer.step()
        scheduler.step()
    if name == "cosine":
        assert factor(STEPS * EPOCHS) == 0


def test_cosine_warms_up_linearly_and_then_falls() -> None:
    factor = learning_rates("cosine", STEPS, EPOCHS, 2.0)
    assert [factor(step) for step in range(20)] == pytest.approx([(i + 1) / 21 for i in range(20)])
    assert factor(20) == 1
    assert all(factor(step) > factor(step + 1) for step in range(20, STEPS * EPOCHS))


@pytest.mark.parametrize("name", ["cosine", "onecycle"])
@pytest.mark.parametrize("warmup_epochs", [0.0, 1.0, 5.0])
def test_one_step_runs_and_long_warm_ups_stay_in_range(name: str, warmup_epochs: float) -> None:
    for epochs in (1, 2):
        factor = learning_rates(name, 1, epochs, warmup_epochs)
        assert all(0 <= factor(step) <= 1 for step in range(epochs + 2))
