"""The rules of the house: importing does no work, needs no POSIX; packages are declared and pinned; CI skips nothing.

Which room may import which, and who may import Ray, is checked by import-linter (pyproject.toml, ``make lint``).
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "jobs", "serve", "app_pages")
POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "pty"}
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text("utf-8"))
    for path in [*FILES, ROOT / "app.py"]
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """The packages that these statements import."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import, line {node.lineno}; write the package's name"
            found.add(node.module or "")
    return {name.split(".")[0] for name in found}


def normalised(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement)[0]).lower()


def test_no_module_needs_posix_to_be_imported() -> None:
    """Windows has none of these; a function that uses one asks for the platform first."""
    assert {name: imported(tree.body) & POSIX for name, tree in TREES.items() if imported(tree.body) & POSIX} == {}


def test_importing_every_module_writes_nothing_and_starts_nothing(tmp_path: Path) -> None:
    """In a fresh interpreter that stands in an empty folder; without the modules whose heads import Ray themselves."""
    names = [name for name, tree in TREES.items() if "ray" not in imported(tree.body) and name != "app"]
    assert len(names) > 100
    code = (
        f"import sys\nfor name in {sorted(names)!r}: __import__(name)\n"
        "import threading\nassert threading.active_count() == 1, threading.enumerate()\n"
        "assert 'ray' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_dependency_is_pinned_once_in_the_file_that_needs_it() -> None:
    needed = {
        "requirements.txt": [*PROJECT["dependencies"], *EXTRAS["serve"]],
        "requirements-app.txt": EXTRAS["app"],
        "requirements-dev.txt": [name for extra in EXTRAS.values() for name in extra],
    }
    pinned: list[str] = []
    for file, wanted in needed.items():
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        pins = [line for line in lines if line and not line.startswith(("#", "-r "))]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; .+)?", pin) for pin in pins), "every line pins one exact version"
        pinned += map(normalised, pins)
        assert set(map(normalised, wanted)) <= set(pinned), file
    assert len(pinned) == len(set(pinned)), "pinned twice"


def test_every_third_party_import_is_declared() -> None:
    declared = {normalised(name) for names in (PROJECT["dependencies"], *EXTRAS.values()) for name in names}
    provided_by = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "multipart": "python-multipart"}
    used = {name for tree in TREES.values() for name in imported(ast.walk(tree))}
    foreign = used - set(sys.stdlib_module_names) - {*PACKAGES, "typing_extensions"}  # that one for type checkers only
    assert {name for name in foreign if normalised(provided_by.get(name, name)) not in declared} == set()


SKIPPING = """
import pytest

def test_runs(): pass

@pytest.mark.skip(reason="needs a GPU")
def test_gpu(): pass

def test_other(): pytest.skip("no network")

@pytest.mark.xfail(reason="known")
def test_known(): assert False
"""


def test_in_ci_only_a_missing_gpu_excuses_a_skip(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    pytester.makeconftest((ROOT / "tests/conftest.py").read_text())
    pytester.makepyfile(test_some=SKIPPING, test_module="import pytest\npytest.importorskip('no_such_package')")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "--continue-on-collection-errors")
    result.assert_outcomes(passed=1, failed=1, skipped=1, xfailed=1, errors=1)
