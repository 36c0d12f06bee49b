"""Two sets of answers to the same recordings: against scikit-learn, SciPy and plain resampling."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_predictions import LABELS, made_predictions, with_failed
from scipy.stats import binom
from sklearn import metrics as sk

from pipeline.evaluation.compare import compare, comparison_summary, disagreements
from pipeline.reporting.report import write_comparison
from pipeline.storage.errors import SerError

Pair = tuple[pd.DataFrame, pd.DataFrame]


@pytest.fixture
def pair() -> Pair:
    first = made_predictions(200, accuracy=0.6, failed=4, seed=1)
    second = made_predictions(200, accuracy=0.75, seed=2)
    return first, first.assign(predicted=second["predicted"].where(second.index % 3 == 0, first["predicted"]))


def test_differences_are_those_of_sklearn(pair: Pair) -> None:
    found = {(row["metric"], row["label"]): row for row in compare(*pair, LABELS)["figures"]}
    truth = pair[0]["label_name"]
    for name, table in zip(("first", "second"), pair, strict=True):
        answer = table["predicted"].where(table["status"] == "ok", "unread").fillna("unread")
        assert found["accuracy", None][name] == pytest.approx(sk.accuracy_score(truth, answer))
        weighted = sk.f1_score(truth, answer, labels=LABELS, average="weighted")
        assert found["weighted F1", None][name] == pytest.approx(weighted)
        recall = sk.recall_score(truth, answer, labels=["sad"], average=None)[0]
        assert found["recall", "sad"][name] == pytest.approx(recall)
    row = found["accuracy", None]
    assert row["difference"] == pytest.approx(row["second"] - row["first"])


def test_mcnemar_is_the_exact_binomial() -> None:
    right = made_predictions(100, accuracy=1.0)
    wrong = [next(label for label in LABELS if label != truth) for truth in right["label_name"]]
    second = right.assign(predicted=np.where(right.index < 12, wrong, right["label_name"]))
    first = right.assign(predicted=np.where((right.index >= 12) & (right.index < 15), wrong, right["label_name"]))
    test = compare(first, second, LABELS)["mcnemar"]
    assert (test["only_first_right"], test["only_second_right"], test["both_right"]) == (12, 3, 85)
    assert test["p_value"] == pytest.approx(2 * binom.cdf(3, 15, 0.5))


def test_the_same_answers_do_not_differ_whatever_their_order_and_repeats() -> None:
    table = made_predictions(60, seed=4)
    twice = pd.concat([table, table.head(5)], ignore_index=True)
    shuffled = twice.sample(frac=1, random_state=0)
    found = compare(twice, shuffled, LABELS)
    assert (found["n"], found["mcnemar"]["only_first_right"], found["mcnemar"]["p_value"]) == (65, 0, 1.0)
    assert all(row["difference"] == 0.0 and row["over_recordings"] == [0.0, 0.0] for row in found["figures"])
    assert disagreements(twice, shuffled, LABELS).empty


def test_the_paired_interval_is_that_of_plain_row_resampling(pair: Pair) -> None:
    found = compare(*pair, LABELS, resamples=8000)["figures"][0]
    right = [((t["predicted"] == t["label_name"]) & (t["status"] == "ok")).to_numpy(float) for t in pair]
    gain = right[1] - right[0]
    means = gain[np.random.default_rng(0).integers(0, 200, (8000, 200))].mean(axis=1)
    assert found["over_recordings"] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.006)


def test_pairing_helps_where_both_stumble_over_the_same_recordings() -> None:
    first = made_predictions(300, accuracy=0.6, seed=3)
    mended = np.flatnonzero(first["predicted"] != first["label_name"])[:10]
    second = first.assign(predicted=first["predicted"].where(~first.index.isin(mended), first["label_name"]))
    low, high = compare(first, second, LABELS)["figures"][0]["over_recordings"]
    assert 0 < low < 10 / 300 < high < 0.06


def test_what_one_could_not_read_is_wrong_there() -> None:
    table = made_predictions(40, accuracy=1.0)
    second = with_failed(table, range(10))
    found = compare(table, second, LABELS)
    assert found["figures"][0]["difference"] == pytest.approx(-0.25)
    assert found["mcnemar"]["only_first_right"] == 10
    assert set(disagreements(table, second, LABELS)["second"]) == {"(not read)"}


def test_other_recordings_or_labels_are_refused() -> None:
    table = made_predictions(40)
    other = table.copy()
    other.loc[7, "label_name"] = "sad" if table["label_name"][7] != "sad" else "calm"
    for second, complaint in (
        (table.head(39), "B 39"),
        (other, r"/audio/00007.wav is .* score the same CSV"),
        (table.drop(columns="label_name"), "B has no labels"),
    ):
        with pytest.raises(SerError, match=complaint):
            compare(table, second, LABELS)


def test_files_page_and_text(pair: Pair, tmp_path: Path) -> None:
    found = write_comparison(*pair, LABELS, tmp_path, names=("runs/<a>", "runs/b"), meta={"command": "x & y"})
    names = {"comparison.json", "comparison.csv", "comparison.html", "disagreements.csv"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8")) == found
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "runs/&lt;a&gt;" in page
    assert "<a>" not in page
    summary = comparison_summary(found)
    assert max(map(len, summary.splitlines())) <= 80
    assert f"p = {found['mcnemar']['p_value']:.3g}" in summary


def test_a_class_of_few_speakers_is_compared_over_recordings_and_that_is_told(tmp_path: Path) -> None:
    table = made_predictions(120, accuracy=0.7)
    few = table.assign(speaker=table["speaker"].where(table["label_name"] != "sad", "Actor_01"))
    found = write_comparison(few, few, LABELS, tmp_path, names=("a", "b"), meta={})
    over = {row["label"]: row["over_speakers"] for row in found["figures"] if row["label"]}
    assert over.pop("sad") is None
    assert None not in over.values()
    assert "few speakers" in comparison_summary(found)
    assert "few speakers" not in comparison_summary(compare(table, table, LABELS))
