"""The HTTP interface over a worker in this process: answers, problems, limits. Who may: test_auth."""

from __future__ import annotations

import base64
import gzip
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import speech_like
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import LocalService, form, problem_of, wav, wav_of

from pipeline.audio.load import ERRORS
from pipeline.audio.windows import SlidingWindow
from pipeline.inference.predictor import Predictor
from pipeline.models.bundle import Bundle
from serve.problems import KINDS, kind_of, recording_error, retry_later
from serve.schema import Explanation, ModelInfo, Prediction, Recording

PREDICT, EXPLAIN, TASK = "/v1/predict", "/v1/explain", "/v1/audio-classification"
MULTIPART = {"content-type": "multipart/form-data; boundary=x"}


@pytest.fixture(scope="module")
def service(tiny_bundle: Bundle) -> LocalService:
    return LocalService(tiny_bundle)


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Bundle) -> Predictor:
    return Predictor.from_bundle(tiny_bundle.folder, threads=1)


@pytest.fixture
def failing(service: LocalService) -> Iterator[LocalService]:
    """The service, whose models shall be told what to raise."""
    yield service
    service.models.error = service.models.full = None


def answer(service: LocalService, data: bytes, **fields: object) -> Recording:
    """The only answer, read as the client does."""
    (found,) = Prediction.model_validate_json(service.post(PREDICT, **form(data, **fields)).content).files
    assert isinstance(found, Recording)
    return found


def scores_of(found: Any, labels: Any) -> list[float]:
    by_label = {score.label: score.score for score in found.scores}
    return [by_label[name] for name in labels]


def test_one_recording_is_what_the_predictor_says(service: LocalService, predictor: Predictor) -> None:
    data, bundle = wav(3.0, 44_100, channels=2), predictor.bundle
    body = service.post(PREDICT, **form(data)).json()
    (expected,) = predictor.predict([data])
    assert (body["model"], body["version"]) == ("tiny", bundle.weights_sha256[:12])
    assert {"segments", "picture"}.isdisjoint(body["files"][0])
    found = answer(service, data)
    assert (found.name, found.label, found.confidence) == ("0.wav", expected.predicted, expected.confidence)
    assert (found.duration_s, found.scored_s, found.sample_rate_hz, found.channels) == (3.0, 2.0, 44_100, 2)
    assert [score.score for score in found.scores] == sorted((score.score for score in found.scores), reverse=True)
    np.testing.assert_allclose(scores_of(found, bundle.labels), expected.probabilities, atol=1e-6)


def test_several_recordings_keep_their_order_and_their_problems(service: LocalService) -> None:
    voices = [wav(f0_hz=f0_hz) for f0_hz in (90, 200, 350)]
    response = service.post(PREDICT, **form(voices[0], b"no audio", voices[1], b"", voices[2]))
    assert response.status_code == 200
    files = response.json()["files"]
    assert [file["status"] for file in files] == ["ok", "failed", "ok", "failed", "ok"]
    assert [file["name"] for file in files] == ["0.wav", "1.wav", "2.wav", "3.wav", "4.wav"]
    assert [file["problem"]["code"] for file in files if file["status"] == "failed"] == ["not_audio", "empty_file"]
    for data, file in zip(voices, files[::2], strict=True):
        alone = answer(service, data)
        assert [score["label"] for score in file["scores"]] == [score.label for score in alone.scores]
        np.testing.assert_allclose([s["score"] for s in file["scores"]], [s.score for s in alone.scores], atol=1e-5)


def test_windows(service: LocalService, predictor: Predictor) -> None:
    tracks = [speech_like(duration_s=5.0, sample_rate_hz=48_000)] * 2
    found = answer(service, wav_of(*tracks, rate_hz=48_000), window_s=2, hop_s=1, channels="each", top_k=3)
    spans = [(segment.channel, segment.start_s, segment.end_s) for segment in found.segments or []]
    assert spans == [(channel, float(start), start + 2.0) for channel in "01" for start in range(4)]
    assert found.scored_s == 5.0
    assert all(len(segment.scores) == 3 for segment in found.segments or [])
    (expected,) = predictor.predict([wav_of(tracks[0][48_000:144_000], rate_hz=48_000)])
    second = (found.segments or [])[1]
    assert (second.label, second.confidence) == (expected.predicted, pytest.approx(expected.confidence, abs=1e-6))


@pytest.mark.parametrize(
    ("length_s", "fields", "windows"),
    [
        (4.0, {"hop_s": 1.0}, 3),  # one word about windows implies the others
        (4.0, {"channels": "each"}, 2),
        (4.0, {"window_s": 1.0}, 4),
        (5.9, {}, None),
        (6.0, {}, None),
        (6.1, {}, 4),  # long begins beyond six seconds
    ],
)
def test_when_there_are_windows(service: LocalService, length_s: float, fields: Any, windows: int | None) -> None:
    found = answer(service, wav(length_s), **fields).segments
    assert (None if found is None else len(found)) == windows


def test_long_recordings_are_heard_in_full_or_their_middle(service: LocalService, predictor: Predictor) -> None:
    data = wav(6.5, seed=3)
    found = answer(service, data)
    pooled, timeline = predictor.follow(data, SlidingWindow(2.0, 2.0))
    spans = [(part.channel, part.start_s) for part in found.segments or []]
    assert spans == [("mix", start) for start in timeline.start_s]
    assert found.scored_s == 6.5
    np.testing.assert_allclose(scores_of(found, predictor.labels), pooled.probabilities, atol=1e-6)
    task = service.post(TASK, content=data).json()
    np.testing.assert_allclose([score["score"] for score in task], [score.score for score in found.scores], atol=1e-6)
    middle = answer(service, data, window_s="middle")
    (expected,) = predictor.predict([data])
    assert (middle.segments, middle.label, middle.scored_s) == (None, expected.predicted, 2.0)
    for fields in ({"hop_s": 1}, {"channels": "each"}):
        problem_of(service.post(PREDICT, **form(data, window_s="middle", **fields)), 422, "invalid_request")
    voice, click = speech_like(duration_s=3.0), np.zeros(64_000, np.float32)
    click[32_000:32_100] = 0.5  # in the middle there is too little sound for an answer
    data = wav_of(np.concatenate([voice, click, voice]))
    problem_of(service.post(PREDICT, **form(data, window_s="middle")), 422, "too_short")
    parts = answer(service, data).segments
    assert parts
    assert "silence" not in {part.label for part in parts}


def test_channels_are_heard_apart_where_they_differ(service: LocalService) -> None:
    one, other = (speech_like(duration_s=8.0, f0_hz=f0_hz, seed=seed) for f0_hz, seed in ((90.0, 1), (320.0, 2)))
    turns = np.repeat([1.0, 0.0] * 4, 16_000).astype(np.float32)
    noise = 0.01 * np.random.default_rng(0).standard_normal(one.size).astype(np.float32)
    cases = {
        "a call": ((one * turns, other * (1 - turns)), {"0", "1"}),
        "one voice twice": ((one, one), {"mix"}),
        "one voice, panned and noisy": ((one, 0.4 * one + noise), {"mix"}),
        "one channel empty": ((np.zeros_like(one), one), {"mix"}),
        "both empty": ((np.zeros_like(one), np.zeros_like(one)), {"mix"}),
    }
    for name, (tracks, expected) in cases.items():
        found, asked = answer(service, wav_of(*tracks)), answer(service, wav_of(*tracks), channels="1")
        assert {part.channel for part in found.segments or []} == expected, name
        assert {part.channel for part in asked.segments or []} == {"1"}, name


def test_answers_that_are_no_emotion_or_have_a_notice(service: LocalService) -> None:
    plain, unsure = answer(service, wav()), answer(service, wav(), min_confidence=1)
    assert (unsure.label, unsure.scores) == ("uncertain", plain.scores)
    info = ModelInfo.model_validate_json(service.get("/v1/model").content)
    assert set(info.other_answers) == {"uncertain", "silence", "not_speech"}
    assert set(info.other_answers).isdisjoint(info.labels)
    silence, tone = np.zeros(48_000), 0.3 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 16_000)
    for sound, label in ((silence, "silence"), (tone, "not_speech")):
        data = wav_of(sound)
        found = answer(service, data)
        assert (found.label, found.scores, found.confidence) == (label, [], None)
        assert np.isfinite(found.level_dbfs)
        windowed = answer(service, data, window_s=1)
        assert windowed.label == label
        assert [(part.label, part.scores) for part in windowed.segments or []] == [(label, [])] * 3
        body = service.post(TASK, content=data)
        assert (body.status_code, body.json()) == (200, [])
    assert found.speech_share == 0
    opposite = answer(service, wav_of(speech_like(), -speech_like()))
    assert (plain.notice, opposite.label == "silence") == (None, False)
    assert "cancel" in (opposite.notice or "")


def test_pictures_and_explanations_are_of_the_window_that_was_heard(service: LocalService, tiny_bundle: Bundle) -> None:
    found, config = answer(service, wav(3.0), picture="true"), tiny_bundle.features
    assert found.picture is not None
    assert np.shape(found.picture.level_db) == (config.n_mels, config.n_frames)
    assert np.max(found.picture.level_db) == 0.0
    assert (found.picture.window_start_s, found.picture.waveform.end_s) == (pytest.approx(0.5), pytest.approx(3.0))
    explained = Explanation.model_validate_json(service.post(EXPLAIN, **form(wav(3.0))).content)
    rows, columns = np.shape(explained.importance)
    assert (len(explained.frequency_hz), len(explained.time_s)) == (rows + 1, columns + 1)
    assert (explained.time_s[0], explained.time_s[-1]) == (pytest.approx(0.5), pytest.approx(2.5))
    assert explained.label == found.label
    assert np.abs(explained.importance).max() > 0


def test_the_task_takes_raw_bytes_and_json(service: LocalService) -> None:
    expected = service.post(PREDICT, **form(wav())).json()["files"][0]["scores"]
    for kind in ("", "audio/wav", "application/octet-stream", "video/webm"):
        headers = {"content-type": kind} if kind else {}
        assert service.post(TASK, content=wav(), headers=headers).json() == expected
    task = {"inputs": base64.b64encode(wav()).decode(), "parameters": {"top_k": 2, "function_to_apply": "softmax"}}
    assert service.post(TASK, json=task).json() == expected[:2]


@pytest.mark.parametrize(
    "written",
    [
        lambda data: base64.encodebytes(data).decode(),  # lines of 76 signs
        lambda data: base64.urlsafe_b64encode(data).decode(),
        lambda data: base64.urlsafe_b64encode(data).decode().rstrip("="),
        lambda data: "data:audio/wav;base64," + base64.b64encode(data).decode(),
        lambda data: "DATA:;base64," + base64.b64encode(data).decode().replace("+", "%2B").replace("=", "%3D"),
        lambda data: "\r\n".join(base64.b64encode(data).decode().partition("A")) + " \t\n",
    ],
)
def test_base64_as_others_write_it(service: LocalService, written: Any) -> None:
    for extra in range(3):  # all three lengths of padding
        data = wav(0.5) + b"\xff\xfe"[:extra]
        response = service.post(TASK, json={"inputs": written(data)})
        assert response.status_code == 200
        assert response.json() == service.post(TASK, content=data).json()


NO_BASE64 = ("no base64!", "data:audio/wav,words", "data:audio/wav;base64", "AAAAA", "=AAAA", "AA=AA", "äöüß")


@pytest.mark.parametrize(
    "body",
    [
        *(b"{", b"[]", b"{}", b'{"inputs": 7}'),
        b'{"inputs": "", "parameters": {"top_k": 0}}',
        b'{"inputs": "", "parameters": {"function_to_apply": "none"}}',
        b'{"inputs": "", "url": "http://127.0.0.1/"}',
        json.dumps({str(number): 1 for number in range(20_000)}).encode(),
        json.dumps({"inputs": "AAAA", "parameters": {str(number): 1 for number in range(20_000)}}).encode(),
        json.dumps({"inputs": [1] * 20_000}).encode(),
        json.dumps({"inputs": "AAAA", "x" * 1_000_000: 1}).encode(),
        *(json.dumps({"inputs": text}).encode() for text in NO_BASE64),
    ],
    ids=lambda body: body[:60],
)
def test_a_wrong_task_gets_a_short_answer_however_much_is_wrong(service: LocalService, body: bytes) -> None:
    response = service.post(TASK, content=body, headers={"content-type": "application/json"})
    assert problem_of(response, 422, "invalid_request").errors
    assert len(response.content) < 2000


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"no audio, only words", 400, "not_audio"),
        (b"", 400, "empty_file"),
        (wav()[:2000], 422, "truncated"),
        (wav(0.1), 422, "too_short"),
        (wav(rate_hz=2000), 422, "bad_sample_rate"),
        (b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\x34\x12\1\0\x80\xbb\0\0\x80\xbb\0\0\1\0\x08\0data\0\0\0\0", 415, None),
    ],
)
def test_recordings_that_cannot_be_used(service: LocalService, data: bytes, status: int, code: str | None) -> None:
    for path, content in ((PREDICT, form(data)), (EXPLAIN, form(data)), (TASK, {"content": data})):
        response = service.post(path, **content)
        problem_of(response, status, code or response.json()["code"])


def test_lengths_and_windows_are_limited(tiny_bundle: Bundle) -> None:
    service = LocalService(tiny_bundle, max_duration_s=2.0, max_decoded_mib=0.1)
    problem_of(service.post(PREDICT, **form(wav(2.5))), 413, "too_long")
    problem_of(service.post(PREDICT, **form(wav(1.9))), 413, "too_large")
    problem_of(service.post(EXPLAIN, **form(wav(2.5))), 413, "too_long")
    problem_of(service.post(PREDICT, **form(wav(2.5), window_s=1)), 413, "too_long")
    service, asked = LocalService(tiny_bundle, max_windows=5), {"window_s": 1, "hop_s": 0.5}
    assert service.post(PREDICT, **form(wav(3.0), **asked)).status_code == 200
    problem_of(service.post(PREDICT, **form(wav(3.5), **asked)), 422, "too_many_windows")
    stereo = form(wav(2.5, channels=2), channels="each", **asked)
    problem_of(service.post(PREDICT, **stereo), 422, "too_many_windows")
    voices = [speech_like(duration_s=40.0, f0_hz=f0_hz, seed=seed) for f0_hz, seed in ((90.0, 1), (320.0, 2))]
    parts = answer(service, wav_of(*voices)).segments or []  # not asked for: fewer and wider apart
    assert {part.channel for part in parts} == {"mix"}
    assert 4 <= len(parts) <= 5
    assert parts[-1].end_s == 40.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("window_s", value) for value in ("0.01", "nan", "inf", "2.5", "1.5e308")),
        ("hop_s", "0"),
        *(("top_k", value) for value in ("0", "many")),
        ("min_confidence", "1.1"),
        *(("channels", value) for value in ("left", "-1")),
        ("picture", "perhaps"),
        ("url", "http://127.0.0.1/secret.wav"),
        ("path", "/etc/passwd"),
    ],
)
def test_wrong_fields_are_named(service: LocalService, field: str, value: str) -> None:
    problem = problem_of(service.post(PREDICT, **form(wav(), **{field: value})), 422, "invalid_request")
    assert [error.field for error in problem.errors or []] == [field]
    assert field in problem.detail
    several = problem_of(service.post(PREDICT, **form(wav(), wav(), **{field: value})), 422, "invalid_request")
    assert several.errors == problem.errors, "a wrong field is the request's fault, not each recording's"


def test_limits_and_names_of_a_form_are_told_in_part(service: LocalService) -> None:
    recording, name = ("file", ("a.wav", wav())), "x" * 3000
    once, twice = (name, (None, b"1")), (name, (None, b"2"))
    for files in ([once, recording], [once, twice, recording], [(name, ("a.wav", wav()))]):
        response = service.post(PREDICT, files=files)
        (error,) = problem_of(response, 422, "invalid_request").errors or []
        assert error.field == "x" * 61 + "..."
        assert len(response.content) < 1000
    many = service.post(PREDICT, files=[*((f"field{number}", (None, b"1")) for number in range(33)), recording])
    assert "32" in problem_of(many, 422, "invalid_request").detail
    long = service.post(PREDICT, files=[("model", (None, b"x" * 70_000)), recording])
    assert "64 KiB" in problem_of(long, 422, "invalid_request").detail


TEXT = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n/etc/passwd\r\n--x--\r\n'


@pytest.mark.parametrize(
    ("path", "content", "status", "code"),
    [
        (PREDICT, {"content": wav()}, 415, "unsupported_media_type"),
        (PREDICT, {"json": {"file": "x"}}, 415, "unsupported_media_type"),
        (PREDICT, {"data": {"file": "speech.wav"}}, 415, "unsupported_media_type"),
        (PREDICT, {"content": b"not multipart", "headers": MULTIPART}, 400, "bad_request"),
        (PREDICT, {"content": b"", "headers": {"content-type": "multipart/form-data"}}, 400, "bad_request"),
        (PREDICT, {"content": TEXT, "headers": MULTIPART}, 422, "invalid_request"),
        (PREDICT, {"files": [("speech", ("a.wav", wav()))]}, 422, "invalid_request"),
        (TASK, {"content": b"x", "headers": {"content-type": "text/html"}}, 415, "unsupported_media_type"),
        (PREDICT, form(wav(), model="other"), 404, "unknown_model"),
        (PREDICT, form(wav()) | {"params": {"window_s": "1"}}, 422, "invalid_request"),  # it would do nothing
        (EXPLAIN, form(wav()) | {"params": {"window_s": "1"}}, 422, "invalid_request"),
        (TASK, {"content": wav(), "params": {"top_k": 1}}, 422, "invalid_request"),
        (EXPLAIN, form(wav(), wav()), 422, "too_many_files"),
        (PREDICT, form(*[b"x"] * 33), 422, "too_many_files"),
        (PREDICT, form(*[b"x"] * 34), 422, "too_many_files"),
        (PREDICT, form(*[b"x"] * 90), 422, "too_many_files"),
        (PREDICT, form(wav(), channels=1), 422, "no_such_channel"),
        (PREDICT, form(wav(), channels=1, hop_s=1), 422, "no_such_channel"),
    ],
)
def test_requests_that_are_none(service: LocalService, path: str, content: Any, status: int, code: str) -> None:
    problem = problem_of(service.post(path, **content), status, code)
    for name in content.get("params", {}):
        assert [error.field for error in problem.errors or []] == [name]
        assert "form" in problem.detail


def test_what_is_unknown_and_what_just_fits(service: LocalService) -> None:
    assert service.post(PREDICT, **form(*[b"x"] * 32)).status_code == 200
    problem_of(service.get("/v1/nothing"), 404, "not_found")
    response = service.get(PREDICT)
    problem_of(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    problem_of(service.get("/v1/model", params={"model": "other"}), 404, "unknown_model")
    problem_of(service.get("/v2/models/other"), 404, "unknown_model")
    problem_of(service.get("/v1/model", params={"name": "tiny"}), 422, "invalid_request")
    assert service.get("/v1/model", params={"model": "tiny"}).status_code == 200
    assert service.get("/v2/health/live", params={"probe": "1"}).status_code == 200


BORDERS = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n%s\r\n--x--\r\n'


def test_forms_that_are_slow_to_read_are_refused(service: LocalService) -> None:
    for charset in ("punycode", "utf-7", "unicode_escape", "undefined", "idna", "utf-8\0", "\xff"):
        headers = {"content-type": f"{MULTIPART['content-type']}; charset={charset}".encode("latin-1")}
        problem_of(service.post(PREDICT, content=BORDERS % wav(), headers=headers), 415, "unsupported_media_type")
    headers = {"content-type": f"{MULTIPART['content-type']}; charset=UTF-8"}
    assert service.post(PREDICT, content=BORDERS % wav(), headers=headers).status_code == 200
    for borders, status, code in ((100, 422, "too_many_files"), (10, 400, "not_audio")):
        response = service.post(PREDICT, content=BORDERS % (b"\r\n--x?" * borders), headers=MULTIPART)
        problem_of(response, status, code)


def test_model_and_health(service: LocalService, tiny_bundle: Bundle, failing: LocalService) -> None:
    info = ModelInfo.model_validate_json(service.get("/v1/model").content)
    assert (info.labels, info.features) == (list(tiny_bundle.labels), tiny_bundle.features.to_dict())
    assert (info.models, info.limits["max_files"]) == (["tiny"], 32)
    metadata = service.get("/v2/models/tiny").json()
    assert metadata["inputs"] == [{"name": "features", "datatype": "FP32", "shape": [-1, 1, 64, 188]}]
    assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 8]}]
    for error, status in ((None, 200), (retry_later("unavailable", "gone"), 503)):
        failing.models.error = error
        for path in ("/v2/health/ready", "/v2/models/tiny/ready"):
            response = service.get(path)
            assert (response.status_code, response.json()) == (status, {"ready": error is None})
        assert service.request("HEAD", "/v2/health/ready").status_code == status
        assert service.request("HEAD", "/v2/health/live").status_code == 200
    assert service.get("/v2/health/live").json() == {"live": True}


def test_a_full_model_keeps_no_request_from_another(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    service, full = LocalService(tiny_bundle, names=("tiny", "second")), {"tiny"}

    def check_room(name: str) -> None:
        if name in full:
            raise retry_later("overloaded", "full")

    monkeypatch.setattr(service.models, "check_room", check_room)
    for path in (PREDICT, EXPLAIN):
        assert service.post(path, **form(wav(), model="second")).status_code == 200
        problem_of(service.post(path, **form(wav())), 429, "overloaded")
        problem_of(service.post(path, **form(wav(), model="tiny")), 429, "overloaded")
    full.add("second")
    problem_of(service.post(PREDICT, content=b"no form"), 429, "overloaded")


def test_full_queues_and_deadlines_are_told(failing: LocalService, tiny_bundle: Bundle) -> None:
    async def body() -> Any:
        raise AssertionError("read for nothing")
        yield b""

    failing.models.full = retry_later("overloaded", "full", after_s=0.4)
    for path in (PREDICT, EXPLAIN, TASK):
        response = failing.post(path, content=body())
        problem_of(response, 429, "overloaded")
        assert response.headers["retry-after"] == "1"
    failing.models.full, failing.models.error = None, retry_later("overloaded", "full", after_s=2)
    response = failing.post(PREDICT, **form(wav(), wav()))
    problem_of(response, 429, "overloaded")
    assert response.headers["retry-after"] == "2"
    hurried = LocalService(tiny_bundle, deadline_s=0.001)
    response = hurried.post(PREDICT, **form(wav(30.0), window_s=0.1))
    problem_of(response, 503, "deadline_exceeded")
    assert response.headers["retry-after"] == "1"


def test_a_mistake_of_ours_tells_nothing_but_the_log(failing: LocalService, caplog: pytest.LogCaptureFixture) -> None:
    failing.models.error = RuntimeError("secret /home/someone/models")
    with caplog.at_level(logging.ERROR):
        response = failing.post(PREDICT, **form(wav()), headers={"x-request-id": "abc"})
    assert problem_of(response, 500, "internal_error").request_id == "abc"
    assert "secret" not in response.text
    assert "secret" in caplog.text
    unforeseen = recording_error("internal_error", "ValueError: /home/someone")
    assert (unforeseen.code, kind_of(unforeseen.code).status) == ("internal_error", 500)
    assert "someone" not in unforeseen.detail


def test_figures_and_one_structured_line_a_request(tiny_bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    service = LocalService(tiny_bundle)
    with caplog.at_level(logging.INFO, "ray.serve.ser"):
        service.post(PREDICT, **form(wav(), b"words"), headers={"x-request-id": "id\t1"})
        service.get("/v1/nothing")
    first, second = (json.loads(record.message) for record in caplog.records if record.name == "ray.serve.ser")
    assert first["id"] == "id1"  # control characters are dropped
    assert (first["route"], first["status"], first["code"], first["files"]) == (PREDICT, 200, "ok", 2)
    assert first["bytes"] > len(wav())
    assert {"ms", "decode_ms", "wait_ms", "network_ms", "batch"} <= set(first)
    assert (second["status"], second["code"]) == (404, "not_found")
    assert "0.wav" not in caplog.text
    service.post(TASK, content=b"words")
    service.post(EXPLAIN, **form(wav()))
    service.post(EXPLAIN, **form(b"words"))
    codes = ["ok", "not_audio", "not_audio", "ok", "not_audio"]
    assert service.meter.recordings == [("tiny", code) for code in codes]
    assert service.meter.requests[0] == (PREDICT, 200, "ok")
    assert service.meter.requests[2] == (TASK, 400, "not_audio")


def test_the_documentation_tells_every_status_and_needs_nothing_from_elsewhere(service: LocalService) -> None:
    page = service.get("/docs")
    assert page.status_code == 200
    assert "//" not in re.sub(r"<!--.*?-->", "", page.text).replace("window.location.protocol + '//'", "")
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) >= 2
    for path in loaded:
        assert service.get(path).status_code == 200, path
    document = service.get("/openapi.json").json()
    post = document["paths"][PREDICT]["post"]
    not_here = {"not_found", "not_a_file", "permission_denied", "unreadable"}  # bytes have no path
    not_here |= {"method_not_allowed", "unauthorized"}
    possible = {kind_of(code).status for code in {*KINDS, *ERRORS} - not_here}
    assert possible <= {int(status) for status in post["responses"]}
    assert "Problem" in document["components"]["schemas"]
    schema = post["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert schema["properties"]["file"]["maxItems"] == 32
    assert set(schema["properties"]) >= {"window_s", "hop_s", "channels", "top_k", "min_confidence"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.binary(max_size=300),
    kind=st.sampled_from([MULTIPART["content-type"], "application/json", "audio/wav", "multipart/form-data"]),
    path=st.sampled_from([PREDICT, EXPLAIN, TASK]),
)
def test_any_bytes_are_answered_with_a_problem(service: LocalService, body: bytes, kind: str, path: str) -> None:
    response = service.post(path, content=body, headers={"content-type": kind})
    assert 400 <= response.status_code < 500
    problem_of(response, response.status_code, response.json()["code"])


def test_packed_bodies_are_the_same_and_have_the_same_limit(service: LocalService, tiny_bundle: Bundle) -> None:
    def post(body: bytes, encoding: str, to: LocalService = service) -> Any:
        return to.post(TASK, content=body, headers={"content-encoding": encoding})

    plain, packed = service.post(TASK, content=wav()).json(), gzip.compress(wav())
    assert post(packed, "gzip").json() == post(packed, "GZIP").json() == post(wav(), "identity").json() == plain
    for broken in (packed[:-20], wav(), packed + packed):
        problem_of(post(broken, "gzip"), 400, "bad_request")
    for other in ("br", "deflate", "zstd", "gzip, gzip"):
        refused = post(packed, other)
        problem_of(refused, 415, "unsupported_media_type")
        assert "gzip" in refused.headers["accept-encoding"]
    assert service.get("/v1/model", headers={"content-encoding": "br"}).status_code == 200  # there is no body
    bomb = gzip.compress(bytes(50_000_000))
    problem_of(post(bomb, "gzip", LocalService(tiny_bundle, max_body_mib=0.1)), 413, "body_too_large")
    prepared = httpx.Request("POST", "http://127.0.0.1", **form(wav(), top_k=1))
    headers = {"content-type": prepared.headers["content-type"], "content-encoding": "gzip"}
    found = service.post(PREDICT, content=gzip.compress(prepared.read()), headers=headers)
    assert found.json()["files"][0]["scores"] == plain[:1]
