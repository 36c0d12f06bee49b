"""Locations of recordings: scans folders, converts file names to text, and reads objects from stores.

``scan`` lists a folder recursively in a fixed order. Each real folder is entered only once, however many links lead to
it (so symlink loops end). A link to a file counts as a recording of its own.

Tables hold text, but a POSIX file name can be any bytes. A name that is not valid UTF-8 is written as its ``file://``
URI (RFC 8089, percent-encoded bytes): ``path_text`` and ``local_path`` convert without loss.

Objects (``s3://bucket/key``, ``gs://bucket/key``) are read through Arrow's file systems. Keys are written without
percent encoding; credentials, region and endpoint come from the same places as for the stores' own tools (environment,
profile, role). Arrow's options may follow the key (``?region=eu-west-1&endpoint_override=host:port&scheme=http``).
Limits: an object is fetched as a whole, none above 1 GiB; a process keeps only the last one in memory.

A recording's stamp is its size and modification time, as in ``make`` and ``rsync``: it shows that a file was replaced
without reading it. Limits: a replacement with the same size and time is not noticed.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

from pipeline.storage.errors import NotAFile, NotFound, SerError, TooLarge, Unreadable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_DEPTH = 128
_SHOWN_ENDINGS, _LONGEST_ENDING = 6, 20
_URI = "file://"


@dataclass(frozen=True)
class FolderScan:
    """The result of ``scan``."""

    files: tuple[str, ...]  # absolute, see `path_text`; each folder's files by name, then its sub-folders
    hidden: int = 0  # files and folders whose name begins with a dot
    other: Mapping[str, int] = field(default_factory=dict)  # ending ("" for none) -> number of files left out
    unreadable: tuple[str, ...] = ()  # folders that could not be listed
    too_deep: tuple[str, ...] = ()  # folders `MAX_DEPTH` or more levels below the start
    linked: int = 0  # links to folders that are listed elsewhere in the scan

    def skipped(self) -> str:
        """One line of text on what was left out; "" if nothing was."""
        linked = self.linked, "links to folders listed already"
        counts = ((self.hidden, "hidden"), *_by_ending(self.other), linked)
        parts = [f"{count:,} {what}" for count, what in counts if count]
        for folders, what in ((self.unreadable, "that cannot be read"), (self.too_deep, "too deep")):
            if folders:
                parts.append(f"{len(folders):,} folders {what} (first: {_start_of(folders[0], 80)})")
        return ", ".join(parts)


def scan(folder: Path, extensions: Collection[str], *, max_depth: int = MAX_DEPTH) -> FolderScan:
    """Files below ``folder`` whose lower-case extension is in ``extensions`` (each with its dot).

    Raises:
        OSError: ``folder`` itself cannot be listed.
    """
    root = os.fsencode(os.path.abspath(folder))
    wanted = {extension.encode() for extension in extensions}
    entered: set[tuple[int, int]] = set()
    files: list[str] = []
    unreadable: list[str] = []
    too_deep: list[str] = []
    hidden = linked = 0
    other: Counter[str] = Counter()
    pending: list[tuple[bytes, int]] = [(root, 0)]
    while pending:
        parent, depth = pending.pop()
        try:
            if (identity := _identity(parent)) in entered:
                linked += 1
                continue
            entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
        except OSError:
            if parent == root:
                raise
            unreadable.append(path_text(parent))
            continue
        entered.add(identity)
        children: list[tuple[bytes, int]] = []
        for entry in entries:
            if entry.name.startswith(b"."):
                hidden += 1
            elif not _is_folder(entry):
                ending = os.path.splitext(entry.name)[1].lower()
                if ending in wanted:
                    files.append(path_text(entry.path))
                else:
                    other[os.fsdecode(ending)] += 1
            elif depth + 1 >= max_depth:
                too_deep.append(path_text(entry.path))
            elif entry.is_symlink() and _is_listed_anyway(entry.path, root):
                linked += 1
            else:
                children.append((entry.path, depth + 1))
        pending.extend(reversed(children))
    return FolderScan(tuple(files), hidden, other, tuple(unreadable), tuple(too_deep), linked)


def path_text(path: str | bytes | os.PathLike[str]) -> str:
    r"""The path as valid UTF-8 text: unchanged, or as ``file://`` URI if its bytes are not UTF-8.

    >>> path_text(b"/calls/a b.wav"), path_text(b"/calls/caf\xe9.wav")
    ('/calls/a b.wav', 'file:///calls/caf%E9.wav')
    """
    raw = os.fsencode(path)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return _URI + quote_from_bytes(os.path.abspath(raw))


def local_path(text: str) -> str:
    r"""The path to ``open``, from the result of ``path_text`` or any ``file://`` URI of this machine.

    >>> local_path("/calls/a.wav"), os.fsencode(local_path("file:///calls/caf%E9.wav"))
    ('/calls/a.wav', b'/calls/caf\xe9.wav')
    """
    if not text.startswith(_URI):
        return text
    path = os.fsdecode(unquote_to_bytes(text[len(_URI) :].removeprefix("localhost")))
    return path[1:] if os.name == "nt" and path[2:3] == ":" else path  # file:///C:/calls/a.wav


def present_form(path: str) -> str:
    """The path in the Unicode form, composed or decomposed, in which it exists; unchanged if it exists in neither.

    macOS decomposes names (NFD), other systems and most tables compose them (NFC); each part is checked separately.
    """
    if path.isascii() or os.path.lexists(path):
        return path
    pure = Path(path)
    found = pure.anchor
    for part in pure.parts[1 if pure.anchor else 0 :]:
        forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        found = next((p for form in forms if os.path.lexists(p := os.path.join(found, form))), "")
        if not found:
            return path
    return found


def is_address(text: str) -> bool:
    """Whether a path is a URL that is not fetched, also with only one slash (as path functions leave it).

    >>> [is_address(text) for text in ("https://a.org/a.wav", "ftp:/a.org/a.wav", "C:/a.wav", "s3://a/b", "file:///a")]
    [True, True, False, False, False]
    """
    match = re.match(r"([a-z][a-z0-9+.-]+):/", text.strip(), re.IGNORECASE)
    return match is not None and match[1].lower() not in ("file", "s3", "gs")


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_listed_anyway(link: bytes, root: bytes) -> bool:
    """Whether a link's target is ``root``, a folder above it, or a folder below it that is not hidden."""
    target, top = os.path.realpath(link), os.path.join(os.path.realpath(root), b"")
    if top.startswith(os.path.join(target, b"")):
        return True
    return target.startswith(top) and not any(
        part.startswith(b".") for part in target[len(top) :].split(os.sep.encode())
    )


def _identity(folder: bytes) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _by_ending(other: Mapping[str, int]) -> list[tuple[int, str]]:
    """(count, ending) pairs, the most frequent first; the rest as one pair."""
    ordered = sorted(other.items(), key=lambda item: (-item[1], item[0]))
    shown = [
        (count, _start_of(printable(ending), _LONGEST_ENDING) or "without ending")
        for ending, count in ordered[:_SHOWN_ENDINGS]
    ]
    rest = sum(count for _, count in ordered[_SHOWN_ENDINGS:])
    return [*shown, (rest, "with other endings")]


def _start_of(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."


def printable(path: str | os.PathLike[str]) -> str:
    """A path as one printable line: control characters and undecodable bytes escaped, cut in the middle if long."""
    text = os.fspath(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 200 else f"{text[:80]}...{text[-100:]}"


_OBJECT = re.compile(r"^(s3|gs)://([^/?]+)/?(.*?)(\?(?:(?:region|endpoint_override|scheme)=[^&]*&?)+)?$", re.DOTALL)
_LARGEST = 2**30


def is_remote(text: object) -> bool:
    """Whether a path is the URI (``s3://`` or ``gs://``) of an object in a store.

    >>> is_remote("s3://calls/1.wav"), is_remote("/calls/1.wav"), is_remote(b"RIFF")
    (True, False, False)
    """
    return isinstance(text, str) and _OBJECT.match(text) is not None


@lru_cache(maxsize=1)
def fetch(uri: str) -> bytes:
    """The object's content. Raises: NotFound, NotAFile, TooLarge, Unreadable."""
    try:
        files, path, _, _ = _open(uri)
    except SerError as error:  # becomes the error of one recording, so that the job continues
        raise Unreadable(f"{uri}: {error}") from error
    try:
        info = files.get_file_info(path)
        if info.type.name == "NotFound":
            raise NotFound(f"{uri}: no such object. Check bucket and key.")
        if info.type.name != "File":
            raise NotAFile(f"{uri}: a folder. Give the URI of a recording.")
        if info.size > _LARGEST:
            raise TooLarge(f"{uri}: {info.size / 2**20:.0f} MiB; the limit is {_LARGEST / 2**20:.0f} MiB. Split it.")
        with files.open_input_stream(path) as stream:
            content: bytes = stream.read()
    except OSError as error:
        raise Unreadable(f"{uri}: {error}. Check credentials, region and endpoint.") from error
    except ValueError as error:  # from Arrow, for a path that it finds invalid, for example with //
        raise Unreadable(f"{uri}: {error}. Check bucket and key.") from error
    return content


def source_of(speech: str) -> str | bytes:
    """The source for ``audio.load`` from a manifest's cell: a path (also from a ``file://`` URI), or an object's bytes.

    Raises: AudioError for an object that cannot be fetched.
    """
    return fetch(speech) if is_remote(speech) else local_path(speech)


def scan_remote(uri: str, extensions: Collection[str]) -> FolderScan:
    """Objects below ``uri`` whose lower-case extension is in ``extensions``, in the order of their keys.

    Raises: SerError if they cannot be listed.
    """
    import pyarrow.fs

    files, path, store, options = _open(uri)
    try:
        found = files.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    except (OSError, ValueError) as error:
        raise SerError(f"cannot list {uri}: {error}; check bucket, credentials, region and endpoint") from error
    names: list[str] = []
    hidden, other = 0, Counter[str]()
    for info in found:
        parts = PurePosixPath(info.path).relative_to(PurePosixPath(path)).parts
        if info.type.name != "File":
            continue
        if any(part.startswith(".") for part in parts):
            hidden += 1
        elif (ending := PurePosixPath(info.path).suffix.lower()) in extensions:
            names.append(info.path)
        else:
            other[ending] += 1
    return FolderScan(tuple(f"{store}://{name}{options}" for name in sorted(names)), hidden, other)


def _open(uri: str) -> tuple[Any, str, str, str]:
    """(file system, path in it, scheme, options) of an object's URI."""
    match = _OBJECT.match(uri)
    if match is None:
        raise SerError(f"{uri!r} is not an object's URI; expected s3://bucket/key or gs://bucket/key")
    scheme, bucket, key, options = match.groups(default="")
    return _file_system(f"{scheme}://{bucket}{options}"), f"{bucket}/{key}".rstrip("/"), scheme, options


@lru_cache(maxsize=8)
def _file_system(store: str) -> Any:
    """Arrow's file system for a store."""
    import pyarrow.fs

    try:
        return pyarrow.fs.FileSystem.from_uri(store)[0]
    except (OSError, ValueError) as error:
        raise SerError(f"cannot open {store}: {error}; check bucket, credentials, region and endpoint") from error


_AT_ONCE = 512
_LATEST_NS = 2**63 - 1  # in the year 2262; wrong clocks write later times


def stamps_of(recordings: Sequence[str]) -> NDArray[np.int64]:
    """Size in bytes and modification time in ns of each recording, ``(n, 2)``; -1 if unknown.

    Uses threads, because network storage answers slowly, and groups, because a local file takes less than a thread.
    """
    import numpy as np

    groups = [recordings[begin : begin + _AT_ONCE] for begin in range(0, len(recordings), _AT_ONCE)]
    with ThreadPoolExecutor(8) as pool:
        stamps = [stamp for found in pool.map(lambda group: list(map(stamp_of, group)), groups) for stamp in found]
    return np.array(stamps, dtype=np.int64).reshape(-1, 2)


def stamp_of(recording: str) -> tuple[int, int]:
    """Size in bytes and modification time in ns of a recording, a path or an object's URI; -1 if unknown."""
    try:
        if is_remote(recording):
            files, path, _, _ = _open(recording)
            info = files.get_file_info(path)
            return (-1 if info.size is None else info.size), (info.mtime_ns or -1)
        status = os.stat(local_path(recording))
    except (OSError, ValueError, SerError):
        return -1, -1
    return status.st_size, min(status.st_mtime_ns, _LATEST_NS)


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
