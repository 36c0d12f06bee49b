"""``ser ravdess`` against a local server: the whole way, interrupted, twice at once, with other things in the way."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from web_files import FileServer, serving

from jobs import manifest, ravdess
from pipeline.storage.journal import locked

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def packed(ravdess_like: Path) -> bytes:
    """The RAVDESS-like folder as an archive."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(ravdess_like.rglob("*.wav")):
            archive.write(path, path.relative_to(ravdess_like))
    return made.getvalue()


@pytest.fixture
def server(packed: bytes) -> Iterator[FileServer]:
    with serving(packed) as running:
        yield running


@pytest.fixture
def own(packed: bytes, tmp_path: Path) -> list[str]:
    """Options for the archive as a file of one's own."""
    (tmp_path / "own.zip").write_bytes(packed)
    return ["--archive", str(tmp_path / "own.zip"), "--md5", hashlib.md5(packed).hexdigest().upper()]


def words(server: FileServer, out: Path, *more: str) -> list[str]:
    return ["--out", str(out), "--base_url", server.url, "--md5", hashlib.md5(server.content).hexdigest(), *more]


def test_the_defaults_are_those_of_the_public_record() -> None:
    given = ravdess.build_parser().parse_args([])
    assert given.base_url == "https://zenodo.org/records/1188976/files"
    assert ravdess.ARCHIVE == "Audio_Speech_Actors_01-24.zip"
    assert given.md5 == "bc696df654c87fed845eb13823edef8a"


def test_from_the_server_to_a_manifest(server: FileServer, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "RAVDESS"
    assert ravdess.main(words(server, out)) == 0
    said = capsys.readouterr()
    assert said.out == f"64 recordings of 4 actors -> {out}\n"
    assert "CC BY-NC-SA 4.0" in said.err
    assert "CC BY-NC-SA 4.0" in (out / ravdess.NOTICE_FILE).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["RAVDESS"], "no archive, no lock stays"
    assert manifest.main([str(out), "--out", str(tmp_path / "metadata.csv")]) == 0
    assert len(pd.read_csv(tmp_path / "metadata.csv")) == 64
    asked = len(server.asked)
    assert ravdess.main(words(server, out)) == 0
    assert len(server.asked) == asked


def test_wrong_checksums_and_a_hostile_archive_leave_no_folder(
    server: FileServer, own: list[str], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "RAVDESS"
    for source in (["--base_url", server.url], own[:2]):
        assert ravdess.main(["--out", str(out), *source]) == 2
        assert "MD5" in capsys.readouterr().err
    evil = io.BytesIO()
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("../evil.wav", b"x")
    server.content = evil.getvalue()
    assert ravdess.main(words(server, out)) == 2
    assert ravdess.main(["--out", str(out), "--archive", str(tmp_path / "none.zip")]) == 2
    assert not out.exists()
    assert not list(tmp_path.rglob("evil.wav"))


def test_other_things_in_the_way_are_not_touched(
    server: FileServer, own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    assert ravdess.main(words(server, tmp_path / "mine")) == 2
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    assert server.asked == []
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    capsys.readouterr()
    assert ravdess.main(["--out", ".", *own]) == 2, "the folder one is in"
    assert "--out" in capsys.readouterr().err


def test_an_archive_of_ones_own_into_a_link_to_a_folder_elsewhere(own: list[str], tmp_path: Path) -> None:
    disk, link = tmp_path / "disk" / "data", tmp_path / "here" / "RAVDESS"
    for folder in (disk, link.parent):
        folder.mkdir(parents=True)
    link.symlink_to(disk)
    assert ravdess.main(["--out", str(link), *own]) == 0
    assert len(list(disk.rglob("*.wav"))) == 64
    assert link.is_symlink()
    assert [path.name for path in disk.parent.iterdir()] == ["data"]
    assert (tmp_path / "own.zip").is_file()


def test_twice_at_once(server: FileServer, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "RAVDESS"
    with locked(tmp_path / "RAVDESS.download/.lock", "fetching it"):
        assert ravdess.main(words(server, out)) == 2
    assert f"{out}" in capsys.readouterr().err
    assert ravdess.main(words(server, out, "--keep_archive")) == 0, "the lock goes with its holder"
    assert (tmp_path / "RAVDESS.download" / ravdess.ARCHIVE).read_bytes() == server.content


def test_killed_in_the_middle_and_started_again(server: FileServer, tmp_path: Path) -> None:
    """A process ended with -9 while the server keeps it waiting: the next one goes on, lock and leftovers or not."""
    out = tmp_path / "RAVDESS"
    half = len(server.content) // 2
    server.cuts = [half]
    server.statuses = [200] + [503] * 100
    command = [sys.executable, "-m", "jobs.ravdess", *words(server, out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 60
    while len(server.asked) < 2 and time.monotonic() < deadline_s and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert len(server.asked) >= 2
    server.statuses, server.asked = [], []
    assert ravdess.main(words(server, out)) == 0
    assert server.asked == [(f"bytes={half}-", '"one"')]
    assert len(list(out.rglob("*.wav"))) == 64
