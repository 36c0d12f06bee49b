"""Batch norm's statistics taken from a group: what they remove, whom they touch, and the ways side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from toy_data import toy_model, write_features

from benchmarks.speaker_statistics import WAYS, adapted, answers, equal_classes, main
from pipeline.data.manifest import label_set
from pipeline.data.splits import Fold, folds_of
from pipeline.models.bundle import load_bundle
from pipeline.training.config import FitConfig, Plan, read_plan
from pipeline.training.results import predict, write_results
from pipeline.training.run import begin, read_splits, train_here


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A protocol's folder with two folds of two speakers each, of one epoch, with their weights."""
    out = tmp_path_factory.mktemp("run")
    features = write_features(out / "features", n=24)
    table = pd.DataFrame({"row_id": [str(i) for i in range(24)], "speech": [f"/audio/{i:03d}.wav" for i in range(24)]})
    table = table.assign(
        label=[("calm", "happy", "sad")[i % 3] for i in range(24)],
        speaker=[f"Actor_{i % 4 + 1:02d}" for i in range(24)],
    )
    fit = FitConfig(epochs=1, batch_size=8, lr=1e-3, patience=0, threads=1)
    for fold in folds_of(table, "speaker_kfold", folds=2, inner_val=0):
        plan = Plan(
            out=out / "kfold" / f"fold-{fold.name}",
            features=(features,),
            labels=label_set(table).names,
            model_name="inception",
            model_options={"width": 0.125},
            fit=fit,
        )
        begin(plan, fold.splits)
        train_here(plan)
        write_results(plan, "none")
    return out / "kfold"


def test_level_and_scale_of_a_voice_are_removed() -> None:
    """Without padding, a convolution's batch norm undoes any gain and offset that all of a group's pictures share."""
    torch.manual_seed(0)
    model = toy_model()
    x = torch.randn(6, 1, 16, 32)
    told = []
    for heard in (x, 3 * x + 5):
        model.load_state_dict(adapted(model, heard))
        told.append(model.eval()(heard))
    torch.testing.assert_close(told[0], told[1], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(model(x), told[0], atol=1e-2)  # the statistics are those of 3x + 5 now


def test_only_the_statistics_change(run: Path) -> None:
    model = load_bundle(run / "fold-1").build_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = adapted(model, torch.randn(4, 1, 16, 32))
    changed = {name.rsplit(".", 1)[1] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("way", WAYS)
def test_every_recording_is_answered_once_and_by_its_own_speaker(way: str) -> None:
    rows = pd.DataFrame({"row_id": range(24), "label": [f"class {i % 3}" for i in range(24)]})
    groups = list(WAYS[way](rows))
    assert sorted(row for _, then in groups for row in then["row_id"]) == list(range(24))
    told = {
        "speaker": 24,
        "half_trained": 24,
        "enrolled": 12,
        "eight": 8,
        "four_classes": 16,  # classes 0 and 2; class 1 is alone
        "one_class": 8,
        "calm_folder": 6,  # none of these is neutral or calm
    }
    assert len(groups[0][0]) == told[way]
    if way == "enrolled":
        assert all(set(first["row_id"]).isdisjoint(then["row_id"]) for first, then in groups)


def test_a_calm_folder_has_twelve_neutral_or_calm_recordings_and_six_others() -> None:
    rows = pd.DataFrame({"label": ["neutral", "calm", "sad", "happy"] * 10})
    ((heard, answered),) = WAYS["calm_folder"](rows)
    assert (heard["label"].isin(["neutral", "calm"]).sum(), len(heard), len(answered)) == (12, 18, 40)


def test_a_voice_that_leans_towards_a_class_is_set_straight() -> None:
    """A bias on one class's log-probability, the same for all recordings of the voice, is found and taken away."""
    rng = np.random.default_rng(0)
    logits = 4 * np.eye(3)[np.arange(60) % 3] + rng.normal(size=(60, 3))
    leaning = np.exp(logits + np.array([0.0, 5.0, 0.0]))
    leaning /= leaning.sum(axis=1, keepdims=True)
    labels = ("calm", "happy", "sad")
    told = pd.DataFrame(leaning, columns=[f"p_{name}" for name in labels]).assign(
        label=np.array(labels)[np.arange(60) % 3]
    )
    assert (leaning.argmax(axis=1) == np.arange(60) % 3).mean() < 0.7
    straight = equal_classes(told, labels)
    assert (straight["predicted"] == told["label"]).mean() > 0.95
    np.testing.assert_allclose(straight[["p_calm", "p_happy", "p_sad"]].mean(), 1 / 3, atol=1e-6)


def test_half_of_the_statistics_are_the_models_own() -> None:
    torch.manual_seed(0)
    model, x = toy_model(), torch.randn(6, 1, 16, 32)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    whole = {name: value.clone() for name, value in adapted(model, x).items()}
    model.load_state_dict(own)
    half = adapted(model, x, 0.5)
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(half[name], (own[name] + whole[name]) / 2)


def test_the_ways_side_by_side(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["speaker_statistics", "--run", str(run), "--out", str(tmp_path)])
    main()
    rows = json.loads((tmp_path / "protocols.json").read_text())["protocols"]
    assert [(row["protocol"], row["n"]) for row in rows] == [(way, 24) for way in ("plain", *WAYS, "equal_classes")]
    assert "one_class" in capsys.readouterr().out
    tables = {way: pd.read_parquet(tmp_path / f"{way}.parquet").set_index("row_id") for way in ("plain", "speaker")}
    assert not tables["plain"]["p_sad"].equals(tables["speaker"]["p_sad"].loc[tables["plain"].index])


def test_a_group_is_answered_by_itself(run: Path) -> None:
    """The same answers where its fold holds no other group; plain answers are the weights' own."""
    plan = read_plan(run / "fold-1")
    fold = Fold("1", read_splits(plan.out))
    test = fold.splits["test"]
    alone = test[test["speaker"] == test["speaker"].iloc[0]]
    both = answers(plan, test, "speaker").set_index("row_id")["p_sad"]
    assert answers(plan, alone, "speaker").set_index("row_id")["p_sad"].equals(both.loc[alone["row_id"]])
    plain = predict(plan, load_bundle(plan.out).state_dict(), test)
    pd.testing.assert_frame_equal(answers(plan, test, "plain"), plain)
