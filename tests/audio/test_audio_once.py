"""One decode yields middles and content hash: to the bit what `load_middle` and `content_hash` yield apart."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from audio_recordings import AV_FORMATS, FORMATS, ONE_SECOND, code_of, encoded, encoded_av, voice

from pipeline.audio import decoders
from pipeline.audio import load as audio
from pipeline.audio.load import Limits, load_middle

ONCE = [  # each number of channels, rate and length, shorter and longer than the windows and than a block
    *((1, 16_000, 0.05), (1, 44_100, 31.3), (1, 48_000, 3.7)),
    *((2, 16_000, 31.3), (2, 44_100, 2.0), (2, 48_000, 0.05)),
    *((6, 16_000, 3.7), (6, 44_100, 0.05), (6, 48_000, 2.0)),
]


def same_as_apart(data: bytes, windows_s: tuple[float, ...] = (2.0, 6.0), **options: int) -> bool:
    """Whether `load_once` gives, to the bit, what the separate calls give."""
    found = audio.load_once(data, windows_s=windows_s, **options)
    apart = [load_middle(data, window_s=window_s, **options) for window_s in windows_s]
    assert [(a.start_s, a.scored_s, a.info) for a in found.clips] == [(b.start_s, b.scored_s, b.info) for b in apart]
    samples = all(np.array_equal(a.samples, b.samples) for a, b in zip(found.clips, apart, strict=True))
    return samples and found.content_hash == audio.content_hash(data)


@pytest.mark.parametrize(("channels", "rate_hz", "duration_s"), ONCE)
def test_one_decode_gives_what_three_gave(channels: int, rate_hz: int, duration_s: float) -> None:
    samples = voice(duration_s, rate_hz, channels)
    assert same_as_apart(encoded(samples, rate_hz))
    assert same_as_apart(encoded(samples, rate_hz, "FLAC"), sample_rate_hz=16_000)
    assert same_as_apart(encoded(samples, rate_hz, codec="FLOAT"), windows_s=(6.0, 0.3, 40.0))


@pytest.mark.parametrize(("container", "codec", "rate_hz", "channels", "error"), FORMATS)
def test_one_decode_of_every_format(
    container: str, codec: str, rate_hz: int, channels: int, error: float | None
) -> None:
    assert same_as_apart(encoded(voice(7.0, rate_hz, channels), rate_hz, container, codec))


@pytest.mark.parametrize(("container", "codec", "rate_hz", "name"), AV_FORMATS)
def test_one_decode_of_containers_of_the_extra(container: str, codec: str, rate_hz: int, name: str) -> None:
    assert same_as_apart(encoded_av(voice(9.0, rate_hz), rate_hz, container, codec))


@pytest.mark.parametrize("gains", [(1.0, -1.0), (1.0, -0.9), (0.5, 0.0, -0.5, 0.0, 0.0, 0.0)])
@pytest.mark.parametrize("rate_hz", [16_000, 48_000])
def test_one_decode_where_channels_cancel(gains: tuple[float, ...], rate_hz: int) -> None:
    samples = voice(9.0, rate_hz) * np.float32(gains)
    assert same_as_apart(encoded(samples, rate_hz))
    third = len(samples) // 3
    samples[third : 2 * third] = np.abs(samples[third : 2 * third])  # they cancel around the shorter middle alone
    assert same_as_apart(encoded(samples, rate_hz))
    found = audio.load_once(encoded(samples, rate_hz), windows_s=(2.0, 9.0))
    assert [bool(clip.info.notice) for clip in found.clips] == [False, False]
    samples[:] = voice(9.0, rate_hz)
    samples[third : 2 * third] *= np.float32(gains)
    assert same_as_apart(encoded(samples, rate_hz))
    found = audio.load_once(encoded(samples, rate_hz), windows_s=(9.0, 2.0))
    assert [bool(clip.info.notice) for clip in found.clips] == [False, True]


def test_frames_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    blocks = decoders.SndfileDecoder.blocks

    def counted(*given: Any) -> Iterator[Any]:
        for block in blocks(*given):
            decoded.append(len(block))
            yield block

    monkeypatch.setattr(decoders.SndfileDecoder, "blocks", counted)
    audio.load_once(encoded(voice(31.3, 44_100), 44_100, "FLAC"), windows_s=(2.0, 6.0))
    assert sum(decoded) == round(31.3 * 44_100)


def test_damage_outside_of_the_middles_costs_the_hash_alone() -> None:
    data = bytearray(encoded(voice(31.3, 16_000), 16_000, "FLAC"))
    data[len(data) // 8 : len(data) // 8 + 2_000] = bytes(2_000)
    assert code_of(bytes(data), audio.content_hash) == "corrupt"
    found = audio.load_once(bytes(data), windows_s=(2.0, 6.0))
    assert found.content_hash == ""
    assert np.array_equal(found.clips[1].samples, load_middle(bytes(data), window_s=6.0).samples)

    samples = voice(9.0, 16_000).copy()
    samples[100] = np.nan  # a hash is of whatever the samples are
    assert same_as_apart(encoded(samples, 16_000, codec="FLOAT"))
    samples[2 * 16_000] = np.nan  # in the longer middle
    assert code_of(encoded(samples, 16_000, codec="FLOAT"), audio.load_once, windows_s=(2.0, 6.0)) == "not_finite"


def test_what_is_refused_is_refused_as_before() -> None:
    once = partial(audio.load_once, windows_s=(2.0, 6.0))
    for limits in (Limits(max_duration_s=0.9), Limits(max_decoded_bytes=63_999), Limits(min_rate_hz=16_001)):
        assert code_of(ONE_SECOND, once, limits=limits) == code_of(ONE_SECOND, limits=limits) != "ok"
    for broken in (b"", b"RIFF", ONE_SECOND[:44], ONE_SECOND[:999], b"fLaC" + bytes(30)):
        assert code_of(broken, once) == code_of(broken) != "ok"
    with pytest.raises(ValueError, match="expected 1 or more"):
        audio.load_once(ONE_SECOND, windows_s=(2.0, 0.0))
