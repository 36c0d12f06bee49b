"""Opens a path or `bytes` as a regular, non-empty file with random access; lists the accepted endings and codecs.

A pipe, a device or a folder gives an error and never hangs. On Linux `bytes` become an anonymous file in memory, so
decoders get a descriptor either way. Without a descriptor (Windows, a part of a file) they read through a `FileView`.

Endings only decide whether a folder scan takes a file; its format is detected from its content (``headers``).
Sources: the endings that FFmpeg's, libsndfile's and SoX's documentation name for their formats; libmagic's "magic"
files for the first bytes of other files; the Git LFS specification (v1) for its pointers.
"""

from __future__ import annotations

import errno
import io
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.storage.errors import EmptyFile, NotAFile, NotFetched, NotFound, PermissionDenied, Unreadable
from pipeline.storage.files import is_address
from pipeline.storage.files import printable as printable

if TYPE_CHECKING:
    from typing_extensions import Buffer


Recording = str | os.PathLike[str] | bytes


@dataclass(frozen=True)
class Segment:
    """A part of a recording, from `start_s` to `end_s` (infinity: to the end), read like a recording of its own."""

    recording: Recording
    start_s: float = 0.0
    end_s: float = math.inf

    def __str__(self) -> str:
        return f"from {self.start_s:g} s to {'its end' if self.end_s == math.inf else f'{self.end_s:g} s'}"


AudioSource = Recording | Segment


@dataclass(frozen=True)
class Opened:
    """A regular file open for reading, or a part of one. Not thread-safe."""

    name: str  # in messages
    size_bytes: int
    read_at: Callable[[int, int], bytes]  # (offset in the file, count) -> up to `count` bytes
    descriptor: int | None = None  # of the whole file, if C code can read from it
    base: int = 0  # offset in the file where the part starts

    def bytes_at(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`; fewer at the end. Does not move the descriptor's read position."""
        if offset >= self.size_bytes:
            return b""
        try:
            return self.read_at(self.base + offset, min(count, self.size_bytes - offset))
        except OSError as error:
            raise Unreadable(f"{self.name}: {error.strerror}. Check the disk or the network share.") from error

    def part(self, start: int, end: int) -> Opened:
        """The bytes [start, end) as a file of their own."""
        return replace(self, size_bytes=end - start, base=self.base + start, descriptor=None)


@dataclass(frozen=True)
class Splice:
    """A repair made while reading, not in the file: `data` replaces `dropped_bytes` bytes at `position`."""

    position: int
    dropped_bytes: int
    data: bytes


class FileView(io.RawIOBase):
    """`file`, with an optional repair, as a binary file object with its own position."""

    def __init__(self, file: Opened, splice: Splice | None = None) -> None:
        super().__init__()
        self._file, self._splice = file, splice or Splice(0, 0, b"")
        self._size = file.size_bytes + len(self._splice.data) - self._splice.dropped_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view):
            part = self._part(self._position, len(view) - filled)
            if not part:
                break
            view[filled : filled + len(part)] = part
            filled += len(part)
            self._position += len(part)
        return filled

    def _part(self, position: int, count: int) -> bytes:
        at, data = self._splice.position, self._splice.data
        if position < at:
            return self._file.bytes_at(position, min(count, at - position))
        if position < at + len(data):
            return data[position - at : position - at + count]
        return self._file.bytes_at(position - len(data) + self._splice.dropped_bytes, count)


@contextmanager
def open_source(source: AudioSource) -> Iterator[Opened]:
    """Open a path or `bytes` as a regular file, and close it at the end. Never blocks on a pipe or a device.

    For a segment, its recording is opened.
    """
    if isinstance(source, Segment):
        source = source.recording
    with ExitStack() as stack:
        name = name_of(source)
        if isinstance(source, (bytes, bytearray, memoryview)):
            opened = _in_memory(bytes(source), name, stack)
        else:
            file = stack.enter_context(_open_path(source, name))
            status = os.fstat(file.fileno())
            _refuse_irregular(status.st_mode, name)
            opened = _on_disk(file, name, status.st_size)
        if opened.size_bytes == 0:
            raise EmptyFile(f"{opened.name}: 0 bytes. Record or copy it again.")
        yield opened


def name_of(source: AudioSource) -> str:
    """The name of a source in messages."""
    if isinstance(source, Segment):
        return f"{name_of(source.recording)} {source}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"recording of {len(source)} bytes"
    return printable(source)


def _in_memory(data: bytes, name: str, stack: ExitStack) -> Opened:
    if not hasattr(os, "memfd_create"):
        return Opened(name, len(data), lambda offset, count: data[offset : offset + count])
    file = stack.enter_context(io.FileIO(os.memfd_create("recording"), "w+b"))
    view = memoryview(data)
    while view:
        view = view[file.write(view) or 0 :]
    return _on_disk(file, name, len(data))


def _on_disk(file: io.FileIO, name: str, size_bytes: int) -> Opened:
    if hasattr(os, "pread"):
        descriptor = file.fileno()
        return Opened(name, size_bytes, lambda offset, count: os.pread(descriptor, count, offset), descriptor)

    def read_at(offset: int, count: int) -> bytes:
        file.seek(offset)
        return file.read(count)

    return Opened(name, size_bytes, read_at)  # Windows: its C libraries do not share descriptors


def _open_path(path: str | os.PathLike[str], name: str) -> io.FileIO:
    def without_waiting(path: str, flags: int) -> int:
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))

    try:
        _refuse_irregular(os.stat(path).st_mode, name)  # before opening: opening a device can have side effects
        return open(path, "rb", buffering=0, opener=without_waiting)  # binary on Windows too
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL in the name
        if is_address(os.fsdecode(path)):
            remedy = "only s3:// and gs:// URLs are fetched. Download it first."
            raise NotFetched(f"{name}: this is a URL; {remedy}") from error
        raise NotFound(f"{name or 'empty path'}: {_why_missing(path)}") from error
    except PermissionError as error:
        raise PermissionDenied(f"{name}: permission denied. Grant read access to it and its folders.") from error
    except OSError as error:
        reason = "too many open files" if error.errno == errno.EMFILE else error.strerror
        raise Unreadable(f"{name}: {reason}. Check the path, the disk or the network share.") from error


def _why_missing(path: str | os.PathLike[str]) -> str:
    """Why a path does not exist, and the remedy, as the end of a sentence."""
    with suppress(OSError, ValueError):
        target = os.readlink(path)
        if "annex" in Path(target).parts:
            return "a git-annex link whose recording is not here. Run git annex get in its repository."
        return f"a link to {printable(target)}, which does not exist. Fetch that file, or correct the link."
    return "no such file. Check the path and the folder it is read from."


def _refuse_irregular(mode: int, name: str) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise NotAFile(f"{name} is {kind}; expected a regular audio file. Give the path of a recording.")


SNDFILE = "WAV, RF64, W64, AIFF, CAF, AU, SPHERE, FLAC, OGG (Vorbis, Opus) and MP3"
ACCEPTED = f"{SNDFILE}, and through FFmpeg m4a, mp4, 3gp, mov, webm, mkv, AAC, AMR, WMA, AVI, Speex and more"
REMEDY = "Convert it, for example: ffmpeg -i IN -c:a pcm_s16le OUT.wav"

_ENDINGS = {
    "libsndfile": "wav wave rf64 bwf w64 aif aiff aifc caf au snd sph nist flac ogg oga opus mp3 mpga",
    "mp4": "m4a m4b m4r m4v mp4 mov qt 3gp 3ga 3gpp 3g2",
    "matroska": "webm weba mka mkv",
    "asf": "wma wmv asf",
    "ogg": "spx ogv ogx",
    "more": "aac adts amr awb avi flv mp2 mpa ac3 eac3 gsm wv tta ape mpc ts mts mpg mpeg voc loas ra rm",
}
EXTENSIONS = frozenset(f".{ending}" for endings in _ENDINGS.values() for ending in endings.split())
"""File endings, each with its dot, that a folder scan treats as recordings."""
USUAL_ENDINGS = ".wav, .flac, .mp3, .ogg, .m4a, .webm or the like (docs/formats.md lists all)"

_SPEECH = (
    "amrnb amrwb libopencore_amrnb libopencore_amrwb speex gsm gsm_ms g722 g723_1 g726 g726le g729 ilbc qcelp evrc"
)
_MUSIC = "aac aac_latm mp1float mp2float mp3float mp1 mp2 mp3 opus libopus vorbis flac alac ac3 eac3 wavpack tta ape"
_OLDER = "wmav1 wmav2 wmapro wmalossless wmavoice mpc7 mpc8 truespeech nellymoser qdm2 sipr cook mace3 mace6"
CODECS = frozenset(f"{_SPEECH} {_MUSIC} {_OLDER} real_144 real_288".split())

_LFS = "a Git LFS pointer instead of the recording itself. Run git lfs pull in its repository"
_WEB_PAGE = "a web page saved in its place. Download it again, perhaps after signing in"
_OTHERS = (  # first bytes of a file that is no recording, lower case; what it is, and the remedy
    (b"version https://git-lfs", _LFS),
    (b"version https://hawser", _LFS),
    (b"/annex/objects/", "a git-annex pointer instead of the recording itself. Run git annex get in its repository"),
    (b"<!doctype html", _WEB_PAGE),
    (b"<html", _WEB_PAGE),
    (b"<?xml", "an XML document, perhaps a server's error message. Download it again"),
    (b"{", "a JSON document, perhaps a server's error message. Download it again"),
    (b"pk\3\4", "a ZIP archive. Unpack it"),
    (b"\x1f\x8b", "compressed with gzip. Unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive. Unpack it"),
    (b"rar!", "a RAR archive. Unpack it"),
    (b"#extm3u", "a playlist. Pass the recordings that it lists"),
    (b"mthd", "MIDI: notes, not sound. Render it to WAV"),
)


def is_accepted(codec: str) -> bool:
    """Whether FFmpeg may decode this codec, given by the name of FFmpeg's decoder."""
    return codec in CODECS or codec.startswith(("pcm_", "adpcm_"))


def what_else(head: bytes) -> str:
    """What kind of file this is if not a recording, by its first 64 bytes, and the remedy: the end of a sentence."""
    beginning = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").lower()
    for magic, description in _OTHERS:
        if beginning.startswith(magic):
            return f"{description}."
    if head and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return f"it holds text. Accepted are {ACCEPTED}."
    return f"its format is not known. Accepted are {ACCEPTED}."
