"""``make demo``: samples and a folder of the user's own, twice into one folder, broken recordings among good ones."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import soundfile
from conftest import speech_like
from web_files import FileServer, serving

from jobs.ravdess import NOTICE_FILE
from pipeline.models.bundle import Bundle
from samples.demo import EMOTIONS, VOICES, main

ROOT = Path(__file__).resolve().parents[2]


Demo = Callable[..., SimpleNamespace]


@pytest.fixture
def demo(
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    in_this_process: None,
    undrawn: None,
) -> Demo:
    """Run samples/demo.py in an empty folder, in this process, with an untrained model; ``make demo`` runs all."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def run(*options: str) -> SimpleNamespace:
        given = ["--engine", "local", "--model_weights", str(tiny_bundle.folder), *options]
        if "--data" not in options and "--base_url" not in options:
            given += ["--base_url", "http://127.0.0.1:9"]  # nobody answers there
        code = main(given)
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err)

    return run


def table_rows(stdout: str) -> list[list[str]]:
    """The cells of the printed table, its heading left out."""
    lines = stdout.strip().splitlines()
    return [line.split() for line in lines[1 : lines.index("")]]


def test_samples_twice(demo: Demo, tmp_path: Path) -> None:
    first = demo()
    assert first.returncode == 0, first.stderr
    out = tmp_path / "cwd" / "demo_report"
    predictions = pd.read_parquet(out / "predictions.parquet")
    samples = pd.read_csv(ROOT / "samples/metadata.csv")
    assert [Path(p).name for p in predictions["speech"]] == samples["speech"].tolist()
    assert predictions["status"].eq("ok").all()
    assert predictions["style"].tolist() == samples["label"].tolist()
    assert "label_name" not in predictions, "what the synthesiser was set to is no truth"
    expected = [
        [Path(row.speech).name, row.style, row.predicted, f"{row.confidence:.0%}"] for row in predictions.itertuples()
    ]
    assert table_rows(first.stdout) == expected
    assert "synthetic" in first.stdout
    assert f"Report: {out / 'report.html'}" in first.stdout
    assert "synthetic speech" in (out / "report.html").read_text(encoding="utf-8")
    (out / "predictions.parquet").unlink()  # whatever state the folder is in, a second run makes it whole
    second = demo()
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout


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


def test_recordings_of_two_actors_are_fetched_once(demo: Demo, record: FileServer, tmp_path: Path) -> None:
    first = demo("--base_url", record.url)
    assert first.returncode == 0, first.stderr
    predictions = pd.read_parquet(tmp_path / "cwd" / "demo_report" / "predictions.parquet")
    assert [Path(path).name for path in predictions["speech"]] == [Path(name).name for name in VOICES]
    assert predictions["status"].eq("ok").all()
    assert predictions["label_name"].tolist()[:8] == list(EMOTIONS)
    assert "CC BY-NC-SA" in (tmp_path / "cwd/demo_report/ravdess" / NOTICE_FILE).read_text(encoding="utf-8")
    asked = len(record.asked)
    second = demo("--base_url", record.url)
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert len(record.asked) == asked


@pytest.mark.parametrize("trouble", ["no_ranges", "refused", "cut", "damaged", "other_content"])
def test_a_record_in_trouble_leaves_the_synthetic_clips(
    demo: Demo, record: FileServer, trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = pd.read_csv(ROOT / "samples/metadata.csv").head(1)  # clip is enough here
    one.assign(speech=str(ROOT / "samples" / one["speech"][0])).to_csv(tmp_path / "one.csv", index=False)
    monkeypatch.setattr("samples.demo.SAMPLES", tmp_path / "one.csv")
    if trouble == "no_ranges":
        record.ranges = False
    elif trouble == "refused":
        record.statuses = [403] * 99
    elif trouble == "cut":
        record.cuts = [100] * 99
    elif trouble == "damaged":
        half = len(record.content) // 2
        record.content = record.content[:half] + bytes(64) + record.content[half + 64 :]
    else:
        record.content = b"<html>moved</html>" * 9_999
    result = demo("--base_url", record.url)
    assert result.returncode == 0, result.stderr
    assert "record" in result.stderr
    assert "synthetic" in result.stdout


def test_own_folder_with_a_broken_recording(demo: Demo, tmp_path: Path) -> None:
    calls = tmp_path / "my calls"
    calls.mkdir()
    shutil.copy(ROOT / "samples/ben_calm_train.wav", calls / "a b.wav")
    (calls / "broken.wav").write_text("not audio at all")
    result = demo("--data", str(calls), "--out", "elsewhere")
    assert result.returncode == 0, result.stderr
    good, broken = result.stdout.strip().splitlines()[1:3]
    assert good.startswith("a b.wav ")
    assert good.endswith("%")
    assert broken.split() == ["broken.wav", "-", "not_audio"]
    assert result.stdout.split()[:3] == ["recording", "answer", "confidence"]
    assert "synthetic" not in result.stdout
    assert "synthetic" not in (tmp_path / "cwd/elsewhere/report.html").read_text(encoding="utf-8")


def test_a_folder_that_is_not_there_is_one_line(demo: Demo) -> None:
    result = demo("--data", "nowhere")
    assert result.returncode == 2
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "nowhere" in errors[0]
    assert "Traceback" not in result.stderr
