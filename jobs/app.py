"""Runs the web page and the service until Ctrl-C; a service that is already running on the port is used.

The page opens at once and counts the seconds until the service, which runs without Ray, is ready. Both listen on this
machine only.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from jobs._common import EXIT_DONE, EXIT_OURS, Parser, check_free, command, parser_of, say
from jobs._terminal import Terminal
from pipeline.storage.errors import SerError

PAGE = Path(__file__).resolve().parents[1] / "app.py"
HOST = "127.0.0.1"
SINCE_VARIABLE = "SER_API_SINCE"  # when the service was started, see app_pages.own_service
_LOOK_S = 0.5
_STOP_S = 60.0


def build_parser() -> Parser:
    """The options of this job."""
    parser = parser_of("app", __doc__, "--port 8600")
    parser.add_argument("--port", type=int, default=8501, help="port of the page (default 8501)")
    parser.add_argument("--service_port", type=int, default=8000, help="port of the service (default 8000)")
    parser.add_argument("--metrics_port", type=int, default=8080, help="port of the service's metrics (default 8080)")
    parser.add_argument(
        "--bundles", default="", metavar="A,B", help="model bundles that the service loads (default: the shipped one)"
    )
    return parser


def job(arguments: argparse.Namespace) -> int:
    """Start both, wait until a signal comes or one of them ends, stop both."""
    from serve.auth import key_from_environment
    from serve.client import Client

    if not PAGE.is_file():
        raise SerError(f"the page is missing: {PAGE}; start it in the project's folder, with python -m jobs.app")
    check_free(HOST, arguments.port, "choose another --port")
    url = f"http://{HOST}:{arguments.service_port}"
    ended, terminal = threading.Event(), Terminal()
    for number in filter(None, (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None))):
        signal.signal(number, lambda *_: ended.set())
    with ExitStack() as started, Client(url, key_from_environment()) as client:
        processes = []
        if client.live():
            say(f"a service is already running at {url}; the page uses it")
        else:
            check_free(HOST, arguments.service_port, "choose another --service_port")
            check_free(HOST, arguments.metrics_port, "choose another --metrics_port")
            processes.append(
                started.enter_context(_running(service_command(arguments), service_environment(os.environ)))
            )
        environment = {**os.environ, "SER_API_URL": url, SINCE_VARIABLE: str(time.time())}
        page = started.enter_context(_running(page_command(arguments.port), environment))
        processes.append(page)
        say(f"page: http://localhost:{arguments.port} (Ctrl-C stops)")
        while not ended.wait(_LOOK_S):
            if any(process.poll() is not None for process in processes):
                say("error: the page or the service has ended; its messages are above")
                return EXIT_OURS
        terminal.left()  # discard the output if the terminal is closed
        say("stopping")
    return EXIT_DONE


def service_command(arguments: argparse.Namespace) -> list[str]:
    """The command that starts the service."""
    ports = ["--port", str(arguments.service_port), "--metrics_port", str(arguments.metrics_port)]
    bundles = ["--bundles", arguments.bundles] if arguments.bundles else []
    return [sys.executable, "-m", "jobs.serve", "--engine", "local", *ports, *bundles]


def page_command(port: int) -> list[str]:
    """The command that starts the page."""
    return [sys.executable, "-m", "streamlit", "run", str(PAGE), "--server.port", str(port)]


def service_environment(environment: Mapping[str, str], platform: str = sys.platform) -> dict[str, str]:
    """The environment of the service.

    On Windows, PyTorch and scikit-learn may each load their own copy of OpenMP, and the second one ends the process
    with "OMP: Error #15". ``KMP_DUPLICATE_LIB_OK`` allows both; a value that the user has set is kept.
    """
    extra = {"KMP_DUPLICATE_LIB_OK": "TRUE"} if platform == "win32" else {}
    return {**extra, **environment}


@contextmanager
def _running(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in its own session, so that Ctrl-C does not reach it; at the end it gets SIGTERM from here."""
    process = subprocess.Popen(
        command, cwd=PAGE.parent, env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


main = command(job, build_parser)


if __name__ == "__main__":
    raise SystemExit(main())
