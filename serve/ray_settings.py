"""Environment variables that a Ray which is to run the service should be started with; without them it is slower.

``jobs.serve`` sets them; on a cluster they belong into the environment of every node, and of what deploys
(``docs/serving.md``).
"""

from __future__ import annotations

import os

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from serve.access import Access
from serve.body_limit import BodyLimit
from serve.doors import Doorkeeper
from serve.proxy import Admission, Identify
from serve.settings import APP_NAME, MIB, Settings, key_digest_from_environment
from serve.short_way import ShortWay

_SETTINGS, _KEY_DIGEST = "SER_PROXY_SETTINGS", "SER_PROXY_KEY_DIGEST"
IN_PROXY = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
MESSAGE_BYTES = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"  # of a call by gRPC; Ray's own is 4 MiB
_LONGEST_ANSWER_MIB = 64  # 32 recordings of 1,800 windows each, as JSON, are 30
VARIABLES = {
    # recordings of this size travel with the call, not through the object store: 6 ms of CPU less a request
    "RAY_max_direct_call_object_size": str(8 * MIB),
    # calls between proxy, ingress and workers go by gRPC instead of as actor tasks: 8 ms of CPU less a request
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # one event loop a process instead of three: fewer hand-overs between threads
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # on a busy machine a proxy takes longer than Serve's 5 s to import what it does, and would be killed for that
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "50",
    IN_PROXY: "serve.ray_settings.in_proxy",
}


def prepare(settings: Settings) -> None:
    """Set the variables, for the Ray that this process is about to start; what is set already stays."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault(MESSAGE_BYTES, longest_message(settings))
    os.environ[_SETTINGS] = settings.model_dump_json()
    os.environ[_KEY_DIGEST] = key_digest_from_environment() or ""


def longest_message(settings: Settings) -> str:
    """Value of `MESSAGE_BYTES`: all that requests may hold, and the longest answer."""
    return str(round((settings.max_held_mib + _LONGEST_ANSWER_MIB) * MIB))


def in_proxy() -> list[Middleware]:
    """What Ray Serve's proxy puts around itself, the outermost last."""
    from serve import offer  # imports Ray, which runs already where this is called
    from serve.metrics import RequestMeter

    meter = RequestMeter()
    settings = Settings.model_validate_json(os.environ.get(_SETTINGS, "{}"))
    short_way = Middleware(ShortWay, ask=offer.asking(APP_NAME), make=lambda found: found.application(meter))
    doors = [short_way, Middleware(Admission, room=settings.models * settings.room), limits_of(settings)]
    if digest := os.environ.get(_KEY_DIGEST):
        doors.append(Middleware(Doorkeeper, digest=digest))
    return [*doors, Middleware(Access, meter=meter, refusals=True), *cors_of(settings), Middleware(Identify)]


def cors_of(settings: Settings) -> list[Middleware]:
    """What lets pages of the origins in ``settings`` read answers, refusals too, as a middleware; none by default."""
    if not settings.cors_origins:
        return []
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(settings.cors_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
        expose_headers=["X-Request-ID", "Retry-After"],
    )
    return [cors]


def limits_of(settings: Settings) -> Middleware:
    """The body limit of ``settings`` as a middleware."""
    return Middleware(
        BodyLimit,
        max_bytes=round(settings.max_body_mib * MIB),
        max_held_bytes=round(settings.max_held_mib * MIB),
        timeout_s=settings.body_timeout_s,
    )
