"""A wheel stands alone: built here, unpacked elsewhere, it answers like the project's folder, with the model inside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_an_unpacked_wheel_answers_like_the_project(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in ("pipeline", "jobs", "serve", "models"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.onnx", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*wheel, "-w", tmp_path, source], check=True, cwd=tmp_path)
    (built,) = tmp_path.glob("*.whl")
    assert built.stat().st_size < 20e6
    with zipfile.ZipFile(built) as archive:
        archive.extractall(tmp_path / "site")
    recording = ROOT / "samples" / "anna_calm_letter.flac"
    answers = []
    for place in (tmp_path / "site", ROOT):
        told = subprocess.run(
            [sys.executable, "-c", INFER, place, recording],
            check=True,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(place)},
        )
        answers.append(json.loads(told.stdout))
    assert answers[0] == answers[1]


INFER = """
import sys, pipeline
from pathlib import Path
from jobs import infer
from pipeline.models.bundle import DEFAULT_BUNDLE
place = Path(sys.argv[1])
assert place in Path(pipeline.__file__).parents and place in DEFAULT_BUNDLE.parents
raise SystemExit(infer.main(["--file", sys.argv[2], "--json", "--backend", "torch"]))
"""
