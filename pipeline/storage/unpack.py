"""A ZIP archive into a new folder: whole or not at all, and nothing outside that folder.

Method: every entry is judged by its header before the first byte is written: absolute paths and paths with ``..``,
drive letters, back-slashes or control characters, links and devices, two entries of one name (also where case does not
count), encryption, and sizes beyond the limits. Sizes are counted again while writing, as headers may lie; checksums
are checked. The tree is written beside its place and renamed at the end. Limits: ZIP only; times and permissions are
dropped.
"""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.storage.errors import SerError

_CHUNK = 1 << 20
_ENCRYPTED = 0x1

OnProgress = Callable[[int, int], None]  # bytes written, bytes in all


class ArchiveError(SerError):
    """An archive that is damaged, hostile or too large."""


@dataclass(frozen=True)
class UnpackLimits:
    """What an archive may hold; more is refused."""

    entries: int = 10_000
    total_bytes: int = 4 << 30
    entry_bytes: int = 256 << 20
    ratio: float = 200.0  # unpacked bytes a packed one, of an entry; DEFLATE can do 1,032


def unpack(
    archive: Path,
    folder: Path,
    *,
    limits: UnpackLimits | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> int:
    """Unpack ``archive`` into ``folder``, which is made (an empty one may be there).

    Returns:
        How many files were written.

    Raises:
        ArchiveError: no ZIP archive, a damaged or hostile one, one beyond ``limits``, ``folder`` holds something,
            or the disk is too small. Nothing of it stays.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ArchiveError(f"{folder} is not empty; choose another --out, or remove it")
    beside = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = _judged(opened.infolist(), limits or UnpackLimits(), archive)
            total = sum(entry.file_size for entry in entries)
            _check_room(folder.absolute().parent, total)
            beside.mkdir(parents=True)
            done = 0
            for entry in entries:
                done += _write(opened, entry, beside / entry.filename, archive)
                on_progress(done, total)
        if folder.is_dir():
            folder.rmdir()
        os.replace(beside, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise ArchiveError(f"{archive} is damaged or no ZIP archive ({error}); fetch it again") from error
    except OSError as error:
        raise ArchiveError(f"cannot unpack {archive} into {folder}: {error.strerror}; choose another --out") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return len(entries)


def _judged(entries: list[zipfile.ZipInfo], limits: UnpackLimits, archive: Path) -> list[zipfile.ZipInfo]:
    """The files among the entries, if all of them may be written."""
    if len(entries) > limits.entries:
        raise ArchiveError(f"{archive} has {len(entries):,} entries, more than {limits.entries:,}; refused")
    seen: set[str] = set()
    total = 0
    for entry in entries:
        reason = _objection(entry, limits)
        key = entry.filename.rstrip("/").casefold()
        if reason is None and key in seen:
            reason = "is there twice"
        if reason is not None:
            raise ArchiveError(f"{archive}: entry {entry.filename[:100]!r} {reason}; nothing was unpacked")
        seen.add(key)
        total += entry.file_size
    if total > limits.total_bytes:
        raise ArchiveError(
            f"{archive} unpacks to {total:,} bytes, more than {limits.total_bytes:,}; nothing was unpacked"
        )
    return [entry for entry in entries if not entry.is_dir()]


def _objection(entry: zipfile.ZipInfo, limits: UnpackLimits) -> str | None:
    name = entry.orig_filename  # zipfile cuts its own name at a NUL and turns back-slashes on Windows
    path = PurePosixPath(name)
    if not name.isprintable() or "\\" in name or ":" in name:
        return "has a name with control characters, back-slashes or colons"
    if path.is_absolute() or ".." in path.parts or not path.parts:
        return "leaves the folder"
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if entry.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if entry.file_size > limits.entry_bytes:
        return f"unpacks to {entry.file_size:,} bytes, more than {limits.entry_bytes:,}"
    if entry.file_size > limits.ratio * max(entry.compress_size, 1024):
        return f"unpacks to more than {limits.ratio:g} times its size"
    return None


def _check_room(parent: Path, needed: int) -> None:
    while not parent.is_dir():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ArchiveError(
            f"{needed:,} bytes are needed in {parent}, {free:,} are free; make room, or choose another --out"
        )


def _write(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, archive: Path) -> int:
    """Write one file; returns its size. ``zipfile`` checks the checksum at the end, and stops at the declared size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with opened.open(entry) as source, path.open("xb") as target:
        while chunk := source.read(_CHUNK):
            written += len(chunk)
            target.write(chunk)
    if written != entry.file_size:
        raise ArchiveError(
            f"{archive}: entry {entry.filename[:100]!r} holds {written:,} bytes, not {entry.file_size:,}"
        )
    return written
