"""The service's metrics in Prometheus' format; each exported name has the prefix ``ray_``.

On Ray, Ray exports them, and Ray Serve adds its own (``ray_serve_*``): requests and queue of every deployment,
replicas, latencies. Without Ray, prometheus_client exports them under the same names, so that one dashboard fits both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.service import Timing

_SECONDS = [0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]
_BATCH = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0]
_PREFIX = "ray_"


class Kinds(NamedTuple):
    """Constructors of metrics, called like those of ``ray.serve.metrics``."""

    counter: Callable[..., Any]
    gauge: Callable[..., Any]
    histogram: Callable[..., Any]


def on_ray() -> Kinds:
    """Constructors of metrics that Ray exports."""
    from ray.serve import metrics

    return Kinds(metrics.Counter, metrics.Gauge, metrics.Histogram)


def in_process() -> tuple[Kinds, Callable[[], str]]:
    """Constructors of metrics of this process, and a function that returns all as text in Prometheus' format."""
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
    """A metric of prometheus_client with the interface of Ray's."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric

    def inc(self, *, tags: Mapping[str, str]) -> None:
        self._metric.labels(**tags).inc()

    def set(self, value: float, *, tags: Mapping[str, str]) -> None:
        (self._metric.labels(**tags) if tags else self._metric).set(value)

    def observe(self, value: float, *, tags: Mapping[str, str]) -> None:
        self._metric.labels(**tags).observe(value)


class RequestMeter:
    """Metrics of a process that answers HTTP; ``kinds`` comes from ``on_ray`` or ``in_process``."""

    def __init__(self, kinds: Kinds) -> None:
        self._requests = kinds.counter(
            "ser_requests_total",
            description="HTTP requests by route, status, and problem code (ok when there is none).",
            tag_keys=("route", "status", "code"),
        )
        self._seconds = kinds.histogram(
            "ser_request_seconds",
            description="Seconds from the headers of a request to the end of its response, by route.",
            boundaries=_SECONDS,
            tag_keys=("route",),
        )
        self._recordings = kinds.counter(
            "ser_recordings_total",
            description="Recordings by model and problem code (ok when the recording could be used).",
            tag_keys=("model", "code"),
        )
        self._streams = kinds.gauge("ser_streams", description="Open live streams.", tag_keys=())

    def request(self, route: str, status: int, code: str, seconds: float) -> None:
        self._requests.inc(tags={"route": route, "status": str(status), "code": code})
        self._seconds.observe(seconds, tags={"route": route})

    def recording(self, model: str, code: str) -> None:
        self._recordings.inc(tags={"model": model, "code": code})

    def streams(self, count: int) -> None:
        self._streams.set(count, tags={})


class WorkMeter:
    """Metrics of a model worker; ``kinds`` as in ``RequestMeter``."""

    def __init__(self, kinds: Kinds) -> None:
        self._stages = kinds.histogram(
            "ser_stage_seconds",
            description="Seconds per recording and stage: decode (with features), wait (for the network), network.",
            boundaries=_SECONDS,
            tag_keys=("model", "stage"),
        )
        self._batch = kinds.histogram(
            "ser_batch_size",
            description="Windows in a batch of the network, one observation per recording.",
            boundaries=_BATCH,
            tag_keys=("model",),
        )
        self._waiting = kinds.gauge(
            "ser_waiting_recordings",
            description="Short recordings in progress: being decoded, in the network, or waiting for either.",
            tag_keys=("model",),
        )
        self._long = kinds.gauge(
            "ser_long_requests",
            description="Recordings analysed in windows, and explanations, in progress.",
            tag_keys=("model",),
        )

    def load(self, model: str, waiting: int, long: int) -> None:
        """Set the numbers of short and long requests in progress."""
        self._waiting.set(waiting, tags={"model": model})
        self._long.set(long, tags={"model": model})

    def work(self, model: str, timing: Timing) -> None:
        """Add the times of a recording."""
        tags = {"model": model}
        stages = {"decode": timing.decode_s, "wait": timing.wait_s, "network": timing.network_s}
        for stage, seconds in stages.items():
            self._stages.observe(seconds, tags=tags | {"stage": stage})
        if timing.batch:  # a recording that could not be used was in no batch
            self._batch.observe(timing.batch, tags=tags)
