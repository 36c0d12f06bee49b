from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from bundles import resaved
from made_predictions import LABELS, made_predictions, with_failed

from jobs import evaluate as job
from pipeline.data import splits
from pipeline.data.manifest import scan_folder
from pipeline.evaluation import leaks
from pipeline.models.bundle import Bundle

DONE, USAGE, MISSED, SOME_FAILED = 0, 2, 3, 4


class Scorer:
    """Stands for ``score_manifest``: answers as told instead of listening."""

    def __init__(self, right: float = 1.0, failed: int = 0) -> None:
        self.right, self.failed = right, failed
        self.hears: dict[str, str] = {}  # what is answered for a path, whatever its label says
        self.calls: list[dict[str, Any]] = []

    def __call__(self, manifest: pd.DataFrame, out: Path, **options: Any) -> SimpleNamespace:
        self.calls.append({"manifest": manifest, "out": out, **options})
        labelled = "label" in manifest.columns
        truth = list(manifest["label"]) if labelled else ["sad"] * len(manifest)
        wrong = round((1 - self.right) * len(truth))
        answers = [LABELS[(LABELS.index(t) + (i < wrong)) % 8] if t else "sad" for i, t in enumerate(truth)]
        answers = [self.hears.get(path, answer) for path, answer in zip(manifest["speech"], answers, strict=True)]
        table = manifest.assign(status="ok", error=None, predicted=answers, confidence=0.9)
        if labelled:
            table["label_name"] = table["label"]
        for label in LABELS:
            table[f"p_{label}"] = np.where(np.array(answers) == label, 0.9, 0.1 / 7)
        table = with_failed(table, range(len(table) - self.failed, len(table)))
        out.mkdir(parents=True, exist_ok=True)
        table.to_parquet(out / "predictions.parquet")
        (out / "run.json").write_text(json.dumps({"labels": LABELS, "seconds": 97.8}))
        return SimpleNamespace(failed=self.failed)


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch, undrawn: None) -> Scorer:
    """No listening and no drawing; the scorer's ``right`` and ``failed`` can be set."""
    fake = Scorer()
    monkeypatch.setattr("pipeline.scoring.scoring.score_manifest", fake)
    return fake


@pytest.fixture
def csv(tmp_path: Path, ravdess_like: Path) -> Path:
    path = tmp_path / "val.csv"
    scan_folder(ravdess_like).to_csv(path, index=False)
    return path


@pytest.fixture
def run(tiny_bundle: Bundle, csv: Path, tmp_path: Path) -> Callable[..., int]:
    """``run("--enforce", ...)``: the job on the CSV with the tiny bundle, without the leak check unless asked for."""

    def call(*words: str, data: Path = csv, weights: Path = tiny_bundle.folder) -> int:
        start = ["--model_weights", str(weights), "--data_csv", str(data), "--out", str(tmp_path / "out")]
        return job.main([*start, *([] if "--leak_check" in words else ["--leak_check", "off"]), *words])

    return call


@pytest.mark.usefixtures("in_this_process", "undrawn")
def test_the_briefs_own_command_line(
    ravdess_like: Path, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.wav").write_text("no audio at all")
    table = pd.concat([scan_folder(ravdess_like).iloc[::4], pd.DataFrame({"speech": ["broken.wav"], "label": ["sad"]})])
    table.to_csv("val_metadata.csv", index=False)
    words = ["--model_weights", str(tiny_bundle.weights_path), "--data_csv", "val_metadata.csv"]
    assert job.main(words) == SOME_FAILED
    (made,) = Path("reports").iterdir()
    printed = capsys.readouterr()
    assert str(made) in printed.err.splitlines()[0]
    assert "counts: angry 2, calm 2, disgust 2, fearful 2, happy 2, neutral 2, sad 3, surprised 2" in printed.err
    assert "weighted avg" in printed.out
    assert "verdict: NOT MET" in printed.out
    saved = json.loads((made / "metrics.json").read_text(encoding="utf-8"))
    assert saved["n"] == {"rows": 17, "failed": 1, "labelled": 17, "unlabelled": 0, "read": 16, "labelled_failed": 1}
    assert saved["meta"]["model_sha256"] == tiny_bundle.weights_sha256
    assert "jobs.evaluate --model_weights" in saved["meta"]["command"]
    assert {"report.html", "predictions.csv"} <= {path.name for path in made.iterdir()}


@pytest.mark.parametrize(
    ("right", "failed", "words", "code"),
    [
        (1.0, 0, ["--min_class_accuracy", "0.5", "--enforce"], DONE),
        (0.5, 0, [], DONE),
        (0.5, 3, ["--enforce"], MISSED),
        (0.5, 3, ["--enforce", "--tolerate_failures"], MISSED),
        (1.0, 3, [], SOME_FAILED),
        (1.0, 3, ["--tolerate-failures"], DONE),
        (0.5, 0, ["--enforce", "--min-accuracy", "40", "--min_weighted_f1", "30%", "--min_class_accuracy", "0"], DONE),
        (
            0.5,
            0,
            ["--enforce", "--min_accuracy", "60", "--min_weighted_f1", "0.3", "--min_class_accuracy", "0"],
            MISSED,
        ),
    ],
)
def test_exit_codes(
    run: Callable[..., int], scorer: Scorer, right: float, failed: int, words: list[str], code: int
) -> None:
    scorer.right, scorer.failed = right, failed
    assert run(*words) == code


def test_a_class_without_recordings_is_named_and_not_judged(
    run: Callable[..., int], scorer: Scorer, csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_csv(csv)
    table[table["label"] != "calm"].to_csv(csv, index=False)
    assert run("--min_class_accuracy", "0.5") == DONE
    assert "recall of calm" in capsys.readouterr().out
    assert run("--min_class_accuracy", "0.0", "--min_accuracy", "0", "--min_weighted_f1", "0", "--enforce") == DONE


def test_without_labels_it_scores_and_says_so(
    run: Callable[..., int], scorer: Scorer, csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pd.read_csv(csv)[["speech"]].to_csv(csv, index=False)
    assert run() == DONE
    printed = capsys.readouterr()
    assert "64 rows, 0 failed" in printed.out
    assert run("--enforce") == MISSED


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def test_bad_input_is_one_line(run: Callable[..., int], scorer: Scorer, csv: Path, tmp_path: Path, capsys: Any) -> None:
    assert run(weights=tmp_path / "none") == USAGE
    assert "none" in error_of(capsys)
    table = pd.read_csv(csv)
    table.assign(label=["bored", *table["label"][1:]]).to_csv(csv, index=False)
    assert run() == USAGE
    assert "bored" in error_of(capsys)
    assert run("--label_map", "bored=calm") == DONE


@pytest.mark.parametrize(
    "words",
    [
        ["--min_accuracy", "many"],
        ["--min_accuracy", "101"],
        ["--min_accuracy", "-1"],
        ["--min_accuracy", "nan"],
        ["--embed_audio", "-1"],
        ["--embed_audio", "1000"],
        ["--leak_check", "maybe"],
        ["--compare", "only-one"],
    ],
)
def test_bad_options_are_one_line(
    run: Callable[..., int], scorer: Scorer, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == USAGE
    error_of(capsys)
    assert scorer.calls == []


CODES = ["neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"]  # the order of RAVDESS
GIVEN = {
    "integers with zeros": [f"{i:02d}" for i in range(8)],
    "names that need a map themselves": [f"n{i}" for i in range(8)],
    "aliases": ["calmness", "Anger", "sadness", "HAP", "neu", "dis", "fear", "ps"],
}


@pytest.mark.parametrize("case", GIVEN)
def test_the_label_map_that_is_printed_gives_what_it_promises(
    run: Callable[..., int], scorer: Scorer, csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    table = pd.read_csv(csv)
    table["speech"] = [f"/{i}.wav" for i in range(len(table))]  # a name of RAVDESS would contradict the integers
    scorer.hears = dict(zip(table["speech"], table["label"], strict=True))
    for path in table["speech"][:6]:
        scorer.hears[path] = "sad"
    renamed = dict(zip(CODES, GIVEN[case], strict=True))
    table.assign(label=table["label"].map(renamed)).to_csv(csv, index=False)
    before = ["--label_map", ",".join(f"n{i}={label}" for i, label in enumerate(LABELS))] if "map" in case else []
    assert run(*before) == DONE
    printed = capsys.readouterr().out
    words = printed[printed.index("labels look permuted") :].split()
    promised = words[words.index("--label_map") - 2]
    begin, end = words.index("--label_map"), words.index("added")
    assert run(*before, *shlex.split(" ".join(words[begin:end]))) == DONE
    assert scorer.calls[-1]["overwrite"], "the labels belong to the input: without it the folder would be refused"
    printed = capsys.readouterr().out
    assert "permuted" not in printed
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert f"{saved['overall']['accuracy']['value']:.0%}" == promised


# --- leaks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained_bundle(ravdess_like: Path, tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle that says it was trained on eight of the recordings."""
    table = splits.add_hashes(scan_folder(ravdess_like).iloc[::8])
    training = table.assign(id="x", split=["train"] * 6 + ["inner_val", "test"])
    training = training[["id", "content_hash", "speaker", "split"]]
    return resaved(tiny_bundle, tmp_path / "trained", training=training).folder


def test_leaks_are_counted_named_and_taken_out(
    run: Callable[..., int], scorer: Scorer, trained_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--leak_check", "warn", weights=trained_bundle) == DONE
    err = capsys.readouterr().err
    assert "7 of 64" in err
    assert "accuracy 100.0%" in err
    assert "RAVDESS_01" in err
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["leak_check"]
    assert (saved["leaked"], saved["checked"], saved["unseen"]["n"]) == (7, 64, 57)


def test_leaks_can_be_an_error_before_anything_is_scored(
    run: Callable[..., int], scorer: Scorer, trained_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--leak_check", "error", weights=trained_bundle) == USAGE
    assert "7 of 64" in error_of(capsys)
    assert scorer.calls == []


def test_the_check_can_be_left_out(
    run: Callable[..., int], scorer: Scorer, trained_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluation.leaks.add_hashes", lambda *_, **__: pytest.fail("read the recordings"))
    assert run("--leak_check", "off", weights=trained_bundle) == DONE


# --- compare -------------------------------------------------------------------------------------------------------


def scores(folder: Path, table: pd.DataFrame) -> str:
    folder.mkdir()
    table.to_parquet(folder / "predictions.parquet")
    return str(folder)


def test_two_folders_of_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = made_predictions(80, accuracy=0.6), made_predictions(80, accuracy=0.9)
    pair = [scores(tmp_path / "a", first), scores(tmp_path / "b", second)]
    assert job.main(["--compare", *pair, "--out", str(tmp_path / "out")]) == DONE
    out = capsys.readouterr().out
    assert "McNemar" in out
    found = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    want = (second["predicted"] == second["label_name"]).mean() - (first["predicted"] == first["label_name"]).mean()
    assert found["figures"][0]["difference"] == pytest.approx(want)


def test_two_bundles_on_one_csv(
    scorer: Scorer, tiny_bundle: Bundle, csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--compare", str(tiny_bundle.folder), str(tiny_bundle.weights_path), "--out", str(tmp_path / "out")]
    assert job.main([*words, "--data_csv", str(csv)]) == DONE
    assert [call["out"] for call in scorer.calls] == [tmp_path / "out" / "A", tmp_path / "out" / "B"]
    assert "only A 0, only B 0" in capsys.readouterr().out
    assert job.main(words) == USAGE
    assert "--data_csv" in error_of(capsys)


def test_models_of_different_classes_are_compared_on_those_of_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = made_predictions(80)
    second = first.drop(columns="p_calm").assign(predicted=first["predicted"].replace("calm", "sad"))
    pair = [scores(tmp_path / "a", first), scores(tmp_path / "b", second)]
    assert job.main(["--compare", *pair, "--out", str(tmp_path / "out")]) == DONE
    assert f"{pair[1]}" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    recalls = {row["label"]: row["second"] for row in found["figures"]}
    assert recalls["calm"] == 0
    assert found["figures"][0]["second"] == pytest.approx((second["predicted"] == second["label_name"]).mean())


def test_what_cannot_be_compared_is_refused_before_anything_is_scored(
    scorer: Scorer, csv: Path, tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = scores(tmp_path / "others", made_predictions(40, ("no", "yes")))
    words = ["--compare", str(tiny_bundle.folder), "--data_csv", str(csv), "--out", str(tmp_path / "out")]
    for second, reason in ((others, "share classes"), (str(tmp_path / "none"), "no scores at")):
        assert job.main([*words[:2], second, *words[2:]]) == USAGE
        assert reason in error_of(capsys)
    assert scorer.calls == []


def test_models_that_know_the_recordings_are_not_compared_without_a_word(
    scorer: Scorer,
    csv: Path,
    tiny_bundle: Bundle,
    trained_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    words = ["--compare", str(trained_bundle), str(tiny_bundle.folder), "--data_csv", str(csv)]
    read: list[int] = []
    add_hashes = splits.add_hashes
    for module in (splits, leaks):
        monkeypatch.setattr(module, "add_hashes", lambda t, **_: read.append(len(t)) or add_hashes(t))
    assert job.main([*words, "--out", str(tmp_path / "out")]) == DONE
    said = capsys.readouterr().err
    assert "7 of 64" in said
    found = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))["leak_checks"]
    assert read == [64]  # every recording once, not once a model
    assert [(check["name"], check["leaked"]) for check in found] == [
        (str(trained_bundle), 7),
        (str(tiny_bundle.folder), 0),
    ]
    assert job.main([*words, "--out", str(tmp_path / "again"), "--leak_check", "error"]) == USAGE
    assert "7 of 64" in error_of(capsys)


@pytest.mark.parametrize(
    "words",
    [
        *(["--enforce"], ["--model_weights", "m"], ["--embed_audio", "2"]),
        *(["--min_accuracy", "90"], ["--min_class_accuracy", "0.5"]),
        *(["--crops", "3"], ["--root", "r"], ["--label_map", "a=sad"]),  # of tables
    ],
)
def test_what_a_comparison_does_not_heed_is_refused(words: list[str], tmp_path: Path, capsys: Any) -> None:
    assert job.main(["--compare", "a", "b", "--out", str(tmp_path), *words]) == USAGE
    told = error_of(capsys)
    assert "--compare" in told
    assert words[0] in told


def test_what_is_refused_is_refused_before_every_recording_is_read(
    csv: Path, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(leaks, "find", lambda *_, **__: pytest.fail("the recordings were read"))
    (tmp_path / "out").write_text("a file")
    words = ["--model_weights", str(tiny_bundle.folder), "--data_csv", str(csv), "--out", str(tmp_path / "out")]
    for wrong in (["--crops", "0"], ["--num_cpus", "0"]):
        assert job.main([*words, *wrong]) == USAGE


def test_speakers_of_ravdess_are_known_by_the_files_names(
    run: Callable[..., int], scorer: Scorer, csv: Path, trained_bundle: Path, tmp_path: Path, capsys: Any
) -> None:
    """A CSV of judges has two columns; voices decide the intervals and what the model has heard."""
    table = pd.read_csv(csv, dtype=str)[["speech", "label"]]
    table.to_csv(tmp_path / "judges.csv", index=False)
    assert run("--leak_check", "warn", data=tmp_path / "judges.csv", weights=trained_bundle) == DONE
    assert "RAVDESS_01" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert "no speaker column" not in str(found["bootstrap"]["speakers_note"])
    assert "speaker" in [part["column"] for part in found["breakdowns"]]
    assert "speaker" not in pd.read_parquet(tmp_path / "out" / "predictions.parquet").columns
    (tmp_path / "other.wav").touch()
    pd.concat([table, pd.DataFrame({"speech": ["other.wav"], "label": ["sad"]})]).to_csv(
        tmp_path / "mixed.csv", index=False
    )
    assert run("--overwrite", data=tmp_path / "mixed.csv") == DONE
    found = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert found["bootstrap"]["speakers_note"] == "no speaker column"
