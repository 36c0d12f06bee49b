"""The service's own metrics, exported by Ray in Prometheus' format (each name gets the prefix ``ray_``).

Ray Serve adds those of its own (``ray_serve_*``): requests and queue of every deployment, replicas, latencies.
"""

from __future__ import annotations

from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

from serve.service import Timing

_SECONDS = [0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]
_BATCH = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0]
# Ray's annotation of tag_keys allows for one key only
_BY_ANSWER: Any = ("route", "status", "code")
_BY_RECORDING: Any = ("model", "code")
_BY_STAGE: Any = ("model", "stage")


class RequestMeter:
    """Figures of the ingress."""

    def __init__(self) -> None:
        self._requests = Counter(
            "ser_requests_total",
            description="HTTP requests by route, status, and problem code (ok when there is none).",
            tag_keys=_BY_ANSWER,
        )
        self._seconds = Histogram(
            "ser_request_seconds",
            description="Seconds from the first byte of a request to the last of its answer, by route.",
            boundaries=_SECONDS,
            tag_keys=("route",),
        )
        self._recordings = Counter(
            "ser_recordings_total",
            description="Recordings by model and problem code (ok when the recording could be used).",
            tag_keys=_BY_RECORDING,
        )

    def request(self, route: str, status: int, code: str, seconds: float) -> None:
        """Count a request."""
        self._requests.inc(tags={"route": route, "status": str(status), "code": code})
        self._seconds.observe(seconds, tags={"route": route})

    def recording(self, model: str, code: str) -> None:
        """Count a recording."""
        self._recordings.inc(tags={"model": model, "code": code})


class WorkMeter:
    """Figures of a model worker."""

    def __init__(self) -> None:
        self._stages = Histogram(
            "ser_stage_seconds",
            description="Seconds of a recording in a stage: decode (with features), wait (for the network), network.",
            boundaries=_SECONDS,
            tag_keys=_BY_STAGE,
        )
        self._batch = Histogram(
            "ser_batch_size",
            description="Windows that went through the network together, one observation a recording.",
            boundaries=_BATCH,
            tag_keys=("model",),
        )
        self._waiting = Gauge(
            "ser_waiting_recordings",
            description="Short recordings in work: in a decoder or the network, or waiting for it.",
            tag_keys=("model",),
        )
        self._long = Gauge(
            "ser_long_requests",
            description="Recordings in windows, and explanations, in work.",
            tag_keys=("model",),
        )

    def load(self, model: str, waiting: int, long: int) -> None:
        """Note what is in work now."""
        self._waiting.set(waiting, tags={"model": model})
        self._long.set(long, tags={"model": model})

    def work(self, model: str, timing: Timing) -> None:
        """Note where the time of a recording went."""
        tags = {"model": model}
        stages = {"decode": timing.decode_s, "wait": timing.wait_s, "network": timing.network_s}
        for stage, seconds in stages.items():
            self._stages.observe(seconds, tags=tags | {"stage": stage})
        if timing.batch:  # what could not be used is in none
            self._batch.observe(timing.batch, tags=tags)
