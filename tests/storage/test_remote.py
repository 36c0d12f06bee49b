"""Objects of a store as recordings: in a bucket of a real S3 server (moto's, on this machine)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

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
from pipeline.storage import files
from pipeline.storage.errors import AudioError, NotAFile, NotFound, SerError, TooLarge, Unreadable
from pipeline.storage.files import fetch, is_remote, scan_remote, stamp_of

WriteAudio = Callable[..., Path]
CLOSED = "s3://closed/a.wav?region=us-east-1&scheme=ftp"  # Arrow opens no such store


@dataclass(frozen=True)
class Bucket:
    """An S3 server on this machine, with the bucket ``calls``."""

    options: str

    def uri(self, key: str = "", bucket: str = "calls") -> str:
        return f"s3://{bucket}{'/' if key else ''}{key}?{self.options}"

    def put(self, key: str, content: bytes) -> str:
        store, _ = pyarrow.fs.FileSystem.from_uri(f"s3://calls?{self.options}")
        with store.open_output_stream(f"calls/{key}") as stream:
            stream.write(content)
        fetch.cache_clear()
        return self.uri(key)


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        options = f"region=us-east-1&endpoint_override=127.0.0.1:{port}&scheme=http"
        store, _ = pyarrow.fs.FileSystem.from_uri(f"s3://calls?{options}&allow_bucket_creation=true")
        store.create_dir("calls")
        yield Bucket(options)
    server.stop()


def test_odd_keys_are_listed_fetched_and_kept_in_tables(bucket: Bucket, tmp_path: Path) -> None:
    keys = ["odd/10/ü#1 100%.wav", "odd/2/a b.WAV", "odd/2/b?.wav", "odd/+&=.wav"]
    for key in keys:
        bucket.put(key, key.encode())
    for key in ("odd/notes.txt", "odd/.git/x.wav", "odd/2/._a.wav"):
        bucket.put(key, b"not listed")
    found = scan_remote(bucket.uri("odd/"), {".wav"})
    assert found.files == tuple(map(bucket.uri, sorted(keys)))
    assert (found.hidden, found.other) == (2, {".txt": 1})
    assert scan_remote(bucket.uri("odd/10"), {".wav"}).files == (bucket.uri(keys[0]),)
    for key, uri in zip(sorted(keys), found.files, strict=True):
        assert fetch(uri) == key.encode()
        size, changed_ns = stamp_of(uri)
        assert size == len(key.encode())
        assert changed_ns > 0
    uris = [*found.files, "gs://calls/a b?.wav"]
    (tmp_path / "m.csv").write_text("\n".join(["speech", *uris]) + "\n")
    assert list(read_manifest(tmp_path / "m.csv", require_labels=False)["speech"]) == uris


def test_google_s_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that Arrow knows, in the place of the store."""
    (tmp_path / "calls").mkdir()
    (tmp_path / "calls/why?.wav").write_bytes(b"content")
    asked: list[str] = []

    def opened(store: str) -> pyarrow.fs.FileSystem:
        asked.append(store)
        return pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())

    monkeypatch.setattr(files, "_file_system", opened)
    (uri,) = scan_remote("gs://calls?scheme=http", {".wav"}).files
    assert uri == "gs://calls/why?.wav?scheme=http"
    assert fetch(uri) == b"content"
    assert asked == ["gs://calls?scheme=http"] * 2


def test_other_paths_are_not_remote() -> None:
    for text in ("/calls/a.wav", "file:///a.wav", "http://x/a.wav", "S3/calls/a.wav", "s3:/calls/a.wav"):
        assert not is_remote(text), text


def test_what_cannot_be_fetched_has_a_code(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    there = bucket.put("folder/a.wav", b"content")
    monkeypatch.setattr(files, "_LARGEST", 6)
    cases: list[tuple[str, type[AudioError], str]] = [
        (there, TooLarge, "limit"),
        (bucket.uri("gone.wav"), NotFound, "gone.wav"),
        (bucket.uri("folder"), NotAFile, "folder"),
        (CLOSED, Unreadable, "cannot open s3://closed"),
        # no paths for Arrow
        (bucket.uri("/a.wav"), Unreadable, "bucket and key"),
        (bucket.uri("2024//a.wav"), Unreadable, "bucket and key"),
        (bucket.uri("a.wav", bucket="me:secret@calls"), Unreadable, "bucket and key"),
    ]
    for uri, error, word in cases:
        with pytest.raises(error, match=word):
            fetch(uri)
        if error is Unreadable:
            assert stamp_of(uri) == (-1, -1)
            assert add_hashes(pd.DataFrame({"speech": [uri]}))["content_hash"].tolist() == [""]
            with pytest.raises(SerError, match="bucket"):
                scan_remote(uri, {".wav"})
    with pytest.raises(SerError, match=r"s3://nobody.*NO_SUCH_BUCKET"):
        scan_remote(bucket.uri(bucket="nobody"), {".wav"})


def test_a_store_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def get_file_info(self, _: str) -> None:
            raise OSError("AWS Error ACCESS_DENIED")

    monkeypatch.setattr(files, "_file_system", lambda _: Refusing())
    with pytest.raises(Unreadable, match=r"ACCESS_DENIED.*credentials"):
        fetch("s3://calls/other.wav")
    assert stamp_of("s3://calls/other.wav") == (-1, -1)


def test_an_object_is_a_recording_like_any_other(
    bucket: Bucket, tiny_bundle: Bundle, write_audio: WriteAudio, tmp_path: Path
) -> None:
    path = write_audio(duration_s=5.0)
    uri, gone = bucket.put("calls/a.wav", path.read_bytes()), bucket.uri("calls/gone.wav")

    predictor = Predictor.from_bundle(tiny_bundle.folder, threads=1, crops=3)
    here, there, *failed = predictor.predict([path, uri, gone, CLOSED])
    np.testing.assert_array_equal(there.probabilities, here.probabilities)
    assert [row.status for row in failed] == ["not_found", "unreadable"]
    isolated = predictor.classify([predictor.listen(uri, isolated=True)])[0]
    np.testing.assert_array_equal(isolated.probabilities, here.probabilities)

    manifest = pd.DataFrame({"speech": [str(path), uri, gone]})
    assert list(add_hashes(manifest)["content_hash"]) == [content_hash(path), content_hash(path), ""]
    training = pd.DataFrame({"content_hash": [content_hash(path)], "split": ["train"]})
    assert leaks.find(manifest, training).mask.tolist() == [True, True, False]

    schema = pa.schema([("speech", pa.string())])
    write = BlockWriter(tmp_path, schema, FeatureConfig(), ShardOptions(mel_power_s=3.0))
    assert write(manifest.assign(_block=0, _row=range(3))) == (3, 1)
    extracted = pq.read_table(tmp_path / "part-00000.parquet")
    assert extracted["status"].to_pylist() == ["ok", "ok", "not_found"]
    features = extracted["log_mel"].combine_chunks().to_numpy_ndarray()
    np.testing.assert_array_equal(features[0], features[1])

    player_here, player_there = report._players([{"speech": str(path)}, {"speech": uri}]).values()
    assert player_here == player_there


@pytest.mark.usefixtures("in_this_process")
def test_a_bucket_is_scored_and_a_changed_object_is_another_input(
    bucket: Bucket, tiny_bundle: Bundle, write_audio: WriteAudio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recordings = [write_audio(f"{i}.wav", seed=i, f0_hz=100 + 80 * i) for i in range(3)]
    uris = [bucket.put(f"scored/{path.name}", path.read_bytes()) for path in recordings]
    uris.append(bucket.put("scored/broken.wav", b"no audio " * 50))
    out = tmp_path / "out"
    words = ["--model_weights", str(tiny_bundle.folder), "--num_cpus", "0", "--no_report", "--out", str(out)]
    assert score.main([*words, "--input", bucket.uri("scored")]) == 4
    table = read_predictions(out)
    assert list(table["speech"]) == uris
    assert list(table["status"]) == ["ok", "ok", "ok", "not_audio"]
    expected = [p.probabilities for p in Predictor.from_bundle(tiny_bundle.folder, threads=1).predict(recordings)]
    found = table[[f"p_{label}" for label in tiny_bundle.labels]].to_numpy()[:3]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert json.loads((out / "run.json").read_text())["scored_now"] == 4
    bucket.put("scored/0.wav", recordings[1].read_bytes() + b"\0")
    capsys.readouterr()
    assert score.main([*words, "--input", bucket.uri("scored")]) == 2
    assert "another recordings" in capsys.readouterr().err
