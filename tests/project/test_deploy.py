"""The manifests for Kubernetes and the image: field names, names that must agree, options that the jobs understand.

KubeRay's fields are those of its API reference (``ray.io/v1``, 1.6); a misspelt one would be dropped or refused there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = ("rayjob-train.yaml", "rayjob-score.yaml", "rayservice.yaml")
CLUSTER = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
FIELDS = {
    "RayJob": {
        *("entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit"),
        *("submitterConfig", "submitterPodTemplate", "rayClusterSpec"),
    },
    "RayService": {"serveConfigV2", "rayClusterConfig"},
    "cluster": {
        *("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions"),
        *("headGroupSpec", "workerGroupSpecs"),
    },
    "head": {"rayStartParams", "template"},
    "worker": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
    "pod": {"securityContext", "containers", "volumes", "restartPolicy"},
    "container": {
        *("name", "image", "securityContext", "env", "ports", "resources"),
        *("readinessProbe", "livenessProbe", "volumeMounts"),
    },
    "probe": {"exec", "initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold"},
}


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))
    return content


def cluster_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["spec"][CLUSTER[manifest["kind"]]]
    return found


def pods(manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod of the head first."""
    cluster = cluster_of(manifest)
    yield cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["template"]["spec"]
    if "submitterPodTemplate" in manifest["spec"]:
        yield manifest["spec"]["submitterPodTemplate"]["spec"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_field_is_known(name: str) -> None:
    manifest = read(name)
    kind, cluster = manifest["kind"], cluster_of(manifest)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(manifest["spec"]) <= FIELDS[kind]
    assert set(cluster) <= FIELDS["cluster"]
    assert set(cluster["headGroupSpec"]) == FIELDS["head"]
    assert all(set(group) == FIELDS["worker"] for group in cluster["workerGroupSpecs"])
    for pod in pods(manifest):
        assert set(pod) <= FIELDS["pod"]
        (container,) = pod["containers"]
        assert set(container) <= FIELDS["container"]
        for probe in ("readinessProbe", "livenessProbe"):
            assert set(container.get(probe, {})) <= FIELDS["probe"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_cluster_is_the_ray_of_the_image_and_asks_for_the_token(name: str) -> None:
    cluster = cluster_of(read(name))
    pinned = re.search(r"^ray==(.+)$", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    assert cluster["rayVersion"] == pinned[1] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_are_alike_and_without_privileges(name: str) -> None:
    manifest = read(name)
    assert len({pod["containers"][0]["image"] for pod in pods(manifest)}) == 1, "one image: Ray and Python must agree"
    for pod in pods(manifest):
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_ray_pods_have_the_shared_folder_shared_memory_and_probes(name: str) -> None:
    claim = read("volume.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    manifest = read(name)
    for number, pod in enumerate(pods(manifest)):
        (container,) = pod["containers"]
        if container["name"] == "ray-job-submitter":
            continue
        assert container["name"] == ("ray-worker" if number else "ray-head")
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/mnt/ser"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert "local_raylet_healthz" in container["livenessProbe"]["exec"]["command"][-1]
        assert ("gcs_healthz" in container["livenessProbe"]["exec"]["command"][-1]) == (number == 0)
    ports = {port["name"]: port["containerPort"] for port in next(pods(manifest))["containers"][0]["ports"]}
    assert {"gcs-server": 6379, "dashboard": 8265}.items() <= ports.items()


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name.startswith("rayjob")])
def test_the_job_understands_its_entrypoint(name: str) -> None:
    manifest = read(name)
    python, dash_m, module, *options = shlex.split(manifest["spec"]["entrypoint"])
    assert (python, dash_m) == ("python", "-m")
    arguments = import_module(module).build_parser().parse_args(options)
    assert str(arguments.out).startswith("/mnt/ser/")
    assert arguments.tolerate_failures, "one broken recording must not fail the job"
    assert manifest["spec"]["shutdownAfterJobFinishes"] is True
    gpus = [pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", "0") for pod in pods(manifest)]
    if module == "jobs.train":
        (group,) = cluster_of(manifest)["workerGroupSpecs"]
        assert arguments.num_workers == group["replicas"] * int(gpus[1])
        assert arguments.recipe == Path("/opt/ser/models/inception_ser_final")
        assert (ROOT / arguments.recipe.relative_to("/opt/ser")).is_dir()
    else:
        assert set(gpus) == {"0"}


def test_the_service_is_the_one_of_serve() -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.ray_settings import MESSAGE_BYTES, VARIABLES, longest_message
    from serve.schema import API_KEY_VARIABLE
    from serve.settings import Settings

    manifest = read("rayservice.yaml")
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    ours = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "serve/config.yaml").read_text(encoding="utf-8")))
    (application,) = config.applications
    assert application.import_path == ours.applications[0].import_path
    wanted = VARIABLES | {MESSAGE_BYTES: longest_message(Settings(**application.args))}
    assert config.http_options.request_timeout_s == ours.http_options.request_timeout_s
    for pod in list(pods(manifest)):
        environment = {entry["name"]: entry for entry in pod["containers"][0]["env"]}
        assert "valueFrom" in environment.pop(API_KEY_VARIABLE), "beyond loopback the service answers with a key only"
        in_proxy = environment.pop("SER_PROXY_SETTINGS")["value"]
        assert Settings.model_validate_json(in_proxy) == Settings(**application.args), "the proxy's room and limits"
        assert {name: entry["value"] for name, entry in environment.items()} == wanted
        assert {"containerPort": config.http_options.port, "name": "serve"} in pod["containers"][0]["ports"]


# --- the image ---


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, rest of it)."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", "").splitlines() if line.strip()]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def test_the_image_runs_without_root_and_tells_its_health() -> None:
    last: dict[str, str] = {}
    for name, rest in instructions():
        last = {} if name == "FROM" else last | {name: rest}
    assert last["USER"] == "1000:1000"
    assert "/v2/health/live" in last["HEALTHCHECK"]
    assert "RAY_AUTH_MODE=token" in last["ENV"]
    assert yaml.safe_load(last["CMD"])[:3] == ["python", "-m", "jobs.serve"]


def test_the_image_holds_pinned_versions_only() -> None:
    bases = [rest for name, rest in instructions() if name == "FROM"]
    assert all(re.match(r"python:\$\{PYTHON\}-slim-\w+", base) for base in bases)
    installs = [
        part for name, rest in instructions() if name == "RUN" for part in rest.split("&&") if "pip install" in part
    ]
    assert len(installs) == 4
    for command in installs:
        held = ("--constraint requirements-dev.txt", "requirements.txt)", "--no-deps", "uv==")
        assert any(word in command for word in held), command
    assert any('--torch-backend "$TORCH_BACKEND"' in command for command in installs)
    assert ("ARG", "TORCH_BACKEND=cpu") in instructions()


def test_what_the_image_copies_is_sent_to_docker_and_nothing_else() -> None:
    patterns = [p for p in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if p and p[0] != "#"]

    def sent(path: str) -> bool:
        kept = True
        for pattern in patterns:
            bare = pattern.lstrip("!")
            short = bare.removeprefix("**/")
            if (
                fnmatch(path, bare)
                or path.startswith(f"{bare}/")
                or (short != bare and fnmatch(Path(path).name, short))
            ):
                kept = pattern.startswith("!")
        return kept

    copied = [
        source
        for name, rest in instructions()
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert len(copied) >= 8
    for source in copied:
        assert (ROOT / source).exists(), source
        assert sent(source), source
    refused = (".git/config", ".venv/bin/python", "runs/first/checkpoint.pt", "features/part-00000.parquet", "a.wav")
    assert not [path for path in (*refused, "models/inception_ser_final/model.onnx", "tests/conftest.py") if sent(path)]
