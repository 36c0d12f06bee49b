"""The nodes of a cluster test leave nothing behind when the test is stopped from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# two hosts, whose Ray is a process that waits for ever
STOPPED = """
import subprocess, sys, time
from pathlib import Path
from tests.support.hosts import Hosts
def start(self, host):
    host.main = subprocess.Popen(["sleep", "600"], start_new_session=True)
Hosts.start = start
with Hosts(Path(sys.argv[1]), 2, namespaces=False) as hosts:
    print(*(host.main.pid for host in hosts.all), flush=True)
    time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_sigterm_ends_all_hosts(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPED, str(tmp_path / "cluster")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        pids = [int(word) for word in script.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(alive, pids))
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == 128 + signal.SIGTERM
    assert not any(map(alive, pids))  # killed and waited for
