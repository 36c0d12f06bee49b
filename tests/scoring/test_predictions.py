"""The tables: every row once and in order, the manifest untouched, CSV that spreadsheets cannot run, no half tables."""

from __future__ import annotations

import csv
import errno
import json
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


SAD = good(0.1, 0.2, 0.7)


def write(manifest: pd.DataFrame, parts: list[pa.Table], out: Path, **options: object) -> pd.DataFrame:
    out.mkdir(exist_ok=True)
    table = plain_manifest(manifest, LABELS)
    write_tables(table, iter(parts), out, LABELS, **options)  # type: ignore[arg-type]
    return pd.read_parquet(out / "predictions.parquet")


def test_columns_rows_and_order(tmp_path: Path) -> None:
    cells = {"speech": ["/b.wav", "/a.wav", "/c.wav"], "label": ["sad", None, "calm"], "speaker": [3, 1, 2]}
    manifest = pd.DataFrame(cells)
    parts = [to_table([SAD, bad()], LABELS), to_table([good(0.3, 0.4, 0.3)], LABELS, 0.5)]
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


def test_columns_of_the_manifest_without_labels_that_collide_with_ours(tmp_path: Path) -> None:
    given = {
        **{"speech": ["/a.wav"], "status": ["mine"], "in_status": ["too"], "p_sad": [9.0]},
        **{"start_s": [1], "error": [None], "windows": ["shut"]},
    }
    found = write(pd.DataFrame(given), [to_table([SAD], LABELS, timelines=[no_windows(3)])], tmp_path)
    assert found.loc[0, ["in_status", "in_in_status", "in_p_sad", "in_start_s"]].tolist() == ["mine", "too", 9.0, 1]
    assert found.loc[0, ["status", "p_sad", "predicted"]].tolist() == ["ok", 0.7, "sad"]
    assert found.loc[0, "windows"] == "shut"
    kept = ["speech", "in_status", "in_in_status", "in_p_sad", "in_start_s", "in_error", "windows"]
    assert list(found.columns) == [*kept, *our_columns(LABELS, labelled=False)]


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
    assert {cell for cell in cells if cell[:1] in ("=", "+", "-", "@", "\t", "\r")} == {"-3.5"}  # a number
    assert list(read_predictions(tmp_path / "predictions.csv")["=note"]) == HOSTILE


def test_what_looks_like_a_number_is_read_back_as_the_text_it_was(tmp_path: Path) -> None:
    cells = {"take": ["01", "2"], "good": ["True", "False"], "id": ["1e5", "7"], "p_code": ["00", "0x1"]}
    cells["row"] = ["1", ""]
    manifest = pd.DataFrame({"speech": ["/a.wav", "/b.wav"], **cells})
    written = write(manifest, [to_table([SAD, bad()], LABELS)], tmp_path)
    found = read_predictions(tmp_path / "predictions.csv")
    assert {name: found[name].fillna("").tolist() for name in cells} == cells
    pd.testing.assert_frame_equal(found[written.columns[6:]], written.iloc[:, 6:], check_dtype=False, check_exact=True)
    text = (tmp_path / "predictions.csv").read_text(encoding="utf-8")
    (tmp_path / "edited.csv").write_text(text.replace("0.7", '"0,7"'), encoding="utf-8")
    with pytest.raises(SerError, match=r"edited\.csv, column "):
        read_predictions(tmp_path / "edited.csv")


def test_cells_that_parquet_cannot_hold_and_columns_whose_parts_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.scoring.predictions._ROWS_AT_ONCE", 1)
    cells = {"speech": ["/a.wav", "/b.wav"], "mixed": [1, "one"], "bytes": ["caf\udce9", None]}
    cells |= {"note": [None, "late"], "label": [None, "sad"]}
    manifest = pd.DataFrame({name: pd.Series(column, dtype=object) for name, column in cells.items()})
    found = write(manifest, [to_table([bad()], LABELS), to_table([good(0.2, 0.3, 0.5)], LABELS)], tmp_path)
    assert list(found["mixed"]) == ["1", "one"]
    assert found["bytes"].fillna("-").tolist() == ["caf\\udce9", "-"]
    assert list(found["note"].fillna("-")) == ["-", "late"]
    assert pq.ParquetFile(tmp_path / "predictions.parquet").num_row_groups == 2


def test_too_few_parts_leave_nothing_and_a_full_disk_the_old_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [to_table([bad()], LABELS)]
    with pytest.raises(ValueError, match="1 rows, the manifest 2"):
        write_tables(pd.DataFrame({"speech": ["/a.wav", "/b.wav"]}), parts, tmp_path, LABELS)
    assert list(tmp_path.iterdir()) == []
    manifest = pd.DataFrame({"speech": ["/a.wav"]})
    write(manifest, parts, tmp_path)

    def kept() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = kept()
    monkeypatch.setattr(tables.os, "fsync", full)
    with pytest.raises(SerError, match="No space left on device"):
        write_tables(manifest, [to_table([good(0.2, 0.3, 0.5)], LABELS)], tmp_path, LABELS)
    assert kept() == before


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
    back = list(read_segments(walked, LABELS))
    assert [(row, speech, len(timeline)) for row, speech, timeline, _ in back] == [
        (0, "/a.wav", 2),
        (1, "/b/=c d.wav", 3),
        (3, "/call.wav", 4),
    ]
    assert back[1][3] == ["calm", "calm", "sad"]
    np.testing.assert_allclose(back[1][2].log_p, windows(1, 1, 2).log_p)


def test_silence_has_no_confidence_and_a_notice_is_kept(tmp_path: Path) -> None:
    quiet, heard = good(0.7, 0.2, 0.1, level_dbfs=-80.0), replace(good(0.7, 0.2, 0.1), notice="channels cancel")
    manifest = pd.DataFrame({"speech": ["/a.wav", "/b.wav", "/c.wav"]})
    old = to_table([SAD], LABELS).drop_columns(["notice"])  # a run that an older version began
    found = write(manifest, [to_table([quiet, heard], LABELS), old], tmp_path)
    assert found["predicted"].tolist() == ["silence", "angry", "sad"]
    assert found["status"].tolist() == ["ok"] * 3
    assert found.loc[0, ["confidence", "p_angry", "p_calm", "p_sad", "entropy", "margin"]].isna().all()
    assert found["notice"].fillna("").tolist() == ["", "channels cancel", ""]
    pd.testing.assert_frame_equal(read_predictions(tmp_path / "predictions.csv"), found, check_dtype=False)
    loud = write(manifest.head(1), [to_table([quiet], LABELS, silence_dbfs=-300.0)], tmp_path, silence_dbfs=-300.0)
    assert loud.loc[0, "confidence"] == 0.7


def test_exports(walked: Path) -> None:
    write_exports(walked, LABELS, ("audacity",))
    assert (walked / "audacity" / "000000-a.txt").read_text() == "0.000\t2.000\tangry\n1.000\t3.000\tangry\n"
    written = write_exports(walked, LABELS, ("jsonl", "audacity"), merge=True)
    assert [path.name for path in written] == [
        *("timeline.parquet", "timeline.csv"),
        *("predictions.jsonl", "segments.jsonl", "channels.jsonl", "timeline.jsonl"),
        "audacity",
    ]
    merged = pd.read_parquet(walked / "timeline.parquet")
    columns = ["row", "channel", "start_s", "end_s", "predicted"]
    assert list(merged[columns].itertuples(index=False, name=None)) == [
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


def test_exports_of_segments_need_windows_and_can_be_empty(tmp_path: Path) -> None:
    manifest = pd.DataFrame({"speech": ["/a.wav"]})
    write(manifest, [to_table([bad()], LABELS)], tmp_path / "plain")
    with pytest.raises(SerError, match="--window_s"):
        write_exports(tmp_path / "plain", LABELS, merge=True)
    assert [path.name for path in write_exports(tmp_path / "plain", LABELS, ("jsonl",))] == ["predictions.jsonl"]
    assert list((tmp_path / "plain").glob("*.tmp")) == []
    write(manifest, [to_table([bad()], LABELS, timelines=[no_windows(3)])], tmp_path)  # nothing could be used
    write_exports(tmp_path, LABELS, ("jsonl", "audacity"), merge=True)
    for name in ("segments", "timeline"):
        assert len(pd.read_parquet(tmp_path / f"{name}.parquet")) == 0
    assert list((tmp_path / "audacity").iterdir()) == []
