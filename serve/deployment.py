"""The service on Ray Serve: an ingress process for HTTP, and worker processes for each model.

    serve run serve.deployment:build            # settings follow: threads=2 bundles=runs/first
    serve deploy serve/config.yaml
    python -m jobs.serve                        # the same, with checks before anything starts

The ingress reads requests and writes responses. Where it can, Serve's proxy does this itself for uploads, see
``ray_settings.ShortWay``. Recordings go to the workers as bytes, so a decoder that crashes ends a worker, not the
ingress. The recordings in progress there are then sent to another worker, which decodes each in its own process. The
workers' queues are bounded; a full queue gives 429 with Retry-After. New weights in ``user_config`` are loaded beside
the old ones, and replace them between two requests.
"""

# No "from __future__ import annotations" here: Ray Serve reads the annotated class of build's argument.

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import ray
from click import ClickException
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from ray.util import get_node_ip_address

from pipeline.cluster.ray_internals import OwnPort
from pipeline.cluster.runtime import joins_cluster
from pipeline.models.bundle import Bundle
from pipeline.storage.errors import SerError
from serve.auth import key_digest_from_environment
from serve.metrics import RequestMeter, WorkMeter, on_ray
from serve.problems import ServiceError, overloaded, retry_later
from serve.routes import create_app
from serve.service import Card, Explained, Meter, PredictRequest, Service, WorkerResult
from serve.settings import APP_NAME, Settings
from serve.worker import Worker, open_bundles, open_worker

logger = logging.getLogger("ray.serve.ser")
_INGRESS_ONGOING = 1000  # each slow upload counts as an ongoing request
_DRAIN_S = 30.0
_READY_WITHIN_S = 2.0
# Seconds between attempts to reach a full worker. With Ray's 0.5 s all waiting requests may sleep while the worker is
# idle, which added up to 2 s to requests at twice the capacity.
_ROUTING = RequestRouterConfig.model_validate({"initial_backoff_s": 0.01, "max_backoff_s": 0.02})
_ALL = 100  # percent: during an update, all old processes answer until the new ones are ready


class ModelWorker:
    """A worker process of one model."""

    def __init__(self, settings: Settings) -> None:
        self._port = OwnPort()
        self._port.install()
        self._settings = settings
        self._meter = WorkMeter(on_ray())
        self._worker: Worker | None = None

    async def reconfigure(self, config: Mapping[str, str]) -> None:
        """Load the bundle that ``config`` names; the old model answers until the new one is loaded and warmed up.

        A bundle that cannot be used is an error at start. Later it is only logged, and the old model stays in use.
        """
        try:
            worker = await asyncio.to_thread(open_worker, config["bundle"], self._settings, self._meter)
        except SerError as error:
            if self._worker is None:
                raise
            logger.error("the new weights cannot be used, the old ones stay in use: %s", error)
            return
        self._worker = worker
        card = worker.card()
        logger.info("model %s, version %s, is loaded", card.name, card.version)

    async def predict(self, data: bytes, request: PredictRequest, isolated: bool = False) -> WorkerResult:
        return await self._now.predict(data, request, isolated=isolated)

    async def explain(self, data: bytes, request: PredictRequest, isolated: bool = False) -> Explained:
        return await self._now.explain(data, request, isolated=isolated)

    async def card(self) -> Card:
        return self._now.card()

    def check_health(self) -> None:
        """Raise when this process should be replaced."""
        self._port.check()
        self._now.check()

    @property
    def _now(self) -> Worker:
        assert self._worker is not None, "reconfigure comes before the first request"
        return self._worker


class RemoteModels:
    """``service.Models`` that calls workers through Ray Serve's handles; ``room`` is that of all workers.

    A request whose worker dies is sent to another worker, once. If the workers are full or none can answer, the call
    raises a ServiceError.
    """

    def __init__(self, handles: Mapping[str, DeploymentHandle[Any]], room: int) -> None:
        self._handles, self._room = dict(handles), room
        self._open = dict.fromkeys(handles, 0)
        self._cards: dict[str, Card] = {}  # the last ones received

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._handles)

    def check_room(self, model: str) -> None:
        if self._open[model] >= self._room:
            raise overloaded()

    async def predict(self, model: str, data: bytes, request: PredictRequest) -> WorkerResult:
        return cast(WorkerResult, await self._twice(model, "predict", data, request))

    async def explain(self, model: str, data: bytes, request: PredictRequest) -> Explained:
        return cast(Explained, await self._twice(model, "explain", data, request))

    async def card(self, model: str) -> Card:
        """The description of a model; the last one received, where its workers are too busy to answer."""
        if model not in self._cards:
            return await self._fresh_card(model)
        try:
            return await asyncio.wait_for(self._fresh_card(model), _READY_WITHIN_S)
        except TimeoutError:  # busy
            return self._cards[model]
        except ServiceError as error:
            if error.code != "overloaded":
                raise
            return self._cards[model]

    async def _fresh_card(self, model: str) -> Card:
        card: Card = await self._once(model, "card")
        self._cards[model] = card
        return card

    async def ready(self, model: str) -> bool:
        """Whether a worker answers; a full one counts as ready."""
        try:
            await asyncio.wait_for(self._fresh_card(model), _READY_WITHIN_S)
        except TimeoutError:  # busy or stuck: Serve's health checks decide
            return await _running(self._handles[model])
        except ServiceError as error:
            return error.code == "overloaded"
        return True

    async def _twice(self, model: str, method: str, data: bytes, request: PredictRequest) -> Any:
        """Call a worker; if it dies, call another one, which decodes the recording in a separate process."""
        self._open[model] += 1
        try:
            return await self._once(model, method, data, request)
        except _WorkerDied:
            logger.warning("a worker of %s died during a request; the request is sent to another one", model)
            return await self._once(model, method, data, request, True)
        finally:
            self._open[model] -= 1

    async def _once(self, model: str, method: str, *arguments: object) -> Any:
        try:
            return await getattr(self._handles[model], method).remote(*arguments)
        except BackPressureError:
            raise overloaded() from None
        except DeploymentUnavailableError:
            detail = f"no worker of {model} can answer; send the request again in a moment"
            raise retry_later("unavailable", detail, after_s=2) from None
        except RayActorError as error:
            raise _WorkerDied from error


async def _running(handle: DeploymentHandle[Any]) -> bool:
    """Whether Serve reports a running worker of a model."""
    application = (await asyncio.to_thread(ray_serve.status)).applications.get(handle.app_name)
    deployment = application and application.deployments.get(handle.deployment_name)
    return bool(deployment and any(count and state == "RUNNING" for state, count in deployment.replica_states.items()))


class _WorkerDied(ServiceError):
    """The worker process died during a request."""

    def __init__(self) -> None:
        super().__init__("unavailable", "the model's worker has just stopped; send the request again in a moment")
        self.headers["Retry-After"] = "2"


@dataclass(frozen=True)
class Offer:
    """What one ingress process serves; Serve's proxy builds the same application from it.

    Every process has another ``revision``; ``digest``: the API key's hash; ``window_s``: the longest input window.
    """

    revision: str
    settings: Settings
    digest: str | None
    window_s: float
    handles: Mapping[str, DeploymentHandle[Any]]

    def application(self, meter: Meter, closed: Callable[[], bool] | None = None, *, relayed: bool = False) -> FastAPI:
        """The HTTP application, see ``routes.create_app``."""
        models = RemoteModels(self.handles, self.settings.room)
        service = Service(models, self.settings, meter, self.window_s, self.digest)
        return create_app(service, closed, relayed=relayed)


def asking(app_name: str) -> Callable[[], Awaitable[Offer]]:
    """A function that gets the offer of an ingress process of application ``app_name``; it raises if there is none."""
    ingress: DeploymentHandle[Any] | None = None

    async def ask() -> Offer:
        nonlocal ingress
        if ingress is None:
            ingress = await asyncio.to_thread(ray_serve.get_app_handle, app_name)
        offer: Offer = await ingress.offer.remote()
        return offer

    return ask


class Ingress:
    """A process that answers HTTP requests; Ray Serve calls ``__serve_build_asgi_app__`` for its application."""

    def __init__(
        self, settings: Settings, digest: str | None, window_s: float, handles: Mapping[str, DeploymentHandle[Any]]
    ) -> None:
        self._port = OwnPort()
        self._port.install()
        self._offer = Offer(uuid.uuid4().hex, settings, digest, window_s, handles)

    def check_health(self) -> None:
        """Raise when this process should be replaced; Ray Serve also calls it once before the first request."""
        self._port.check()

    def __serve_build_asgi_app__(self) -> Any:
        """The ASGI application."""
        return self._offer.application(RequestMeter(on_ray()), relayed=True)

    async def offer(self) -> Offer:
        """What this process serves, for ``ray_settings.ShortWay`` in the proxy."""
        return self._offer


class StartError(SerError, ClickException):
    """A SerError that Ray's command line also prints as one line."""


def build(args: Settings) -> ray_serve.Application:
    """The application for Ray Serve with the settings ``args``. Opens all bundles, and reads ``SER_API_KEY``.

    Raises:
        StartError: a bundle is missing or cannot be used, two have the same name, or the key is not valid.
    """
    try:
        return _application(args, key_digest_from_environment())
    except SerError as error:
        raise StartError(str(error)) from error


def _application(args: Settings, digest: str | None) -> ray_serve.Application:
    bundles = open_bundles(args.bundles)
    models = {bundle.name: _model(number, bundle, args) for number, bundle in enumerate(bundles)}
    ingress = ray_serve.deployment(
        name="Ingress",
        max_ongoing_requests=_INGRESS_ONGOING,
        max_surge_percent=_ALL,
        graceful_shutdown_timeout_s=args.deadline_s,
        ray_actor_options={"num_cpus": 0},
        logging_config=LoggingConfig(enable_access_log=False),
    )(ray_serve.ingress()(Ingress))
    window_s = max(bundle.features.window_s for bundle in bundles)
    return ingress.bind(args, digest, window_s, models)


def _model(number: int, bundle: Bundle, args: Settings) -> ray_serve.Application:
    size: dict[str, Any] = {"num_replicas": args.replicas}
    if args.max_replicas > args.replicas:
        scaling = {"min_replicas": args.replicas, "max_replicas": args.max_replicas}
        size = {"autoscaling_config": scaling | {"target_ongoing_requests": max(1, args.max_ongoing // 2)}}
    deployment = ray_serve.deployment(
        name=f"Model{number}",
        user_config={"bundle": str(bundle.folder.resolve()), "weights_sha256": bundle.weights_sha256},
        max_ongoing_requests=args.max_ongoing,
        max_queued_requests=args.room,  # with gRPC, a call counts as queued until it is answered
        request_router_config=_ROUTING,
        max_surge_percent=_ALL,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=_DRAIN_S,
        ray_actor_options={"num_cpus": args.threads},
        logging_config=LoggingConfig(enable_access_log=False),
        **size,
    )(ModelWorker)
    return deployment.bind(args)


def http_options(host: str, port: int, settings: Settings) -> dict[str, Any]:
    """Ray Serve's HTTP options; its timeout is longer than the service's, so that callers get the service's error."""
    patience_s = settings.body_timeout_s + settings.deadline_s + 15
    return {"host": host, "port": port, "request_timeout_s": patience_s, "keep_alive_timeout_s": 65}


def run(settings: Settings, host: str, port: int, digest: str | None = None) -> None:
    """Start Serve on the Ray that this process is connected to, and return once the service answers.

    ``digest`` is the hash of the API key; without one the service answers on loopback addresses only.

    Raises:
        SerError: a bundle cannot be used, or a Ray on this machine only has fewer CPUs than the service needs.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # only in this process; replicas set their own level
    application = _application(settings, digest)
    if not joins_cluster():  # a cluster may grow
        settings.check_cpus(ray.cluster_resources().get("CPU", 0))
    ray_serve.start(proxy_location="HeadOnly", http_options=http_options(host, port, settings))
    ray_serve.run(application, name=APP_NAME, route_prefix="/")


def metrics_address() -> str:
    """The URL of the metrics that Ray exports on this machine. Raise ConnectionError where no node runs here."""
    here = get_node_ip_address()
    ports = [node["MetricsExportPort"] for node in ray.nodes() if node["NodeManagerAddress"] == here and node["Alive"]]
    if not ports:
        raise ConnectionError(f"no node of Ray at {here}")
    return f"http://{here}:{ports[0]}/metrics"


def roll_out(settings: Settings, digest: str | None = None) -> None:
    """Replace the running application by one with ``settings``, for example new weights; return when that is done.

    Raises:
        SerError: a bundle cannot be used, or a Ray on this machine only has no CPUs free for the new processes. The
            running application stays.
    """
    free = ray.available_resources().get("CPU", 0)
    if settings.threads > free and not joins_cluster():
        raise SerError(
            f"a new model worker needs {settings.threads} CPUs beside the old ones, and {free:g} are free; "
            "start the service with fewer --threads, or stop and start it"
        )
    ray_serve.run(_application(settings, digest), name=APP_NAME, route_prefix="/")


def stop() -> None:
    """Finish the requests in progress, then stop what ``run`` started."""
    with suppress(RayServeException, TimeoutError):  # nothing was started, or a request takes too long
        ray_serve.delete(APP_NAME)  # drains; Serve's shutdown alone would end the proxy and its connections first
    ray_serve.shutdown()
