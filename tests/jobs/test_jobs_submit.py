"""``ser submit``: what is uploaded, where paths go, what the user sees, the exit code. The cluster is an actor here."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import cli, submit
from jobs._common import Parser
from jobs._follow import follow
from jobs._package import PROJECT, describe, pack
from jobs._paths import Placed, place, read_words
from jobs.extract import build_parser as extract_parser
from jobs.score import build_parser as score_parser
from jobs.train import build_parser as train_parser
from pipeline.cluster.submit import ClusterError, JobClient
from pipeline.models.bundle import Bundle
from pipeline.storage.errors import SerError
from tests.support.processes import free_port

Capture = pytest.CaptureFixture[str]
SHARED = Path("/shared")
EXTRACT = ["extract", "--data_dir", "/a", "--out", "/x"]


class Ray:
    """What ``JobSubmissionClient`` offers. ``sittings``: the log as each connection shows it; an error ends one."""

    def __init__(
        self, *sittings: list[Any], code: int | None = 0, status: str = "SUCCEEDED", message: str = ""
    ) -> None:
        self.sittings, self.code, self.status, self.message = list(sittings), code, status, message
        self.submitted: dict[str, Any] = {}
        self.files: set[str] = set()
        self.stopped: list[str] = []

    def submit_job(self, **what: Any) -> str:
        self.submitted = what
        folder = Path(what["runtime_env"]["working_dir"])
        self.files = files_below(folder)
        return str(what["submission_id"])

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for item in self.sittings.pop(0) if self.sittings else []:
            if isinstance(item, BaseException):
                raise item
            yield item

    def get_job_info(self, name: str) -> Any:
        ended = not self.sittings
        return SimpleNamespace(
            status=self.status if ended else "RUNNING",
            driver_exit_code=self.code if ended else None,
            message=self.message,
        )

    def stop_job(self, name: str) -> bool:
        self.stopped.append(name)
        return True


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ray]:
    """``cluster(...)`` is the cluster that ``ser submit`` finds."""

    def prepare(*sittings: list[Any], **how: Any) -> Ray:
        ray = Ray(*sittings, **how)
        monkeypatch.setattr(submit, "connect", lambda address: JobClient(ray, address or "http://here"))
        return ray

    return prepare


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder."""
    place = tmp_path / "mine"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def placed(job: str, parser: Parser, line: str, storage: Path | None = SHARED) -> Placed:
    words = line.split()
    return place(job, words, read_words(parser, words), storage)


def test_where_paths_go(folder: Path) -> None:
    (folder / "features").mkdir()
    found = placed("train", train_parser(), "--features features --epochs 3 --out runs/first --use_gpu False")
    expected = "--features /shared/features --epochs 3 --out /shared/runs/first --use_gpu False"
    assert " ".join(found.words) == expected
    assert found.shipped == {}
    line = "--data_dir /data/calls --out /results/x"
    assert placed("extract", extract_parser(), line, None).words == line.split()
    line = f"--input s3://bucket/calls --out /o --model_weights {folder / 'm.pt'}"
    words = placed("score", score_parser(), line, None).words
    assert (words[1], words[-1]) == ("s3://bucket/calls", str(folder / "m.pt"))
    words = placed("extract", extract_parser(), "--data-dir=audio --pitch-semitones=-1,1 --out=x").words
    assert words == ["--data_dir=/shared/audio", "--pitch_semitones=-1,1", "--out=/shared/x"]


def test_a_csv_is_uploaded_and_its_recordings_start_from_the_storage(folder: Path) -> None:
    for name in ("lists/a.csv", "../a.csv"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("speech\nx.wav\n")
    found = placed("extract", extract_parser(), "--data_csv lists/a.csv --out x")
    assert found.words == ["--data_csv", "lists/a.csv", "--out", "/shared/x", "--root", "/shared/lists"]
    assert found.shipped == {"lists/a.csv": Path("lists/a.csv")}
    found = placed("extract", extract_parser(), "--data_csv lists/a.csv --out x --root audio")
    assert found.words[-2:] == ["--root", "/shared/audio"]
    found = placed("extract", extract_parser(), "--data_csv ../a.csv --root / --out x")
    assert found.words[1] == "inputs/a.csv"
    assert list(found.shipped) == ["inputs/a.csv"]
    with pytest.raises(SerError, match="--root"):
        placed("extract", extract_parser(), "--data_csv lists/a.csv --out /x", None)


def test_without_out_a_dated_folder_lies_on_the_storage(folder: Path) -> None:
    words = placed("train", train_parser(), "--features features").words
    assert words[:3] == ["--features", "/shared/features", "--out"]
    assert words[3].startswith("/shared/runs/20")
    with pytest.raises(SerError, match="--storage_path"):
        placed("train", train_parser(), "--features /features", None)


def test_a_model_is_uploaded_whole_or_by_its_weights(folder: Path, tiny_bundle: Bundle) -> None:
    (folder / "runs").mkdir()
    (folder / "runs" / "tiny").symlink_to(tiny_bundle.folder)
    for given in ("runs/tiny", "runs/tiny/tiny.pt"):
        found = placed("score", score_parser(), f"--input /calls --out x --model_weights {given}")
        assert found.words[-1] == given
        assert list(found.shipped) == ["runs/tiny"]
    pack(folder.parent / "upload", found.shipped)
    sent = {path.name for path in (folder.parent / "upload" / "runs" / "tiny").iterdir()}
    assert {"tiny.pt", "config.json", "model.onnx"} <= sent, "nodes need not export the network themselves"


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_code_and_what_is_named_is_uploaded(folder: Path, tmp_path: Path) -> None:
    (folder / "a.csv").write_text("speech\nx.wav\n")
    size = pack(tmp_path / "upload", {"a.csv": Path("a.csv")})
    files = files_below(tmp_path / "upload")
    assert {name.split("/")[0] for name in files} == {"a.csv", "pipeline", "jobs", "serve"}
    assert not [name for name in files if "__pycache__" in name or name.endswith((".wav", ".parquet", ".npy"))]
    assert size < 3 * 2**20
    needed = {f"pipeline/{name}" for name in files_below(PROJECT / "pipeline") if "__pycache__" not in name}
    assert needed | {"jobs/train.py"} <= files
    assert re.match(r"\d\.\d MiB \(code ", describe(tmp_path / "upload"))


def test_the_whole_way(cluster: Callable[..., Ray], capfd: Capture) -> None:
    ray = cluster(["labels: ...\n", "2 rows, 0 failed\n"], code=0)
    words = "submit extract --data_dir audio --out x --storage_path /shared --env RAY_DATA_TRACE=1"
    assert cli.main(words.split()) == 0
    assert ray.submitted["entrypoint"] == "python -m jobs.extract --data_dir /shared/audio --out /shared/x"
    environment = ray.submitted["runtime_env"]["env_vars"]
    assert environment["RAY_DATA_TRACE"] == "1"
    assert environment["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert ray.submitted["submission_id"].startswith("ser-extract-")
    assert not [name for name in ray.files if name.startswith("models/")], "extraction needs no model"
    out, err = capfd.readouterr()
    assert out == "labels: ...\n2 rows, 0 failed\n"
    assert "uploading" in err
    cluster(["never read\n"])
    assert submit.main([*EXTRACT, "--no_wait", "--submission_id", "mine"]) == 0
    assert capfd.readouterr().out == "mine\n"


@pytest.mark.parametrize(("code", "ours"), [(0, 0), (2, 2), (4, 4), (70, 70), (-9, 137)])
def test_the_exit_code_is_the_jobs_own(cluster: Callable[..., Ray], code: int, ours: int) -> None:
    cluster(["text\n"], code=code, status="FAILED" if code else "SUCCEEDED")
    assert submit.main(EXTRACT) == ours


def test_a_job_that_never_ran_and_one_that_was_stopped(cluster: Callable[..., Ray], capfd: Capture) -> None:
    cluster([], code=None, status="FAILED", message="Traceback\nthe node is gone\n")
    assert submit.main(EXTRACT) == 70
    err = capfd.readouterr().err
    assert "the node is gone" in err
    assert "Traceback" not in err
    cluster(["x"], code=None, status="STOPPED")
    assert submit.main(EXTRACT) == 130


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("extract --data_dir /a", "--out"),
        ("extract --data_dir a --out /x", "--data_dir a "),
        ("extract --data_dir /a --out /x --storage_path s3://bucket", "absolute path"),
        ("extract --data_dir /a --out /x --env SER_API_KEY=1", "secrets"),
        ("extract --data_dir /a --out /x --env NAME", "NAME=VALUE"),
        ("extract --data_dir /a --out /x --max_upload_mb 0.1", "--max_upload_mb 0.1"),
        ("serve --port 1", "invalid choice"),
        ("extract --data_dir /a --out /x --no_such_option", "no_such_option"),
    ],
)
def test_refused_in_one_line_before_anything_is_sent(
    cluster: Callable[..., Ray], capfd: Capture, line: str, words: str
) -> None:
    ray = cluster()
    assert submit.main(line.split()) == 2
    err = capfd.readouterr().err
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert ray.submitted == {}


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    address = f"http://127.0.0.1:{free_port()}"
    assert submit.main([*EXTRACT, "--address", address]) == 2
    err = capfd.readouterr().err.strip()
    assert address in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_lost_connection_prints_nothing_twice(capfd: Capture) -> None:
    closed = RuntimeError("closed")
    ray = Ray(["one\n", "two\n", closed], ["one\ntwo\nthr", closed], ["one\ntwo\nthree\n"])
    assert follow(JobClient(ray, "here"), "job", sleep=lambda _: None) == 0
    assert capfd.readouterr().out == "one\ntwo\nthree\n"


def test_a_cluster_that_stays_away_is_told() -> None:
    gone = [[RuntimeError("refused")] for _ in range(100)]
    with pytest.raises(ClusterError, match="refused"):
        follow(JobClient(Ray(*gone), "here"), "job", sleep=lambda _: None, patience_s=3)


def test_ctrl_c_leaves_the_job_alone_and_a_second_one_stops_it(capfd: Capture) -> None:
    ray = Ray(["one\n", KeyboardInterrupt()])
    assert follow(JobClient(ray, "here"), "job", sleep=lambda _: None) == 130
    err = capfd.readouterr().err
    assert ray.stopped == []
    assert "ray job stop job" in err

    def impatient(_: float) -> None:
        raise KeyboardInterrupt

    ray = Ray(["one\n", KeyboardInterrupt()])
    assert follow(JobClient(ray, "here"), "job", sleep=impatient) == 130
    assert ray.stopped == ["job"]


def test_ctrl_c_while_nothing_comes(capfd: Capture) -> None:
    """The signal arrives inside the event loop that waits for the log."""

    class Silent(Ray):
        async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            await asyncio.sleep(30)
            yield "never"

    assert follow(JobClient(Silent(), "here"), "job", sleep=lambda _: None) == 130
    assert "ray job stop job" in capfd.readouterr().err
