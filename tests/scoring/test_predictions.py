"""The tables: every row once and in order, the manifest untouched, CSV that spreadsheets cannot run, no half tables."""

from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import tables
from pipeline.inference.predictor import Prediction
from pipeline.inference.timeline import Timeline, log_softmax, no_windows
from pipeline.scoring.predictions import (
    our_columns,
    plain_manifest,
    read_predictions,
    read_segments,
    to_table,
    write_exports,
    write_tables,
)
from pipeline.storage.errors import SerError

LABELS = ("angry", "calm", "sad")


def good(*p: float, level_dbfs: float = -20.0) -> Prediction:
    probabilities = np.array(p)
    best = int(probabilities.argmax())
    return Prediction("ok", None, LABELS[best], p[best], probabilities, 184.0, 2.0, 16_000, 1, level_dbfs)


def bad(status: str = "not_audio") -> Prediction:
    return Prediction(status, "x.wav: no audio", None, np.nan, np.full(3, np.nan), np.nan, 0.0, 0, 0)


def write(manifest: pd.DataFrame, parts: list[pa.Table], out: Path, **options: object) -> pd.DataFrame:
    table = plain_manifest(manifest, LABELS)
    write_tables(table, iter(parts), out, LABELS, **options)  # type: ignore[arg-type]
    return pd.read_parquet(out / "predictions.parquet")


def test_columns_rows_and_order(tmp_path: Path) -> None:
    manifest = pd.DataFrame(
        {"speech": ["/b.wav", "/a.wav", "/c.wav"], "label": ["sad", None, "calm"], "speaker": [3, 1, 2]}
    )
    parts = [to_table([good(0.1, 0.2, 0.7), bad()], LABELS), to_table([good(0.3, 0.4, 0.3)], LABELS, 0.5)]
    found = write(manifest, parts, tmp_path)
    assert list(found.columns) == [
        *("speech", "label", "speaker", "status", "error", "label_name", "predicted", "confidence"),
        *("p_angry", "p_calm", "p_sad", "duration_s", "scored_s", "level_dbfs", "entropy", "margin"),
        *("familiarity", "speech_share", "notice"),
    ]
    pd.testing.assert_frame_equal(found[manifest.columns], manifest, check_dtype=False)
    assert list(found["status"]) == ["ok", "not_audio", "ok"]
    assert list(found["predicted"].fillna("-")) == ["sad", "-", "uncertain"]
    assert list(found["label_name"].fillna("-")) == ["sad", "-", "calm"]
    assert found.loc[1, ["confidence", "p_angry", "duration_s", "entropy", "margin", "level_dbfs"]].isna().all()
    np.testing.assert_array_equal(found.loc[[0, 2], ["p_angry", "p_calm", "p_sad"]], [[0.1, 0.2, 0.7], [0.3, 0.4, 0.3]])
    assert found.loc[0, "margin"] == pytest.approx(0.5)
    assert found.loc[0, "entropy"] == pytest.approx(-sum(p * np.log(p) for p in (0.1, 0.2, 0.7)) / np.log(3))
    as_text = found.astype({"speaker": str})
    pd.testing.assert_frame_equal(read_predictions(tmp_path / "predictions.csv"), as_text, check_dtype=False)
    pd.testing.assert_frame_equal(read_predictions(tmp_path), found)


def test_without_labels_there_is_no_label_name(tmp_path: Path) -> None:
    found = write(pd.DataFrame({"speech": ["/a.wav"]}), [to_table([good(0.1, 0.2, 0.7)], LABELS)], tmp_path)
    assert list(found.columns) == ["speech", *our_columns(LABELS, labelled=False)]


def test_columns_that_collide_with_ours_are_kept_under_another_name(tmp_path: Path) -> None:
    given = {
        "speech": ["/a.wav"],
        "status": ["mine"],
        "in_status": ["too"],
        "p_sad": [9.0],
        "start_s": [1],
        "error": [None],
    }
    found = write(pd.DataFrame(given), [to_table([good(0.1, 0.2, 0.7)], LABELS)], tmp_path)
    assert found.loc[0, ["in_status", "in_in_status", "in_p_sad", "in_start_s"]].tolist() == ["mine", "too", 9.0, 1]
    assert found.loc[0, ["status", "p_sad"]].tolist() == ["ok", 0.7]
    assert found.columns.is_unique


def test_a_column_called_windows_stays_the_manifests(tmp_path: Path) -> None:
    manifest = pd.DataFrame({"speech": ["/a.wav"], "windows": ["shut"]})
    found = write(manifest, [to_table([good(0.1, 0.2, 0.7)], LABELS, timelines=[no_windows(3)])], tmp_path)
    assert list(found.columns) == ["speech", "windows", *our_columns(LABELS, labelled=False)]
    assert found.loc[0, ["windows", "predicted"]].tolist() == ["shut", "sad"]


HOSTILE = [
    "=1+1",
    "+49 30",
    "-x",
    "@cmd",
    "\tx",
    "\rx",
    "'",
    "'=1",
    "-3.5",
    "a,b",
    'say "no"',
    "line\nbreak",
    "😀",
    "ok",
]


def test_csv_is_guarded_and_read_back(tmp_path: Path) -> None:
    manifest = pd.DataFrame({"speech": [f"/{i}.wav" for i in range(len(HOSTILE))], "=note": HOSTILE})
    found = write(manifest, [to_table([bad()] * len(HOSTILE), LABELS)], tmp_path)
    assert list(found["=note"]) == HOSTILE, "Parquet is exact"
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    numbers = {"-3.5"}
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@", "\t", "\r") and cell not in numbers]
    assert list(read_predictions(tmp_path / "predictions.csv")["=note"]) == HOSTILE


def test_what_looks_like_a_number_is_read_back_as_the_text_it_was(tmp_path: Path) -> None:
    cells = {
        "take": ["01", "2"],
        "good": ["True", "False"],
        "id": ["1e5", "7"],
        "p_code": ["00", "0x1"],
        "row": ["1", ""],
    }
    manifest = pd.DataFrame({"speech": ["/a.wav", "/b.wav"], **cells})
    written = write(manifest, [to_table([good(0.1, 0.2, 0.7), bad()], LABELS)], tmp_path)
    found = read_predictions(tmp_path / "predictions.csv")
    assert {name: found[name].fillna("").tolist() for name in cells} == cells
    pd.testing.assert_frame_equal(found[written.columns[6:]], written.iloc[:, 6:], check_dtype=False, check_exact=True)
    text = (tmp_path / "predictions.csv").read_text(encoding="utf-8")
    (tmp_path / "edited.csv").write_text(text.replace("0.7", '"0,7"'), encoding="utf-8")
    with pytest.raises(SerError, match=r"edited\.csv, column .*: could not convert .*; expected numbers"):
        read_predictions(tmp_path / "edited.csv")


def test_cells_that_parquet_cannot_hold_become_text(tmp_path: Path) -> None:
    cells = {"speech": ["/a.wav", "/b.wav"], "mixed": [1, "one"], "bytes": ["caf\udce9", None]}
    manifest = pd.DataFrame({name: pd.Series(column, dtype=object) for name, column in cells.items()})
    found = write(manifest, [to_table([bad(), bad()], LABELS)], tmp_path)
    assert list(found["mixed"]) == ["1", "one"]
    assert found.loc[0, "bytes"] == "caf\\udce9"
    assert pd.isna(found.loc[1, "bytes"])


def test_columns_of_empty_cells_keep_one_schema_over_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.scoring.predictions._ROWS_AT_ONCE", 1)
    manifest = pd.DataFrame({"speech": ["/a.wav", "/b.wav"], "note": [None, "late"], "label": [None, "sad"]})
    found = write(manifest, [to_table([bad()], LABELS), to_table([good(0.2, 0.3, 0.5)], LABELS)], tmp_path)
    assert list(found["note"].fillna("-")) == ["-", "late"]
    assert pq.ParquetFile(tmp_path / "predictions.parquet").num_row_groups == 2


def test_too_few_parts_are_our_mistake_and_leave_nothing(tmp_path: Path) -> None:
    manifest = pd.DataFrame({"speech": ["/a.wav", "/b.wav"]})
    with pytest.raises(ValueError, match="parts hold 1 rows, the manifest 2"):
        write_tables(manifest, [to_table([bad()], LABELS)], tmp_path, LABELS)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, parts = pd.DataFrame({"speech": ["/a.wav"]}), [to_table([bad()], LABELS)]
    write(manifest, parts, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tables.os, "fsync", full)
    with pytest.raises(SerError, match="No space left on device"):
        write_tables(manifest, [to_table([good(0.2, 0.3, 0.5)], LABELS)], tmp_path, LABELS)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["gone", "gone.csv"])
def test_no_table_to_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(SerError, match="no scores at"):
        read_predictions(tmp_path / name)


# --- windows ---------------------------------------------------------------------------------------------------------


def windows(*best: int, channel: str = "mix", level_dbfs: float = -20.0) -> Timeline:
    logits = np.eye(3)[list(best)] * 2
    start_s = np.arange(len(best), dtype=float)
    name = np.full(len(best), channel, dtype=object)
    return Timeline(name, start_s, start_s + 2, np.full(len(best), level_dbfs), log_softmax(logits))


@pytest.fixture
def walked(tmp_path: Path) -> Iterator[Path]:
    """Four recordings heard in windows: one emotion, a change, a bad one, two channels of which one is silent."""
    two = [windows(0, 1, channel="0"), windows(2, 2, channel="1", level_dbfs=-99.0)]
    call = Timeline(*(np.concatenate([getattr(t, f) for t in two]) for f in Timeline.__dataclass_fields__))
    timelines = [windows(0, 0), windows(1, 1, 2), no_windows(3), call]
    predictions = [good(0.8, 0.1, 0.1), good(0.2, 0.5, 0.3), bad(), good(0.5, 0.3, 0.2)]
    manifest = pd.DataFrame({"speech": ["/a.wav", "/b/=c d.wav", "/no.wav", "/call.wav"]})
    parts = [to_table(predictions[:1], LABELS, timelines=timelines[:1])]
    parts += [to_table(predictions[1:], LABELS, timelines=timelines[1:])]
    write(manifest, parts, tmp_path, each_channel=True)
    return tmp_path


def test_segments_and_channels(walked: Path) -> None:
    found = pd.read_parquet(walked / "segments.parquet")
    assert list(found["row"]) == [0, 0, 1, 1, 1, 3, 3, 3, 3]
    assert list(found["predicted"]) == [*["angry"] * 2, *["calm"] * 2, "sad", "angry", "calm", *["silence"] * 2]
    assert list(found["channel"]) == [*["mix"] * 5, "0", "0", "1", "1"]
    assert found.loc[4, ["start_s", "end_s"]].tolist() == [2.0, 4.0]
    silent = (found["predicted"] == "silence").to_numpy()
    np.testing.assert_allclose(found.loc[~silent, ["p_angry", "p_calm", "p_sad"]].sum(axis=1), 1.0)
    unknown = ["confidence", "p_angry", "p_calm", "p_sad", "entropy", "margin"]
    assert found.loc[silent, unknown].isna().all(axis=None)
    assert found.loc[~silent, unknown].notna().all(axis=None)
    pd.testing.assert_frame_equal(read_predictions(walked / "segments.csv"), found, check_dtype=False)
    sides = pd.read_parquet(walked / "channels.parquet")
    assert list(zip(sides["row"], sides["channel"], sides["predicted"], strict=True)) == [
        (0, "mix", "angry"),
        (1, "mix", "calm"),
        (3, "0", "angry"),
        (3, "1", "silence"),
    ]
    assert list(pd.read_parquet(walked / "predictions.parquet")["status"]) == ["ok", "ok", "not_audio", "ok"]


def test_silence_has_no_confidence_and_a_notice_is_kept(tmp_path: Path) -> None:
    quiet, heard = good(0.7, 0.2, 0.1, level_dbfs=-80.0), replace(good(0.7, 0.2, 0.1), notice="channels cancel")
    manifest = pd.DataFrame({"speech": ["/a.wav", "/b.wav", "/c.wav"]})
    old = to_table([good(0.1, 0.2, 0.7)], LABELS).drop_columns(["notice"])  # a run that an older version began
    found = write(manifest, [to_table([quiet, heard], LABELS), old], tmp_path)
    assert found["predicted"].tolist() == ["silence", "angry", "sad"]
    assert found["status"].tolist() == ["ok"] * 3
    assert found.loc[0, ["confidence", "p_angry", "p_calm", "p_sad", "entropy", "margin"]].isna().all()
    assert found["notice"].fillna("").tolist() == ["", "channels cancel", ""]
    pd.testing.assert_frame_equal(read_predictions(tmp_path / "predictions.csv"), found, check_dtype=False)
    loud = write(manifest.head(1), [to_table([quiet], LABELS, silence_dbfs=-300.0)], tmp_path, silence_dbfs=-300.0)
    assert loud.loc[0, "confidence"] == 0.7


def test_segments_are_read_back_by_recording(walked: Path) -> None:
    found = list(read_segments(walked, LABELS))
    assert [(row, speech, len(timeline)) for row, speech, timeline, _ in found] == [
        (0, "/a.wav", 2),
        (1, "/b/=c d.wav", 3),
        (3, "/call.wav", 4),
    ]
    assert found[1][3] == ["calm", "calm", "sad"]
    np.testing.assert_allclose(found[1][2].log_p, windows(1, 1, 2).log_p)


def test_exports(walked: Path) -> None:
    written = write_exports(walked, LABELS, ("jsonl", "audacity"), merge=True)
    assert [path.name for path in written] == [
        *("timeline.parquet", "timeline.csv"),
        *("predictions.jsonl", "segments.jsonl", "channels.jsonl", "timeline.jsonl"),
        "audacity",
    ]
    merged = pd.read_parquet(walked / "timeline.parquet")
    assert list(
        zip(merged["row"], merged["channel"], merged["start_s"], merged["end_s"], merged["predicted"], strict=True)
    ) == [
        (0, "mix", 0.0, 3.0, "angry"),
        (1, "mix", 0.0, 2.5, "calm"),
        (1, "mix", 2.5, 4.0, "sad"),
        (3, "0", 0.0, 1.5, "angry"),
        (3, "0", 1.5, 3.0, "calm"),
        (3, "1", 0.0, 3.0, "silence"),
    ]
    assert merged["confidence"].isna().tolist() == [False] * 5 + [True]
    rows = [json.loads(line) for line in (walked / "predictions.jsonl").read_text("utf-8").splitlines()]
    table = pd.read_parquet(walked / "predictions.parquet")
    assert [row["speech"] for row in rows] == list(table["speech"])
    assert rows[2]["confidence"] is None
    assert rows[0]["p_angry"] == table.loc[0, "p_angry"]
    tracks = {path.name: path.read_text("utf-8") for path in (walked / "audacity").iterdir()}
    assert tracks == {
        "000000-a.txt": "0.000\t3.000\tangry\n",
        "000001-_c_d.txt": "0.000\t2.500\tcalm\n2.500\t4.000\tsad\n",
        "000003-call.txt": "0.000\t1.500\t0 angry\n1.500\t3.000\t0 calm\n0.000\t3.000\t1 silence\n",
    }


def test_label_tracks_of_single_windows(walked: Path) -> None:
    write_exports(walked, LABELS, ("audacity",))
    assert (walked / "audacity" / "000000-a.txt").read_text() == "0.000\t2.000\tangry\n1.000\t3.000\tangry\n"


def test_merging_when_no_recording_could_be_used(tmp_path: Path) -> None:
    write(pd.DataFrame({"speech": ["/a.wav"]}), [to_table([bad()], LABELS, timelines=[no_windows(3)])], tmp_path)
    write_exports(tmp_path, LABELS, ("jsonl", "audacity"), merge=True)
    assert len(pd.read_parquet(tmp_path / "segments.parquet")) == 0
    assert len(pd.read_parquet(tmp_path / "timeline.parquet")) == 0
    assert list((tmp_path / "audacity").iterdir()) == []


def test_exports_of_segments_need_windows(tmp_path: Path) -> None:
    write(pd.DataFrame({"speech": ["/a.wav"]}), [to_table([bad()], LABELS)], tmp_path)
    with pytest.raises(SerError, match="give --window_s"):
        write_exports(tmp_path, LABELS, merge=True)
    assert [p.name for p in write_exports(tmp_path, LABELS, ("jsonl",))] == ["predictions.jsonl"]
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
