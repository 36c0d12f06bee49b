"""A service for the page's tests that answers without a model: a recording's bytes say what is to be heard in it.

``spoken("sad", confidence=0.8, duration_s=9.0)`` makes such bytes; ``refused("too_long")`` makes some that the service
refuses. It speaks HTTP through httpx's MockTransport, so the page's own client is at work.
"""

from __future__ import annotations

import email
import json
from collections.abc import Callable
from typing import Any

import httpx

LABELS = ("angry", "calm", "disgust", "fearful", "happy", "neutral", "sad", "surprised")
FRAMES, COLUMNS, BANDS = 188, 300, 64


def spoken(label: str, *, confidence: float = 0.8, duration_s: float = 2.5, channels: int = 1, take: int = 1) -> bytes:
    """Bytes in which the service hears ``label``; ``take`` makes others of the same."""
    said = {"label": label, "confidence": confidence, "duration_s": duration_s, "channels": channels, "take": take}
    return json.dumps(said).encode()


def refused(code: str) -> bytes:
    """Bytes that the service refuses with ``code``."""
    return json.dumps({"refused": code}).encode()


class FakeService:
    """What the page is connected to. ``status`` other than 200: every answer; ``up`` False: no connection."""

    def __init__(self) -> None:
        self.up = True
        self.status, self.code = 200, "overloaded"
        self.after = 10**9  # so many recordings are answered before the connection breaks
        self.received: list[str] = []
        self.asked: list[str] = []
        self.keys: set[str | None] = set()
        self.metrics: dict[str, Any] = {}
        self.transport = httpx.MockTransport(self._answer)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if not self.up:
            raise httpx.ConnectError("refused", request=request)
        if path.startswith("/v2/health"):
            return httpx.Response(200, json={"ready": True})
        self.asked.append(path)
        self.keys.add(request.headers.get("authorization"))
        if self.status != 200:
            return httpx.Response(self.status, json=_problem(self.code, self.status))
        routes: dict[str, Callable[[httpx.Request], httpx.Response]] = {
            "/v1/predict": self._predict,
            "/v1/explain": self._explain,
            "/v1/model": self._model,
        }
        return routes[path](request)

    def _predict(self, request: httpx.Request) -> httpx.Response:
        files, options = _parts(request)
        if len(self.received) + len(files) > self.after:
            raise httpx.ReadError("gone", request=request)
        self.received += [name for name, _ in files]
        answers = [recording_of(name, _said(data), options) for name, data in files]
        if len(answers) == 1 and answers[0]["status"] == "failed":
            return httpx.Response(422, json=answers[0]["problem"])
        return httpx.Response(200, json={"id": "1", "model": "fake", "version": "0" * 12, "files": answers})

    def _explain(self, request: httpx.Request) -> httpx.Response:
        ((_, data),), _ = _parts(request)
        return httpx.Response(200, json=explanation_of(_said(data)))

    def _model(self, request: httpx.Request) -> httpx.Response:
        body = {
            "name": "fake",
            "version": "0" * 12,
            "labels": LABELS,
            "features": {"window_s": 2.0, "n_mels": BANDS, "sample_rate_hz": 48000},
            "crops": 1,
            "metrics": self.metrics,
            "card": "# fake\n\nNo model.\n\n## Data\n\nNone.\n\n## Limits\n\nMany.\n",
            "models": ["fake"],
            "limits": {"max_body_mib": 32, "max_duration_s": 1800},
        }
        return httpx.Response(200, json=body)


def _parts(request: httpx.Request) -> tuple[list[tuple[str, bytes]], dict[str, str]]:
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    files, options = [], {}
    for part in email.message_from_bytes(head + request.read()).get_payload():
        data = part.get_payload(decode=True)
        if part.get_filename() is None:
            options[part.get_param("name", header="content-disposition")] = data.decode()
        else:
            files.append((part.get_filename(), data))
    return files, options


def _said(data: bytes) -> dict[str, Any]:
    """What the bytes say; real audio, such as the example clips, sounds calm."""
    if data.startswith(b"{"):
        said: dict[str, Any] = json.loads(data)
        return said
    return {"label": "calm", "confidence": 0.8, "duration_s": 2.5, "channels": 1}


def _problem(code: str, status: int) -> dict[str, Any]:
    detail = f"told of {code}"
    return {"type": f"urn:ser:problem:{code}", "title": code, "status": status, "code": code, "detail": detail}


def _scores(label: str, confidence: float) -> list[dict[str, Any]]:
    rest = [name for name in LABELS if name != label]
    return [{"label": label, "score": confidence}] + [
        {"label": name, "score": (1 - confidence) / len(rest)} for name in rest
    ]


def recording_of(name: str, said: dict[str, Any], options: dict[str, str]) -> dict[str, Any]:
    """The entry of an answer for one recording, as JSON has it."""
    if "refused" in said:
        return {"status": "failed", "name": name, "problem": _problem(said["refused"], 422)}
    label, confidence, duration_s = said["label"], said["confidence"], said["duration_s"]
    shown = "uncertain" if label != "silence" and confidence < float(options.get("min_confidence", 0)) else label
    answer = {
        "status": "ok",
        "name": name,
        "label": shown,
        "confidence": None if label == "silence" else confidence,
        "scores": [] if label == "silence" else _scores(label, confidence),
        "duration_s": duration_s,
        "scored_s": min(2.0, duration_s),
        "sample_rate_hz": 16000,
        "channels": said["channels"],
        "level_dbfs": -20.0,
    }
    if duration_s > 6:
        names = [str(i) for i in range(said["channels"])] if said["channels"] > 1 else ["mix"]
        common = {"label": shown, "confidence": answer["confidence"], "scores": answer["scores"], "level_dbfs": -20.0}
        starts = [2.0 * i for i in range(int(duration_s // 2))]
        answer["segments"] = [{"channel": c, "start_s": s, "end_s": s + 2, **common} for c in names for s in starts]
    if options.get("picture") == "true":
        answer["picture"] = picture_of(duration_s)
    return answer


def explanation_of(said: dict[str, Any]) -> dict[str, Any]:
    """An explanation as JSON has it: one cell of 8 x 16 speaks for the answer."""
    label, confidence, duration_s = said["label"], said["confidence"], said["duration_s"]
    return {
        "id": "1",
        "model": "fake",
        "version": "0" * 12,
        "label": label,
        "confidence": confidence,
        "scores": _scores(label, confidence),
        "time_s": [(duration_s - 2.0) / 2 + i / 8 for i in range(17)],
        "frequency_hz": [31.0 + 2900 * i for i in range(9)],
        "importance": [[0.5 if (row, column) == (2, 3) else -0.1 for column in range(16)] for row in range(8)],
        "picture": picture_of(duration_s),
    }


def picture_of(duration_s: float) -> dict[str, Any]:
    """A picture as JSON has it: the lower the band the louder."""
    start_s = (duration_s - 2.0) / 2
    return {
        "waveform": {"start_s": 0.0, "end_s": duration_s, "low": [-0.5] * 100, "high": [0.5] * 100},
        "window_start_s": start_s,
        "window_s": 2.0,
        "frequency_hz": [30.0 * 1.11**i for i in range(BANDS)],
        "time_s": [start_s + 2.0 * i / FRAMES for i in range(FRAMES)],
        "level_db": [[-float(band)] * FRAMES for band in range(BANDS)],
        "overview_db": [[-float(band)] * COLUMNS for band in range(BANDS)],
    }
