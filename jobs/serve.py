"""Runs the HTTP service on this machine until Ctrl-C: on Ray Serve, or in this process, which starts in seconds.

Bundles, address and key are checked before anything starts.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from queue import SimpleQueue
from typing import TYPE_CHECKING, NoReturn
from urllib.request import urlopen

from jobs._common import EXIT_DONE, Parser, check_free, command, parser_of, say
from jobs._terminal import Terminal
from pipeline.cluster.runtime import joins_cluster, start_ray, stop_ray
from pipeline.storage.errors import SerError
from pipeline.storage.files import usable_cpus
from serve.schema import API_KEY_VARIABLE
from serve.settings import Settings

if TYPE_CHECKING:
    from pipeline.models.bundle import Bundle

_LISTS = {"bundles", "cors_origins"}
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_LABELS = {"route", "status", "code", "model", "stage", "le"}


def build_parser() -> Parser:
    """The options of this job: address, metrics, and all of ``serve.settings.Settings``."""
    parser = parser_of("serve", __doc__, "--bundles runs/first --max_replicas 2")
    parser.add_argument(
        "--engine",
        choices=("ray", "local"),
        default="ray",
        help="ray: run on Ray Serve; local: run in this process (default ray)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help=f"address to listen on (default 127.0.0.1); any other than loopback needs a key in {API_KEY_VARIABLE}",
    )
    parser.add_argument("--port", type=int, default=8000, help="port of the service (default 8000)")
    parser.add_argument("--metrics_port", type=int, default=8080, help="port of the Prometheus metrics (default 8080)")
    parser.add_argument(
        "--stop_with_stdin", action="store_true", help="stop when standard input is closed; only with --engine local"
    )
    for name, field in Settings.model_fields.items():
        kind = {"type": str, "metavar": "A,B"} if name in _LISTS else {"type": field.annotation}
        shown = "" if name in _LISTS else f" (default {field.default})"
        parser.add_argument(f"--{name}", default=field.default, help=f"{field.description}{shown}", **kind)
    return parser


def job(arguments: argparse.Namespace) -> int:
    """Check the settings, start the service, wait for a signal, stop it."""
    from serve.auth import is_loopback, key_digest_from_environment
    from serve.worker import open_bundles

    settings = _settings(arguments)
    digest = key_digest_from_environment()
    if not is_loopback(arguments.host) and digest is None:
        raise SerError(
            f"--host {arguments.host} can be reached from other machines; set a key in {API_KEY_VARIABLE}, or use "
            "127.0.0.1"
        )
    if arguments.engine == "local" and max(settings.replicas, settings.max_replicas) > 1:
        raise SerError("--engine local has one worker for each model; leave out --replicas and --max_replicas")
    if arguments.engine == "ray" and arguments.stop_with_stdin:
        raise SerError("--stop_with_stdin is for --engine local; stop Ray Serve with a signal")
    check_free(arguments.host, arguments.port, "choose another --port")
    bundles = open_bundles(settings.bundles)
    if arguments.engine == "local" or not joins_cluster():  # a cluster may grow
        settings.check_cpus(usable_cpus())
    metrics = _Metrics(arguments.metrics_port)
    try:
        if arguments.engine == "local":
            _here(arguments, settings, digest, bundles, metrics)
        else:
            _on_ray(arguments, settings, digest, metrics)
    except KeyboardInterrupt:
        say("stopping")
    finally:
        metrics.end()
    return EXIT_DONE


def _here(
    arguments: argparse.Namespace, settings: Settings, digest: str | None, bundles: Sequence[Bundle], metrics: _Metrics
) -> None:
    """Run the service in this process."""
    from serve.local import LocalService

    _take_signals(_interrupt, lambda: None)
    say("starting")
    os.environ.pop(API_KEY_VARIABLE, None)  # only its hash is needed
    service = LocalService(settings, digest)
    if arguments.stop_with_stdin:
        threading.Thread(target=_until_stdin_ends, args=(service.stop,), daemon=True).start()
    else:
        log = logging.getLogger("ray.serve.ser")  # a line for each request, as Ray Serve writes to its files
        log.setLevel(logging.INFO)
        log.addHandler(logging.StreamHandler())
    service.open(bundles)
    metrics.source = service.metrics
    _take_signals(service.stop, service.renew)
    service.run(arguments.host, arguments.port, lambda: _say_ready(arguments, metrics))
    say("stopped")


def _on_ray(arguments: argparse.Namespace, settings: Settings, digest: str | None, metrics: _Metrics) -> None:
    """Run the service on Ray Serve."""
    from serve.ray_settings import prepare

    prepare(settings)
    os.environ.pop(API_KEY_VARIABLE, None)  # Ray's processes need only its hash
    say("starting")
    start_ray()
    from serve import deployment  # imports Ray, whose environment start_ray has set
    from serve.ray_settings import refuse_new_work, tidy_up

    renewals: SimpleQueue[int] = SimpleQueue()
    try:
        _take_signals(_interrupt, lambda: renewals.put(1))
        deployment.run(settings, arguments.host, arguments.port, digest)
        metrics.source = lambda: fetched(deployment.metrics_address())
        _say_ready(arguments, metrics)
        while renewals.get():
            try:
                deployment.roll_out(settings, digest)
                say("rolled out")
            except SerError as error:
                say(f"error: {error}; the service keeps running with its earlier bundles")
    except KeyboardInterrupt:
        pass
    finally:
        _take_signals(lambda: None, lambda: None)  # nothing may interrupt the stopping
        say("stopping")
        refuse_new_work()
        with redirect_stdout(StringIO()):  # Ray reports the end of its controller as if it were a failure
            deployment.stop()
            stop_ray()
        tidy_up()


def _say_ready(arguments: argparse.Namespace, metrics: _Metrics) -> None:
    say(f"ready: http://{arguments.host}:{arguments.port} (/docs; Ctrl-C stops, SIGHUP opens the bundles again)")
    say(f"metrics: http://127.0.0.1:{metrics.server_port}/metrics")


def _until_stdin_ends(stop: Callable[[], None]) -> None:
    """Call ``stop`` when standard input is closed, which happens when the process that started this one ends."""
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    stop()


class _Metrics(ThreadingHTTPServer):
    """HTTP server of the metrics, in this process, so that its port is free as soon as the process ends.

    Ray exports about a megabyte of metrics on a port of its choice. ``/metrics`` gives the service's own metrics,
    summed over its processes; ``/metrics/all`` gives everything. Without Ray both are the same.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        check_free("127.0.0.1", port, "choose another --metrics_port")
        super().__init__(("127.0.0.1", port), _MetricsPage)
        self.source: Callable[[], str] | None = None  # returns the metrics, or raises OSError; None during the start
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def end(self) -> None:
        """Free the port."""
        self.shutdown()
        self.server_close()


class _MetricsPage(BaseHTTPRequestHandler):
    server: _Metrics

    def do_GET(self) -> None:
        """Answer one scrape."""
        status, text = HTTPStatus.NOT_FOUND, "use /metrics or /metrics/all\n"
        if self.path in ("/metrics", "/metrics/all"):
            try:
                if self.server.source is None:
                    raise ConnectionError("it is starting")
                text = self.server.source()
                status, text = HTTPStatus.OK, text if self.path.endswith("all") else own_metrics(text)
            except OSError:
                status, text = HTTPStatus.SERVICE_UNAVAILABLE, "no metrics available; try again later\n"
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def fetched(address: str) -> str:
    """The text at an HTTP address. Raises OSError."""
    with urlopen(address, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def own_metrics(text: str) -> str:
    """The service's own metrics of a Prometheus text, without Ray's labels, summed over the processes."""
    lines: dict[str, float | None] = {}
    for line in text.splitlines():
        name = line.split(maxsplit=3)[2] if line.startswith("# ") else line
        if not name.startswith("ray_ser_"):
            continue
        if line.startswith("# "):
            lines[line] = None
            continue
        series, _, value = line.rpartition(" ")
        kept = ",".join(f'{label}="{said}"' for label, said in _LABEL.findall(series) if label in _LABELS)
        series = series.partition("{")[0] + (f"{{{kept}}}" if kept else "")
        lines[series] = (lines.get(series) or 0.0) + float(value)
    return "".join(line + ("" if value is None else f" {value}") + "\n" for line, value in lines.items())


def _interrupt() -> NoReturn:
    """Interrupt the main thread: KeyboardInterrupt is the one exception that passes safely through Ray's C++ code."""
    raise KeyboardInterrupt


def _take_signals(stop: Callable[[], None], renew: Callable[[], None]) -> None:
    """Let SIGINT and SIGTERM call ``stop``, after which all signals are ignored, and SIGHUP call ``renew``.

    A SIGHUP because the terminal was closed calls ``stop`` too.
    """
    hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM, hang_up) if number]
    terminal = Terminal()

    def stopping(*_: object) -> None:
        for number in numbers:
            signal.signal(number, lambda *_: None)
        stop()

    def hung_up(*_: object) -> None:
        if terminal.left():
            stopping()
        else:
            renew()

    for number in numbers:
        signal.signal(number, hung_up if number == hang_up else stopping)


def _settings(arguments: argparse.Namespace) -> Settings:
    from pydantic import ValidationError

    try:
        return Settings(**{name: getattr(arguments, name) for name in Settings.model_fields})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise SerError(f"--{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


main = command(job, build_parser)


if __name__ == "__main__":
    raise SystemExit(main())
