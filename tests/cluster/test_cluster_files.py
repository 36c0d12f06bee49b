"""The files of Ray's cluster launcher: Ray's own schema, what must be closed, and their commands run on two hosts."""

from __future__ import annotations

import json
import re
import shlex
import stat
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import network_hosts
import pytest
import yaml
from network_hosts import Host

ROOT = Path(__file__).resolve().parents[2]
FILES = ("cluster.yaml", "deploy/cluster-ssh.yaml")
STARTS_AT_MOST = 8
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return content


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The file as Ray's launcher sees it, defaults filled in; raises what the launcher would say against it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    full: dict[str, Any] = prepare_config(deepcopy(config))
    validate_config(full)
    return full


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file_and_its_nodes_are_closed(name: str) -> None:
    full, config = prepared(read(name)), read(name)
    assert full["head_node_type"] in full["available_node_types"]
    assert full["max_workers"] >= 1
    for key in STARTS:
        (start,) = (command for command in config[key] if "ray start" in command)
        assert "export RAY_AUTH_MODE=token" in start.split("ray start")[0]
        assert "0.0.0.0" not in start
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "--ray-client-server-port" not in head
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN" not in (ROOT / name).read_text(encoding="utf-8")
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"][0]


@pytest.mark.parametrize("name", FILES)
def test_nodes_install_what_is_locked(name: str) -> None:
    config = read(name)
    mounted = {remote: ROOT / local for remote, local in config["file_mounts"].items() if local.startswith("./")}
    assert mounted["~/ser-requirements.txt"] == ROOT / "requirements.txt"
    assert all(path.is_file() for path in mounted.values())
    commands = " ".join([*config["setup_commands"], *config.get("head_setup_commands", [])])
    installed = [w for c in re.findall(r"pip install ([^;&]*)", commands) for w in c.split() if w[0].isalpha()]
    assert installed
    named = {word for word in installed if re.fullmatch(r"[a-z][\w-]*", word)}
    assert named <= {"pip", "auto", "install"}, "named without a version"


def test_both_files_set_up_and_start_nodes_alike() -> None:
    first, second = map(read, FILES)
    for key in ("setup_commands", "file_mounts", *STARTS):
        assert first[key] == second[key], key


def test_aws_closes_all_but_ssh_and_pays_for_nothing_idle() -> None:
    config = read("cluster.yaml")
    assert set(config["provider"]["security_group"]) == {"GroupName"}, "rules of our own would open more than SSH"
    assert config["provider"]["cache_stopped_nodes"] is False
    assert 0 < config["idle_timeout_minutes"] <= 10
    kinds = config["available_node_types"]
    assert all(kind.get("min_workers", 0) == 0 for kind in kinds.values())
    spot = {name for name, kind in kinds.items() if "InstanceMarketOptions" in kind["node_config"]}
    assert spot == {"cpu"}, "scoring workers are spot; the head and training workers are not"
    assert kinds["gpu"]["resources"]["GPU"] >= 1
    assert all(kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"} for kind in kinds.values())


def test_ec2_knows_every_field_of_the_node_kinds() -> None:
    session = pytest.importorskip("botocore.session")
    from botocore.validate import ParamValidator

    request = session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape

    def against(config: dict[str, Any]) -> str:
        report: str = ParamValidator().validate(config | {"MinCount": 1, "MaxCount": 1}, request).generate_report()
        return report

    assert "Unknown parameter" in against({"InstanceTyp": "m7i.2xlarge"})
    for name, kind in read("cluster.yaml")["available_node_types"].items():
        assert against(kind["node_config"]) == "", name
        assert kind["node_config"]["InstanceType"] in request.members["InstanceType"].enum


# --- the commands, on two hosts ---

ALIVE = "awk '/^Name:/ {name = $2} /^State:/ && $2 != \"Z\" {print name}' /proc/[0-9]*/status"
PROBE = """
import json, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
where = ray.remote(num_cpus=0)(lambda: ray.util.get_node_ip_address())
nodes = {n["NodeManagerAddress"]: n["NodeID"] for n in ray.nodes() if n["Alive"]}
ran = {a: ray.get(where.options(scheduling_strategy=On(i, soft=False)).remote(), timeout=200) for a, i in nodes.items()}
print("PROBE" + json.dumps(ran))
"""
JOIN = "import ray; ray.init(address='{address}', log_to_driver=False); print('JOINED', len(ray.nodes()))"
KNOCK = """
import urllib.request, urllib.error
try: print("ANSWER", urllib.request.urlopen("http://{address}/api/jobs/", timeout=20).status)
except urllib.error.HTTPError as error: print("ANSWER", error.code)
except OSError as error: print("CLOSED", error)
"""


def python(code: str) -> str:
    return f"~/ser-venv/bin/python -c {shlex.quote(code)}"


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    if not network_hosts.usable():
        pytest.skip("needs root and iproute2, to make hosts of network namespaces")
    with network_hosts.two_hosts() as pair:
        for host in pair:
            (host.home / "ser-venv").symlink_to(sys.prefix)
        yield pair


def launched(host: Host, commands: list[str], head: Host) -> str:
    """Run the commands word for word, as the launcher does: each in a shell that knows the head's address.

    Ray gives itself 30 s to start; where a busy machine needs longer, the commands are given again.
    """
    printed = ""
    for _ in range(STARTS_AT_MOST):
        for command in commands:
            done = host.run(f"export RAY_HEAD_IP={head.address}; {command}", timeout_s=600)
            printed += done.stdout
            if done.returncode:
                break
        else:
            return printed
        assert "timed out during startup" in done.stdout, f"{command}\n{done.stdout}"
    pytest.fail(f"Ray did not come up in {STARTS_AT_MOST} starts\n{printed}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_start_commands_make_a_closed_cluster(hosts: tuple[Host, Host]) -> None:
    head, worker = hosts
    config = read("cluster.yaml")
    (head.home / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(prepared(read("deploy/cluster-ssh.yaml"))))
    made = head.run("~/ser-venv/bin/ray get-auth-token --generate && chmod 600 ~/.ray/auth_token")
    assert made.returncode == 0, made.stdout
    token = (head.home / ".ray/auth_token").read_text()
    (worker.home / ".ray").mkdir()
    (worker.home / ".ray/auth_token").write_text(token)  # as file_mounts would
    for host in hosts:
        launched(host, config["setup_commands"][:1], head)
        assert stat.S_IMODE((host.home / ".ray/auth_token").stat().st_mode) == 0o600

    printed = launched(head, config["head_start_ray_commands"], head)
    printed += launched(worker, config["worker_start_ray_commands"], head)
    assert token.strip() not in printed
    processes = head.run("cat /proc/[0-9]*/cmdline").stdout
    assert "gcs_server" in processes
    assert token.strip() not in processes

    probe = head.run(python(PROBE), RAY_AUTH_MODE="token", timeout_s=600)
    assert probe.returncode == 0, probe.stdout
    ran = json.loads(probe.stdout.partition("PROBE")[2].splitlines()[0])
    assert ran == {host.address: host.address for host in hosts}, "each node ran its task"

    home = worker.folder / "stranger"  # where no token is
    home.mkdir()
    (home / "ser-venv").symlink_to(sys.prefix)
    stranger = {"HOME": str(home)}
    gcs = python(JOIN.format(address=f"{head.address}:6379"))
    for refused in ({"RAY_AUTH_MODE": "disabled"} | stranger, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        answer = worker.run(gcs, timeout_s=600, **refused)
        assert answer.returncode != 0, refused
        assert "JOINED" not in answer.stdout
        assert re.search("(?i)unauthenticated|authentication|token", answer.stdout), answer.stdout[-2000:]
    assert "JOINED 2" in worker.run(gcs, RAY_AUTH_MODE="token", timeout_s=600).stdout, "the token opens"
    assert "ANSWER 401" in head.run(python(KNOCK.format(address="127.0.0.1:8265"))).stdout
    assert "CLOSED" in worker.run(python(KNOCK.format(address=f"{head.address}:8265"))).stdout

    for host in reversed(hosts):
        assert host.run("~/ser-venv/bin/ray stop").returncode == 0
        end_s = time.monotonic() + 30
        while "raylet" in (left := host.run(ALIVE).stdout):
            assert time.monotonic() < end_s, left
            time.sleep(0.2)
