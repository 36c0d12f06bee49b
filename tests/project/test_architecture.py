"""The rules of the house: importing does no work, needs no POSIX, and every package is declared and pinned.

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
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "jobs", "serve", "app_pages")


def _sources() -> dict[str, Path]:
    """Module name -> file, for every module of the project."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    files += [path for path in (ROOT / "app.py",) if path.is_file()]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, files, strict=True)}


SOURCES = _sources()


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"), filename=str(SOURCES[module]))


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _nodes(node: ast.AST, *, lazy: bool) -> Iterable[ast.AST]:
    """Nodes below ``node``, without ``if TYPE_CHECKING``; ``lazy`` goes into functions too."""
    for child in ast.iter_child_nodes(node):
        if _type_checking(child) or (not lazy and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        yield child
        yield from _nodes(child, lazy=lazy)


@cache
def imports(module: str, lazy: bool = True) -> frozenset[str]:
    """Dotted names that ``module`` imports; ``from a import b`` gives ``a`` and ``a.b``."""
    found: set[str] = set()
    for node in _nodes(_tree(module), lazy=lazy):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import, line {node.lineno}; write the package's name"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found)


def distributions(module: str, lazy: bool = True) -> set[str]:
    """First parts of the names that ``module`` imports."""
    return {name.split(".")[0] for name in imports(module, lazy)}


def test_the_scanner_sees_imports_in_all_their_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "probe.py"
    source.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
        "try:\n    import av\nexcept ImportError:\n    av = None\n"
        "class A:\n    from os import path as p\n    def f(self):\n        from ray import data\n"
    )
    monkeypatch.setitem(SOURCES, "probe_module", source)
    assert distributions("probe_module") == {"typing", "av", "os", "ray"}
    assert distributions("probe_module", lazy=False) == {"typing", "av", "os"}
    assert {"os.path", "ray.data"} <= imports("probe_module")


def test_no_module_needs_posix_to_be_imported() -> None:
    """Windows has none of these; a function that uses one asks for the platform first."""
    for module in SOURCES:
        assert not distributions(module, lazy=False) & {"fcntl", "resource", "pwd", "grp", "termios", "pty"}, module


@pytest.mark.docs
def test_the_walks_in_the_documents_name_what_is_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    walks = text.partition("\n## One recording's walk")[2].partition("\n## ")[0]
    names = [name for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", walks) if not name.endswith(".json")]
    assert len(names) > 30
    for name in names:
        full = name if name.split(".")[0] in PACKAGES else f"pipeline.{name}"
        module = max((m for m in SOURCES if f"{full}.".startswith(f"{m}.")), key=len)
        kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        defined = {node.name for node in ast.walk(_tree(module)) if isinstance(node, kinds)}
        assert set(full.removeprefix(module).split(".")[1:]) <= defined, name


def test_importing_every_module_writes_nothing_and_starts_nothing(tmp_path: Path) -> None:
    """In a fresh interpreter that stands in an empty folder; without the modules whose heads import Ray themselves."""
    names = [name for name in SOURCES if "ray" not in distributions(name, lazy=False) and name != "app"]
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


REQUIREMENTS = ("requirements.txt", "requirements-app.txt", "requirements-dev.txt")


def _pins(name: str) -> list[str]:
    """Names that a requirements file pins."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith(("#", "-r "))]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; .+)?", pin) for pin in pins), "every line pins one exact version"
    return [_normalised(pin.split("==")[0]) for pin in pins]


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned_once_in_the_file_that_needs_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = ([*project["dependencies"], *extras["serve"]], extras["app"], [d for e in extras.values() for d in e])
    available: set[str] = set()
    for file, wanted in zip(REQUIREMENTS, needed, strict=True):
        available |= set(_pins(file))
        assert {_normalised(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in wanted} <= available, file
    every = [name for file in REQUIREMENTS for name in _pins(file)]
    assert len(every) == len(set(every)), "pinned twice"


def test_every_third_party_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    declared = {_normalised(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in wanted}
    provided_by = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "multipart": "python-multipart"}
    used = {name for module in SOURCES for name in distributions(module)}
    foreign = used - set(sys.stdlib_module_names) - set(PACKAGES) - {"app"}
    undeclared = {name for name in foreign if _normalised(provided_by.get(name, name)) not in declared}
    assert not undeclared
