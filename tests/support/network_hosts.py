"""Machines to test on: network, process and mount namespaces, with an address, a home and shared memory of their own.

Needs root and iproute2. What runs on a host dies with the first of its processes, which is killed by its id;
``ray stop`` there sees the host's own processes only.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PATIENCE_S = 60.0


class Host:
    """One machine; ``run`` is a shell on it."""

    def __init__(self, name: str, address: str, folder: Path, pid: int) -> None:
        self.name, self.address, self.folder, self.pid = name, address, folder, pid
        self.home = folder / "home"

    def run(self, command: str, *, timeout_s: float = 300.0, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a shell command line; what it printed, both streams together.

        Nothing of this process's environment reaches the host but PATH.
        """
        inside = ["nsenter", "--target", str(self.pid), "--net", "--pid", "--mount", "--", "bash", "-c", command]
        known = {"PATH": os.environ["PATH"], "HOME": str(self.home), "RAY_TMPDIR": str(self.folder / "ray")}
        log = self.folder / f"{time.monotonic_ns()}.log"  # daemons keep it open: a pipe would never end
        with log.open("w+") as out:
            done = subprocess.run(
                inside, env=known | environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=timeout_s
            )
        return subprocess.CompletedProcess(command, done.returncode, log.read_text(errors="replace"), "")


def usable() -> bool:
    """Whether hosts can be made here."""
    if os.geteuid() != 0 or not all(shutil.which(tool) for tool in ("ip", "nsenter", "unshare")):
        return False
    name = f"ser-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return made


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two machines with a cable between them; gone, with all that runs on them, at the end."""
    tag, subnet = secrets.token_hex(4), "10.77.0"
    names = [f"ser{tag}{end}" for end in "ab"]
    with ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
        _ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for number, name in enumerate(names, start=1):
            _ip("-n", name, "address", "add", f"{subnet}.{number}/24", "dev", name)
            _ip("-n", name, "link", "set", name, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            # Ray takes the address from which it would reach the outside for the host's own
            _ip("-n", name, "route", "add", "default", "via", f"{subnet}.{3 - number}")
        first, second = (
            stack.enter_context(_booted(name, f"{subnet}.{number}")) for number, name in enumerate(names, start=1)
        )
        yield first, second


@contextmanager
def _booted(name: str, address: str) -> Iterator[Host]:
    folder = Path(tempfile.mkdtemp(prefix="ser-", dir="/tmp"))  # short: Ray's sockets lie below it
    (folder / "home").mkdir()
    script = "mount -t tmpfs -o mode=1777 tmpfs /dev/shm && exec sleep infinity"
    apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "bash", "-c", script]
    keeper = subprocess.Popen(["ip", "netns", "exec", name, *apart])
    try:
        pid = _first_process(keeper)
        yield Host(name, address, folder, pid)
        keeper.kill()
        _wait(lambda: not Path(f"/proc/{pid}").exists())  # the first process is gone when all others are
    finally:
        keeper.kill()
        keeper.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _first_process(keeper: subprocess.Popen[bytes]) -> int:
    """The id, out here, of the host's first process, once it is up."""
    children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children")

    def up() -> list[int]:
        found = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        return [pid for pid in found if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep")]

    _wait(up)
    return up()[0]


def _wait(done: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not done():
        if time.monotonic() > until:
            raise TimeoutError(f"a host did not start, or end, within {PATIENCE_S:g} s")
        time.sleep(0.05)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=60)
