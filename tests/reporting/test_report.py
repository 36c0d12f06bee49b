from __future__ import annotations

import base64
import html.parser
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import soundfile
from made_predictions import LABELS, made_predictions, with_failed
from matplotlib.image import imread
from matplotlib.text import Text
from sklearn.metrics import classification_report

from pipeline.data.tables import guard, read_csv, unguard, write_csv
from pipeline.evaluation.metrics import evaluate
from pipeline.evaluation.verdict import Targets, decimals
from pipeline.reporting import figures
from pipeline.reporting.report import _NARROW as NARROW
from pipeline.reporting.report import terminal_summary, visible, write_comparison, write_report
from pipeline.reporting.terminal import classification_report as our_report
from pipeline.storage.errors import SerError

HOSTILE = '/audio/<script>alert(1)</script>"&\u202egpj.wav'
META = {"model": "tiny & <b>bold</b>", "model_sha256": "ab12" * 16, "versions": {"torch": "2.13.0"}, "seconds": 12.5}


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the visible text, of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self._inside:
            self.text += f"{data} "


@pytest.fixture(scope="module")
def predictions() -> pd.DataFrame:
    table = made_predictions(160, accuracy=0.75, failed=5, seed=1)
    wrong = np.flatnonzero((table["predicted"] != table["label_name"]) & (table["status"] == "ok"))
    table.loc[wrong[0], ["speech", "confidence", "speaker"]] = [HOSTILE, 1.0, "=1+1"]
    table.loc[wrong[0], [f"p_{label}" for label in LABELS]] = 0.0
    table.loc[wrong[0], f"p_{table['predicted'][wrong[0]]}"] = 1.0
    table.loc[159, "error"] = "<img src=x onerror=alert(2)>"
    return table


@pytest.fixture(scope="module")
def folder(predictions: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One report of the made-up predictions, for all tests here."""
    out = tmp_path_factory.mktemp("report")
    write_report(predictions, LABELS, out, meta=META)
    return out


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def test_everything_is_written_and_pictures_are_readable(folder: Path) -> None:
    tables = (
        "verdict per_class confusion_counts confusion_normalised breakdowns reliability risk_coverage mistakes failures"
    )
    pictures = "confusion_matrix per_class reliability risk_coverage"
    expected = {f"{name}.csv" for name in tables.split()} | {"metrics.json", "report.html"}
    expected |= {f"{name}.{kind}" for name in pictures.split() for kind in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == expected
    for path in folder.glob("*.png"):
        height, width = imread(path).shape[:2]
        assert min(height, width) >= 500
    for path in folder.glob("*.svg"):
        assert ElementTree.fromstring(path.read_text(encoding="utf-8")).tag.endswith("svg")


def test_the_json_is_the_evaluation_and_the_tables_hold_its_numbers(
    predictions: pd.DataFrame, folder: Path, saved: dict[str, Any]
) -> None:
    evaluation = evaluate(predictions, LABELS)
    assert {key: saved[key] for key in evaluation} == json.loads(json.dumps(evaluation))
    counts = read_csv(folder / "confusion_counts.csv")
    assert counts[list(LABELS)].astype(int).to_numpy().tolist() == saved["confusion"]["counts"]
    assert counts["failed"].astype(int).tolist() == saved["confusion"]["failed"]
    per_class = read_csv(folder / "per_class.csv")
    assert per_class["recall.value"].astype(float).tolist() == [row["recall"]["value"] for row in saved["per_class"]]
    verdict = read_csv(folder / "verdict.csv")
    assert verdict["outcome"].tolist() == [check["outcome"] for check in saved["verdict"]["checks"]]
    assert len(read_csv(folder / "failures.csv")) == saved["failures"]["n"] == 5
    mistakes = read_csv(folder / "mistakes.csv")
    assert mistakes["confidence"].astype(float).is_monotonic_decreasing
    assert len(mistakes) == sum(map(sum, saved["confusion"]["counts"])) - np.trace(saved["confusion"]["counts"])


def test_the_page_loads_nothing_and_runs_nothing(page: Page, folder: Path) -> None:
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    addresses = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "srcset")]
    assert addresses
    assert all(str(address).startswith("data:") for address in addresses)
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert "url(" not in (folder / "report.html").read_text(encoding="utf-8").split("</style>")[0]
    (policy,) = (a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert str(policy).startswith("default-src 'none'")


def test_pictures_say_in_words_what_they_show_and_hostile_text_stays_text(
    page: Page, folder: Path, saved: dict[str, Any]
) -> None:
    words = [str(attrs["alt"]) for tag, attrs in page.tags if tag == "img"]
    assert len(words) == 8  # four drawings, light and dark
    assert min(map(len, words)) > 40
    assert f"angry {saved['per_class'][0]['recall']['value'] * 100:.1f} %" in words[2]
    assert visible("a\x00b\n\u202ec\ud800é🙂") == "a\\x00b\\n\\u202ec\\ud800é🙂"
    assert visible(HOSTILE) in page.text
    assert "<img src=x onerror=alert(2)>" in page.text
    assert META["model"] in page.text
    assert "\u202e" not in (folder / "report.html").read_text(encoding="utf-8")


def spellings(value: object) -> set[str]:
    """The ways in which the page may write a value of the JSON."""
    if isinstance(value, dict):
        return set().union(*map(spellings, value.values()), *map(spellings, value))
    if isinstance(value, list):
        return set().union(*map(spellings, value))
    if isinstance(value, bool) or value is None:
        return set()
    if isinstance(value, int):
        return {f"{value:,}"}
    if isinstance(value, float):
        return {f"{abs(value) * 100:.1f}", f"{value * 100:g}", f"{value:.3f}", str(value)}
    return set(re.findall(r"\d[\d.,]*\d|\d", visible(value)))


def test_no_number_on_the_page_that_is_not_in_the_json(page: Page, saved: dict[str, Any]) -> None:
    known = spellings(saved)
    fixed = {"95", "0", "2", "10", "1"}  # 95 % interval; 0 is best, 2 worst; fewer than 10; F1
    found = set(re.findall(r"\d[\d.,]*\d|\d", page.text))
    assert len(found) > 100
    assert found - known - fixed == set()


@pytest.mark.usefixtures("undrawn")
def test_no_labels_no_metrics_and_it_says_so(tmp_path: Path) -> None:
    table = made_predictions(30, failed=2).drop(columns=["label", "label_name"])
    for name in ("confusion_matrix.png", "mistakes.csv", "reliability.svg"):
        (tmp_path / name).write_text("of an earlier report")
    found = write_report(table, LABELS, tmp_path, meta={})
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "No labels" in page.text
    assert "Targets" not in page.text
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "report.html", "failures.csv"}
    assert terminal_summary(found).startswith("No labels were given: 30 rows, 2 failed, no metrics.")


@pytest.mark.parametrize("case", ["one row", "one class", "nothing read", "no probabilities", "only the answer"])
@pytest.mark.usefixtures("undrawn")
def test_poor_tables_still_give_a_page(case: str, tmp_path: Path) -> None:
    table = made_predictions(24)
    poor = {
        "one row": table.head(1),
        "one class": table[table["label_name"] == "sad"],
        "nothing read": with_failed(table, range(24)),
        "no probabilities": table.drop(columns=[f"p_{label}" for label in LABELS]),
        "only the answer": table[["speech", "label_name", "predicted"]],
    }[case]
    found = write_report(poor, LABELS, tmp_path, meta={})
    assert "Targets" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert max(map(len, terminal_summary(found).splitlines())) <= 80
    assert list(pd.read_csv(tmp_path / "breakdowns.csv").columns)[:3] == ["column", "group", "n"]


def test_every_drawing_can_be_drawn() -> None:
    plain, two, twenty = made_predictions(60), ("no", "yes"), tuple(f"label_{i:02d}" for i in range(20))
    for table, labels, count in (
        (plain, LABELS, 4),
        (plain[plain["label_name"] == "sad"], LABELS, 4),
        (with_failed(plain, range(60)), LABELS, 2),
        (made_predictions(60, two), two, 4),
        (made_predictions(60, twenty), twenty, 4),
    ):
        evaluation = evaluate(table, labels, resamples=20)
        drawn = figures.drawings(evaluation)
        assert len(drawn) == count
        for drawing in drawn:
            assert drawing.draw(evaluation, figures.DARK).axes
            assert drawing.alt


def test_no_text_of_a_drawing_is_cut_off_by_long_names() -> None:
    labels = ("an extraordinarily long name of a class", "another rather long name")
    evaluation = evaluate(made_predictions(60, labels, failed=9), labels, resamples=20)
    for drawing in figures.drawings(evaluation)[:2]:  # the matrix and the bars of classes
        figure = drawing.draw(evaluation, figures.LIGHT)
        figure.draw_without_rendering()
        width, height = figure.canvas.get_width_height()
        for text in figure.findobj(Text):
            if text.get_text() and text.get_visible():
                box = text.get_window_extent()
                assert (box.x0 >= 0, box.y0 >= 0, box.x1 <= width, box.y1 <= height) == (True,) * 4, text.get_text()


def test_a_matrix_of_many_classes_gets_the_whole_width(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, drawings = tuple(f"label_{i:02d}" for i in range(20)), figures.drawings
    monkeypatch.setattr(figures, "drawings", lambda evaluation: drawings(evaluation)[:1])
    write_report(made_predictions(60, labels), labels, tmp_path, meta={}, resamples=20)
    few, many = ((place / "report.html").read_text(encoding="utf-8") for place in (folder, tmp_path))
    assert 'class="card whole"' not in few
    assert '<section class="card whole" style="--readable: 940px">' in many


@pytest.mark.usefixtures("undrawn")
def test_mistakes_can_be_heard(tmp_path: Path, write_audio: Callable[..., Path]) -> None:
    short = write_audio("short.wav", duration_s=1.5, sample_rate_hz=48_000, channels=2)
    long = write_audio("long.wav", duration_s=14.0, sample_rate_hz=8_000)
    table = made_predictions(30, accuracy=1.0)
    table = table.assign(segment_start_s=np.nan, segment_end_s=np.nan)
    table.loc[3, ["segment_start_s", "segment_end_s"]] = [2.0, 5.0]
    for row, path in enumerate((short, long, tmp_path / "gone.wav", long)):
        wrong = next(label for label in LABELS if label != table["label_name"][row])
        table.loc[row, ["speech", "predicted"]] = [str(path), wrong]
        p = {f"p_{label}": float(label == wrong) for label in LABELS}
        table.loc[row, list(p)] = list(p.values())
    write_report(table, LABELS, tmp_path / "report", meta={}, embed_audio=4)
    page = Page((tmp_path / "report" / "report.html").read_text(encoding="utf-8"))
    players = [str(attrs["src"]) for tag, attrs in page.tags if tag == "audio"]
    lengths = []
    for uri in players:
        samples, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(uri.removeprefix("data:audio/wav;base64,"))))
        assert np.abs(samples).max() > 0.1
        lengths.append(len(samples) / rate_hz)
    assert lengths == pytest.approx([1.5, 10.0, 3.0], abs=1e-3)


@pytest.mark.parametrize("n", [64, 5000])
def test_the_classification_report_is_that_of_sklearn(n: int) -> None:
    table = made_predictions(n, accuracy=0.7, failed=3)
    read = table[table["status"] == "ok"]
    want = classification_report(read["label_name"], read["predicted"], zero_division=0)
    assert our_report(evaluate(table, LABELS, resamples=2)).splitlines() == want.rstrip().splitlines()


def test_a_class_without_clips_is_not_available_in_the_terminal() -> None:
    table = made_predictions(80)
    summary = terminal_summary(evaluate(table[table["label_name"] != "sad"], LABELS))
    assert re.search(r"^ +sad +n/a +n/a +n/a +0$", summary, re.MULTILINE)
    assert re.search(r"^  recall sad +>= 75.0 % +n/a +\[n/a\] +not decidable$", summary, re.MULTILINE)


def test_the_terminal_has_80_columns() -> None:
    long_names = tuple(f"a_very_long_name_of_a_class_{i}" for i in range(8))
    evaluations = [
        evaluate(made_predictions(120, labels, failed=failed, accuracy=0.5), labels, resamples=20)
        for labels in (LABELS, ("no", "yes"), long_names, tuple(f"c{i:02d}" for i in range(30)))
        for failed in (0, 7)
    ]
    millions = evaluate(made_predictions(80), LABELS, resamples=2)
    millions["confusion"] |= {"counts": [[1_234_567] * 8] * 8, "failed": [1_234_567] * 8}
    for evaluation in (*evaluations, millions):
        assert max(map(len, terminal_summary(evaluation).splitlines())) <= 80
    assert "1235k" in terminal_summary(millions)


def test_the_summary_says_what_was_missed_that_failed_ones_count_and_rows_without_a_label_do_not() -> None:
    table = made_predictions(203, accuracy=0.9, failed=60)
    table.loc[:2, "label_name"] = None
    summary = " ".join(terminal_summary(evaluate(table, LABELS, targets=Targets(0.8, 0.5, 0.1))).split())
    assert "NOT MET (missed: accuracy)" in summary
    assert "60 of 200" in summary
    assert "3 of 203" in summary


def test_a_figure_just_below_its_target_does_not_look_like_it(undrawn: None, tmp_path: Path) -> None:
    """2,498 of 3,123 are 79.99 %: told as 80.0 %, the verdict would contradict itself."""
    truth = np.arange(3123) % 2
    answer = np.where(np.arange(3123) < 2498, truth, 1 - truth)
    names, labels = np.array(["calm", "sad"]), ("calm", "sad")
    table = pd.DataFrame({"speech": [f"{i}.wav" for i in range(3123)], "status": "ok", "error": "", "confidence": 0.9})
    table = table.assign(label_name=names[truth], predicted=names[answer])
    table = table.assign(p_calm=np.where(answer == 0, 0.9, 0.1), p_sad=np.where(answer == 1, 0.9, 0.1))
    found = write_report(table, labels, tmp_path, meta={})
    assert found["overall"]["accuracy"]["value"] == pytest.approx(0.79987, abs=1e-5)
    assert re.search(r"accuracy +>= 80.0 % +79.99 % .*NOT MET", terminal_summary(found))
    page = (tmp_path / "report.html").read_text()
    assert page.count(f"79.99{NARROW}%") >= 2  # the tile and the row of the verdict
    assert decimals(0.8, 0.8) == decimals(0.7, 0.8) == decimals(0.79949, 0.8) == 1
    assert decimals(0.7999999, 0.8) == 4


def test_cells_that_a_spreadsheet_would_run() -> None:
    for text in ("=HYPERLINK(1)", "+x", "-x", "@sum", "\tx", "\rx", "'=x"):
        assert guard(text) == f"'{text}"
        assert unguard(f"'{text}") == text
    for text in ("-3.5", "+1e3", "angry", "'quoted'", ""):
        assert guard(text) == unguard(text) == text


def test_tables_come_back_as_they_were(tmp_path: Path) -> None:
    table = pd.DataFrame({"=name": ["=1+1", "'=2", 'a,"b"\nc', "é"], "n": [-1.5, 2.0, np.nan, 1e-300]})
    write_csv(table, tmp_path / "t.csv")
    assert "'=name" in (tmp_path / "t.csv").read_text(encoding="utf-8")
    pd.testing.assert_frame_equal(read_csv(tmp_path / "t.csv").astype({"n": float}), table, check_exact=True)


@pytest.mark.usefixtures("undrawn")
def test_a_full_disk_is_one_line(predictions: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.reporting.report.write_csv", full)
    for write in (
        lambda: write_report(predictions, LABELS, tmp_path / "a", meta={}),
        lambda: write_comparison(predictions, predictions, LABELS, tmp_path / "b", names=("a", "b"), meta={}),
    ):
        with pytest.raises(SerError, match="No space left on device"):
            write()
