"""Which parts of a recording are heard: crops, walking windows, the middle, or where most of the speech is.

By properties, by physics, by voices that a synthesiser made, and one way of reading against another, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from audio_recordings import AV_FORMATS, FORMATS, ONE_SECOND, Format, code_of, encoded, every_format, same_clip, voice
from conftest import speech_like
from hypothesis import given
from hypothesis import strategies as st

from pipeline.audio import decoders
from pipeline.audio.load import Limits, content_hash, load_middle, load_once
from pipeline.audio.speech import LEAST_SHARE, SpeechSearch, speech_share
from pipeline.audio.windows import MAX_CROPS, SlidingWindow, check_crops, covered_s, crop_starts
from pipeline.storage.errors import SerError
from tests.support.recordings import encode_av

durations = st.floats(0.01, 400.0)


@given(durations, st.floats(0.1, 4.0), st.integers(1, 9))
def test_crops_lie_within_and_evenly(duration_s: float, window_s: float, crops: int) -> None:
    starts = crop_starts(duration_s, window_s, crops)
    if duration_s <= window_s:
        assert starts == [0.0]
        return
    assert len(starts) == crops
    centres = np.array(starts) + window_s / 2
    assert np.mean(centres) == pytest.approx(duration_s / 2)
    assert starts[0] > 0
    assert starts[-1] + window_s < duration_s
    if crops > 1:
        np.testing.assert_allclose(np.diff(starts), (duration_s - window_s) / crops, rtol=1e-9, atol=1e-12)


@given(durations, st.floats(0.1, 4.0), st.floats(0.1, 1.0))
def test_walks_hear_everything(duration_s: float, window_s: float, share: float) -> None:
    hop_s = window_s * share
    starts = SlidingWindow(window_s, hop_s).starts(duration_s)
    assert starts[0] == 0.0
    assert np.all(np.diff(starts) > 0)
    assert np.all(np.diff(starts) <= hop_s * (1 + 1e-9))
    assert covered_s(starts, duration_s, window_s) == pytest.approx(duration_s, abs=2e-3)
    if duration_s > window_s:
        assert starts[-1] + window_s <= duration_s + 1e-6


@given(durations, st.floats(0.1, 4.0), st.lists(st.floats(0.0, 400.0), min_size=1, max_size=8))
def test_covered_is_the_measure_of_the_union(duration_s: float, window_s: float, starts: list[float]) -> None:
    starts = sorted(start for start in starts if start < duration_s) or [0.0]
    ticks = np.linspace(0, duration_s, 20_001)[:-1] + duration_s / 40_000
    inside = np.zeros(len(ticks), dtype=bool)
    for start in starts:
        inside |= (ticks >= start) & (ticks < start + window_s)
    assert covered_s(starts, duration_s, window_s) == pytest.approx(inside.mean() * duration_s, abs=duration_s * 1e-3)


def test_impossible_walks_and_more_crops_than_anybody_wants_are_refused() -> None:
    for window_s, hop_s in ((0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (2.0, 0.0), (2.0, -1.0)):
        with pytest.raises(SerError, match=r"must be 0\.\d+ s or more"):
            SlidingWindow(window_s, hop_s)
    assert SlidingWindow(2.0, 10.0).starts(25.0) == [0.0, 10.0, 20.0, 23.0]  # gaps are possible
    check_crops(MAX_CROPS)
    with pytest.raises(SerError, match="100 or fewer"):
        check_crops(100_000)


# One decode ----------------------------------------------------------------------------------------------------

ONCE = [  # each number of channels, rate and length, shorter and longer than the windows and than a block
    *((1, 16_000, 0.05), (1, 44_100, 31.3), (1, 48_000, 3.7)),
    *((2, 16_000, 31.3), (2, 44_100, 2.0), (2, 48_000, 0.05)),
    *((6, 16_000, 3.7), (6, 44_100, 0.05), (6, 48_000, 2.0)),
]


def same_as_apart(data: bytes, windows_s: tuple[float, ...] = (2.0, 6.0), **options: int) -> bool:
    """Whether `load_once` gives, to the bit, what the separate calls give."""
    found = load_once(data, windows_s=windows_s, **options)
    apart = [load_middle(data, window_s=window_s, **options) for window_s in windows_s]
    alike = [same_clip(one, other) for one, other in zip(found.clips, apart, strict=True)]
    return all(alike) and found.content_hash == content_hash(data)


@pytest.mark.parametrize(("channels", "rate_hz", "duration_s"), ONCE)
def test_one_decode_gives_what_three_gave(channels: int, rate_hz: int, duration_s: float) -> None:
    samples = voice(duration_s, rate_hz, channels)
    assert same_as_apart(encoded(samples, rate_hz))
    assert same_as_apart(encoded(samples, rate_hz, "FLAC"), sample_rate_hz=16_000)
    assert same_as_apart(encoded(samples, rate_hz, codec="FLOAT"), windows_s=(6.0, 0.3, 40.0))


@every_format
def test_one_decode_of_every_format(form: Format) -> None:
    assert same_as_apart(form.voice(7.0))


@pytest.mark.parametrize("gains", [(1.0, -1.0), (1.0, -0.9), (0.5, 0.0, -0.5, 0.0, 0.0, 0.0)])
@pytest.mark.parametrize("rate_hz", [16_000, 48_000])
def test_one_decode_where_channels_cancel(gains: tuple[float, ...], rate_hz: int) -> None:
    samples = voice(9.0, rate_hz) * np.float32(gains)
    third = len(samples) // 3
    around, within = samples.copy(), np.repeat(voice(9.0, rate_hz), len(gains), axis=1)
    around[third : 2 * third] = np.abs(samples[third : 2 * third])  # they cancel around the shorter middle alone
    within[third : 2 * third] = samples[third : 2 * third]
    for sound, windows_s, cancelled in (
        (samples, (2.0, 9.0), [True, True]),
        (around, (2.0, 9.0), [False, False]),
        (within, (9.0, 2.0), [False, True]),
    ):
        data = encoded(sound, rate_hz)
        assert same_as_apart(data)
        found = load_once(data, windows_s=windows_s)
        assert [bool(clip.info.notice) for clip in found.clips] == cancelled


def test_frames_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    blocks = decoders.SndfileDecoder.blocks

    def counted(*given: Any) -> Iterator[Any]:
        for block in blocks(*given):
            decoded.append(len(block))
            yield block

    monkeypatch.setattr(decoders.SndfileDecoder, "blocks", counted)
    load_once(encoded(voice(31.3, 44_100), 44_100, "FLAC"), windows_s=(2.0, 6.0))
    assert sum(decoded) == round(31.3 * 44_100)


def test_damage_outside_of_the_middles_costs_the_hash_alone() -> None:
    data = bytearray(encoded(voice(31.3, 16_000), 16_000, "FLAC"))
    data[len(data) // 8 : len(data) // 8 + 2_000] = bytes(2_000)
    assert code_of(bytes(data), content_hash) == "corrupt"
    found = load_once(bytes(data), windows_s=(2.0, 6.0))
    assert found.content_hash == ""
    assert np.array_equal(found.clips[1].samples, load_middle(bytes(data), window_s=6.0).samples)

    samples = voice(9.0, 16_000).copy()
    samples[100] = np.nan  # a hash is of whatever the samples are
    assert same_as_apart(encoded(samples, 16_000, codec="FLOAT"))
    samples[2 * 16_000] = np.nan  # in the longer middle
    assert code_of(encoded(samples, 16_000, codec="FLOAT"), load_once, windows_s=(2.0, 6.0)) == "not_finite"


def test_what_is_refused_is_refused_as_before() -> None:
    once = partial(load_once, windows_s=(2.0, 6.0))
    for limits in (Limits(max_duration_s=0.9), Limits(max_decoded_bytes=63_999), Limits(min_rate_hz=16_001)):
        assert code_of(ONE_SECOND, once, limits=limits) == code_of(ONE_SECOND, limits=limits) != "ok"
    for broken in (b"", b"RIFF", ONE_SECOND[:44], ONE_SECOND[:999], b"fLaC" + bytes(30)):
        assert code_of(broken, once) == code_of(broken) != "ok"
    with pytest.raises(ValueError, match="expected 1 or more"):
        load_once(ONE_SECOND, windows_s=(2.0, 0.0))


# How much may be speech --------------------------------------------------------------------------------------------

RATE_HZ = 48_000
T = np.arange(2 * RATE_HZ) / RATE_HZ


def noise(slope: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    spectrum = np.fft.rfft(rng.standard_normal(len(T)))
    return np.fft.irfft(spectrum / np.maximum(np.fft.rfftfreq(len(T), 1 / RATE_HZ), 20) ** slope, len(T))


SOUNDS = {
    "silence": np.zeros(len(T)),
    "offset": np.full(len(T), 0.5),
    "tone": np.sin(2 * np.pi * 440 * T),
    "low tone": np.sin(2 * np.pi * 120 * T),
    "sweep": np.sin(2 * np.pi * (200 * T + 300 * T**2)),
    "white": noise(0.0),
    "pink": noise(0.5),
    "brown": noise(1.0),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_what_has_no_voice(name: str) -> None:
    sound = SOUNDS[name] / max(np.abs(SOUNDS[name]).max(), 1e-9) * 0.3
    assert speech_share(sound.astype(np.float32), RATE_HZ) < LEAST_SHARE


def test_a_voice_is_one_at_any_level_and_rate() -> None:
    voice = speech_like(duration_s=2.0, sample_rate_hz=RATE_HZ)
    share = speech_share(voice, RATE_HZ)
    assert share > 0.5
    assert speech_share(0.01 * voice, RATE_HZ) == pytest.approx(share, abs=0.05)
    assert speech_share(voice[::3].copy(), RATE_HZ // 3) == pytest.approx(share, abs=0.15)
    half = np.concatenate([voice, np.zeros_like(voice)])
    assert speech_share(half, RATE_HZ) == pytest.approx(share / 2, abs=0.1)
    assert np.isnan(speech_share(voice[:20_000], RATE_HZ)), "of less than half a second it cannot be told"


# Where most of it is ----------------------------------------------------------------------------------------------

FRAME_S = 0.032


def hidden(at_s: float, noise_level: float = 0.0, rate_hz: int = 48_000, length_s: float = 12.0) -> np.ndarray:
    """A second of a voice that begins at ``at_s`` of a silence or a noise, ``(n,)``."""
    samples = noise_level * np.random.default_rng(1).standard_normal(round(length_s * rate_hz))
    voice = speech_like(duration_s=1.0, sample_rate_hz=rate_hz)
    samples[round(at_s * rate_hz) :][: len(voice)] += voice
    return samples.astype(np.float32)


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
    assert same_clip(load_once(data, windows_s=[2.0], window="speech").clips[0], found)


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
            assert same_clip(load_middle(data, window_s=window_s, window="speech"), middle), name


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


def test_one_reading_finds_what_the_other_finds_in_every_format() -> None:
    """The same window, to the bit, for training (`load_once`) and for answers; the longer one lies around it."""
    recordings = [form.encoded(hidden(8.0, 0.001, form.rate_hz)) for form in FORMATS if form.channels == 1]
    recordings += [encode_av(hidden(8.0, 0.001, rate), rate, container, codec) for container, codec, rate in AV_FORMATS]
    for recording in recordings:
        apart = load_middle(recording, window="speech")
        once = load_once(recording, windows_s=[2.0, 6.0], window="speech")
        assert same_clip(once.clips[0], apart)
        assert once.content_hash == content_hash(recording)
        assert same_as_apart(recording)
        assert apart.start_s == pytest.approx(7.5, abs=0.1)
        assert once.clips[1].start_s == pytest.approx(min(apart.start_s - 2, 6.0), abs=0.15)
