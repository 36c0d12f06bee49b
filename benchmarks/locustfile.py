"""A scenario for locust: users who send recordings, also in windows, get explanations, or read the model card.

    make serve                                            # in another terminal
    make load-test ARGS="--users 16 --run-time 60s"       # or: locust -f benchmarks/locustfile.py, for its page

A response 429 or 503 with ``Retry-After`` counts as a refusal, not as a failure, and the user waits that long. The API
key is read from ``SER_API_KEY``. ``bench_serve`` measures the service with a tool that uses less CPU.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

from locust import HttpUser, between, events, task

from benchmarks.common import clips

KEY = os.environ.get("SER_API_KEY", "")


CLIPS = itertools.cycle(clips(8))
LONG = clips(1, duration_s=20.0)[0]


class Caller(HttpUser):
    """A user; most requests are single recordings."""

    host = "http://127.0.0.1:8000"
    wait_time = between(0.0, 0.2)

    @task(20)
    def predict(self) -> None:
        self._post("/v1/predict", 1, files=[("file", ("clip.wav", next(CLIPS)))], data={"top_k": "3"})

    @task(4)
    def predict_several(self) -> None:
        files = [("file", (f"{n}.wav", next(CLIPS))) for n in range(4)]
        self._post("/v1/predict", 4, name="/v1/predict, 4 files", files=files)

    @task(6)
    def task_of_hugging_face(self) -> None:
        self._post("/v1/audio-classification", 0, data=next(CLIPS), headers={"Content-Type": "audio/wav"})

    @task(1)
    def follow(self) -> None:
        files, fields = [("file", ("long.wav", LONG))], {"window_s": "2", "hop_s": "1"}
        self._post("/v1/predict", 1, name="/v1/predict, windows of 20 s", files=files, data=fields)

    @task(1)
    def explain(self) -> None:
        self._post("/v1/explain", 0, files=[("file", ("clip.wav", next(CLIPS)))])

    @task(1)
    def card(self) -> None:
        self.client.get("/v1/model", headers=self._key())

    def _post(self, path: str, recordings: int, *, headers: dict[str, str] | None = None, **content: Any) -> None:
        """Send a request, and check that the response has ``recordings`` usable ones (0: another kind of response)."""
        asking = self.client.post(path, headers=(headers or {}) | self._key(), catch_response=True, **content)
        with asking as answer:
            after = answer.headers.get("Retry-After", "")
            if answer.status_code in (429, 503) and after.isdecimal():
                refused[answer.status_code] = refused.get(answer.status_code, 0) + 1
                answer.success()
                time.sleep(int(after))
            elif answer.status_code == 200 and recordings:
                told = [file["status"] for file in answer.json()["files"]]
                if told != ["ok"] * recordings:
                    answer.failure(f"statuses {told}")

    def _key(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"} if KEY else {}


refused: dict[int, int] = {}


@events.quitting.add_listener
def _tell(environment: Any, **_: Any) -> None:
    print(f"refused with Retry-After, by status: {refused or 'none'}")
