"""Starting Ray: once, bound to loopback, again when a busy machine was too slow, without leftovers; errors are told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private import ray_constants, services
from ray.serve._private import replica

from pipeline.cluster import ray_internals, runtime
from pipeline.storage.errors import SerError, SerWarning

Patch = pytest.MonkeyPatch
Starts = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def starts(monkeypatch: Patch) -> Starts:
    """Replaces Ray's start: ``starts(errors...)`` raises them one after the other, then succeeds; returns the calls."""

    def prepare(*errors: Exception) -> list[dict[str, Any]]:
        left, calls = list(errors), []

        def init(**options: Any) -> None:
            calls.append(options)
            if left:
                raise left.pop(0)

        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "shutdown", lambda: None)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        return calls

    return prepare


SLOW = "The current node timed out during startup."


def test_a_node_that_comes_up_late_is_waited_for_and_told_of(
    monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = 0

    def get_node(*_: object) -> str:
        nonlocal asked
        asked += 1
        if asked < 4:
            raise RuntimeError("not yet")
        return "the node"

    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.setattr(runtime, "_TOLD_EVERY_S", 0.01)
    with ray_internals.patience(60), runtime._said_how_long("starting Ray"):
        assert services.get_node("address", "id") == "the node"
    assert "starting Ray" in capsys.readouterr().err
    assert services.get_node is get_node
    asked = 0
    with ray_internals.patience(0), pytest.raises(Exception, match="timed out"):
        services.get_node("address", "id")


def test_a_ray_with_other_insides_is_refused(starts: Starts, monkeypatch: Patch) -> None:
    calls = starts()
    monkeypatch.delattr(ray_constants, "ENABLE_RAY_CLUSTER")
    with pytest.raises(SerError, match=r"ray_constants\.ENABLE_RAY_CLUSTER"):
        runtime.start_ray()
    assert calls == []


def test_a_port_that_is_not_opened_by_us_is_refused(monkeypatch: Patch) -> None:
    """As when Ray Serve opens it by another function, or under another name."""
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(replica, "add_port_to_grpc_server", replica.add_port_to_grpc_server)  # put back at the end
    port, opened = ray_internals.OwnPort(), []
    port.install()
    with pytest.raises(SerError, match="on all interfaces"):
        port.check()
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    replica.add_port_to_grpc_server(SimpleNamespace(add_insecure_port=opened.append), "[::]:0")
    port.check()
    assert opened == ["127.0.0.1:0"]
    monkeypatch.delattr(replica, "add_port_to_grpc_server")
    with pytest.raises(SerError, match="add_port_to_grpc_server"):
        ray_internals.OwnPort().install()


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_sockets_lie_where_their_paths_fit(starts: Starts, monkeypatch: Patch, tmp_path: Path, name: str) -> None:
    session = "session_2026-11-30_10-13-29_123456_4194304/sockets/plasma_store"
    for other in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(other, raising=False)
    (tmp_path / "file").touch()
    long = "very_long_scratch_directory_name_as_on_slurm_clusters/job_1"
    for given in (tmp_path / long, tmp_path / ("ä" * 30), tmp_path / "file", "relative"):
        monkeypatch.setenv(name, str(given))
        calls = starts()
        if given == "relative":
            monkeypatch.chdir("/")
            runtime.start_ray()
        else:
            with pytest.warns(SerWarning, match=name):
                runtime.start_ray()
        folder = calls[0]["_temp_dir"]
        assert os.path.isabs(folder)
        assert len(os.fsencode(os.path.join(folder, session))) < 104
    monkeypatch.setenv(name, "/tmp")
    calls = starts()
    runtime.start_ray()
    assert "_temp_dir" not in calls[0]
    monkeypatch.setenv(name, str(tmp_path / long))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SerError, match="RAY_TMPDIR"):
        runtime.start_ray()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux confines processes to CPUs")
def test_ray_is_local_and_counts_no_cpus_that_this_process_may_not_use(starts: Starts, monkeypatch: Patch) -> None:
    calls = starts()
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for given, usable in ((None, {3, 5}), (None, set(range(8))), (4, {3, 5})):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, usable=usable: usable)
        runtime.start_ray(given)
    assert [call["num_cpus"] for call in calls] == [2, None, 4]  # None: as Ray counts
    assert {call["address"] for call in calls} == {"local"}


def test_a_start_that_died_is_made_anew_until_the_limit_and_not_for_other_errors(
    starts: Starts, monkeypatch: Patch
) -> None:
    calls = starts(Exception(SLOW), Exception(SLOW))
    runtime.start_ray()
    assert len(calls) == 3
    assert calls[0] == calls[2]
    monkeypatch.setattr(runtime, "_START_LIMIT_S", -1.0)
    calls = starts(Exception(SLOW))
    with pytest.raises(SerError, match="too busy"):
        runtime.start_ray()
    assert len(calls) == 1
    calls = starts(ValueError("no such option"))
    with pytest.raises(ValueError, match="no such option"):
        runtime.start_ray()
    assert len(calls) == 1


def test_what_a_slow_start_left_is_ended_and_nothing_else(starts: Starts, monkeypatch: Patch) -> None:
    """Ray's processes of the failed start go; those of before, and others, stay."""
    started: list[subprocess.Popen[bytes]] = []

    def sleeper(name: str) -> subprocess.Popen[bytes]:
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()", name], stdin=subprocess.PIPE)
        started.append(child)
        return child

    calls = starts(Exception(SLOW))
    init = ray.init

    def start_processes_and_fail(**options: Any) -> None:
        if not calls:
            sleeper("/somewhere/ray/gcs_server")
            sleeper("other")
        init(**options)

    before = sleeper("/somewhere/ray/raylet")
    monkeypatch.setattr(ray, "init", start_processes_and_fail)
    try:
        runtime.start_ray()
        _, left, other = started
        assert left.wait(30) == -signal.SIGKILL
        assert (before.poll(), other.poll()) == (None, None)
    finally:
        for child in started:
            child.kill()
            child.communicate()


def test_a_given_cluster_is_joined_as_it_is(starts: Starts, monkeypatch: Patch) -> None:
    calls = starts()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    for name in runtime._LEAN:
        monkeypatch.delenv(name, raising=False)
    runtime.start_ray(2, lean=True)
    assert not {"num_cpus", "address"} & set(calls[0])
    assert not set(runtime._LEAN) & set(os.environ)


def test_a_submitted_job_keeps_what_it_was_submitted_with(starts: Starts, monkeypatch: Patch) -> None:
    """Ray refuses a variable that both the job and its driver set, and puts the upload on the path itself."""
    calls = starts()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    given = {"runtime_env": {"env_vars": {"RAY_COLOR_PREFIX": "1", "MINE": "x"}, "working_dir": "gcs://a.zip"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(given))
    runtime.start_ray()
    sent = calls[0]["runtime_env"]["env_vars"]
    assert not set(sent) & {"RAY_COLOR_PREFIX", "MINE", "PYTHONPATH"}
    assert sent["RAY_USAGE_STATS_ENABLED"] == "0"
    assert ray.runtime_env.runtime_env._merge_runtime_env(given["runtime_env"], {"env_vars": sent}) is not None


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("10.0.0.1:6379", ConnectionError("no running Ray instance"), "no Ray cluster answers at .* 10.0.0.1"),
        ("10.0.0.1:6379", ray.exceptions.AuthenticationError("no token"), "token"),
        ("http://127.0.0.1:8265", None, "ser submit"),  # a dashboard
        ("https://cluster", None, "ser submit"),
    ],
)
def test_a_cluster_that_cannot_be_joined(
    starts: Starts, monkeypatch: Patch, address: str, error: Exception | None, words: str
) -> None:
    calls = starts(*[error] if error else [])
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(SerError, match=words):
        runtime.start_ray()
    assert len(calls) == bool(error)


LOOK = """
from tests.support.processes import LOOPBACK, command_of, descendants, listeners
import os, ray  # before start_ray, as scoring, extraction and the protocols do
from pipeline.cluster.runtime import restore_priority, start_ray
def of(pid):
    return {os.sched_getscheduler(int(thread)) for thread in os.listdir(f"/proc/{pid}/task")}
def policies():
    before = os.sched_getscheduler(0)
    restore_priority(together=False)
    after = os.sched_getscheduler(0), os.SCHED_BATCH in of(os.getpid())
    restore_priority(together=True)
    return before, *after, of(os.getpid())
if __name__ == "__main__":
    start_ray(1, lean=True)
    other, batch = os.SCHED_OTHER, os.SCHED_BATCH
    found = ray.get(ray.remote(policies).remote())
    assert found == (batch, other, True, {other}), found
    ours = {command_of(pid): of(pid) for pid in descendants(os.getpid())}
    assert [ours[name] for name in ours if "raylet/raylet" in name or "gcs_server" in name] == [{batch}] * 2, ours
    assert os.sched_getscheduler(0) == other
    ports = listeners(os.getpid())
    assert len(ports) >= 4 and {address for address, _ in ports} <= LOOPBACK, ports
    print(list(ours))
"""


def test_a_lean_ray_listens_on_loopback_only_and_lacks_the_processes_that_do_nothing_for_us() -> None:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", LOOK]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert "raylet" in run.stdout
    assert not [name for name in ("log_monitor.py", "dashboard.py", "monitor.py") if name in run.stdout]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="only Linux tells of all processes")
def test_finished_workers_that_hang_are_ended_and_nothing_else(monkeypatch: Patch) -> None:
    monkeypatch.setattr(ray_internals, "children", lambda: {os.getpid()})
    monkeypatch.setattr(ray_internals, "_finished", {})
    names = ("ray::Finished", "ray::AtWork")
    children = [subprocess.Popen([name, "60"], executable=shutil.which("sleep")) for name in names]
    try:
        ray_internals.end_at_exit("ray::Finished")
        assert list(ray_internals._finished) == [children[0].pid]
        ray_internals.end_finished()
        assert children[0].wait(10) == -signal.SIGKILL
        assert children[1].poll() is None
        ray_internals.end_finished()  # its number may be another's by now
        assert children[1].poll() is None
    finally:
        for child in children:
            child.kill()
            child.wait()
