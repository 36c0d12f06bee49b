"""Parts of recordings: a segment is heard, hashed, split and checked as a file that was cut out there."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.audio.isolated import decode_in_subprocess
from pipeline.audio.load import Segment, content_hash, load, load_middle, load_once, probe
from pipeline.data.manifest import ManifestError, from_dataframe, read_manifest
from pipeline.data.segments import bounds, ids
from pipeline.data.splits import add_hashes, check_disjoint, leaked, split_table
from pipeline.evaluation import leaks
from pipeline.features.extract import BlockWriter, ShardOptions
from pipeline.inference.predictor import Predictor, ScoreOptions
from pipeline.models.bundle import Bundle
from pipeline.scoring.predictions import read_predictions
from pipeline.scoring.scoring import Execution, score_manifest
from pipeline.storage.errors import AudioError
from pipeline.training.results import training_table

RATE_HZ = 16_000
CUTS = ((0.0, 3.0), (3.0, 6.0), (5.5, 8.25))
WriteAudio = Callable[..., Path]


@pytest.fixture
def long(write_audio: WriteAudio, speech_like: Callable[..., Any]) -> Path:
    """9 s of three voices, long.wav."""
    voices = [speech_like(f0_hz=f0, duration_s=3.0, seed=f0) for f0 in (100, 200, 350)]
    return write_audio("long.wav", samples=np.concatenate(voices))


@pytest.fixture
def cut(long: Path) -> list[Path]:
    """CUTS as files of their own."""
    samples, _ = soundfile.read(long, dtype="int16")
    paths = [long.with_name(f"cut{i}.wav") for i in range(len(CUTS))]
    for path, (start, end) in zip(paths, CUTS, strict=True):
        soundfile.write(path, samples[round(start * RATE_HZ) : round(end * RATE_HZ)], RATE_HZ)
    return paths


def rows(path: Path, cuts: Any = CUTS, **columns: Any) -> pd.DataFrame:
    starts, ends = zip(*cuts, strict=True)
    table = pd.DataFrame({"speech": [str(path)] * len(starts), "start": starts, "end": ends, **columns})
    return from_dataframe(table, require_labels=False)


def test_a_segment_is_read_as_the_file_cut_out_there(long: Path, cut: list[Path]) -> None:
    for path, place in zip(cut, CUTS, strict=True):
        segment = Segment(str(long), *place)
        assert content_hash(segment) == content_hash(path)
        assert probe(segment) == probe(path)
        for read in (load_middle, load, lambda source: load(source, start_s=0.5, duration_s=1.0)):
            np.testing.assert_array_equal(read(segment).samples, read(path).samples)
        once, alone = load_once(segment, windows_s=[2.0, 6.0]), load_once(path, windows_s=[2.0, 6.0])
        assert once.content_hash == alone.content_hash
        np.testing.assert_array_equal(once.clips[1].samples, alone.clips[1].samples)
    apart = decode_in_subprocess(Segment(str(long), *CUTS[1]), decode=load_middle)
    np.testing.assert_array_equal(apart.samples, load_middle(cut[1]).samples)
    assert probe(Segment(str(long), 8.0, 9.3)).duration_s == pytest.approx(1.0)  # an end that was rounded up


@pytest.mark.parametrize("window_s", [None, 1.0])
def test_scores_are_those_of_the_files_cut_out(
    tiny_bundle: Bundle, long: Path, cut: list[Path], tmp_path: Path, in_this_process: None, window_s: float | None
) -> None:
    def scored(manifest: pd.DataFrame, name: str) -> pd.DataFrame:
        options = ScoreOptions(window_s=window_s)
        where, how = tmp_path / name, Execution(num_cpus=0)
        score_manifest(manifest, where, weights=tiny_bundle.folder, options=options, execution=how, report=False)
        return read_predictions(where)

    whole = pd.DataFrame({"speech": [str(long)], "start": [""], "end": [""]})
    found = scored(from_dataframe(pd.concat([rows(long), whole]), require_labels=False), "segments")
    alone = scored(pd.DataFrame({"speech": [*map(str, cut), str(long)]}), "files")
    pd.testing.assert_frame_equal(found[alone.columns.drop("speech")], alone.drop(columns="speech"))
    assert list(found.columns[-2:]) == ["segment_start_s", "segment_end_s"]
    if window_s is None:
        again = read_manifest(tmp_path / "segments" / "predictions.csv", require_labels=False)
        np.testing.assert_array_equal(bounds(again), bounds(found))
        return
    windows = pd.read_parquet(tmp_path / "segments" / "segments.parquet")
    assert windows.groupby("row")["start_s"].min().tolist() == [0.0, 3.0, 5.5, 0.0]
    assert windows.groupby("row")["end_s"].max().tolist() == [3.0, 6.0, 8.25, 9.0]
    told: list[str] = []
    asked = read_manifest(tmp_path / "segments" / "segments.csv", require_labels=False, tell=told.append)
    assert "segment_start_s" not in asked.columns
    assert "no segments" in told[0]


def test_features_are_those_of_files_cut_out(tiny_bundle: Bundle, long: Path, cut: list[Path], tmp_path: Path) -> None:
    tables = []
    for number, manifest in enumerate((rows(long), pd.DataFrame({"speech": list(map(str, cut))}))):
        schema = pa.Schema.from_pandas(manifest, preserve_index=False)
        write = BlockWriter(tmp_path, schema, tiny_bundle.features, ShardOptions())
        write(manifest.assign(_block=number, _row=range(len(manifest))))
        tables.append(pq.read_table(tmp_path / f"part-{number:05d}.parquet"))
    for name in ("content_hash", "log_mel", "mel_power", "status"):
        assert tables[0][name].to_pylist() == tables[1][name].to_pylist()


@pytest.mark.parametrize(
    ("columns", "first", "second"),
    [
        ({"start_s": ["1.5", "2"], "end_s": ["3", ""]}, (1.5, 3.0), (2.0, np.inf)),
        ({"StartTime": ["00:16:16,059", "0:01"], "EndTime": ["00:16:21.7", "1:02:03"]}, (976.059, 981.7), (1, 3723)),
        ({"Start": ["1,5", "2,0"], "End": ["3,0", "4,25"]}, (1.5, 3.0), (2.0, 4.25)),
        ({"start": pd.to_timedelta([1.5, 2], "s"), "end": pd.to_timedelta([3, None], "s")}, (1.5, 3.0), (2.0, np.inf)),
        ({"start": ["0 days 00:00:01.500000", "P0DT0H0M2S"], "end": ["3s", "NaT"]}, (1.5, 3.0), (2.0, np.inf)),
        ({"start_ms": [1500, 2000], "end_ms": [3000, 4250]}, (1.5, 3.0), (2.0, 4.25)),
        ({"offset": [1.5, 2.0], "duration": [1.5, 2.25]}, (1.5, 3.0), (2.0, 4.25)),
        ({"onset": [1.5, 2.0], "offset": [3.0, 4.25]}, (1.5, 3.0), (2.0, 4.25)),
        ({"start": [np.nan, ""], "end": ["3", "nan"]}, (0.0, 3.0), (0.0, np.inf)),
    ],
)
def test_times_as_people_and_programs_write_them(columns: Any, first: Any, second: Any) -> None:
    told: list[str] = []
    given = pd.DataFrame({"file": ["/a.wav", "/b.wav"], **columns})
    found = from_dataframe(given, require_labels=False, tell=told.append)
    assert list(zip(*bounds(found), strict=True)) == [pytest.approx(first), pytest.approx(second)]
    assert "of 2 rows" in told[0]
    pd.testing.assert_frame_equal(found[list(columns)], given[list(columns)])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"start": ["2026-01-05 10:03:22"], "end": ["2026-01-05 10:04:00"]}, "holds dates"),
        ({"start": ["3"]}, "start alone"),
        ({"start_s": ["3"], "end_s": ["5"], "predicted": ["sad"], "confidence": ["0.5"]}, "select no segments"),
        ({"duration": ["3"]}, ""),
        ({"start": [""], "end": [""]}, ""),
    ],
)
def test_what_selects_nothing_is_said(columns: Any, said: str) -> None:
    told: list[str] = []
    found = from_dataframe(pd.DataFrame({"speech": ["/a.wav"], **columns}), require_labels=False, tell=told.append)
    assert list(found.columns) == ["speech", *columns]
    assert said in "".join(told)


@pytest.mark.parametrize("cell", ["three", "3 5", "1-2", "True"])
def test_a_cell_that_is_no_time_is_one_line(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "m.csv"
    path.write_text(f"speech,start,end\na.wav,0,1\nb.wav,{cell},9\n")
    with pytest.raises(ManifestError, match=f"line 3, column start: '{cell}' is not a time"):
        read_manifest(path, require_labels=False)


def test_what_is_no_part_of_the_recording_is_a_row_with_a_status(tiny_bundle: Bundle, long: Path) -> None:
    inf = float("inf")
    empty = [(3.0, 1.0), (-1.0, 1.0), (2.0, 2.0)]
    outside = [(9.0, 10.0), (700.0, 710.0), (8.0, 12.0), (inf, inf)]
    segments = [Segment(str(long), *place) for place in (*empty, *outside)]
    for segment in segments:
        complaint = "0 <= start < end" if (segment.start_s, segment.end_s) in empty else "belong to this recording"
        with pytest.raises(AudioError, match=complaint) as caught:
            probe(segment)
        assert caught.value.code == "no_such_segment"
    found = Predictor.from_bundle(tiny_bundle.folder, threads=1).predict(segments)
    assert [(row.status, row.predicted) for row in found] == [("no_such_segment", None)] * len(segments)
    assert not any("\n" in str(row.error) for row in found)


def test_ids_hashes_and_order_are_those_of_segments(long: Path, cut: list[Path]) -> None:
    table = add_hashes(rows(long))
    assert ids(table).tolist() == ["long (0-3 s)", "long (3-6 s)", "long (5.5-8.25 s)"]
    assert table["content_hash"].tolist() == [content_hash(path) for path in cut]
    assert set(table["recording_hash"]) == {content_hash(long)}
    assert "recording_hash" not in add_hashes(pd.DataFrame({"speech": [str(long)]}))


def test_segments_that_share_sound_never_fall_on_two_sides(long: Path, write_audio: WriteAudio) -> None:
    places = [(i * 0.4, i * 0.4 + 0.5) for i in range(20)]  # a chain, but for where it is broken
    broken = [place for i, place in enumerate(places) if i % 5]
    table = add_hashes(rows(long, broken, label=["sad", "calm"] * (len(broken) // 2)))
    copy = write_audio("copy.wav", samples=soundfile.read(long, dtype="float32")[0])
    both = pd.concat([table.drop(columns="recording_hash"), rows(copy, broken, label="sad")], ignore_index=True)
    for given in (table, add_hashes(both)):
        parts = split_table(given, test_size=0.4, inner_val=0)
        check_disjoint(parts)
        train, test = (set(np.floor(parts[name]["segment_start_s"] / 2.0)) for name in ("train", "test"))
        assert train
        assert test
        assert not train & test
    with pytest.raises(ManifestError, match="the same recording"):
        check_disjoint({"train": table.iloc[:1], "test": table.iloc[1:2]})


def test_the_leak_check_knows_segments_their_recordings_and_what_overlaps(long: Path, cut: list[Path]) -> None:
    training = training_table({"train": add_hashes(rows(long, [(0.0, 3.0)]))})
    assert set(training.columns) >= {"recording_hash", "segment_start_s", "segment_end_s"}
    training = pd.read_csv(io.StringIO(training.to_csv(index=False)), dtype=str, keep_default_na=False)
    asked = rows(long, [(0.0, 3.0), (2.5, 5.0), (3.0, 6.0), ("", "")])
    files = pd.DataFrame({"speech": [*map(str, cut), str(long)]})
    assert leaked(add_hashes(asked), training).tolist() == [True, True, False, True]
    assert leaked(add_hashes(files), training).tolist() == [True, False, False, True]
    found = leaks.find(asked, training)
    assert (found.mask.tolist(), found.partly) == ([True, True, False, True], 2)
    by_whole = leaks.find(asked, training_table({"train": add_hashes(files[-1:])}))
    assert (by_whole.mask.tolist(), by_whole.partly) == ([True] * 4, 3)
