"""The folder of an extraction: one at a time, changed recordings, damaged parts, columns and options. Without Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import shards
from pipeline.arrays import ShardError, load_features
from pipeline.errors import SerError
from pipeline.features import FeatureConfig
from pipeline.shards import NOTES, BlockWriter, ShardOptions, extract_shards

CONFIG = FeatureConfig()
NO_POWER, ONE_EACH = ShardOptions(mel_power_s=0), ShardOptions(mel_power_s=0, block_rows=1)
OURS = ("row_id", "status", "error", "log_mel", "_row", "_block")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block after the other, by the workers' own code."""

    def run(blocks: list[pd.DataFrame], todo: list[int], write: BlockWriter) -> Iterator[tuple[int, int, int]]:
        for i in todo:
            first = int(blocks[i].index[0])
            written, bad = write(blocks[i].assign(_block=i, _row=range(first, first + len(blocks[i]))))
            yield len(blocks[i]), written, bad

    monkeypatch.setattr(shards, "_run_blocks", run)


@pytest.fixture
def recordings(write_audio: Callable[..., Path]) -> pd.DataFrame:
    """Four of 0.5 s."""
    paths = [str(write_audio(f"audio/{i}.wav", duration_s=0.5, seed=i)) for i in range(4)]
    return pd.DataFrame({"speech": paths, "label": ["calm", "sad"] * 2})


def read_parts(folder: Path) -> pd.DataFrame:
    return pd.concat([pq.read_table(p).to_pandas() for p in sorted(folder.glob("part-*.parquet"))], ignore_index=True)


def test_two_extractions_into_one_folder_do_not_mix(recordings: pd.DataFrame, tmp_path: Path) -> None:
    out, refused = tmp_path / "out", []

    def meanwhile(*_: int) -> None:
        for table, overwrite in ((recordings.iloc[:3], False), (recordings.iloc[3:], True)):
            with pytest.raises(SerError, match=r"another process is extracting into .*; wait for it") as caught:
                extract_shards(table, out, CONFIG, options=ONE_EACH, overwrite=overwrite)
            refused.append(str(caught.value))

    assert extract_shards(recordings.iloc[:3], out, CONFIG, options=ONE_EACH, on_progress=meanwhile).rows == 3
    assert len(refused) == 6
    assert read_parts(out)["speech"].tolist() == recordings["speech"].tolist()[:3]


def test_what_still_runs_of_a_killed_extraction_writes_nothing(recordings: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / NOTES).mkdir()
    rows = recordings.iloc[:1].assign(_block=0, _row=0)
    write = BlockWriter(
        tmp_path, pa.Schema.from_pandas(recordings, preserve_index=False), CONFIG, NO_POWER, run="first"
    )
    (tmp_path / NOTES / "run").write_text("first")
    write(rows)
    (tmp_path / "part-00000.parquet").unlink()
    (tmp_path / NOTES / "run").write_text("second")
    with pytest.raises(ShardError, match="taken over"):
        write(rows)
    assert not list(tmp_path.glob("*part*"))


def test_changed_recordings_are_refused_and_those_that_are_gone_are_not(
    recordings: pd.DataFrame, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first, second, third = (Path(path) for path in recordings["speech"][:3])
    whole = first.read_bytes()
    first.write_bytes(whole[:44])
    assert extract_shards(recordings, out, CONFIG, options=ONE_EACH).failed == 1
    assert extract_shards(recordings, out, CONFIG, options=ONE_EACH).reused == 4
    second.unlink()
    assert extract_shards(recordings, out, CONFIG, options=ONE_EACH).reused == 4
    first.write_bytes(whole)
    with pytest.raises(ShardError, match=f"features of {first}, which changed since; give --overwrite") as caught:
        extract_shards(recordings, out, CONFIG, options=ONE_EACH)
    assert "\n" not in str(caught.value)
    os.utime(third, ns=(0, 1))
    with pytest.raises(ShardError, match=f"{first} and 1 more"):
        extract_shards(recordings, out, CONFIG, options=ONE_EACH)
    assert extract_shards(recordings, out, CONFIG, options=ONE_EACH, overwrite=True).failed == 1
    assert read_parts(out)["status"].tolist() == ["ok", "not_found", "ok", "ok"]
    (out / "manifest.json").unlink()
    (out / "part-00002.parquet").unlink()
    os.utime(third, ns=(0, 2))  # its part is to be made now
    assert extract_shards(recordings, out, CONFIG, options=ONE_EACH).reused == 3
    os.utime(third, ns=(0, 3))
    with pytest.raises(ShardError, match=f"{third}"):
        extract_shards(recordings, out, CONFIG, options=ONE_EACH)
    (out / "stamps.npy").unlink()  # as folders were made before
    assert extract_shards(recordings, out, CONFIG, options=ONE_EACH).reused == 4


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more"])
def test_a_damaged_part_is_done_again(recordings: pd.DataFrame, tmp_path: Path, content: bytes) -> None:
    out = tmp_path / "out"
    extract_shards(recordings, out, CONFIG, options=ONE_EACH)
    (out / "manifest.json").unlink()
    (out / "part-00002.parquet").write_bytes(content)
    assert extract_shards(recordings, out, CONFIG, options=ONE_EACH).reused == 3
    assert read_parts(out)["status"].eq("ok").all()


def test_attempts_that_died_with_other_starts_do_not_count(recordings: pd.DataFrame, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract_shards(recordings, out, CONFIG, options=NO_POWER)
    for path in (out / "manifest.json", out / "part-00000.parquet"):
        path.unlink()
    (out / NOTES).mkdir()
    for attempt in range(21):
        for run in ("", "killed"):
            (out / NOTES / f"000000.{run}.{attempt}").write_bytes((1).to_bytes(8, "little"))
    assert extract_shards(recordings, out, CONFIG, options=NO_POWER).failed == 0
    assert not (out / NOTES).exists()


def test_columns_of_our_names_are_kept(recordings: pd.DataFrame, tmp_path: Path) -> None:
    given = recordings.assign(status="kept", in_status="too", error="e", row_id="r", log_mel="l", _row="7", _block="8")
    extract_shards(given, tmp_path / "out", CONFIG, options=NO_POWER)
    table = load_features(tmp_path / "out").table
    assert table["status"].eq("ok").all()
    for name, values in given.items():
        found = table["in_in_status" if name == "in_status" else f"in_{name}" if name in OURS else str(name)]
        assert found.tolist() == values.tolist()


def test_mel_power_holds_the_window_at_least(recordings: pd.DataFrame, tmp_path: Path) -> None:
    options = ShardOptions(mel_power_s=1.0, pitch_semitones=(1.0,))
    assert extract_shards(recordings.iloc[:1], tmp_path / "out", CONFIG, options=options).rows == 2
    assert load_features(tmp_path / "out").n_frames.tolist() == [CONFIG.n_frames] * 2


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"block_rows": 0}, "block_rows must be 1 or more, got 0"),
        ({"block_rows": -5}, "block_rows must be 1 or more, got -5"),
        ({"mel_power_s": float("nan")}, "mel_power_s must be .* got nan"),
        ({"mel_power_s": float("inf")}, "mel_power_s must be .* got inf"),
        ({"mel_power_s": -1.0}, "mel_power_s must be .* got -1"),
        ({"pitch_semitones": (float("nan"),)}, "finite"),
        ({"pitch_semitones": (1.0,), "mel_power_s": 0.0}, "give --mel_power_s 6, or no --pitch_semitones"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ShardError, match=complaint):
        ShardOptions(**options)


def test_what_cannot_be_extracted_there_is_refused(recordings: pd.DataFrame, tmp_path: Path) -> None:
    frames, options = FeatureConfig(kind="frame_features"), ShardOptions(pitch_semitones=(1.0,))
    with pytest.raises(ShardError, match="not of frame_features"):
        extract_shards(recordings, tmp_path / "out", frames, options=options)
    (tmp_path / "file").touch()
    with pytest.raises(SerError, match="choose another --out"):
        extract_shards(recordings, tmp_path / "file" / "out", CONFIG)
