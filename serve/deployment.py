"""The service on Ray Serve: an ingress that speaks HTTP, and workers for each model, one process each.

    serve run serve.deployment:build            # and, after a blank, Settings: threads=2 bundles=runs/first
    serve deploy serve/config.yaml
    python -m jobs.serve                        # the same, with checks before anything starts

The ingress reads requests and writes answers (Serve's proxy does so itself for uploads where it can, see
``ray_settings.ShortWay``); recordings travel on as bytes, so that a decoder that crashes takes a
worker down, not the ingress: what was in work there is asked again elsewhere, each recording then decoded in a process
of its own. Queues are bounded at the workers; a full one becomes 429 with Retry-After. New weights in ``user_config``
are loaded beside the old ones and take over between two requests.
"""

# Without "from __future__ import annotations": Ray Serve looks at the class of build's argument to make it typed.

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

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
_INGRESS_ONGOING = 1000  # slow uploads hold a place each
_DRAIN_S = 30.0
_READY_WITHIN_S = 2.0
# how long what waits for a full worker sleeps before it tries again; with Ray's 0.5 s all of it may sleep while the
# worker has nothing to do, which cost requests up to 2 s at twice the capacity
_ROUTING = RequestRouterConfig.model_validate({"initial_backoff_s": 0.01, "max_backoff_s": 0.02})
_ALL = 100  # percent: in an update, old processes answer until the new ones are ready


class ModelWorker:
    """One process of a model."""

    def __init__(self, settings: Settings) -> None:
        self._port = OwnPort()
        self._port.install()
        self._settings = settings
        self._meter = WorkMeter(on_ray())
        self._worker: Worker | None = None

    async def reconfigure(self, config: Mapping[str, str]) -> None:
        """Load the weights that ``config`` names; requests go on with the old ones until the new ones are warm.

        Weights that cannot be used are an error at start; later they are told in the log, and the old ones stay.
        """
        try:
            worker = await asyncio.to_thread(open_worker, config["bundle"], self._settings, self._meter)
        except SerError as error:
            if self._worker is None:
                raise
            logger.error("the new weights cannot be used, the old ones stay: %s", error)
            return
        self._worker = worker
        card = worker.card()
        logger.info("model %s, version %s, is loaded", card.name, card.version)

    async def predict(self, data: bytes, request: PredictRequest, isolated: bool = False) -> WorkerResult:
        """What a recording sounds like."""
        return await self._now.predict(data, request, isolated=isolated)

    async def explain(self, data: bytes, request: PredictRequest, isolated: bool = False) -> Explained:
        """Why."""
        return await self._now.explain(data, request, isolated=isolated)

    async def card(self) -> Card:
        """What is known of the model."""
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
    """``service.Models`` behind deployment handles: what happens when a worker is full, dies, or is gone.

    Args:
        handles: name -> workers of the model.
        room: recordings that the workers of one model can hold, in work and waiting.
    """

    def __init__(self, handles: Mapping[str, DeploymentHandle[Any]], room: int) -> None:
        self._handles, self._room = dict(handles), room
        self._open = dict.fromkeys(handles, 0)
        self._cards: dict[str, Card] = {}  # as they were last told

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(self._handles)

    def check_room(self, model: str) -> None:
        """Raise 429 when the workers are known to be full."""
        if self._open[model] >= self._room:
            raise overloaded()

    async def predict(self, model: str, data: bytes, request: PredictRequest) -> WorkerResult:
        """What one recording sounds like."""
        result: WorkerResult = await self._twice(model, "predict", data, request)
        return result

    async def explain(self, model: str, data: bytes, request: PredictRequest) -> Explained:
        """Why."""
        explained: Explained = await self._twice(model, "explain", data, request)
        return explained

    async def card(self, model: str) -> Card:
        """What is known of a model; what it told last, where its workers are too busy to tell."""
        if model not in self._cards:
            return await self._fresh_card(model)
        try:
            return await asyncio.wait_for(self._fresh_card(model), _READY_WITHIN_S)
        except TimeoutError:  # at work, perhaps on one recording
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
        except TimeoutError:  # at work, or hanging: Serve's health checks know
            return await _running(self._handles[model])
        except ServiceError as error:
            return error.code == "overloaded"
        return True

    async def _twice(self, model: str, method: str, data: bytes, request: PredictRequest) -> Any:
        """Ask; when the worker dies over it, ask another one, the recording then decoded in a process of its own."""
        self._open[model] += 1
        try:
            return await self._once(model, method, data, request)
        except _WorkerDied:
            logger.warning("a worker of %s died while it held a request; asking again", model)
            return await self._once(model, method, data, request, True)
        finally:
            self._open[model] -= 1

    async def _once(self, model: str, method: str, *arguments: object) -> Any:
        try:
            return await getattr(self._handles[model], method).remote(*arguments)
        except BackPressureError:
            raise overloaded() from None
        except DeploymentUnavailableError:
            raise _unavailable(model) from None
        except RayActorError as error:
            raise _WorkerDied from error


async def _running(handle: DeploymentHandle[Any]) -> bool:
    """Whether Serve knows a healthy worker of a model."""
    application = (await asyncio.to_thread(ray_serve.status)).applications.get(handle.app_name)
    deployment = application and application.deployments.get(handle.deployment_name)
    return bool(deployment and any(count and state == "RUNNING" for state, count in deployment.replica_states.items()))


class _WorkerDied(ServiceError):
    """The process that held a request has gone."""

    def __init__(self) -> None:
        super().__init__("unavailable", "the model's worker has just gone; send it again in a moment")
        self.headers["Retry-After"] = "2"


def _unavailable(model: str) -> ServiceError:
    return retry_later("unavailable", f"no worker of {model} can answer; send it again in a moment", after_s=2)


@dataclass(frozen=True)
class Offer:
    """What one ingress process serves.

    Attributes:
        revision: another one in every process.
        digest: hash of the API key, where one is needed.
        window_s: the longest window of all models.
        handles: name -> workers of the model.
    """

    revision: str
    settings: Settings
    digest: str | None
    window_s: float
    handles: Mapping[str, DeploymentHandle[Any]]

    def application(self, meter: Meter, closed: Callable[[], bool] | None = None, *, relayed: bool = False) -> FastAPI:
        """The HTTP interface to it, as of ``routes.create_app``."""
        models = RemoteModels(self.handles, self.settings.room)
        service = Service(models, self.settings, meter, self.window_s, self.digest)
        return create_app(service, closed, relayed=relayed)


def asking(app_name: str) -> Callable[[], Awaitable[Offer]]:
    """A function that asks an ingress process of the application ``app_name``; it raises while there is none."""
    ingress: DeploymentHandle[Any] | None = None

    async def ask() -> Offer:
        nonlocal ingress
        if ingress is None:
            ingress = await asyncio.to_thread(ray_serve.get_app_handle, app_name)
        offer: Offer = await ingress.offer.remote()
        return offer

    return ask


class Ingress:
    """The process that speaks HTTP; Ray Serve asks it for the application."""

    def __init__(
        self, settings: Settings, digest: str | None, window_s: float, handles: Mapping[str, DeploymentHandle[Any]]
    ) -> None:
        self._port = OwnPort()
        self._port.install()
        self._offer = Offer(uuid.uuid4().hex, settings, digest, window_s, handles)

    def check_health(self) -> None:
        """Raise when this process should be replaced; Ray Serve asks once before the first request."""
        self._port.check()

    def __serve_build_asgi_app__(self) -> Any:
        """The application."""
        return self._offer.application(RequestMeter(on_ray()), relayed=True)

    async def offer(self) -> Offer:
        """What this process serves, for proxies that take the short way."""
        return self._offer


class StartError(SerError, ClickException):
    """A SerError that Ray's command line, too, tells in one line."""


def build(args: Settings) -> ray_serve.Application:
    """The application of ``args``; reads ``SER_API_KEY``. All bundles are opened first.

    Raises:
        StartError: a bundle that is missing or cannot be used, two of one name, or a key that can be none.
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
        max_queued_requests=args.room,  # by gRPC, a call counts as queued until it is answered
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
    """Ray Serve's HTTP options: its own deadline lies beyond ours, so that callers meet our answer."""
    patience_s = settings.body_timeout_s + settings.deadline_s + 15
    return {"host": host, "port": port, "request_timeout_s": patience_s, "keep_alive_timeout_s": 65}


def run(settings: Settings, host: str, port: int, digest: str | None = None) -> None:
    """Start Serve on the Ray that this process is connected to, and return once the service answers.

    ``digest`` is the hash of the API key; without one the service answers to loopback only.

    Raises:
        SerError: a bundle that cannot be used, or fewer CPUs than the service needs, on this machine.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process; the replicas keep their own
    application = _application(settings, digest)
    if not joins_cluster():  # a cluster may grow
        settings.check_cpus(ray.cluster_resources().get("CPU", 0))
    ray_serve.start(proxy_location="HeadOnly", http_options=http_options(host, port, settings))
    ray_serve.run(application, name=APP_NAME, route_prefix="/")


def metrics_address() -> str:
    """Where Ray exports the metrics of this machine's processes, in Prometheus' format.

    Raises:
        ConnectionError: it does not.
    """
    here = get_node_ip_address()
    ports = [node["MetricsExportPort"] for node in ray.nodes() if node["NodeManagerAddress"] == here and node["Alive"]]
    if not ports:
        raise ConnectionError(f"no node of Ray at {here}")
    return f"http://{here}:{ports[0]}/metrics"


def roll_out(settings: Settings, digest: str | None = None) -> None:
    """Replace what runs by ``settings`` (new weights, say), process by process, and return when that is done.

    Raises:
        SerError: a bundle that cannot be used, or no CPUs, on this machine, for new processes beside the old ones;
            what runs goes on.
    """
    free = ray.available_resources().get("CPU", 0)
    if settings.threads > free and not joins_cluster():
        raise SerError(
            f"a new model worker needs {settings.threads} CPUs beside the old ones, and {free:g} are free; "
            "start the service with fewer --threads, or stop and start it"
        )
    ray_serve.run(_application(settings, digest), name=APP_NAME, route_prefix="/")


def stop() -> None:
    """Have what is in work answered, then stop what ``run`` started."""
    with suppress(RayServeException, TimeoutError):  # nothing was started; or an answer takes too long
        ray_serve.delete(APP_NAME)  # drains; Serve's shutdown would end the proxy first, and all connections with it
    ray_serve.shutdown()
