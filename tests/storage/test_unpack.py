"""Archives that are hostile, damaged, too large or in the way; nothing of them stays."""

from __future__ import annotations

import stat
import struct
import zipfile
from pathlib import Path

import pytest

from pipeline.storage.download import ArchiveError, UnpackLimits, unpack

Entry = tuple[str | zipfile.ZipInfo, bytes]
CENTRAL, LOCAL = b"PK\x01\x02", b"PK\x03\x04"


def archive(folder: Path, *entries: Entry) -> Path:
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


def refused(path: Path, reason: str, limits: UnpackLimits | None = None) -> None:
    """The archive is refused, and nothing is beside it, nor beside its folder."""
    beside = set(path.parent.parent.iterdir())
    with pytest.raises(ArchiveError, match=reason):
        unpack(path, path.parent / "out", limits=limits)
    assert [found.name for found in path.parent.rglob("*")] == ["a.zip"]
    assert set(path.parent.parent.iterdir()) == beside


def test_files_and_folders_as_zipfile_unpacks_them(tmp_path: Path) -> None:
    (tmp_path / ".out.unpacking").mkdir()
    (tmp_path / ".out.unpacking/left by a killed process.wav").touch()
    steps: list[tuple[int, int]] = []
    path = archive(tmp_path, ("Actor_01/", b""), ("Actor_01/a.wav", b"abc"), ("Actor_02/deep/b.wav", b"defgh"))
    assert unpack(path, tmp_path / "out", on_progress=lambda done, total: steps.append((done, total))) == 2
    assert steps == [(3, 8), (8, 8)]
    assert {p.name for p in tmp_path.iterdir()} == {"a.zip", "out"}
    zipfile.ZipFile(path).extractall(tmp_path / "theirs")
    ours, theirs = (
        {p.relative_to(tmp_path / root): p.is_file() and p.read_bytes() for p in (tmp_path / root).rglob("*")}
        for root in ("out", "theirs")
    )
    assert ours == theirs


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        (["../evil.wav"], "leaves the folder"),
        (["a/../../evil.wav"], "leaves the folder"),
        (["/etc/evil.wav"], "leaves the folder"),
        (["..\\evil.wav"], "backslashes"),
        (["C:evil.wav"], "colons"),
        (["a\x1b[2J.wav"], "control characters"),
        ([with_mode("link.wav", stat.S_IFLNK | 0o777)], "link"),
        ([with_mode("pipe.wav", stat.S_IFIFO | 0o644)], "device"),
        (["a.wav", "a.wav"], "twice"),
        (["a.wav", "A.WAV"], "twice"),
        (["a/", "A"], "twice"),
        (["a", "a/b.wav"], "cannot unpack"),
    ],
)
def test_hostile_entries_stop_everything(entries: list[str | zipfile.ZipInfo], reason: str, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    named: list[Entry] = [(name, b"" if name == "a/" else b"/etc/passwd") for name in entries]
    refused(archive(tmp_path / "work", ("good.wav", b"good"), *named), reason)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (UnpackLimits(entries=1), "2 entries, more than 1"),
        (UnpackLimits(total_bytes=999), "1,000 bytes, more than 999"),
        (UnpackLimits(entry_bytes=499), "500 bytes, more than 499"),
    ],
)
def test_limits(limits: UnpackLimits, reason: str, tmp_path: Path) -> None:
    path = archive(tmp_path, ("a.wav", bytes(500)), ("b.wav", bytes(500)))
    refused(path, reason, limits)
    exact = UnpackLimits(entries=2, total_bytes=1000, entry_bytes=500)
    assert unpack(path, tmp_path / "out", limits=exact) == 2


def test_a_bomb_is_refused_by_its_ratio(tmp_path: Path) -> None:
    path = archive(tmp_path, ("bomb.wav", bytes(50_000_000)))
    assert path.stat().st_size < 100_000
    refused(path, "200 times")


def test_a_bomb_that_lies_about_its_size_writes_no_more_than_it_said(tmp_path: Path) -> None:
    path = archive(tmp_path, ("bomb.wav", bytes(5_000_000)))
    raw = bytearray(path.read_bytes())
    for signature, offset in ((LOCAL, 22), (CENTRAL, 24)):
        at = raw.index(signature) + offset
        raw[at : at + 4] = struct.pack("<I", 1000)
    path.write_bytes(raw)
    steps: list[tuple[int, int]] = []
    with pytest.raises(ArchiveError, match="damaged"):
        unpack(path, tmp_path / "out", on_progress=lambda done, total: steps.append((done, total)))
    assert steps == []
    assert [found.name for found in tmp_path.rglob("*")] == ["a.zip"]


def test_damage_and_encryption(tmp_path: Path) -> None:
    path = archive(tmp_path, ("a.wav", b"0123456789" * 100))
    whole = path.read_bytes()
    for damaged in (whole[:-30], b"", b"no archive at all", whole.replace(whole[40:44], b"\xff\x00\xff\x00")):
        path.write_bytes(damaged)
        refused(path, "download it again")
    encrypted = bytearray(whole)
    for signature, offset in ((LOCAL, 6), (CENTRAL, 8)):
        encrypted[encrypted.index(signature) + offset] |= 1
    path.write_bytes(encrypted)
    refused(path, "encrypted")


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    path = archive(tmp_path, ("a.wav", b"abc"))
    (tmp_path / "out").mkdir()
    assert unpack(path, tmp_path / "out") == 1
    with pytest.raises(ArchiveError, match="not empty"):
        unpack(path, tmp_path / "out")
    assert (tmp_path / "out/a.wav").read_bytes() == b"abc"


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2}))
    refused(archive(tmp_path, ("a.wav", b"abc")), "3 bytes are needed .* 2 are free")
