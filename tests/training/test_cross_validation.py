"""``jobs.crossval``: folds trained on Ray, resumed, compared; and what the table says, by hand."""

from __future__ import annotations

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
from jobs.train_options import fit_config, model_options
from pipeline.data.labels import LabelSet
from pipeline.data.splits import Fold
from pipeline.evaluation.metrics import evaluate
from pipeline.features.extract import ShardSummary
from pipeline.features.store import load_features
from pipeline.models.bundle import load_bundle
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
    out = tmp_path / "out"
    words = ["--protocol", "kfold,speaker_kfold", "--features", str(features), *FAST, "--out", str(out)]
    assert main([*words, "--engine", "ray"]) == 0
    printed, said = capsys.readouterr()
    assert "kfold: 2 folds, 24 recordings tested, 12-12 in each fold" in said
    assert "speaker_kfold fold 2  epoch 1/1  loss " in said
    assert "speaker_kfold minus kfold, points: accuracy" in printed
    assert all(len(line) <= 80 for line in printed.splitlines() if not line.startswith("page: "))
    found = json.loads((out / "protocols.json").read_text())
    assert [(row["protocol"], row["n"], len(row["folds"])) for row in found["protocols"]] == [
        ("kfold", 24, 2),
        ("speaker_kfold", 24, 2),
    ]
    table = pd.read_parquet(out / "kfold" / "predictions.parquet")
    row = found["protocols"][0]
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

    before = [pd.read_parquet(out / name / "predictions.parquet") for name in ("kfold", "speaker_kfold")]
    shutil.rmtree(out / "speaker_kfold" / "fold-2")
    assert main([*words, "--engine", "local"]) == 0
    said = capsys.readouterr().err
    assert "speaker_kfold fold 2  epoch 1/1" in said
    assert "kfold fold 1  epoch" not in said  # what is done is not done again
    for name, answers in zip(("kfold", "speaker_kfold"), before, strict=True):  # trained by either engine
        pd.testing.assert_frame_equal(pd.read_parquet(out / name / "predictions.parquet"), answers)

    assert main([*words, "--lr", "2e-3"]) == 2
    assert "the run was started with lr=0.001, got 0.002" in capsys.readouterr().err
    assert main([*words, "--enforce"]) == 3


def test_weights_are_balanced_by_what_a_fold_trains_on(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by what it is tested on; the oracle is scikit-learn's."""
    seen: list[tuple[Any, dict[str, float]]] = []

    def noted(folds: list[Fold], _base: object, _side: object, *, fits: dict[str, Any], **_: object) -> None:
        for fold in folds:
            names = fold.splits["train"]["label"].to_numpy()
            present = np.unique(names)
            expected = dict(zip(present, compute_class_weight("balanced", classes=present, y=names), strict=True))
            seen.append((fits[fold.name].class_weights, expected))
        raise SerError("enough")

    monkeypatch.setattr("pipeline.training.cross_validation.train_folds", noted)
    rows = load_features(features).table
    uneven = ["1" if label == "sad" or i % 4 == 0 else "2" for i, label in enumerate(rows["label"])]
    ids = [Path(path).stem for path in rows["speech"]]
    pd.DataFrame({"id": ids, "fold": uneven}).to_csv(tmp_path / "folds.csv", index=False)
    words = ["--protocol", "kfold", "--features", str(features), "--folds_csv", str(tmp_path / "folds.csv")]
    words += ["--inner_val", "0", "--class_weights", "balanced", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert len(seen) == 2
    for found, expected in seen:
        assert found == pytest.approx([expected.get(name, 1.0) for name in ("calm", "happy", "sad")])
    assert seen[0][0] != seen[1][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--protocol", "kfold"], "one of the arguments --data_csv --features is required"),
        (["--protocol", "threefold"], "expected one or more of holdout, kfold"),
        (["--protocol", "kfold", "--folds", "2", "--folds_at_once", "999"], "--folds_at_once 999 on"),
        (["--protocol", "kfold", "--folds", "1"], "expected 2 to 8"),
        (["--protocol", "kfold", "--folds", "2", "--crops", "0"], "crops must be 1 or more"),
        (["--protocol", "kfold", "--num_cpus", "-1"], "-1 CPUs"),
        (["--protocol", "kfold", "--label_map", "a=sad"], "--label_map cannot be used with --features"),
    ],
)
def test_usage_errors(
    words: list[str], message: str, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--features", str(features)] if len(words) > 2 else []
    assert main([*words, *given, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_overwrite_is_for_features_and_for_folds_that_nobody_is_training(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []

    def noted(_table: object, out: Path, _config: object, *, overwrite: bool = False, **_: object) -> ShardSummary:
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
    assert "another process is training the folds in" in capsys.readouterr().err
    assert (tmp_path / "out" / "kfold").is_dir()


def test_a_recipe_gives_the_settings_that_are_not_given() -> None:
    from jobs.train import build_parser

    words = ["--features", "f", "--out", "o", "--recipe", "models/inception_ser_final", "--epochs", "3"]
    root = Path(__file__).resolve().parents[2]
    words[words.index("models/inception_ser_final")] = str(root / "models" / "inception_ser_final")
    arguments = with_recipe(build_parser(), words).parse_args(words)
    settings = json.loads((root / "models" / "inception_ser_final" / "metrics.json").read_text())["training"][
        "settings"
    ]
    assert arguments.epochs == 3
    for name in ("batch_size", "lr", "weight_decay", "ema", "label_smoothing", "scheduler"):
        assert getattr(arguments, name) == settings[name], name
    assert arguments.augment.split(",") == settings["augment"]


def test_a_bundle_without_settings_is_no_recipe(tiny_bundle: Any) -> None:
    from jobs.train import build_parser

    with pytest.raises(SerError, match="has no record of its training settings"):
        with_recipe(build_parser(), ["--recipe", str(tiny_bundle.folder)])


def test_a_recipe_s_network_has_its_options_and_another_its_own(tmp_path: Path) -> None:
    from jobs.train import build_parser

    options = {"dropout": 0.1, "width": 0.5}
    shipped = load_bundle(Path(__file__).resolve().parents[2] / "models" / "inception_ser_final")
    bundle = untrained(tmp_path / "narrow", "inception", options, metrics={"training": shipped.metrics["training"]})
    assert load_bundle(bundle.folder).build_model()(torch.zeros(1, *shipped.features.input_shape)).shape == (1, 8)

    def asked(*words: str) -> dict[str, float]:
        given = ["--features", "f", "--out", "o", "--recipe", str(bundle.folder), *words]
        return model_options(with_recipe(build_parser(), given).parse_args(given))

    assert asked() == asked("--model", "inception") == options
    assert asked("--width", "1") == {"dropout": 0.1, "width": 1.0}
    assert asked("--model", "cnn_bilstm") == {}
    assert asked("--model=cnn_bilstm", "--dropout", "0.2") == {"dropout": 0.2}
    with pytest.raises(SerError, match="model 'cnn_bilstm' has no option 'width'"):
        asked("--model", "cnn_bilstm", "--width", "0.5")


def test_a_recipe_means_its_own_classes() -> None:
    """Class 1 of eight is calm; of four it may be another."""
    from jobs._recipe import _defaults

    bundle = load_bundle(Path(__file__).resolve().parents[2] / "models" / "inception_ser_final")
    settings = bundle.metrics["training"]["settings"] | {"oversample_boost": {"1": 2.0, "3": 1.5}}
    settings["class_weights"] = [1.0, 2.0, *[1.0] * 6]
    found = _defaults(settings, bundle.labels)
    assert found["oversample_boost"] == {"calm": 2.0, "fearful": 1.5}
    assert found["class_weights"] == dict.fromkeys(bundle.labels, 1.0) | {"calm": 2.0}


def test_a_recipe_of_classes_with_commas(tmp_path: Path) -> None:
    """Its weights and boosts are those of the same classes, wherever they stand among those of the new data."""
    from jobs.train import build_parser

    shipped = load_bundle(Path(__file__).resolve().parents[2] / "models" / "inception_ser_final")
    told = {"class_weights": [1.0, 3.0], "oversample_boost": {"1": 2.0}}
    settings = shipped.metrics["training"]["settings"] | told
    labels = ("cold,dry", "warm:wet")
    bundle = untrained(tmp_path / "n", labels=labels, metrics={"training": {"settings": settings}})
    given = ["--features", "f", "--out", "o", "--recipe", str(bundle.folder)]
    arguments = with_recipe(build_parser(), given).parse_args(given)
    settings = fit_config(arguments, LabelSet(("brisk", *bundle.labels)), pd.DataFrame(), threads=1)
    assert settings.class_weights == (1.0, 1.0, 3.0)
    assert settings.oversample_boost == {2: 2.0}


def test_side_by_side_shares_out_what_there_is() -> None:
    assert FoldConcurrency.of(5, None, cpus=2, gpus=0) == FoldConcurrency(2, 1)
    assert FoldConcurrency.of(2, None, cpus=8, gpus=0) == FoldConcurrency(2, 4)
    assert FoldConcurrency.of(6, 3, cpus=16, gpus=1) == FoldConcurrency(3, 5, pytest.approx(1 / 3))
    assert FoldConcurrency.of(6, None, cpus=16, gpus=1) == FoldConcurrency(1, 16, 1.0)
    assert FoldConcurrency.of(5, None, cpus=16, gpus=8) == FoldConcurrency(5, 3, 1)  # Ray gives no 1.6 GPUs
    assert FoldConcurrency.of(3, None, cpus=16, gpus=8) == FoldConcurrency(3, 5, 2)
    with pytest.raises(SerError, match="--folds_at_once 0 on 4 CPUs"):
        FoldConcurrency.of(5, 0, cpus=4, gpus=0)


def answered(right: int, n: int = 8) -> pd.DataFrame:
    """Two folds, two classes, the first ``right`` answers right."""
    truth = ["calm", "sad"] * (n // 2)
    answers = [t if i < right else {"calm": "sad", "sad": "calm"}[t] for i, t in enumerate(truth)]
    table = pd.DataFrame({"label_name": truth, "predicted": answers, "fold": ["1"] * (n // 2) + ["2"] * (n // 2)})
    return table.assign(status="ok", confidence=0.9, p_calm=0.5, p_sad=0.5, speech=[f"{i}.wav" for i in range(n)])


def row_of(protocol: str, right: int) -> dict[str, Any]:
    table, labels = answered(right), ("calm", "sad")
    parts = {"train": table.iloc[:0], "inner_val": table.iloc[:0], "test": table}
    return protocol_row(protocol, [Fold("1", parts), Fold("2", parts)], table, labels, evaluate(table, labels))


def test_the_gap_and_the_spread_by_hand(tmp_path: Path) -> None:
    rows = [row_of("kfold", 8), row_of("speaker_kfold", 6)]
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
    assert gaps([row_of("kfold", 8), row_of("holdout", 8)]) == []


def test_intervals_are_over_speakers_where_they_are_known(tmp_path: Path) -> None:
    labels = ("calm", "sad")
    table = answered(20, n=40).assign(speaker=[f"{i // 4:02d}" for i in range(40)])  # half of the voices all right
    parts = {"train": table.iloc[:0], "inner_val": table.iloc[:0], "test": table}
    folds = [Fold("1", parts), Fold("2", parts)]
    row = protocol_row("speaker_kfold", folds, table, labels, evaluate(table, labels))
    low, high = row["overall"]["accuracy"]["over_speakers"]
    assert (high - low) > 1.5 * (
        row["overall"]["accuracy"]["over_recordings"][1] - row["overall"]["accuracy"]["over_recordings"][0]
    )
    found = write_protocols([row], tmp_path, {})
    printed = protocols_summary(found)
    assert f"{low * 100:.1f}–{high * 100:.1f}" in printed
    assert f"{low * 100:.1f}–{high * 100:.1f}" in (tmp_path / "protocols.html").read_text()
    assert "over speakers" in printed
    assert "over speakers" not in protocols_summary(write_protocols([row_of("kfold", 6)], tmp_path, {}))


@pytest.mark.usefixtures("in_this_process")
def test_folds_learn_from_the_kept_models_of_the_same_folds(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pipeline.data.splits._hash_or_empty", lambda path, *_: f"content of {path}"
    )  # toys have no audio
    words = ["--protocol", "kfold", "--features", str(features), *FAST, "--engine", "local"]
    taught = [*words, "--seed", "43", "--teachers", str(tmp_path / "first"), "--out", str(tmp_path / "taught")]
    assert main(taught) == 2
    missing = tmp_path / "first" / "kfold" / "fold-1"
    assert str(missing) in capsys.readouterr().err
    assert not (tmp_path / "taught" / "kfold" / "fold-1").exists()  # nothing that would not fit the right ones

    keeping = [*words, "--keep_weights", "--out", str(tmp_path / "first")]
    assert main(keeping) == 0
    assert main([*taught[:-1], str(tmp_path / "first"), "--overwrite"]) == 2
    assert "teachers" in capsys.readouterr().err
    first = tmp_path / "first" / "kfold"
    arrays, answers = load_features(features), pd.read_parquet(first / "predictions.parquet")
    for fold, part in answers.groupby("fold"):
        bundle = load_bundle(first / f"fold-{fold}")
        heard = torch.from_numpy(np.concatenate([arrays.crops(int(row), 1) for row in part["row_id"]]))
        with torch.inference_mode():
            told = bundle.build_model()(heard).softmax(dim=1)
        np.testing.assert_allclose(told.numpy(), part[[f"p_{name}" for name in bundle.labels]], atol=1e-5)

    assert main(taught) == 0
    assert main([*taught, "--keep_weights"]) == 2
    assert "fold-1 was trained without --keep_weights" in capsys.readouterr().err
    for fold in ("1", "2"):
        found = read_plan(tmp_path / "taught" / "kfold" / f"fold-{fold}")
        assert (found.teachers, found.distill) == ((first / f"fold-{fold}",), 0.7)

    monkeypatch.setattr("pipeline.data.splits._hash_or_empty", lambda path, *_: "")  # the recordings were moved away
    assert main(keeping) == 0
    monkeypatch.setattr("pipeline.data.splits._hash_or_empty", lambda path, *_: f"other of {path}")
    capsys.readouterr()
    assert main(keeping) == 2
    assert "other recordings" in capsys.readouterr().err
    monkeypatch.setattr("pipeline.data.splits._hash_or_empty", lambda path, *_: f"content of {path}")

    (first / "fold-1").rename(first / "aside")
    (first / "fold-2").rename(first / "fold-1")
    (first / "aside").rename(first / "fold-2")  # each teacher has now heard what its student is tested on
    assert main([*taught[:-1], str(tmp_path / "flattered")]) == 2
    assert "12 recordings of the test part" in capsys.readouterr().err


@pytest.mark.parametrize("old", [["--protocol", "loso"], ["--protocol=kfold,loso"]])
def test_the_words_from_before_it_had_a_name_of_its_own(
    old: list[str], features: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*old, "--features", str(features), "--epochs", "3", "--out", "out"]
    asked: list[Any] = []
    monkeypatch.setattr(crossval, "job", lambda arguments: asked.append(arguments) or 0)
    assert evaluate_job.main(words) == 0
    assert "ser crossval" in capsys.readouterr().err
    assert (asked[0].protocol[-1], asked[0].epochs, asked[0].out) == ("loso", 3, Path("out"))
    sent = submit.split_words(submit.build_parser(), ["evaluate", *words])
    assert (sent.job, sent.words) == ("crossval", words)
