"""What SECURITY.md promises: nothing is unpickled from files, the token is private, Ray listens on loopback."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cluster import submit
from tests.support.processes import LOOPBACK, listeners

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = [
    path
    for folder in ("pipeline", "jobs", "serve", "app_pages", "benchmarks", "lab", "samples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
# Between two tasks of one run, through Ray's object store, which pickles everything itself
UNPICKLES = {"pipeline/scoring/blocks.py": {"pickle.loads"}}
FORBIDDEN = {
    f"{module}.{name}"
    for module in ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
    for name in ("load", "loads", "Unpickler", "open")
}
# Ray Data's switches that unpickle what a file holds
SWITCHES = (
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION",
    "RAY_DATA_ARROW_EXTENSION_SERIALIZATION_CLOUDPICKLE",
)


def calls(source: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each call in ``source``: the dotted name that is called, and its keyword arguments as source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}


def unsafe(source: str) -> list[str]:
    """What in ``source`` would run code out of a file."""
    found = []
    for name, keywords in calls(source):
        if name in FORBIDDEN or name.endswith("read_pickle") or name in ("eval", "exec"):
            found.append(name)
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if keywords.get("allow_pickle", "False") != "False":
            found.append(f"{name} with allow_pickle")
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            found.append(name)
        if keywords.get("shell") == "True" or name == "os.system":
            found.append(f"{name} through a shell")
    return found


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "pickle.load(file)",
        "pd.read_pickle(path)",
        "subprocess.run(words, shell=True)",
        "yaml.load(text)",
    ],
)
def test_the_scanner_sees(line: str) -> None:
    assert len(unsafe(line)) == 1


def test_nothing_is_unpickled_from_files() -> None:
    assert len(PROGRAMS) > 100
    for path in PROGRAMS:
        name = path.relative_to(ROOT).as_posix()
        left = set(unsafe(path.read_text(encoding="utf-8"))) - UNPICKLES.get(name, set())
        assert not left, f"{name}: {sorted(left)}"


def test_names_are_not_imported_past_the_scanner() -> None:
    """``from pickle import loads`` would be a bare name."""
    for path in PROGRAMS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                assert not names & (FORBIDDEN | {"torch.load", "numpy.load"}), path


def test_rays_unpickling_switches_are_never_set() -> None:
    files = [
        *PROGRAMS,
        *(path for path in ROOT.glob("*") if path.suffix in (".yaml", ".toml") or path.name == "Makefile"),
    ]
    files += [path for path in (ROOT / "deploy").rglob("*") if path.is_file()]
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        assert not [switch for switch in SWITCHES if switch in text], path
    assert not [switch for switch in SWITCHES if switch in os.environ]


def test_the_switches_are_still_those_of_ray() -> None:
    """A Ray that renames or adds one must be looked at again."""
    import re

    import ray.data

    folder = Path(ray.data.__file__).parent
    pattern = re.compile(r"RAY_DATA_\w*(?:PICKLE|DESERIALIZATION)\w*")
    found = {name for path in folder.rglob("*.py") for name in pattern.findall(path.read_text(encoding="utf-8"))}
    assert found == set(SWITCHES)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without a token, and an environment without one."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_for_its_owner_only(home: Path) -> None:
    before = os.umask(0)
    try:
        submit.make_token()
    finally:
        os.umask(before)
    path = home / ".ray" / "auth_token"
    assert mode(path) == 0o600
    assert mode(path.parent) == 0o700
    assert len(bytes.fromhex(path.read_text())) == 32
    submit.make_token()
    assert len(path.read_text()) == 64, "a token that is there stays"


def test_a_token_that_everybody_can_read_is_taken_from_them(home: Path) -> None:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("old")
    path.chmod(0o644)
    submit.make_token()
    assert (path.read_text(), mode(path)) == ("old", 0o600)


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_TOKEN", "given"), ("RAY_AUTH_MODE", "disabled")])
def test_no_file_is_made_when_the_environment_says_otherwise(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    submit.make_token()
    assert list(home.iterdir()) == []


def test_the_token_is_sent_where_there_is_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not submit.use_token()
    assert "RAY_AUTH_MODE" not in os.environ
    submit.make_token()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert submit.use_token()
    assert os.environ["RAY_AUTH_MODE"] == "disabled", "what was set stays"
    monkeypatch.delenv("RAY_AUTH_MODE")
    submit.use_token()
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_a_local_ray_listens_on_loopback_only(ray_session: None) -> None:
    import ray

    assert ray.get(ray.remote(lambda: 1).remote()) == 1  # a worker with its own ports is up
    found = listeners(os.getpid())
    assert len(found) >= 4, "GCS, raylet and workers listen: is the scanner blind?"
    assert {address for address, _ in found} <= LOOPBACK


def test_a_local_ray_wants_its_token(ray_session: None) -> None:
    """A process with another token is not let in."""
    import ray

    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    code = (
        "import ray\n"
        "from ray._raylet import GcsClient\n"
        f"client = GcsClient(address={address!r})\n"
        "print('let in', len(client.get_all_node_info(timeout=5)))"
    )
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "let in" not in run.stdout, run.stdout
    right = {**environment, "RAY_AUTH_TOKEN": submit.token_file().read_text()}
    run = subprocess.run([sys.executable, "-c", code], env=right, capture_output=True, text=True, timeout=120)
    assert "let in 1" in run.stdout, run.stderr[-500:]
