"""One structured log line and one set of metrics a request; and the last defence: a mistake of ours is a problem too.

The line is one JSON object: id, method, route, status, problem code, milliseconds, bytes, and where the time went. No
file names, no addresses, nothing of what was said.
"""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Protocol

from starlette.requests import ClientDisconnect

from serve.problems import ServiceError, answer
from serve.request_scope import notes, request_id

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("ray.serve.ser")  # below Ray Serve's logger, whose file and format it shares
_NO_ROUTE = "unmatched"
UPLOADS = {"/v1/predict", "/v1/explain", "/v1/audio-classification"}  # known also where no router has seen them


class Meter(Protocol):
    """Where figures go."""

    def request(self, route: str, status: int, code: str, seconds: float) -> None:
        """Count a request; ``code`` is ``ok`` or that of its problem."""
        ...

    def recording(self, model: str, code: str) -> None:
        """Count a recording; ``code`` is ``ok`` or that of its problem."""
        ...


class Access:
    """The middleware, to be the outermost one.

    Args:
        refusals: tell only of requests refused here, before Ray Serve's proxy; the ingress tells of the others.
    """

    def __init__(self, app: ASGIApp, *, meter: Meter, refusals: bool = False) -> None:
        self.app, self.meter, self._refusals = app, meter, refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, measure it, write its line."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started_s = time.perf_counter()
        try:
            await self.app(scope, receive, watched)
        except ClientDisconnect:
            logger.debug("request %s: its client has gone", request_id(scope))
        except Exception:
            logger.exception("request %s met a mistake of ours", request_id(scope))
            if not status:
                error = ServiceError("internal_error", "this request met a mistake of ours; report it with its id")
                await answer(error, scope)(scope, receive, watched)
        finally:
            self._tell(scope, status, time.perf_counter() - started_s)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        known = notes(scope)
        if self._refusals and "code" not in known:
            return
        unrouted = scope["path"] if scope["path"] in UPLOADS else _NO_ROUTE
        route = str(getattr(scope.get("route"), "path", unrouted))
        code = known.pop("code", "ok" if status and status < 400 else "disconnected" if not status else "other")
        self.meter.request(route, status, code, seconds)
        line = {"event": "request", "id": request_id(scope), "method": scope["method"], "route": route}
        line |= {"status": status, "code": code, "ms": round(seconds * 1e3, 1), **known}
        logger.info(json.dumps(line, ensure_ascii=True))
