"""Extraction to Parquet shards and reading them back: rows, order, content, resume, refusals."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import soundfile as sf

from pipeline.audio.load import Reading, load_middle, load_once
from pipeline.features import extract as shards
from pipeline.features import store
from pipeline.features.extract import BlockWriter, ShardOptions, ShardSummary, extract_shards
from pipeline.features.features import FeatureConfig, extract, normalise_power
from pipeline.features.store import NOTES, ShardError, load_features
from pipeline.storage.errors import DecoderCrashed

CONFIG = FeatureConfig()
FOURS = ShardOptions(block_rows=4)
Extracted = tuple[Path, ShardSummary, list[tuple[int, int, int]]]
RAY = pytest.mark.usefixtures("ray_session")
HERE = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Nine good recordings of several lengths and rates, and ten broken ones, mixed."""
    rng = np.random.default_rng(7)
    folder = tmp_path_factory.mktemp("audio")
    rows = []
    for i in range(9):
        rate = (48_000, 44_100, 16_000)[i % 3]
        path = folder / f"good{i}.wav"
        sf.write(path, 0.1 * rng.standard_normal(int(rate * (0.5 + 0.4 * i))), rate)
        rows.append({"speech": str(path), "label": ("calm", "sad")[i % 2], "note": None if i else "first"})
    whole = (folder / "good8.wav").read_bytes()
    broken = {
        "text.wav": b"this is no audio at all",
        "empty.wav": b"",
        "header.wav": whole[:44],
        "cut.wav": whole[: len(whole) // 2],
        "png.wav": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "zeros.wav": bytes(1000),
        "text.flac": b"fLaC" + bytes(30),
        "rate.wav": whole[:24] + b"\xff\xff\xff\xff" + whole[28:],
    }
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    for name in [*broken, "missing.wav", "folder.wav"]:
        rows.append({"speech": str(folder / name), "label": "calm", "note": None})
    (folder / "folder.wav").mkdir()
    return pd.DataFrame(rows).sample(frac=1, random_state=0).reset_index(drop=True)


def read_parts(folder: Path) -> pd.DataFrame:
    return pd.concat([pq.read_table(p).to_pandas() for p in sorted(folder.glob("part-*.parquet"))], ignore_index=True)


@pytest.fixture(scope="module")
def extracted(manifest: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Extracted:
    """All of the recordings, in blocks of four, in this process. Do not change the folder: take a copy."""
    out, seen = tmp_path_factory.mktemp("extracted") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "in_processes", lambda items, work, _, **__: map(work, items))
        summary = extract_shards(manifest, out, CONFIG, options=FOURS, on_progress=lambda *now: seen.append(now))
    return out, summary, seen


@pytest.fixture
def copied(extracted: Extracted, tmp_path: Path) -> Path:
    """The folder once more, to be changed."""
    return Path(shutil.copytree(extracted[0], tmp_path / "out"))


def test_rows_out_equal_rows_in_with_reasons(manifest: pd.DataFrame, extracted: Extracted) -> None:
    out, summary, seen = extracted
    rows = read_parts(out)
    assert rows["speech"].tolist() == manifest["speech"].tolist()
    assert summary.rows == len(rows) == 19
    failed = rows[rows["status"] != "ok"]
    assert summary.failed == len(failed) == 10
    assert not failed["speech"].str.contains("good").any()
    assert (failed["error"].str.len() > 0).all()
    assert seen[-1] == (19, 19, 10)


@RAY
def test_both_engines_write_the_same_shards(manifest: pd.DataFrame, extracted: Extracted, tmp_path: Path) -> None:
    extract_shards(manifest, tmp_path, CONFIG, options=FOURS, engine="ray")
    for part in sorted(tmp_path.glob("part-*.parquet")):
        assert pq.read_table(part).equals(pq.read_table(extracted[0] / part.name))
    plans = [json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path, extracted[0])]
    assert plans[0] == plans[1]


def test_features_come_back_exactly_and_in_order(manifest: pd.DataFrame, copied: Path) -> None:
    column = pq.read_table(copied / "part-00000.parquet")["log_mel"].combine_chunks()
    assert column.to_numpy_ndarray().shape == (4, 1, 64, 188), "plain PyArrow reads the shape"
    loaded = load_features(copied, CONFIG)
    good = manifest[manifest["speech"].str.contains("good")].reset_index(drop=True)
    pd.testing.assert_frame_equal(loaded.table[["speech", "label"]], good[["speech", "label"]])
    assert loaded.mel_power is not None
    for i, path in enumerate(good["speech"]):
        expected = extract(load_middle(path).samples, CONFIG)
        np.testing.assert_array_equal(loaded.features[i], expected)
        frames, duration_s = int(loaded.n_frames[i]), sf.info(path).duration
        assert frames == 1 + max(96_000, round(min(duration_s, 6.0) * 48_000)) // 512
        assert not loaded.mel_power[i, :, frames:].any()
        if duration_s <= 2:
            np.testing.assert_allclose(normalise_power(loaded.mel_power[i, :, :188], CONFIG), expected, atol=1e-4)


@HERE
def test_the_window_with_most_speech_is_extracted_and_stands_in_the_middle_of_what_is_kept(
    write_audio: Callable[..., Path], speech_like: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    voice = speech_like(duration_s=1.0, sample_rate_hz=48_000)
    paths = []
    for number, silent_s in enumerate([(1.0, 10.0), (6.0, 5.0), (0.1, 3.0), (8.0, 0.0), (0.2, 0.2)]):
        samples = np.pad(voice, [round(s * 48_000) for s in silent_s])
        paths.append(str(write_audio(f"{number}.wav", samples=samples, sample_rate_hz=48_000)))
    config, out = replace(CONFIG, window="speech"), tmp_path / "out"
    options = ShardOptions(pitch_semitones=(0.0,))
    extract_shards(pd.DataFrame({"speech": paths, "label": "sad"}), out, config, options=options)
    loaded = load_features(out, config)
    assert loaded.mel_power is not None
    assert len(loaded.table) == 2 * len(paths)
    for row, path in enumerate(loaded.table["speech"]):
        expected = extract(load_middle(path, window="speech").samples, config)
        if not loaded.table["parent_id"][row]:
            np.testing.assert_array_equal(loaded.features[row], expected)
        first = (loaded.n_frames[row] - 188) // 2
        inner = normalise_power(loaded.mel_power[row, :, first : first + 188], config)
        assert np.corrcoef(inner.ravel(), expected.ravel())[0, 1] > 0.95
    with pytest.raises(ShardError, match="window speech, not middle"):
        load_features(out, CONFIG)


@HERE
def test_only_missing_parts_are_done_again(manifest: pd.DataFrame, copied: Path) -> None:
    before = read_parts(copied)
    assert extract_shards(manifest, copied, CONFIG, options=FOURS).reused == 5
    kept = (copied / "part-00000.parquet").stat().st_mtime_ns
    (copied / "manifest.json").unlink()
    (copied / "part-00003.parquet").unlink()
    (copied / ".part-00003.parquet.1.tmp").write_bytes(b"half written")
    with pytest.raises(ShardError, match="did not finish"):
        load_features(copied)
    assert extract_shards(manifest, copied, CONFIG, options=FOURS).reused == 4
    assert (copied / "part-00000.parquet").stat().st_mtime_ns == kept
    after = read_parts(copied)
    assert after["row_id"].tolist() == before["row_id"].tolist()
    assert np.array_equal(np.stack(after["log_mel"]), np.stack(before["log_mel"]))


@HERE
def test_other_recordings_settings_or_folders_are_refused(manifest: pd.DataFrame, copied: Path, tmp_path: Path) -> None:
    for table, options in ((manifest.iloc[:4], FOURS), (manifest, ShardOptions(block_rows=4, mel_power_s=0))):
        with pytest.raises(ShardError, match="--overwrite"):
            extract_shards(table, copied, CONFIG, options=options)
    assert extract_shards(manifest.iloc[:4], copied, CONFIG, overwrite=True).rows == 4
    audio = Path(manifest["speech"][0]).parent
    with pytest.raises(ShardError, match="no feature shards"):
        extract_shards(manifest, audio, CONFIG, overwrite=True)
    assert (audio / "good0.wav").is_file()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ShardError, match="is a file"):
        extract_shards(manifest, tmp_path / "file", CONFIG)


@HERE
def test_frame_features_and_pitch_copies(manifest: pd.DataFrame, tmp_path: Path) -> None:
    good = manifest[manifest["speech"].str.contains("good[01]")]
    extract_shards(good, tmp_path / "frames", FeatureConfig(kind="frame_features"))
    loaded = load_features(tmp_path / "frames")
    assert loaded.features.shape == (2, 188, 190)
    assert loaded.mel_power is None
    copies, options = tmp_path / "copies", ShardOptions(pitch_semitones=(-1.0, 1.0), block_rows=1)
    assert extract_shards(good, copies, CONFIG, options=options).rows == 6
    for name in ("manifest.json", "part-00001.parquet"):
        (copies / name).unlink()
    told: list[tuple[int, int, int]] = []
    again = extract_shards(good, copies, CONFIG, options=options, on_progress=lambda *numbers: told.append(numbers))
    assert (again.rows, again.failed, again.reused, told) == (6, 0, 1, [(2, 2, 0)])
    assert store.read_shard_manifest(copies)["rows"] == 6
    table = load_features(copies).table
    assert table["row_id"].tolist() == ["0", "0-1", "0+1", "1", "1-1", "1+1"]
    assert table["parent_id"].tolist() == ["", "0", "0", "", "1", "1"]
    assert table["label"].tolist() == [label for label in good["label"] for _ in range(3)]


@HERE
def test_wrong_configuration_version_or_part_is_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="kind log_mel, not frame_features"):
        load_features(copied, FeatureConfig(kind="frame_features"))
    values = json.loads((copied / "manifest.json").read_text())
    for change in ({"version": 99}, {"parts": ["part-00009.parquet"]}, {"parts": None}):
        (copied / "manifest.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(ShardError):
            load_features(copied)
    with pytest.raises(ShardError, match="no feature folder"):
        load_features(tmp_path / "nowhere")
    table = pd.DataFrame({"speech": [str(tmp_path / "a.wav")], "label": ["sad"]})
    assert extract_shards(table, tmp_path / "empty", CONFIG).failed == 1
    with pytest.raises(ShardError, match="no readable recording"):
        load_features(tmp_path / "empty")
    assert store.read_shard_manifest(tmp_path / "empty")["rows"] == 1


class Crashing(BlockWriter):
    """Its decoder aborts the process at one recording, as C libraries do; in a process of its own, it says so."""

    def _rows(self, number: int, place: Sequence[Any], read: Callable[..., Reading]) -> list[dict[str, Any]]:
        if not place[0].endswith("good4.wav"):
            return super()._rows(number, place, read)
        if read is load_once:
            os.abort()

        def crash(*_: object, **__: object) -> Reading:
            raise DecoderCrashed("its decoder ended the process")

        return super()._rows(number, place, crash)


@RAY
@pytest.mark.parametrize("run", [shards._on_ray, shards._in_processes])
def test_a_decoder_that_kills_its_process_costs_one_row(
    run: Callable[..., Any], manifest: pd.DataFrame, tmp_path: Path
) -> None:
    good = manifest[manifest["speech"].str.contains("good")].sort_values("speech", ignore_index=True)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test
    out = tmp_path / "out"
    (out / NOTES).mkdir(parents=True)
    write = Crashing(out, pa.Schema.from_pandas(good, preserve_index=False), CONFIG, ShardOptions(mel_power_s=0))
    blocks = [good.iloc[i : i + 3] for i in (0, 3, 6)]
    assert sorted(run(blocks, [0, 1, 2], write, None)) == [(3, 3, 0), (3, 3, 0), (3, 3, 1)]
    rows = read_parts(out)
    assert rows["speech"].tolist() == good["speech"].tolist()
    assert rows["status"].tolist() == ["ok"] * 4 + ["decoder_crashed"] + ["ok"] * 4
