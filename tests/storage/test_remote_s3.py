"""A bucket of a real S3 server (moto's, on this machine): listed, fetched, scored, refused when it has changed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.fs
import pytest
from moto.server import ThreadedMotoServer

from jobs import score
from pipeline.inference.predictor import Predictor
from pipeline.models.bundle import Bundle
from pipeline.scoring.predictions import read_predictions
from pipeline.storage.errors import NotFound, SerError
from pipeline.storage.files import fetch, scan_remote, stamp_of

WriteAudio = Callable[..., Path]


@dataclass(frozen=True)
class Bucket:
    """An S3 server on this machine, with the bucket ``calls``."""

    options: str

    def uri(self, key: str = "", bucket: str = "calls") -> str:
        return f"s3://{bucket}{'/' if key else ''}{key}?{self.options}"

    def put(self, key: str, content: bytes) -> str:
        files, _ = pyarrow.fs.FileSystem.from_uri(f"s3://calls?{self.options}")
        with files.open_output_stream(f"calls/{key}") as stream:
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
        for name, value in (
            ("ACCESS_KEY_ID", "key"),
            ("SECRET_ACCESS_KEY", "secret"),
            ("EC2_METADATA_DISABLED", "true"),
        ):
            patch.setenv(f"AWS_{name}", value)
        options = f"region=us-east-1&endpoint_override=127.0.0.1:{port}&scheme=http"
        files, _ = pyarrow.fs.FileSystem.from_uri(f"s3://calls?{options}&allow_bucket_creation=true")
        files.create_dir("calls")
        yield Bucket(options)
    server.stop()


def test_odd_keys_are_listed_and_fetched(bucket: Bucket) -> None:
    keys = ["odd/a b.WAV", "odd/ü#1 100%.wav", "odd/+&=.wav"]
    for key in keys:
        bucket.put(key, key.encode())
    bucket.put("odd/notes.txt", b"no audio")
    bucket.put("odd/.hidden.wav", b"hidden")
    found = scan_remote(bucket.uri("odd"), {".wav"})
    assert found.files == tuple(map(bucket.uri, sorted(keys)))
    assert (found.hidden, found.other) == (1, {".txt": 1})
    for key, uri in zip(sorted(keys), found.files, strict=True):
        assert fetch(uri) == key.encode()
        size, changed_ns = stamp_of(uri)
        assert size == len(key.encode())
        assert changed_ns > 0


def test_what_is_not_there_is_told(bucket: Bucket) -> None:
    with pytest.raises(NotFound, match=r"gone\.wav.*no such object"):
        fetch(bucket.uri("gone.wav"))
    with pytest.raises(SerError, match=r"cannot list s3://nobody.*NO_SUCH_BUCKET"):
        scan_remote(bucket.uri(bucket="nobody"), {".wav"})


@pytest.mark.usefixtures("in_this_process")
def test_a_bucket_is_scored_and_a_changed_object_is_another_input(
    bucket: Bucket, tiny_bundle: Bundle, write_audio: WriteAudio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write_audio(f"{i}.wav", seed=i, f0_hz=100 + 80 * i) for i in range(3)]
    uris = [bucket.put(f"scored/{path.name}", path.read_bytes()) for path in files]
    bucket.put("scored/broken.wav", b"no audio " * 50)
    out = tmp_path / "out"
    words = ["--model_weights", str(tiny_bundle.folder), "--num_cpus", "0", "--no_report", "--out", str(out)]
    assert score.main([*words, "--input", bucket.uri("scored")]) == 4
    table = read_predictions(out)
    assert list(table["speech"]) == [*uris, bucket.uri("scored/broken.wav")]
    assert list(table["status"]) == ["ok", "ok", "ok", "not_audio"]
    expected = [p.probabilities for p in Predictor.from_bundle(tiny_bundle.folder, threads=1).predict(files)]
    found = table[[f"p_{label}" for label in tiny_bundle.labels]].to_numpy()[:3]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert json.loads((out / "run.json").read_text())["scored_now"] == 4
    bucket.put("scored/0.wav", files[1].read_bytes() + b"\0")
    capsys.readouterr()
    assert score.main([*words, "--input", bucket.uri("scored")]) == 2
    assert "another recordings" in capsys.readouterr().err
