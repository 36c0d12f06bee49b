"""``infer``: table and JSON, stdin, bad files, exit codes."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jobs import infer
from pipeline.inference.predictor import Predictor
from pipeline.models import bundle as checkpoint
from pipeline.models.backends import ensure_onnx
from pipeline.models.bundle import Bundle

WriteAudio = Callable[..., Path]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Bundle) -> Bundle:
    ensure_onnx(tiny_bundle)
    return tiny_bundle


@pytest.fixture
def call(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the job on some words; (exit code, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = infer.main(["--model_weights", str(bundle.folder), *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_table(call: Call, bundle: Bundle, write_audio: WriteAudio) -> None:
    paths = [write_audio("one.wav"), write_audio("two three.wav", f0_hz=300)]
    code, out, err = call("--file", *paths)
    assert (code, err) == (0, "")
    header, *lines = out.splitlines()
    assert header.split() == ["file", "emotion", "confidence", "then"]
    expected = Predictor.from_bundle(bundle.folder, threads=1).predict(paths)
    for line, path, prediction in zip(lines, paths, expected, strict=True):
        assert line.startswith(f"{path}  ")
        assert line.removeprefix(str(path)).split()[:2] == [prediction.predicted, f"{prediction.confidence:.1%}"]


def test_json_also_from_stdin(
    call: Call, bundle: Bundle, write_audio: WriteAudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_audio("é.wav", duration_s=3.0, sample_rate_hz=44_100, channels=2)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    code, out, _ = call("--json", "--file", path, "-")
    assert code == 0
    assert out.isascii()
    answer, piped = json.loads(out)
    assert list(answer["probabilities"]) == list(bundle.labels)
    assert sum(answer["probabilities"].values()) == pytest.approx(1.0)
    assert answer["confidence"] == max(answer["probabilities"].values())
    assert (answer["file"], answer["status"], answer["error"]) == (str(path), "ok", None)
    assert (answer["duration_s"], answer["scored_s"]) == (3.0, 2.0)
    assert (answer["sample_rate_hz"], answer["channels"]) == (44_100, 2)
    assert piped == answer | {"file": "-"}


def test_bad_files_are_rows_and_exit_4(call: Call, write_audio: WriteAudio, tmp_path: Path) -> None:
    (text := tmp_path / "a\nb.wav").write_text("no audio " * 50)
    code, out, err = call("--file", text, write_audio("good.wav"), tmp_path / "gone.wav")
    assert code == 4
    _, first, second, third = out.splitlines()
    assert first.endswith("  not_audio")
    assert "good.wav" in second
    assert third.endswith("  not_found")
    assert len(err.splitlines()) == 2
    code, out, _ = call("--json", "--file", tmp_path / "gone.wav")
    (answer,) = json.loads(out)
    assert (code, answer["status"], answer["predicted"]) == (4, "not_found", None)
    assert "probabilities" not in answer


def test_folders_and_patterns_that_no_shell_expanded(call: Call, write_audio: WriteAudio) -> None:
    folder = write_audio("b.wav").parent
    named = write_audio("[a].wav")  # a name, not a pattern
    both = [str(named), str(folder / "b.wav")]
    code, out, _ = call("--json", "--file", named, folder / "?.wav", folder / "*.mp3")
    assert (code, [answer["file"] for answer in json.loads(out)]) == (4, [*both, str(folder / "*.mp3")])
    (folder / "notes.txt").touch()
    code, out, err = call("--json", "--file", folder)
    assert (code, [answer["file"] for answer in json.loads(out)]) == (0, both)
    assert "1 .txt" in err


def test_doubt_and_silence(call: Call, write_audio: WriteAudio) -> None:
    voice, silence = write_audio("voice.wav"), write_audio("silence.wav", samples=np.zeros(16_000, np.float32))
    answers = json.loads(call("--json", "--min_confidence", 0.999, "--file", voice, silence)[1])
    assert [answer["predicted"] for answer in answers] == ["uncertain", "silence"]
    assert answers[0]["confidence"] < 0.999
    assert [answers[1][name] for name in ("confidence", "probabilities", "entropy", "margin")] == [None] * 4
    assert call("--file", silence)[1].splitlines()[1].split()[1:] == ["silence"]
    lines = call("--window_s", 0.5, "--file", silence)[1].splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["silence"] * 3


def test_channels_that_cancel_are_said(call: Call, write_audio: WriteAudio) -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    code, _, err = call("--file", write_audio("both.wav", samples=np.stack([noise, -noise], axis=1)))
    assert code == 0
    assert re.fullmatch(r"notice: .*both\.wav: .*channel [01].*\n", err)


def test_windows(call: Call, write_audio: WriteAudio) -> None:
    path = write_audio("call.wav", duration_s=5.0, channels=2)
    words = ("--window_s", 2, "--hop_s", 1.5, "--channels", "each", "--file", path)
    (answer,) = json.loads(call("--json", *words)[1])
    found = [(s["channel"], s["start_s"], s["end_s"]) for s in answer["segments"]]
    assert found == [(c, a, a + 2.0) for c in "01" for a in (0.0, 1.5, 3.0)]
    lines = call(*words)[1].splitlines()
    assert len(lines) == 8
    assert lines[2].split()[:6] == ["channel", "0", "0.00", "-", "2.00", "s"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("", "--file"),
        ("--file a.wav --channels left", "left"),
        ("--file a.wav --channels each", "--window_s"),
        ("--file a.wav --window_s 3", "--window_s 2"),
        ("--file a.wav --threads 0", "threads"),
        ("--file a.wav --silence_dbfs=-inf", "silence_dbfs"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(words: str, text: str, call: Call) -> None:
    code, out, err = call(*words.split())
    assert (code, out) == (2, "")
    assert text in err
    assert err.count("\n") == 1


def test_a_copy_without_the_shipped_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "DEFAULT_BUNDLE", tmp_path / "site-packages/models/inception_ser_final")
    assert infer.main(["--file", "a.wav"]) == 2
    assert "--model_weights" in capsys.readouterr().err
