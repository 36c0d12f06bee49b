"""Archives that are hostile, damaged, too large or in the way; nothing of them stays."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from pipeline.storage.download import ArchiveError, UnpackLimits, unpack


def archive(folder: Path, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    path = folder / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in entries:
            made.writestr(name, data)
    return path


def with_mode(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = mode << 16
    return info


def nothing_but_the_archive(folder: Path) -> None:
    assert [path.name for path in folder.rglob("*")] == ["a.zip"]


def test_files_and_folders(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    path = archive(tmp_path, ("Actor_01/", b""), ("Actor_01/a.wav", b"abc"), ("Actor_02/deep/b.wav", b"defgh"))
    count = unpack(path, tmp_path / "out", on_progress=lambda done, total: steps.append((done, total)))
    assert count == 2
    assert (tmp_path / "out/Actor_01/a.wav").read_bytes() == b"abc"
    assert (tmp_path / "out/Actor_02/deep/b.wav").read_bytes() == b"defgh"
    assert steps == [(3, 8), (8, 8)]
    assert {p.name for p in tmp_path.iterdir()} == {"a.zip", "out"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../evil.wav", "leaves the folder"),
        ("a/../../evil.wav", "leaves the folder"),
        ("/etc/evil.wav", "leaves the folder"),
        ("..\\evil.wav", "backslashes"),
        ("C:evil.wav", "colons"),
        ("a\x1b[2J.wav", "control characters"),
        (with_mode("link.wav", stat.S_IFLNK | 0o777), "link"),
        (with_mode("pipe.wav", stat.S_IFIFO | 0o644), "device"),
    ],
)
def test_hostile_entries_stop_everything(name: str | zipfile.ZipInfo, reason: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    path = archive(work, ("good.wav", b"good"), (name, b"/etc/passwd"))
    with pytest.raises(ArchiveError, match=f"{reason}.*; nothing was unpacked"):
        unpack(path, work / "out")
    nothing_but_the_archive(work)
    assert [p.name for p in tmp_path.iterdir()] == ["work"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [("a.wav", "a.wav"), ("a.wav", "A.WAV"), ("a/", "A")])
def test_two_entries_of_one_name(names: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="occurs twice"):
        unpack(archive(tmp_path, *((name, b"") for name in names)), tmp_path / "out")


def test_a_file_where_a_folder_must_be(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="cannot unpack"):
        unpack(archive(tmp_path, ("a", b"x"), ("a/b.wav", b"y")), tmp_path / "out")
    nothing_but_the_archive(tmp_path)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (UnpackLimits(entries=1), "2 entries, more than 1"),
        (UnpackLimits(total_bytes=999), "unpacks to 1,000 bytes, more than 999"),
        (UnpackLimits(entry_bytes=499), "500 bytes, more than 499"),
    ],
)
def test_limits(limits: UnpackLimits, reason: str, tmp_path: Path) -> None:
    path = archive(tmp_path, ("a.wav", bytes(500)), ("b.wav", bytes(500)))
    with pytest.raises(ArchiveError, match=reason):
        unpack(path, tmp_path / "out", limits=limits)
    nothing_but_the_archive(tmp_path)
    exact = UnpackLimits(entries=2, total_bytes=1000, entry_bytes=500)
    assert unpack(path, tmp_path / "out", limits=exact) == 2


def test_a_bomb_is_refused_by_its_ratio(tmp_path: Path) -> None:
    path = archive(tmp_path, ("bomb.wav", bytes(50_000_000)))
    assert path.stat().st_size < 100_000
    with pytest.raises(ArchiveError, match="more than 200 times its size"):
        unpack(path, tmp_path / "out")


def test_a_bomb_that_lies_about_its_size_writes_no_more_than_it_said(tmp_path: Path) -> None:
    path = archive(tmp_path, ("bomb.wav", bytes(5_000_000)))
    raw = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = raw.index(signature) + offset
        raw[at : at + 4] = struct.pack("<I", 1000)
    path.write_bytes(raw)
    steps: list[tuple[int, int]] = []
    with pytest.raises(ArchiveError, match="damaged"):
        unpack(path, tmp_path / "out", on_progress=lambda done, total: steps.append((done, total)))
    assert steps == []
    nothing_but_the_archive(tmp_path)


def test_damage(tmp_path: Path) -> None:
    path = archive(tmp_path, ("a.wav", b"0123456789" * 100))
    whole = path.read_bytes()
    for damaged in (whole[:-30], b"", b"no archive at all", whole.replace(whole[40:44], b"\xff\x00\xff\x00")):
        path.write_bytes(damaged)
        with pytest.raises(ArchiveError, match="download it again"):
            unpack(path, tmp_path / "out")
        nothing_but_the_archive(tmp_path)


def test_encrypted(tmp_path: Path) -> None:
    path = archive(tmp_path, ("a.wav", b"abc"))
    raw = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(signature) + offset] |= 1
    path.write_bytes(raw)
    with pytest.raises(ArchiveError, match="is encrypted"):
        unpack(path, tmp_path / "out")


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    path = archive(tmp_path, ("a.wav", b"abc"))
    (tmp_path / "out").mkdir()
    assert unpack(path, tmp_path / "out") == 1
    with pytest.raises(ArchiveError, match="is not empty"):
        unpack(path, tmp_path / "out")
    assert (tmp_path / "out/a.wav").read_bytes() == b"abc"


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path, ("a.wav", b"abc"))
    usage = type("Usage", (), {"free": 2})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ArchiveError, match=r"3 bytes are needed .* 2 are free"):
        unpack(path, tmp_path / "out")


def test_a_tree_that_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".out.unpacking").mkdir()
    (tmp_path / ".out.unpacking/stale.wav").write_bytes(b"old")
    unpack(archive(tmp_path, ("a.wav", b"abc")), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.wav"]


def test_zipfile_is_an_independent_witness(tmp_path: Path) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as made:
        made.writestr("a.wav", b"abc")
    (tmp_path / "a.zip").write_bytes(data.getvalue())
    unpack(tmp_path / "a.zip", tmp_path / "ours")
    zipfile.ZipFile(tmp_path / "a.zip").extractall(tmp_path / "theirs")
    assert (tmp_path / "ours/a.wav").read_bytes() == (tmp_path / "theirs/a.wav").read_bytes()
