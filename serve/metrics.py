"""The service's own metrics, exported in Prometheus' format, each name with the prefix ``ray_``.

On Ray, Ray exports them, and Ray Serve adds those of its own (``ray_serve_*``): requests and queue of every deployment,
replicas, latencies. Without Ray they are the same, by prometheus_client, so that a dashboard fits both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.service import Timing

_SECONDS = [0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]
_BATCH = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0]
_BY_ANSWER = ("route", "status", "code")
_BY_RECORDING = ("model", "code")
_BY_STAGE = ("model", "stage")
_PREFIX = "ray_"


class Kinds(NamedTuple):
    """How metrics are made: called as those of ``ray.serve.metrics``."""

    counter: Callable[..., Any]
    gauge: Callable[..., Any]
    histogram: Callable[..., Any]


def on_ray() -> Kinds:
    """Metrics that Ray exports."""
    from ray.serve import metrics

    return Kinds(metrics.Counter, metrics.Gauge, metrics.Histogram)


def in_process() -> tuple[Kinds, Callable[[], str]]:
    """Metrics of this process, and what gives all of them in Prometheus' format."""
    registry = CollectorRegistry()

    def made(kind: Any) -> Callable[..., _Tagged]:
        def make(name: str, *, description: str, tag_keys: Sequence[str], boundaries: Sequence[float] = ()) -> _Tagged:
            more = {"buckets": boundaries} if boundaries else {}
            return _Tagged(kind(_PREFIX + name, description, tag_keys, registry=registry, **more))

        return make

    def text() -> str:
        lines = generate_latest(registry).decode().splitlines(keepends=True)
        return "".join(line for line in lines if "_created" not in line.partition("{")[0])  # Ray exports none

    return Kinds(made(Counter), made(Gauge), made(Histogram)), text


class _Tagged:
    """A metric of prometheus_client, called as Ray's are."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric

    def inc(self, *, tags: Mapping[str, str]) -> None:
        """Count one more."""
        self._metric.labels(**tags).inc()

    def set(self, value: float, *, tags: Mapping[str, str]) -> None:
        """Note the value of now."""
        (self._metric.labels(**tags) if tags else self._metric).set(value)

    def observe(self, value: float, *, tags: Mapping[str, str]) -> None:
        """Add an observation."""
        self._metric.labels(**tags).observe(value)


class RequestMeter:
    """Figures of what speaks HTTP; ``kinds`` is ``on_ray()``, or of ``in_process``."""

    def __init__(self, kinds: Kinds) -> None:
        self._requests = kinds.counter(
            "ser_requests_total",
            description="HTTP requests by route, status, and problem code (ok when there is none).",
            tag_keys=_BY_ANSWER,
        )
        self._seconds = kinds.histogram(
            "ser_request_seconds",
            description="Seconds from the first byte of a request to the last of its answer, by route.",
            boundaries=_SECONDS,
            tag_keys=("route",),
        )
        self._recordings = kinds.counter(
            "ser_recordings_total",
            description="Recordings by model and problem code (ok when the recording could be used).",
            tag_keys=_BY_RECORDING,
        )
        self._streams = kinds.gauge("ser_streams", description="Live streams that are open.", tag_keys=())

    def request(self, route: str, status: int, code: str, seconds: float) -> None:
        """Count a request."""
        self._requests.inc(tags={"route": route, "status": str(status), "code": code})
        self._seconds.observe(seconds, tags={"route": route})

    def recording(self, model: str, code: str) -> None:
        """Count a recording."""
        self._recordings.inc(tags={"model": model, "code": code})

    def streams(self, count: int) -> None:
        """Note how many live streams are open now."""
        self._streams.set(count, tags={})


class WorkMeter:
    """Figures of a model worker; ``kinds`` as of ``RequestMeter``."""

    def __init__(self, kinds: Kinds) -> None:
        self._stages = kinds.histogram(
            "ser_stage_seconds",
            description="Seconds of a recording in a stage: decode (with features), wait (for the network), network.",
            boundaries=_SECONDS,
            tag_keys=_BY_STAGE,
        )
        self._batch = kinds.histogram(
            "ser_batch_size",
            description="Windows that went through the network together, one observation a recording.",
            boundaries=_BATCH,
            tag_keys=("model",),
        )
        self._waiting = kinds.gauge(
            "ser_waiting_recordings",
            description="Short recordings in work: in a decoder or the network, or waiting for it.",
            tag_keys=("model",),
        )
        self._long = kinds.gauge(
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
