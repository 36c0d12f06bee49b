"""Services to measure, each a process with its own Ray on free ports: this project's, and two that do nothing."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.ray_internals import SERVE_PROXY, SERVE_REPLICA
from tests.support.processes import HOST, ROOT, command_of, descendants, free_port, resident_bytes

_START_S = 240.0
_MIB = 2**20


@dataclass(frozen=True)
class Running:
    """A running service."""

    pid: int
    port: int
    metrics_port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def processes(self, part: str = SERVE_REPLICA) -> dict[int, str]:
        """Pid -> title of the service's processes whose title contains ``part``."""
        found = {pid: command_of(pid) for pid in descendants(self.pid)}
        return {pid: title for pid, title in found.items() if part in title}

    def workers(self) -> list[int]:
        """Pids of the model workers."""
        return sorted(self.processes(f"{SERVE_REPLICA}ser:Model"))

    def memory_mib(self, parts: Mapping[str, Sequence[int]] | None = None) -> dict[str, float]:
        """Resident memory of the largest process of each of ``parts()``."""
        found = (parts or self.parts()).items()
        return {name: max((resident_bytes(pid) / _MIB for pid in pids), default=0.0) for name, pids in found}

    def parts(self) -> dict[str, list[int]]:
        """Pids of proxy, ingress and model workers; for the local engine, of its only process."""
        titles = {"proxy": SERVE_PROXY, "ingress": ":Ingress", "model": ":Model"}
        found = {name: list(self.processes(title)) for name, title in titles.items()}
        return found if any(found.values()) else {"service": [self.pid]}  # without Ray it is one process


@contextmanager
def started(words: Sequence[str]) -> Iterator[Running]:
    """Start ``python -m WORDS --port P --metrics_port M``, wait until it is ready, and stop it afterwards."""
    port, metrics_port = free_port(), free_port()
    log = Path(tempfile.mkstemp(prefix="service-", suffix=".log")[1])
    command = [sys.executable, "-m", *words, "--port", str(port), "--metrics_port", str(metrics_port)]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        until_s = time.monotonic() + _START_S
        while "ready: " not in log.read_text():
            if process.poll() is not None or time.monotonic() > until_s:
                raise SystemExit(f"the service did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield Running(process.pid, port, metrics_port, log)
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()  # does nothing if it has ended
        process.wait()


def ours(*options: str) -> tuple[str, ...]:
    """The words that start this project's service."""
    return ("jobs.serve", *options)


def no_op(*, two_stages: bool) -> tuple[str, ...]:
    """The words that start a service that reads the body and answers at once, with one or two deployments."""
    return ("benchmarks.services", *(("--two_stages",) if two_stages else ()))


def main() -> None:
    """Run the service that does nothing."""
    parser = argparse.ArgumentParser(description="Run a Serve application that does nothing.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--metrics_port", type=int, required=True)
    parser.add_argument("--two_stages", action="store_true")
    arguments = parser.parse_args()
    from pipeline.cluster.runtime import start_ray
    from serve.ray_settings import IN_PROXY, prepare
    from serve.settings import Settings

    prepare(Settings())  # Ray as for the real service
    del os.environ[IN_PROXY]  # but without the middlewares of the proxy
    start_ray(metrics_port=arguments.metrics_port)
    from benchmarks import no_op_app

    no_op_app.run(HOST, arguments.port, two_stages=arguments.two_stages)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    print("ready: ", flush=True)
    ended.wait()
    no_op_app.stop()


if __name__ == "__main__":
    main()
