"""Ray Serve applications that do nothing: one deployment that reads the body, or two, where the second gets the body.

They measure the cost of Serve itself: proxy, one or two calls between processes, FastAPI.
"""

from typing import Any

from fastapi import FastAPI, Request
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

_OPTIONS: dict[str, Any] = {"max_ongoing_requests": 1000, "logging_config": LoggingConfig(enable_access_log=False)}


class Nothing:
    """The second deployment."""

    async def do(self, data: bytes) -> int:
        return len(data)


class Door:
    """The first deployment, which answers HTTP."""

    def __init__(self, inner: DeploymentHandle[Any] | None = None) -> None:
        self.inner = inner

    def __serve_build_asgi_app__(self) -> FastAPI:
        app, inner = FastAPI(), self.inner

        @app.post("/")
        async def take(request: Request) -> int:
            body = await request.body()
            return len(body) if inner is None else await inner.do.remote(body)

        return app


def run(host: str, port: int, *, two_stages: bool) -> None:
    ray_serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    inner = [ray_serve.deployment(**_OPTIONS)(Nothing).bind()] if two_stages else []
    door = ray_serve.deployment(ray_actor_options={"num_cpus": 0}, **_OPTIONS)(ray_serve.ingress()(Door))
    ray_serve.run(door.bind(*inner), name="no_op", route_prefix="/")


def stop() -> None:
    ray_serve.shutdown()
