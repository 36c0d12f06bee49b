"""``make demo``: samples and a folder of the user's own, twice into one folder, broken recordings among good ones."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import soundfile
from conftest import speech_like
from web_files import FileServer, serving

from jobs.ravdess import NOTICE_FILE
from pipeline.models.bundle import Bundle
from samples.demo import EMOTIONS, VOICES, main

ROOT = Path(__file__).resolve().parents[2]
Demo = Callable[..., tuple[int, str, str]]


@pytest.fixture
def demo(
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    in_this_process: None,
    undrawn: None,
) -> Demo:
    """Run samples/demo.py in an empty folder, with an untrained model: (exit code, output, errors)."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def run(*options: str) -> tuple[int, str, str]:
        nobody_answers = ["--base_url", "http://127.0.0.1:9"]
        code = main(["--engine", "local", "--model_weights", str(tiny_bundle.folder), *nobody_answers, *options])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def record() -> Iterator[FileServer]:
    """The public record, with the 16 recordings and others in its archive."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, name in enumerate(("Actor_01/03-01-01-01-01-01-01.wav", *VOICES)):
            sound = io.BytesIO()
            soundfile.write(sound, speech_like(seed=number), 16_000, format="WAV")
            archive.writestr(name, sound.getvalue())
    with serving(packed.getvalue()) as server:
        yield server


def test_samples_twice(demo: Demo, tmp_path: Path) -> None:
    code, told, errors = demo()
    assert code == 0, errors
    out = tmp_path / "cwd" / "demo_report"
    predictions = pd.read_parquet(out / "predictions.parquet")
    samples = pd.read_csv(ROOT / "samples/metadata.csv")
    assert [Path(p).name for p in predictions["speech"]] == samples["speech"].tolist()
    assert predictions["status"].eq("ok").all()
    assert predictions["style"].tolist() == samples["label"].tolist()
    assert "label_name" not in predictions, "what the synthesiser was set to is no truth"
    table = [line.split() for line in told.strip().splitlines()[1:]]
    assert table[: table.index([])] == [
        [Path(row.speech).name, row.style, row.predicted, f"{row.confidence:.0%}"] for row in predictions.itertuples()
    ]
    assert "synthetic" in told
    assert f"Report: {out / 'report.html'}" in told
    assert "synthetic speech" in (out / "report.html").read_text(encoding="utf-8")
    (out / "predictions.parquet").unlink()  # whatever state the folder is in, a second run makes it whole
    assert demo()[:2] == (0, told)


def test_recordings_of_two_actors_are_fetched_once(demo: Demo, record: FileServer, tmp_path: Path) -> None:
    code, told, errors = demo("--base_url", record.url)
    assert code == 0, errors
    predictions = pd.read_parquet(tmp_path / "cwd" / "demo_report" / "predictions.parquet")
    assert [Path(path).name for path in predictions["speech"]] == [Path(name).name for name in VOICES]
    assert predictions["status"].eq("ok").all()
    assert predictions["label_name"].tolist()[:8] == list(EMOTIONS)
    assert "CC BY-NC-SA" in (tmp_path / "cwd/demo_report/ravdess" / NOTICE_FILE).read_text(encoding="utf-8")
    asked = len(record.asked)
    assert demo("--base_url", record.url)[:2] == (0, told)
    assert len(record.asked) == asked


def damaged(content: bytes) -> bytes:
    half = len(content) // 2
    return content[:half] + bytes(64) + content[half + 64 :]


@pytest.mark.parametrize(
    ("attribute", "trouble"),
    [
        ("ranges", lambda _: False),
        ("statuses", lambda _: [403] * 99),
        ("cuts", lambda _: [100] * 99),
        ("content", damaged),
        ("content", lambda _: b"<html>moved</html>" * 9_999),
    ],
)
def test_a_record_in_trouble_leaves_the_synthetic_clips(
    demo: Demo,
    record: FileServer,
    attribute: str,
    trouble: Callable[[Any], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = pd.read_csv(ROOT / "samples/metadata.csv").head(1)  # clip is enough here
    one.assign(speech=str(ROOT / "samples" / one["speech"][0])).to_csv(tmp_path / "one.csv", index=False)
    monkeypatch.setattr("samples.demo.SAMPLES", tmp_path / "one.csv")
    setattr(record, attribute, trouble(getattr(record, attribute)))
    code, told, errors = demo("--base_url", record.url)
    assert code == 0, errors
    assert "record" in errors
    assert "synthetic" in told


def test_own_folder_with_a_broken_recording_and_one_that_is_not_there(demo: Demo, tmp_path: Path) -> None:
    calls = tmp_path / "my calls"
    calls.mkdir()
    shutil.copy(ROOT / "samples/ben_calm_train.wav", calls / "a b.wav")
    (calls / "broken.wav").write_text("not audio at all")
    code, told, errors = demo("--data", str(calls), "--out", "elsewhere")
    assert code == 0, errors
    heading, good, broken = told.strip().splitlines()[:3]
    assert heading.split() == ["recording", "answer", "confidence"]
    assert good.startswith("a b.wav ")
    assert good.endswith("%")
    assert broken.split() == ["broken.wav", "-", "not_audio"]
    assert "synthetic" not in told
    assert "synthetic" not in (tmp_path / "cwd/elsewhere/report.html").read_text(encoding="utf-8")
    code, told, errors = demo("--data", "nowhere")
    assert (code, told) == (2, "")
    (error,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert "nowhere" in error
