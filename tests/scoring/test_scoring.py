"""Scoring a manifest: with Ray and without, one row a recording in order, resumed, refused, crashes survived."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from bundles import resaved
from threadpoolctl import threadpool_info

from jobs import infer
from pipeline.data.manifest import scan_folder
from pipeline.features.extract import ShardOptions, extract_shards
from pipeline.features.store import load_features
from pipeline.inference.predictor import Predictor, ScoreOptions
from pipeline.models.backends import ensure_onnx
from pipeline.models.bundle import Bundle
from pipeline.scoring import scoring
from pipeline.scoring.blocks import REFUSAL, Classifier, Task, listen_block, make_block, or_refusal, score_block
from pipeline.scoring.ledger import LedgerError, open_ledger
from pipeline.scoring.predictions import read_predictions
from pipeline.scoring.scoring import Execution, ScoreRun, score_manifest
from pipeline.storage.errors import SerError

pytestmark = pytest.mark.usefixtures("undrawn")
WriteAudio = Callable[..., Path]
CHILD = Execution(engine="local", num_cpus=1)
HERE = pytest.mark.usefixtures("in_this_process")
ON_RAY = pytest.mark.usefixtures("ray_session")
ROOT = Path(__file__).resolve().parents[2]
CRASHING_RATE_HZ = 12_345


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Bundle) -> Bundle:
    ensure_onnx(tiny_bundle)
    return tiny_bundle


@pytest.fixture(scope="module")
def manifest(ravdess_like: Path) -> pd.DataFrame:
    """64 recordings, labelled, in an order of their own."""
    return scan_folder(ravdess_like).sample(frac=1.0, random_state=0).reset_index(drop=True)


def probabilities(table: pd.DataFrame) -> np.ndarray:
    return table[[name for name in table.columns if name.startswith("p_")]].to_numpy()


def score(table: pd.DataFrame, out: Path, bundle: Bundle, execution: Execution = CHILD, **how: Any) -> ScoreRun:
    return score_manifest(table, out, weights=bundle.folder, execution=execution, **{"report": False} | how)


@ON_RAY
def test_shard_predictor_infer_and_score_agree(
    bundle: Bundle, manifest: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some, predictor = manifest.head(12), Predictor.from_bundle(bundle.folder, threads=1)
    expected = np.array([p.probabilities for p in predictor.predict(some["speech"].tolist())])
    assert np.ptp(expected, axis=0).max() > 0.1, "the recordings sound alike: this test cannot fail"

    extract_shards(some, tmp_path / "features", bundle.features, options=ShardOptions(mel_power_s=0))
    by_shard = predictor.probabilities(np.asarray(load_features(tmp_path / "features").features))
    np.testing.assert_allclose(by_shard, expected, atol=1e-5)

    for name, execution in (("ray", Execution(num_cpus=2, block_rows=5)), ("child", CHILD)):
        score(some, tmp_path / name, bundle, execution, report=True)
        np.testing.assert_allclose(probabilities(read_predictions(tmp_path / name)), expected, atol=1e-5)

    assert infer.main(["--model_weights", str(bundle.folder), "--json", "--file", *some["speech"]]) == 0
    answers = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose([list(a["probabilities"].values()) for a in answers], expected, atol=1e-5)
    assert [list(a["probabilities"]) for a in answers] == [list(bundle.labels)] * 12


BROKEN: dict[str, bytes] = {
    "empty.wav": b"",
    "text.wav": b"no audio at all, only words\n" * 20,
    "riff.wav": b"RIFF\xff\xff\xff\xffWAVE",
    "noise.flac": bytes(range(256)) * 8,
    "magic.ogg": b"OggS" + bytes(60),
    "zeros.mp3": bytes(4096),
}


@ON_RAY
def test_ten_broken_among_good_ones(bundle: Bundle, manifest: pd.DataFrame, tmp_path: Path) -> None:
    good = Path(manifest["speech"][0]).read_bytes()
    broken = BROKEN | {"cut.wav": good[:-2000], "stub.wav": good[:20]}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.wav").mkdir()
    bad = [str(tmp_path / name) for name in [*broken, "folder.wav", "gone.wav"]]
    (tmp_path / "link.wav").symlink_to(manifest["speech"][0])
    fine = [str(tmp_path / "link.wav"), *manifest["speech"]]
    rows = [path for pair in zip(fine, bad, strict=False) for path in pair]
    seen: list[tuple[int, int, int]] = []
    run = score(
        pd.DataFrame({"speech": rows, "n": range(20)}),
        tmp_path / "out",
        bundle,
        Execution(num_cpus=2, block_rows=3),
        on_progress=lambda *now: seen.append(now),
    )
    found = read_predictions(tmp_path / "out")
    assert list(found["speech"]) == rows
    assert list(found["n"]) == list(range(20))
    assert list(found["status"] == "ok") == [True, False] * 10
    assert (run.rows, run.failed, run.scored) == (20, 10, 20)
    assert found["error"][1::2].str.len().gt(10).all()
    assert not found["error"][1::2].str.contains("\n").any()
    codes = dict(zip([*broken, "folder.wav", "gone.wav"], found["status"][1::2], strict=True))
    told = {"empty.wav": "empty_file", "cut.wav": "truncated", "folder.wav": "not_a_file", "gone.wav": "not_found"}
    assert told.items() <= codes.items()
    assert "internal_error" not in codes.values()
    assert (seen[0], seen[-1]) == ((0, 20, 0), (20, 20, 10))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["rows"], record["ok"], record["failed"]) == (20, 10, 10)
    assert sum(record["statuses"].values()) == 20


@HERE
def test_labelled_rows_are_evaluated_and_doubt_changes_no_evaluation(
    bundle: Bundle, manifest: pd.DataFrame, tmp_path: Path
) -> None:
    table = manifest.head(16)
    plain = score(table, tmp_path / "plain", bundle, report=True)
    strict = score(table, tmp_path / "strict", bundle, report=True, options=ScoreOptions(min_confidence=0.999))
    assert set(read_predictions(tmp_path / "strict")["predicted"]) == {"uncertain"}
    assert plain.evaluation is not None
    assert strict.evaluation is not None
    assert plain.evaluation["overall"] == strict.evaluation["overall"]
    found = read_predictions(tmp_path / "plain")
    assert list(found["label_name"]) == list(table["label"])
    accuracy = (found["label_name"] == found["predicted"]).mean()
    assert plain.evaluation["overall"]["accuracy"]["value"] == pytest.approx(accuracy)
    assert "<html" in (tmp_path / "plain" / "report.html").read_text(encoding="utf-8")


@HERE
@pytest.mark.parametrize("what", ["model", "options", "row", "recording", "temperature"])
def test_another_run_is_refused(what: str, bundle: Bundle, manifest: pd.DataFrame, tmp_path: Path) -> None:
    copy, out = tmp_path / "a.wav", tmp_path / "out"
    shutil.copy(manifest["speech"][0], copy)
    table = pd.DataFrame({"speech": [str(copy), manifest["speech"][1]], "note": ["x", "y"]})
    score(table, out, bundle)
    before = (out / "predictions.parquet").read_bytes()
    weights, options = bundle, ScoreOptions()
    if what == "options":
        options = ScoreOptions(crops=2)
    elif what == "row":
        table.loc[1, "note"] = "z"
    elif what == "recording":
        shutil.copy(manifest["speech"][5], copy)
        os.utime(copy, ns=(1, 1))
    else:
        state = bundle.state_dict()
        if what == "model":
            state[next(name for name in state if name.endswith("bias"))] += 1
        temperature = 2.0 if what == "temperature" else 1.0
        weights = resaved(bundle, tmp_path / "other", state_dict=state, temperature=temperature)
    with pytest.raises(LedgerError, match="--overwrite"):
        score(table, out, weights, options=options)
    assert (out / "predictions.parquet").read_bytes() == before
    assert score(table, out, weights, options=options, overwrite=True).scored == 2


@HERE
def test_only_missing_blocks_are_scored(
    bundle: Bundle, manifest: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off after two of four blocks, one of which is damaged then: the three missing ones are scored."""
    table, out, execution = manifest.head(16), tmp_path / "out", Execution(num_cpus=0, block_rows=4)
    assert score(table, tmp_path / "undisturbed", bundle, execution).scored == 16

    def stop(done: int, total: int, failed: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(table, out, bundle, execution, on_progress=stop)
    parts = sorted((out / ".score").glob("part-*.parquet"))
    assert [part.name for part in parts] == ["part-000000.parquet", "part-000001.parquet"]
    parts[1].write_bytes(parts[1].read_bytes()[:-100])
    asked: list[int] = []
    in_processes = scoring.in_processes

    def noting(blocks: Sequence[pa.Table], task: Task, processes: int) -> Iterator[pa.Table]:
        asked.extend(block["block"][0].as_py() for block in blocks)
        return in_processes(blocks, task, processes)

    monkeypatch.setattr(scoring, "in_processes", noting)
    run = score(table, out, bundle, execution)
    assert asked == [1, 2, 3]
    assert run.scored == 12
    pd.testing.assert_frame_equal(read_predictions(out), read_predictions(tmp_path / "undisturbed"))


def test_the_engine_fits_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    auto = Execution(num_cpus=2)
    assert [auto.chosen(n, walked=False) for n in (1, 1_000, 100_000)] == ["local", "local", "ray"]
    assert auto.chosen(1_000, walked=True) == "ray"
    assert Execution(num_cpus=0).chosen(10**6, walked=False) == "local"  # as earlier versions had it
    assert Execution(engine="ray").chosen(1, walked=False) == "ray"
    assert Execution(num_gpus=1).chosen(1, walked=False) == "ray"
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "{}")
            assert auto.chosen(1, walked=False) == "ray"
            assert Execution(engine="local").chosen(1, walked=False) == "local"
    with pytest.raises(SerError, match="uses no GPU"):
        Execution(engine="local", num_gpus=1)


def test_killed_processes_cost_a_retry_and_nothing_else(
    bundle: Bundle, manifest: pd.DataFrame, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each time a block is done, one of the processes is killed; the results are those of a run left in peace."""
    table, killed = manifest.head(8), 0

    def kill(done: int, total: int, failed: int) -> None:
        nonlocal killed
        for child in multiprocessing.active_children()[:1]:
            child.kill()
            killed += 1

    execution = Execution(engine="local", num_cpus=2, block_rows=2)
    run = score(table, tmp_path / "killed", bundle, execution, on_progress=kill)
    assert killed >= 2
    assert (run.rows, run.scored) == (8, 8)
    request.getfixturevalue("in_this_process")
    score(table, tmp_path / "calm", bundle, execution)
    pd.testing.assert_frame_equal(read_predictions(tmp_path / "calm"), read_predictions(tmp_path / "killed"))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ScoreOptions(crops=0), "crops"),
        (lambda: ScoreOptions(min_confidence=1.5), "min_confidence"),
        (lambda: ScoreOptions(hop_s=1.0), "--window_s"),
        (lambda: ScoreOptions(channels="each"), "--window_s"),
        (lambda: ScoreOptions(window_s=2.0, crops=3), "together"),
        (lambda: ScoreOptions(window_s=0.0), "window_s"),
        (lambda: ScoreOptions(window_s=2.0, hop_s=math.inf), "hop_s .* inf"),
        (lambda: ScoreOptions(silence_dbfs=-math.inf), "silence_dbfs .* -inf"),
        (lambda: ScoreOptions(silence_dbfs=math.nan), "silence_dbfs .* nan"),
        (lambda: Execution(batch_size=0), "batch_size"),
        (lambda: Execution(block_rows=0), "block_rows"),
    ],
)
def test_options_that_cannot_be(make: Callable[[], object], words: str) -> None:
    with pytest.raises(SerError, match=words):
        make()


@ON_RAY
def test_what_would_be_found_out_late_is_refused_early(bundle: Bundle, manifest: pd.DataFrame, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SerError, match="--window_s 2"):
        score(manifest, out, bundle, options=ScoreOptions(window_s=2.5))
    with pytest.raises(SerError, match="need windows"):
        score(manifest, out, bundle, merge=True)
    with pytest.raises(SerError, match="nothing to score"):
        score(manifest.head(0), out, bundle)
    assert not out.exists()
    with open_ledger(out), pytest.raises(SerError, match="another process"):
        score(manifest.head(2), out, bundle)
    with pytest.raises(SerError, match="num_gpus 64"):
        score(manifest, out, bundle, Execution(num_gpus=64))


# --- blocks and processes --------------------------------------------------------------------------------------------


def task_of(bundle: Bundle, notes: Path) -> Task:
    return Task(str(bundle.folder), bundle.weights_sha256, ScoreOptions(crops=2), 4, str(notes), "run")


def test_the_halves_for_gpus_give_what_the_whole_gives(
    bundle: Bundle, manifest: pd.DataFrame, write_audio: WriteAudio, tmp_path: Path
) -> None:
    paths = [*manifest["speech"].head(5), str(tmp_path / "gone.wav"), str(write_audio(duration_s=4.0))]
    task, rows = task_of(bundle, tmp_path), make_block(3, paths)
    whole, halves = score_block(rows, task), Classifier(task)(listen_block(rows, task))
    assert halves.column_names == whole.column_names
    pd.testing.assert_frame_equal(halves.to_pandas(), whole.to_pandas(), rtol=0, atol=1e-6)
    assert whole["block"].to_pylist() == [3] * 7
    assert whole["position"].to_pylist() == list(range(7))


@ON_RAY
def test_a_model_replaced_meanwhile_is_refused_here_in_either_half_and_on_ray(
    bundle: Bundle, manifest: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, rows = task_of(bundle, tmp_path), make_block(0, [manifest["speech"][0]])
    other, gone = dataclasses.replace(task, weights_sha256="0" * 64), dataclasses.replace(task, weights="nowhere")
    with pytest.raises(SerError, match="was replaced"):
        score_block(rows, other)
    for halves, refused, told in ((task, gone, "no model bundle"), (other, other, "was replaced")):
        (refusal,) = Classifier(halves)(or_refusal(rows, listen_block, refused))[REFUSAL].to_pylist()
        assert told in refusal
    monkeypatch.setattr("pipeline.scoring.scoring.Task", lambda weights, _sha256, *rest: Task(weights, "0" * 64, *rest))
    with pytest.raises(SerError, match="was replaced"):
        score(manifest, tmp_path / "out", bundle, Execution("ray", num_cpus=2))


def test_work_that_kills_every_process_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cluster.engine.RETRIES", 1)
    with pytest.raises(SerError, match="died 2 times"):
        list(scoring.in_processes([0, 1], die, 1))
    assert multiprocessing.active_children() == []


def test_processes_side_by_side_have_one_blas_thread_each_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert list(scoring.in_processes([0], blas_threads, 1)) == [({1}, "1")]
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert next(scoring.in_processes([0], blas_threads, 1))[1] == os.environ["OMP_NUM_THREADS"] == "2"


def blas_threads(_: int) -> tuple[set[int], str]:
    found = {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
    return found, os.environ["OMP_NUM_THREADS"]


def die(item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# --- windows ---------------------------------------------------------------------------------------------------------


@HERE
def test_windows_of_long_recordings(bundle: Bundle, write_audio: WriteAudio, tmp_path: Path) -> None:
    out = tmp_path / "out"
    calls = [write_audio(f"call{i}.wav", duration_s=7.0 + i, sample_rate_hz=8_000, channels=2) for i in range(3)]
    table = pd.DataFrame({"speech": [str(calls[0]), str(tmp_path / "gone.wav"), str(calls[1]), str(calls[2])]})
    assert score(table, tmp_path / "middle", bundle).unheard == "6 s of 24 s"
    options = ScoreOptions(window_s=2.0, hop_s=1.0, channels="each")
    run = score(table, out, bundle, options=options, merge=True, formats=["audacity"])
    assert run.unheard is None
    segments = pd.read_parquet(out / "segments.parquet")
    counts = {(row, channel): n for row, n in ((0, 6), (2, 7), (3, 8)) for channel in "01"}
    assert segments.groupby(["row", "channel"]).size().to_dict() == counts
    predictor = Predictor.from_bundle(bundle.folder, threads=1)
    prediction, timeline = predictor.follow(calls[1], options.steps, channels="each")  # type: ignore[arg-type]
    np.testing.assert_allclose(probabilities(segments[segments["row"] == 2]), timeline.probabilities, atol=1e-6)
    found = read_predictions(out)
    assert list(found["status"]) == ["ok", "not_found", "ok", "ok"]
    np.testing.assert_allclose(probabilities(found)[2], prediction.probabilities, atol=1e-6)
    assert found["scored_s"].tolist() == [7.0, 0.0, 8.0, 9.0]
    assert len(pd.read_parquet(out / "channels.parquet")) == 6
    assert len(list((out / "audacity").iterdir())) == 3


# --- decoders that take their process down ---------------------------------------------------------------------------

CRASH = f"""
import os
import soundfile
read = soundfile.SoundFile.read
def crash(self, *args, **options):
    if self.samplerate == {CRASHING_RATE_HZ}:
        os.abort()
    return read(self, *args, **options)
soundfile.SoundFile.read = crash
"""


@pytest.fixture
def crashing_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every new Python process, libsndfile aborts the process when it reads a recording of CRASHING_RATE_HZ."""
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(CRASH)
    inherited = [entry for entry in [os.environ.get("PYTHONPATH", "")] if entry]
    monkeypatch.syspath_prepend(tmp_path / "patch")  # handed on to child processes, too late for this one
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "patch"), *inherited]))


@pytest.mark.usefixtures("crashing_decoder")
@pytest.mark.parametrize("steps", [{}, {"window_s": 2.0}])
def test_a_decoder_crash_costs_one_row(
    steps: dict[str, float], bundle: Bundle, manifest: pd.DataFrame, write_audio: WriteAudio, tmp_path: Path
) -> None:
    crash = str(write_audio("crash.wav", sample_rate_hz=CRASHING_RATE_HZ))
    table = pd.DataFrame({"speech": [*manifest["speech"].head(3), crash, *manifest["speech"].iloc[3:6], crash]})
    run = score(table, tmp_path / "out", bundle, options=ScoreOptions(**steps))
    found = read_predictions(tmp_path / "out")
    assert list(found["status"]) == [*["ok"] * 3, "decoder_crashed"] * 2
    assert run.statuses == {"ok": 6, "decoder_crashed": 2}
    assert "SIGABRT" in found["error"][3]
    assert not hasattr(sys.modules.get("sitecustomize"), "crash"), "this process is not the patched one"


@pytest.mark.slow
@pytest.mark.usefixtures("crashing_decoder")
def test_ray_workers_that_crash_cost_one_row_each(bundle: Bundle, write_audio: WriteAudio, tmp_path: Path) -> None:
    """Ray runs the blocks of two crashes among 40 recordings again, and the others are scored."""
    for i in range(40):
        rate_hz = CRASHING_RATE_HZ if i in (7, 23) else 16_000
        write_audio(f"in/{i:02d}.wav", seed=i, duration_s=0.3, sample_rate_hz=rate_hz)
    words = ["--model_weights", bundle.folder, "--input", tmp_path / "in", "--out", tmp_path / "out"]
    words += ["--engine", "ray", "--num_cpus", 2, "--block_rows", 5]
    command = [sys.executable, "-m", "jobs.score", *map(str, words)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 4, run.stderr
    table = read_predictions(tmp_path / "out")
    assert list(table["status"] == "ok") == [i not in (7, 23) for i in range(40)]
    assert set(table["status"]) == {"ok", "decoder_crashed"}
