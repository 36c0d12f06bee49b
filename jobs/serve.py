"""The HTTP service on this machine, until Ctrl-C. Bundles, address and key are checked before anything starts."""

from __future__ import annotations

import argparse
import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from queue import SimpleQueue
from types import FrameType
from typing import NoReturn
from urllib.request import urlopen

from jobs._common import EXIT_DONE, Parser, called, check_free, run, say
from jobs._terminal import Terminal
from pipeline.cluster.runtime import joins_cluster, start_ray, stop_ray
from pipeline.storage.errors import SerError
from pipeline.storage.files import usable_cpus
from serve.schema import API_KEY_VARIABLE
from serve.settings import Settings

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
    parser.add_argument("--host", default="127.0.0.1", help=f"beyond loopback {API_KEY_VARIABLE} must be set")
    parser.add_argument("--port", type=int, default=8000, help="(default 8000)")
    parser.add_argument("--metrics_port", type=int, default=8080, help="Prometheus metrics (default 8080)")
    for name, field in Settings.model_fields.items():
        kind = {"type": str, "metavar": "A,B"} if name in _LISTS else {"type": field.annotation}
        shown = "" if name in _LISTS else f" (default {field.default})"
        parser.add_argument(f"--{name}", default=field.default, help=f"{field.description}{shown}", **kind)
    return parser


def job(arguments: argparse.Namespace) -> int:
    """Check, start, wait for a signal, drain."""
    from serve.auth import is_loopback, key_digest_from_environment
    from serve.ray_settings import prepare
    from serve.worker import open_bundles

    settings = _settings(arguments)
    digest = key_digest_from_environment()
    if not is_loopback(arguments.host) and digest is None:
        raise SerError(f"--host {arguments.host} lets others in; set {API_KEY_VARIABLE}, or stay on 127.0.0.1")
    check_free(arguments.host, arguments.port, "choose another --port")
    open_bundles(settings.bundles)
    if not joins_cluster():  # a cluster may grow
        settings.check_cpus(usable_cpus())
    metrics = _Metrics(arguments.metrics_port)
    prepare(settings)
    os.environ.pop(API_KEY_VARIABLE, None)  # the processes of Ray need its hash only
    say("starting")
    start_ray()
    from serve import deployment  # imports Ray, whose environment start_ray has set
    from serve.ray_settings import refuse_new_work, tidy_up

    renewals: SimpleQueue[int] = SimpleQueue()
    try:
        _take_signals(renewals)
        deployment.run(settings, arguments.host, arguments.port, digest)
        metrics.source = deployment.metrics_address
        say(f"ready: http://{arguments.host}:{arguments.port} (/docs; Ctrl-C stops, SIGHUP opens the bundles again)")
        say(f"metrics: http://127.0.0.1:{metrics.server_port}/metrics")
        while renewals.get():
            _roll_out(settings, digest)
    except KeyboardInterrupt:
        pass
    finally:
        say("stopping")
        refuse_new_work()
        with redirect_stdout(StringIO()):  # where Ray tells of its controller's end as if it were a failure
            deployment.stop()
            stop_ray()
        metrics.end()
        tidy_up()
    return EXIT_DONE


class _Metrics(ThreadingHTTPServer):
    """The page of metrics, in this process: its port is free as soon as that ends, however it ends.

    Ray exports a megabyte a scrape, on any free port. ``/metrics`` has the service's own of it, those of all its
    processes summed; ``/metrics/all`` has everything.

    Raises:
        SerError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        check_free("127.0.0.1", port, "choose another --metrics_port")
        super().__init__(("127.0.0.1", port), _MetricsPage)
        self.source: Callable[[], str] | None = None  # gives the address of what Ray exports, once it does
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
                    raise ConnectionError("Ray is starting")
                with urlopen(self.server.source(), timeout=10) as answer:
                    text = answer.read().decode()
                status, text = HTTPStatus.OK, text if self.path.endswith("all") else own_metrics(text)
            except OSError:
                status, text = HTTPStatus.SERVICE_UNAVAILABLE, "Ray exports no metrics now\n"
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


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


def _take_signals(renewals: SimpleQueue[int]) -> None:
    """Have SIGINT and SIGTERM end what this thread does, whatever that is; SIGHUP goes into ``renewals``.

    They raise KeyboardInterrupt, the one exception that comes safely out of Ray's compiled parts. A SIGHUP because the
    terminal has gone, where there was one, ends it as well. After the first end all are ignored.
    """
    renew = getattr(signal, "SIGHUP", None)  # Windows has none
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM, renew) if number]
    terminal = Terminal()

    def stop(*_: object) -> NoReturn:
        for number in numbers:
            signal.signal(number, lambda *_: None)
        raise KeyboardInterrupt

    def hang_up(number: int, _: FrameType | None) -> None:
        if terminal.left():
            stop()
        renewals.put(number)

    for number in numbers:
        signal.signal(number, hang_up if number == renew else stop)


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
