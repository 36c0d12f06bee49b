"""Elsewhere it works the same: as an unpacked wheel, and where the names that Windows lacks are missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from audio_recordings import FORMATS, encoded, voice

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
INFER = """
import sys, pipeline
from pathlib import Path
from jobs import infer
from pipeline.models.bundle import DEFAULT_BUNDLE
place = Path(sys.argv[1])
assert place in Path(pipeline.__file__).parents and place in DEFAULT_BUNDLE.parents
raise SystemExit(infer.main(["--file", sys.argv[2], "--json", "--backend", "torch"]))
"""
FLOW = """
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa

assert "ser_without_unix" in sys.modules
from jobs.cli import main
from pipeline.audio import load as audio
from pipeline.audio import source as audio_guard

assert not hasattr(audio_guard.os, "pread") and audio_guard.os.name == "nt"
folder, out = Path(sys.argv[1]), Path(sys.argv[2])

assert main(["infer", "--file", str(folder / "*.*")]) == 0
assert main(["infer", "--json", "--window_s", "1", "--file", *map(str, folder.glob("*.wav"))]) == 0
assert main(["score", "--input", str(folder), "--out", str(out / "scores"), "--num_cpus", "0"]) == 0
scores = pd.read_parquet(out / "scores" / "predictions.parquet")
assert (scores["status"] == "ok").all() and len(scores) == len(list(folder.iterdir()))

from pipeline.audio.isolated import decode_in_subprocess
from pipeline.features.features import FeatureConfig
from pipeline.features.extract import BlockWriter, ShardOptions

table = scores[["speech"]].assign(label="sad", _block=0, _row=range(len(scores)))
schema = pa.Schema.from_pandas(table[["speech", "label"]], preserve_index=False)
(out / "features").mkdir()
writer = BlockWriter(out / "features", schema, FeatureConfig(), ShardOptions())
assert writer(table) == (len(table), 0)
first = scores["speech"][0]
assert (decode_in_subprocess(first).samples == audio.load_middle(first).samples).all()

from toy_data import LABELS, write_features
from pipeline.features.store import load_features
from pipeline.training.config import FitConfig
from pipeline.training.plan import Plan
from pipeline.training.run import begin, train_here
from pipeline.data.splits import split_table

features = write_features(out / "toy", copies=1)
whole = load_features(features).table
config = FitConfig(epochs=1, batch_size=16, threads=1)
plan = Plan(out / "run", (features,), LABELS, "inception", {"width": 0.25}, config)
begin(plan, split_table(whole[whole["parent_id"] == ""]))
train_here(plan)

from serving import LocalService, form
from pipeline.models.bundle import load_bundle

service = LocalService(load_bundle(None))
data = Path(first).read_bytes()
for path, fields in (("/v1/predict", {"picture": "true"}), ("/v1/predict", {"window_s": 1}), ("/v1/explain", {})):
    answer = service.post(path, **form(data, **fields))
    assert answer.status_code == 200, answer.text
print("all of it")
"""


def told(code: str, *words: Path, cwd: Path, env: dict[str, str]) -> str:
    """What a program prints, in a process of its own, that must end well."""
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
    in_site, here = (
        json.loads(told(INFER, place, recording, cwd=tmp_path, env={"PYTHONPATH": str(place)}))
        for place in (tmp_path / "site", ROOT)
    )
    assert in_site == here


def test_nothing_needs_what_windows_lacks(tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    for container, codec, rate_hz, channels, _ in FORMATS[::3]:
        extension = {"WAVEX": "wav", "RF64": "wav", "AIFF": "aiff"}.get(container, container.lower())
        path = folder / f"{container}_{codec}_{rate_hz}.{extension}"
        path.write_bytes(encoded(voice(2.5, rate_hz, channels), rate_hz, container, codec))
    (folder / "三.mp3").write_bytes(encoded(voice(2.5, 16_000), 16_000, "MP3", "MPEG_LAYER_III"))
    (tmp_path / "out").mkdir()
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, (SUPPORT / "without_unix", ROOT, ROOT / "tests", SUPPORT))),
        "PYTHONIOENCODING": "cp1252",  # a console of Western Europe
    }
    printed = told(FLOW, folder, tmp_path / "out", cwd=ROOT, env=environment)
    assert printed.endswith("all of it\n")
    assert "\\u4e09.mp3" in printed
