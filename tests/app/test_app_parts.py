"""Parts of the page without Streamlit: words, colours, labels, CSV, time line, figures, drawings."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from app_service import LABELS, explanation_of, picture_of, recording_of, refused, spoken
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import classification_report

from app_pages import drawing, palette
from app_pages.bars import answer_html, bars_html, scores_html
from app_pages.collection import Collection, as_told, csv_bytes, result_table
from app_pages.labels import ALIASES, LabelsError, read_labels
from app_pages.model import two_figures_html
from app_pages.recordings import Recorded, example, examples
from app_pages.timeline import as_table, shares, timeline_html
from app_pages.verdict import agreement, confusion, confusion_alt, wilson
from pipeline.data import labels
from serve.schema import Explanation, Failure, Picture, Recording, Score, Segment
from serve.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
CONFIG = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text(encoding="utf-8"))
both_themes = pytest.mark.parametrize("theme", [CONFIG["theme"]["light"], CONFIG["theme"]["dark"]])


def segments(*labels: str, channel: str = "mix", each_s: float = 2.0) -> list[Segment]:
    """Windows one after the other, with these answers."""
    common = {"channel": channel, "confidence": 0.4, "scores": [Score(label="sad", score=0.4)], "level_dbfs": -20}
    spans = [(label, each_s * number) for number, label in enumerate(labels)]
    return [Segment(start_s=start_s, end_s=start_s + each_s, label=label, **common) for label, start_s in spans]


def picture(duration_s: float = 3.0) -> Picture:
    return Picture.model_validate(picture_of(duration_s))


def answer(data: bytes, name: str = "a.wav") -> Recording:
    return Recording.model_validate(recording_of(name, json.loads(data), {}))


def test_the_page_loads_nothing_that_hears() -> None:
    code = "import app, sys; print(*({'torch','ray','librosa','soundfile','sklearn','scipy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr


def test_the_page_is_set_up_as_the_service_is() -> None:
    assert CONFIG["server"]["maxUploadSize"] == Settings().max_body_mib
    assert CONFIG["server"]["address"] == "127.0.0.1"
    assert CONFIG["browser"]["gatherUsageStats"] is False
    assert CONFIG["client"]["showErrorDetails"] == "none"


def channels_of(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, relative luminance, spelled out."""

    def luminance(colour: str) -> float:
        parts = [part / 255 for part in channels_of(colour)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@both_themes
def test_text_and_numbers_in_the_matrix_can_be_read(theme: dict[str, str]) -> None:
    for ground in (theme["backgroundColor"], theme["secondaryBackgroundColor"]):
        assert contrast(theme["textColor"], ground) > 7
        assert contrast(theme["linkColor"], ground) > 4.5
    squares = confusion(("angry", "sad"), ((5, 0), (0, 5))).to_dict()["layer"][0]
    low, high = squares["encoding"]["opacity"]["scale"]["range"]
    pairs = list(zip(channels_of(squares["mark"]["color"]), channels_of(theme["backgroundColor"]), strict=True))
    for share in (0.0, 0.02, 0.5, 1.0):
        opacity = low + share * (high - low)
        cell = [round(opacity * over + (1 - opacity) * under) for over, under in pairs]
        assert contrast(theme["textColor"], "#{:02x}{:02x}{:02x}".format(*cell)) >= 4.5


def test_colours_of_classes_differ_and_words_on_them_can_be_read() -> None:
    own = ["loud", "quiet", "annoyed", "relieved", "bored", "very_angry", "calm", "sad"]
    assert len({palette.colour(label) for label in own}) == len(own)
    for label in (*LABELS, "uncertain", "silence", "bored", "wütend"):
        colour = palette.colour(label)
        assert contrast(palette.ink(colour), colour) >= 4.5
        assert palette.colour(label) == colour
    heat = palette.heat(np.linspace(0, 1, 50)).astype(int).sum(axis=1)
    assert (np.diff(heat) > 0).all()  # from dark to bright


def test_spellings_are_those_of_the_commands() -> None:
    assert ALIASES == labels.ALIASES
    for text in (*ALIASES, *LABELS, "Pleasant-Surprise"):
        row = f"file,label\na.wav,{text}\n".encode()
        assert read_labels(row, "labels.csv", LABELS) == {"a.wav": labels.canonical_name(text)}
    assert read_labels(b"file,label\na.wav,sad\n", "labels.csv", ("joy", "sadness")) == {"a.wav": "sadness"}


def test_labels_are_read_as_people_write_them() -> None:
    table = "File;Emotion\nC:\\clips\\A.wav;Sad\nb.wav; happiness\nc.wav;3\nd.wav;\ne.wav;ps\nf.wav;Pleasant Surprise\n"
    expected = {"a.wav": "sad", "b.wav": "happy", "c.wav": "fearful", "e.wav": "surprised", "f.wav": "surprised"}
    for text in (table.encode(), b"\xef\xbb\xbf" + table.replace(";", ",").encode(), table.replace(";", "\t").encode()):
        assert read_labels(text, "labels.csv", LABELS) == expected


@pytest.mark.parametrize("names", [tuple(LABELS), ("1", "2", "3")])
@pytest.mark.parametrize("cell", ["2", "2.0", " 1 ", "0", "3.0", "8.5", "-1", "1e400"])
def test_numbers_are_the_classes_that_the_commands_make_of_them(names: tuple[str, ...], cell: str) -> None:
    table = f"file,label\na.wav,{cell}\n".encode()
    try:
        expected = names[labels.LabelSet(names).index(cell)]
    except labels.LabelError:
        with pytest.raises(LabelsError, match="the classes are"):
            read_labels(table, "labels.csv", names)
    else:
        assert read_labels(table, "labels.csv", names) == {"a.wav": expected}


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "CSV"),
        (b"\xff\xfe\x00\x01", "CSV"),
        (b"a,b\n1,2\n", "column"),
        *((f"file,label\na.wav,{label}\n".encode(), f"“{label}”") for label in ("bored", "disappointed", "8", "s")),
    ],
)
def test_labels_that_are_none_are_refused_in_a_sentence(data: bytes, told: str) -> None:
    with pytest.raises(LabelsError, match=told):
        read_labels(data, "labels.csv", LABELS)


def test_the_csv_has_a_row_for_each_and_no_formula() -> None:
    collection = Collection()
    assert result_table(collection).empty
    said = {"=cmd().wav": spoken("sad"), "b.wav": refused("truncated")}
    collection.add(Recorded(name, data) for name, data in said.items())
    for entry, kind in zip(collection.entries.values(), (Recording, Failure), strict=True):
        entry.answer = kind.model_validate(recording_of(entry.recorded.name, json.loads(entry.recorded.data), {}))
    collection.truth = {"b.wav": "calm"}
    table = pd.read_csv(io.BytesIO(csv_bytes(collection, LABELS)))
    assert list(table["speech"]) == ["'=cmd().wav", "b.wav"]
    assert list(table["status"]) == ["ok", "truncated"]
    assert table["label_name"].isna().tolist() == [True, False]
    found = table.loc[0, [f"p_{label}" for label in LABELS]].astype(float)
    assert found.sum() == pytest.approx(1)
    assert found.idxmax() == f"p_{table['predicted'][0]}"
    assert table.loc[1, "predicted":].isna().all()


@pytest.mark.parametrize(
    ("label", "confidence", "headline"),
    [
        ("sad", 0.8, "sounds sad"),
        ("sad", 0.51, "Weak guess: 51 %"),
        ("sad", 0.4, "No clear answer. Closest: sad (40 %), angry (9 %)"),
        ("silence", 0.2, "nothing to hear"),
    ],
)
def test_a_recording_of_many_is_told_as_on_its_own(label: str, confidence: float, headline: str) -> None:
    told = answer_html(as_told(answer(spoken(label, confidence=confidence))))
    assert headline in told.replace("\u00a0", " ")


def test_figures_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth = rng.choice(LABELS, 400)
    answers = np.where(rng.random(400) < 0.7, truth, rng.choice([*LABELS, "silence"], 400))
    found = agreement(list(truth), list(answers), LABELS)
    report: Any = classification_report(truth, answers, labels=list(LABELS), output_dict=True, zero_division=0)
    assert found.accuracy == pytest.approx((truth == answers).mean())
    assert found.weighted_f1 == pytest.approx(report["weighted avg"]["f1-score"])
    for label in LABELS:
        assert found.recall[label] == pytest.approx(report[label]["recall"])
        row = found.counts[LABELS.index(label)]
        assert row[LABELS.index(label)] == ((truth == label) & (answers == label)).sum()
    assert found.met is False
    low, high = found.f1_interval or (0.0, 0.0)
    assert low < found.weighted_f1 < high
    assert 0.05 < high - low < 0.2
    assert agreement(["sad"] * 3, ["sad"] * 3, LABELS).f1_interval == (1.0, 1.0)


def test_a_class_without_recordings_leaves_the_verdict_open() -> None:
    found = agreement(["sad", "calm"], ["sad", "calm"], LABELS)
    assert (found.met, found.recall["angry"]) == (None, None)
    assert agreement(list(LABELS), list(LABELS), LABELS).met is True


def test_the_matrix_is_told_in_words_too() -> None:
    told = confusion_alt(("angry", "sad"), ((5, 2), (1, 7)))
    for words_ in ("15 recordings", "12 right", "2 angry taken for sad", "1 sad taken for angry"):
        assert words_ in told
    json.dumps(confusion(("angry", "sad"), ((5, 0), (0, 0))).to_dict())  # a class without recordings


@pytest.mark.parametrize(("right", "n"), [(0, 12), (5, 12), (12, 12), (200, 239), (1, 1)])
def test_intervals_are_scipy_s(right: int, n: int) -> None:
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_two_figures_of_the_model_or_that_they_are_not_measured() -> None:
    measured = {"accuracy": 0.88, "n": 239, "intervals_95": {"accuracy": [0.84, 0.93]}}
    unseen = {"accuracy": 0.66, "n": 1188}
    html = two_figures_html({"test": measured, "unseen_speakers": unseen}).replace("\u00a0", " ")
    assert re.findall(r'class="figure">([^<]+)<', html) == ["88 %", "66 %"]
    assert "interval: 84 to 93<" in html
    low, high = binomtest(784, 1188).proportion_ci(method="wilson")
    assert f"interval: {100 * low:.0f} to {100 * high:.0f}<" in html
    sibling = two_figures_html({"known_speakers": measured | {"protocol": "test part"}})
    assert "88" in sibling
    assert "trained without them" in sibling
    out_of_fold: dict[str, Any] = {"training": "?", "out_of_fold": {"accuracy": 0.5}}
    for metrics in ({}, {"test": "?", "unseen_speakers": {"uar": 0.5}}, out_of_fold):
        assert two_figures_html(metrics).count("not measured") == 2


def test_overlapping_parts_meet_in_the_middle() -> None:
    parts = [*segments("sad", "sad"), segments("sad")[0], segments("sad", channel="1")[0]]
    parts[2] = parts[2].model_copy(update={"start_s": 3.0, "end_s": 5.0})
    table = as_table(parts, channels=1)
    assert table["drawn_s"].tolist() == [0, 2, 3.5, 0]
    assert table["until_s"].tolist() == [2, 3.5, 5, 2]
    assert table["from"].tolist() == ["0:00.0", "0:02.0", "0:03.0", "0:00.0"]


def test_a_long_recording_is_told_by_time_and_not_as_one_answer() -> None:
    parts = segments("sad", "silence", "uncertain", "sad")
    assert as_table(parts, channels=1)["sounds"].tolist() == ["sad", "silent", "not sure (sad?)", "sad"]
    assert shares(parts) == {"sad": pytest.approx(2 / 3), "uncertain": pytest.approx(1 / 3)}
    long = answer(spoken("angry", confidence=0.96, duration_s=8.0)).model_copy(update={"segments": parts})
    told = answer_html(long).replace("\u00a0", " ")
    assert "Sounds sad for 67 % of the time<" in told
    assert "For 33 % of the time the model is not sure." in told
    assert "96" not in told
    assert "Share of the time" in scores_html(long)
    for label, words_ in (("silence", "nothing to hear"), ("uncertain", "No clear answer in any part")):
        assert words_ in answer_html(long.model_copy(update={"segments": segments(label, each_s=8.0)}))


def test_neighbours_of_one_answer_are_one_band_and_bands_cover_the_time_once() -> None:
    parts = segments("sad", "sad", "neutral", "uncertain", "uncertain", "silence", "sad")
    html = timeline_html(as_table(parts, 1), 14.0)
    assert [float(start) for start in re.findall(r'data-start="([\d.]+)"', html)] == [0, 4, 6, 10, 12]
    widths = [float(width) for width in re.findall(r'class="run [^>]*?width:([\d.]+)%', html)]
    assert sum(widths) == pytest.approx(100, abs=0.01)
    kinds = re.findall(r'class="run (\w+)"', html)
    assert kinds == ["emotion", "emotion", "unsure", "empty", "emotion"]  # hatched and empty are no colours
    assert palette.colour("neutral") in html
    assert 'aria-label="not sure, ' in html
    calls = timeline_html(as_table([*segments("sad", channel="0"), *segments("angry", channel="1")], 2), 2.0)
    assert re.findall(r'class="name">(\w+)<', calls) == ["Left", "Right"]
    assert "<img" not in timeline_html(as_table(segments('"><img src=x>'), 1), 2.0)  # labels of others are text


def test_more_than_sixty_runs_are_stacked_columns_of_the_same_shares() -> None:
    html = timeline_html(as_table(segments(*["sad", "happy", "silence"] * 100), 1), 600.0)
    assert html.count('class="column"') == 60
    assert 'class="run' not in html
    heights = re.findall(r"height:([\d.]+)%;background-color:(#\w+)", html)
    for label in ("sad", "happy"):
        whole = sum(float(height) for height, colour in heights if colour == palette.colour(label))
        assert whole / 60 == pytest.approx(100 / 3, abs=0.5)
    assert timeline_html(as_table(segments(*["sad"] * 300), 1), 600.0).count('class="run') == 1


def test_little_is_folded_and_nothing_is_lost() -> None:
    scores = [Score(label=f"l{i}", score=share) for i, share in enumerate((0.6, 0.3, 0.049, 0.03, 0.021))]
    shown, folded = bars_html(scores).split("<details")
    assert re.findall(r"<th[^>]*>(\w+)<", shown) == ["l0", "l1"]
    assert re.findall(r"<th[^>]*>(\w+)<", folded) == ["l2", "l3", "l4"]
    assert "3 more" in folded
    assert "<details" not in bars_html(scores[:2])
    assert "l4" in bars_html(scores[4:]).split("<details")[0]  # the first is always told


def test_waveform_and_spectrogram_have_one_time_axis_with_all_of_the_recording() -> None:
    for duration_s, expected in ((10.0, [0.0, 10.0]), (1.0, [-0.5, 1.5])):
        drawn = [drawing.waveform(picture(duration_s)).to_dict(), drawing.overview(picture(duration_s)).to_dict()]
        domains = {str(layer["encoding"]["x"]["scale"]["domain"]) for chart in drawn for layer in chart["layer"]}
        assert domains == {str(expected)}
    datasets = drawing.waveform(picture(10.0)).to_dict()["datasets"].values()
    window = next(rows for rows in datasets if "end" in rows[0])
    assert window == [{"start": 4.0, "end": 6.0}]  # the window that was heard is marked


def test_the_picture_is_drawn_right_way_up() -> None:
    """Row 0 is the lowest band: it must be the last row of the image."""
    (rows,) = drawing.spectrogram(picture()).to_dict()["datasets"].values()
    data = rows[0]["picture"].removeprefix("data:image/png;base64,")
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int).sum(axis=2)
    assert image.shape == (64, 188)
    assert image[-1, 0] == image.max()  # the fake picture is loudest in its lowest band
    assert image[0, 0] == image.min()


def test_what_mattered_covers_the_picture_once() -> None:
    explanation = Explanation.model_validate(explanation_of(json.loads(spoken("sad", duration_s=3.0))))
    chart = drawing.mattered(explanation).to_dict()
    cells = next(pd.DataFrame(rows) for rows in chart["datasets"].values() if "strength" in rows[0])
    area = ((cells["end"] - cells["start"]) * (cells["high"] - cells["low"])).sum()
    assert area == pytest.approx(2.0 * 64)
    best = cells.loc[cells["strength"].idxmax()]
    assert (best["start"], best["speaks"], best["strength"]) == (0.5 + 3 / 8, "for the answer", 1.0)


def test_examples_are_recordings_that_browsers_play() -> None:
    recorded = [example(name) for name in examples()]
    assert len(recorded) == 12
    assert all(one.data and one.media_type and one.origin == "example" for one in recorded)
    assert Recorded("x.AIFF", b"").media_type is None
