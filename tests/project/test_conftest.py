"""The rules of the test suite itself: what CI does with skips, and what the shared fixtures promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.data.manifest import scan_folder
from pipeline.models.bundle import Bundle

pytest_plugins = ["pytester"]

SKIPPING = """
import pytest

def test_runs(): pass

@pytest.mark.skip(reason="needs a GPU")
def test_gpu(): pass

def test_other(): pytest.skip("no network")

@pytest.mark.xfail(reason="known")
def test_known(): assert False
"""


@pytest.mark.parametrize(("ci", "failed", "skipped"), [("true", 1, 1), ("", 0, 2)])
def test_in_ci_only_a_missing_gpu_excuses_a_skip(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str, failed: int, skipped: int
) -> None:
    monkeypatch.setenv("CI", ci)
    pytester.makeconftest((Path(__file__).parents[1] / "conftest.py").read_text())
    pytester.makepyfile(SKIPPING)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=failed, skipped=skipped, xfailed=1)


def test_in_ci_a_module_that_skips_itself_fails(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    pytester.makeconftest((Path(__file__).parents[1] / "conftest.py").read_text())
    pytester.makepyfile("import pytest\npytest.importorskip('no_such_package_anywhere')")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(errors=1)


def test_speech_like_has_the_pitch_length_and_peak_asked_for(speech_like: Callable[..., np.ndarray]) -> None:
    samples = speech_like(f0_hz=200.0, duration_s=1.5, sample_rate_hz=16_000, peak=0.25, seed=3)
    assert samples.shape == (24_000,)
    assert samples.dtype == np.float32
    assert np.abs(samples).max() == pytest.approx(0.25, rel=1e-6)
    spectrum = np.abs(np.fft.rfft(samples))
    strongest_hz = np.fft.rfftfreq(samples.size, 1 / 16_000)[spectrum.argmax()]
    assert 175.0 <= strongest_hz <= 225.0
    assert np.array_equal(samples, speech_like(f0_hz=200.0, duration_s=1.5, peak=0.25, seed=3))
    assert not np.array_equal(samples, speech_like(f0_hz=200.0, duration_s=1.5, peak=0.25, seed=4))


def test_write_audio_writes_what_was_asked(write_audio: Callable[..., Path]) -> None:
    info = soundfile.info(write_audio("deep/er/x.flac", duration_s=0.5, sample_rate_hz=44_100, channels=2))
    assert (info.samplerate, info.channels, info.frames, info.format) == (44_100, 2, 22_050, "FLAC")


def test_ravdess_like_is_a_balanced_labelled_corpus(ravdess_like: Path) -> None:
    table = scan_folder(ravdess_like)
    assert len(table) == 64
    assert set(Counter(table["label"]).values()) == {8}
    assert set(Counter(table["speaker"]).values()) == {16}
    contents = {path.read_bytes() for path in ravdess_like.rglob("*.wav")}
    assert len(contents) == 64


def test_tiny_bundle_answers_with_eight_probabilities(tiny_bundle: Bundle) -> None:
    import torch

    with torch.no_grad():
        logits = tiny_bundle.build_model()(torch.zeros(2, *tiny_bundle.features.input_shape))
    assert logits.shape == (2, len(tiny_bundle.labels)) == (2, 8)
    assert torch.isfinite(logits).all()
