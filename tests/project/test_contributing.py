"""The worked examples of CONTRIBUTING.md: their diffs fit this tree, and their tests pass on it, all four together."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.docs
ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("Add a corpus", "Add a model", "Add an augmentation", "Add an endpoint")
COPIED = ("pipeline", "jobs", "serve", "pyproject.toml")


def block(section: str, language: str) -> str:
    """The one fenced block of a language in a section."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    body = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", body, flags=re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the examples change and need, all four diffs applied, their tests written."""
    copy = tmp_path_factory.mktemp("tree")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    (copy / "tests/support").mkdir(parents=True)
    for name in ("conftest.py", "support/serving.py"):
        shutil.copy(ROOT / "tests" / name, copy / "tests" / name)
    for section in SECTIONS:
        patch = ["git", "apply", "--whitespace=error", "-"]
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(copy.parent)}
        applied = subprocess.run(
            patch, input=block(section, "diff"), cwd=copy, env=environment, capture_output=True, text=True
        )
        assert applied.returncode == 0, f"{section}: {applied.stderr}"
        test = block(section, "python")
        (name,) = re.findall(r"\A# (tests/\w+/test_\w+\.py)\n", test)
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(test, encoding="utf-8")
    return copy


def test_the_examples_follow_the_rules_of_this_code(tree: Path) -> None:
    """Formatted and clean as everything here (tests need no docstrings and types)."""
    for arguments in (["format", "--check"], ["check"]):
        ruff = [sys.executable, "-m", "ruff", *arguments, "pipeline", "jobs", "serve"]
        checked = subprocess.run(ruff, cwd=tree, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_the_tests_of_the_examples_pass(tree: Path) -> None:
    names = sorted(str(path.relative_to(tree)) for path in (tree / "tests").rglob("test_*.py"))
    assert len(names) == len(SECTIONS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    ran = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "\n4 passed" in ran.stdout
