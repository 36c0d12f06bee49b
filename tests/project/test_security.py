"""What SECURITY.md promises: nothing is unpickled from files, the token is private, Ray listens on loopback."""

from __future__ import annotations

import ast
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import ray.data

from pipeline.cluster import submit
from tests.support.processes import LOOPBACK, listeners

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("pipeline", "jobs", "serve", "app_pages", "benchmarks", "lab", "samples")
PROGRAMS = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
# Between two tasks of one run, through Ray's object store, which pickles everything itself
UNPICKLES = {"pipeline/scoring/blocks.py": {"pickle.loads"}}
FORBIDDEN = {
    f"{module}.{name}"
    for module in ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
    for name in ("load", "loads", "Unpickler", "open")
} | {"eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
# Ray Data's switches that unpickle what a file holds
SWITCHES = {
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION",
    "RAY_DATA_ARROW_EXTENSION_SERIALIZATION_CLOUDPICKLE",
}


def unsafe(source: str) -> set[str]:
    """What in ``source`` would run code out of a file or through a shell, and imports that would hide it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):  # a bare name later
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & (FORBIDDEN | {"torch.load", "numpy.load"})
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
        wrong_option = (
            (name == "torch.load" and keywords.get("weights_only") != "True")
            or keywords.get("allow_pickle", "False") != "False"
            or keywords.get("shell") == "True"
        )
        if name in FORBIDDEN or name.endswith("read_pickle") or wrong_option:
            found.add(name)
    return found


def test_nothing_is_unpickled_from_files() -> None:
    for line in (
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "pickle.load(file)",
        "pd.read_pickle(path)",
        "subprocess.run(words, shell=True)",
        "yaml.load(text)",
        "from pickle import loads",
    ):
        assert len(unsafe(line)) == 1, "the scanner is blind"
    assert len(PROGRAMS) > 100
    for path in PROGRAMS:
        name = path.relative_to(ROOT).as_posix()
        assert unsafe(path.read_text(encoding="utf-8")) - UNPICKLES.get(name, set()) == set(), name


def test_rays_unpickling_switches_are_never_set_and_still_those_of_ray() -> None:
    settings = [path for path in ROOT.glob("*") if path.suffix in (".yaml", ".toml") or path.name == "Makefile"]
    settings += [path for path in (ROOT / "deploy").rglob("*") if path.is_file()]
    for path in (*PROGRAMS, *settings):
        text = path.read_text(encoding="utf-8", errors="replace")
        assert not [switch for switch in SWITCHES if switch in text], path
    assert not SWITCHES & set(os.environ)
    pattern = re.compile(r"RAY_DATA_\w*(?:PICKLE|DESERIALIZATION)\w*")
    sources = Path(ray.data.__file__).parent.rglob("*.py")
    found = {name for path in sources for name in pattern.findall(path.read_text(encoding="utf-8"))}
    assert found == SWITCHES, "look at what Ray has renamed or added"


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the token would be, in a home folder and an environment without one."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".ray" / "auth_token"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_for_its_owner_only_and_stays(token: Path) -> None:
    before = os.umask(0)
    try:
        submit.make_token()
    finally:
        os.umask(before)
    assert mode(token) == 0o600
    assert mode(token.parent) == 0o700
    made = token.read_text()
    assert len(bytes.fromhex(made)) == 32
    token.chmod(0o644)
    submit.make_token()
    assert (token.read_text(), mode(token)) == (made, 0o600)


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_TOKEN", "given"), ("RAY_AUTH_MODE", "disabled")])
def test_no_file_is_made_when_the_environment_says_otherwise(
    token: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    submit.make_token()
    assert not token.parent.exists()


def test_the_token_is_sent_where_there_is_one(token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not submit.use_token()
    assert "RAY_AUTH_MODE" not in os.environ
    submit.make_token()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert submit.use_token()
    assert os.environ["RAY_AUTH_MODE"] == "disabled", "what was set stays"
    monkeypatch.delenv("RAY_AUTH_MODE")
    submit.use_token()
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_a_local_ray_listens_on_loopback_only_and_wants_its_token(ray_session: None) -> None:
    assert ray.get(ray.remote(lambda: 1).remote()) == 1  # a worker with its own ports is up
    found = listeners(os.getpid())
    assert len(found) >= 4, "GCS, raylet and workers listen: is the scanner blind?"
    assert {address for address, _ in found} <= LOOPBACK
    code = (
        "from ray._raylet import GcsClient\n"
        f"client = GcsClient(address={ray.get_runtime_context().gcs_address!r})\n"
        "print('let in', len(client.get_all_node_info(timeout=5)))"
    )
    wrong, right = (
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
            capture_output=True,
            text=True,
            timeout=120,
        )
        for token in ("0" * 64, submit.token_file().read_text())
    )
    assert "let in" not in wrong.stdout
    assert "let in 1" in right.stdout, right.stderr[-500:]
