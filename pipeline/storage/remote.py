"""Recordings in an object store: ``s3://bucket/key`` and ``gs://bucket/key``, through Arrow's file systems.

Keys are written as they are, as the stores' own tools do, without percent encoding. Credentials, region and endpoint
come from where those tools take them (environment, profile, role); Arrow's options may follow the key
(``?region=eu-west-1&endpoint_override=host:port&scheme=http``). An object is fetched whole, once for all that is heard
of it. Limits: no object above 1 GiB; a process keeps the last object in memory.

Stamps of recordings, so that one that was replaced since can be told without reading it.

A stamp is size and time of change, as ``make`` and ``rsync`` use them. Limits: a copy that keeps both is not seen.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.storage.errors import NotAFile, NotFound, SerError, TooLarge, Unreadable
from pipeline.storage.files import FolderScan, local_path

SCHEMES = ("s3", "gs")
_URI = re.compile(r"^(s3|gs)://([^/?]+)/?(.*?)(\?(?:(?:region|endpoint_override|scheme)=[^&]*&?)+)?$", re.DOTALL)
_LARGEST = 2**30


def is_remote(text: object) -> bool:
    """Whether a path is the URI of an object.

    >>> is_remote("s3://calls/1.wav"), is_remote("/calls/1.wav"), is_remote(b"RIFF")
    (True, False, False)
    """
    return isinstance(text, str) and _URI.match(text) is not None


@lru_cache(maxsize=1)
def fetch(uri: str) -> bytes:
    """The object's content.

    Raises:
        NotFound, NotAFile, TooLarge, Unreadable: see ``pipeline.storage.errors``.
    """
    try:
        files, path, _, _ = _open(uri)
    except SerError as error:  # one bucket that cannot be opened must not end a job on others
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
    except ValueError as error:  # Arrow's, of a path that it takes for none, as with //
        raise Unreadable(f"{uri}: {error}. Check bucket and key.") from error
    return content


def source_of(speech: str) -> str | bytes:
    """What ``audio.load`` can open of a manifest's cell: a path, also of a ``file://`` URI, or an object's content.

    Raises:
        AudioError: an object that cannot be fetched.
    """
    return fetch(speech) if is_remote(speech) else local_path(speech)


def scan_remote(uri: str, extensions: Collection[str]) -> FolderScan:
    """Objects below ``uri`` whose lower-case extension is in ``extensions``, in the order of their keys.

    Raises:
        SerError: they cannot be listed.
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


def stamp_of(uri: str) -> tuple[int, int]:
    """Size and time of change (ns) of the object; -1 where it is not known."""
    try:
        files, path, _, _ = _open(uri)
        info = files.get_file_info(path)
    except (OSError, ValueError, SerError):
        return -1, -1
    return (-1 if info.size is None else info.size), (info.mtime_ns or -1)


def _open(uri: str) -> tuple[Any, str, str, str]:
    """File system, path in it, scheme and options of a URI."""
    match = _URI.match(uri)
    if match is None:
        raise SerError(f"{uri!r} is no URI of an object; expected {' or '.join(f'{s}://bucket/key' for s in SCHEMES)}")
    scheme, bucket, key, options = match.groups(default="")
    return _file_system(f"{scheme}://{bucket}{options}"), f"{bucket}/{key}".rstrip("/"), scheme, options


@lru_cache(maxsize=8)
def _file_system(store: str) -> Any:
    """The store's file system."""
    import pyarrow.fs

    try:
        return pyarrow.fs.FileSystem.from_uri(store)[0]
    except (OSError, ValueError) as error:
        raise SerError(f"cannot open {store}: {error}; check bucket, credentials, region and endpoint") from error


_AT_ONCE = 512
_LATEST_NS = 2**63 - 1  # in the year 2262; broken clocks write later ones


def stamps_of(recordings: Sequence[str]) -> NDArray[np.int64]:
    """Size in bytes and time of change in ns of each recording, ``(n, 2)``; -1 where it cannot be told.

    In threads, as network storage answers slowly; in groups, as a file that is here is told faster than a thread.
    """
    groups = [recordings[begin : begin + _AT_ONCE] for begin in range(0, len(recordings), _AT_ONCE)]
    with ThreadPoolExecutor(8) as pool:
        stamps = [stamp for found in pool.map(_stamps, groups) for stamp in found]
    return np.array(stamps, dtype=np.int64).reshape(-1, 2)


def _stamps(recordings: Sequence[str]) -> list[tuple[int, int]]:
    return [_stamp(recording) for recording in recordings]


def _stamp(recording: str) -> tuple[int, int]:
    try:
        if is_remote(recording):
            return stamp_of(recording)
        status = os.stat(local_path(recording))
    except (OSError, ValueError, SerError):
        return -1, -1
    return status.st_size, min(status.st_mtime_ns, _LATEST_NS)
