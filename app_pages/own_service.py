"""The page's own service, where no address is configured: on this machine, on a free port; it ends with the page.

It is ``jobs.serve --engine local`` in a separate process, so that the page loads no model. If a service already answers
at the default address, the page uses that one.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

DEFAULT_URL = "http://127.0.0.1:8000"  # as in serve.client
SINCE_VARIABLE = "SER_API_SINCE"
"""Variable with the start time (``time.time``) of the service at ``SER_API_URL``; set by the job that started both."""
STARTS_WITHIN_S = 180.0  # the first start also exports the network: half a minute on a busy machine
_ROOT = Path(__file__).resolve().parents[1]
_LOCK = threading.Lock()
_found: OwnService | None = None


class OwnService:
    """The service that the page uses; starts one, unless one answers at the default address ``url``.

    ``since_s`` is its start time (``time.time``); NaN for a service that was already running.
    """

    def __init__(self) -> None:
        self.url, self.since_s = DEFAULT_URL, float("nan")
        self._process: subprocess.Popen[bytes] | None = None
        if not _answers(DEFAULT_URL):
            self.start()

    def start(self) -> None:
        """Start the service, also again after it has ended."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["--engine", "local", "--port", str(port), "--metrics_port", "0", "--stop_with_stdin"]
        more = {"KMP_DUPLICATE_LIB_OK": "TRUE"} if sys.platform == "win32" else {}  # see jobs.app
        self.url, self.since_s = f"http://127.0.0.1:{port}", time.time()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jobs.serve", *words],
            cwd=_ROOT,
            env={**more, **os.environ},
            stdin=subprocess.PIPE,  # closed when this process ends, for whatever reason
            start_new_session=True,
        )

    @property
    def ended(self) -> bool:
        """Whether the service was started here and has ended."""
        return self._process is not None and self._process.poll() is not None


def _answers(url: str) -> bool:
    host, _, port = url.removeprefix("http://").partition(":")
    try:
        socket.create_connection((host, int(port)), 1.0).close()
    except OSError:
        return False
    from serve.client import Client  # a slow import: only where something listens

    with Client(url) as client:
        return client.live()


def own() -> OwnService:
    """The page's own service; the first call starts it."""
    global _found
    with _LOCK:
        _found = _found or OwnService()
        return _found


def configured() -> str | None:
    """The address in ``SER_API_URL``; None where it is not set."""
    return (os.environ.get("SER_API_URL") or "").rstrip("/") or None


def starting_for_s() -> float | None:
    """Seconds since the service was started; None if unknown, or longer ago than ``STARTS_WITHIN_S``."""
    try:
        since_s = float(os.environ.get(SINCE_VARIABLE, "nan")) if configured() else own().since_s
    except ValueError:
        return None
    passed_s = time.time() - since_s
    return passed_s if 0 <= passed_s < STARTS_WITHIN_S else None
