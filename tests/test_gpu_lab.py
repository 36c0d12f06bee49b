"""The laboratory of many trainings, in small and on a CPU: who trains on what, who teaches whom, what is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.gpu_data import STEP_FRAME, Data
from benchmarks.gpu_lab import FOLDS, main
from benchmarks.gpu_training import Recipe, Training
from pipeline.augment import Draws
from pipeline.features import FeatureConfig

PLANS = Path(__file__).resolve().parents[1] / "benchmarks" / "plans"
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
    """Smoothed, mixed, then shared with the teachers: the terms of ``pipeline.losses`` and ``pipeline.teachers``."""
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
    assert len(taught) > 1
