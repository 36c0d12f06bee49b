"""``evaluate``: figures, exit codes, refusals, leaks, comparison; most tests answer instead of listening."""

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

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
Run = Callable[..., int]
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
def run(tiny_bundle: Bundle, csv: Path, tmp_path: Path) -> Run:
    """``run("--enforce", ...)``: the job on the CSV with the tiny bundle, without the leak check unless asked for."""

    def call(*words: str, data: Path = csv, weights: Path = tiny_bundle.folder) -> int:
        start = ["--model_weights", str(weights), "--data_csv", str(data), "--out", str(tmp_path / "out")]
        return job.main([*start, *([] if "--leak_check" in words else ["--leak_check", "off"]), *words])

    return call


def saved(folder: Path, name: str = "metrics") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


def error_of(capsys: Capture) -> str:
    """The one line that begins with "error:"."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.usefixtures("in_this_process", "undrawn")
def test_the_briefs_own_command_line(
    ravdess_like: Path, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: Patch, capsys: Capture
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
    found = saved(made)
    assert found["n"] == {"rows": 17, "failed": 1, "labelled": 17, "unlabelled": 0, "read": 16, "labelled_failed": 1}
    assert found["meta"]["model_sha256"] == tiny_bundle.weights_sha256
    assert "jobs.evaluate --model_weights" in found["meta"]["command"]
    assert {"report.html", "predictions.csv"} <= {path.name for path in made.iterdir()}


@pytest.mark.parametrize(
    ("right", "failed", "words", "code"),
    [
        (1.0, 0, "--min_class_accuracy 0.5 --enforce", DONE),
        (0.5, 0, "", DONE),
        (0.5, 3, "--enforce", MISSED),
        (0.5, 3, "--enforce --tolerate_failures", MISSED),
        (1.0, 3, "", SOME_FAILED),
        (1.0, 3, "--tolerate-failures", DONE),
        (0.5, 0, "--enforce --min-accuracy 40 --min_weighted_f1 30% --min_class_accuracy 0", DONE),
        (0.5, 0, "--enforce --min_accuracy 60 --min_weighted_f1 0.3 --min_class_accuracy 0", MISSED),
    ],
)
def test_exit_codes(run: Run, scorer: Scorer, right: float, failed: int, words: str, code: int) -> None:
    scorer.right, scorer.failed = right, failed
    assert run(*words.split()) == code


def test_classes_and_labels_that_are_missing_or_unknown(run: Run, scorer: Scorer, csv: Path, capsys: Capture) -> None:
    table = pd.read_csv(csv)
    table[table["label"] != "calm"].to_csv(csv, index=False)
    assert run("--min_class_accuracy", "0.5") == DONE
    assert "recall of calm" in capsys.readouterr().out
    assert run("--min_class_accuracy", "0.0", "--min_accuracy", "0", "--min_weighted_f1", "0", "--enforce") == DONE
    table[["speech"]].to_csv(csv, index=False)
    assert run() == DONE
    assert "64 rows, 0 failed" in capsys.readouterr().out
    assert run("--enforce") == MISSED
    table.assign(label=["bored", *table["label"][1:]]).to_csv(csv, index=False)
    assert run() == USAGE
    assert "bored" in error_of(capsys)
    assert run("--label_map", "bored=calm") == DONE


@pytest.mark.parametrize(
    "words",
    [
        *(["--min_accuracy", "many"], ["--min_accuracy", "101"], ["--min_accuracy", "-1"], ["--min_accuracy", "nan"]),
        *(["--embed_audio", "-1"], ["--embed_audio", "1000"], ["--leak_check", "maybe"], ["--compare", "only-one"]),
        ["--model_weights", "none"],
    ],
)
def test_bad_options_are_one_line(run: Run, scorer: Scorer, words: list[str], capsys: Capture) -> None:
    assert run(*words) == USAGE
    error_of(capsys)
    assert scorer.calls == []


def test_what_is_refused_is_refused_before_every_recording_is_read(
    run: Run, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(leaks, "find", lambda *_, **__: pytest.fail("the recordings were read"))
    (tmp_path / "out").write_text("a file")
    for wrong in (["--crops", "0"], ["--num_cpus", "0"]):
        assert run("--leak_check", "warn", *wrong) == USAGE


CODES = ["neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"]  # the order of RAVDESS
GIVEN = {
    "integers with zeros": [f"{i:02d}" for i in range(8)],
    "names that need a map themselves": [f"n{i}" for i in range(8)],
    "aliases": ["calmness", "Anger", "sadness", "HAP", "neu", "dis", "fear", "ps"],
}


@pytest.mark.parametrize("case", GIVEN)
def test_the_label_map_that_is_printed_gives_what_it_promises(
    run: Run, scorer: Scorer, csv: Path, tmp_path: Path, capsys: Capture, case: str
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
    assert f"{saved(tmp_path / 'out')['overall']['accuracy']['value']:.0%}" == promised


# --- leaks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained_bundle(ravdess_like: Path, tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle that says it was trained on eight of the recordings."""
    table = splits.add_hashes(scan_folder(ravdess_like).iloc[::8])
    training = table.assign(id="x", split=["train"] * 6 + ["inner_val", "test"])
    training = training[["id", "content_hash", "speaker", "split"]]
    return resaved(tiny_bundle, tmp_path / "trained", training=training).folder


def test_leaks_are_counted_and_taken_out_or_an_error_or_not_looked_for(
    run: Run, scorer: Scorer, trained_bundle: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    assert run("--leak_check", "error", weights=trained_bundle) == USAGE
    assert "7 of 64" in error_of(capsys)
    assert scorer.calls == []
    assert run("--leak_check", "warn", weights=trained_bundle) == DONE
    said = capsys.readouterr().err
    assert all(told in said for told in ("7 of 64", "accuracy 100.0%", "RAVDESS_01"))
    found = saved(tmp_path / "out")["leak_check"]
    assert (found["leaked"], found["checked"], found["unseen"]["n"]) == (7, 64, 57)
    monkeypatch.setattr("pipeline.evaluation.leaks.add_hashes", lambda *_, **__: pytest.fail("read the recordings"))
    assert run("--leak_check", "off", weights=trained_bundle) == DONE


def test_speakers_of_ravdess_are_known_by_the_files_names(
    run: Run, scorer: Scorer, csv: Path, trained_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    """A CSV of judges has two columns; voices decide the intervals and what the model has heard."""
    out = tmp_path / "out"
    table = pd.read_csv(csv, dtype=str)[["speech", "label"]]
    table.to_csv(csv, index=False)
    assert run("--leak_check", "warn", weights=trained_bundle) == DONE
    assert "RAVDESS_01" in capsys.readouterr().err
    found = saved(out)
    assert "no speaker column" not in str(found["bootstrap"]["speakers_note"])
    assert "speaker" in [part["column"] for part in found["breakdowns"]]
    assert "speaker" not in pd.read_parquet(out / "predictions.parquet").columns
    (tmp_path / "other.wav").touch()
    pd.concat([table, pd.DataFrame({"speech": ["other.wav"], "label": ["sad"]})]).to_csv(csv, index=False)
    assert run("--overwrite") == DONE
    assert saved(out)["bootstrap"]["speakers_note"] == "no speaker column"


# --- compare -------------------------------------------------------------------------------------------------------


def scores(folder: Path, table: pd.DataFrame) -> str:
    folder.mkdir()
    table.to_parquet(folder / "predictions.parquet")
    return str(folder)


def accuracy(table: pd.DataFrame) -> float:
    return float((table["predicted"] == table["label_name"]).mean())


def test_two_folders_of_scores_also_of_different_classes(tmp_path: Path, capsys: Capture) -> None:
    first, second = made_predictions(80, accuracy=0.6), made_predictions(80, accuracy=0.9)
    third = first.drop(columns="p_calm").assign(predicted=first["predicted"].replace("calm", "sad"))
    one, two, three = [
        scores(tmp_path / name, table) for name, table in zip("abc", (first, second, third), strict=True)
    ]
    out = tmp_path / "out"
    assert job.main(["--compare", one, two, "--out", str(out)]) == DONE
    assert "McNemar" in capsys.readouterr().out
    difference = saved(out, "comparison")["figures"][0]["difference"]
    assert difference == pytest.approx(accuracy(second) - accuracy(first))
    assert job.main(["--compare", one, three, "--out", str(out)]) == DONE
    assert three in capsys.readouterr().err
    figures = saved(out, "comparison")["figures"]
    assert {row["label"]: row["second"] for row in figures}["calm"] == 0
    assert figures[0]["second"] == pytest.approx(accuracy(third))


def test_two_bundles_on_one_csv_and_what_one_has_learnt_of_it(
    scorer: Scorer,
    csv: Path,
    tiny_bundle: Bundle,
    trained_bundle: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Any,
) -> None:
    pair, out = [str(trained_bundle), str(tiny_bundle.weights_path)], tmp_path / "out"
    words = ["--compare", *pair, "--data_csv", str(csv)]
    read: list[int] = []
    add_hashes = splits.add_hashes
    for module in (splits, leaks):
        monkeypatch.setattr(module, "add_hashes", lambda t, **_: read.append(len(t)) or add_hashes(t))
    assert job.main([*words, "--out", str(out)]) == DONE
    printed = capsys.readouterr()
    assert "only A 0, only B 0" in printed.out
    assert "7 of 64" in printed.err
    assert [call["out"] for call in scorer.calls] == [out / "A", out / "B"]
    assert read == [64]  # every recording once, not once a model
    checks = saved(out, "comparison")["leak_checks"]
    assert [(check["name"], check["leaked"]) for check in checks] == list(zip(pair, (7, 0), strict=True))
    assert job.main([*words, "--out", str(tmp_path / "again"), "--leak_check", "error"]) == USAGE
    assert "7 of 64" in error_of(capsys)


def test_what_cannot_be_compared_is_refused_before_anything_is_scored(
    scorer: Scorer, csv: Path, tiny_bundle: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    model, data = str(tiny_bundle.folder), ["--data_csv", str(csv)]
    others = scores(tmp_path / "others", made_predictions(40, ("no", "yes")))
    for second, more, reason in (
        (others, data, "share classes"),
        (str(tmp_path / "none"), data, "no scores at"),
        (model, [], "--data_csv"),
    ):
        assert job.main(["--compare", model, second, "--out", str(tmp_path / "out"), *more]) == USAGE
        assert reason in error_of(capsys)
    assert scorer.calls == []


@pytest.mark.parametrize(
    "words",
    [
        *(["--enforce"], ["--model_weights", "m"], ["--embed_audio", "2"]),
        *(["--min_accuracy", "90"], ["--min_class_accuracy", "0.5"]),
        *(["--crops", "3"], ["--root", "r"], ["--label_map", "a=sad"]),  # of tables
    ],
)
def test_what_a_comparison_does_not_heed_is_refused(words: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert job.main(["--compare", "a", "b", "--out", str(tmp_path), *words]) == USAGE
    told = error_of(capsys)
    assert "--compare" in told
    assert words[0] in told
