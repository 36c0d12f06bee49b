"""``score`` as a command: inputs, exit codes, kills of the driver, full disks, odd names, Ctrl-C."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from jobs import evaluate, score
from pipeline.models.backends import ensure_onnx
from pipeline.models.bundle import Bundle
from pipeline.scoring.predictions import read_predictions

ROOT = Path(__file__).resolve().parents[2]
WriteAudio = Callable[..., Path]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Bundle) -> Bundle:
    ensure_onnx(tiny_bundle)
    return tiny_bundle


@pytest.fixture
def call(bundle: Bundle, capsys: pytest.CaptureFixture[str], in_this_process: None, undrawn: None) -> Call:
    """Run the job in this process, blocks and all, without drawings; (exit code, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = score.main(["--model_weights", str(bundle.folder), "--num_cpus", "0", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def folder(write_audio: WriteAudio, tmp_path: Path) -> Path:
    """Four recordings, a text file, a hidden one."""
    for i in range(4):
        write_audio(f"in/{i}.wav", f0_hz=100 + 60 * i, seed=i, duration_s=0.5)
    (tmp_path / "in" / "notes.txt").touch()
    (tmp_path / "in" / ".hidden.wav").touch()
    return tmp_path / "in"


def test_a_folder(call: Call, folder: Path, tmp_path: Path) -> None:
    for said in ("score: 4/4 files", "nothing left to score"):
        code, out, err = call("--input", folder, "--out", tmp_path / "out")
        assert (code, out) == (0, f"{tmp_path / 'out' / 'report.html'}\n")
        assert "1 hidden, 1 .txt" in err
        assert said in err
    assert list(read_predictions(tmp_path / "out")["speech"]) == [str(folder / f"{i}.wav") for i in range(4)]


def test_a_labelled_csv_gives_figures(call: Call, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "judges.csv").write_bytes(
        b"\xef\xbb\xbffile;emotion;note\r\nin\\0.wav;fear;=1\r\nin\\1.wav;ANGRY;x\r\nin\\2.wav;;y\r\n"
    )
    code, out, _ = call("--input", tmp_path / "judges.csv", "--out", tmp_path / "out")
    assert code == 0
    assert "accuracy" in out.lower()
    table = read_predictions(tmp_path / "out" / "predictions.csv")
    assert list(table["label_name"].fillna("-")) == ["fearful", "angry", "-"]
    assert list(table["note"]) == ["=1", "x", "y"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["labelled"]


def test_a_finished_run_is_not_scored_again_and_what_it_lacks_is_added(
    call: Call, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ("--input", folder, "--out", out, "--window_s", "2", "--channels", "each")
    assert call(*words, "--note", "from the first day")[0] == 0
    assert not (out / ".score").exists()
    scored, page = out / "predictions.parquet", out / "report.html"
    tables = [out / f"{name}.csv" for name in ("predictions", "segments", "channels")]
    before, written = [path.read_bytes() for path in tables], (scored.stat().st_mtime_ns, page.stat().st_mtime_ns)
    for path in tables:
        path.unlink()
    assert call(*words, "--no_report")[0] == 0
    assert [path.read_bytes() for path in tables] == before
    assert call(*words, "--export", "jsonl")[0] == call(*words, "--note", "from the first day")[0] == 0
    assert (out / "predictions.jsonl").is_file()
    assert (scored.stat().st_mtime_ns, page.stat().st_mtime_ns) == written
    assert call(*words, "--note", "from the second day")[0] == 0
    assert "from the second day" in page.read_text(encoding="utf-8")
    page.unlink()
    assert call(*words)[0] == 0
    assert page.is_file(), "a report asked for later is added"
    scored.unlink()
    code, _, err = call(*words)
    assert code == 2
    assert "predictions.parquet" in err
    assert call(*words, "--overwrite", "--no_report")[0] == 0
    assert scored.is_file()
    assert not (out / "failures.csv").exists()


@pytest.mark.parametrize("words", [("--note", "for the jury"), ()])
def test_the_page_of_an_evaluation_stays_one_when_it_is_made_again(
    call: Call, bundle: Bundle, folder: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Its leak check, targets, players and account stay, with a note on it and where only the page is gone."""
    csv, out = tmp_path / "judges.csv", tmp_path / "out"
    csv.write_text("speech,label\nin/0.wav,sad\nin/1.wav,angry\nin/2.wav,calm\nin/3.wav,happy\n", encoding="utf-8")
    where = ["--model_weights", str(bundle.folder), "--data_csv", str(csv), "--out", str(out), "--num_cpus", "0"]
    assert evaluate.main([*where, "--min_accuracy", "12", "--embed_audio", "2"]) == 0
    before = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<audio ") == 2
    if not words:
        (out / "report.html").unlink()
    assert call("--input", csv, "--out", out, *words)[0] == 0
    after = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert after["meta"].pop("note") == (words[1] if words else None)
    assert after == before
    again = (out / "report.html").read_text(encoding="utf-8")
    for noted in ('<p class="note">for the jury</p>', '<dt>note</dt><dd class="path">for the jury</dd>'):
        assert (noted in again) == bool(words)
        again = again.replace(noted, "")
    assert "".join(again.split()) == "".join(page.split())


def test_recordings_and_folders_that_cannot_be_read_exit_4(
    call: Call, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "locked").mkdir()
    listed = os.scandir

    def scandir(path: str | bytes | int) -> object:
        if isinstance(path, bytes) and path.endswith(b"locked"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.storage.files.os.scandir", scandir)
        code, _, err = call("--input", folder, "--out", tmp_path / "locked", "--no_report")
    assert code == 4
    assert "1 folders that cannot be read" in err
    (folder / "x.wav").write_text("no audio " * 50)
    words = ("--input", folder, "--out", tmp_path / "out", "--no_report")
    code, out, err = call(*words)
    assert (code, out) == (4, f"{tmp_path / 'out' / 'predictions.csv'}\n")
    assert "score: 0/5 files, 0 failed" in err
    assert "score: 5/5 files" in err
    assert "1 failed" in err
    assert "1 not_audio" in err
    assert call(*words, "--tolerate_failures")[0] == 0


def test_windows_of_long_recordings_and_what_is_not_heard(
    call: Call, write_audio: WriteAudio, speech_like: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    samples = np.concatenate([speech_like(duration_s=2.0), np.zeros(4 * 16_000, np.float32)])
    write_audio("pauses/pause.wav", samples=samples)
    out = tmp_path / "pauses.out"
    code, _, err = call("--input", tmp_path / "pauses", "--out", out, "--no_report", "--window_s", "2")
    assert code == 0
    assert "4 s" in err
    assert json.loads((out / "run.json").read_text())["silence_s"] == 4
    assert (pd.read_csv(out / "segments.csv")["predicted"] == "silence").tolist() == [False, True, True]
    assert read_predictions(out)["scored_s"].tolist() == [2.0]

    write_audio("in/call.wav", duration_s=10.0)
    code, _, err = call("--input", tmp_path / "in", "--out", tmp_path / "out", "--no_report")
    assert code == 0
    assert "2 s of 10 s" in err
    words = ("--input", tmp_path / "in", "--out", tmp_path / "all", "--no_report", "--window-s", "2", "--hop-s=1")
    code, out, err = call(*words, "--merge", "--export", "jsonl", "audacity")
    assert code == 0
    assert "2 s of 10 s" not in err
    names = "timeline.parquet timeline.csv predictions.jsonl segments.jsonl timeline.jsonl audacity"
    assert out.splitlines()[1:] == [str(tmp_path / "all" / name) for name in names.split()]
    assert len(pd.read_parquet(tmp_path / "all" / "segments.parquet")) == 9


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--out o", "--input"),
        ("--input gone --out o", "gone"),
        ("--input empty --out o", "empty"),
        ("--input in --out in/0.wav", "0.wav"),
        ("--input in --out o --root /r", "--root"),
        ("--input in --out o --label_map a=sad", "--label_map"),
        ("--input in --out o --num_gpus 1", "--num_gpus"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(
    words: str, text: str, call: Call, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "gpus" in words and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*words.split())
    assert (code, out) == (2, "")
    assert text in err
    assert [line.startswith("error: ") for line in err.splitlines()].count(True) == 1
    assert "Traceback" not in err
    assert not (tmp_path / "o" / "predictions.csv").exists()


def test_odd_names_end_in_the_tables(call: Call, write_audio: WriteAudio, tmp_path: Path) -> None:
    names = [b"a b.wav", b"line\nbreak.wav", b"return\rcarriage.wav", "😀.wav".encode()]
    names += [b"caf\xe9.wav", b"=1+1.wav", b"'q'.wav"]
    original = write_audio(duration_s=0.3).read_bytes()
    (tmp_path / "in").mkdir()
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name)).write_bytes(original)
    assert call("--input", tmp_path / "in", "--out", tmp_path / "out")[0] == 0
    by_csv, by_parquet = read_predictions(tmp_path / "out" / "predictions.csv"), read_predictions(tmp_path / "out")
    assert len(by_parquet) == len(names)
    assert list(by_csv["speech"]) == list(by_parquet["speech"])
    assert set(by_parquet["status"]) == {"ok"}
    assert f"file://{tmp_path}/in/caf%E9.wav" in set(by_parquet["speech"])


# --- what dies -------------------------------------------------------------------------------------------------------

DYING = """
import os, resource, signal, sys
from pathlib import Path
from jobs.score import main
from pipeline.scoring import scoring
from pipeline.scoring.ledger import Ledger

commit, finish, replace = Ledger.commit, Ledger.finish, Path.replace
if DEATH != "killed after a part":  # that one with a child, which must end with it
    scoring.in_processes = lambda items, work, _, **__: map(work, items)

def kill(number):
    os.kill(os.getpid(), number)

def dying_commit(self, block, part):
    if block == 1 and DEATH == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    commit(self, block, part)
    if block == 1 and DEATH == "killed after a part":
        kill(signal.SIGKILL)
    if block == 1 and DEATH == "Ctrl-C":
        kill(signal.SIGINT)

def dying_replace(self, target):
    if DEATH == "killed within a part" and str(target).endswith("part-000001.parquet"):
        kill(signal.SIGKILL)
    return replace(self, target)

def dying_finish(self, run):
    if DEATH == "killed before the record":
        kill(signal.SIGKILL)
    finish(self, run)

Ledger.commit, Ledger.finish, Path.replace = dying_commit, dying_finish, dying_replace
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def eight(write_audio: WriteAudio, tmp_path: Path) -> Path:
    for i in range(8):
        write_audio(f"eight/{i}.wav", f0_hz=100 + 30 * i, seed=i, duration_s=0.3)
    return tmp_path / "eight"


@pytest.mark.parametrize(
    ("death", "code", "left"),
    [
        ("killed after a part", -9, 2),
        ("killed within a part", -9, 1),
        ("killed before the record", -9, 4),
        ("Ctrl-C", 130, 2),
        ("full disk", 2, 1),
    ],
)
def test_whatever_dies_the_same_command_finishes_the_run(
    death: str, code: int, left: int, call: Call, bundle: Bundle, eight: Path, tmp_path: Path
) -> None:
    out, script = tmp_path / "out", tmp_path / "dying.py"
    words = ("--input", eight, "--no_report", "--out")
    assert call(*words, tmp_path / "undisturbed", "--block_rows", 2)[0] == 0
    undisturbed = read_predictions(tmp_path / "undisturbed")
    script.write_text(f"DEATH = {death!r}\n{DYING}")
    command = [sys.executable, script, *words, out, "--block_rows", 2, "--engine", "local", "--num_cpus", 1]
    dead = subprocess.run(  # returns once the child has gone too: it holds the pipes
        [*map(str, command), "--model_weights", str(bundle.folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert dead.returncode == code, dead.stderr
    assert "Traceback" not in dead.stderr
    assert not (out / "run.json").exists()
    assert len(list((out / ".score").glob("part-*.parquet"))) == left
    returned, _, err = call(*words, out, "--block_rows", 5)
    assert returned == 0
    if left < 4:
        assert f"score: {2 * left}/8 files" in err
    found = read_predictions(out)
    assert list(found["speech"]) == list(undisturbed["speech"])
    p = [name for name in found.columns if name.startswith("p_")]
    np.testing.assert_allclose(found[p], undisturbed[p], atol=1e-6)
    pd.testing.assert_frame_equal(found.drop(columns=p), undisturbed.drop(columns=p), atol=1e-5)
    assert json.loads((out / "run.json").read_text())["scored_now"] == 8 - 2 * left
    kept = {".score.lock", "predictions.csv", "predictions.parquet", "run.json"}
    assert {path.name for path in out.iterdir()} == kept
