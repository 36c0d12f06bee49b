"""``jobs.crossval``: folds trained on Ray, resumed, compared; and what the table says, by hand."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from bundles import untrained
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from sklearn.utils.class_weight import compute_class_weight
from toy_data import write_features

from jobs import crossval, submit
from jobs import evaluate as evaluate_job
from jobs._recipe import with_recipe
from jobs.crossval import main
from jobs.train import build_parser
from jobs.train_options import fit_config, model_options
from pipeline.data.labels import LabelSet
from pipeline.data.splits import Fold
from pipeline.evaluation.metrics import evaluate
from pipeline.features.store import load_features
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.storage.errors import SerError
from pipeline.storage.journal import locked
from pipeline.training.cross_validation import FoldConcurrency, gaps, protocol_row, protocols_summary, write_protocols
from pipeline.training.plan import read_plan

pytestmark = pytest.mark.usefixtures("undrawn")
FAST = ["--epochs", "1", "--batch_size", "16", "--lr", "1e-3", "--folds", "2", "--inner_val", "0"]
FAST += ["--width", "0.125"]


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_features(tmp_path_factory.mktemp("toy") / "features", n=24)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("ray_session")
def test_two_protocols_in_one_command_and_resumed(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, protocols = tmp_path / "out", ("kfold", "speaker_kfold")
    words = ["--protocol", ",".join(protocols), "--features", str(features), *FAST, "--out", str(out)]
    assert main([*words, "--engine", "ray"]) == 0
    printed, said = capsys.readouterr()
    assert "speaker_kfold fold 2  epoch 1/1" in said
    assert "24 recordings tested, 12-12 in each" in said
    assert "speaker_kfold minus kfold" in printed
    assert all(len(line) <= 80 for line in printed.splitlines() if not line.startswith("page: "))
    found = json.loads((out / "protocols.json").read_text())["protocols"]
    assert [(row["protocol"], row["n"], len(row["folds"])) for row in found] == [(name, 24, 2) for name in protocols]
    before = {name: pd.read_parquet(out / name / "predictions.parquet") for name in protocols}
    table, row = before["kfold"], found[0]
    assert sorted(table["row_id"].astype(int)) == list(range(24))
    assert row["overall"]["accuracy"]["value"] == pytest.approx(accuracy_score(table["label_name"], table["predicted"]))
    for fold in row["folds"]:
        part = table[table["fold"] == fold["fold"]]
        truth, answer = part["label_name"], part["predicted"]
        assert fold["uar"] == pytest.approx(balanced_accuracy_score(truth, answer))
        assert fold["weighted_f1"] == pytest.approx(f1_score(truth, answer, average="weighted"))
    assert not list(out.rglob("checkpoint.pt"))
    for name in ("protocols.html", "protocols.csv", "folds.csv", "kfold/report.html", "speaker_kfold/metrics.json"):
        assert (out / name).is_file(), name

    shutil.rmtree(out / "speaker_kfold" / "fold-2")
    assert main([*words, "--engine", "local"]) == 0
    said = capsys.readouterr().err
    assert "speaker_kfold fold 2  epoch 1/1" in said
    assert "kfold fold 1  epoch" not in said  # what is done is not done again
    for name, answers in before.items():  # trained by either engine
        pd.testing.assert_frame_equal(pd.read_parquet(out / name / "predictions.parquet"), answers)

    assert main([*words, "--lr", "2e-3"]) == 2
    assert "lr=0.001" in capsys.readouterr().err
    assert main([*words, "--enforce"]) == 3


def test_weights_are_balanced_by_what_a_fold_trains_on(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by what it is tested on; the oracle is scikit-learn's."""
    seen: list[tuple[Any, Any]] = []

    def noted(folds: list[Fold], *_: object, fits: dict[str, Any], **__: object) -> None:
        seen.extend((fits[fold.name].class_weights, fold.splits["train"]["label"].to_numpy()) for fold in folds)
        raise SerError("enough")

    monkeypatch.setattr("pipeline.training.cross_validation.train_folds", noted)
    rows = load_features(features).table
    uneven = ["1" if label == "sad" or i % 4 == 0 else "2" for i, label in enumerate(rows["label"])]
    table = pd.DataFrame({"id": [Path(path).stem for path in rows["speech"]], "fold": uneven})
    table.to_csv(tmp_path / "folds.csv", index=False)
    words = ["--protocol", "kfold", "--features", str(features), "--folds_csv", str(tmp_path / "folds.csv")]
    assert main([*words, "--inner_val", "0", "--class_weights", "balanced", "--out", str(tmp_path / "out")]) == 2
    for found, labels in seen:
        present = np.unique(labels)
        expected = dict(zip(present, compute_class_weight("balanced", classes=present, y=labels), strict=True))
        assert found == pytest.approx([expected.get(name, 1.0) for name in ("calm", "happy", "sad")])
    first, second = (found for found, _ in seen)
    assert first != second


@pytest.mark.parametrize(
    ("words", "word"),
    [
        ([], "--data_csv"),
        (["--protocol", "threefold"], "threefold"),
        (["--folds_at_once", "999"], "--folds_at_once"),
        (["--folds", "1"], "2 to 8"),
        (["--crops", "0"], "crops"),
        (["--num_cpus", "-1"], "-1 CPUs"),
        (["--label_map", "a=sad"], "--label_map"),
        (["--join_seeds", "7"], "--join_seeds"),
        (["--join_seeds", "7", "7"], "--join_seeds"),
    ],
)
def test_usage_errors(
    words: list[str], word: str, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--protocol", "kfold", "--features", str(features), "--out", str(tmp_path / "out")]
    assert main([*(given if words else given[:2]), *words]) == 2
    assert word in capsys.readouterr().err


def test_overwrite_is_for_features_and_for_folds_that_nobody_is_training(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []

    def noted(*_: object, overwrite: bool = False, **__: object) -> None:
        asked.append(overwrite)
        raise SerError("enough")

    monkeypatch.setattr("pipeline.features.extract.extract_shards", noted)
    (tmp_path / "a.csv").write_text("speech,label\na.wav,sad\nb.wav,calm\n")
    words = ["--protocol", "kfold", "--out", str(tmp_path / "out"), "--overwrite"]
    assert main([*words, "--data_csv", str(tmp_path / "a.csv")]) == 2
    assert asked == [True], capsys.readouterr().err

    (tmp_path / "out" / "kfold").mkdir()
    with locked(tmp_path / "out" / ".protocols.lock", "training"):
        assert main([*words, "--features", str(features), "--folds", "999"]) == 2
    assert "another process" in capsys.readouterr().err
    assert (tmp_path / "out" / "kfold").is_dir()


def with_recipe_of(bundle: Bundle, *words: str) -> argparse.Namespace:
    """The options of ``ser train`` with this bundle as the recipe."""
    given = ["--features", "f", "--out", "o", "--recipe", str(bundle.folder), *words]
    return with_recipe(build_parser(), given).parse_args(given)


def test_a_recipe_gives_the_settings_that_are_not_given(tiny_bundle: Bundle) -> None:
    settings = load_bundle().metrics["training"]["settings"]
    arguments = with_recipe_of(load_bundle(), "--epochs", "3")
    assert arguments.epochs == 3
    for name in ("batch_size", "lr", "weight_decay", "ema", "label_smoothing", "scheduler"):
        assert getattr(arguments, name) == settings[name], name
    assert arguments.augment.split(",") == settings["augment"]
    with pytest.raises(SerError, match="no record of its training settings"):
        with_recipe_of(tiny_bundle)


def test_a_recipe_s_network_has_its_options_and_another_its_own(tmp_path: Path) -> None:
    options = {"dropout": 0.1, "width": 0.5}
    bundle = untrained(
        tmp_path / "narrow", "inception", options, metrics={"training": load_bundle().metrics["training"]}
    )

    def asked(*words: str) -> dict[str, float]:
        return model_options(with_recipe_of(bundle, *words))

    assert asked() == asked("--model", "inception") == options
    assert asked("--width", "1") == {"dropout": 0.1, "width": 1.0}
    assert asked("--model", "cnn_bilstm") == {}
    assert asked("--model=cnn_bilstm", "--dropout", "0.2") == {"dropout": 0.2}
    with pytest.raises(SerError, match="no option 'width'"):
        asked("--model", "cnn_bilstm", "--width", "0.5")


def test_weights_of_a_recipe_are_those_of_the_same_classes_wherever_they_stand(tmp_path: Path) -> None:
    told = {"class_weights": [1.0, 3.0], "oversample_boost": {"1": 2.0}}
    settings = load_bundle().metrics["training"]["settings"] | told
    labels = ("cold,dry", "warm:wet")
    bundle = untrained(tmp_path / "n", labels=labels, metrics={"training": {"settings": settings}})
    config = fit_config(with_recipe_of(bundle), LabelSet(("brisk", *labels)), pd.DataFrame(), threads=1)
    assert config.class_weights == (1.0, 1.0, 3.0)
    assert config.oversample_boost == {2: 2.0}


def test_side_by_side_shares_out_what_there_is() -> None:
    for given, (cpus, gpus), shared in (
        ((5, None), (2, 0), (2, 1)),
        ((2, None), (8, 0), (2, 4)),
        ((6, 3), (16, 1), (3, 5, pytest.approx(1 / 3))),
        ((6, None), (16, 1), (1, 16, 1.0)),
        ((5, None), (16, 8), (5, 3, 1)),  # Ray gives no 1.6 GPUs
        ((3, None), (16, 8), (3, 5, 2)),
    ):
        assert FoldConcurrency.of(*given, cpus=cpus, gpus=gpus) == FoldConcurrency(*shared)
    with pytest.raises(SerError, match="--folds_at_once 0"):
        FoldConcurrency.of(5, 0, cpus=4, gpus=0)


def answered(right: int, n: int = 8) -> pd.DataFrame:
    """Two folds, two classes, the first ``right`` answers right."""
    truth = np.array(["calm", "sad"] * (n // 2))
    answers = np.where(np.arange(n) < right, truth, np.roll(truth, 1))
    table = pd.DataFrame({"label_name": truth, "predicted": answers, "fold": np.repeat(["1", "2"], n // 2)})
    return table.assign(status="ok", confidence=0.9, p_calm=0.5, p_sad=0.5, speech=[f"{i}.wav" for i in range(n)])


def row_of(protocol: str, table: pd.DataFrame) -> dict[str, Any]:
    parts = {"train": table.iloc[:0], "inner_val": table.iloc[:0], "test": table}
    evaluation = evaluate(table, ("calm", "sad"))
    return protocol_row(protocol, [Fold("1", parts), Fold("2", parts)], table, ("calm", "sad"), evaluation)


def test_the_gap_and_the_spread_by_hand(tmp_path: Path) -> None:
    all_right = answered(8)
    rows = [row_of("kfold", all_right), row_of("speaker_kfold", answered(6))]
    (gap,) = gaps(rows)
    assert (gap["same"], gap["unseen"]) == ("kfold", "speaker_kfold")
    assert gap["accuracy"] == pytest.approx(6 / 8 - 1)
    assert rows[1]["over_folds"]["accuracy"] == {"mean": 0.75, "sd": pytest.approx(0.3535533906)}  # of 1.0 and 0.5
    assert rows[1]["lowest_class"]["recall"] == 0.75
    found = write_protocols(rows, tmp_path, {"command": "<script>alert(1)</script>"})
    page = (tmp_path / "protocols.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "−25.0" in page
    assert "−25.0" in protocols_summary(found)
    assert gaps([rows[0], row_of("holdout", all_right)]) == []


def test_intervals_are_over_speakers_where_they_are_known(tmp_path: Path) -> None:
    table = answered(20, n=40).assign(speaker=[f"{i // 4:02d}" for i in range(40)])  # half of the voices all right
    row = row_of("speaker_kfold", table)
    intervals = row["overall"]["accuracy"]
    low, high = intervals["over_speakers"]
    assert (high - low) > 1.5 * np.ptp(intervals["over_recordings"])
    printed = protocols_summary(write_protocols([row], tmp_path, {}))
    assert f"{low * 100:.1f}–{high * 100:.1f}" in printed
    assert f"{low * 100:.1f}–{high * 100:.1f}" in (tmp_path / "protocols.html").read_text()
    assert "over speakers" in printed
    assert "over speakers" not in protocols_summary(write_protocols([row_of("kfold", answered(6))], tmp_path, {}))


@pytest.mark.usefixtures("in_this_process")
def test_folds_learn_from_the_kept_models_of_the_same_folds(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hash_as(content: str) -> None:  # toys have no audio
        monkeypatch.setattr("pipeline.data.splits._hash_or_empty", lambda path, *_: content.format(path))

    hash_as("content of {}")
    first = tmp_path / "first" / "kfold"
    words = ["--protocol", "kfold", "--features", str(features), *FAST, "--engine", "local"]
    keeping = [*words, "--keep_weights", "--out", str(tmp_path / "first")]
    taught = [*words, "--seed", "43", "--teachers", str(tmp_path / "first"), "--out", str(tmp_path / "taught")]

    def refused(words: list[str], reason: str) -> None:
        assert main(words) == 2
        assert reason in capsys.readouterr().err

    refused(taught, str(first / "fold-1"))
    assert not (tmp_path / "taught" / "kfold" / "fold-1").exists()  # nothing that would not fit the right ones

    assert main(keeping) == 0
    refused([*taught[:-1], str(tmp_path / "first"), "--overwrite"], "teachers")
    arrays, answers = load_features(features), pd.read_parquet(first / "predictions.parquet")
    for fold, part in answers.groupby("fold"):
        bundle = load_bundle(first / f"fold-{fold}")
        heard = torch.from_numpy(np.concatenate([arrays.crops(int(row), 1) for row in part["row_id"]]))
        with torch.inference_mode():
            told = bundle.build_model()(heard).softmax(dim=1)
        np.testing.assert_allclose(told.numpy(), part[[f"p_{name}" for name in bundle.labels]], atol=1e-5)

    assert main(taught) == 0
    refused([*taught, "--keep_weights"], "fold-1 was trained without --keep_weights")
    for fold in ("fold-1", "fold-2"):
        found = read_plan(tmp_path / "taught" / "kfold" / fold)
        assert (found.teachers, found.distill) == ((first / fold,), 0.7)

    hash_as("")  # the recordings were moved away
    assert main(keeping) == 0
    hash_as("other of {}")
    refused(keeping, "other recordings")
    hash_as("content of {}")
    (first / "fold-1").rename(first / "aside")
    (first / "fold-2").rename(first / "fold-1")
    (first / "aside").rename(first / "fold-2")  # each teacher has now heard what its student is tested on
    refused([*taught[:-1], str(tmp_path / "flattered")], "12 recordings of the test part")


@pytest.mark.parametrize("old", [["--protocol", "loso"], ["--protocol=kfold,loso"]])
def test_the_words_from_before_it_had_a_name_of_its_own(
    old: list[str], features: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*old, "--features", str(features), "--epochs", "3", "--out", "out"]
    asked: list[Any] = []
    monkeypatch.setattr(crossval, "main", lambda given: asked.append(crossval.build_parser().parse_args(given)) or 0)
    assert evaluate_job.main(words) == 0
    assert "ser crossval" in capsys.readouterr().err
    assert (asked[0].protocol[-1], asked[0].epochs, asked[0].out) == ("loso", 3, Path("out"))
    sent = submit.split_words(submit.build_parser(), ["evaluate", *words])
    assert (sent.job, sent.words) == ("crossval", words)
