"""How much of a sound may be speech, and where most of it is: physics, and voices that a synthesiser made."""

from __future__ import annotations

import numpy as np
import pytest
from audio_recordings import AV_FORMATS, FORMATS, encoded, encoded_av
from conftest import speech_like

from pipeline.audio.isolated import decode_in_subprocess
from pipeline.audio.load import Clip, content_hash, load_middle, load_once
from pipeline.audio.speech import LEAST_SHARE, SpeechSearch, speech_share

RATE_HZ = 48_000
T = np.arange(2 * RATE_HZ) / RATE_HZ


def noise(slope: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    spectrum = np.fft.rfft(rng.standard_normal(len(T)))
    return np.fft.irfft(spectrum / np.maximum(np.fft.rfftfreq(len(T), 1 / RATE_HZ), 20) ** slope, len(T))


@pytest.mark.parametrize(
    "sound",
    [
        np.zeros(len(T)),
        np.full(len(T), 0.5),
        np.sin(2 * np.pi * 440 * T),
        np.sin(2 * np.pi * 120 * T),
        np.sin(2 * np.pi * (200 * T + 300 * T**2)),
        noise(0.0),
        noise(0.5),
        noise(1.0),
    ],
    ids=["silence", "offset", "tone", "low tone", "sweep", "white", "pink", "brown"],
)
def test_what_has_no_voice(sound: np.ndarray) -> None:
    sound = sound / max(np.abs(sound).max(), 1e-9) * 0.3
    assert speech_share(sound.astype(np.float32), RATE_HZ) < LEAST_SHARE


def test_a_voice_is_one_at_any_level_and_rate() -> None:
    voice = speech_like(duration_s=2.0, sample_rate_hz=RATE_HZ)
    share = speech_share(voice, RATE_HZ)
    assert share > 0.5
    assert speech_share(0.01 * voice, RATE_HZ) == pytest.approx(share, abs=0.05)
    assert speech_share(voice[::3].copy(), RATE_HZ // 3) == pytest.approx(share, abs=0.15)
    half = np.concatenate([voice, np.zeros_like(voice)])
    assert speech_share(half, RATE_HZ) == pytest.approx(share / 2, abs=0.1)


def test_of_less_than_half_a_second_it_cannot_be_told() -> None:
    assert np.isnan(speech_share(np.ones(20_000, np.float32), RATE_HZ))


# --- where most of it is ----------------------------------------------------------------------------------------------

FRAME_S = 0.032


def hidden(at_s: float, noise_level: float = 0.0, rate_hz: int = 48_000, length_s: float = 12.0) -> np.ndarray:
    """A second of a voice that begins at ``at_s`` of a silence or a noise, ``(n,)``."""
    samples = noise_level * np.random.default_rng(1).standard_normal(round(length_s * rate_hz))
    voice = speech_like(duration_s=1.0, sample_rate_hz=rate_hz)
    samples[round(at_s * rate_hz) :][: len(voice)] += voice
    return samples.astype(np.float32)


def same(one: Clip, other: Clip) -> bool:
    return (one.start_s, one.scored_s, one.info) == (other.start_s, other.scored_s, other.info) and np.array_equal(
        one.samples, other.samples
    )


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 44_100, 96_000])
@pytest.mark.parametrize(("at_s", "start_s"), [(0.0, 0.0), (2.3, 1.8), (7.1, 6.6), (8.9, 8.4), (11.0, 10.0)])
@pytest.mark.parametrize("noise_level", [0.0, 0.003])
def test_a_voice_is_found_where_it_is(rate_hz: int, at_s: float, start_s: float, noise_level: float) -> None:
    data = encoded(hidden(at_s, noise_level, rate_hz), rate_hz)
    found = load_middle(data, window="speech")
    free = 0 < start_s < 10  # else the window holds all of the voice from other places, too
    assert found.start_s == pytest.approx(start_s, abs=1.5 * FRAME_S if free else 0.5 + FRAME_S)
    assert found.start_s <= at_s + 1e-9
    assert found.start_s + 2 >= at_s + 1 - 1e-9
    assert found.scored_s == 2.0
    assert same(load_once(data, windows_s=[2.0], window="speech").clips[0], found)


def test_where_it_makes_no_difference_it_is_the_middle_to_the_bit() -> None:
    rate_hz = 44_100
    sounds = {
        "silence": np.zeros(5 * rate_hz),
        "tone": 0.3 * np.sin(2 * np.pi * 440 * np.arange(5 * rate_hz) / rate_hz),
        "voice in the middle": hidden(2.1, rate_hz=rate_hz, length_s=5.0),
        "short voice": speech_like(duration_s=1.3, sample_rate_hz=rate_hz),
        "just the window": speech_like(duration_s=2.0, sample_rate_hz=rate_hz),
        "a sample": np.ones(1),
    }
    for name, samples in sounds.items():
        data = encoded(samples.astype(np.float32), rate_hz)
        for window_s in (2.0, 0.02) if "voice" not in name else (2.0,):
            middle = load_middle(data, window_s=window_s)
            assert same(load_middle(data, window_s=window_s, window="speech"), middle), name


def test_neither_bangs_nor_broken_samples_hide_a_voice() -> None:
    samples = 0.003 * hidden(8.0, rate_hz=16_000)
    samples[16_000:16_080] = np.random.default_rng(0).uniform(-1, 1, 80)  # 50 dB above the voice
    samples[48_000] = np.nan
    samples[50_000] = 3e38
    found = load_middle(encoded(samples, 16_000, codec="FLOAT"), window="speech")
    assert found.start_s == pytest.approx(7.5, abs=1.5 * FRAME_S)


def test_the_channel_that_is_heard_decides() -> None:
    early, late = hidden(1.0, rate_hz=16_000), hidden(9.0, rate_hz=16_000)
    stereo = encoded(np.stack([early, late], axis=1), 16_000)
    starts = [load_middle(stereo, window="speech", channel=channel).start_s for channel in (0, 1)]
    assert starts == pytest.approx([0.5, 8.5], abs=1.5 * FRAME_S)
    cancelling = encoded(np.stack([late, -late], axis=1), 16_000)
    found = load_middle(cancelling, window="speech")
    assert found.start_s == pytest.approx(8.5, abs=1.5 * FRAME_S)
    assert "loudest" in found.info.notice


def test_in_which_parts_it_comes_makes_no_difference() -> None:
    samples, starts = hidden(7.0, 0.001, 8_000, length_s=20.0), []
    for size in (7, 100, 4096, len(samples)):
        search = SpeechSearch(8_000)
        for begin in range(0, len(samples), size):
            search.add(samples[begin : begin + size])
        starts.append(search.start_s(2.0, 20.0))
    assert len(set(starts)) == 1
    assert starts[0] == pytest.approx(6.5, abs=1.5 * FRAME_S)


@pytest.mark.parametrize("data", ["sndfile", "ffmpeg"])
def test_one_reading_finds_what_the_other_finds_in_every_format(data: str) -> None:
    """The same window, to the bit, for training (`load_once`) and for answers; the longer one lies around it."""
    if data == "sndfile":
        kinds = [(c, k, rate_hz) for c, k, rate_hz, channels, _ in FORMATS if channels == 1]
        recordings = [encoded(hidden(8.0, 0.001, rate_hz), rate_hz, c, k) for c, k, rate_hz in kinds]
    else:
        recordings = [encoded_av(hidden(8.0, 0.001, rate), rate, c, k) for c, k, rate, _ in AV_FORMATS]
    for recording in recordings:
        apart = load_middle(recording, window="speech")
        once = load_once(recording, windows_s=[2.0, 6.0], window="speech")
        assert same(once.clips[0], apart)
        assert once.content_hash == content_hash(recording)
        assert apart.start_s == pytest.approx(7.5, abs=0.1)
        assert once.clips[1].start_s == pytest.approx(min(apart.start_s - 2, 6.0), abs=0.15)


def test_a_process_of_its_own_finds_the_same() -> None:
    data = encoded(hidden(8.0, rate_hz=16_000), 16_000)
    there = decode_in_subprocess(data, decode=load_once, windows_s=[2.0], window="speech")
    assert same(there.clips[0], load_middle(data, window="speech"))
