"""Every command of README.md and of docs/: run here on small synthetic data, or named with the test that runs it.

Commands of docs/ are those in blocks marked sh or powershell; README and the pages in MARKED mark every block.

A command that this file does not know fails: it is new or changed, and must be run somewhere first.
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
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
MARKED = [
    "README.md",
    *(
        f"{topic}.md"
        for topic in ("architecture", "cli", "data", "install", "page", "results", "troubleshooting", "windows")
    ),
]
ALL = "\n".join(PAGES.values())

# Commands that other tests run. A make target must exist; its recipe is what the test named here runs.
ELSEWHERE = {
    "make demo": "project/test_demo.py::test_samples_twice",
    "make test": "project/test_contributing.py::test_the_tests_of_the_examples_pass",
    "make setup": "project/test_architecture.py::test_every_dependency_is_pinned_once_in_the_file_that_needs_it",
    "make ravdess": "jobs/test_jobs_ravdess.py::test_from_the_server_to_a_manifest",
    "make serve": "serve/test_serve_ray.py::test_infer_and_service_agree",
    "make app": "app/test_app_start.py::test_a_signal_stops_both",
}
# Set-up of an environment: pip and shells of other systems. Files and options in them are checked below.
BY_HAND = {
    "source .venv/bin/activate",
    "python3 -m venv .venv",
    ".venv/bin/pip install -r requirements.txt",
    ".venv/bin/pip install --no-deps -e .",
    "py -3.11 -m venv .venv",
    r".venv\Scripts\Activate.ps1",
    "pip install -r requirements-app.txt",
    "pip install --no-deps -e .",
    "python samples/demo.py",
    "conda create -n ser python=3.11 -y",
    "conda activate ser",
}
RAY_FREE = {"score": ["--num_cpus", "0"], "evaluate": ["--num_cpus", "0"], "train": ["--num_workers", "0"]}
MODEL_TAKERS = {"score", "evaluate", "infer"}


def blocks(language: str) -> list[str]:
    return [
        re.sub(r"^ +", "", body, flags=re.MULTILINE)
        for body in re.findall(rf"^ *```{language}\n(.*?)^ *```$", ALL, flags=re.MULTILINE | re.DOTALL)
    ]


def commands() -> list[str]:
    """Lines of the sh and powershell blocks, comments cut off."""
    lines = [line for language in ("sh", "powershell") for body in blocks(language) for line in body.splitlines()]
    found = [re.sub(r" +#.*$", "", line).strip() for line in lines]
    return [line for line in found if line]


def starting(word: str) -> list[str]:
    """The commands of a program, each once, in the order of the pages."""
    return list(dict.fromkeys(line for line in commands() if line.startswith(f"{word} ")))


SER, CURL, RAY = starting("ser"), starting("curl"), starting("ray job submit")
LONG = {"extract", "train", "crossval", "submit", "calibrate"}


PREDICT = [line for line in SER if line.startswith("ser predict ")]


def is_long(line: str) -> bool:
    return line.split()[1] in LONG


def test_every_block_is_marked_and_every_command_is_known() -> None:
    for name in MARKED:
        fences = re.findall(r"^ *```(\w*)$", PAGES[name], flags=re.MULTILINE)
        assert set(fences[::2]) <= {"sh", "text", "powershell"}, (
            f"{name}: mark blocks, sh for commands, text for output"
        )
    unknown = [line for line in commands() if line not in {*ELSEWHERE, *BY_HAND, *SER, *CURL, *RAY}]
    assert not unknown, "run it in a test, then name that test in ELSEWHERE"
    assert len(SER) > 8
    assert len(CURL) == 2


@pytest.mark.parametrize(("line", "test"), ELSEWHERE.items())
def test_what_is_run_elsewhere(line: str, test: str) -> None:
    assert line in commands(), "no longer in README or docs: take it out here"
    file, name = test.split("::")
    assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")
    if line.startswith("make "):
        dry = subprocess.run(["make", "-n", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True)
        assert dry.returncode == 0, dry.stderr


def test_set_up_by_hand_names_what_is_there() -> None:
    assert set(commands()) >= BY_HAND
    for line in BY_HAND:
        for name in re.findall(r"[\w/.-]+\.(?:txt|py)\b", line):
            assert (ROOT / name).is_file(), name
    inline = re.findall(r"`make ([\w-]+)", ALL)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(inline) <= targets


@pytest.fixture
def desk(ravdess_like: Path, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the commands name, small: recordings, manifests, a run, samples."""
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    shutil.copytree(ravdess_like / "Actor_01", tmp_path / "calls")
    (tmp_path / "calls" / next((tmp_path / "calls").iterdir()).name).rename(tmp_path / "calls/a.wav")
    (tmp_path / "RAVDESS").symlink_to(ravdess_like)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["manifest", "RAVDESS", "--out", "val_metadata.csv"]) == 0
    table = pd.read_csv("val_metadata.csv")
    table[table["speaker"] == "RAVDESS_02"].to_csv("val_metadata.csv", index=False)
    shutil.copytree(tiny_bundle.folder, tmp_path / "runs/first")
    return tmp_path


def as_words(line: str, bundle: str = "runs/first") -> list[str]:
    """The command's words, without Ray, and with the small bundle where the shipped one would answer."""
    words = shlex.split(line)[1:]
    more = RAY_FREE.get(words[0], [])
    if words[0] in MODEL_TAKERS and "--model_weights" not in words:
        more = [*more, "--model_weights", bundle]
    return [*words, *more]


@pytest.mark.parametrize("line", [line for line in SER if not is_long(line) and line not in PREDICT])
def test_short_commands_run(line: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(as_words(line)) == 0, capsys.readouterr().err
    words = shlex.split(line)
    if "--out" in words:
        assert (desk / words[words.index("--out") + 1]).exists()


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


@pytest.mark.slow
def test_the_long_ones_run_one_after_the_other(
    desk: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Extract, train, crossval, calibrate, as README and docs have them, with one epoch instead of many."""
    shutil.rmtree(desk / "runs")
    assert cli.main(["manifest", "RAVDESS", "--out", "metadata.csv"]) == 0
    for line in (line for line in SER if is_long(line) and not line.startswith("ser submit")):
        words = as_words(re.sub(r"--epochs \d+", "--epochs 1", line))
        words += ["--folds", "2", "--inner_val", "0"] if words[0] == "crossval" else []  # 64 clips of four speakers
        assert cli.main(words) == 0, (line, capsys.readouterr().err)
    assert (desk / "runs/first/config.json").is_file()
    assert (desk / "protocols/protocols.html").is_file()


@pytest.mark.parametrize("line", RAY)
def test_what_ray_is_sent_is_a_job_with_its_options(line: str) -> None:
    """On a cluster: tests/cluster/test_cluster_nodes.py and `make test-cluster`."""
    python, flag, module, *options = shlex.split(line.partition(" -- ")[2])
    assert (python, flag) == ("python", "-m")
    read_words(import_module(module).build_parser(), options)


@pytest.mark.parametrize("line", CURL)
def test_what_curl_sends_is_answered(line: str, tiny_bundle: Bundle) -> None:
    """The request that curl would send, to the application in this process."""
    words = shlex.split(line)[1:]
    url = next(word for word in words if word.startswith("http://"))
    assert url.startswith("http://127.0.0.1:8000/")
    path = url.removeprefix("http://127.0.0.1:8000")
    file = ROOT / re.findall(r"@(\S+)", line)[0]
    service = LocalService(tiny_bundle)
    if "-F" in words:
        answer = service.post(path, files={"file": (file.name, file.read_bytes())})
        assert answer.json()["files"][0]["label"] in tiny_bundle.labels
    else:
        name, value = words[words.index("-H") + 1].split(": ")
        answer = service.post(path, content=file.read_bytes(), headers={name: value})
        assert {score["label"] for score in answer.json()} == set(tiny_bundle.labels)
    assert answer.status_code == 200


@pytest.mark.parametrize("line", PREDICT)
def test_ser_predict_asks_the_service(
    line: str, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = LocalService(tiny_bundle)
    monkeypatch.setattr("serve.client.Client", lambda url, key: Client(url, key, transport=Bridge(service)))
    monkeypatch.chdir(ROOT)
    assert cli.main(shlex.split(line)[1:]) == 0
    assert "ben_sad_window.wav" in capsys.readouterr().out


def test_the_tree_names_every_module_that_it_claims() -> None:
    (tree,) = (body for body in blocks("text") if body.startswith("pipeline/"))
    rooms = {path.parent.name for path in ROOT.glob("pipeline/*/__init__.py")}
    named = re.findall(r"^(\w+)/", tree, flags=re.MULTILINE)
    assert rooms <= set(named)
    for name in set(named) - rooms:
        assert (ROOT / name).is_dir(), name
    jobs = re.search(r"^jobs/ +(.+?);", tree, flags=re.MULTILINE)
    assert jobs is not None
    assert set(jobs[1].split()) == set(cli.COMMANDS)


def test_messages_of_the_table_are_messages_of_the_code() -> None:
    """Each quoted message is somewhere in the sources, its changing parts aside."""
    sources = " ".join(
        path.read_text(encoding="utf-8") for p in ("pipeline", "jobs") for path in (ROOT / p).rglob("*.py")
    )
    messages = re.findall(r"^\| `([^`]+)` ", PAGES["troubleshooting.md"], flags=re.MULTILINE)
    assert len(messages) > 8
    for message in messages:
        if message.startswith("OMP:"):
            continue
        parts = re.split(r"\.\.\.|[A-Z]{3,}|\d[\d.:]*|'\w+'|[/(]|\ba\.wav\b|nan\b", message)
        for part in (part.strip(" ;,'):.-") for part in parts):
            assert len(part) < 8 or part in sources, (message, part)
