"""One large file over HTTP: resumed where it was cut off, checked against its MD5, whole or not at all.

Method: bytes go to ``NAME.part``; ``NAME.part.json`` beside it notes where they come from (URL, and the server's ETag
or Last-Modified). Another attempt, of this process or a later one, asks for the rest with Range and If-Range (RFC
9110, sections 13.1.5 and 14); a server that knows neither sends all of it again. Only a file with the right checksum
gets its name, in one step. Limits: MD5 tells damage and mix-ups, not an attacker; one connection at a time.

A ZIP archive into a new folder: whole or not at all, and nothing outside that folder.

Method: every entry is judged by its header before the first byte is written: absolute paths and paths with ``..``,
drive letters, back-slashes or control characters, links and devices, two entries of one name (also where case does not
count), encryption, and sizes beyond the limits. Sizes are counted again while writing, as headers may lie; checksums
are checked. The tree is written beside its place and renamed at the end. Limits: ZIP only; times and permissions are
dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from ssl import SSLCertVerificationError
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from pipeline.storage.errors import SerError

MAX_BYTES = 2 << 30
_CHUNK = 1 << 16
_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # answers that may be other ones a little later
_LONGEST_PAUSE_S = 30.0

OnProgress = Callable[[int, int], None]  # bytes there, bytes in all (0: the server does not tell)
Tell = Callable[[str], None]


class DownloadError(SerError):
    """A file that cannot be fetched, or is not the one that was meant."""


class _CutOffError(Exception):
    """This attempt ended too early; the next may go on."""


@dataclass(frozen=True)
class _Part:
    """What has arrived so far."""

    path: Path

    @property
    def note(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def validator(self, url: str) -> str | None:
        """What If-Range shall say; None when the bytes are of another URL, or nobody noted where they are from."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            return str(note["validator"]) if note["url"] == url else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def drop(self) -> None:
        for path in (self.path, self.note):
            path.unlink(missing_ok=True)


def download(
    url: str,
    destination: Path,
    *,
    md5: str,
    max_bytes: int = MAX_BYTES,
    attempts: int = 6,
    timeout_s: float = 30.0,
    pause: Callable[[float], object] = time.sleep,
    on_progress: OnProgress = lambda done, total: None,
    tell: Tell = lambda text: None,
) -> Path:
    """Fetch ``url`` to ``destination``, going on with what an earlier call left behind.

    Args:
        md5: 32 hex digits of the whole file.
        max_bytes: more than this is refused.
        attempts: that may fail in a row, none of them bringing a byte, before this gives up.
        timeout_s: silence of the server, in seconds, that ends an attempt.
        pause: called with the seconds to wait before the next attempt.
        tell: called with a sentence when an attempt failed and another follows.

    Returns:
        ``destination``. A file of the right checksum that is there already is left alone, without asking anybody.

    Raises:
        DownloadError: no http or https URL, a refusal, no connection, too many bytes, a wrong checksum, a disk that
            cannot be written. What arrived stays for the next call, unless
            it is wrong. That one process at a time works on ``destination`` is the caller's affair.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise DownloadError(f"{url!r} is no http or https address; give one, as https://example.org/files")
    part = _Part(destination.with_name(destination.name + ".part"))
    with _writing(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
    if destination.is_file() and md5_of(destination) == md5:
        return destination
    failed = wrong = 0
    while wrong < 2:
        before = part.size()
        try:
            _fetch(url, part, max_bytes, timeout_s, on_progress)
        except _CutOffError as cut:
            failed = 1 if part.size() > before else failed + 1
            if failed >= attempts:
                raise DownloadError(f"{url}: {cut}, {failed} times in a row; the same command goes on later") from cut
            wait_s = min(2.0 ** (failed - 1), _LONGEST_PAUSE_S)
            tell(f"{cut}; trying again in {wait_s:g} s")
            pause(wait_s)
            continue
        if md5_of(part.path) == md5:
            os.replace(part.path, destination)
            part.note.unlink(missing_ok=True)
            return destination
        wrong += 1 if before else 2  # what was put together may be of two files: once more, from the beginning
        part.drop()
    raise DownloadError(f"{url} has another MD5 checksum than {md5}: damaged or changed; try again, or another mirror")


def md5_of(path: Path) -> str:
    """MD5 of a file, 32 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _fetch(url: str, part: _Part, max_bytes: int, timeout_s: float, on_progress: OnProgress) -> None:
    """One attempt; returns when the server says that all bytes are there."""
    validator = part.validator(url)
    if validator is None:
        part.drop()
    held = part.size()
    headers = {"User-Agent": "speech-emotion-ray", "Accept-Encoding": "identity"}
    if held:
        headers |= {"Range": f"bytes={held}-", **({"If-Range": validator} if validator else {})}
    try:
        with urlopen(Request(url, headers=headers), timeout=timeout_s) as answer:
            start, total = _extent(answer, held)
            if start == 0:
                _begin(part, url, answer)
            if total > max_bytes:
                raise DownloadError(
                    f"{url} holds {total:,} bytes, more than the {max_bytes:,} expected; wrong address?"
                )
            _receive(answer, part, start, total, max_bytes, on_progress)
    except HTTPError as error:
        with error:
            if error.code == 416 and held:
                return  # nothing lies beyond what is there: the checksum decides
            if error.code in _AGAIN:
                raise _CutOffError(f"the server answered {error.code}") from None
            raise DownloadError(f"{url}: the server answered {error.code} {error.reason}; check --base_url") from None
    except URLError as error:
        if isinstance(error.reason, SSLCertVerificationError):
            raise DownloadError(f"{url}: {error.reason.verify_message}; mend this machine's certificates") from None
        raise _CutOffError(f"no connection ({error.reason})") from None
    except (OSError, HTTPException) as error:
        raise _CutOffError(f"the connection broke ({error or type(error).__name__})") from None


def _extent(answer: HTTPResponse, held: int) -> tuple[int, int]:
    """Offset of the answer's first byte, and the size of the whole file (0 when it is not told)."""
    if answer.status != 206:
        length = answer.headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else 0
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
    if not found or int(found[1]) != held:
        raise DownloadError("the server sent another part of the file than was asked for; try again or another mirror")
    return held, 0 if found[2] == "*" else int(found[2])


def _begin(part: _Part, url: str, answer: HTTPResponse) -> None:
    """Empty the part, and note what its bytes will be of."""
    etag = answer.headers.get("ETag", "")
    strong = etag if etag.startswith('"') else ""
    note = {"url": url, "validator": strong or answer.headers.get("Last-Modified", "")}
    with _writing(part.path):
        part.path.write_bytes(b"")
        part.note.write_text(json.dumps(note), encoding="utf-8")


def _receive(
    answer: HTTPResponse, part: _Part, start: int, total: int, max_bytes: int, on_progress: OnProgress
) -> None:
    done = start
    with _writing(part.path), part.path.open("ab") as file:
        on_progress(done, total)
        while chunk := _read(answer):
            done += len(chunk)
            if done > max_bytes:
                raise DownloadError(f"more than the {max_bytes:,} bytes expected; wrong address?")
            file.write(chunk)
            on_progress(done, total)
    if done < total:
        raise _CutOffError(f"the connection ended after {done:,} of {total:,} bytes")


def _read(answer: HTTPResponse) -> bytes:
    try:
        return answer.read(_CHUNK)
    except (OSError, HTTPException) as error:
        raise _CutOffError(f"the connection broke ({error or type(error).__name__})") from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DownloadError(f"cannot write {path}: {error.strerror}; make room, or choose another --out") from error


_COPY_BYTES = 1 << 20
_ENCRYPTED = 0x1


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
        while chunk := source.read(_COPY_BYTES):
            written += len(chunk)
            target.write(chunk)
    if written != entry.file_size:
        raise ArchiveError(
            f"{archive}: entry {entry.filename[:100]!r} holds {written:,} bytes, not {entry.file_size:,}"
        )
    return written
