"""The HTTP service on this machine, until Ctrl-C. Bundles, address and key are checked before anything starts."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from queue import SimpleQueue
from types import FrameType
from typing import NoReturn

from pydantic import ValidationError

from jobs._common import EXIT_DONE, Parser, called, check_free, run, say
from jobs._terminal import Terminal
from pipeline.cluster.runtime import start_ray, stop_ray
from pipeline.storage.errors import SerError
from serve.auth import is_loopback, key_digest_from_environment
from serve.ray_settings import prepare
from serve.schema import API_KEY_VARIABLE
from serve.settings import Settings
from serve.worker import open_bundles

_LISTS = {"bundles", "cors_origins"}


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
    settings = _settings(arguments)
    digest = key_digest_from_environment()
    if not is_loopback(arguments.host) and digest is None:
        raise SerError(f"--host {arguments.host} lets others in; set {API_KEY_VARIABLE}, or stay on 127.0.0.1")
    check_free(arguments.host, arguments.port, "choose another --port")
    open_bundles(settings.bundles)
    check_free("127.0.0.1", arguments.metrics_port, "choose another --metrics_port")
    prepare(settings)
    os.environ.pop(API_KEY_VARIABLE, None)  # the processes of Ray need its hash only
    say("starting")
    start_ray(metrics_port=arguments.metrics_port)
    from serve import deployment  # imports Ray, whose environment start_ray has set

    renewals: SimpleQueue[int] = SimpleQueue()
    try:
        _take_signals(renewals)
        deployment.run(settings, arguments.host, arguments.port, digest)
        say(f"ready: http://{arguments.host}:{arguments.port} (/docs; Ctrl-C stops, SIGHUP opens the bundles again)")
        say(f"metrics: http://127.0.0.1:{arguments.metrics_port}/metrics")
        while renewals.get():
            _roll_out(settings, digest)
    except KeyboardInterrupt:
        pass
    finally:
        say("stopping")
        with redirect_stdout(StringIO()):  # where Ray tells of its controller's end as if it were a failure
            deployment.stop()
            stop_ray()
    return EXIT_DONE


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
