"""Live streams: answered as their sound in a file is, whatever the pieces; limits, hostile senders. Who may: test_auth.

The local engine over real sockets; the oracle is the Predictor over a file of the same samples. Ray: test_serve_ray.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import speech_like
from hypothesis import given
from hypothesis import strategies as st
from serving import KEY
from serving import LocalService as InProcess
from streaming import END, PCM, Heard, opened, pcm_and_wav, pieces, running, sent, webm
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from pipeline.audio.live import WebmReader
from pipeline.audio.windows import SlidingWindow
from pipeline.inference.predictor import Predictor
from pipeline.inference.timeline import Timeline
from pipeline.models.bundle import Bundle
from pipeline.storage.errors import AudioError
from serve.local import LocalService
from serve.problems import overloaded
from serve.routes import create_app


@pytest.fixture(scope="module")
def service(tiny_bundle: Bundle) -> Iterator[tuple[str, LocalService]]:
    with running(tiny_bundle) as found:
        yield found


@pytest.fixture(scope="module")
def url(service: tuple[str, LocalService]) -> str:
    return service[0]


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Bundle) -> Predictor:
    return Predictor.from_bundle(tiny_bundle.folder, threads=1)


def voice(duration_s: float = 4.7, rate_hz: int = 16_000, **more: Any) -> Any:
    """Two voices, one after the other, so that labels change."""
    half = {"duration_s": duration_s / 2, "sample_rate_hz": rate_hz}
    return np.concatenate([speech_like(f0_hz=110, peak=0.2, **half), speech_like(f0_hz=300, seed=3, **half)])


def timeline_of(predictor: Predictor, data: bytes, hop_s: float = 0.5) -> Timeline:
    prediction, timeline = predictor.follow(data, SlidingWindow(2.0, hop_s))
    assert prediction.ok, prediction.error
    return timeline


def assert_as(windows: list[dict[str, Any]], timeline: Timeline, predictor: Predictor, within: float = 2e-4) -> None:
    """Windows as told are those of ``timeline``, but for how a resampler rounds in parts."""
    assert len(windows) == len(timeline)
    assert [window["start_s"] for window in windows] == pytest.approx(list(timeline.start_s), abs=1e-6)
    assert [window["end_s"] for window in windows] == pytest.approx(list(timeline.end_s), abs=1e-6)
    assert [window["level_dbfs"] for window in windows] == pytest.approx(list(timeline.level_dbfs), abs=0.01)
    for window, expected in zip(windows, timeline.probabilities, strict=True):
        by_label = {score["label"]: score["score"] for score in window["scores"]}
        if by_label:
            np.testing.assert_allclose([by_label[name] for name in predictor.labels], expected, atol=within)


def as_its_file(url: str, predictor: Predictor, sound: list[bytes], file: bytes, **said: Any) -> Heard:
    """What is heard in ``sound`` as a stream, which must be what the predictor hears in ``file``."""
    heard = sent(url, [*sound, END], **said)
    assert heard.code == 1000, heard.messages
    assert_as(heard.windows, timeline_of(predictor, file), predictor)
    return heard


@pytest.mark.parametrize(
    ("rate_hz", "kind", "channels", "size"),
    [(8_000, "s16le", 1, 3_331), (16_000, "s16le", 2, 1), (44_100, "s16le", 1, 8_191), (48_000, "f32le", 2, 40_001)],
)
def test_a_stream_is_heard_as_its_file(
    url: str, predictor: Predictor, rate_hz: int, kind: str, channels: int, size: int
) -> None:
    samples = voice(rate_hz=rate_hz)
    if channels == 2:
        samples = np.stack([samples, 0.3 * samples[::-1]], axis=1)
    raw, file = pcm_and_wav(samples, rate_hz, kind)
    size = size if size > 1 else len(raw) // 2 - 1  # a piece that ends within a sample, for the rest is odd as well
    said = {"format": kind, "sample_rate_hz": rate_hz, "channels": channels, "min_confidence": 0.3}
    heard, timeline = as_its_file(url, predictor, pieces(raw, size), file, **said), timeline_of(predictor, file)
    names = timeline.names(predictor.labels, 0.3)
    assert [window["label"] for window in heard.windows] == names
    merged, called = timeline.merged(names)
    assert [segment["label"] for segment in heard.finals] == called
    assert_as(heard.finals, merged, predictor)
    assert sum(segment["windows"] for segment in heard.finals) == len(timeline)
    done = heard.of("done")[0]
    assert (done["windows"], done["skipped"]) == (len(timeline), 0)
    assert done["duration_s"] == pytest.approx(len(samples) / rate_hz)


def test_the_start_says_the_same_as_the_address(url: str, predictor: Predictor) -> None:
    raw, file = pcm_and_wav(voice(3.0), 16_000)
    heard = sent(url, [json.dumps({"type": "start", **PCM, "hop_s": 0.25, "top_k": 2}), raw, END])
    ready = {name: heard.messages[0][name] for name in ("type", "hop_s", "window_s", "labels")}
    assert ready == {"type": "ready", "hop_s": 0.25, "window_s": 2.0, "labels": list(predictor.labels)}
    timeline = timeline_of(predictor, file, 0.25)
    assert [window["start_s"] for window in heard.windows] == pytest.approx(list(timeline.start_s))
    for window, p in zip(heard.windows, timeline.probabilities, strict=True):
        assert [score["score"] for score in window["scores"]] == pytest.approx(sorted(p)[:-3:-1], abs=2e-4)


def test_answers_come_while_the_sound_does(url: str) -> None:
    raw, _ = pcm_and_wav(voice(6.0), 16_000)
    with opened(url, **PCM) as socket:
        assert json.loads(socket.recv())["type"] == "ready"
        for number in range(3):
            socket.send(raw[: 2 * 16_000 * 2 + 4_000] if number == 0 else raw[number * 16_000 : (number + 1) * 16_000])
            answer = json.loads(socket.recv(timeout=30))
            assert answer["window"]["start_s"] == 0.5 * number
            assert answer["segments"][-1]["final"] is False
            assert answer["segments"][-1]["end_s"] == answer["window"]["end_s"]
            assert answer["received_s"] >= answer["window"]["end_s"]


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("size", [997, 200_000])
def test_webm_is_heard_as_its_file(url: str, predictor: Predictor, live: bool, size: int) -> None:
    file = webm(voice(4.7, 48_000), live=live)
    as_its_file(url, predictor, pieces(file, size), file, format="webm")


def test_silence_and_what_is_no_speech_are_told_as_everywhere(url: str) -> None:
    t = np.arange(3 * 16_000) / 16_000
    quiet, tone = np.zeros(3 * 16_000, np.float32), (0.3 * np.sin(2 * np.pi * 1000 * t)).astype(np.float32)
    raw, _ = pcm_and_wav(np.concatenate([quiet, tone]), 16_000)
    heard = sent(url, [raw[:96_000], raw[96_000:], END], **PCM)
    assert [heard.windows[at]["label"] for at in (0, -1)] == ["silence", "not_speech"]
    for told in (heard.windows[0], heard.windows[-1], heard.finals[0], heard.finals[-1]):
        assert told["scores"] == []
        assert "confidence" not in told


@pytest.mark.parametrize(("seconds", "windows"), [(0.0, 0), (0.2, 0), (0.7, 1), (2.0, 1), (2.3, 2)])
def test_short_streams(url: str, predictor: Predictor, seconds: float, windows: int) -> None:
    raw, file = pcm_and_wav(speech_like(duration_s=seconds or 0.1), 16_000)
    if windows:
        heard = as_its_file(url, predictor, [raw], file, **PCM)
    else:
        heard = sent(url, [raw, END] if seconds else [END], **PCM)
    assert (heard.code, len(heard.windows), heard.of("done")[0]["windows"]) == (1000, windows, windows)


VOICE, WHOLE = webm(voice(1.0, 48_000)), webm(voice(0.5, 48_000))
HOURS = b"\xa3\x87\x81\x00\x00\x80" + bytes([0b11111_0_11, 6, 0])  # packets of three bytes that are 120 ms each
HOSTILE: list[tuple[str, list[str | bytes], dict[str, Any], int, str]] = [
    ("sound before its start", [b"\0" * 100], {}, 4400, "bad_request"),
    ("no JSON", ["hello"], {}, 4400, "bad_request"),
    ("deep JSON", ["[" * 4000], {}, 4400, "bad_request"),
    ("long text", ["x" * 5000], {}, 4413, "body_too_large"),
    ("no start", ['{"type": "end"}'], {}, 4400, "bad_request"),
    ("no object", ["[1]"], {}, 4400, "bad_request"),
    ("no format", ['{"type": "start"}'], {}, 4422, "invalid_request"),
    ("text where sound is due", ["hello"], PCM, 4400, "bad_request"),
    ("a second start", ['{"type": "start"}'], PCM, 4400, "bad_request"),
    ("no rate", [], {"format": "s16le"}, 4422, "invalid_request"),
    ("a rate of its own for webm", [], {"format": "webm", "sample_rate_hz": 48_000}, 4422, "invalid_request"),
    ("a forged rate", [], {"format": "s16le", "sample_rate_hz": 10**9}, 4422, "invalid_request"),
    ("hop", [], {**PCM, "hop_s": "nan"}, 4422, "invalid_request"),
    ("a key in the address", [], {**PCM, "key": KEY}, 4422, "invalid_request"),
    ("another model", [], {**PCM, "model": "none"}, 4404, "unknown_model"),
    ("too much at once", [b"\0" * 200_000], PCM, 4413, "body_too_large"),
    ("garbage for webm", [b"garbage" * 100], {"format": "webm"}, 4400, "not_audio"),
    ("a WAV for webm", [pcm_and_wav(voice(1.0), 16_000)[1]], {"format": "webm"}, 4400, "not_audio"),
    ("a large element", [b"\x1a\x45\xdf\xa3\x80\xa3\x08\xff\xff\xff\xff"], {"format": "webm"}, 4422, "corrupt"),
    ("another codec", [VOICE.replace(b"A_OPUS", b"A_FLAC")], {"format": "webm"}, 4415, "unsupported_format"),
    ("Opus that claims hours", [VOICE, *[HOURS * 10_000] * 5], {"format": "webm"}, 4413, "body_too_large"),
    ("NaN", [np.full(40_000, np.nan, "<f4").tobytes()], {**PCM, "format": "f32le"}, 4422, "not_finite"),
    ("1e30", [np.full(40_000, 1e30, "<f4").tobytes()], {**PCM, "format": "f32le"}, 4422, "out_of_range"),
]


@pytest.mark.parametrize(
    ("messages", "query", "code", "problem"), [case[1:] for case in HOSTILE], ids=[c[0] for c in HOSTILE]
)
def test_what_cannot_be_is_told_and_closed(
    url: str, messages: list[str | bytes], query: dict[str, Any], code: int, problem: str
) -> None:
    heard = sent(url, messages, **query)
    assert (heard.code, heard.problem) == (code, problem)
    told = heard.of("error")[0]["problem"]
    assert told["detail"]
    assert told["status"] == code - 4000
    assert KEY not in str(told)
    assert httpx.get(f"{url}/v2/health/live").is_success


def test_a_message_above_the_protocols_limit(url: str) -> None:
    assert sent(url, [b"\0" * (2**20 + 1)], **PCM).code == 1009


@given(st.lists(st.binary(max_size=60), max_size=8), st.integers(0, 3000), st.binary(max_size=20))
def test_damaged_webm_is_refused_or_read_but_never_more(parts: list[bytes], at: int, damage: bytes) -> None:
    for data in ([WHOLE[:at] + damage + WHOLE[at + len(damage) :]], [WHOLE[:at], *parts, WHOLE[at:]]):
        reader = WebmReader()
        try:
            for piece in data:
                assert sum(packet.samples for packet in reader.add(piece)) <= 48_000 * 60
            found = "read"
        except AudioError as error:
            found = error.code
        assert found in ("read", "corrupt", "not_audio", "unsupported_format", "bad_channels")


@given(st.lists(st.integers(0, len(WHOLE)), max_size=20))
def test_packets_do_not_depend_on_the_pieces(cuts: list[int]) -> None:
    borders = [0, *sorted(cuts), len(WHOLE)]
    reader, whole = WebmReader(), WebmReader().add(WHOLE)
    found = [packet for a, b in pairwise(borders) for packet in reader.add(WHOLE[a:b])]
    assert found == whole
    assert sum(packet.samples for packet in whole) == pytest.approx(24_000, abs=2_000)


def test_a_flood_of_tiny_messages_holds_up_nobody(url: str, predictor: Predictor) -> None:
    raw, file = pcm_and_wav(voice(3.0), 16_000)
    with opened(url, **PCM) as flood:
        for _ in range(10_000):
            flood.send(b"\0\0")
        began_s = time.monotonic()
        as_its_file(url, predictor, [raw], file, **PCM)
        assert httpx.get(f"{url}/v2/health/live", timeout=2).is_success
        assert time.monotonic() - began_s < 30


def test_what_comes_too_fast_waits_and_is_heard(url: str, predictor: Predictor) -> None:
    raw, file = pcm_and_wav(voice(8.0), 16_000)
    began_s = time.monotonic()
    as_its_file(url, predictor, pieces(raw, 32_000), file, **PCM)
    assert time.monotonic() - began_s > 3  # 8 s of sound: 2 s at once, the rest half as fast again as it sounds


def until_closed(socket: ClientConnection, drop: bytes = b"") -> list[Any]:
    """What comes until the other side closes; ``drop`` is sent every 50 ms."""
    came = []
    with suppress(ConnectionClosed):
        while True:
            if drop:
                socket.send(drop)
            try:
                came.append(json.loads(socket.recv(timeout=0.05 if drop else 30)))
            except TimeoutError:
                assert drop
    return came


def test_limits(tiny_bundle: Bundle) -> None:
    with running(tiny_bundle, max_streams=1, stream_idle_s=1, max_stream_s=2) as (url, service):
        with opened(url, **PCM) as first:
            assert json.loads(first.recv())["limits"] == {"max_stream_s": 2, "stream_idle_s": 1}
            second = sent(url, [], **PCM)
            assert (second.code, second.problem) == (4429, "overloaded")
            assert [told["type"] for told in until_closed(first)] == ["error"]
            assert first.close_code == 4408
        with opened(url, **PCM) as dripping:
            until_closed(dripping, b"\0\0" * 100)
            assert dripping.close_code == 4413
        for code in ("overloaded", "body_timeout", "too_long"):
            assert counted(service, code) == 1


def counted(service: LocalService, code: str) -> float:
    """Streams that ended with ``code``, by the service's metrics."""
    lines = [line for line in service.metrics().splitlines() if "requests_total{" in line and "/v1/stream" in line]
    lines = [line for line in lines if f'code="{code}"' in line and 'status="101"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_work_ends_with_its_client(service: tuple[str, LocalService]) -> None:
    url, running_service = service
    before = counted(running_service, "disconnected")
    with opened(url, **PCM) as socket:
        socket.recv()
        socket.send(pcm_and_wav(voice(4.0), 16_000)[0])
        socket.socket.close()  # as when a cable is pulled, or a process killed
    until_s = time.monotonic() + 30
    while counted(running_service, "disconnected") == before:
        assert time.monotonic() < until_s
    assert not running_service._models.busy  # type: ignore[union-attr]


def test_streams_end_when_the_service_does(tiny_bundle: Bundle) -> None:
    with running(tiny_bundle) as (url, service), opened(url, **PCM) as socket:
        socket.recv()
        service.stop()
        error = json.loads(socket.recv(timeout=30))
        assert (error["type"], error["problem"]["code"]) == ("error", "unavailable")
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=30)
        assert socket.close_code == 4503


def test_a_stream_outlives_the_limit_of_slow_headers(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.ray_settings._HEADERS_WITHIN_S", 0.3)
    with running(tiny_bundle) as (url, _):
        heard = sent(url, [*pieces(pcm_and_wav(voice(4.0), 16_000)[0], 16_000), END], **PCM)
        assert heard.code == 1000


def scripted(app: Any, *messages: bytes, reads: bool = True) -> list[dict[str, Any]]:
    """What the application sends to a client of these messages, who then waits; one that does not read gets ready."""
    told: list[dict[str, Any]] = []
    waiting: list[Any] = [{"type": "websocket.connect"}]
    waiting += [{"type": "websocket.receive", "bytes": message} for message in messages]

    async def receive() -> Any:
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    async def send(message: Any) -> None:
        told.append(message)
        if not reads and len(told) > 2:
            await asyncio.Event().wait()

    scope = {"type": "websocket", "path": "/v1/stream", "headers": [], "subprotocols": [], "server": ("127.0.0.1", 80)}
    scope |= {"query_string": b"format=s16le&sample_rate_hz=16000", "extensions": {"websocket.http.response": {}}}
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 60))
    return told


@pytest.fixture(scope="module")
def in_process(tiny_bundle: Bundle) -> InProcess:
    return InProcess(tiny_bundle, stream_idle_s=3)


SECONDS_5 = pcm_and_wav(voice(5.0), 16_000)[0]


def test_who_does_not_read_is_left(in_process: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.streams._SEND_S", 0.2)
    told = scripted(in_process.app, SECONDS_5[:96_000], reads=False)
    assert [message["type"] for message in told] == ["websocket.accept", "websocket.send", "websocket.send"]
    assert in_process.meter.requests[-1] == ("/v1/stream", 101, "slow_reader")
    assert in_process.meter.open_streams == 0


def test_behind_a_proxy_that_reads_on_a_stream_far_ahead_is_closed(in_process: InProcess) -> None:
    """Not reading would keep nothing from coming there."""
    closed = scripted(create_app(in_process.app.state.service, relayed=True), *[SECONDS_5] * 10)[-1]
    assert (closed["code"], closed["reason"]) == (4429, "too_fast")


@pytest.mark.parametrize("stays", [True, False])  # it costs windows, or the stream
def test_a_service_that_is_full(in_process: InProcess, monkeypatch: pytest.MonkeyPatch, stays: bool) -> None:
    predict, refused = in_process.models.predict, []

    async def sometimes(*arguments: Any) -> Any:
        if stays or not refused:
            refused.append(1)
            raise overloaded()
        return await predict(*arguments)

    if stays:
        monkeypatch.setattr("serve.streams._PATIENCE_S", 0.5)
    monkeypatch.setattr(in_process.models, "predict", sometimes)
    told = scripted(in_process.app, SECONDS_5)
    answers = [json.loads(message["text"]) for message in told if message["type"] == "websocket.send"]
    skipped = [message["skipped"] for message in answers if message["type"] == "answer"]
    assert skipped == ([] if stays else [1] * 5)
    if stays:
        assert (told[-1]["code"], told[-1]["reason"]) == (4429, "overloaded")
