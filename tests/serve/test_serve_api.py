"""The HTTP interface over a worker in this process: answers, problems, doors, limits. Ray is in test_serve_ray."""

from __future__ import annotations

import base64
import gzip
import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from conftest import speech_like
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import KEY, LocalService, form, problem_of, wav

from pipeline.audio.load import ERRORS
from pipeline.audio.windows import SlidingWindow
from pipeline.inference.predictor import Predictor
from pipeline.models.bundle import Bundle
from serve import schema
from serve.problems import KINDS, ServiceError, kind_of, retry_later
from serve.schema import Explanation, ModelInfo, Prediction, Recording

NO_BASE64 = ("no base64!", "data:audio/wav,words", "data:audio/wav;base64", "AAAAA", "=AAAA", "AA=AA", "äöüß")


@pytest.fixture(scope="module")
def service(tiny_bundle: Bundle) -> LocalService:
    return LocalService(tiny_bundle)


@pytest.fixture(scope="module")
def guarded(tiny_bundle: Bundle) -> LocalService:
    return LocalService(tiny_bundle, key=KEY)


@pytest.fixture
def failing(service: LocalService) -> Iterator[LocalService]:
    """The service, whose models shall be told what to raise."""
    yield service
    service.models.error = service.models.full = None


def test_one_recording_is_what_the_predictor_says(service: LocalService, tiny_bundle: Bundle) -> None:
    data = wav(3.0, 44_100, channels=2)
    response = service.post("/v1/predict", **form(data))
    answer = Prediction.model_validate_json(response.content)
    (expected,) = Predictor.from_bundle(tiny_bundle.folder, threads=1).predict([data])
    (found,) = answer.files
    assert isinstance(found, Recording)
    assert (answer.model, answer.version) == ("tiny", tiny_bundle.weights_sha256[:12])
    assert (found.name, found.label, found.confidence) == ("0.wav", expected.predicted, expected.confidence)
    assert (found.duration_s, found.scored_s, found.sample_rate_hz, found.channels) == (3.0, 2.0, 44_100, 2)
    scores = {score.label: score.score for score in found.scores}
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    np.testing.assert_allclose([scores[name] for name in tiny_bundle.labels], expected.probabilities, atol=1e-6)
    assert found.segments is None
    assert found.picture is None
    assert "segments" not in response.json()["files"][0]


def test_several_recordings_keep_their_order_and_their_problems(service: LocalService) -> None:
    voices = [wav(f0_hz=f0_hz) for f0_hz in (90, 200, 350)]
    alone = [service.post("/v1/predict", **form(data)).json()["files"][0]["scores"] for data in voices]
    response = service.post("/v1/predict", **form(voices[0], b"no audio", voices[1], b"", voices[2]))
    assert response.status_code == 200
    files = response.json()["files"]
    assert [file["status"] for file in files] == ["ok", "failed", "ok", "failed", "ok"]
    assert [file["name"] for file in files] == ["0.wav", "1.wav", "2.wav", "3.wav", "4.wav"]
    assert [file["problem"]["code"] for file in files if file["status"] == "failed"] == ["not_audio", "empty_file"]
    together = [file["scores"] for file in files if file["status"] == "ok"]
    for one, other in zip(alone, together, strict=True):
        assert [score["label"] for score in one] == [score["label"] for score in other]
        np.testing.assert_allclose([s["score"] for s in one], [s["score"] for s in other], atol=1e-5)


def test_windows(service: LocalService, tiny_bundle: Bundle) -> None:
    data = wav(5.0, 48_000, channels=2)
    response = service.post("/v1/predict", **form(data, window_s=2, hop_s=1, channels="each", top_k=3))
    (found,) = Prediction.model_validate_json(response.content).files
    assert isinstance(found, Recording)
    assert found.segments is not None
    spans = [(segment.channel, segment.start_s, segment.end_s) for segment in found.segments]
    assert spans == [(channel, float(start), start + 2.0) for channel in "01" for start in range(4)]
    assert found.scored_s == 5.0
    assert all(len(segment.scores) == 3 for segment in found.segments)
    window = soundfile.read(io.BytesIO(data), start=48_000, stop=144_000, always_2d=True)[0][:, 0]
    buffer = io.BytesIO()
    soundfile.write(buffer, window, 48_000, format="WAV", subtype="PCM_16")
    (expected,) = Predictor.from_bundle(tiny_bundle.folder, threads=1).predict([buffer.getvalue()])
    assert found.segments[1].label == expected.predicted
    assert found.segments[1].confidence == pytest.approx(expected.confidence, abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "windows"), [({"hop_s": 1.0}, 3), ({"channels": "each"}, 2), ({"window_s": 1.0}, 4), ({}, None)]
)
def test_one_word_about_windows_implies_the_others(
    service: LocalService, fields: dict[str, Any], windows: int | None
) -> None:
    (found,) = service.post("/v1/predict", **form(wav(4.0), **fields)).json()["files"]
    assert len(found.get("segments", [])) == (windows or 0)
    assert ("segments" in found) is (windows is not None)


def _joined(*tracks: np.ndarray, rate_hz: int = 16_000) -> bytes:
    """A recording whose channels are ``tracks``."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack(tracks, axis=1), rate_hz, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def test_a_long_recording_is_heard_in_full_and_its_middle_on_request(
    service: LocalService, tiny_bundle: Bundle
) -> None:
    predictor = Predictor.from_bundle(tiny_bundle.folder, threads=1)
    data = wav(6.5, seed=3)
    (found,) = Prediction.model_validate_json(service.post("/v1/predict", **form(data)).content).files
    pooled, timeline = predictor.follow(data, SlidingWindow(2.0, 2.0))
    assert isinstance(found, Recording)
    assert found.segments is not None
    assert [(part.channel, part.start_s) for part in found.segments] == [("mix", start) for start in timeline.start_s]
    assert found.scored_s == 6.5
    by_label = {score.label: score.score for score in found.scores}
    np.testing.assert_allclose([by_label[name] for name in tiny_bundle.labels], pooled.probabilities, atol=1e-6)
    task = service.post("/v1/audio-classification", content=data).json()
    np.testing.assert_allclose([score["score"] for score in task], [score.score for score in found.scores], atol=1e-6)

    (middle,) = service.post("/v1/predict", **form(data, window_s="middle")).json()["files"]
    (expected,) = predictor.predict([data])
    assert "segments" not in middle
    assert (middle["label"], middle["scored_s"]) == (expected.predicted, 2.0)
    for fields in ({"hop_s": 1}, {"channels": "each"}):
        problem_of(service.post("/v1/predict", **form(data, window_s="middle", **fields)), 422, "invalid_request")


@pytest.mark.parametrize("length_s", [5.9, 6.0, 6.1])
def test_long_begins_beyond_six_seconds(service: LocalService, length_s: float) -> None:
    (found,) = service.post("/v1/predict", **form(wav(length_s))).json()["files"]
    assert ("segments" in found) is (length_s > 6)


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
        (found,) = service.post("/v1/predict", **form(_joined(*tracks))).json()["files"]
        assert {part["channel"] for part in found["segments"]} == expected, name
        (asked,) = service.post("/v1/predict", **form(_joined(*tracks), channels="1")).json()["files"]
        assert {part["channel"] for part in asked["segments"]} == {"1"}, name


def test_a_long_recording_with_nothing_in_its_middle_is_still_heard(service: LocalService) -> None:
    voice, click = speech_like(duration_s=3.0), np.zeros(64_000, np.float32)
    click[32_000:32_100] = 0.5  # too little sound for an answer
    data = _joined(np.concatenate([voice, click, voice]))
    problem_of(service.post("/v1/predict", **form(data, window_s="middle")), 422, "too_short")
    (found,) = service.post("/v1/predict", **form(data)).json()["files"]
    assert [part["label"] == "silence" for part in found["segments"]] == [False] * len(found["segments"])


def test_without_options_no_length_within_the_limits_has_too_many_windows(tiny_bundle: Bundle) -> None:
    service = LocalService(tiny_bundle, max_windows=5)
    voices = [speech_like(duration_s=40.0, f0_hz=f0_hz, seed=seed) for f0_hz, seed in ((90.0, 1), (320.0, 2))]
    (found,) = service.post("/v1/predict", **form(_joined(*voices))).json()["files"]
    assert {part["channel"] for part in found["segments"]} == {"mix"}
    assert 4 <= len(found["segments"]) <= 5
    assert found["segments"][-1]["end_s"] == 40.0


def test_min_confidence_and_silence_change_the_label_only(service: LocalService) -> None:
    plain = service.post("/v1/predict", **form(wav())).json()["files"][0]
    unsure = service.post("/v1/predict", **form(wav(), min_confidence=1)).json()["files"][0]
    assert unsure["label"] == "uncertain"
    assert unsure["scores"] == plain["scores"]
    quiet = io.BytesIO()
    soundfile.write(quiet, np.zeros(16_000), 16_000, format="WAV")
    silent = service.post("/v1/predict", **form(quiet.getvalue())).json()["files"][0]
    assert (silent["status"], silent["label"], silent["scores"]) == ("ok", "silence", [])
    assert silent.get("confidence") is None
    assert np.isfinite(silent["level_dbfs"])
    (windowed,) = service.post("/v1/predict", **form(quiet.getvalue(), window_s=0.5)).json()["files"]
    assert [(part["label"], part["scores"]) for part in windowed["segments"]] == [("silence", [])] * 2
    body = service.post("/v1/audio-classification", content=quiet.getvalue())
    assert (body.status_code, body.json()) == (200, [])
    problem_of(service.post("/v1/predict", **form(wav(0.1))), 422, "too_short")
    said = service.get("/v1/model").json()["other_answers"]
    assert set(said) == {"uncertain", "silence", "not_speech"}
    assert set(said).isdisjoint(service.get("/v1/model").json()["labels"])


def test_a_tone_is_no_speech_and_has_no_emotion(service: LocalService) -> None:
    tone, file = 0.3 * np.sin(2 * np.pi * 440 * np.arange(3 * 16_000) / 16_000), io.BytesIO()
    soundfile.write(file, tone, 16_000, format="WAV")
    body = service.post("/v1/predict", **form(file.getvalue()))
    found = body.json()["files"][0]
    assert (found["status"], found["label"], found["scores"]) == ("ok", "not_speech", [])
    (read,) = schema.Prediction.model_validate_json(body.content).files  # as the client does
    assert isinstance(read, schema.Recording)
    assert read.confidence is None
    assert (found.get("confidence"), found["speech_share"]) == (None, 0)
    (windowed,) = service.post("/v1/predict", **form(file.getvalue(), window_s=1)).json()["files"]
    assert {part["label"] for part in windowed["segments"]} == {windowed["label"]} == {"not_speech"}
    assert service.post("/v1/audio-classification", content=file.getvalue()).json() == []


def test_a_notice_goes_with_the_answer(service: LocalService) -> None:
    voice, rate_hz = soundfile.read(io.BytesIO(wav()))
    both = io.BytesIO()
    soundfile.write(both, np.stack([voice, -voice], axis=1), rate_hz, format="WAV")
    answers = service.post("/v1/predict", **form(wav(), both.getvalue())).json()["files"]
    assert answers[0].get("notice") is None
    assert "cancel" in answers[1]["notice"]
    assert answers[1]["label"] != "silence"


def test_picture(service: LocalService, tiny_bundle: Bundle) -> None:
    data = wav(3.0)
    picture = service.post("/v1/predict", **form(data, picture="true")).json()["files"][0]["picture"]
    config = tiny_bundle.features
    assert np.shape(picture["level_db"]) == (config.n_mels, config.n_frames)
    assert np.max(picture["level_db"]) == 0.0
    assert picture["window_start_s"] == pytest.approx(0.5)
    assert picture["waveform"]["end_s"] == pytest.approx(3.0)


def test_explain(service: LocalService, tiny_bundle: Bundle) -> None:
    response = service.post("/v1/explain", **form(wav(3.0)))
    answer = Explanation.model_validate_json(response.content)
    rows, columns = np.shape(answer.importance)
    assert (len(answer.frequency_hz), len(answer.time_s)) == (rows + 1, columns + 1)
    assert (answer.time_s[0], answer.time_s[-1]) == (pytest.approx(0.5), pytest.approx(2.5))
    assert answer.label == service.post("/v1/predict", **form(wav(3.0))).json()["files"][0]["label"]
    assert np.abs(answer.importance).max() > 0


@pytest.mark.parametrize("kind", [None, "audio/wav", "application/octet-stream", "video/webm"])
def test_task_takes_raw_bytes(service: LocalService, kind: str | None) -> None:
    headers = {"content-type": kind} if kind else {}
    scores = service.post("/v1/audio-classification", content=wav(), headers=headers).json()
    assert scores == service.post("/v1/predict", **form(wav())).json()["files"][0]["scores"]


def test_task_takes_json_with_parameters(service: LocalService) -> None:
    task = {"inputs": base64.b64encode(wav()).decode(), "parameters": {"top_k": 2, "function_to_apply": "softmax"}}
    scores = service.post("/v1/audio-classification", json=task).json()
    assert scores == service.post("/v1/audio-classification", content=wav()).json()[:2]


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
    headers = {"content-type": "application/json"}
    response = service.post("/v1/audio-classification", content=body, headers=headers)
    assert problem_of(response, 422, "invalid_request").errors
    assert len(response.content) < 2000


def test_names_of_form_fields_are_told_in_part(service: LocalService) -> None:
    name = "x" * 3000
    twice = [(name, (None, b"1")), (name, (None, b"2")), ("file", ("a.wav", wav()))]
    for files in ([(name, (None, b"1")), ("file", ("a.wav", wav()))], twice, [(name, ("a.wav", wav()))]):
        response = service.post("/v1/predict", files=files)
        (error,) = problem_of(response, 422, "invalid_request").errors or []
        assert error.field == "x" * 61 + "..."
        assert len(response.content) < 1000


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"no audio, only words", 400, "not_audio"),
        (b"", 400, "empty_file"),
        (wav()[:2000], 422, "truncated"),
        (wav(rate_hz=2000), 422, "bad_sample_rate"),
        (b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\x34\x12\1\0\x80\xbb\0\0\x80\xbb\0\0\1\0\x08\0data\0\0\0\0", 415, None),
    ],
)
def test_recordings_that_cannot_be_used(service: LocalService, data: bytes, status: int, code: str | None) -> None:
    for path in ("/v1/predict", "/v1/explain"):
        response = service.post(path, **form(data))
        problem_of(response, status, code or response.json()["code"])
    raw = service.post("/v1/audio-classification", content=data)
    problem_of(raw, status, code or raw.json()["code"])


def test_lengths_are_limited_before_decoding(tiny_bundle: Bundle) -> None:
    service = LocalService(tiny_bundle, max_duration_s=2.0, max_decoded_mib=0.1)
    problem_of(service.post("/v1/predict", **form(wav(2.5))), 413, "too_long")
    problem_of(service.post("/v1/predict", **form(wav(1.9))), 413, "too_large")
    problem_of(service.post("/v1/explain", **form(wav(2.5))), 413, "too_long")
    problem_of(service.post("/v1/predict", **form(wav(2.5), window_s=1)), 413, "too_long")


def test_windows_are_limited(tiny_bundle: Bundle) -> None:
    service = LocalService(tiny_bundle, max_windows=5)
    assert service.post("/v1/predict", **form(wav(3.0), window_s=1, hop_s=0.5)).status_code == 200
    problem_of(service.post("/v1/predict", **form(wav(3.5), window_s=1, hop_s=0.5)), 422, "too_many_windows")
    stereo = form(wav(2.5, channels=2), window_s=1, hop_s=0.5, channels="each")
    problem_of(service.post("/v1/predict", **stereo), 422, "too_many_windows")
    problem_of(service.post("/v1/predict", **form(wav(3.0), window_s=2.5)), 422, "invalid_request")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"window_s": "0.01"}, "window_s"),
        ({"window_s": "nan"}, "window_s"),
        ({"window_s": "inf"}, "window_s"),
        ({"window_s": "2.5"}, "window_s"),
        ({"window_s": "1.5e308"}, "window_s"),
        ({"hop_s": "0"}, "hop_s"),
        ({"top_k": "0"}, "top_k"),
        ({"top_k": "many"}, "top_k"),
        ({"min_confidence": "1.1"}, "min_confidence"),
        ({"channels": "left"}, "channels"),
        ({"channels": "-1"}, "channels"),
        ({"picture": "perhaps"}, "picture"),
        ({"url": "http://127.0.0.1/secret.wav"}, "url"),
        ({"path": "/etc/passwd"}, "path"),
    ],
)
def test_wrong_fields_are_named(service: LocalService, fields: dict[str, str], field: str) -> None:
    problem = problem_of(service.post("/v1/predict", **form(wav(), **fields)), 422, "invalid_request")
    assert [error.field for error in problem.errors or []] == [field]
    assert field in problem.detail
    several = problem_of(service.post("/v1/predict", **form(wav(), wav(), **fields)), 422, "invalid_request")
    assert several.errors == problem.errors, "a wrong field is the request's fault, not each recording's"


def test_forms_that_are_none(service: LocalService) -> None:
    problem_of(service.post("/v1/predict", content=wav()), 415, "unsupported_media_type")
    problem_of(service.post("/v1/predict", json={"file": "x"}), 415, "unsupported_media_type")
    problem_of(service.post("/v1/predict", data={"file": "speech.wav"}), 415, "unsupported_media_type")
    multipart = {"content-type": "multipart/form-data; boundary=x"}
    problem_of(service.post("/v1/predict", content=b"not multipart", headers=multipart), 400, "bad_request")
    none = {"content-type": "multipart/form-data"}
    problem_of(service.post("/v1/predict", content=b"", headers=none), 400, "bad_request")
    text = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n/etc/passwd\r\n--x--\r\n'
    problem_of(service.post("/v1/predict", content=text, headers=multipart), 422, "invalid_request")
    other = {"files": [("speech", ("a.wav", wav()))]}
    problem_of(service.post("/v1/predict", **other), 422, "invalid_request")
    problem_of(
        service.post("/v1/audio-classification", content=b"x", headers={"content-type": "text/html"}),
        415,
        "unsupported_media_type",
    )


BORDERS = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n%s\r\n--x--\r\n'


@pytest.mark.parametrize("charset", ["punycode", "utf-7", "unicode_escape", "undefined", "idna", "utf-8\0", "\xff"])
def test_character_sets_that_are_slow_or_none_are_refused(service: LocalService, charset: str) -> None:
    headers = {"content-type": f"multipart/form-data; boundary=x; charset={charset}".encode("latin-1")}
    problem_of(service.post("/v1/predict", content=BORDERS % wav(), headers=headers), 415, "unsupported_media_type")
    headers = {"content-type": "multipart/form-data; boundary=x; charset=UTF-8"}
    assert service.post("/v1/predict", content=BORDERS % wav(), headers=headers).status_code == 200


def test_a_form_full_of_borders_is_not_parsed(service: LocalService) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    response = service.post("/v1/predict", content=BORDERS % (b"\r\n--x?" * 100), headers=headers)
    problem_of(response, 422, "too_many_files")
    response = service.post("/v1/predict", content=BORDERS % (b"\r\n--x?" * 10), headers=headers)
    problem_of(response, 400, "not_audio")


def test_files_are_counted(service: LocalService, tiny_bundle: Bundle) -> None:
    limited = LocalService(tiny_bundle, max_files=2)
    assert limited.post("/v1/predict", **form(wav(), wav())).status_code == 200
    for count in (3, 4, 60):
        problem_of(limited.post("/v1/predict", **form(*[b"x"] * count)), 422, "too_many_files")
    problem_of(service.post("/v1/explain", **form(wav(), wav())), 422, "too_many_files")


def test_unknown_addresses_methods_and_models(service: LocalService) -> None:
    problem_of(service.get("/v1/nothing"), 404, "not_found")
    response = service.get("/v1/predict")
    problem_of(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    problem_of(service.post("/v1/predict", **form(wav(), model="other")), 404, "unknown_model")
    problem_of(service.get("/v1/model", params={"model": "other"}), 404, "unknown_model")
    problem_of(service.get("/v2/models/other"), 404, "unknown_model")


def test_model_and_health(service: LocalService, tiny_bundle: Bundle, failing: LocalService) -> None:
    info = ModelInfo.model_validate_json(service.get("/v1/model").content)
    assert info.labels == list(tiny_bundle.labels)
    assert info.features == tiny_bundle.features.to_dict()
    assert info.models == ["tiny"]
    assert info.limits["max_files"] == 32
    metadata = service.get("/v2/models/tiny").json()
    assert metadata["inputs"] == [{"name": "features", "datatype": "FP32", "shape": [-1, 1, 64, 188]}]
    assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 8]}]
    for path in ("/v2/health/ready", "/v2/models/tiny/ready"):
        assert (service.get(path).status_code, service.get(path).json()) == (200, {"ready": True})
    failing.models.error = retry_later("unavailable", "gone")
    for path in ("/v2/health/ready", "/v2/models/tiny/ready"):
        assert (service.get(path).status_code, service.get(path).json()) == (503, {"ready": False})
    assert service.get("/v2/health/live").json() == {"live": True}


def test_cors_is_closed_unless_opened(service: LocalService, tiny_bundle: Bundle) -> None:
    asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
    closed = service.request("OPTIONS", "/v1/predict", headers=asked)
    assert closed.status_code == 403
    assert not [name for name in closed.headers if name.startswith("access-control")]
    opened = LocalService(tiny_bundle, cors_origins="https://page.example")
    answer = opened.request("OPTIONS", "/v1/predict", headers=asked)
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    other = opened.request("OPTIONS", "/v1/predict", headers=asked | {"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_refusals_and_mistakes_of_ours_can_be_read_by_pages_of_the_origin(tiny_bundle: Bundle) -> None:
    opened = LocalService(tiny_bundle, cors_origins="https://page.example")
    opened.models.error = ZeroDivisionError()
    origin = {"origin": "https://page.example"}
    answers = [opened.post("/v1/predict", headers=origin, **form(wav())), opened.get("/nowhere", headers=origin)]
    assert [answer.status_code for answer in answers] == [500, 404]
    assert {answer.headers.get("access-control-allow-origin") for answer in answers} == {"https://page.example"}


def test_a_full_model_keeps_no_request_from_another(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    service = LocalService(tiny_bundle, names=("tiny", "second"))
    full = {"tiny"}

    def check_room(name: str) -> None:
        if name in full:
            raise retry_later("overloaded", "full")

    monkeypatch.setattr(service.models, "check_room", check_room)
    for path in ("/v1/predict", "/v1/explain"):
        assert service.post(path, **form(wav(), model="second")).status_code == 200
        problem_of(service.post(path, **form(wav())), 429, "overloaded")
        problem_of(service.post(path, **form(wav(), model="tiny")), 429, "overloaded")
    full.add("second")
    problem_of(service.post("/v1/predict", content=b"no form"), 429, "overloaded")


def test_a_full_queue_is_told_before_the_body_is_read(failing: LocalService) -> None:
    failing.models.full = retry_later("overloaded", "full", after_s=0.4)
    for path in ("/v1/predict", "/v1/explain", "/v1/audio-classification"):
        taken = []

        async def body(taken: list[int] = taken) -> Any:
            taken.append(1)
            yield b"x"

        response = failing.post(path, content=body())
        problem_of(response, 429, "overloaded")
        assert response.headers["retry-after"] == "1"
        assert not taken


def test_back_pressure_concerns_the_whole_request(failing: LocalService) -> None:
    failing.models.error = retry_later("overloaded", "full", after_s=2)
    response = failing.post("/v1/predict", **form(wav(), wav()))
    problem_of(response, 429, "overloaded")
    assert response.headers["retry-after"] == "2"


def test_deadline(tiny_bundle: Bundle) -> None:
    service = LocalService(tiny_bundle, deadline_s=0.001)
    response = service.post("/v1/predict", **form(wav(30.0), window_s=0.1))
    problem_of(response, 503, "deadline_exceeded")
    assert response.headers["retry-after"] == "1"


def test_a_mistake_of_ours_tells_nothing_but_the_log(failing: LocalService, caplog: pytest.LogCaptureFixture) -> None:
    failing.models.error = RuntimeError("secret /home/someone/models")
    with caplog.at_level(logging.ERROR):
        response = failing.post("/v1/predict", **form(wav()), headers={"x-request-id": "abc"})
    problem = problem_of(response, 500, "internal_error")
    assert problem.request_id == "abc"
    assert "secret" not in response.text
    assert "secret" in caplog.text


def test_one_structured_line_a_request(service: LocalService, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ray.serve.ser"):
        service.post("/v1/predict", **form(wav(), b"words"), headers={"x-request-id": "id\t1"})
        service.get("/v1/nothing")
    first, second = (json.loads(record.message) for record in caplog.records if record.name == "ray.serve.ser")
    assert first["id"] == "id1"  # control characters are dropped
    assert (first["route"], first["status"], first["code"], first["files"]) == ("/v1/predict", 200, "ok", 2)
    assert first["bytes"] > len(wav())
    assert {"ms", "decode_ms", "wait_ms", "network_ms", "batch"} <= set(first)
    assert (second["status"], second["code"]) == (404, "not_found")
    assert "0.wav" not in caplog.text


def test_figures(tiny_bundle: Bundle) -> None:
    service = LocalService(tiny_bundle)
    service.post("/v1/predict", **form(wav(), b"words"))
    service.post("/v1/audio-classification", content=b"words")
    assert service.meter.recordings == [("tiny", "ok"), ("tiny", "not_audio"), ("tiny", "not_audio")]
    service.meter.recordings.clear()
    service.post("/v1/explain", **form(wav()))
    service.post("/v1/explain", **form(b"words"))
    assert service.meter.recordings == [("tiny", "ok"), ("tiny", "not_audio")]
    service.meter.requests[2:] = []
    assert service.meter.requests == [("/v1/predict", 200, "ok"), ("/v1/audio-classification", 400, "not_audio")]


def test_the_documentation_page_needs_nothing_from_elsewhere(service: LocalService) -> None:
    page = service.get("/docs")
    assert page.status_code == 200
    assert "//" not in re.sub(r"<!--.*?-->", "", page.text).replace("window.location.protocol + '//'", "")
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) >= 2
    for path in loaded:
        assert service.get(path).status_code == 200, path


def test_every_code_has_a_status_and_every_status_is_in_the_document(service: LocalService) -> None:
    document = service.get("/openapi.json").json()
    told = {int(status) for status in document["paths"]["/v1/predict"]["post"]["responses"]}
    needs_path = {"not_found", "not_a_file", "permission_denied", "unreadable"}  # bytes have no path
    possible = {
        kind_of(code).status for code in {*KINDS, *ERRORS} - needs_path - {"method_not_allowed", "unauthorized"}
    }
    assert possible <= told
    assert "Problem" in document["components"]["schemas"]
    schema = document["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert schema["properties"]["file"]["maxItems"] == 32
    assert set(schema["properties"]) >= {"window_s", "hop_s", "channels", "top_k", "min_confidence"}


def test_the_document_asks_for_a_key_where_there_is_one(service: LocalService, guarded: LocalService) -> None:
    with_key = guarded.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]
    assert with_key["security"] == [{"api_key": []}]
    assert "401" in with_key["responses"]
    assert "security" not in service.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.binary(max_size=300),
    kind=st.sampled_from(["multipart/form-data; boundary=x", "application/json", "audio/wav", "multipart/form-data"]),
    path=st.sampled_from(["/v1/predict", "/v1/explain", "/v1/audio-classification"]),
)
def test_any_bytes_are_answered_with_a_problem(service: LocalService, body: bytes, kind: str, path: str) -> None:
    response = service.post(path, content=body, headers={"content-type": kind})
    assert 400 <= response.status_code < 500
    problem_of(response, response.status_code, response.json()["code"])


def test_unforeseen_codes_are_internal_errors() -> None:
    from serve.problems import recording_error

    found = recording_error("internal_error", "ValueError: /home/someone")
    assert (found.code, kind_of(found.code).status) == ("internal_error", 500)
    assert "someone" not in found.detail
    assert isinstance(found, ServiceError)


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
@pytest.mark.parametrize("extra", [0, 1, 2])  # all three lengths of padding
def test_base64_as_others_write_it(service: LocalService, written: Any, extra: int) -> None:
    data = wav(0.5) + b"\xff\xfe"[:extra]
    response = service.post("/v1/audio-classification", json={"inputs": written(data)})
    assert response.status_code == 200
    assert response.json() == service.post("/v1/audio-classification", content=data).json()


def test_packed_bodies_are_the_same_and_have_the_same_limit(service: LocalService, tiny_bundle: Bundle) -> None:
    def post(body: bytes, encoding: str, to: LocalService = service) -> Any:
        return to.post("/v1/audio-classification", content=body, headers={"content-encoding": encoding})

    plain = service.post("/v1/audio-classification", content=wav()).json()
    packed = gzip.compress(wav())
    assert post(packed, "gzip").json() == post(packed, "GZIP").json() == post(wav(), "identity").json() == plain
    problem_of(post(packed[:-20], "gzip"), 400, "bad_request")
    problem_of(post(wav(), "gzip"), 400, "bad_request")
    problem_of(post(packed + packed, "gzip"), 400, "bad_request")
    for other in ("br", "deflate", "zstd", "gzip, gzip"):
        refused = post(packed, other)
        problem_of(refused, 415, "unsupported_media_type")
        assert "gzip" in refused.headers["accept-encoding"]
    assert service.get("/v1/model", headers={"content-encoding": "br"}).status_code == 200  # there is no body
    bomb = gzip.compress(bytes(50_000_000))
    small = LocalService(tiny_bundle, max_body_mib=0.1)
    problem_of(post(bomb, "gzip", small), 413, "body_too_large")
    prepared = httpx.Request("POST", "http://127.0.0.1", **form(wav(), top_k=1))
    headers = {"content-type": prepared.headers["content-type"], "content-encoding": "gzip"}
    found = service.post("/v1/predict", content=gzip.compress(prepared.read()), headers=headers)
    assert found.json()["files"][0]["scores"] == plain[:1]


def test_parameters_in_the_address_that_would_do_nothing_are_told(service: LocalService) -> None:
    for path, content in (("/v1/predict", form(wav())), ("/v1/explain", form(wav()))):
        problem = problem_of(service.post(path, params={"window_s": "1"}, **content), 422, "invalid_request")
        assert [error.field for error in problem.errors or []] == ["window_s"]
        assert "form" in problem.detail
    problem_of(service.post("/v1/audio-classification", params={"top_k": 1}, content=wav()), 422, "invalid_request")
    problem_of(service.get("/v1/model", params={"name": "tiny"}), 422, "invalid_request")
    assert service.get("/v1/model", params={"model": "tiny"}).status_code == 200
    assert service.get("/v2/health/live", params={"probe": "1"}).status_code == 200


def test_limits_of_a_form_are_told_as_what_they_are(service: LocalService) -> None:
    fields = [(f"field{number}", (None, b"1")) for number in range(33)]
    many = service.post("/v1/predict", files=[*fields, ("file", ("a.wav", wav()))])
    assert "32" in problem_of(many, 422, "invalid_request").detail
    long = service.post("/v1/predict", files=[("model", (None, b"x" * 70_000)), ("file", ("a.wav", wav()))])
    assert "64 KiB" in problem_of(long, 422, "invalid_request").detail
