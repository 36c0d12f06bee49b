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


def block(section: str, language: str) -> str:
    """The one fenced block of a language in a section."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    body = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", body, flags=re.MULTILINE | re.DOTALL)
    return str(found)


def passes(command: list[str], tree: Path, text: str | None = None) -> str:
    """What a command prints that must succeed in the copied tree."""
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent), "PYTHONPATH": str(tree)}
    done = subprocess.run(
        command, input=text, cwd=tree, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return done.stdout


def test_the_examples_apply_follow_the_rules_and_pass_their_tests(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for folder in ("pipeline", "jobs", "serve"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "tests/support").mkdir(parents=True)
    for name in ("pyproject.toml", "tests/conftest.py", "tests/support/serving.py"):
        shutil.copy(ROOT / name, tree / name)
    tests = []
    for section in SECTIONS:
        passes(["git", "apply", "--whitespace=error", "-"], tree, block(section, "diff"))
        test = block(section, "python")
        tests += re.findall(r"\A# (tests/\w+/test_\w+\.py)\n", test)
        (tree / tests[-1]).parent.mkdir(exist_ok=True)
        (tree / tests[-1]).write_text(test, encoding="utf-8")
    for arguments in (["format", "--check"], ["check"]):  # tests need no docstrings and types
        passes([sys.executable, "-m", "ruff", *arguments, "pipeline", "jobs", "serve"], tree)
    told = passes([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], tree)
    assert "\n4 passed" in told
