"""Figures of an evaluation: against scikit-learn, SciPy, published tables and their own definitions."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_predictions import LABELS, made_predictions, with_failed
from scipy.stats import binomtest
from sklearn import metrics as sk

from pipeline.data.labels import LabelError
from pipeline.evaluation import outcomes as figures
from pipeline.evaluation.metrics import evaluate, permutation_hint
from pipeline.evaluation.verdict import CROSSES, MET, NOT_DECIDABLE, NOT_MET, Targets, judge, reached
from pipeline.reporting.terminal import terminal_summary
from pipeline.storage.errors import SerError

quick = settings(max_examples=40, deadline=None)
Answers = tuple[np.ndarray, np.ndarray, np.ndarray]


@st.composite
def answers(draw: st.DrawFn) -> Answers:
    """(truth, answer with C for "not read", probabilities) of 1..80 recordings and 2..6 classes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, n_classes = draw(st.integers(1, 80)), draw(st.integers(2, 6))
    used = draw(st.integers(1, n_classes))  # some classes may have no recordings at all
    truth = rng.integers(0, used, n)
    p = rng.dirichlet(np.full(n_classes, draw(st.sampled_from([0.2, 1.0, 5.0]))), n)
    answer = np.where(rng.random(n) < draw(st.sampled_from([0.0, 0.2, 1.0])), n_classes, p.argmax(axis=1))
    return truth, answer, p


def by_sklearn(truth: np.ndarray, answer: np.ndarray, n_classes: int) -> dict[str, Any]:
    classes, present = range(n_classes), np.unique(truth)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes answered that are not among the truths
        return {
            "accuracy": sk.accuracy_score(truth, answer),
            "uar": sk.balanced_accuracy_score(truth, answer),
            "weighted_f1": sk.f1_score(truth, answer, labels=classes, average="weighted", zero_division=0),
            "macro_f1": sk.f1_score(truth, answer, labels=present, average="macro", zero_division=0),
            "per_class": sk.precision_recall_fscore_support(truth, answer, labels=classes, zero_division=0),
        }


OVERALL = ("accuracy", "uar", "weighted_f1", "macro_f1")
PER_CLASS = ("precision", "recall", "f1")


@quick
@given(answers())
def test_counts_and_scores_are_those_of_sklearn_also_of_many_tallies(drawn: Answers) -> None:
    truth, answer, p = drawn
    n_classes = p.shape[1]
    counts = figures.tally(truth, answer, n_classes)
    want = sk.confusion_matrix(truth, answer, labels=range(n_classes + 1))
    np.testing.assert_array_equal(counts, want[:n_classes])
    found, oracle = figures.scores(counts), by_sklearn(truth, answer, n_classes)
    for name in OVERALL:
        assert getattr(found, name) == pytest.approx(oracle[name], abs=1e-12), name
    present = np.isin(np.arange(n_classes), truth)
    for name, values in zip(PER_CLASS, oracle["per_class"][:3], strict=True):
        np.testing.assert_allclose(getattr(found, name)[present], values[present], atol=1e-12)
        assert np.isnan(getattr(found, name)[~present]).all()
    stack = np.stack([counts, counts[::-1], counts * 0, counts + 1])
    for i, single in enumerate(stack):
        for name in (*OVERALL, *PER_CLASS):
            np.testing.assert_array_equal(
                getattr(figures.scores(stack), name)[i], getattr(figures.scores(single), name)
            )


@quick
@given(answers(), st.integers(1, 6))
def test_figures_of_probabilities_are_those_of_sklearn_and_of_their_definitions(drawn: Answers, k: int) -> None:
    truth, _, p = drawn
    n_classes = p.shape[1]
    best = np.argsort(-p, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(figures.in_top(truth, p, k), (best == truth[:, None]).any(axis=1))
    if n_classes > 2 and k < n_classes:
        want = sk.top_k_accuracy_score(truth, p, k=k, labels=range(n_classes))
        assert figures.in_top(truth, p, k).mean() == pytest.approx(want)
    assert figures.log_loss(truth, p) == pytest.approx(sk.log_loss(truth, p, labels=range(n_classes)), rel=1e-9)
    assert figures.brier(truth, p) == pytest.approx(((p - np.eye(n_classes)[truth]) ** 2).sum(axis=1).mean())

    confidence, correct = p.max(axis=1), p.argmax(axis=1) == truth
    error = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence > low) & (confidence <= low + 0.1 + 1e-12)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    bins = figures.reliability(confidence, correct)
    assert bins.ece == pytest.approx(error)
    assert bins.n.sum() == len(truth)

    order = sorted(range(len(truth)), key=lambda i: -confidence[i])
    risks = [sum(not correct[i] for i in order[:n]) / n for n in range(1, len(order) + 1)]
    curve = figures.risk_coverage(confidence, correct)
    np.testing.assert_allclose(curve.risk, risks, atol=1e-12)
    assert curve.aurc == pytest.approx(np.mean(risks))
    np.testing.assert_array_equal(curve.threshold, confidence[order])


def test_figures_of_equal_and_of_certain_probabilities() -> None:
    equal = np.full((4, 4), 0.25)
    assert figures.in_top(np.arange(4), equal, 1).tolist() == [True, False, False, False]  # the lower index, as argmax
    assert figures.in_top(np.arange(4), equal, 2).tolist() == [True, True, False, False]
    certain, wrong = np.eye(2), np.array([1, 0])
    assert figures.log_loss(wrong, certain) == pytest.approx(sk.log_loss(wrong, certain, labels=[0, 1]))
    assert figures.brier(wrong, certain) == 2.0
    bins = figures.reliability(np.array([0.0, 0.1, 0.1 + 1e-9, 1.0]), np.array([False, True, True, True]))
    assert bins.n.tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    confidence, correct = np.array([0.9, 0.9, 0.9, 0.5]), np.array([True, False, True, False])
    for order in ([0, 1, 2, 3], [1, 3, 0, 2]):
        curve = figures.risk_coverage(confidence[order], correct[order])
        np.testing.assert_allclose(curve.risk, [1 / 3, 1 / 3, 1 / 3, 1 / 2])


# --- intervals -----------------------------------------------------------------------------------------------------


def test_resampled_recordings_spread_as_the_binomial_says() -> None:
    counts = np.array([[60, 20, 0], [10, 100, 10]])
    drawn = figures.resample_recordings(counts, 20_000, np.random.default_rng(0))
    assert (drawn.sum(axis=(1, 2)) == 200).all()
    accuracy = figures.scores(drawn).accuracy
    assert accuracy.mean() == pytest.approx(0.8, abs=0.002)
    assert accuracy.var() == pytest.approx(0.8 * 0.2 / 200, rel=0.05)


def test_resampled_speakers_are_those_of_plain_row_resampling() -> None:
    rng = np.random.default_rng(1)
    n, n_speakers = 300, 12
    speaker = rng.integers(0, n_speakers, n)
    cell = np.where(rng.random(n) < 0.5 + 0.04 * speaker, 0, 1)  # 2 x 1 "shape": right or wrong
    drawn = figures.resample_groups(speaker, cell, (2,), 20_000, np.random.default_rng(2))
    fast = drawn[:, 0] / drawn.sum(axis=1)
    slow = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(speaker == s) for s in rng.integers(0, n_speakers, n_speakers)])
        slow.append((cell[rows] == 0).mean())
    for q in (0.025, 0.5, 0.975):
        assert np.quantile(fast, q) == pytest.approx(np.quantile(slow, q), abs=0.006)


def test_speakers_that_differ_widen_the_interval_and_those_that_do_not_leave_it() -> None:
    table = made_predictions(400, accuracy=0.75, speakers=20, seed=3)
    right = (table["predicted"] == table["label_name"]).to_numpy()
    apart = table.assign(speaker=[f"{'good' if r else 'bad'} {i % 10}" for i, r in enumerate(right)])
    growth = []
    for given_table in (table, apart):
        found = evaluate(given_table, LABELS, resamples=2000)["overall"]["accuracy"]
        growth.append(np.ptp(found["over_speakers"]) / np.ptp(found["over_recordings"]))
    assert growth[0] < 1.6
    assert growth[1] > 2


def test_exact_binomial_bounds_also_instead_of_no_width() -> None:
    for right, n in ((0, 5), (5, 5), (1, 30), (29, 30), (40, 80)):
        want = binomtest(right, n).proportion_ci(0.95, method="exact")
        assert figures.clopper_pearson(right, n) == pytest.approx((want.low, want.high))
    assert figures.interval(1.0, np.ones(100), 20) == figures.clopper_pearson(20, 20)
    assert figures.interval(0.0, np.zeros(100), 20) == figures.clopper_pearson(0, 20)
    assert figures.interval(1.0, np.array([1.0, 0.9] * 50), 20) == (0.9, 1.0)


@pytest.mark.parametrize(
    ("counts", "want"),
    [  # Newcombe (1998), Statistics in Medicine 17, table II, method 10
        ((56, 70, 48, 80), (0.0524, 0.3339)),
        ((9, 10, 3, 10), (0.1705, 0.8090)),
        ((6, 7, 2, 7), (0.0582, 0.8062)),
        ((5, 56, 0, 29), (-0.0381, 0.1926)),
        ((0, 10, 0, 20), (-0.1611, 0.2775)),
        ((10, 10, 0, 10), (0.6075, 1.0)),
    ],
)
def test_difference_of_shares_as_published(counts: tuple[int, int, int, int], want: tuple[float, float]) -> None:
    assert figures.newcombe(*counts) == pytest.approx(want, abs=6e-5)


def test_shares_over_recordings_have_the_score_interval() -> None:
    def wilson(right: int, n: int) -> Any:
        return pytest.approx(list(binomtest(right, n).proportion_ci(0.95, method="wilson")))

    for right, n in ((15, 16), (16, 16), (28, 32), (0, 9)):
        predicted = ["calm"] * right + ["sad"] * (n - right)
        table = made_predictions(n, ("calm", "sad")).assign(label_name="calm", predicted=predicted)
        found = evaluate(table, ("calm", "sad"))
        assert found["overall"]["accuracy"]["over_recordings"] == wilson(right, n)
        assert found["per_class"][0]["recall"]["over_recordings"] == wilson(right, n)
    table = made_predictions(80, ("calm", "sad")).sort_values("label_name", ignore_index=True)
    table["predicted"] = ["calm"] * 4 + ["sad"] * 76
    precision = evaluate(table, ("calm", "sad"))["per_class"][0]["precision"]
    assert (precision["value"], precision["over_recordings"]) == (1.0, wilson(4, 4))  # of 4 answers, not of 40


def test_too_few_or_blank_speakers_give_a_reason_and_no_interval() -> None:
    blank = made_predictions()
    blank.loc[[3, 5], "speaker"] = ["", None]
    few = [(made_predictions(speakers=n), f"too few: {n} speakers") for n in (1, 4)]
    for table, note in (*few, (blank, "without a speaker: 2")):
        found = evaluate(table, LABELS)
        assert note in found["bootstrap"]["speakers_note"]
        assert found["overall"]["accuracy"]["over_speakers"] is None
        assert found["verdict"]["checks"][0]["interval_over"] == "recordings"


def test_a_class_of_few_speakers_has_no_interval_over_speakers() -> None:
    """20 recordings of one speaker, 16 right: resampling speakers would say 80 % for certain."""
    rest = made_predictions(60, ("calm", "sad"), accuracy=1.0, speakers=6).query("label_name == 'calm'")
    one = made_predictions(40, ("calm", "sad"), accuracy=1.0).query("label_name == 'sad'").assign(speaker="Actor_01")
    one.loc[one.index[:4], "predicted"] = "calm"
    found = evaluate(pd.concat([rest, one], ignore_index=True), ("calm", "sad"))
    calm, sad = (row["recall"] for row in found["per_class"])
    assert calm["over_speakers"] is not None
    assert (sad["value"], sad["over_speakers"]) == (0.8, None)
    check = next(check for check in found["verdict"]["checks"] if check["label"] == "sad")
    assert (check["interval_over"], check["outcome"]) == ("recordings", CROSSES)
    assert "few speakers" in " ".join(terminal_summary(found).split())


# --- evaluate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failed", [0, 9])
def test_every_figure_against_sklearn_on_a_whole_table(failed: int) -> None:
    table = made_predictions(200, failed=failed, seed=5)
    found = evaluate(table, LABELS, resamples=200)
    index = {label: i for i, label in enumerate(LABELS)}
    truth = table["label_name"].map(index).to_numpy()
    answer = table["predicted"].map(index).fillna(len(LABELS)).to_numpy(dtype=int)
    read = answer < len(LABELS)
    for view, rows in (("read", read), ("with_failed", np.ones(200, dtype=bool))):
        oracle = by_sklearn(truth[rows], answer[rows], len(LABELS))
        for name in OVERALL:
            figure = found["overall"][name] if view == "read" else found["overall"][name]["with_failed"]
            assert figure["value"] == pytest.approx(oracle[name]), (view, name)
            for over in ("over_recordings", "over_speakers"):
                assert figure[over][0] <= figure["value"] <= figure[over][1]
    p = table[[f"p_{label}" for label in LABELS]].to_numpy()[read]
    overall = found["overall"]
    assert overall["log_loss"] == pytest.approx(sk.log_loss(truth[read], p, labels=range(8)))
    assert overall["top2_accuracy"]["value"] == pytest.approx(sk.top_k_accuracy_score(truth[read], p, k=2))
    assert overall["brier"] == pytest.approx(((p - np.eye(8)[truth[read]]) ** 2).sum(axis=1).mean())
    matrix = sk.confusion_matrix(truth[read], answer[read], labels=range(8))
    assert found["confusion"]["counts"] == matrix.tolist()
    shares = sk.confusion_matrix(truth[read], answer[read], normalize="true")
    np.testing.assert_allclose(found["confusion"]["row_normalised"], shares)
    assert found["n"]["labelled_failed"] == failed == sum(found["confusion"]["failed"])


def test_only_the_seed_moves_the_intervals() -> None:
    """Neither a confidence threshold, nor the order of rows, nor rows without labels change a figure."""
    table = made_predictions(seed=6)
    plain, again, other = (evaluate(table, LABELS, seed=seed) for seed in (0, 0, 1))
    assert plain == again
    assert plain["overall"]["uar"]["over_recordings"] != other["overall"]["uar"]["over_recordings"]
    assert plain["overall"]["accuracy"]["value"] == other["overall"]["accuracy"]["value"]
    vague = table.assign(predicted=table["predicted"].where(table["confidence"] > 0.9, "uncertain"))
    assert (vague["predicted"] == "uncertain").sum() > 10
    unsure = evaluate(vague, LABELS)
    for key in ("overall", "per_class", "confusion", "verdict"):
        assert plain[key] == unsure[key]
    assert unsure["answers"][-1]["label"] == "uncertain"
    more = pd.concat([table, table.head(10).assign(label_name=None)]).sample(frac=1, random_state=0)
    mixed = evaluate(more, LABELS)
    assert mixed["n"]["unlabelled"] == 10
    for key in ("accuracy", "uar", "weighted_f1"):
        assert plain["overall"][key]["value"] == pytest.approx(mixed["overall"][key]["value"])
        assert plain["overall"][key]["over_recordings"] == mixed["overall"][key]["over_recordings"]


def test_degenerate_tables_give_json_without_nan() -> None:
    table = made_predictions(24, seed=8)
    for degenerate in (
        table.head(1),
        table[table["label_name"] == "sad"],
        table[table["label_name"] != "calm"],
        with_failed(table, range(24)),
        with_failed(table, list(np.flatnonzero(table["label_name"] == "sad"))),
        table.assign(predicted=table["label_name"]),
        table.assign(predicted=["sad" if truth != "sad" else "calm" for truth in table["label_name"]]),
        table.drop(columns=[f"p_{label}" for label in LABELS]),
        table[["speech", "label_name", "predicted"]],
        table[["label_name", *(f"p_{label}" for label in LABELS)]],
        pd.concat([table, table]),
        table.assign(speaker=np.nan),
    ):
        found = evaluate(degenerate, LABELS, resamples=50)
        assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_what_is_not_there_is_not_available_instead_of_zero() -> None:
    table = made_predictions(40, failed=3, seed=8)
    found = evaluate(table[table["label_name"] != "calm"], LABELS)
    row = found["per_class"][LABELS.index("calm")]
    assert row["support"] == 0
    assert row["recall"]["value"] is row["precision"]["value"] is row["f1"]["value"] is None
    assert found["confusion"]["row_normalised"][1] == [None] * 8
    assert found["verdict"]["checks"][2 + 1]["outcome"] == NOT_DECIDABLE
    assert any("No recordings of calm" in hint for hint in found["hints"])
    unlabelled = evaluate(table.drop(columns=["label_name", "label"]), LABELS)
    assert (unlabelled["labelled"], unlabelled["n"]) == (False, {"rows": 40, "failed": 3})
    assert sum(row["n"] for row in unlabelled["answers"]) == 37
    assert "overall" not in unlabelled


def test_unknown_labels_and_tables_without_answers_are_refused() -> None:
    table = made_predictions(20)
    table.loc[[0, 1, 2], "label_name"] = ["bored", "bored", "tired"]
    with pytest.raises(LabelError, match=r"3 of 20 rows .*'bored' \(2\), 'tired' \(1\).*--label_map"):
        evaluate(table, LABELS)
    with pytest.raises(SerError, match="predicted nor columns p_angry"):
        evaluate(pd.DataFrame({"label_name": ["sad"]}), LABELS)


# --- verdict -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "bounds", "outcome"),
    [
        (0.90, [0.80, 0.95], MET),
        (0.80, [0.80, 0.85], MET),
        (0.85, [0.79, 0.90], CROSSES),
        (0.85, None, CROSSES),
        (0.7999, [0.75, 0.95], NOT_MET),
        (None, None, NOT_DECIDABLE),
        (0.1 + 0.7, [0.1 + 0.7 - 1e-15, 0.9], MET),  # on the line, whatever the rounding
    ],
)
def test_outcomes(value: float | None, bounds: list[float] | None, outcome: str) -> None:
    assert judge(value, bounds, 0.80) == outcome


def test_the_worst_outcome_is_the_verdict_and_failed_recordings_count_as_wrong() -> None:
    perfect, half = (made_predictions(400, accuracy=share, speakers=0) for share in (1.0, 0.5))
    assert evaluate(perfect, LABELS)["verdict"]["outcome"] == MET
    found = evaluate(perfect[perfect["label_name"] != "sad"], LABELS)["verdict"]
    assert (found["outcome"], found["undecidable"]) == (MET, ["recall of sad"])  # of the classes that are there
    assert reached(found)
    assert evaluate(half, LABELS)["verdict"]["outcome"] == NOT_MET
    assert reached(evaluate(half, LABELS, targets=Targets(0.1, 0.1, 0.1))["verdict"])
    failed = evaluate(with_failed(perfect, range(120)), LABELS)["verdict"]
    accuracy = failed["checks"][0]
    assert (accuracy["value"], accuracy["value_read_only"], accuracy["outcome"]) == (0.7, 1.0, NOT_MET)
    assert "accuracy" in failed["missed"]
    for bad in (-0.1, 1.1, 80.0):
        with pytest.raises(SerError, match="between 0 and 1"):
            Targets(accuracy=bad)


# --- hints and breakdowns ------------------------------------------------------------------------------------------


def test_permuted_labels_are_noticed_and_the_map_named_is_the_cure() -> None:
    table = made_predictions(160, accuracy=0.9, seed=9)
    order = np.random.default_rng(0).permutation(8)
    given_names = table["label_name"].map(dict(zip(LABELS, np.array(LABELS)[order], strict=True)))
    found = evaluate(table.assign(label_name=given_names), LABELS)
    (hint,) = (h for h in found["hints"] if "permuted" in h)
    pairs = hint.split("--label_map ")[1].split(" ")[0]
    cure = dict(pair.split("=") for pair in pairs.split(","))
    assert [cure.get(name, name) for name in given_names] == table["label_name"].tolist()


def test_chance_and_honest_mistakes_are_not_taken_for_a_permutation() -> None:
    for seed in range(60):
        table = made_predictions(30, accuracy=(0.0, 0.3, 0.6)[seed % 3], seed=seed)
        assert permutation_hint(figures.outcomes(table, LABELS)) is None


def test_repeated_rows_and_a_single_class_are_told() -> None:
    sad = made_predictions(40).query("label_name == 'sad'")
    hints = evaluate(pd.concat([sad, sad.head(2)]), LABELS)["hints"]
    assert "All recordings are sad" in hints[0]
    assert any(hint.startswith("2 rows name") for hint in hints)


def test_breakdowns_are_the_figures_of_each_group() -> None:
    table = made_predictions(200, failed=6, seed=10).assign(room=["1", "2", "10", ""] * 50, take=range(200))
    found = evaluate(table, LABELS)
    groups = {part["column"]: part["groups"] for part in found["breakdowns"]}
    assert list(groups) == ["speaker", "sex", "duration band", "room"]
    assert found["breakdowns_left_out"] == ["take"]
    assert [row["group"] for row in groups["room"]] == ["1", "2", "10", "(not given)"]
    read = table[table["status"] == "ok"]
    for row in groups["sex"]:
        own, rest = read[read["sex"] == row["group"]], read[read["sex"] != row["group"]]
        right, right_rest = ((part["predicted"] == part["label_name"]).mean() for part in (own, rest))
        assert row["n"] == len(own)
        assert row["accuracy"] == pytest.approx(right)
        assert row["uar"] == pytest.approx(sk.balanced_accuracy_score(own["label_name"], own["predicted"]))
        assert row["difference"] == pytest.approx(right - right_rest)
        assert row["difference_interval"][0] < row["difference"] < row["difference_interval"][1]
    assert sum(row["failed"] for row in groups["room"]) == 6


def test_duration_bands_and_small_groups() -> None:
    seconds = [0.05] * 10 + [1.0] * 10 + [3.999] * 9 + [59.0] * 10 + [7200.0] * 10
    found = evaluate(made_predictions(49).assign(duration_s=seconds), LABELS)
    (part,) = (b for b in found["breakdowns"] if b["column"] == "duration band")
    assert [(row["group"], row["n"], row["small"]) for row in part["groups"]] == [
        ("0-1 s", 10, False),
        ("1-2 s", 10, False),
        ("3-4 s", 9, True),
        ("30-60 s", 10, False),
        ("600 s and more", 10, False),
    ]


def test_an_index_and_measurements_make_no_groups() -> None:
    """pandas writes an index into a CSV unless it is told not to, in a column without a name."""
    table = made_predictions(40).assign(level_dbfs=np.linspace(-40, -10, 40), age=np.linspace(18, 77.5, 40))
    table["take"] = np.arange(40) % 3
    table[""] = [str(i) for i in range(40)]
    found = evaluate(table, LABELS, resamples=10)
    assert [part["column"] for part in found["breakdowns"]] == ["speaker", "sex", "duration band", "take"]
    assert found["breakdowns_left_out"] == ["age", "(no name)"]
    found = evaluate(table.assign(**{"": ["take 1", "take 2"] * 20}), LABELS, resamples=10)
    assert "(no name)" in [part["column"] for part in found["breakdowns"]]


def corpus_of_two_classes() -> pd.DataFrame:
    """Answers of a three-class model to a corpus without `happy`, half of which `happy` wins though not by much."""
    rows = [
        ("calm", "happy", 0.4, 0.5, 0.1),
        ("sad", "happy", 0.1, 0.5, 0.4),
        ("calm", "calm", 0.7, 0.1, 0.2),
        ("sad", "sad", 0.2, 0.1, 0.7),
    ]
    table = pd.DataFrame(rows * 22, columns=["label_name", "predicted", "p_calm", "p_happy", "p_sad"])
    return table.assign(status="ok", error="", corpus="two", confidence=table.filter(like="p_").max(axis=1))


def test_data_of_fewer_classes_than_the_model_give_an_open_and_a_restricted_figure() -> None:
    labels = ("calm", "happy", "sad")
    found = evaluate(corpus_of_two_classes(), labels)["restricted"]
    assert (found["missing"], found["all"]["classes"]) == (["happy"], ["calm", "sad"])
    assert found["all"]["open"]["uar"] == pytest.approx(0.5)
    assert found["all"]["restricted"] == pytest.approx({"accuracy": 1, "uar": 1, "weighted_f1": 1})
    assert (found["corpora"], found["mean"]) == ([], None)

    whole = made_predictions(120, labels, accuracy=0.75, speakers=0).assign(corpus="whole")
    assert evaluate(whole, labels)["restricted"] is None
    found = evaluate(pd.concat([corpus_of_two_classes(), whole], ignore_index=True), labels)["restricted"]
    assert [row["corpus"] for row in found["corpora"]] == ["two", "whole"]
    two, complete = found["corpora"]
    assert (found["missing"], two["restricted"]["accuracy"], complete["open"]) == ([], 1.0, complete["restricted"])
    mean = (two["open"]["uar"] + complete["open"]["uar"]) / 2
    assert found["mean"]["open"]["uar"] == pytest.approx(mean)
