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
from app_service import LABELS, picture_of, recording_of, refused, spoken
from scipy.stats import binomtest
from sklearn.metrics import classification_report

from app_pages import drawing, palette, words
from app_pages.bars import answer_html, bars_html, scores_html
from app_pages.collection import Collection, as_told, csv_bytes, result_table
from app_pages.labels import ALIASES, LabelsError, read_labels
from app_pages.model import two_figures_html
from app_pages.recordings import Recorded, example, examples
from app_pages.timeline import as_table, shares, timeline_html
from app_pages.verdict import agreement, confusion, confusion_alt, wilson
from pipeline.data import labels
from serve.schema import Explanation, Failure, Picture, Problem, Recording, Score, Segment
from serve.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def segment(start_s: float, end_s: float, label: str = "sad", channel: str = "mix") -> Segment:
    scores = [Score(label="sad", score=0.4)]
    return Segment(
        channel=channel, start_s=start_s, end_s=end_s, label=label, confidence=0.4, scores=scores, level_dbfs=-20
    )


def picture(duration_s: float = 3.0) -> Picture:
    return Picture.model_validate(picture_of(duration_s))


def answer(data: bytes, name: str = "a.wav") -> Recording:
    return Recording.model_validate(recording_of(name, json.loads(data), {}))


def collected(*given: tuple[str, bytes]) -> Collection:
    collection = Collection()
    collection.add(Recorded(name, data) for name, data in given)
    for entry in collection.entries.values():
        found = recording_of(entry.recorded.name, json.loads(entry.recorded.data), {})
        entry.answer = (Recording if found["status"] == "ok" else Failure).model_validate(found)
    return collection


def test_the_page_loads_nothing_that_hears() -> None:
    code = "import app, sys; print(*({'torch','ray','librosa','soundfile','sklearn','scipy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""


def test_the_page_is_set_up_as_the_service_is() -> None:
    config = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text(encoding="utf-8"))
    assert config["server"]["maxUploadSize"] == Settings().max_body_mib
    assert config["server"]["address"] == "127.0.0.1"
    assert config["browser"]["gatherUsageStats"] is False
    assert config["client"]["showErrorDetails"] == "none"


@pytest.mark.parametrize("section", ["light", "dark"])
def test_text_of_the_theme_can_be_read(section: str) -> None:
    theme = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text(encoding="utf-8"))["theme"][section]
    for ground in (theme["backgroundColor"], theme["secondaryBackgroundColor"]):
        assert contrast(theme["textColor"], ground) > 7
        assert contrast(theme["linkColor"], ground) > 4.5


def test_classes_of_one_s_own_have_colours_of_their_own() -> None:
    own = ["loud", "quiet", "annoyed", "relieved", "bored", "very_angry", "calm", "sad"]
    assert len({palette.colour(label) for label in own}) == len(own)


@pytest.mark.parametrize("label", [*LABELS, "uncertain", "silence", "bored", "wütend"])
def test_words_on_a_band_can_be_read(label: str) -> None:
    colour = palette.colour(label)
    assert contrast(palette.ink(colour), colour) >= 4.5
    assert palette.colour(label) == colour


@pytest.mark.parametrize("section", ["light", "dark"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_numbers_in_the_matrix_can_be_read(section: str, share: float) -> None:
    theme = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text(encoding="utf-8"))["theme"][section]
    squares = confusion(("angry", "sad"), ((5, 0), (0, 5))).to_dict()["layer"][0]
    low, high = squares["encoding"]["opacity"]["scale"]["range"]
    opacity = low + share * (high - low)
    cell = [
        round(opacity * int(squares["mark"]["color"][i : i + 2], 16) + (1 - opacity) * int(ground, 16))
        for i in (1, 3, 5)
        for ground in [theme["backgroundColor"][i : i + 2]]
    ]
    assert contrast(theme["textColor"], "#{:02x}{:02x}{:02x}".format(*cell)) >= 4.5


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, relative luminance, spelled out."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_heat_goes_from_dark_to_bright() -> None:
    colours = palette.heat(np.linspace(0, 1, 50)).astype(int).sum(axis=1)
    assert (np.diff(colours) > 0).all()


def test_every_reason_is_one_sentence() -> None:
    for code in [*words._REASONS, "unheard_of"]:
        problem = Problem(type="", title="", status=422, code=code, detail="told so")
        told = words.reason(problem)
        assert told[0].isupper()
        assert told.endswith(".")
        assert told.count(".") == 1


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
        (b"", "not a CSV"),
        (b"\xff\xfe\x00\x01", "not a CSV"),
        (b"a,b\n1,2\n", "needs a column"),
        (b"file,label\na.wav,bored\n", "“bored”"),
        (b"file,label\na.wav,disappointed\n", "“disappointed”"),
        (b"file,label\na.wav,8\n", "“8”"),
        (b"file,label\na.wav,s\n", "“s”"),
    ],
)
def test_labels_that_are_none_are_refused_in_a_sentence(data: bytes, told: str) -> None:
    with pytest.raises(LabelsError, match=told):
        read_labels(data, "labels.csv", LABELS)


def test_the_csv_has_a_row_for_each_and_no_formula() -> None:
    collection = collected(("=cmd().wav", spoken("sad")), ("b.wav", refused("truncated")))
    collection.truth = {"b.wav": "calm"}
    table = pd.read_csv(io.BytesIO(csv_bytes(collection, LABELS)))
    assert list(table["speech"]) == ["'=cmd().wav", "b.wav"]
    assert list(table["status"]) == ["ok", "truncated"]
    assert table["label_name"].isna().tolist() == [True, False]
    shares = table.loc[0, [f"p_{label}" for label in LABELS]].astype(float)
    assert shares.sum() == pytest.approx(1)
    assert shares.idxmax() == f"p_{table['predicted'][0]}"
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


def test_an_empty_collection_has_an_empty_table() -> None:
    assert result_table(Collection()).empty


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


def test_a_class_without_recordings_leaves_the_verdict_open() -> None:
    found = agreement(["sad", "calm"], ["sad", "calm"], LABELS)
    assert found.met is None
    assert found.recall["angry"] is None
    assert agreement(list(LABELS), list(LABELS), LABELS).met is True


def test_the_matrix_is_told_in_words_too() -> None:
    told = confusion_alt(("angry", "sad"), ((5, 2), (1, 7)))
    assert told.startswith("Confusion matrix of 15 recordings, 12 right.")
    assert told.endswith("mistakes: 2 angry taken for sad; 1 sad taken for angry.")
    json.dumps(confusion(("angry", "sad"), ((5, 0), (0, 0))).to_dict())


def test_overlapping_parts_meet_in_the_middle() -> None:
    table = as_table([segment(0, 2), segment(2, 4), segment(3, 5), segment(0, 2, channel="1")], channels=1)
    assert table["drawn_s"].tolist() == [0, 2, 3.5, 0]
    assert table["until_s"].tolist() == [2, 3.5, 5, 2]
    assert table["from"].tolist() == ["0:00.0", "0:02.0", "0:03.0", "0:00.0"]


def test_a_long_recording_is_told_by_time_and_not_as_one_answer() -> None:
    parts = [segment(0, 2, "sad"), segment(2, 4, "silence"), segment(4, 6, "uncertain"), segment(6, 8, "sad")]
    assert as_table(parts, channels=1)["sounds"].tolist() == ["sad", "silent", "not sure (sad?)", "sad"]
    assert shares(parts) == {"sad": pytest.approx(2 / 3), "uncertain": pytest.approx(1 / 3)}
    long = answer(spoken("angry", confidence=0.96, duration_s=8.0)).model_copy(update={"segments": parts})
    told = answer_html(long).replace("\u00a0", " ")
    assert "Sounds sad for 67 % of the time<" in told
    assert "For 33 % of the time the model is not sure." in told
    assert "96" not in told
    assert "Share of the time" in scores_html(long)
    for label, words_ in (("silence", "nothing to hear"), ("uncertain", "No clear answer in any part")):
        only = long.model_copy(update={"segments": [segment(0, 8, label)]})
        assert words_ in answer_html(only)


def _lengths(html: str, what: str) -> list[float]:
    return [float(width) for width in re.findall(rf'class="{what}[^>]*?width:([\d.]+)%', html)]


def test_neighbours_of_one_answer_are_one_band_and_bands_cover_the_time_once() -> None:
    labels_ = ["sad", "sad", "neutral", "uncertain", "uncertain", "silence", "sad"]
    parts = [segment(2.0 * i, 2.0 * i + 2, label) for i, label in enumerate(labels_)]
    html = timeline_html(as_table(parts, 1), 14.0)
    assert [float(start) for start in re.findall(r'data-start="([\d.]+)"', html)] == [0, 4, 6, 10, 12]
    assert sum(_lengths(html, "run ")) == pytest.approx(100, abs=0.01)
    kinds = re.findall(r'class="run (\w+)"', html)
    assert kinds == ["emotion", "emotion", "unsure", "empty", "emotion"]  # hatched and empty are no colours
    assert palette.colour("neutral") in html
    assert 'aria-label="not sure, ' in html
    calls = timeline_html(as_table([segment(0, 4, "sad", "0"), segment(0, 4, "angry", "1")], 2), 4.0)
    assert re.findall(r'class="name">(\w+)<', calls) == ["Left", "Right"]


def test_more_than_sixty_runs_are_stacked_columns_of_the_same_shares() -> None:
    parts = [segment(2.0 * i, 2.0 * i + 2, ("sad", "happy", "silence")[i % 3]) for i in range(300)]
    html = timeline_html(as_table(parts, 1), 600.0)
    assert html.count('class="column"') == 60
    assert 'class="run' not in html
    heights = re.findall(r"height:([\d.]+)%;background-color:(#\w+)", html)
    for label in ("sad", "happy"):
        whole = sum(float(height) for height, colour in heights if colour == palette.colour(label))
        assert whole / 60 == pytest.approx(100 / 3, abs=0.5)
    calm = timeline_html(as_table([segment(2.0 * i, 2.0 * i + 2, "sad") for i in range(300)], 1), 600.0)
    assert calm.count('class="run') == 1


def test_labels_of_others_are_text_in_the_bands() -> None:
    html = timeline_html(as_table([segment(0, 2, '"><img src=x>')], 1), 2.0)
    assert "<img" not in html


def test_little_is_folded_and_nothing_is_lost() -> None:
    scores = [Score(label=f"l{i}", score=share) for i, share in enumerate((0.6, 0.3, 0.049, 0.03, 0.021))]
    html = bars_html(scores)
    shown, folded = html.split("<details")
    assert re.findall(r"<th[^>]*>(\w+)<", shown) == ["l0", "l1"]
    assert re.findall(r"<th[^>]*>(\w+)<", folded) == ["l2", "l3", "l4"]
    assert "3 more, each under" in folded
    assert "<details" not in bars_html(scores[:2])
    assert "l4" in bars_html(scores[4:]).split("<details")[0]  # the first is always told


@pytest.mark.parametrize(("right", "n"), [(0, 12), (5, 12), (12, 12), (200, 239), (1, 1)])
def test_intervals_are_scipy_s(right: int, n: int) -> None:
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_interval_of_the_f1_holds_it() -> None:
    rng = np.random.default_rng(1)
    truth = rng.choice(LABELS, 300)
    answers = np.where(rng.random(300) < 0.7, truth, rng.choice([*LABELS, "silence"], 300))
    found = agreement(list(truth), list(answers), LABELS)
    assert found.f1_interval is not None
    low, high = found.f1_interval
    assert low < found.weighted_f1 < high
    assert 0.05 < high - low < 0.2
    assert agreement(["sad"] * 3, ["sad"] * 3, LABELS).f1_interval == (1.0, 1.0)


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
    assert two_figures_html({}).count("not measured") == 2
    assert two_figures_html({"test": "?", "unseen_speakers": {"uar": 0.5}}).count("not measured") == 2
    assert two_figures_html({"training": "?", "out_of_fold": {"accuracy": 0.5}}).count("not measured") == 2


def test_waveform_and_spectrogram_have_one_time_axis_with_all_of_the_recording() -> None:
    for duration_s, expected in ((10.0, [0.0, 10.0]), (1.0, [-0.5, 1.5])):
        drawn = [drawing.waveform(picture(duration_s)).to_dict(), drawing.overview(picture(duration_s)).to_dict()]
        domains = {str(layer["encoding"]["x"]["scale"]["domain"]) for chart in drawn for layer in chart["layer"]}
        assert domains == {str(expected)}


def test_the_picture_is_drawn_right_way_up() -> None:
    """Row 0 is the lowest band: it must be the last row of the image."""
    from PIL import Image

    chart = drawing.spectrogram(picture()).to_dict()
    (rows,) = chart["datasets"].values()
    data = rows[0]["picture"].removeprefix("data:image/png;base64,")
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int).sum(axis=2)
    assert image.shape == (64, 188)
    assert image[-1, 0] == image.max()  # the fake picture is loudest in its lowest band
    assert image[0, 0] == image.min()


def test_the_window_is_marked_where_it_is() -> None:
    chart = drawing.waveform(picture(10.0)).to_dict()
    window = next(rows for rows in chart["datasets"].values() if "end" in rows[0])
    assert window == [{"start": 4.0, "end": 6.0}]


def test_what_mattered_covers_the_picture_once() -> None:
    values = [[0.5 if (row, column) == (2, 3) else -0.1 for column in range(16)] for row in range(8)]
    explanation = Explanation(
        id="1",
        model="m",
        version="v",
        label="sad",
        confidence=0.5,
        scores=[Score(label="sad", score=0.5)],
        time_s=[0.5 + i / 8 for i in range(17)],
        frequency_hz=[31.0 + 2900 * i for i in range(9)],
        importance=values,
        picture=picture(),
    )
    chart = drawing.mattered(explanation).to_dict()
    cells = next(pd.DataFrame(rows) for rows in chart["datasets"].values() if "strength" in rows[0])
    area = ((cells["end"] - cells["start"]) * (cells["high"] - cells["low"])).sum()
    assert area == pytest.approx(2.0 * 64)
    best = cells.loc[cells["strength"].idxmax()]
    assert (best["start"], best["speaks"], best["strength"]) == (0.5 + 3 / 8, "for the answer", 1.0)


def test_examples_are_recordings_that_browsers_play() -> None:
    names = examples()
    assert len(names) == 12
    for name in names:
        recorded = example(name)
        assert recorded.data
        assert recorded.media_type is not None
        assert recorded.origin == "example"
    assert Recorded("x.AIFF", b"").media_type is None
