"""`ser --help` and the help of every command: complete, with examples that the command's own parser takes."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex

import pytest

from jobs import cli
from jobs._common import Parser

COMMANDS = sorted(cli.COMMANDS)


def parser_of(command: str) -> Parser:
    made = importlib.import_module(f"jobs.{command}").build_parser()
    assert isinstance(made, Parser)
    return made


def examples(command: str) -> list[list[str]]:
    """The words of each `example:` line, without the command itself."""
    text = " ".join((parser_of(command).epilog or "").split())
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
def test_every_option_says_what_it_does(command: str) -> None:
    parser = parser_of(command)
    assert len(parser.description or "") > 30
    for action in parser._actions:
        assert action.help, action.option_strings or action.dest
        if isinstance(action.default, str) and action.help is not argparse.SUPPRESS and "%" in action.help:
            parser.format_help()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_goes_to_stdout_with_exit_code_0(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "example" in shown.out
