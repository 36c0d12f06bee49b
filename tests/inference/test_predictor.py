"""From audio to probabilities: against PyTorch by hand, the crop formula, temperature, bad recordings, windows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray

from pipeline.audio import load as audio
from pipeline.audio.windows import SlidingWindow
from pipeline.features.features import FeatureConfig, extract
from pipeline.inference.excerpts import listen
from pipeline.inference.predictor import Prediction, Predictor
from pipeline.inference.timeline import SILENCE, UNCERTAIN
from pipeline.models.bundle import Bundle
from pipeline.storage.errors import SerError

WriteAudio = Callable[..., Path]
Floats = NDArray[np.float64]


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Bundle) -> Predictor:
    return Predictor.from_bundle(tiny_bundle.folder, threads=1)


@pytest.fixture(scope="module")
def torch_model(tiny_bundle: Bundle) -> torch.nn.Module:
    return tiny_bundle.build_model()


def by_hand(model: torch.nn.Module, windows: list[NDArray[np.float32]], temperature: float = 1.0) -> Floats:
    """Log-probabilities (windows, classes) of sample windows, with PyTorch's own functions."""
    features = np.stack([extract(samples, FeatureConfig()) for samples in windows])
    with torch.inference_mode():
        logits = model(torch.from_numpy(features)).double() / temperature
    return torch.log_softmax(logits, dim=1).numpy()


def whole(path: Path, rate_hz: int = 48_000) -> NDArray[np.float32]:
    return audio.load(path, sample_rate_hz=rate_hz).samples


def beside(write_audio: WriteAudio, *paths: Path) -> Path:
    """One recording with these as its channels."""
    return write_audio("both.wav", samples=np.stack([whole(path, 16_000) for path in paths], axis=1))


def together(log_p: Floats) -> Floats:
    """Geometric mean of probabilities, renormalised."""
    p = scipy.stats.gmean(np.exp(log_p), axis=0)
    return p / p.sum()


def test_one_crop_is_the_middle_two_seconds_and_temperature_divides_the_logits(
    tiny_bundle: Bundle, predictor: Predictor, torch_model: torch.nn.Module, write_audio: WriteAudio
) -> None:
    path = write_audio(duration_s=3.5, sample_rate_hz=48_000)
    samples = whole(path)
    middle = samples[(len(samples) - 96_000) // 2 :][:96_000]
    for temperature in (1.0, 0.5, 3.0):
        calibrated = Predictor(dataclasses.replace(tiny_bundle, temperature=temperature), predictor.backend)
        found = calibrated.predict([path])[0]
        np.testing.assert_allclose(
            found.probabilities, np.exp(by_hand(torch_model, [middle], temperature))[0], atol=1e-4
        )
        assert found.predicted == predictor.labels[int(found.probabilities.argmax())]
        assert found.confidence == found.probabilities.max()
    assert (found.status, found.error) == ("ok", None)
    assert (found.duration_s, found.scored_s) == (3.5, 2.0)
    assert (found.sample_rate_hz, found.channels) == (48_000, 1)


@pytest.mark.parametrize("crops", [2, 3])
def test_crops_are_evenly_spaced_and_pooled_by_log_probability(
    crops: int, tiny_bundle: Bundle, predictor: Predictor, torch_model: torch.nn.Module, write_audio: WriteAudio
) -> None:
    path, short = write_audio(duration_s=5.0, sample_rate_hz=48_000), write_audio("short.wav", duration_s=1.2)
    samples = whole(path)
    starts = [(5.0 - 2.0) * (k + 0.5) / crops for k in range(crops)]
    log_p = by_hand(torch_model, [samples[round(start * 48_000) :][:96_000] for start in starts])
    found, of_short = Predictor.from_bundle(tiny_bundle.folder, threads=1, crops=crops).predict([path, short])
    np.testing.assert_allclose(found.probabilities, together(log_p), atol=1e-4)
    assert np.abs(together(log_p) - np.exp(log_p[0])).max() > 1e-3, "the crops say the same: this test cannot fail"
    assert found.scored_s == pytest.approx(min(5.0, starts[-1] - starts[0] + 2.0))
    np.testing.assert_allclose(of_short.probabilities, predictor.predict([short])[0].probabilities, atol=1e-6)
    assert of_short.scored_s == pytest.approx(1.2)


def test_crops_far_apart_equal_those_of_one_read(tiny_bundle: Bundle, write_audio: WriteAudio) -> None:
    """Beyond a minute, windows are read one by one."""
    path = write_audio(duration_s=70.0, sample_rate_hz=8_000)
    excerpt = listen(path, tiny_bundle.features, crops=3)
    samples = whole(path)
    for features, start_s in zip(excerpt.features, [68 / 6, 34.0, 68 * 5 / 6], strict=True):
        expected = extract(samples[round(start_s * 48_000) :][:96_000], tiny_bundle.features)
        np.testing.assert_allclose(features, expected, atol=2e-2)  # soxr's float noise, in units of the clip's std
        assert np.abs(features - expected).mean() < 1e-4


def test_batches_do_not_matter_and_order_is_kept(
    tiny_bundle: Bundle, predictor: Predictor, write_audio: WriteAudio
) -> None:
    paths = [write_audio(f"{i}.wav", f0_hz=100 + 60 * i, seed=i) for i in range(5)]
    alone = [predictor.predict([path])[0].probabilities for path in paths]
    batched = Predictor(tiny_bundle, predictor.backend, batch_size=2).predict(paths)
    np.testing.assert_allclose([p.probabilities for p in batched], alone, atol=1e-5)
    assert len({tuple(p.round(4)) for p in alone}) == 5, "the recordings sound the same: this test cannot fail"


def test_probabilities_sum_to_one_and_take_many(predictor: Predictor) -> None:
    features = np.random.default_rng(0).standard_normal((20, 1, 64, 188)).astype(np.float32)
    p = predictor.probabilities(features)
    assert (p.shape, p.dtype) == ((20, 8), np.float64)
    np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=1e-12)
    assert predictor.probabilities(features[:0]).shape == (0, 8)
    with pytest.raises(SerError, match=r"\(n, 1, 64, 188\), got \(20, 1, 64, 100\)"):
        predictor.probabilities(features[..., :100])


def test_bad_recordings_are_told_and_leave_the_good_ones_alone(
    predictor: Predictor, write_audio: WriteAudio, tmp_path: Path
) -> None:
    good = write_audio("good.wav", duration_s=1.0)
    (empty := tmp_path / "empty.wav").touch()
    (text := tmp_path / "text.wav").write_text("this is no audio, but it is long enough to look at" * 10)
    (cut := tmp_path / "cut.wav").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (folder := tmp_path / "folder.wav").mkdir()
    silent = write_audio("nan.wav", samples=np.full(16_000, np.nan, np.float32), subtype="FLOAT")
    sources = [empty, text, cut, folder, tmp_path / "gone.wav", silent, b"RIFF"]
    first, *bad, last = predictor.predict([good, *sources, good.read_bytes()])
    statuses = ["empty_file", "not_audio", "truncated", "not_a_file", "not_found", "not_finite"]
    assert [p.status for p in bad[:-1]] == statuses
    assert bad[-1].status in audio.ERRORS
    for prediction in bad:
        assert (prediction.predicted, prediction.label()) == (None, None)
        assert np.isnan(prediction.probabilities).all()
        assert prediction.probabilities.shape == (8,)
        assert prediction.error is not None
        assert "\n" not in prediction.error
    alone = predictor.predict([good])[0].probabilities
    for prediction in (first, last):
        assert prediction.ok
        np.testing.assert_allclose(prediction.probabilities, alone, atol=1e-6)
    missing, timeline = predictor.follow(tmp_path / "gone.wav", SlidingWindow(2.0, 1.0))
    assert (missing.status, timeline.names(predictor.labels)) == ("not_found", [])


def test_an_unforeseen_error_is_a_status_too(
    predictor: Predictor, write_audio: WriteAudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_audio()

    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output\nerror", "caf\udce9.wav")

    monkeypatch.setattr(audio, "load_middle", broken)
    found = predictor.predict([path])[0]
    assert (found.status, found.error) == ("internal_error", "OSError: [Errno 5] Input/output error: 'caf\\udce9.wav'")


def test_channels_are_heard_apart(predictor: Predictor, write_audio: WriteAudio) -> None:
    sides = write_audio("l.wav", f0_hz=90), write_audio("r.wav", f0_hz=330, syllables_hz=8)
    both = beside(write_audio, *sides)
    mixed = predictor.predict([both])[0].probabilities
    for channel, expected in enumerate(predictor.predict(sides)):
        found = predictor.predict([both], channel=channel)[0].probabilities
        np.testing.assert_allclose(found, expected.probabilities, atol=1e-4)
        assert np.abs(mixed - expected.probabilities).max() > 1e-3
    assert predictor.predict([both], channel=2)[0].status == "no_such_channel"


def test_names_that_are_not_utf_8(predictor: Predictor, write_audio: WriteAudio, tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav")
    os.rename(write_audio(), path)
    by_path, by_uri = predictor.predict([path, f"file://{tmp_path}/caf%E9.wav"])
    assert by_path.ok
    np.testing.assert_array_equal(by_path.probabilities, by_uri.probabilities)


def prediction(*p: float, level_dbfs: float = -30.0) -> Prediction:
    probabilities = np.array(p)
    return Prediction("ok", None, "abc"[probabilities.argmax()], max(p), probabilities, 1.0, 1.0, 16_000, 1, level_dbfs)


def test_doubt_is_visible() -> None:
    sure, unsure = prediction(0.9, 0.06, 0.04), prediction(0.4, 0.35, 0.25)
    assert sure.entropy == pytest.approx(scipy.stats.entropy([0.9, 0.06, 0.04], base=3))
    assert prediction(1 / 3, 1 / 3, 1 / 3).entropy == pytest.approx(1.0)
    assert prediction(0.0, 1.0, 0.0).entropy == 0.0
    assert sure.margin == pytest.approx(0.84)
    assert [p.label(0.5) for p in (sure, unsure)] == ["a", UNCERTAIN]
    assert unsure.label(0.4) == "a"
    assert prediction(0.9, 0.06, 0.04, level_dbfs=-71.0).label(0.95) == SILENCE
    assert prediction(0.9, 0.06, 0.04, level_dbfs=-71.0).label(silence_dbfs=-80.0) == "a"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"crops": 0}, "crops"),
        ({"backend": "tpu"}, "auto, onnx, torch"),
        ({"backend": "onnx", "device": "cuda"}, "--backend torch"),
        ({"backend": "torch", "device": "warp"}, "--device cpu"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], word: str, tiny_bundle: Bundle) -> None:
    with pytest.raises(SerError, match=word):
        Predictor.from_bundle(tiny_bundle.folder, threads=1, **options)


def test_a_bundle_says_which_window_it_hears(
    speech_bundle: Bundle, torch_model: torch.nn.Module, write_audio: WriteAudio
) -> None:
    voice = whole(write_audio(duration_s=1.0, sample_rate_hz=48_000))
    samples = np.pad(voice, (336_000, 96_000))
    path = write_audio("late.wav", samples=samples, sample_rate_hz=48_000, subtype="FLOAT")
    heard = audio.load_middle(path, window="speech")
    assert heard.start_s == pytest.approx(6.5, abs=0.1)
    expected = np.exp(by_hand(torch_model, [heard.samples]))[0]
    ours = Predictor.from_bundle(speech_bundle.folder, threads=1, crops=1)
    for excerpt in (ours.listen(path), ours.listen(path, isolated=True)):
        (found,) = ours.classify([excerpt])
        np.testing.assert_allclose(found.probabilities, expected, atol=1e-4)
        assert found.label() == found.predicted


def test_windows_are_those_of_the_whole_recording(
    predictor: Predictor, torch_model: torch.nn.Module, write_audio: WriteAudio
) -> None:
    path = write_audio(duration_s=4.5, sample_rate_hz=48_000)
    samples = whole(path)
    starts = [0.0, 1.0, 2.0, 2.5]
    expected = by_hand(torch_model, [samples[round(s * 48_000) :][:96_000] for s in starts])
    found, timeline = predictor.follow(path, SlidingWindow(2.0, 1.0))
    np.testing.assert_array_equal(timeline.start_s, starts)
    np.testing.assert_array_equal(timeline.end_s, [2.0, 3.0, 4.0, 4.5])
    assert list(timeline.channel) == ["mix"] * 4
    np.testing.assert_allclose(timeline.probabilities, np.exp(expected), atol=1e-4)
    np.testing.assert_allclose(found.probabilities, together(expected), atol=1e-4)
    rms = [np.sqrt(np.mean(np.square(samples[round(s * 48_000) :][:96_000], dtype=float))) for s in starts]
    np.testing.assert_allclose(timeline.level_dbfs, 20 * np.log10(rms), atol=1e-3)
    assert (found.status, found.duration_s, found.scored_s) == ("ok", 4.5, 4.5)


def test_reading_in_parts_changes_nothing(
    predictor: Predictor, write_audio: WriteAudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_audio(duration_s=9.7, sample_rate_hz=44_100)
    at_once = predictor.follow(path, SlidingWindow(2.0, 0.7))[1]
    monkeypatch.setattr("pipeline.inference.excerpts._SPAN_S", 3.0)
    in_parts = predictor.follow(path, SlidingWindow(2.0, 0.7))[1]
    np.testing.assert_array_equal(in_parts.start_s, at_once.start_s)
    np.testing.assert_allclose(in_parts.probabilities, at_once.probabilities, atol=1e-4)


def test_a_recording_shorter_than_the_window_is_heard_as_ever(predictor: Predictor, write_audio: WriteAudio) -> None:
    path = write_audio(duration_s=1.3)
    found, timeline = predictor.follow(path, SlidingWindow(2.0, 1.0))
    assert (list(timeline.start_s), list(timeline.end_s)) == ([0.0], [1.3])
    np.testing.assert_allclose(found.probabilities, predictor.predict([path])[0].probabilities, atol=1e-5)


def test_silence_is_marked_and_not_pooled(predictor: Predictor, write_audio: WriteAudio) -> None:
    pause, steps = np.zeros(96_000, np.float32), SlidingWindow(2.0, 2.0)
    voice = whole(write_audio(duration_s=2.0, sample_rate_hz=48_000))
    path = write_audio("pause.wav", samples=np.concatenate([pause, voice, pause]), sample_rate_hz=48_000)
    found, timeline = predictor.follow(path, steps)
    assert timeline.names(predictor.labels) == [SILENCE, found.predicted, SILENCE]
    np.testing.assert_allclose(found.probabilities, timeline.probabilities[1], atol=1e-12)
    assert found.label() == found.predicted
    assert (found.duration_s, found.scored_s) == (6.0, 2.0)
    nothing, _ = predictor.follow(write_audio("nothing.wav", samples=pause, sample_rate_hz=48_000), steps)
    assert (nothing.status, nothing.label(), nothing.scored_s) == ("ok", SILENCE, 0.0)


@pytest.mark.parametrize("rate_hz", [8_000, 48_000])
@pytest.mark.parametrize("steps", [None, SlidingWindow(2.0, 2.0), SlidingWindow(0.5, 0.25), SlidingWindow(0.1, 0.1)])
def test_too_little_sound_has_no_answer(
    predictor: Predictor, write_audio: WriteAudio, rate_hz: int, steps: SlidingWindow | None
) -> None:
    voice = whole(write_audio(duration_s=3.0, sample_rate_hz=rate_hz), rate_hz)

    def status(samples: np.ndarray) -> tuple[str, str | None]:
        path = write_audio("cut.wav", samples=samples, sample_rate_hz=rate_hz)
        found = predictor.predict([path])[0] if steps is None else predictor.follow(path, steps)[0]
        if found.status == "too_short":
            assert (found.predicted, np.isnan(found.confidence)) == (None, True)
            assert found.error is not None
            assert "cut.wav" in found.error
            assert "0.25 s" in found.error
        return found.status, found.label()

    for seconds in (1 / rate_hz, 0.001, 0.1, 0.249):
        assert status(voice[: max(round(seconds * rate_hz), 1)]) == ("too_short", None)
    assert status(voice[: round(0.26 * rate_hz)])[0] == "ok"
    click = np.zeros(3 * rate_hz, np.float32)
    click[rate_hz : rate_hz + round(0.02 * rate_hz)] = 0.9
    if steps is None or steps.window_s >= 0.25:
        assert status(click)[0] == "too_short"
    assert status(np.zeros(3 * rate_hz, np.float32)) == ("ok", SILENCE)
    assert status(voice * 1e-5) == ("ok", SILENCE)


def test_channels_that_cancel_are_heard_and_said(predictor: Predictor, write_audio: WriteAudio) -> None:
    voice = whole(write_audio(duration_s=5.0), 16_000)
    both = write_audio("both.wav", samples=np.stack([voice, -0.9 * voice], axis=1))
    left, mixed = predictor.predict([both], channel=0)[0], predictor.predict([both])[0]
    assert left.notice == ""
    for found in (mixed, predictor.follow(both, SlidingWindow(2.0, 2.0))[0]):
        assert found.label() != SILENCE
        assert "channel 0" in found.notice
    np.testing.assert_allclose(mixed.probabilities, left.probabilities, atol=1e-9)


def test_each_channel_has_its_own_windows(predictor: Predictor, write_audio: WriteAudio) -> None:
    sides = write_audio("l.wav", f0_hz=90, duration_s=4.0), write_audio("r.wav", f0_hz=330, duration_s=4.0)
    both, steps = beside(write_audio, *sides), SlidingWindow(2.0, 2.0)
    found, timeline = predictor.follow(both, steps, channels="each")
    assert list(timeline.channel) == ["0", "0", "1", "1"]
    alone = [predictor.follow(path, steps)[1].log_p for path in sides]
    np.testing.assert_allclose(timeline.log_p, np.concatenate(alone), atol=1e-3)
    np.testing.assert_allclose(found.probabilities, together(timeline.log_p), atol=1e-9)
    right = predictor.follow(both, steps, channels=1)[1]
    np.testing.assert_allclose(right.log_p, timeline.log_p[2:], atol=1e-9)


def test_windows_longer_than_the_models_are_refused(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(SerError, match="--window_s 2"):
        predictor.follow(tmp_path / "any.wav", SlidingWindow(3.0, 1.0))
