"""The service of a page that was told of none: started by it on this machine, on a free port; it ends with the page.

It is ``jobs.serve --engine local`` in a process of its own, so that the page loads no model. Where a service answers at
the usual address already, that one is used.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

DEFAULT_URL = "http://127.0.0.1:8000"  # as serve.client has it
SINCE_VARIABLE = "SER_API_SINCE"
"""When the service at ``SER_API_URL`` was started (``time.time``), by whoever started both."""
STARTS_WITHIN_S = 180.0  # the first time it also exports its network: half a minute on a busy machine
_ROOT = Path(__file__).resolve().parents[1]
_LOCK = threading.Lock()
_found: OwnService | None = None


class OwnService:
    """Where the service is; it is started by the first ``OwnService`` of a page.

    Attributes:
        url: its address.
        since_s: when it was started (``time.time``); NaN of one that answered already.
    """

    def __init__(self) -> None:
        self.url, self.since_s = DEFAULT_URL, float("nan")
        self._process: subprocess.Popen[bytes] | None = None
        if not _answers(DEFAULT_URL):
            self.start()

    def start(self) -> None:
        """Start it, again where it has ended."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["--engine", "local", "--port", str(port), "--metrics_port", "0", "--stop_with_stdin"]
        more = {"KMP_DUPLICATE_LIB_OK": "TRUE"} if sys.platform == "win32" else {}  # as jobs.app tells
        self.url, self.since_s = f"http://127.0.0.1:{port}", time.time()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jobs.serve", *words],
            cwd=_ROOT,
            env={**more, **os.environ},
            stdin=subprocess.PIPE,  # which ends with this process, however that ends
            start_new_session=True,
        )

    @property
    def ended(self) -> bool:
        """Whether it was started, and is there no more."""
        return self._process is not None and self._process.poll() is not None


def _answers(url: str) -> bool:
    host, _, port = url.removeprefix("http://").partition(":")
    try:
        socket.create_connection((host, int(port)), 1.0).close()
    except OSError:
        return False
    from serve.client import Client  # reading it takes long: only where something listens

    with Client(url) as client:
        return client.live()


def own() -> OwnService:
    """The page's service, started when it is first asked for."""
    global _found
    with _LOCK:
        _found = _found or OwnService()
        return _found


def configured() -> str | None:
    """The address that the environment names."""
    return (os.environ.get("SER_API_URL") or "").rstrip("/") or None


def starting_for_s() -> float | None:
    """For how long the service has been starting; None where nobody knows that it is."""
    try:
        since_s = float(os.environ.get(SINCE_VARIABLE, "nan")) if configured() else own().since_s
    except ValueError:
        return None
    passed_s = time.time() - since_s
    return passed_s if 0 <= passed_s < STARTS_WITHIN_S else None
