"""Folder scans over everything that a file system can hold, and file names as text."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage.files import MAX_DEPTH, local_path, path_text, scan

AUDIO = {".wav", ".flac"}
LEVELS = 4000


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(root: Path) -> list[str]:
    return [os.path.relpath(local_path(text), root) for text in scan(root, AUDIO).files]


def test_order_extensions_and_what_is_left_out(tmp_path: Path) -> None:
    make(tmp_path, "b/2.wav", "b/10.WAV", "a.flac", "c.Wav", "b/notes.txt", "b/noextension", "b/x.wav.part")
    make(tmp_path, ".hidden.wav", ".git/d.wav", "b/._2.wav")
    found = scan(tmp_path, AUDIO)
    assert names(tmp_path) == ["a.flac", "c.Wav", "b/10.WAV", "b/2.wav"]
    assert all(os.path.isabs(path) for path in found.files)
    assert (found.hidden, found.linked) == (3, 0)
    assert found.other == {".txt": 1, "": 1, ".part": 1}
    assert found.skipped() == "3 hidden, 1 without ending, 1 .part, 1 .txt"
    (tmp_path / "only").mkdir()
    assert (scan(tmp_path / "only", AUDIO).files, scan(tmp_path / "only", AUDIO).skipped()) == ((), "")
    with pytest.raises(FileNotFoundError):
        scan(tmp_path / "gone", AUDIO)


def test_odd_names(tmp_path: Path) -> None:
    odd = ["a b.wav", "line\nbreak.wav", "😀.wav", "-rf.wav", "=1+1.wav", "ü.wav", "a\\b.wav", "'.wav"]
    make(tmp_path, *odd)
    assert set(scan(tmp_path, AUDIO).files) == {str(tmp_path / name) for name in odd}


def test_names_that_are_not_utf_8_become_uris_and_open_again(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9 100%.wav"
    Path(os.fsdecode(raw)).write_text("here")
    (text,) = scan(tmp_path, AUDIO).files
    assert text == f"file://{tmp_path}/caf%E9%20100%25.wav"
    assert Path(local_path(text)).read_text() == "here"
    assert local_path("file://localhost/a%20b.wav") == "/a b.wav"


@given(st.binary(min_size=1, max_size=60).map(lambda raw: b"/" + raw.replace(b"\0", b"x")))
def test_every_name_survives_as_text(raw: bytes) -> None:
    text = path_text(raw)
    text.encode("utf-8")
    assert os.path.normpath(os.fsencode(local_path(text))) == os.path.normpath(raw)


def test_symlink_loops_end_and_folders_are_entered_once(tmp_path: Path) -> None:
    root = tmp_path / "root"
    make(root, "one/a.wav", "two/b.wav")
    make(tmp_path, "store/x.wav")
    (root / "one" / "up").symlink_to(root)
    (root / "one" / "self").symlink_to(".")
    (root / "three").symlink_to("two")
    (root / "dangling.wav").symlink_to("nowhere.wav")
    (root / "round.wav").symlink_to("round.wav")
    (root / "out").symlink_to(tmp_path / "store")
    (root / "out again").symlink_to(tmp_path / "store")
    (root / "link.wav").symlink_to(tmp_path / "store" / "x.wav")
    os.link(tmp_path / "store" / "x.wav", root / "hard.wav")
    files_here = ["dangling.wav", "hard.wav", "link.wav", "round.wav"]
    assert names(root) == [*files_here, "one/a.wav", "out/x.wav", "two/b.wav"]
    assert scan(root, AUDIO).linked == 4


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A tree of 4,000 levels with ten recordings at its top; too deep for Python's own functions to remove."""
    (tmp_path / "deep").mkdir()
    folder = os.open(tmp_path / "deep", os.O_RDONLY)
    for level in range(LEVELS):
        if level < 10:
            os.close(os.open("x.wav", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
        os.mkdir("d", dir_fd=folder)
        folder = step(folder, "d")
    yield tmp_path / "deep"
    for _ in range(LEVELS):
        folder = step(folder, "..")
        os.rmdir("d", dir_fd=folder)
        with contextlib.suppress(FileNotFoundError):
            os.unlink("x.wav", dir_fd=folder)
    os.close(folder)


def step(folder: int, name: str) -> int:
    there = os.open(name, os.O_RDONLY, dir_fd=folder)
    os.close(folder)
    return there


def test_deep_trees_are_cut_with_a_message(deep: Path) -> None:
    found = scan(deep, AUDIO)
    assert len(found.files) == 10
    assert found.too_deep == (str(deep) + "/d" * MAX_DEPTH,)
    assert "too deep" in found.skipped()
    assert len(scan(deep, AUDIO, max_depth=3).files) == 3


def test_a_folder_that_cannot_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "good/a.wav", "locked/b.wav")
    listed = os.scandir

    def scandir(path: bytes) -> object:
        if path.endswith(b"locked"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = scan(tmp_path, AUDIO)
    assert found.files == (str(tmp_path / "good" / "a.wav"),)
    assert found.unreadable == (str(tmp_path / "locked"),)
    assert "cannot be read" in found.skipped()
    with pytest.raises(PermissionError):
        scan(tmp_path / "locked", AUDIO)
