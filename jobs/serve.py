"""The HTTP service on this machine, until Ctrl-C: on Ray Serve, or in this process, where it stands in seconds.

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

from jobs._common import EXIT_DONE, Parser, called, check_free, run, say
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
    parser = Parser(
        prog=called("serve"),
        description=__doc__,
        epilog="example: %(prog)s --bundles runs/first --max_replicas 2",
    )
    parser.add_argument(
        "--engine", choices=("ray", "local"), default="ray", help="Ray Serve, or this process (default ray)"
    )
    parser.add_argument("--host", default="127.0.0.1", help=f"beyond loopback {API_KEY_VARIABLE} must be set")
    parser.add_argument("--port", type=int, default=8000, help="(default 8000)")
    parser.add_argument("--metrics_port", type=int, default=8080, help="Prometheus metrics (default 8080)")
    parser.add_argument(
        "--stop_with_stdin", action="store_true", help="stop when standard input ends; with --engine local"
    )
    for name, field in Settings.model_fields.items():
        kind = {"type": str, "metavar": "A,B"} if name in _LISTS else {"type": field.annotation}
        shown = "" if name in _LISTS else f" (default {field.default})"
        parser.add_argument(f"--{name}", default=field.default, help=f"{field.description}{shown}", **kind)
    return parser


def job(arguments: argparse.Namespace) -> int:
    """Check, start, wait for a signal, drain."""
    from serve.auth import is_loopback, key_digest_from_environment
    from serve.worker import open_bundles

    settings = _settings(arguments)
    digest = key_digest_from_environment()
    if not is_loopback(arguments.host) and digest is None:
        raise SerError(f"--host {arguments.host} lets others in; set {API_KEY_VARIABLE}, or stay on 127.0.0.1")
    if arguments.engine == "local" and max(settings.replicas, settings.max_replicas) > 1:
        raise SerError("--engine local has one worker a model; leave out --replicas and --max_replicas")
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
    """In this process."""
    from serve.local import LocalService

    _take_signals(_interrupt, lambda: None)
    say("starting")
    os.environ.pop(API_KEY_VARIABLE, None)  # its hash is enough
    service = LocalService(settings, digest)
    if arguments.stop_with_stdin:
        threading.Thread(target=_until_stdin_ends, args=(service.stop,), daemon=True).start()
    else:
        _log_to_stderr()
    service.open(bundles)
    metrics.source = service.metrics
    _take_signals(service.stop, service.renew)
    service.run(arguments.host, arguments.port, lambda: _say_ready(arguments, metrics))
    say("stopped")


def _on_ray(arguments: argparse.Namespace, settings: Settings, digest: str | None, metrics: _Metrics) -> None:
    """On Ray Serve."""
    from serve.ray_settings import prepare

    prepare(settings)
    os.environ.pop(API_KEY_VARIABLE, None)  # the processes of Ray need its hash only
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
            _roll_out(settings, digest)
    except KeyboardInterrupt:
        pass
    finally:
        _take_signals(lambda: None, lambda: None)  # a failure ends it too, and nothing may interrupt the end
        say("stopping")
        refuse_new_work()
        with redirect_stdout(StringIO()):  # where Ray tells of its controller's end as if it were a failure
            deployment.stop()
            stop_ray()
        tidy_up()


def _say_ready(arguments: argparse.Namespace, metrics: _Metrics) -> None:
    say(f"ready: http://{arguments.host}:{arguments.port} (/docs; Ctrl-C stops, SIGHUP opens the bundles again)")
    say(f"metrics: http://127.0.0.1:{metrics.server_port}/metrics")


def _until_stdin_ends(stop: Callable[[], None]) -> None:
    """Stop once whoever started this process, and holds the other end of its input, has gone."""
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    stop()


def _log_to_stderr() -> None:
    """A line a request, as Ray Serve writes into its files."""
    log = logging.getLogger("ray.serve.ser")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())


class _Metrics(ThreadingHTTPServer):
    """The page of metrics, in this process: its port is free as soon as that ends, however it ends.

    Ray exports a megabyte a scrape, on any free port. ``/metrics`` has the service's own of it, those of all its
    processes summed; ``/metrics/all`` has everything. Without Ray both are the same.

    Raises:
        SerError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        check_free("127.0.0.1", port, "choose another --metrics_port")
        super().__init__(("127.0.0.1", port), _MetricsPage)
        self.source: Callable[[], str] | None = None  # gives what is exported, once something is; OSError while not
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def end(self) -> None:
        """Free the port."""
        self.shutdown()
        self.server_close()


class _MetricsPage(BaseHTTPRequestHandler):
    server: _Metrics

    def do_GET(self) -> None:
        """One scrape."""
        status, text = HTTPStatus.NOT_FOUND, "/metrics, or /metrics/all\n"
        if self.path in ("/metrics", "/metrics/all"):
            try:
                if self.server.source is None:
                    raise ConnectionError("it is starting")
                text = self.server.source()
                status, text = HTTPStatus.OK, text if self.path.endswith("all") else own_metrics(text)
            except OSError:
                status, text = HTTPStatus.SERVICE_UNAVAILABLE, "there are no metrics now\n"
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


def fetched(address: str) -> str:
    """What is at an address. Raises OSError."""
    with urlopen(address, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def own_metrics(text: str) -> str:
    """Of metrics in Prometheus' format those of the service, without Ray's labels, summed over its processes."""
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
    """End what the main thread does: the one exception that comes safely out of Ray's compiled parts."""
    raise KeyboardInterrupt


def _take_signals(stop: Callable[[], None], renew: Callable[[], None]) -> None:
    """Have SIGINT and SIGTERM call ``stop``, once: after that all are ignored; and SIGHUP ``renew``.

    A SIGHUP because the terminal has gone, where there was one, stops as well.
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


def _roll_out(settings: Settings, digest: str | None) -> None:
    from serve import deployment

    try:
        deployment.roll_out(settings, digest)
        say("rolled out")
    except SerError as error:
        say(f"error: {error}; what runs goes on")


def _settings(arguments: argparse.Namespace) -> Settings:
    from pydantic import ValidationError

    try:
        return Settings(**{name: getattr(arguments, name) for name in Settings.model_fields})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise SerError(f"--{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job."""
    return run(job, build_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
