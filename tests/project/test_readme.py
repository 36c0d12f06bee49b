"""Every command of README.md and of docs/ runs here on small synthetic data, or is known to run elsewhere.

Commands are the lines of blocks marked sh or powershell. A command that this file does not know fails: it is new or
changed, and must be run somewhere first.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
from serving import Bridge, LocalService

from jobs import cli
from jobs._paths import read_words
from pipeline.models.bundle import Bundle
from serve.client import Client

pytestmark = [pytest.mark.docs, pytest.mark.usefixtures("undrawn")]
ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
ALL = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", ALL, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"^ +", "", body, flags=re.MULTILINE) for body in found]


LINES = "\n".join(blocks("sh") + blocks("powershell")).splitlines()
COMMANDS = dict.fromkeys(filter(None, (re.sub(r" +#.*$", "", line).strip() for line in LINES)))
MAKE, SER, CURL, RAY = (
    [line for line in COMMANDS if line.startswith(f"{word} ")] for word in ("make", "ser", "curl", "ray job submit")
)
# Set-up of an environment, and the demo, which has a test of its own
BY_HAND = re.compile(r"source \S+|(python3|py -3\.11) -m venv |(\S+/)?pip |\S+\.ps1|conda |python samples/demo\.py")
MORE = {  # without Ray, and with the small bundle where the shipped one would answer
    "score": ["--num_cpus", "0", "--model_weights", "runs/first"],
    "evaluate": ["--num_cpus", "0"],
    "infer": ["--model_weights", "runs/first"],
    "train": ["--num_workers", "0"],
    "crossval": ["--folds", "2", "--inner_val", "0"],  # 64 clips of four speakers
}


def named(*names: str) -> list[str]:
    return [line for line in SER if line.split()[1] in names]


LONG, ELSEWHERE, PREDICT = named("extract", "train", "crossval", "calibrate"), named("submit"), named("predict")


def as_words(line: str) -> list[str]:
    name, *words = shlex.split(line)[1:]
    return [name, *MORE.get(name, []), *words]


def test_every_command_is_known() -> None:
    others = {*COMMANDS} - {*MAKE, *SER, *CURL, *RAY}
    assert {line for line in others if not BY_HAND.match(line)} == set(), "run a new command in a test"
    assert len(SER) > 8
    assert len(CURL) == 2
    for name in re.findall(r"[\w/.-]+\.(?:txt|py)\b", " ".join(others)):
        assert (ROOT / name).is_file(), name
    targets = {*re.findall(r"`make ([\w-]+)", ALL), *(line.split()[1] for line in MAKE)}
    dry = subprocess.run(["make", "-n", *sorted(targets)], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr


@pytest.fixture
def desk(ravdess_like: Path, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the commands name, small: recordings, manifests, a run, samples."""
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    shutil.copytree(ravdess_like / "Actor_01", tmp_path / "calls")
    (tmp_path / "calls" / next((tmp_path / "calls").iterdir()).name).rename(tmp_path / "calls/a.wav")
    (tmp_path / "RAVDESS").symlink_to(ravdess_like)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["manifest", "RAVDESS", "--out", "metadata.csv"]) == 0
    table = pd.read_csv("metadata.csv")
    table[table["speaker"] == "RAVDESS_02"].to_csv("val_metadata.csv", index=False)
    shutil.copytree(tiny_bundle.folder, tmp_path / "runs/first")
    return tmp_path


@pytest.mark.parametrize("line", [line for line in SER if line not in {*LONG, *ELSEWHERE, *PREDICT}])
def test_short_commands_run(line: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = as_words(line)
    assert cli.main(words) == 0, capsys.readouterr().err
    if "--out" in words:
        assert (desk / words[words.index("--out") + 1]).exists()


@pytest.mark.slow
def test_the_long_ones_run_one_after_the_other(
    desk: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Extract, train, crossval, calibrate, as README and docs have them, with one epoch instead of many."""
    shutil.rmtree(desk / "runs")
    for line in LONG:
        words = as_words(re.sub(r"--epochs \d+", "--epochs 1", line))
        assert cli.main(words) == 0, (line, capsys.readouterr().err)
    assert (desk / "runs/first/config.json").is_file()
    assert (desk / "protocols/protocols.html").is_file()


def test_the_answers_shown_are_those_of_the_shipped_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words as they are, percentages within half a point: another CPU rounds differently."""
    (shown,) = (body for body in blocks("text") if body.startswith("file "))
    line = next(line for line in SER if line.startswith("ser infer --file samples/"))
    monkeypatch.chdir(ROOT)
    assert cli.main([*shlex.split(line)[1:], "--backend", "torch"]) == 0
    given = capsys.readouterr().out
    number = r"[\d.]+(?=%)"
    assert re.sub(number, "", shown).split() == re.sub(number, "", given).split()
    assert [*map(float, re.findall(number, shown))] == pytest.approx([*map(float, re.findall(number, given))], abs=0.5)


def test_what_ray_is_sent_is_a_job_with_its_options() -> None:
    for line in RAY:
        python, flag, module, *options = shlex.split(line.partition(" -- ")[2])
        assert (python, flag) == ("python", "-m")
        read_words(import_module(module).build_parser(), options)


def test_what_curl_and_ser_predict_send_is_answered(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The requests that they would send, to the application in this process."""
    service = LocalService(tiny_bundle)
    for line in CURL:
        words = shlex.split(line)
        (path,) = re.findall(r"http://127\.0\.0\.1:8000(/\S+)", line)
        file = ROOT / re.findall(r"@(\S+)", line)[0]
        if "-F" in words:
            answer = service.post(path, files={"file": (file.name, file.read_bytes())})
            assert answer.json()["files"][0]["label"] in tiny_bundle.labels
        else:
            name, value = words[words.index("-H") + 1].split(": ")
            answer = service.post(path, content=file.read_bytes(), headers={name: value})
            assert {score["label"] for score in answer.json()} == set(tiny_bundle.labels)
        assert answer.status_code == 200
    monkeypatch.setattr("serve.client.Client", lambda url, key: Client(url, key, transport=Bridge(service)))
    monkeypatch.chdir(ROOT)
    for line in PREDICT:
        assert cli.main(shlex.split(line)[1:]) == 0
        assert "ben_sad_window.wav" in capsys.readouterr().out
