"""Options in both spellings, exit codes, one-line errors, progress; the manifest and extract jobs; `ser`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from jobs import _common, cli, extract, manifest
from jobs._common import Parser, Progress, run, true_or_false
from pipeline.data.manifest import read_manifest, scan_folder
from pipeline.features.features import FeatureConfig
from pipeline.features.store import load_features
from pipeline.storage.errors import SerError


def parser() -> Parser:
    made = Parser(prog="job")
    made.add_argument("--data_csv", required=True)
    made.add_argument("--use_focal", type=true_or_false, default=False)
    return made


@pytest.mark.parametrize("words", [["--data_csv", "a-b"], ["--data-csv", "a-b"], ["--data-csv=a-b"]])
def test_hyphens_and_underscores_are_alike_in_names_only(words: list[str]) -> None:
    assert parser().parse_args(words).data_csv == "a-b"


@pytest.mark.parametrize(("text", "value"), [("True", True), ("false", False), ("1", True), ("no", False)])
def test_booleans_as_the_brief_spells_them(text: str, value: bool) -> None:
    assert parser().parse_args(["--data_csv", "x", "--use_focal", text]).use_focal is value


def with_out(*words: str) -> argparse.Namespace:
    made = Parser(prog="job")
    _common.add_out(made, "runs", "results")
    made.add_argument("--resume", action="store_true")
    asked: list[argparse.Namespace] = []

    def job(arguments: argparse.Namespace) -> int:
        asked.append(arguments)
        if "--resume" not in words:
            (arguments.out / "result").touch()
        return 0

    return asked[0] if run(job, made, words) == 0 else argparse.Namespace(out=None)


def test_without_out_each_start_has_a_new_dated_folder_that_is_named_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "2026-11-30_094636")  # both in one second
    assert [str(with_out().out) for _ in "ab"] == ["runs/2026-11-30_094636", "runs/2026-11-30_094636_2"]
    assert capsys.readouterr().err.splitlines()[0].endswith("results go into runs/2026-11-30_094636")
    assert str(with_out("--out", "mine/x", "--resume").out) == "mine/x"
    assert not Path("mine").exists()
    assert capsys.readouterr().err == ""


def test_a_dated_folder_that_nothing_was_put_into_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = Parser(prog="job")
    _common.add_out(made, "runs", "results")

    def refuse(arguments: argparse.Namespace) -> int:
        (arguments.out / ".lock").touch()
        raise SerError("refused")

    assert run(refuse, made, []) == 2
    assert list(tmp_path.iterdir()) == []
    assert with_out("--resume").out is None
    capsys.readouterr()
    (tmp_path / "runs").write_text("a file")
    assert run(refuse, made, []) == 2
    assert "--out" in capsys.readouterr().err


def raises(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def job(_: argparse.Namespace) -> int:
        raise error

    return job


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (SerError("two\nlines"), 2, "two lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 0, ""),
        (PermissionError(13, "shut", "a.csv"), 2, "a.csv"),
        (OSError(28, "disk full"), 2, "disk full"),
    ],
)
def test_exit_codes(error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    stdout = sys.stdout
    assert run(raises(error), parser(), ["--data_csv", "x"]) == code
    sys.stdout = stdout
    said = capsys.readouterr().err
    assert text in said
    assert said.count("\n") == bool(text)


def test_our_mistakes_leave_a_log_and_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_common.tempfile, "tempdir", str(tmp_path))
    assert run(raises(RuntimeError("boom")), parser(), ["--data_csv", "x"]) == 70
    talk = capsys.readouterr().err
    (log,) = tmp_path.iterdir()
    assert str(log) in talk
    assert "Traceback" not in talk
    assert "boom" in log.read_text()


@pytest.mark.parametrize("words", [[], ["--nonsense", "--data_csv", "x"], ["--data_csv", "x", "--use_focal", "maybe"]])
def test_usage_errors_are_one_line_and_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda _: 0, parser(), words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_progress_lines_tell_failures_and_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("score", every_s=0)
    for done in (10, 20):
        progress(done, 20, 3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("score: 20/20 files")
    assert all("3 failed" in line for line in lines)


def test_manifest_then_extract(ravdess_like: Path, tmp_path: Path, in_this_process: None) -> None:
    csv = tmp_path / "metadata.csv"
    assert manifest.main([str(ravdess_like), "--out", str(csv)]) == 0
    table = pd.read_csv(csv)
    assert len(table) == 64
    assert table["label"].value_counts().eq(8).all()
    table.iloc[:5].to_csv(csv, index=False)
    assert extract.main(["--data-csv", str(csv), "--out", str(tmp_path / "f")]) == 0
    assert json.loads((tmp_path / "f" / "manifest.json").read_text())["rows"] == 5
    other = ["--window_s", "3", "--n_mels", "40", "--f_max_hz", "8000", "--hop_length", "768"]
    assert extract.main(["--data-csv", str(csv), *other, "--out", str(tmp_path / "h")]) == 0
    heard = FeatureConfig(window_s=3.0, n_mels=40, f_max_hz=8_000.0, hop_length=768)
    assert load_features(tmp_path / "h", heard).features.shape == (5, 1, 40, 188)
    table.iloc[:5].assign(speech="nowhere.wav").to_csv(csv, index=False)
    words = ["--data-csv", str(csv), "--out", str(tmp_path / "g")]
    assert extract.main(words) == 4
    assert extract.main([*words, "--tolerate_failures"]) == 0


def test_a_folder_heeds_the_label_map_and_refuses_a_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("excited/a.wav", "sad/b.wav"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    words = ["--data_dir", str(tmp_path), "--out", "x", "--label_map", "excited=happy"]
    assert set(extract.read_data(extract.build_parser().parse_args(words))["label"]) == {"happy", "sad"}
    assert extract.main([*words, "--root", str(tmp_path)]) == 2
    assert "--root" in capsys.readouterr().err


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("wow/a.wav", "sad/b\rc.wav", "sad/'=d.wav", "foo.wav"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    csv = tmp_path / "new" / "metadata.csv"
    words = [str(tmp_path / "in"), "--out", str(csv)]
    assert manifest.main([*words, "--label_map", "wow==1+1"]) == 0
    assert "foo.wav" in capsys.readouterr().err
    assert "'=1+1" in csv.read_text()
    expected = scan_folder(tmp_path / "in", label_map={"wow": "=1+1"})
    assert read_manifest(csv).equals(expected)
    before = csv.read_bytes()
    for option, complaint in ((["--corpus", "tess"], "tess"), ([], "wow")):
        assert manifest.main([*words, *option]) == 2
        talk = capsys.readouterr().err
        assert (talk.count("\n"), complaint in talk) == (1, True)
    assert csv.read_bytes() == before
    assert manifest.main([*words, "--label_map", "wow=sad"]) == 0
    assert f"{csv} (replaced)" in capsys.readouterr().err


def test_a_manifest_takes_no_place_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = tmp_path / "sad" / "a.wav"
    clip.parent.mkdir()
    clip.write_bytes(b"x")
    for out, complaint in ((tmp_path, "is a folder"), (clip, "exists already"), (clip / "x.csv", "cannot write")):
        assert manifest.main([str(tmp_path), "--out", str(out)]) == 2
        assert complaint in capsys.readouterr().err
    assert clip.read_bytes() == b"x"


def test_what_cannot_be_heard_is_said_before_anything_is_read(tmp_path: Path, capsys: Any) -> None:
    assert extract.main(["--data_csv", "nowhere.csv", "--out", str(tmp_path / "x"), "--window_s", "nan"]) == 2
    assert "finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["manifest", "nowhere", "--out", "x.csv"],
        ["extract", "--data_csv", "nowhere.csv", "--out", "x"],
        ["extract", "--data_dir", "nowhere", "--out", "x"],
        ["extract", "--out", "x"],
        ["dance"],
        [],
    ],
)
def test_what_is_not_there_is_2(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    talk = capsys.readouterr().err
    assert "Traceback" not in talk
    if words:
        assert talk.count("\n") == 1
    assert not list(tmp_path.iterdir())
