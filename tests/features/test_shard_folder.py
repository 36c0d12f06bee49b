"""The folder of an extraction: one at a time, changed recordings, damaged parts, columns and options. Without Ray."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.audio.load import content_hash
from pipeline.cluster import engine, runtime
from pipeline.data import splits
from pipeline.features.extract import BlockWriter, ShardOptions, ShardSummary, extract_shards
from pipeline.features.features import FeatureConfig
from pipeline.features.store import NOTES, ShardError, known_hashes, load_features
from pipeline.storage.errors import SerError
from pipeline.storage.files import stamps_of

pytestmark = pytest.mark.usefixtures("in_this_process")
CONFIG = FeatureConfig()
NO_POWER, ONE_EACH = ShardOptions(mel_power_s=0), ShardOptions(mel_power_s=0, block_rows=1)
OURS = ("row_id", "status", "error", "log_mel", "_row", "_block")


@pytest.fixture
def recordings(write_audio: Callable[..., Path]) -> pd.DataFrame:
    """Four of 0.5 s."""
    paths = [str(write_audio(f"audio/{i}.wav", duration_s=0.5, seed=i)) for i in range(4)]
    return pd.DataFrame({"speech": paths, "label": ["calm", "sad"] * 2})


def read_parts(folder: Path) -> pd.DataFrame:
    return pd.concat([pq.read_table(p).to_pandas() for p in sorted(folder.glob("part-*.parquet"))], ignore_index=True)


@contextmanager
def no_file_above(size_bytes: int) -> Iterator[None]:
    """A disk that is too small for the larger files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_two_extractions_into_one_folder_do_not_mix(recordings: pd.DataFrame, tmp_path: Path) -> None:
    out, refused = tmp_path / "out", []

    def meanwhile(*_: int) -> None:
        for table, overwrite in ((recordings.iloc[:3], False), (recordings.iloc[3:], True)):
            with pytest.raises(SerError, match="another process") as caught:
                extract_shards(table, out, CONFIG, options=ONE_EACH, overwrite=overwrite)
            refused.append(str(caught.value))

    assert extract_shards(recordings.iloc[:3], out, CONFIG, options=ONE_EACH, on_progress=meanwhile).rows == 3
    assert len(refused) == 6
    assert read_parts(out)["speech"].tolist() == recordings["speech"].tolist()[:3]


def test_what_still_runs_of_a_killed_extraction_writes_nothing(recordings: pd.DataFrame, tmp_path: Path) -> None:
    notes, schema = tmp_path / NOTES / "run", pa.Schema.from_pandas(recordings, preserve_index=False)
    notes.parent.mkdir()
    rows = recordings.iloc[:1].assign(_block=0, _row=0)
    write = BlockWriter(tmp_path, schema, CONFIG, NO_POWER, run="first")
    notes.write_text("first")
    write(rows)
    (tmp_path / "part-00000.parquet").unlink()
    notes.write_text("second")
    with pytest.raises(ShardError, match="taken over"):
        write(rows)
    assert not list(tmp_path.glob("*part*"))


def test_changed_recordings_are_refused_and_those_that_are_gone_are_not(
    recordings: pd.DataFrame, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first, second, third = (Path(path) for path in recordings["speech"][:3])
    whole = first.read_bytes()

    def again(**more: Any) -> ShardSummary:
        return extract_shards(recordings, out, CONFIG, options=ONE_EACH, **more)

    def refused(reason: str) -> None:
        with pytest.raises(ShardError, match=reason) as caught:
            again()
        assert "\n" not in str(caught.value)

    first.write_bytes(whole[:44])
    assert again().failed == 1
    assert again().reused == 4
    second.unlink()
    assert again().reused == 4
    first.write_bytes(whole)
    refused(f"{first}")
    os.utime(third, ns=(0, 1))
    refused(f"{first} and 1 more")
    assert again(overwrite=True).failed == 1
    assert read_parts(out)["status"].tolist() == ["ok", "not_found", "ok", "ok"]
    (out / "manifest.json").unlink()
    (out / "part-00002.parquet").unlink()
    os.utime(third, ns=(0, 2))  # its part is to be made now
    assert again().reused == 3
    os.utime(third, ns=(0, 3))
    refused(f"{third}")
    (out / "stamps.npy").unlink()  # as folders were made before
    assert again().reused == 4


def test_a_recording_of_a_year_that_is_no_64_bit_number_has_a_stamp(write_audio: Callable[..., Path]) -> None:
    path = write_audio("a.wav")
    os.utime(path, ns=(0, 2**63 + 1))
    if path.stat().st_mtime_ns < 2**63:
        pytest.skip("this file system knows no such year")
    assert stamps_of([str(path)]).tolist() == [[path.stat().st_size, 2**63 - 1]]


def test_a_damaged_part_is_done_again(recordings: pd.DataFrame, tmp_path: Path) -> None:
    out = tmp_path / "out"
    part, paths = out / "part-00002.parquet", [Path(path) for path in recordings["speech"]]
    extract_shards(recordings, out, CONFIG, options=ONE_EACH)
    for content in (b"", b"PAR1 and no more"):
        (out / "manifest.json").unlink()
        part.write_bytes(content)
        assert extract_shards(recordings, out, CONFIG, options=ONE_EACH).reused == 3
        assert read_parts(out)["status"].eq("ok").all()
    before = load_features(out).features[2].copy()
    for path in (out / "manifest.json", part):
        path.unlink()
    paths[2].write_bytes(paths[3].read_bytes())
    extract_shards(recordings, out, CONFIG, options=ONE_EACH)
    features = load_features(out).features
    assert (features[2] == features[3]).all()
    assert (features[2] != before).any()


def test_a_damaged_part_of_a_finished_folder_is_told_in_one_line(recordings: pd.DataFrame, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract_shards(recordings, out, CONFIG, options=ONE_EACH)
    part = out / "part-00002.parquet"
    whole = part.read_bytes()
    middle = len(whole) // 2
    for content in (b"", b"PAR1 and no more", whole[:middle] + bytes(64) + whole[middle + 64 :]):
        part.write_bytes(content)
        with pytest.raises(ShardError, match=r"part-00002.parquet is damaged .*--overwrite") as told:
            load_features(out)
        assert "\n" not in str(told.value)
        assert not list(out.glob("*arrays*"))


def test_damaged_arrays_are_told_and_made_anew(recordings: pd.DataFrame, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract_shards(recordings, out, CONFIG, options=ShardOptions(mel_power_s=2.0))
    for name in ("table.parquet", "features.npy", "mel_power.npy"):
        loaded = load_features(out)
        assert loaded.mel_power is not None
        assert len(loaded.features) == 4
        (cache,) = out.glob("arrays-*")
        (cache / name).write_bytes((cache / name).read_bytes()[:300])
        with pytest.raises(ShardError, match=cache.name):
            load_features(out)
        shutil.rmtree(cache)


def test_a_full_disk_is_told_and_the_same_command_goes_on(recordings: pd.DataFrame, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with no_file_above(100), pytest.raises(OSError, match="File too large"):
        extract_shards(pd.concat([recordings] * 2), out, CONFIG, options=ONE_EACH)
    with no_file_above(2_000), pytest.raises(ShardError, match=r"cannot write .*part-00000.parquet: .*free some"):
        extract_shards(recordings, out, CONFIG, options=ONE_EACH)
    assert extract_shards(recordings, out, CONFIG, options=ONE_EACH).failed == 0
    with no_file_above(100_000), pytest.raises(ShardError, match=r"cannot write .*arrays-.*File too large; free some"):
        load_features(out)
    assert not list(out.glob("*arrays*"))
    assert len(load_features(out).features) == 4


def test_what_a_task_refuses_ends_the_job_in_one_line(
    recordings: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dataset:
        """As Ray Data, in this process."""

        def __init__(self, items: list[dict[str, Any]], **_: int) -> None:
            self.items = items

        def map_batches(self, work: Callable[[pa.Table], pa.Table], **_: Any) -> Dataset:
            self.items = [row for item in self.items for row in work(pa.Table.from_pylist([item])).to_pylist()]
            return self

        def iter_rows(self) -> Iterator[dict[str, Any]]:
            return iter(self.items)

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(data=SimpleNamespace(from_items=Dataset)))
    monkeypatch.setattr(engine, "check_nodes", lambda *_, **__: None)
    for name in ("start_ray", "data_context", "task_pool"):
        monkeypatch.setattr(runtime, name, lambda *_: None)
    with no_file_above(2_000), pytest.raises(ShardError, match=r"^cannot write \S+part-00000.parquet"):
        extract_shards(recordings, tmp_path / "out", CONFIG, options=ONE_EACH, engine="ray")
    assert extract_shards(recordings, tmp_path / "out", CONFIG, options=ONE_EACH, engine="ray").rows == 4


def test_training_runs_and_files_of_others_are_left_alone(recordings: pd.DataFrame, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    (run / "plan.json").write_text('{"version": 1, "features": "out"}')  # as ser train writes it
    (run / "run.pt").touch()
    for overwrite in (False, True):
        with pytest.raises(ShardError, match="no feature shards"):
            extract_shards(recordings, run, CONFIG, options=NO_POWER, overwrite=overwrite)
    assert sorted(path.name for path in run.iterdir()) == ["plan.json", "run.pt"]
    extract_shards(recordings, out, CONFIG, options=ONE_EACH)
    load_features(out)
    (out / "runs").mkdir()
    (out / "runs" / "notes.txt").touch()
    extract_shards(recordings.iloc[:3], out, CONFIG, options=ONE_EACH, overwrite=True)
    assert (out / "runs" / "notes.txt").is_file()
    assert len(list(out.glob("part-*"))) == len(load_features(out).features) == 3
    assert len(list(out.glob("arrays-*"))) == 1


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
    ("options", "word"),
    [
        *(({"block_rows": rows}, "block_rows") for rows in (0, -5)),
        *(({"mel_power_s": seconds}, "mel_power_s") for seconds in (float("nan"), float("inf"), 121.0, -1.0)),
        ({"pitch_semitones": (float("nan"),)}, "finite"),
        ({"pitch_semitones": (1.0,), "mel_power_s": 0.0}, "--mel_power_s 6"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ShardError, match=word):
        ShardOptions(**options)


def test_what_cannot_be_extracted_there_is_refused(recordings: pd.DataFrame, tmp_path: Path) -> None:
    frames, options = FeatureConfig(kind="frame_features"), ShardOptions(pitch_semitones=(1.0,))
    with pytest.raises(ShardError, match="got frame_features"):
        extract_shards(recordings, tmp_path / "out", frames, options=options)
    (tmp_path / "file").touch()
    with pytest.raises(SerError, match="choose another --out"):
        extract_shards(recordings, tmp_path / "file" / "out", CONFIG)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The recordings that are decoded for their hash alone."""
    paths: list[str] = []
    monkeypatch.setattr(splits, "content_hash", lambda path: paths.append(path) or content_hash(path))
    return paths


def hashed(*folders: Path) -> list[str]:
    """Content hashes of the recordings of feature folders, as a training has them."""
    table = load_features(folders).table
    return list(splits.add_hashes(table, known=known_hashes(folders, table))["content_hash"])


def test_content_hashes_are_those_of_the_shards_until_a_recording_changes(
    recordings: pd.DataFrame, tmp_path: Path, decoded: list[str]
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    paths = [Path(path) for path in recordings["speech"]]
    given = pd.concat([recordings.iloc[:1].assign(speech=str(tmp_path / "none.wav")), recordings], ignore_index=True)
    extract_shards(given, out, CONFIG, options=NO_POWER)
    extract_shards(recordings.iloc[[2]], other, CONFIG, options=NO_POWER)
    a, b, c, d = (content_hash(path) for path in paths)
    assert read_parts(out)["content_hash"].tolist() == ["", a, b, c, d]
    assert hashed(out) == [a, b, c, d]
    assert hashed(other, out) == [c, a, b, c, d]
    assert decoded == []

    os.utime(paths[0], ns=(0, 1))
    paths[1].write_bytes(paths[3].read_bytes())
    paths[2].unlink()
    assert hashed(other, out) == [c, a, d, c, d]
    assert sorted(decoded) == [str(paths[0]), str(paths[1])]

    (out / "stamps.npy").unlink()
    assert hashed(out) == [a, d, c, d]
    assert sorted(decoded[2:]) == [str(paths[0]), str(paths[1]), str(paths[3])]


def test_hashes_that_came_with_a_manifest_are_not_heeded(
    recordings: pd.DataFrame, tmp_path: Path, decoded: list[str]
) -> None:
    out, given = tmp_path / "out", recordings.assign(content_hash="of others")
    paths = recordings["speech"].tolist()
    hashes = [content_hash(path) for path in paths]

    def are_found(*, by_decoding: list[str]) -> None:
        decoded.clear()
        assert hashed(out) == hashes
        assert sorted(decoded) == by_decoding

    extract_shards(given, out, CONFIG, options=ONE_EACH)
    are_found(by_decoding=[])
    assert load_features(out).table["in_content_hash"].eq("of others").all()

    plan = CONFIG.fingerprint() + json.dumps(asdict(ONE_EACH), sort_keys=True) + given.to_csv(index=False)
    begun = hashlib.sha256(plan.encode()).hexdigest()[:16]  # as it was before shards had hashes
    assert json.loads((out / "plan.json").read_text())["plan"] == begun
    for path in out.glob("part-*"):
        part = pq.read_table(path).drop_columns("content_hash")
        pq.write_table(part.rename_columns({"in_content_hash": "content_hash"}), path)
    shutil.rmtree(out / f"arrays-{begun}")
    assert "content_hash" not in load_features(out).table
    are_found(by_decoding=paths)

    cached = out / f"arrays-{begun}" / "table.parquet"
    table = pd.read_parquet(cached)
    table.insert(0, "content_hash", "of others")
    table.to_parquet(cached)  # as it was made then
    are_found(by_decoding=paths)

    for name in ("manifest.json", "part-00002.parquet"):
        (out / name).unlink()
    assert extract_shards(given, out, CONFIG, options=ONE_EACH).reused == 3
    are_found(by_decoding=[*paths[:2], paths[3]])
