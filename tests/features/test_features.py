"""The log-mel contract against librosa's own calls, the frame features, and physics."""

from __future__ import annotations

import json
from typing import Any

import librosa
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.features.features import (
    FeatureConfig,
    FeatureError,
    extract,
    frame_features,
    log_mel,
    mel_power,
)

CONFIG = FeatureConfig()
FRAMES = FeatureConfig(kind="frame_features")


def speech_like(seed: int, n: int = 96_000, rate_hz: int = 48_000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = np.arange(n) / rate_hz
    f0 = rng.uniform(90, 260) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(1, 5) * t))
    voiced = sum(np.sin(2 * np.pi * k * np.cumsum(f0) / rate_hz) / k for k in range(1, 20))
    envelope = np.clip(np.sin(2 * np.pi * 3 * t), 0, None) ** 2
    return (0.1 * voiced * envelope + 0.001 * rng.standard_normal(n)).astype(np.float32)


def librosa_log_mel(samples: np.ndarray) -> np.ndarray:
    mel = librosa.feature.melspectrogram(y=samples, sr=48_000, n_fft=2048, hop_length=512, n_mels=64)
    decibel = librosa.power_to_db(mel, ref=np.max)
    return (decibel - decibel.mean()) / (decibel.std() + 1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_log_mel_equals_librosa(seed: int) -> None:
    samples = speech_like(seed)
    ours = log_mel(samples, CONFIG)
    assert ours.shape == (1, 64, 188) == CONFIG.input_shape
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours[0], librosa_log_mel(samples), atol=1e-4)


@pytest.mark.parametrize(
    ("rate_hz", "n_fft", "hop", "n_mels", "n", "f_max_hz"),
    [
        (16_000, 512, 160, 40, 16_000, None),
        (48_000, 2048, 512, 64, 50_001, None),
        (22_050, 1024, 256, 80, 3_000, None),
        *((48_000, 2048, 512, 64, 96_000, f_max_hz) for f_max_hz in (4_000.0, 8_000.0, 24_000.0)),
    ],
)
def test_mel_power_equals_librosa_at_other_settings(
    rate_hz: int, n_fft: int, hop: int, n_mels: int, n: int, f_max_hz: float | None
) -> None:
    samples, cut = speech_like(1, n, rate_hz), {"n_fft": n_fft, "hop_length": hop, "n_mels": n_mels}
    expected = librosa.feature.melspectrogram(y=samples, sr=rate_hz, fmax=f_max_hz, **cut)
    ours = mel_power(samples, FeatureConfig(sample_rate_hz=rate_hz, f_max_hz=f_max_hz, **cut))
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=1e-6 * float(expected.max()))


def test_frame_features_columns_equal_librosa() -> None:
    samples = speech_like(3)
    ours = frame_features(samples, FRAMES)
    assert ours.shape == (188, 190) == FRAMES.input_shape
    mel = librosa.feature.melspectrogram(y=samples, sr=48_000, n_fft=2048, hop_length=512, n_mels=64)
    decibel = librosa.power_to_db(mel, ref=np.max)
    mfcc = librosa.feature.mfcc(S=decibel, n_mfcc=40)
    cut = {"n_fft": 2048, "hop_length": 512, "pad_mode": "constant"}
    expected = [
        mfcc,
        librosa.feature.delta(mfcc),
        librosa.feature.delta(mfcc, order=2),
        decibel,
        librosa.feature.spectral_centroid(y=samples, sr=48_000, **cut),
        librosa.feature.spectral_bandwidth(y=samples, sr=48_000, **cut),
        librosa.feature.spectral_rolloff(y=samples, sr=48_000, roll_percent=0.85, **cut),
        librosa.feature.spectral_flatness(y=samples, **cut),
        librosa.feature.zero_crossing_rate(samples, frame_length=2048, hop_length=512),
        librosa.feature.rms(S=np.abs(librosa.stft(samples, **cut)), frame_length=2048, hop_length=512),
    ]
    rows = np.concatenate(expected)
    standard = (rows - rows.mean(1, keepdims=True)) / (rows.std(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(ours, standard.T, atol=1e-3)


def test_louder_is_the_same_picture() -> None:
    samples = speech_like(4)
    np.testing.assert_allclose(log_mel(samples, CONFIG), log_mel(4 * samples, CONFIG), atol=1e-4)


def test_a_tone_is_brightest_in_its_band() -> None:
    tone = np.sin(2 * np.pi * 1_000 * np.arange(96_000) / 48_000).astype(np.float32)
    centres_hz = librosa.mel_frequencies(n_mels=66, fmin=0, fmax=24_000)[1:-1]
    band = int(mel_power(tone, CONFIG)[:, 50].argmax())
    assert band == int(np.abs(centres_hz - 1_000).argmin())


@pytest.mark.parametrize("config", [CONFIG, FRAMES])
def test_a_constant_stays_finite_and_silence_is_flat(config: FeatureConfig) -> None:
    for value in (0.0, 0.5, 1e-20):
        assert np.isfinite(extract(np.full(96_000, value, np.float32), config)).all()
    assert not log_mel(np.zeros(96_000, np.float32), CONFIG).any()


@given(st.integers(1, 20_000))
@settings(max_examples=40, deadline=None)
def test_frames_follow_the_length(n: int) -> None:
    assert mel_power(np.ones(n, np.float32), CONFIG).shape == (64, 1 + n // 512)


@pytest.mark.parametrize("shape", [(95_999,), (1, 96_000), (0,)])
def test_another_length_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FeatureError, match="96000 mono samples"):
        extract(np.zeros(shape, np.float32), CONFIG)


def test_fingerprint_changes_with_every_setting_and_survives_json() -> None:
    changes = {"n_mels": 80, "window_s": 3.0, "n_fft": 1024, "top_db": 60.0, "kind": "frame_features"}
    changes |= {"f_max_hz": 8_000.0, "window": "speech"}
    configs = [CONFIG, *(FeatureConfig(**{name: value}) for name, value in changes.items())]
    assert len({config.fingerprint() for config in configs}) == 8
    for config in configs:
        assert FeatureConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_default_contract_is_that_of_the_weights_in_circulation() -> None:
    """Bundles and shards made before `f_max_hz` and `window` existed carry this fingerprint."""
    assert FeatureConfig().fingerprint() == "37816ab17e87f83d"
    assert FeatureConfig.from_dict({"n_mels": 64}).window == "middle"


def test_bands_up_to_8_khz_are_deaf_to_what_lies_above() -> None:
    """Physics: a tone of 9 kHz beside the speech changes nothing but by its window's side lobes."""
    low, t = FeatureConfig(f_max_hz=8_000.0), np.arange(96_000) / 48_000
    speech = speech_like(5)
    hissing = (speech + 0.1 * np.sin(2 * np.pi * 9_000 * t)).astype(np.float32)
    assert np.abs(log_mel(hissing, low) - log_mel(speech, low)).mean() < 0.02
    assert np.abs(log_mel(hissing, CONFIG) - log_mel(speech, CONFIG)).mean() > 0.1


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"n_chroma": 12}, "n_chroma"),
        ({"hop_length": 0}, "positive"),
        *(({"window_s": number}, "finite") for number in (float("nan"), float("inf"))),
        ({"window_s": 1e6}, "at most 60 s"),
        ({"window_s": 0.001}, "shorter than one hop"),
        ({"window": "loudest"}, "loudest"),
        ({"kind": "wavelet"}, "kind"),
        *(({"f_max_hz": f_max_hz}, "24000 Hz") for f_max_hz in (0.0, -1.0, 24_000.5, float("nan"))),
        ({"kind": "frame_features", "n_mels": 32}, "n_mfcc=40"),
        ({"n_mels": 256, "f_max_hz": 4_000.0}, "n_mels=256"),
        ({"n_mels": 10**12}, "n_fft=2048"),
    ],
)
def test_unknown_or_impossible_settings_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(FeatureError, match=word):
        FeatureConfig.from_dict(settings)
