"""Downloads one large file over HTTP, with resume and MD5 check; unpacks a ZIP archive safely into a new folder.

Download: bytes are written to ``NAME.part``; ``NAME.part.json`` records their source (URL, and the server's ETag or
Last-Modified). The next attempt, of this process or a later one, requests the rest with Range and If-Range (RFC 9110,
sections 13.1.5 and 14); a server without these sends the whole file again. The file is renamed to its final name only
if its checksum is right. Limits: MD5 detects damage and mix-ups, not an attacker; one connection at a time.

Unpacking: all entries' headers are checked before anything is written (``_objection``). Sizes are counted again
afterwards, because headers can be wrong, and checksums are verified. The tree is written to a temporary folder and
renamed at the end: the new folder is complete or absent. Limits: ZIP only; times and permissions are dropped.
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
_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # temporary HTTP errors: worth another attempt
_LONGEST_PAUSE_S = 30.0

OnProgress = Callable[[int, int], None]  # bytes done, bytes in total (0: unknown)
Tell = Callable[[str], None]


class DownloadError(SerError):
    """A file cannot be downloaded, or has the wrong checksum."""


class _CutOffError(Exception):
    """This attempt ended too early; the next one may continue."""


@dataclass(frozen=True)
class _Part:
    """The bytes received so far."""

    path: Path

    @property
    def note(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def validator(self, url: str) -> str | None:
        """The value for If-Range ("" if the server gave none); None if the bytes are of another or unknown URL."""
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
    """Download ``url`` to ``destination``, continuing an earlier download that was cut off.

    The caller must make sure that only one process works on ``destination``.

    Args:
        md5: 32 hex digits of the whole file; if ``destination`` has it already, nothing is downloaded.
        attempts: number of failed attempts in a row, without a new byte, after which this gives up.
        timeout_s: silence of the server, in seconds, after which an attempt ends.
        pause: called with the seconds to wait before the next attempt.
        tell: called with one line of text when an attempt failed and another follows.

    Raises:
        DownloadError: not an http or https URL, a refusal, no connection, too many bytes, a wrong checksum, a disk that
            cannot be written. Received bytes are kept for the next call, unless they are wrong.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise DownloadError(f"{url!r} is not an http or https URL; expected one such as https://example.org/files")
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
                raise DownloadError(f"{url}: {cut}, {failed} times in a row; the same command continues later") from cut
            wait_s = min(2.0 ** (failed - 1), _LONGEST_PAUSE_S)
            tell(f"{cut}; trying again in {wait_s:g} s")
            pause(wait_s)
            continue
        if md5_of(part.path) == md5:
            os.replace(part.path, destination)
            part.note.unlink(missing_ok=True)
            return destination
        wrong += 1 if before else 2  # resumed bytes may be of two different files: one more try, from the beginning
        part.drop()
    raise DownloadError(f"{url} has another MD5 checksum than {md5}: damaged or changed; try again, or another mirror")


def md5_of(path: Path) -> str:
    """MD5 of a file, 32 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _fetch(url: str, part: _Part, max_bytes: int, timeout_s: float, on_progress: OnProgress) -> None:
    """One attempt; returns when all bytes that the server announced have arrived."""
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
                raise DownloadError(f"{url} holds {total:,} bytes, more than the limit of {max_bytes:,}; check the URL")
            _receive(answer, part, start, total, max_bytes, on_progress)
    except HTTPError as error:
        with error:
            if error.code == 416 and held:
                return  # the server has no bytes after ours: the checksum decides
            if error.code in _AGAIN:
                raise _CutOffError(f"the server answered {error.code}") from None
            raise DownloadError(f"{url}: the server answered {error.code} {error.reason}; check --base_url") from None
    except URLError as error:
        if isinstance(error.reason, SSLCertVerificationError):
            raise DownloadError(f"{url}: {error.reason.verify_message}; update this machine's certificates") from None
        raise _CutOffError(f"no connection ({error.reason})") from None
    except (OSError, HTTPException) as error:
        raise _CutOffError(f"the connection broke ({error or type(error).__name__})") from None


def _extent(answer: HTTPResponse, held: int) -> tuple[int, int]:
    """Offset of the response's first byte, and the size of the whole file (0 if unknown)."""
    if answer.status != 206:
        length = answer.headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else 0
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
    if not found or int(found[1]) != held:
        raise DownloadError("the server sent another part of the file than requested; try again, or another mirror")
    return held, 0 if found[2] == "*" else int(found[2])


def _begin(part: _Part, url: str, answer: HTTPResponse) -> None:
    """Empty the part file; record the URL and the validator (ETag or Last-Modified) of the bytes to come."""
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
                raise DownloadError(f"the file is larger than the limit of {max_bytes:,} bytes; check the URL")
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
        raise DownloadError(f"cannot write {path}: {error.strerror}; free space, or choose another --out") from error


_ENCRYPTED = 0x1


class ArchiveError(SerError):
    """An archive is damaged, hostile or too large."""


@dataclass(frozen=True)
class UnpackLimits:
    """Limits of an accepted archive."""

    entries: int = 10_000
    total_bytes: int = 4 << 30
    entry_bytes: int = 256 << 20
    ratio: float = 200.0  # unpacked bytes per packed byte of an entry; DEFLATE can reach 1,032


def unpack(
    archive: Path,
    folder: Path,
    *,
    limits: UnpackLimits | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> int:
    """Unpack ``archive`` into ``folder``, which must be empty or absent; returns the number of files written.

    Raises:
        ArchiveError: not a ZIP archive, a damaged or hostile one, one beyond ``limits``, a ``folder`` that is not
            empty, or a full disk. No unpacked files remain.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ArchiveError(f"{folder} is not empty; choose another --out, or remove it")
    beside = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(beside, ignore_errors=True)  # left by a killed process
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
        raise ArchiveError(f"{archive} is damaged or not a ZIP archive ({error}); download it again") from error
    except OSError as error:
        raise ArchiveError(f"cannot unpack {archive} into {folder}: {error.strerror}; choose another --out") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return len(entries)


def _judged(entries: list[zipfile.ZipInfo], limits: UnpackLimits, archive: Path) -> list[zipfile.ZipInfo]:
    """The entries that are files. Raises `ArchiveError` if any entry is refused."""
    if len(entries) > limits.entries:
        raise ArchiveError(f"{archive} has {len(entries):,} entries, more than {limits.entries:,}; refused")
    seen: set[str] = set()
    for entry in entries:
        key = entry.filename.rstrip("/").casefold()
        if reason := _objection(entry, limits) or ("occurs twice" if key in seen else None):
            raise ArchiveError(f"{archive}: entry {entry.filename[:100]!r} {reason}; nothing was unpacked")
        seen.add(key)
    total = sum(entry.file_size for entry in entries)
    if total > limits.total_bytes:
        found = f"{total:,} bytes, more than {limits.total_bytes:,}"
        raise ArchiveError(f"{archive} unpacks to {found}; nothing was unpacked")
    return [entry for entry in entries if not entry.is_dir()]


def _objection(entry: zipfile.ZipInfo, limits: UnpackLimits) -> str | None:
    name = entry.orig_filename  # not `filename`: zipfile cuts that at a NUL and changes backslashes on Windows
    path = PurePosixPath(name)
    if not name.isprintable() or "\\" in name or ":" in name:
        return "has a name with control characters, backslashes or colons"
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
    if (free := shutil.disk_usage(parent).free) < needed:
        remedy = "free some space, or choose another --out"
        raise ArchiveError(f"{needed:,} bytes are needed in {parent}, {free:,} are free; {remedy}")


def _write(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, archive: Path) -> int:
    """Write one file; returns its size. ``zipfile`` checks the checksum at the end, and stops at the declared size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened.open(entry) as source, path.open("xb") as target:
        shutil.copyfileobj(source, target)
        written = target.tell()
    if written != entry.file_size:
        name = entry.filename[:100]
        raise ArchiveError(f"{archive}: entry {name!r} holds {written:,} bytes, not {entry.file_size:,}")
    return written
