"""Audio files below a folder, and file names as text.

``scan`` walks a folder the way an analyst expects: recursive, in a fixed order, hidden files and other files counted
rather than listed, each real folder entered once however many links lead to it (so symlink loops end), very deep trees
cut with a message. Links to files are recordings of their own.

Tables hold text, and a POSIX file name may be any bytes. A name that is not valid UTF-8 is written as its ``file://``
URI (RFC 8089, percent-encoded bytes): ``path_text`` and ``local_path`` convert, and lose nothing.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

MAX_DEPTH = 128
_SHOWN_ENDINGS, _LONGEST_ENDING = 6, 20
_URI = "file://"


@dataclass(frozen=True)
class FolderScan:
    """What ``scan`` found.

    Attributes:
        files: absolute paths as text (see ``path_text``), each folder's files by name, then its sub-folders by name.
        hidden: files and folders left out because their name begins with a dot.
        other: files left out because their ending is none of those asked for: ending ("" for none) -> how many.
        unreadable: folders that could not be listed.
        too_deep: folders left out because they lie ``MAX_DEPTH`` levels below the start, or deeper.
        linked: links to folders left out because the folder was entered already, or lies below the start anyway.
    """

    files: tuple[str, ...]
    hidden: int = 0
    other: Mapping[str, int] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()
    too_deep: tuple[str, ...] = ()
    linked: int = 0

    def skipped(self) -> str:
        """One line on what was left out; empty when nothing was."""
        parts = [
            f"{count:,} {what}"
            for count, what in (
                (self.hidden, "hidden"),
                *_by_ending(self.other),
                (self.linked, "links to folders listed already"),
            )
            if count
        ]
        if self.unreadable:
            parts.append(f"{len(self.unreadable):,} folders that cannot be read (first: {_example(self.unreadable)})")
        if self.too_deep:
            parts.append(f"{len(self.too_deep):,} folders too deep (first: {_example(self.too_deep)})")
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
    r"""The path as text that UTF-8 can hold: itself, or its ``file://`` URI when its bytes are not UTF-8.

    >>> path_text(b"/calls/a b.wav"), path_text(b"/calls/caf\xe9.wav")
    ('/calls/a b.wav', 'file:///calls/caf%E9.wav')
    """
    raw = os.fsencode(path)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return _URI + quote_from_bytes(os.path.abspath(raw))


def local_path(text: str) -> str:
    r"""The path, for ``open``, that ``path_text`` (or any ``file://`` URI of this machine) stands for.

    >>> local_path("/calls/a.wav"), os.fsencode(local_path("file:///calls/caf%E9.wav"))
    ('/calls/a.wav', b'/calls/caf\xe9.wav')
    """
    if not text.startswith(_URI):
        return text
    path = os.fsdecode(unquote_to_bytes(text[len(_URI) :].removeprefix("localhost")))
    return path[1:] if os.name == "nt" and path[2:3] == ":" else path  # file:///C:/calls/a.wav


def present_form(path: str) -> str:
    """The path in the Unicode form, composed or decomposed, in which it is there; itself where it is in neither.

    macOS decomposes names (NFD), other systems and most tables compose them (NFC); each part has a form of its own.
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
    """Whether a path is an address of something that is not fetched; one slash may have been lost.

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
    """Whether a link leads to a folder around ``root``, or to one below it that is not hidden."""
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
    """Counts and endings, the most frequent first; rare ones together."""
    ordered = sorted(other.items(), key=lambda item: (-item[1], item[0]))
    shown = [(count, _printable(ending) or "without ending") for ending, count in ordered[:_SHOWN_ENDINGS]]
    rest = sum(count for _, count in ordered[_SHOWN_ENDINGS:])
    return [*shown, (rest, "with other endings")]


def _printable(ending: str) -> str:
    text = ending.encode("utf-8", "backslashreplace").decode("utf-8")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= _LONGEST_ENDING else f"{text[:_LONGEST_ENDING]}..."


def _example(paths: tuple[str, ...], limit: int = 80) -> str:
    return paths[0] if len(paths[0]) <= limit else f"{paths[0][:limit]}..."
