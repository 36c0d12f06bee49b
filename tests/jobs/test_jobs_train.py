"""`jobs.train` as a command: from recordings to a bundle on Ray, usage errors, resume, Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bundles import untrained
from toy_data import CONFIG, LABELS, write_features

from jobs import train
from jobs.extract import build_parser as extract_parser
from jobs.train import build_parser, main
from jobs.train_options import fit_config
from pipeline.audio.load import content_hash
from pipeline.data.labels import LabelSet
from pipeline.data.manifest import scan_folder
from pipeline.features.extract import ShardOptions, ShardSummary
from pipeline.features.store import load_features
from pipeline.models.bundle import load_bundle
from pipeline.storage.files import stamps_of
from pipeline.training.run import read_history

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("undrawn")
ROOT = Path(__file__).resolve().parents[2]
FAST = ["--num_workers", "0", "--epochs", "2", "--batch_size", "16", "--lr", "1e-3", "--threads", "1"]
NARROW = [*FAST, "--width", "0.125"]


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_features(tmp_path_factory.mktemp("toy") / "features", n=45)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("in_this_process", "ray_session")
def test_recordings_to_bundle_and_report_with_two_ray_workers(
    ravdess_like: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    words = ["--data_dir", str(ravdess_like), "--model", "cnn_bilstm", "--num_workers", "2", "--epochs", "1"]
    assert main([*words, "--batch_size", "16", "--use_focal", "True", "--out", str(out)]) == 0
    printed, said = capsys.readouterr()
    assert "parts: train 40, inner_val 11, test 13" in said
    assert f"{out}/report/report.html" in printed
    bundle = load_bundle(out)
    assert (bundle.name, bundle.model_name) == ("cnn_bilstm_ser_final", "cnn_bilstm")
    with torch.inference_mode():
        assert bundle.build_model()(torch.zeros(1, 188, 190)).shape == (1, 8)
    assert len(read_history(out)) == 1
    parts = {name: pd.read_csv(out / "splits" / f"{name}.csv") for name in ("train", "inner_val", "test")}
    assert sum(map(len, parts.values())) == 64
    assert set(parts["test"]["label"]) == set(bundle.labels)
    for name in ("curves.png", "metrics.json", "README.md", "training.csv", "report/metrics.json"):
        assert (out / name).is_file(), name
    assert bundle.metrics["training"]["settings"]["use_focal"] is True


def test_the_briefs_own_command_line_and_again(
    features: Path, ravdess_like: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """As it is written; what follows on the line, and features that are there already, make the training small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "extracted", lambda arguments: ((features,), 0))
    scan_folder(ravdess_like).to_csv("metadata.csv", index=False)
    line = "--data_csv metadata.csv --batch_size 64 --lr 1e-4 --epochs 50 --oversample_boost 1:2.0,2:2.0"
    words = [*line.split(), "--use_focal", "False", "--epochs", "1", "--num_workers", "0", "--width", "0.125"]
    assert main(words) == 0
    (made,) = Path("runs").iterdir()
    said = capsys.readouterr().err
    assert str(made) in said.splitlines()[0]
    assert "epoch 1/1" in said
    assert load_bundle(made).metrics["training"]["settings"]["oversample_boost"] == {"1": 2.0, "2": 2.0}
    assert (made / "report" / "report.html").is_file()

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}

    before = written()
    assert main([*words, "--out", str(made), "--resume"]) == 0
    assert main([*words, "--out", str(made)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert written() == before
    assert main(["--features", "nowhere"]) == 2
    assert list(Path("runs").iterdir()) == [made]


def test_ctrl_c_keeps_the_best_weights_and_resume_goes_on(features: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [sys.executable, "-m", "jobs.train", "--features", str(features), *NARROW, "--out", str(out)]
    words += ["--epochs", "3", "--report_split", "none"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        told = ""
        for line in process.stderr:
            told += line
            if line.startswith("epoch 1/"):
                process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, told
    kept = out / "interrupted" / "inception_ser_final.pt"
    assert f"{kept}" in told
    assert "--resume" in told
    assert load_bundle(kept).metrics["training"]["epochs"] == 1
    assert main([*words[3:], "--resume"]) == 0
    assert [record["epoch"] for record in read_history(out)] == [1, 2, 3]
    assert load_bundle(out).metrics["training"]["epochs"] == 3
    assert not kept.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num_workers 3", "3 workers"),
        ("--num_workers -1", "0 or more"),
        ("--class_weights sad", "--class_weights"),
        ("--augment pitch", "--pitch_semitones"),
        ("--model cnn_bilstm", "--features_kind frame_features"),
        ("--use_gpu True", "GPU"),
        ("--split speaker --inner_val 0.9", "speaker"),
        ("--resume", "resume"),
        ("--data_csv x.csv", "--features"),
    ],
)
def test_usage_errors_exit_with_two_in_one_line(
    words: str, message: str, features: Path, tmp_path: Path, capsys: Capture
) -> None:
    if message == "GPU" and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    given = ["--features", str(features), *FAST, "--out", str(tmp_path / "run"), *words.split()]
    assert main(given) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.usefixtures("untrained_runs")
def test_starts_that_are_refused_do_not_claim_the_folder(features: Path, tmp_path: Path, capsys: Capture) -> None:
    out = ["--out", str(tmp_path / "run")]
    for source, message in (
        (["--features", "nowhere"], "nowhere"),
        (["--data_csv", "nowhere.csv"], "nowhere"),
        (["--data_dir", "nowhere"], "nowhere"),
        ([], "--data_csv"),
        (["--features", str(features), *NARROW, "--augment", "pitch"], "pitch"),
    ):
        assert main([*source, *out]) == 2
        assert message in capsys.readouterr().err
    assert main(["--features", str(features), *NARROW, *out]) == 0


def extracted(words: list[str], monkeypatch: Patch, failed: int = 0) -> Any:
    """What `jobs.train` asks the extraction for."""
    asked: dict[str, Any] = {}

    def note(table: pd.DataFrame, out: Path, config: Any, *, options: ShardOptions, **_: Any) -> ShardSummary:
        asked.update(rows=len(table), out=out, config=config, options=options)
        return ShardSummary(out, len(table), failed, 0)

    monkeypatch.setattr("pipeline.features.extract.extract_shards", note)
    asked["answer"] = train.extracted(build_parser().parse_args(words))
    return asked


def test_pitch_copies_are_extracted_when_they_are_asked_for(
    ravdess_like: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    words = ["--data_dir", str(ravdess_like), "--out", str(tmp_path)]
    plain = extracted(words, monkeypatch)
    assert plain["options"].pitch_semitones == ()
    assert plain["config"].kind == "log_mel"
    assert plain["answer"] == ((tmp_path / "features",), 0)
    assert extracted([*words, "--augment", "crop, pitch"], monkeypatch)["options"].pitch_semitones == (-1.0, 1.0)
    assert extracted([*words, "--model", "cnn_bilstm"], monkeypatch)["config"].kind == "frame_features"
    assert extracted(words, monkeypatch, failed=3)["answer"][1] == 3
    for text, expected in (("-1,1", (-1.0, 1.0)), ("2", (2.0,)), ("", ())):  # of the extraction job
        given = extract_parser().parse_args(["--data_dir", "x", "--out", "y", f"--pitch_semitones={text}"])
        assert given.pitch_semitones == expected


def test_options_reach_the_settings() -> None:
    labels, rows = LabelSet(LABELS), pd.DataFrame({"label": ["calm", "calm", "calm", "happy"]})

    def settings(*words: str) -> Any:
        return fit_config(build_parser().parse_args(["--features", "x", "--out", "y", *words]), labels, rows)

    plain = settings()
    assert (plain.epochs, plain.batch_size, plain.lr, plain.weight_decay) == (50, 64, 1e-4, 1e-5)
    assert (plain.scheduler, plain.patience, plain.seed, plain.class_weights) == ("cosine", 7, 42, None)
    assert settings("--class_weights", "sad:2,0:0.5").class_weights == (0.5, 1.0, 2.0)
    assert settings("--class_weights", "balanced").class_weights == pytest.approx((2 / 3, 2.0, 1.0))
    assert settings("--oversample-boost", "1:2.0,sad:3").oversample_boost == {1: 2.0, 2: 3.0}
    assert settings("--augment", "crop, mixup,").augment == ("crop", "mixup")
    assert settings("--use_focal", "False").use_focal is False
    given = settings("--scheduler", "onecycle", "--ema", "0.9", "--warmup_epochs", "2", "--threads", "3")
    assert (given.scheduler, given.ema, given.warmup_epochs, given.threads) == ("onecycle", 0.9, 2, 3)


@pytest.fixture
def untrained_runs(monkeypatch: Patch) -> None:
    """Nothing is trained or written: what a start decides before and after."""
    monkeypatch.setattr(train, "_train", lambda plan, *_: plan.checkpoint.touch())
    monkeypatch.setattr(train, "_finish", lambda *_: None)


@pytest.mark.usefixtures("untrained_runs")
def test_failed_recordings_make_the_exit_code_four(
    features: Path, tmp_path: Path, monkeypatch: Patch, ravdess_like: Path
) -> None:
    monkeypatch.setattr(train, "extracted", lambda arguments: ((features,), 2))
    words = ["--data_dir", str(ravdess_like), *NARROW]
    assert main([*words, "--out", str(tmp_path / "a")]) == 4
    assert main([*words, "--out", str(tmp_path / "b"), "--tolerate_failures"]) == 0


def test_a_committed_split_is_kept_and_unnamed_recordings_are_left_out(
    features: Path, tmp_path: Path, capsys: Capture
) -> None:
    names = [f"{number:03d}" for number in range(40)]  # of 45
    parts = ["train"] * 24 + ["inner_val"] * 6 + ["test"] * 10
    pd.DataFrame({"id": names, "split": parts}).to_csv(tmp_path / "split.csv", index=False)
    words = ["--features", str(features), *NARROW, "--epochs", "1", "--report_split", "none", "--inner_val", "0"]
    assert main([*words, "--split_csv", str(tmp_path / "split.csv"), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "counts: calm 15, happy 15, sad 15" in said
    assert "parts: train 30, inner_val 0, test 10" in said
    test = pd.read_csv(tmp_path / "run" / "splits" / "test.csv")
    assert sorted(Path(p).stem for p in test["speech"]) == names[30:]


def test_another_start_does_not_change_what_is_reported_on(
    features: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Before the first epoch is done there is no checkpoint that would refuse it."""
    out = tmp_path / "run"
    words = ["--features", str(features), *NARROW, "--epochs", "1", "--out", str(out)]
    begun: list[dict[str, bytes]] = []
    alone = train._train

    def beside(*given: Any) -> bool:
        if not begun:
            begun.append({path.name: path.read_bytes() for path in (out / "splits").iterdir()})
            assert main([*words, "--split", "speaker", "--seed", "7"]) == 2
            assert "another process" in capsys.readouterr().err
        return alone(*given)

    monkeypatch.setattr(train, "_train", beside)
    assert main(words) == 0
    assert {path.name: path.read_bytes() for path in (out / "splits").iterdir()} == begun[0]
    assert load_bundle(out).metrics["training"]["settings"]["seed"] == 42


def test_what_is_of_no_run_is_not_written_over(features: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "README.md").write_text("mine")
    assert main(["--features", str(features), *FAST, "--out", str(tmp_path)]) == 2
    assert "README.md" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    shutil.copytree(features, tmp_path / "features")
    (tmp_path / "features" / "plan.json").write_text("an extraction's")
    assert main(["--features", str(tmp_path / "features"), *FAST, "--out", str(tmp_path / "features")]) == 2
    assert "plan.json" in capsys.readouterr().err
    assert main(["--features", str(features), *FAST, "--out", str(tmp_path / "README.md")]) == 2


def test_a_run_goes_on_with_the_parts_and_recordings_it_began_with(
    tmp_path: Path, write_audio: Callable[..., Path], monkeypatch: Patch, capsys: Capture
) -> None:
    """A replaced recording is noticed, though the features tell the hashes; one that has gone is not."""
    paths = [write_audio(f"{number:03d}.wav", duration_s=0.1, seed=number) for number in range(30)]
    features = with_column(write_features(tmp_path / "features", n=30), speech=[str(path) for path in paths])
    part = pq.read_table(features / "part-00000.parquet")
    hashes = [content_hash(path) for path in paths]
    pq.write_table(part.append_column("content_hash", pa.array(hashes)), features / "part-00000.parquet")
    np.save(features / "stamps.npy", stamps_of([str(path) for path in paths]))
    decoded: list[str] = []
    monkeypatch.setattr("pipeline.data.splits.content_hash", lambda path: decoded.append(path) or content_hash(path))
    words = ["--features", str(features), *NARROW, "--report_split", "none", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(train, "_train", lambda *_: True)
        assert main(words) == 130
        assert main([*words, "--resume"]) == 130
        parts = [pd.read_csv(path) for path in (tmp_path / "run" / "splits").iterdir()]
        assert sorted(pd.concat(parts)["content_hash"]) == sorted(hashes)
        for other in (["--split", "speaker"], ["--test_size", "0.5"], ["--inner_val", "0"]):
            assert main([*words, *other, "--resume"]) == 2
            assert "'test_size': 0.2" in capsys.readouterr().err
        assert decoded == []
        whole = paths[7].read_bytes()
        paths[7].write_bytes(paths[8].read_bytes())
        assert main([*words, "--resume"]) == 2
        assert str(paths[7]) in capsys.readouterr().err
        paths[7].write_bytes(whole)  # at another time
        assert main([*words, "--resume"]) == 130
        assert decoded == [str(paths[7])] * 2
    for path in paths:
        path.unlink()
    assert main([*words, "--resume"]) == 0


def with_column(folder: Path, **columns: list[str]) -> Path:
    """The feature folder, some columns of its recordings replaced."""
    table = pq.read_table(folder / "part-00000.parquet")
    for name, cells in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(cells))
    pq.write_table(table, folder / "part-00000.parquet")
    return folder


@pytest.fixture
def three_corpora(tmp_path: Path) -> list[str]:
    """Two feature folders of three corpora; those of the second have no class `sad`."""
    corpora = ["a", "b", "a"] * 15
    speakers = [f"{corpus}_{i % 4}" for i, corpus in enumerate(corpora)]
    one = with_column(write_features(tmp_path / "one", n=45), corpus=corpora, speaker=speakers)
    paths = [f"/audio/two/c{i}.wav" for i in range(30)]
    about = {"corpus": ["c"] * 30, "label": ["calm", "happy"] * 15, "speaker": [f"c_{i % 4}" for i in range(30)]}
    two = with_column(write_features(tmp_path / "two", n=30), speech=paths, **about)
    return ["--features", str(one), str(two), *NARROW]


def test_corpora_of_several_folders_in_one_training(three_corpora: list[str], tmp_path: Path, capsys: Any) -> None:
    words = [*three_corpora, "--draws", "40", "--corpus_share", "a:1,b:1,c:2", "--report_split", "none"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert "corpora: a 30, b 15, c 30" in capsys.readouterr().err
    bundle = load_bundle(tmp_path / "run")
    assert bundle.corpora == {"a": ("calm", "sad"), "b": ("happy",), "c": ("calm", "happy")}
    learnt = pd.read_csv(tmp_path / "run" / "splits" / "train.csv")["corpus"]
    assert bundle.metrics["training"]["corpora"]["c"]["recordings"] == (learnt == "c").sum()
    assert bundle.metrics["training"]["settings"]["draws"] == 40
    assert main([*words, "--out", str(tmp_path / "run"), "--resume"]) == 0


def test_named_corpora_and_speakers_are_scored_and_not_trained_on(
    three_corpora: list[str], tmp_path: Path, capsys: Capture
) -> None:
    words = [*three_corpora, "--epochs", "1", "--out", str(tmp_path / "run"), "--inner_val", "0"]
    assert main([*words, "--test_corpora", "c", "--test_speakers", "a_2"]) == 0
    training = load_bundle(tmp_path / "run").training
    table = load_features([Path(folder) for folder in three_corpora[1:3]]).table
    held = (table["corpus"] == "c") | (table["speaker"] == "a_2")
    assert (training["split"] == "test").sum() == held.sum()
    assert set(training.loc[training["split"] == "train", "speaker"]) == set(table["speaker"][~held])
    for option, message in (
        (["--test_corpora", "d"], "'d'"),
        (["--test_corpora", "a,b,c"], "train"),
        (["--test_speakers", "nobody"], "nobody"),
        (["--test_corpora", "a", "--corpus_share", "a:1,b:1,c:1"], "--corpus_share"),
        (["--corpus_share", "a:0"], "CORPUS:SHARE"),
    ):
        assert main([*three_corpora, "--out", str(tmp_path / "refused"), *option]) == 2
        assert message in capsys.readouterr().err


def test_corpora_that_do_not_go_together_are_refused(tmp_path: Path, capsys: Capture) -> None:
    folders = [with_column(write_features(tmp_path / name, n=12), corpus=[name] * 12) for name in ("a", "b")]
    about = {"corpus": ["c"] * 12, "label": ["bark", "meow"] * 6, "speaker": ["dog", "cat"] * 6}
    own = with_column(write_features(tmp_path / "c", n=12), **about)
    for two, message in ((folders, "RAVDESS_01"), ([folders[0], own], "bark, meow")):
        assert main(["--features", *map(str, two), *NARROW, "--out", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run" / "plan.json").exists()


def test_a_training_starts_from_an_earlier_model(features: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["--features", str(features), *NARROW, "--report_split", "none"]
    heard = pd.DataFrame({"id": ["another"], "content_hash": "", "speaker": "", "split": "train"})
    about = {"labels": LABELS, "features": CONFIG, "metrics": {"training": {}}, "training": heard}
    first = untrained(tmp_path / "first", **about)
    started = [*words, "--init", str(first.folder), "--epochs", "1"]
    assert main([*started, "--out", str(tmp_path / "same"), "--lr", "1e-30"]) == 0
    weights, before = load_bundle(tmp_path / "same").state_dict(), first.state_dict()
    learnt = [name for name, value in before.items() if "running" not in name and value.is_floating_point()]
    assert all(torch.allclose(weights[name], before[name], rtol=0, atol=1e-20) for name in learnt)  # Adam moves zeros
    about = load_bundle(tmp_path / "same").metrics["training"]["init"]
    assert about["model_sha256"] == first.weights_sha256
    assert first.weights_sha256[:12] in (tmp_path / "same" / "README.md").read_text(encoding="utf-8")
    assert main([*started, "--out", str(tmp_path / "refused"), "--width", "0.25"]) == 2
    assert "--width" in capsys.readouterr().err
    labels, paths = ["calm", "happy", "angry"] * 15, [f"/audio/other/o{i}.wav" for i in range(45)]
    other = with_column(write_features(tmp_path / "other", n=45), label=labels, speech=paths)
    words = ["--features", str(other), *NARROW, "--epochs", "1", "--lr", "1e-30", "--report_split", "none"]
    assert main([*words, "--init", str(first.folder), "--out", str(tmp_path / "other_classes")]) == 0
    changed = load_bundle(tmp_path / "other_classes")
    assert changed.labels == ("angry", "calm", "happy")
    for row, label in enumerate(changed.labels):
        kept = label in first.labels
        theirs = before["head.3.weight"][first.labels.index(label)] if kept else None
        assert not kept or torch.equal(changed.state_dict()["head.3.weight"][row], theirs)
