"""`ser --help` and the help of every command: complete, with examples that the command's own parser takes."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cli
from jobs._common import Parser
from pipeline.models.backends import ensure_onnx
from pipeline.models.bundle import load_bundle
from pipeline.training.config import FitConfig

COMMANDS = sorted(cli.COMMANDS)
ROOT = Path(__file__).resolve().parents[2]


def parser_of(command: str) -> Parser:
    made = importlib.import_module(f"jobs.{command}").build_parser()
    assert isinstance(made, Parser)
    return made


def examples(command: str) -> list[list[str]]:
    """The words of each `example:` line, without the command itself."""
    parser = parser_of(command)
    text = " ".join(((parser.epilog or "") % {"prog": parser.prog}).split())
    lines = [part.split(";")[0].strip() for part in re.split(r"examples?:", text)[1:]]
    found = []
    for line in lines:
        words = shlex.split(line)
        start = ["ser", command] if words[0] == "ser" else ["python", "-m", f"jobs.{command}"]
        assert words[: len(start)] == start, line
        found.append(words[len(start) :])
    return found


def test_the_list_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^  (\w+) +\S", shown, flags=re.MULTILINE) == list(cli.COMMANDS)
    assert re.search(r"example", shown)


def test_the_version_is_the_one_to_cite(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    (cited,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert capsys.readouterr().out == f"ser {cited}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_that_parses(command: str) -> None:
    found = examples(command)
    assert found
    for words in found:
        parsed, further = parser_of(command).parse_known_args(words)
        assert isinstance(parsed, argparse.Namespace)
        if command != "submit":  # whose further words are those of another command
            assert not further


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_called_as_it_was_given(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: ser {command} ")
    assert cli.main([command, "--no_such_option"]) == 2
    assert f"ser {command} --help" in capsys.readouterr().err
    module = importlib.import_module(f"jobs.{command}")
    assert module.main(["--help"]) == 0
    assert f"ser {command}" not in capsys.readouterr().out.split("\n\n")[0] or command == "submit"


HEAVY = ("pandas", "pyarrow", "scipy", "scipy.stats", "scipy.optimize", "torch", "ray", "matplotlib", "sklearn")
HEAVY += ("librosa", "httpx", "fastapi")
SAMPLE = str(Path(__file__).resolve().parents[2] / "samples" / "ben_sad_window.wav")


@pytest.mark.parametrize(
    "commands",
    [
        {f"infer --file {SAMPLE}": {"scipy"}},
        {
            "score --input x.csv --out out --no_report": {"pandas", "pyarrow"},
            "score --input x.csv --out out": {"pandas", "pyarrow", "scipy", "matplotlib"},
        },
    ],
    ids=["infer", "score"],
)
def test_what_a_command_imports(commands: dict[str, set[str]], tmp_path: Path) -> None:
    """Nothing heavy that it does not use, and no help anything heavy: that costs every start seconds."""
    ensure_onnx(load_bundle())  # in a new checkout the first use exports it, with PyTorch
    (tmp_path / "x.csv").write_text(f"speech,label\n{SAMPLE},sad\n")
    script = (
        "import sys\nfrom jobs import cli\nif __name__ == '__main__':\n"
        f"    assert all(cli.main([command, '--help']) == 0 for command in {COMMANDS})\n"
        f"    for words, needed in [('--help', set()), *{commands}.items()]:\n"
        "        assert cli.main(words.split()) == 0\n"
        f"        loaded = {{name for name in {HEAVY} if name in sys.modules}}\n"
        "        assert loaded == needed, (words, loaded)\n"
    )
    (tmp_path / "run.py").write_text(script)  # a file: the process that decodes imports it again
    run = subprocess.run(
        [sys.executable, "run.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", ["train", "crossval"])
def test_the_help_of_a_training_is_short_and_help_all_is_whole(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(word: str) -> list[str]:
        assert cli.main([command, word]) == 0
        return list(dict.fromkeys(re.findall(r"^  (?:-h, )?(--\w+)", capsys.readouterr().out, flags=re.MULTILINE)))

    short, whole = shown("--help"), shown("--help-all")
    assert len(short) <= 12
    assert {"--out", "--epochs", "--lr", "--oversample_boost", "--use_focal", "--help_all"} <= set(short)
    usual = [name for name in short if not name.startswith("--help")]
    assert whole[: len(usual)] == usual
    options = {
        name for action in parser_of(command)._actions for name in action.option_strings if name.startswith("--")
    }
    assert set(whole) == options


def test_every_setting_of_a_training_is_an_option_with_the_same_default() -> None:
    given = parser_of("train").parse_args(["--features", "x"])
    settings = FitConfig()
    texts = {"class_weights": "none", "oversample_boost": "", "augment": ""}
    for option in FitConfig.options():
        assert getattr(given, option.name) == texts.get(option.name, getattr(settings, option.name)), option.name
    machine = {"mixed_precision", "channels_last"}
    assert {option.name for option in FitConfig.options()} | machine == set(settings.to_dict())
