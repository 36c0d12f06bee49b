"""The laboratory of many trainings, in small and on a CPU: who trains on what, who teaches whom, what is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

from benchmarks.gpu_data import STEP_COPY_DB, STEP_DB, STEP_FRAME, Data
from benchmarks.gpu_lab import FOLDS, confidences, main
from benchmarks.gpu_training import Recipe, Training
from pipeline.features.features import FeatureConfig, normalise_power
from pipeline.training.augment import Draws

PLANS = Path(__file__).resolve().parents[2] / "benchmarks" / "plans"
FIT = {"epochs": 1, "batch_size": 8, "lr": 1e-3, "label_smoothing": 0.1, "ema": 0.9, "augment": ["mixup"]}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 recordings of 8 classes: 40 in five folds, the rest the test part; six actor folds."""
    rng, n = np.random.default_rng(0), 48
    file = tmp_path_factory.mktemp("lab") / "frames.npz"
    np.savez(
        file,
        frames=rng.integers(-60, 60, (n, 188, 190)).astype(np.int8),
        classes=np.arange(n) % 8,
        part=np.array(["train"] * 32 + ["inner_val"] * 8 + ["test"] * 8),
        five=np.array([*(1 + np.arange(40) % 5), *[0] * 8]),
        six=1 + np.arange(n) % 6,
        stems=np.array([f"{i:03}" for i in range(n)]),
        config=json.dumps(FeatureConfig(kind="frame_features").to_dict()),
    )
    return file


def test_no_fold_trains_on_what_it_answers(packed: Path) -> None:
    data = Data([packed], torch.device("cpu"))
    for job, folds, everything in (("five", 5, 40), ("six", 6, 48)):
        answered = []
        for fold in range(1, folds + 1):
            train, test = data.rows(job, fold)
            assert not set(train) & set(test)
            assert len(train) + len(test) == everything
            answered += test.tolist()
        assert sorted(answered) == list(range(everything))
    assert set(data.rows("final", 1)[1]) == set(range(40, 48))


def test_targets_are_those_of_fit(packed: Path) -> None:
    """Smoothed, mixed, then shared with the teachers: terms of ``training.losses`` and ``training.distillation``."""
    data = Data([packed], torch.device("cpu"))
    recipe = Recipe.of({"name": "x", "jobs": ["five"], "fit": FIT, "model": "cnn_bilstm", "share": 0.6})
    teacher = Training(recipe, "five", 1, 1, data).teacher().eval()
    taught = Training(recipe, "five", 1, 2, data, [teacher])
    features, targets = taught.prepare()
    rows = taught.train_rows[taught.sampler.draws(1)]
    draws = Draws.of_epoch(len(rows), 8, 0.2, 2, 1)
    weight = torch.from_numpy(draws.weight)
    labels = functional.one_hot(torch.from_numpy(data.classes[rows]), 8).float()
    mixed = weight[:, None] * labels + (1 - weight[:, None]) * labels[torch.from_numpy(draws.partner)]
    frames = torch.from_numpy(np.load(packed)["frames"][rows]).float() * STEP_FRAME
    heard = weight[:, None, None] * frames + (1 - weight[:, None, None]) * frames[torch.from_numpy(draws.partner)]
    torch.testing.assert_close(features, heard)
    expected = 0.4 * (0.9 * mixed + 0.1 / 8) + 0.6 * teacher(heard).softmax(dim=1)
    torch.testing.assert_close(targets, expected)


def test_a_plan_is_trained_wave_by_wave(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"jobs": ["six"], "folds": [1, 2], "fit": FIT, "model": "cnn_bilstm"}
    waves = [
        [{"name": "base", **common}, {"name": "other", **common, "seeds": [1, 2]}],
        [{"name": "student", **common, "teachers": ["base", "other"], "like_best_of": ["base", "other"]}],
    ]
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    plan.write_text(json.dumps(waves))
    told = []
    made = Training.__init__

    def noted(self: Training, recipe: Recipe, job: str, fold: int, seed: int, data: Data, teachers: list = ()) -> None:  # type: ignore[type-arg]
        told.append((recipe.name, fold, len(teachers)))
        made(self, recipe, job, fold, seed, data, teachers)

    monkeypatch.setattr(Training, "__init__", noted)
    monkeypatch.setattr("sys.argv", ["gpu_lab", "run", "--data", str(packed), "--plan", str(plan), "--out", str(out)])
    main()
    assert [entry for entry in told if entry[2]] == [("student", 1, 3), ("student", 2, 3)]
    answers = np.load(out / "answers.npz")
    assert set(answers) == {
        f"{name}|six|{fold}|{seed}"
        for fold in (1, 2)
        for name, seed in (("base", 42), ("other", 1), ("other", 2), ("student", 42))
    }
    assert all(answers[key].shape == (8, 8) for key in answers)
    printed = capsys.readouterr().out
    assert printed.count("student, six fold") == 2
    assert "student              six   seed 42, 2 folds" in printed


def test_copies_take_the_place_of_about_half_the_recordings(tmp_path: Path) -> None:
    """A copy is heard as an extraction of it would be, to within the rounding; the others are as without copies."""
    rng, n = np.random.default_rng(1), 32
    config = FeatureConfig()
    power = rng.exponential(size=(2, n, 64, 200)) * 10 ** rng.uniform(-4, 0, (2, n, 64, 1))
    lengths = np.array([200, 195])[:, None] * np.ones((1, n), dtype=np.int64)
    packed = {
        "classes": np.arange(n) % 8,
        "part": np.array(["train"] * n),
        "five": 1 + np.arange(n) % 5,
        "six": 1 + np.arange(n) % 6,
        "stems": np.array([f"{i:03}" for i in range(n)]),
        "config": json.dumps(config.to_dict()),
        "decibel": np.round(10 * np.log10(power[0]) / STEP_DB).astype(np.int16),
        "n_frames": lengths[0],
        "features": np.zeros((n, 1, 64, 188), dtype=np.int16),
    }
    copied = {
        "copy_decibel": np.round(10 * np.log10(power[1]) / STEP_COPY_DB).astype(np.int16),
        "copy_n_frames": lengths[1],
    }
    np.savez(tmp_path / "plain.npz", **packed)
    np.savez(tmp_path / "copies.npz", **packed, **copied)
    recipe = Recipe.of({"name": "x", "jobs": ["six"], "fit": {**FIT, "augment": ["pitch"]}})
    with pytest.raises(SystemExit, match="pack --copies"):
        Training(recipe, "six", 1, 1, Data([tmp_path / "plain.npz"], torch.device("cpu"))).prepare()
    training = Training(recipe, "six", 1, 1, Data([tmp_path / "copies.npz"], torch.device("cpu")))
    features, _ = training.prepare()
    rows = training.train_rows[training.sampler.draws(1)]
    is_copy = features.abs().amax(dim=(1, 2, 3)).numpy() > 0  # the recordings themselves are zeros here
    assert 0.2 < is_copy.mean() < 0.8
    middle = (195 - 188) // 2
    for place in np.flatnonzero(is_copy):
        expected = normalise_power(power[1, rows[place], :, middle : middle + 188].astype(np.float32), config)
        np.testing.assert_allclose(features[place], expected, atol=STEP_COPY_DB / 5)


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.json")), ids=lambda path: path.stem)
def test_the_plans_that_lie_ready_can_be_run(path: Path) -> None:
    taught: dict[str, set[str]] = {}  # recipe -> jobs, of earlier waves
    for wave in json.loads(path.read_text()):
        recipes = [Recipe.of(given) for given in wave]
        for recipe in recipes:
            assert set(recipe.jobs) <= set(FOLDS) - {"final"}  # no plan opens the test part
            for teacher in recipe.teachers:
                assert set(recipe.jobs) <= taught[teacher]
        taught |= {recipe.name: set(recipe.jobs) for recipe in recipes}
    assert taught


def test_confidences_tell_the_temperature_that_was_put_in() -> None:
    """Answers whose chances are true, sharpened by 2: fitted 2, too sure without it, more so at less than 1."""
    rng, names = np.random.default_rng(0), list("abcd")
    logits = rng.standard_normal((3000, 4))
    chance, sharp = (np.exp(k * logits) / np.exp(k * logits).sum(axis=1, keepdims=True) for k in (1, 2))
    drawn = [names[rng.choice(4, p=row)] for row in chance]
    found = pd.DataFrame(sharp, columns=[f"p_{name}" for name in names]).assign(label_name=drawn)
    heading, plain, shipped, fitted = confidences(found, names).splitlines()
    assert heading == "confidences of the 3000 recordings outside the test part:"
    over = [float(line.split("mean confidence ")[1].split()[0]) for line in (plain, shipped, fitted)]
    excess = 100 * (sharp.max(axis=1).mean() - np.mean(np.array(names)[sharp.argmax(axis=1)] == drawn))
    assert over[0] == pytest.approx(excess, abs=0.06)
    assert over[1] > over[0] > 10 > 3 > abs(over[2])
    assert float(fitted.split()[1]) == pytest.approx(2, rel=0.07)
