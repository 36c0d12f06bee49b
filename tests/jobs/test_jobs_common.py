"""Options, help, exit codes and one-line errors of all commands; the manifest and extract jobs."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from jobs import _common, cli, extract, manifest
from jobs._common import Parser, run, true_or_false
from pipeline.data.manifest import read_manifest, scan_folder
from pipeline.features.features import FeatureConfig
from pipeline.features.store import load_features
from pipeline.models.backends import ensure_onnx
from pipeline.models.bundle import load_bundle
from pipeline.storage.errors import SerError
from pipeline.training.config import FitConfig

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(cli.COMMANDS)
SAMPLE = ROOT / "samples" / "ben_sad_window.wav"


# --- help ------------------------------------------------------------------------------------------------------------


def parser_of(command: str) -> Parser:
    made: Parser = importlib.import_module(f"jobs.{command}").build_parser()
    return made


def test_the_list_of_commands_and_the_version_to_cite(capsys: Capture) -> None:
    assert cli.main(["--help"]) == 0
    assert re.findall(r"^  (\w+) +\S", capsys.readouterr().out, flags=re.MULTILINE) == list(cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    (cited,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert capsys.readouterr().out == f"ser {cited}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_called_as_it_was_given_and_its_examples_parse(command: str, capsys: Capture) -> None:
    parser = parser_of(command)
    examples = re.split(r"examples?:", " ".join(((parser.epilog or "") % {"prog": parser.prog}).split()))[1:]
    assert examples
    for example in examples:
        words = shlex.split(example.split(";")[0])
        start = ["ser", command] if words[0] == "ser" else ["python", "-m", f"jobs.{command}"]
        assert words[: len(start)] == start
        further = parser.parse_known_args(words[len(start) :])[1]
        assert not further or command == "submit"  # whose further words are those of another command
    assert cli.main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: ser {command} ")
    assert cli.main([command, "--no_such_option"]) == 2
    assert f"ser {command} --help" in capsys.readouterr().err
    assert importlib.import_module(f"jobs.{command}").main(["--help"]) == 0
    assert f"ser {command}" not in capsys.readouterr().out.split("\n\n")[0] or command == "submit"


HEAVY = ("pandas", "pyarrow", "scipy", "scipy.stats", "scipy.optimize", "torch", "ray", "matplotlib", "sklearn")
HEAVY += ("librosa", "httpx", "fastapi")
IMPORTS = f"""
import sys
from jobs import cli
if __name__ == "__main__":
    assert all(cli.main([command, "--help"]) == 0 for command in {COMMANDS})
    for words, needed in [("--help", set()), *COMMANDS_GIVEN.items()]:
        assert cli.main(words.split()) == 0
        loaded = {{name for name in {HEAVY} if name in sys.modules}}
        assert loaded == needed, (words, loaded)
"""
SCORE = "score --input x.csv --out out"
SCORED = {"pandas", "pyarrow"}


@pytest.mark.parametrize(
    "given",
    [
        {f"infer --file {SAMPLE}": {"scipy"}},
        {f"{SCORE} --no_report": SCORED, SCORE: SCORED | {"scipy", "matplotlib"}},
    ],
    ids=["infer", "score"],
)
def test_what_a_command_imports(given: dict[str, set[str]], tmp_path: Path) -> None:
    """Nothing heavy that it does not use, and no help anything heavy: that costs every start seconds."""
    ensure_onnx(load_bundle())  # in a new checkout the first use exports it, with PyTorch
    (tmp_path / "x.csv").write_text(f"speech,label\n{SAMPLE},sad\n")
    # a file: the process that decodes imports it again
    (tmp_path / "run.py").write_text(IMPORTS.replace("COMMANDS_GIVEN", str(given)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", ["train", "crossval"])
def test_the_help_of_a_training_is_short_and_help_all_is_whole(command: str, capsys: Capture) -> None:
    def shown(word: str) -> list[str]:
        assert cli.main([command, word]) == 0
        return list(dict.fromkeys(re.findall(r"^  (?:-h, )?(--\w+)", capsys.readouterr().out, flags=re.MULTILINE)))

    short, whole = shown("--help"), shown("--help-all")
    assert len(short) <= 12
    assert {"--out", "--epochs", "--lr", "--oversample_boost", "--use_focal", "--help_all"} <= set(short)
    usual = [name for name in short if not name.startswith("--help")]
    assert whole[: len(usual)] == usual
    names = {name for action in parser_of(command)._actions for name in action.option_strings}
    assert set(whole) == names - {"-h"}


def test_every_setting_of_a_training_is_an_option_with_the_same_default() -> None:
    given, settings = parser_of("train").parse_args(["--features", "x"]), FitConfig()
    texts = {"class_weights": "none", "oversample_boost": "", "augment": ""}
    names = {option.name for option in FitConfig.options()}
    for name in names:
        assert getattr(given, name) == texts.get(name, getattr(settings, name)), name
    assert names | {"mixed_precision", "channels_last"} == set(settings.to_dict())


# --- options, exit codes, progress -----------------------------------------------------------------------------------


def parser() -> Parser:
    made = Parser(prog="job")
    made.add_argument("--data_csv", required=True)
    made.add_argument("--use_focal", type=true_or_false, default=False)
    return made


def test_hyphens_in_names_and_booleans_as_the_brief_spells_them() -> None:
    for words in (["--data_csv", "a-b"], ["--data-csv", "a-b"], ["--data-csv=a-b"]):
        assert parser().parse_args(words).data_csv == "a-b"
    for text, value in (("True", True), ("false", False), ("1", True), ("no", False)):
        assert parser().parse_args(["--data_csv", "x", "--use_focal", text]).use_focal is value


@pytest.fixture
def with_out(tmp_path: Path, monkeypatch: Patch) -> Callable[..., str | None]:
    """Runs a job with ``--out`` in ``tmp_path``, which writes a file there unless it resumes; its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "2026-11-30_094636")  # all in one second
    made = Parser(prog="job")
    _common.add_out(made, "runs", "results")
    made.add_argument("--resume", action="store_true")
    made.add_argument("--refuse", action="store_true")

    def call(*words: str) -> str | None:
        asked: list[str] = []

        def job(arguments: argparse.Namespace) -> int:
            if arguments.refuse:
                (arguments.out / ".lock").touch()
                raise SerError("refused")
            asked.append(str(arguments.out))
            if not arguments.resume:
                (arguments.out / "result").touch()
            return 0

        return asked[0] if run(job, made, words) == 0 else None

    return call


def test_without_out_each_start_has_a_new_dated_folder_that_is_named_first(
    with_out: Callable[..., str | None], capsys: Capture
) -> None:
    assert [with_out() for _ in "ab"] == ["runs/2026-11-30_094636", "runs/2026-11-30_094636_2"]
    assert capsys.readouterr().err.splitlines()[0].endswith(" runs/2026-11-30_094636")
    assert with_out("--out", "mine/x", "--resume") == "mine/x"
    assert not Path("mine").exists()
    assert capsys.readouterr().err == ""


def test_a_dated_folder_that_nothing_was_put_into_goes(with_out: Callable[..., str | None], capsys: Capture) -> None:
    assert with_out("--refuse") is with_out("--resume") is None
    assert list(Path.cwd().iterdir()) == []
    capsys.readouterr()
    Path("runs").write_text("a file")
    assert with_out("--refuse") is None
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
        (PermissionError(errno.EACCES, "shut", "a.csv"), 2, "a.csv"),
        (OSError(errno.ENOSPC, "disk full"), 2, "disk full"),
    ],
)
def test_exit_codes(error: BaseException, code: int, text: str, capsys: Capture) -> None:
    stdout = sys.stdout
    assert run(raises(error), parser(), ["--data_csv", "x"]) == code
    sys.stdout = stdout
    said = capsys.readouterr().err
    assert text in said
    assert said.count("\n") == bool(text)


def test_our_mistakes_leave_a_log_and_no_traceback(capsys: Capture, monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(_common.tempfile, "tempdir", str(tmp_path))
    assert run(raises(RuntimeError("boom")), parser(), ["--data_csv", "x"]) == 70
    talk = capsys.readouterr().err
    (log,) = tmp_path.iterdir()
    assert str(log) in talk
    assert "Traceback" not in talk
    assert "boom" in log.read_text()


# --- manifest and extract --------------------------------------------------------------------------------------------


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


def test_a_folder_heeds_the_label_map_and_refuses_a_root(tmp_path: Path, capsys: Capture) -> None:
    for name in ("excited/a.wav", "sad/b.wav"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    words = ["--data_dir", str(tmp_path), "--out", "x", "--label_map", "excited=happy"]
    assert set(extract.read_data(extract.build_parser().parse_args(words))["label"]) == {"happy", "sad"}
    assert extract.main([*words, "--root", str(tmp_path)]) == 2
    assert "--root" in capsys.readouterr().err


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path, capsys: Capture) -> None:
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
    assert "replaced" in capsys.readouterr().err


def test_a_manifest_takes_no_place_of_something_else(tmp_path: Path) -> None:
    clip = tmp_path / "sad" / "a.wav"
    clip.parent.mkdir()
    clip.write_bytes(b"x")
    for out in (tmp_path, clip, clip / "x.csv"):
        assert manifest.main([str(tmp_path), "--out", str(out)]) == 2
    assert clip.read_bytes() == b"x"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["manifest", "nowhere", "--out", "x.csv"], "nowhere"),
        (["extract", "--data_csv", "nowhere.csv", "--out", "x"], "nowhere.csv"),
        (["extract", "--data_dir", "nowhere", "--out", "x"], "nowhere"),
        (["extract", "--data_csv", "nowhere.csv", "--out", "x", "--window_s", "nan"], "finite"),
        (["extract", "--out", "x"], "--data_csv"),
        (["train", "--features", "x", "--use_focal", "maybe"], "maybe"),
        (["dance"], "dance"),
        ([], "usage"),
    ],
)
def test_what_is_not_there_is_one_line_and_2(
    words: list[str], named: str, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    talk = capsys.readouterr().err
    assert named in talk
    assert "Traceback" not in talk
    assert talk.count("\n") == 1 or not words
    assert not list(tmp_path.iterdir())
