"""Ray nodes that take this machine for several: network namespaces with own addresses, folders, tokens, host names.

Each host has a veth on one bridge, its own /tmp, /dev/shm and home (with a copy of the token), a host name that the
others know, and an empty folder where this project's code lies: what a job needs there must have travelled. One folder,
``shared``, is the same on all. Needs root and iproute2. Without them, or where namespaces are not permitted, the nodes
are raylets on loopback addresses that see all that this machine has: reachability is then not tested; ``kind`` says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from pipeline.cluster.ray_internals import WORKER
from tests.support.processes import ROOT, command_of, descendants

HIDDEN = ("pipeline", "jobs", "serve", "models", "benchmarks", "lab", "tests")
START_S = 900.0
TRIES = 4
PORT, DASHBOARD = 6379, 8265
# a page of the dashboard, with the token
ASK = """
import os, sys, urllib.request
token = open(os.path.expanduser("~/.ray/auth_token")).read()
request = urllib.request.Request(sys.argv[1], headers={"Authorization": "Bearer " + token})
print(urllib.request.urlopen(request, timeout=30).read().decode())
"""
AGENTS = {"metrics_agent": 52366, "dashboard_agent_listen": 52365, "runtime_env_agent": 52367, "metrics_export": 52368}
# `ray`, but on a busy machine: a node gives up when its agents have not told their ports within 15 s, and the command
# when the node is not known after 30 s. Here the ports are known beforehand and written down, and the command waits.
PATIENT_RAY = f"""
import os, sys, time
from ray._private import node, services
known, start_raylet = services.get_node, node.Node.start_raylet
def get_node(*words):
    end_s = time.monotonic() + {START_S}
    while True:
        try:
            return known(*words)
        except RuntimeError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.5)
def start(self, *words, **named):
    for name, port in {AGENTS}.items():
        with open(os.path.join(self._session_dir, name + "_port_" + self._node_id), "w") as file:
            file.write(str(port))
    return start_raylet(self, *words, **named)
services.get_node, node.Node.start_raylet = get_node, start
from ray.scripts.scripts import main
sys.argv[0] = "ray"
main()
"""


@dataclass
class Host:
    """One node. ``main`` is the process of ``ray start --block`` while it runs."""

    number: int
    address: str
    namespace: str
    home: Path
    main: subprocess.Popen[bytes] | None = None
    log: Path = field(default=Path("/dev/null"))

    @property
    def name(self) -> str:
        return f"node-{self.number}"


class Hosts:
    """``count`` hosts, the first of them the head, below ``folder``; use it in a ``with`` block.

    ``pinned``: each host has a CPU of this machine to itself for all that runs on it, as long as there are enough.
    A SIGTERM within the block ends it as an exception does, so that nothing is left behind.
    """

    def __init__(
        self, folder: Path, count: int, *, cpus: int = 1, namespaces: bool = True, pinned: bool = False
    ) -> None:
        self.folder, self.cpus = folder, cpus
        self.cores = sorted(os.sched_getaffinity(0)) if pinned else []
        self.shared = folder / "shared"
        self.tag = f"s{os.getpid() % 100_000}"
        self.real = namespaces and permitted()
        if self.real and Path("/tmp") in folder.absolute().parents:
            raise SystemExit(f"{folder} lies below /tmp, and each host has a /tmp of its own; take another folder")
        self.kind = "network namespaces" if self.real else "loopback addresses (namespaces are not permitted here)"
        net = 1 + os.getpid() % 250
        base = f"10.77.{net}." if self.real else f"127.77.{net}."
        self.all = [Host(i, f"{base}{i}", f"{self.tag}-{i}", folder / f"home-{i}") for i in range(1, count + 1)]
        self.head = self.all[0]
        self.port = PORT if self.real else 20_000 + 2 * net
        self.dashboard = DASHBOARD if self.real else 20_001 + 2 * net

    def __enter__(self) -> Hosts:
        self.shared.mkdir(parents=True)
        token = secrets.token_hex(32)
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in self.all), encoding="ascii"
        )
        for host in self.all:
            ray = host.home / ".ray"
            ray.mkdir(parents=True, mode=0o700)
            with os.fdopen(os.open(ray / "auth_token", os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="ascii") as file:
                file.write(token)
            (host.home / "tmp").mkdir()
            host.log = host.home / "ray-start.log"
        self._on_sigterm = signal.signal(signal.SIGTERM, _leave)
        try:
            if self.real:
                self._wire()
            for host in self.all:
                self.start(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not leave half
        for host in reversed(self.all):
            self.kill(host)
            if self.real:
                _ip("netns", "del", host.namespace, check=False)
        if self.real:
            _ip("link", "del", f"{self.tag}b", check=False)
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _wire(self) -> None:
        """A bridge, and a cable from each host to it."""
        bridge = f"{self.tag}b"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for host in self.all:
            inside, outside = f"{self.tag}i{host.number}", self.cable(host)
            _ip("netns", "add", host.namespace)
            _ip("link", "add", outside, "type", "veth", "peer", "name", inside)
            _ip("link", "set", inside, "netns", host.namespace)
            _ip("link", "set", outside, "master", bridge, "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", inside)
            _ip("-n", host.namespace, "link", "set", inside, "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")

    def cable(self, host: Host) -> str:
        """The bridge's end of the host's cable."""
        return f"{self.tag}o{host.number}"

    def environment(self, host: Host) -> dict[str, str]:
        """What a person on that host has in the environment."""
        kept = {name: os.environ[name] for name in ("LANG", "LC_ALL", "TZ") if name in os.environ}
        return kept | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(host.home),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(round(START_S)),
            "RAY_agent_register_timeout_ms": str(round(START_S * 1000)),
            "RAY_COLOR_PREFIX": "0",
            "OMP_NUM_THREADS": "1",
        }

    def inside(self, host: Host, words: list[str], *, as_client: bool = False) -> list[str]:
        """A command that runs ``words`` on that host; ``as_client``: with this machine's files, as through a tunnel."""
        core = self.cores[(host.number - 1) % len(self.cores)] if self.cores else None
        prefix = [] if core is None else ["taskset", "--cpu-list", str(core)]
        if not self.real:
            return [*prefix, *words]
        prefix += ["ip", "netns", "exec", host.namespace]
        if as_client:
            return [*prefix, *words]
        mounts = [
            "mount --make-rprivate /",
            f"mount --bind {host.home / 'tmp'} /tmp",
            f"mount --bind {self.folder / 'hosts'} /etc/hosts",
            "mount -t tmpfs -o size=2g tmpfs /dev/shm",
            *(f"mount -t tmpfs -o ro,size=4k tmpfs {path}" for path in self.hidden()),
            f"hostname {host.name}",
            f"cd / && exec {shlex.join(words)}",
        ]
        return [*prefix, "unshare", "--mount", "--uts", "sh", "-c", " && ".join(mounts)]

    def hidden(self) -> list[str]:
        """Folders with code of this project that no host may see."""
        installed = subprocess.run(
            [sys.executable, "-c", "import pipeline; print(pipeline.__file__)"],
            cwd="/", capture_output=True, text=True, check=False,
        ).stdout.strip()  # fmt: skip
        roots = {ROOT, Path(installed).parents[1]} if installed else {ROOT}
        return [str(root / name) for root in roots for name in HIDDEN if (root / name).is_dir()]

    def start(self, host: Host) -> None:
        """Start Ray on a host and wait until it is in the cluster; tried again on a machine that is too busy."""
        resources = ["--num-cpus", str(self.cpus), "--object-store-memory", str(200 * 2**20), "--block"]
        where = ["--node-ip-address", host.address, "--disable-usage-stats"]
        command = ["ray"]
        if self.real:  # loopback addresses share their ports
            command = [sys.executable, "-c", PATIENT_RAY]
            names = ("dashboard-agent-grpc", "dashboard-agent-listen", "runtime-env-agent", "metrics-export")
            ports = (
                AGENTS[name]
                for name in ("metrics_agent", "dashboard_agent_listen", "runtime_env_agent", "metrics_export")
            )
            where += [f"--{name}-port={port}" for name, port in zip(names, ports, strict=True)]
        if host is self.head:
            words = ["start", "--head", "--port", str(self.port), "--dashboard-port", str(self.dashboard)]
            words += [
                "--dashboard-host",
                "127.0.0.1",
                "--temp-dir",
                "/tmp/ray" if self.real else str(self.folder / "ray"),
            ]
        else:
            words = ["start", "--address", f"{self.head.address}:{self.port}"]
        for _ in range(TRIES):
            with host.log.open("ab") as log:
                host.main = subprocess.Popen(
                    self.inside(host, [*command, *words, *where, *resources]),
                    env=self.environment(host), cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            if self._wait(host):
                return
            self.kill(host)
        raise SystemExit(
            f"{host.name} did not start:\n{host.log.read_text(encoding='utf-8', errors='replace')[-2000:]}"
        )

    def _wait(self, host: Host) -> bool:
        """Until the cluster lists the host and, on the head, the dashboard takes jobs."""
        end_s = time.monotonic() + START_S
        while time.monotonic() < end_s:
            if host.main is None or host.main.poll() is not None:
                return False
            if host.address in self.members():
                return True
            time.sleep(2)
        return False

    def members(self) -> dict[str, str]:
        """Address -> id of the nodes that the head's dashboard believes alive."""
        url = f"http://127.0.0.1:{self.dashboard}/nodes?view=summary"
        run = subprocess.run(
            self.inside(self.head, [sys.executable, "-S", "-c", ASK, url], as_client=True),
            env=self.environment(self.head), cwd="/", capture_output=True, text=True, check=False,
        )  # fmt: skip
        try:
            nodes = [node["raylet"] for node in json.loads(run.stdout)["data"]["summary"]]
        except (ValueError, KeyError):
            return {}
        return {node["nodeManagerAddress"]: node["nodeId"] for node in nodes if node["state"] == "ALIVE"}

    def processes(self, host: Host) -> list[int]:
        """All processes of a host; those that a client started (``as_client``) are somebody else's."""
        if self.real:
            found = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True, check=False)
            return [pid for pid in map(int, found.stdout.split()) if _system(pid) not in (None, _system(os.getpid()))]
        return [host.main.pid, *descendants(host.main.pid)] if host.main is not None else []

    def working(self, host: Host, *titles: str) -> list[int]:
        """Workers of a host whose title, as Ray writes it, holds one of the words: what they do right now."""
        found = [(pid, command_of(pid)) for pid in self.processes(host)]
        return [pid for pid, title in found if title.startswith(WORKER) and any(word in title for word in titles)]

    def kill(self, host: Host) -> int:
        """Kill every process of the host at once, as a power cut would; returns how many there were."""
        pids = self.processes(host)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if host.main is not None:
            host.main.wait()
            host.main = None
        while self.processes(host):
            time.sleep(0.1)
        shutil.rmtree(host.home / "tmp" / "ray", ignore_errors=True)
        return len(pids)

    def repair(self) -> None:
        """All hosts up again. A new head knows nothing of the old cluster: then everybody starts anew."""
        if self.head.main is None or self.head.main.poll() is not None:
            for host in self.all:
                self.kill(host)
        members = self.members() if self.head.main is not None else {}
        for host in self.all:
            if host.main is None or host.main.poll() is not None or host.address not in members:
                self.kill(host)
                self.start(host)

    def cut(self, host: Host, seconds: float) -> None:
        """Take the host's cable out for so long; its processes live on."""
        _ip("link", "set", self.cable(host), "down")
        time.sleep(seconds)
        _ip("link", "set", self.cable(host), "up")


def _leave(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def permitted() -> bool:
    """Whether this process may make network namespaces."""
    name = f"probe{os.getpid()}"
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        _ip("netns", "del", name)
    return made


def _system(pid: int) -> int | None:
    """The UTS namespace of a process, one a host; None when it has ended."""
    try:
        return os.stat(f"/proc/{pid}/ns/uts").st_ino
    except OSError:
        return None


def _ip(*words: str, check: bool = True) -> None:
    run = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if check and run.returncode:
        raise SystemExit(f"ip {' '.join(words)}: {run.stderr.strip()}")
