"""Objects as recordings: on a file system that Arrow knows, in the place of a store, so that no network is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from jobs import score
from pipeline.audio.load import content_hash
from pipeline.data.manifest import read_manifest
from pipeline.data.splits import add_hashes
from pipeline.evaluation import leaks
from pipeline.features.extract import BlockWriter, ShardOptions
from pipeline.features.features import FeatureConfig
from pipeline.inference.predictor import Predictor
from pipeline.models.bundle import Bundle
from pipeline.reporting import report
from pipeline.scoring.predictions import read_predictions
from pipeline.storage import files as remote
from pipeline.storage.errors import NotAFile, NotFound, SerError, TooLarge, Unreadable
from pipeline.storage.files import fetch, is_remote, scan_remote, stamp_of

WriteAudio = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in the place of the stores: its sub-folders are the buckets. Lists the stores asked for in ``asked``."""
    root = tmp_path / "store"
    (root / "calls").mkdir(parents=True)
    files = pyarrow.fs.SubTreeFileSystem(str(root), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr(remote, "_file_system", lambda _: files)
    fetch.cache_clear()
    yield root
    fetch.cache_clear()


def put(store: Path, key: str, content: bytes = b"content") -> str:
    (store / key).parent.mkdir(parents=True, exist_ok=True)
    (store / key).write_bytes(content)
    return f"s3://{key}"


@pytest.mark.parametrize("uri", ["s3://calls/a b.wav", "gs://calls/2024/ü#1 100%.wav", "s3://calls/why?.wav"])
def test_keys_are_taken_as_they_are(uri: str, store: Path) -> None:
    put(store, uri.partition("://")[2])
    assert is_remote(uri)
    assert fetch(uri) == b"content"
    assert stamp_of(uri)[0] == 7


def test_options_follow_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def opened(store: str) -> object:
        asked.append(store)
        raise SerError("not here")

    monkeypatch.setattr(remote, "_file_system", opened)
    with pytest.raises(Unreadable, match="not here"):
        fetch("s3://calls/a b?.wav?region=eu-west-1&scheme=http")
    assert asked == ["s3://calls?region=eu-west-1&scheme=http"]


@pytest.mark.parametrize(
    "text", ["/calls/a.wav", "file:///a.wav", "http://x/a.wav", "S3/calls/a.wav", "s3:/calls/a.wav"]
)
def test_other_paths_are_not_remote(text: str) -> None:
    assert not is_remote(text)


def test_what_cannot_be_fetched_has_a_code(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, "calls/folder/a.wav")
    with pytest.raises(NotFound, match="no such object"):
        fetch("s3://calls/gone.wav")
    with pytest.raises(NotAFile, match="a folder"):
        fetch("s3://calls/folder")
    monkeypatch.setattr(remote, "_LARGEST", 3)
    with pytest.raises(TooLarge, match="the limit is"):
        fetch("s3://calls/folder/a.wav")

    class Broken:
        def get_file_info(self, _: str) -> None:
            raise OSError("AWS Error ACCESS_DENIED")

    monkeypatch.setattr(remote, "_file_system", lambda _: Broken())
    with pytest.raises(Unreadable, match=r"ACCESS_DENIED\. Check credentials"):
        fetch("s3://calls/other.wav")
    assert stamp_of("s3://calls/other.wav") == (-1, -1)
    with pytest.raises(SerError, match="cannot list s3://calls"):
        scan_remote("s3://calls", {".wav"})


@pytest.mark.parametrize("uri", ["s3://calls//a.wav", "s3://calls/2024//a.wav", "s3://me:secret@calls/a.wav"])
def test_what_arrow_takes_for_no_path_is_a_row_and_ends_nothing(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = pyarrow.fs.S3FileSystem(region="us-east-1", endpoint_override="127.0.0.1:1", anonymous=True)
    monkeypatch.setattr(remote, "_file_system", lambda _: store)  # it judges paths before it asks anybody
    with pytest.raises(Unreadable, match=r"\. Check bucket and key\.$"):
        fetch(uri)
    assert stamp_of(uri) == (-1, -1)
    assert add_hashes(pd.DataFrame({"speech": [uri]}))["content_hash"].tolist() == [""]
    with pytest.raises(SerError, match=r"cannot list s3://.*; check bucket"):
        scan_remote(uri, {".wav"})


def test_listing(store: Path) -> None:
    for key in (
        "calls/b.WAV",
        "calls/2/a.wav",
        "calls/10/a.wav",
        "calls/notes.txt",
        "calls/.git/x.wav",
        "calls/2/._a.wav",
    ):
        put(store, key)
    found = scan_remote("s3://calls/?scheme=http", {".wav"})
    assert found.files == tuple(f"s3://calls/{key}?scheme=http" for key in ("10/a.wav", "2/a.wav", "b.WAV"))
    assert (found.hidden, found.other) == (2, {".txt": 1})
    assert scan_remote("s3://calls/2", {".wav"}).files == ("s3://calls/2/a.wav",)


def test_an_object_is_a_recording_like_any_other(tiny_bundle: Bundle, store: Path, write_audio: WriteAudio) -> None:
    path = write_audio(duration_s=5.0)
    uri = put(store, "calls/a.wav", path.read_bytes())
    predictor = Predictor.from_bundle(tiny_bundle.folder, threads=1, crops=3)
    local, there, gone = predictor.predict([path, uri, "s3://calls/gone.wav"])
    np.testing.assert_array_equal(there.probabilities, local.probabilities)
    assert gone.status == "not_found"
    isolated = predictor.classify([predictor.listen(uri, isolated=True)])[0]
    np.testing.assert_array_equal(isolated.probabilities, local.probabilities)


def test_objects_stay_what_they_are_in_a_table(tmp_path: Path) -> None:
    uris = ["s3://calls/0.wav", "gs://calls/a b?.wav"]
    (tmp_path / "m.csv").write_text("speech\n" + "\n".join(uris) + "\n")
    assert list(read_manifest(tmp_path / "m.csv", require_labels=False)["speech"]) == uris


@pytest.fixture
def closed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``store``, but the bucket ``closed`` cannot be opened."""
    there = remote._file_system

    def opened(uri: str) -> object:
        if uri == "s3://closed":
            raise SerError(f"cannot open {uri}: no such region; check bucket, credentials, region and endpoint")
        return there(uri)

    monkeypatch.setattr(remote, "_file_system", opened)


@pytest.mark.usefixtures("closed", "in_this_process")
def test_a_bucket_that_cannot_be_opened_is_a_row_and_ends_nothing(
    tiny_bundle: Bundle, write_audio: WriteAudio, tmp_path: Path
) -> None:
    assert stamp_of("s3://closed/a.wav") == (-1, -1)
    (tmp_path / "m.csv").write_text(f"speech\n{write_audio()}\ns3://closed/a.wav\n")
    words = ["--model_weights", str(tiny_bundle.folder), "--num_cpus", "0", "--no_report"]
    assert score.main([*words, "--input", str(tmp_path / "m.csv"), "--out", str(tmp_path / "out")]) == 4
    found = read_predictions(tmp_path / "out")
    assert list(found["status"]) == ["ok", "unreadable"]
    assert "s3://closed" in found["error"][1]


def test_objects_have_the_content_of_their_bytes(store: Path, write_audio: WriteAudio) -> None:
    path = write_audio()
    uri = put(store, "calls/a.wav", path.read_bytes())
    manifest = pd.DataFrame({"speech": [str(path), uri, "s3://calls/gone.wav"]})
    hashes = list(add_hashes(manifest)["content_hash"])
    assert hashes == [content_hash(path), content_hash(path), ""]
    training = pd.DataFrame({"content_hash": hashes[:1], "split": ["train"]})
    assert leaks.find(manifest, training).mask.tolist() == [True, True, False]


def test_objects_are_extracted(store: Path, write_audio: WriteAudio, tmp_path: Path) -> None:
    path = write_audio()
    rows = [str(path), put(store, "calls/a.wav", path.read_bytes()), "s3://calls/gone.wav"]
    table = pd.DataFrame({"speech": rows, "_block": 0, "_row": range(3)})
    schema = pa.schema([("speech", pa.string())])
    assert BlockWriter(tmp_path, schema, FeatureConfig(), ShardOptions(mel_power_s=3.0))(table) == (3, 1)
    found = pq.read_table(tmp_path / "part-00000.parquet")
    assert found["status"].to_pylist() == ["ok", "ok", "not_found"]
    features = found["log_mel"].combine_chunks().to_numpy_ndarray()
    np.testing.assert_array_equal(features[0], features[1])


def test_mistakes_among_objects_can_be_played(store: Path, write_audio: WriteAudio) -> None:
    path = write_audio()
    uri = put(store, "calls/a.wav", path.read_bytes())
    here, there = report._players([{"speech": str(path)}, {"speech": uri}]).values()
    assert here == there
