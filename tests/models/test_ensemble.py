"""Several networks as one model: what it answers, what it has heard, what cannot be joined."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from bundles import NARROW, untrained
from scipy.stats import gmean
from toy_data import write_features

from jobs._recipe import with_recipe
from jobs.crossval import main as crossval
from jobs.join import main
from jobs.train import build_parser
from jobs.train_options import model_options
from pipeline.features.features import FeatureConfig
from pipeline.inference.predictor import Predictor
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.models.ensemble import join, mean_answers
from pipeline.models.networks import JoinedModel
from pipeline.storage.errors import SerError
from pipeline.training.config import FitConfig

pytestmark = pytest.mark.usefixtures("in_this_process", "undrawn")
LABELS = ("calm", "happy", "sad")
SMALL = FeatureConfig(window_s=0.5, n_mels=32)
SETTINGS = {"epochs": 3, "seed": 1}


def bundle(folder: Path, seed: int, options: Mapping[str, float] = NARROW, **changes: Any) -> Bundle:
    """An untrained narrow Inception whose answers differ between inputs."""
    training = {"settings": SETTINGS | {"seed": seed}, "epochs": 3, "best_epoch": 3, "trained_on": "4 clips"}
    given = {"name": "inception_ser_final", "labels": LABELS, "features": SMALL, "metrics": {"training": training}}
    return untrained(folder, options=options, seed=seed, **given | changes)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("three")
    return [bundle(folder / str(seed), seed) for seed in (1, 2, 3)]


def geometric_mean(members: np.ndarray) -> np.ndarray:
    """Of probabilities (members, n, classes), renormalised."""
    expected = gmean(members.astype(np.float64), axis=0)
    return np.asarray(expected / expected.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_the_joined_model_answers_with_the_geometric_mean(three: list[Bundle], tmp_path: Path, backend: str) -> None:
    joined = join([each.folder for each in three], tmp_path / "joined")
    features = np.random.default_rng(0).standard_normal((5, *SMALL.input_shape)).astype(np.float32)
    *alone, told = (Predictor.from_bundle(b.folder, backend=backend).probabilities(features) for b in (*three, joined))
    np.testing.assert_allclose(told, geometric_mean(np.stack(alone)), atol=1e-5)
    assert np.abs(told - alone[0]).max() > 1e-3


def test_answers_of_folds_are_joined_in_the_same_way() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(3), (2, 6))
    p[0, 0] = [1.0, 0.0, 0.0]  # a certain member
    columns = [f"p_{name}" for name in LABELS]
    tables = [pd.DataFrame(each, columns=columns).assign(row_id=range(6), fold="1", predicted="") for each in p]
    found = mean_answers(tables, LABELS)
    expected = geometric_mean(p[:, 1:])
    np.testing.assert_allclose(found[columns].to_numpy()[1:], expected)
    np.testing.assert_allclose(found[columns].to_numpy()[0], [1, 0, 0], atol=1e-9)
    assert list(found["predicted"][1:]) == [LABELS[i] for i in expected.argmax(axis=1)]
    np.testing.assert_allclose(found["confidence"][1:], expected.max(axis=1))
    with pytest.raises(SerError, match="different recordings"):
        mean_answers([tables[0], tables[1].iloc[::-1]], LABELS)


def test_a_recording_that_one_member_learnt_from_is_heard(tmp_path: Path) -> None:
    """The leak check believes ``training.csv``: a member's test part is no test part if another trained on it."""
    stems = [f"03-01-03-01-01-01-0{i}" for i in range(1, 6)]
    rows = pd.DataFrame({"id": stems, "content_hash": stems, "speaker": "a"})
    known = (
        rows.assign(split=["train", "train", "inner_val", "test", "test"]),
        rows.assign(split=["train", "test", "test", "inner_val", "test"]),
        pd.DataFrame({"id": ["a"]}),  # as others may write it
    )
    first, second, names_only = (bundle(tmp_path / str(i), i, training=told) for i, told in enumerate(known))
    found = join([first.folder, second.folder], tmp_path / "joined")
    assert list(found.training["split"]) == ["train", "train", "inner_val", "inner_val", "test"]
    assert list(found.training["id"]) == stems
    assert found.metrics["training"]["trained_on"] == "2 clips (training.csv)"
    assert "CC BY-NC-SA" in (found.folder / "README.md").read_text()  # the names are RAVDESS's
    for other in (bundle(tmp_path / "unknown", 3), names_only):
        assert join([first.folder, other.folder], tmp_path / f"with-{other.folder.name}").training.empty


def test_what_it_was_made_of_is_told(three: list[Bundle], tmp_path: Path) -> None:
    found = join([each.folder for each in three], tmp_path / "joined")
    told = found.metrics["training"]["joined"]
    assert [member["model_sha256"] for member in told] == [each.weights_sha256 for each in three]
    assert (found.folder / "README.md").read_text().count("trained on 4 clips, epochs 3, seed") == 3
    assert dict(found.model_options) == {"width": 0.125, "members": 3}
    assert isinstance(found.build_model(), JoinedModel)
    assert found.temperature == 1
    other = bundle(tmp_path / "dropout", 5, {"width": 0.125, "dropout": 0.1})  # which is no difference
    assert "dropout" not in join([three[0].folder, other.folder], tmp_path / "two").model_options


def test_what_does_not_fit_together_is_refused(
    three: list[Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (str(each.folder) for each in three[:2])
    (tmp_path / "there").mkdir()
    join([each.folder for each in three[:2]], tmp_path / "joined")
    shutil.copytree(first, tmp_path / "the same weights")
    bundle(tmp_path / "another network", 11, {"width": 0.25})
    bundle(tmp_path / "other classes", 12, labels=("angry", "calm", "happy"))
    bundle(tmp_path / "other features", 13, features=dataclasses.replace(SMALL, window_s=1.0))
    bundle(tmp_path / "number of crops", 14, crops=3)
    complaints = ("joined", "the same weights", "another network", "other classes", "other features", "number of crops")
    for others, complaint in (
        ([], "2 to 16"),
        (["nothing"], "no model bundle"),
        *(([complaint], complaint) for complaint in complaints),
    ):
        assert main([first, *(str(tmp_path / other) for other in others), "--out", str(tmp_path / "out")]) == 2
        assert complaint in capsys.readouterr().err.replace(str(tmp_path / complaint), "")
        assert not (tmp_path / "out").exists()
    assert main([first, second, "--out", str(tmp_path / "there")]) == 2
    assert "--out" in capsys.readouterr().err
    assert main([first, second, "--out", str(tmp_path / "out")]) == 0


def test_folds_are_tested_with_their_models_joined(tmp_path: Path) -> None:
    features, out = write_features(tmp_path / "features", n=24), tmp_path / "out"
    words = ["--protocol", "speaker_kfold", "--features", str(features), "--folds", "2", "--inner_val", "0"]
    words += ["--epochs", "1", "--batch_size", "16", "--lr", "1e-3", "--width", "0.125", "--engine", "local"]
    assert crossval([*words, "--join_seeds", "7", "8", "--out", str(out), "--keep_weights"]) == 0
    found = pd.read_parquet(out / "speaker_kfold" / "predictions.parquet")
    columns = [name for name in found.columns if name.startswith("p_")]
    for fold, part in found.groupby("fold"):
        runs = [out / "speaker_kfold" / f"seed-{seed}" / f"fold-{fold}" for seed in (7, 8)]
        tables = [pd.read_parquet(run / "predictions.parquet").set_index("row_id") for run in runs]
        alone = np.stack([table.loc[part["row_id"], columns].to_numpy() for table in tables])
        assert np.abs(alone[0] - alone[1]).max() > 1e-4  # other seeds, other models
        np.testing.assert_allclose(part[columns], geometric_mean(alone), atol=1e-9)
        assert [load_bundle(run).metrics["training"]["settings"]["seed"] for run in runs] == [7, 8]
    assert json.loads((out / "protocols.json").read_text())["protocols"][0]["n"] == 24
    assert "joined (seeds 7, 8)" in (out / "speaker_kfold" / "report.html").read_text()


def test_a_joined_model_is_the_recipe_of_its_first_member(tmp_path: Path) -> None:
    """Which trains one network, not three at once."""
    recipes = {seed: {"training": {"settings": FitConfig(seed=seed, lr=0.5).to_dict()}} for seed in (4, 5)}
    made = [bundle(tmp_path / str(seed), seed, metrics=recipe).folder for seed, recipe in recipes.items()]
    words = ["--features", "x", "--out", "y", "--recipe", str(join(made, tmp_path / "joined").folder)]
    arguments = with_recipe(build_parser(), words).parse_args(words)
    assert (arguments.seed, arguments.lr, arguments.model) == (4, 0.5, "inception")
    assert model_options(arguments) == {"width": 0.125}
