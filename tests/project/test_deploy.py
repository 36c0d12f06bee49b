"""The manifests for Kubernetes and the image: field names, names that must agree, options that the jobs understand."""

from __future__ import annotations

import re
import shlex
from fnmatch import fnmatch
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve.ray_settings import MESSAGE_BYTES, VARIABLES, longest_message
from serve.schema import API_KEY_VARIABLE
from serve.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = ("rayjob-train.yaml", "rayjob-score.yaml", "rayservice.yaml")
CLUSTER = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
# Of KubeRay's API reference (ray.io/v1, 1.6); a misspelt field would be dropped or refused there
FIELDS = {
    "RayJob": "entrypoint shutdownAfterJobFinishes ttlSecondsAfterFinished activeDeadlineSeconds backoffLimit "
    "submitterConfig submitterPodTemplate rayClusterSpec",
    "RayService": "serveConfigV2 rayClusterConfig",
    "cluster": "rayVersion authOptions enableInTreeAutoscaling autoscalerOptions headGroupSpec workerGroupSpecs",
    "head": "rayStartParams template",
    "worker": "groupName replicas minReplicas maxReplicas rayStartParams template",
    "pod": "securityContext containers volumes restartPolicy",
    "container": "name image securityContext env ports resources readinessProbe livenessProbe volumeMounts",
    "probe": "exec initialDelaySeconds periodSeconds timeoutSeconds failureThreshold",
}


def known(part: str, found: dict[str, Any]) -> bool:
    return set(found) <= set(FIELDS[part].split())


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))
    return content


def parts(manifest: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """The cluster; the pods, that of the head first and that of a submitter last; and the one container of each."""
    cluster = manifest["spec"][CLUSTER[manifest["kind"]]]
    templates = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    if "submitterPodTemplate" in manifest["spec"]:
        templates.append(manifest["spec"]["submitterPodTemplate"])
    pods = [template["spec"] for template in templates]
    return cluster, pods, [container for pod in pods for container in pod["containers"]]


@pytest.mark.parametrize("name", MANIFESTS)
def test_fields_are_known_and_pods_alike_without_privileges(name: str) -> None:
    manifest = read(name)
    cluster, pods, containers = parts(manifest)
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert manifest["apiVersion"] == "ray.io/v1"
    assert known(manifest["kind"], manifest["spec"])
    assert known("cluster", cluster)
    assert known("head", cluster["headGroupSpec"])
    assert all(known("worker", group) for group in cluster["workerGroupSpecs"])
    assert cluster["rayVersion"] == version("ray")
    assert f"\nray=={version('ray')}\n" in (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert len({container["image"] for container in containers}) == 1, "one image: Ray and Python must agree"
    for pod, container in zip(pods, containers, strict=True):
        assert known("pod", pod)
        assert known("container", container)
        assert known("probe", container.get("readinessProbe", {}) | container.get("livenessProbe", {}))
        wanted = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
        assert wanted.items() <= pod["securityContext"].items()
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_ray_pods_have_the_shared_folder_shared_memory_and_probes(name: str) -> None:
    claim = read("volume.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    _, pods, containers = parts(read(name))
    ports = {port["name"]: port["containerPort"] for port in containers[0]["ports"]}
    assert {"gcs-server": 6379, "dashboard": 8265}.items() <= ports.items()
    for number, (pod, container) in enumerate(zip(pods, containers, strict=True)):
        if container["name"] == "ray-job-submitter":
            continue
        assert container["name"] == ("ray-worker" if number else "ray-head")
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/mnt/ser"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        probe = container["livenessProbe"]["exec"]["command"][-1]
        assert "local_raylet_healthz" in probe
        assert ("gcs_healthz" in probe) == (number == 0)


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name.startswith("rayjob")])
def test_the_job_understands_its_entrypoint(name: str) -> None:
    manifest = read(name)
    cluster, _, containers = parts(manifest)
    python, dash_m, module, *options = shlex.split(manifest["spec"]["entrypoint"])
    assert (python, dash_m) == ("python", "-m")
    arguments = import_module(module).build_parser().parse_args(options)
    assert str(arguments.out).startswith("/mnt/ser/")
    assert arguments.tolerate_failures, "one broken recording must not fail the job"
    assert manifest["spec"]["shutdownAfterJobFinishes"] is True
    gpus = [container["resources"]["limits"].get("nvidia.com/gpu", "0") for container in containers]
    if module == "jobs.train":
        (group,) = cluster["workerGroupSpecs"]
        assert arguments.num_workers == group["replicas"] * int(gpus[1])
        assert arguments.recipe == Path("/opt/ser/models/inception_ser_final")
        assert (ROOT / arguments.recipe.relative_to("/opt/ser")).is_dir()
    else:
        assert set(gpus) == {"0"}


def test_the_service_is_the_one_of_serve() -> None:
    manifest = read("rayservice.yaml")
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    ours = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "serve/config.yaml").read_text(encoding="utf-8")))
    (application,) = config.applications
    assert application.import_path == ours.applications[0].import_path
    assert config.http_options.request_timeout_s == ours.http_options.request_timeout_s
    settings = Settings(**application.args)
    for container in parts(manifest)[2]:
        environment = {entry["name"]: entry for entry in container["env"]}
        assert "valueFrom" in environment.pop(API_KEY_VARIABLE), "beyond loopback the service answers with a key only"
        in_proxy = environment.pop("SER_PROXY_SETTINGS")["value"]
        assert Settings.model_validate_json(in_proxy) == settings, "the proxy's room and limits"
        values = {name: entry["value"] for name, entry in environment.items()}
        assert values == VARIABLES | {MESSAGE_BYTES: longest_message(settings)}
        assert {"containerPort": config.http_options.port, "name": "serve"} in container["ports"]


DOCKERFILE = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
LAST_STAGE = DOCKERFILE.rpartition("\nFROM ")[2]


def instructions(wanted: str, text: str = DOCKERFILE) -> list[str]:
    """What follows an instruction, each time it is there."""
    lines = (line.strip().partition(" ") for line in text.replace("\\\n", "").splitlines())
    return [rest for name, _, rest in lines if name == wanted]


def test_the_image_runs_without_root_tells_its_health_and_holds_pinned_versions_only() -> None:
    assert instructions("USER", LAST_STAGE) == ["1000:1000"]
    (environment,), (command,), (health,) = (instructions(name, LAST_STAGE) for name in ("ENV", "CMD", "HEALTHCHECK"))
    assert "RAY_AUTH_MODE=token" in environment
    assert yaml.safe_load(command)[:3] == ["python", "-m", "jobs.serve"]
    assert "/v2/health/live" in health
    assert all(re.match(r"python:\$\{PYTHON\}-slim-\w+", base) for base in instructions("FROM"))
    installs = [part for rest in instructions("RUN") for part in rest.split("&&") if "pip install" in part]
    assert len(installs) == 4
    for install in installs:
        held = ("--constraint requirements-dev.txt", "requirements.txt)", "--no-deps", "uv==")
        assert any(word in install for word in held), install
    assert any('--torch-backend "$TORCH_BACKEND"' in install for install in installs)
    assert "TORCH_BACKEND=cpu" in instructions("ARG")


def test_what_the_image_copies_is_sent_to_docker_and_nothing_else() -> None:
    patterns = [p for p in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if p and p[0] != "#"]

    def sent(path: str) -> bool:
        kept = True
        for pattern in patterns:
            bare = pattern.lstrip("!")
            anywhere = bare.startswith("**/") and fnmatch(Path(path).name, bare.removeprefix("**/"))
            if fnmatch(path, bare) or path.startswith(f"{bare}/") or anywhere:
                kept = pattern.startswith("!")
        return kept

    copied = [name for rest in instructions("COPY") if not rest.startswith("--from") for name in rest.split()[:-1]]
    assert len(copied) >= 8
    assert [name for name in copied if not (ROOT / name).exists() or not sent(name)] == []
    private = (".git/config", ".venv/bin/python", "runs/first/checkpoint.pt", "features/part-00000.parquet", "a.wav")
    assert not [path for path in (*private, "models/inception_ser_final/model.onnx", "tests/conftest.py") if sent(path)]
